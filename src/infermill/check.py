"""The same inputs through two runtimes, or in two precisions: how far apart the answers are, and which layer is the
first to differ.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infermill.errors import BadInputError, SourceError, UsageError
from infermill.estimation import Sample
from infermill.evidence import (
    NO_LABEL,
    Differences,
    Evidence,
    Worst,
    answers,
    class_names,
    differences,
    evidence_of,
    joined,
    worst_of,
)
from infermill.job import empty_source, tell_assumptions
from infermill.jobspec import suffixes_of
from infermill.layers import Deviation, Layer, deviation, first_difference
from infermill.meter import Meter
from infermill.models.card import ModelCard
from infermill.models.model import Model, in_fp32
from infermill.models.opening import open_model
from infermill.plan import cut
from infermill.predictions import rows_for
from infermill.runtimes import Arrays, Batch, Predictor
from infermill.sources import list_source, rereadable
from infermill.stages import Stages
from infermill.truth import read_truth, right_classes
from infermill.types import CardOptions, ObjectRef, Options, RuntimeName
from infermill.worker import load_predictor, network_of, stages_of

INPUTS = 64
TOLERANCE = 1e-4
LOWER_TOLERANCE = 0.01
"Where a side computes in less than fp32: of the agreement."
_GRID = 16
Row = NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class OutputDifference:
    """How far an output of the one runtime is from that of the other; `top1` is the part of inputs whose best class
    is the same, of those that the right runtime answers with numbers, for classification.
    """

    name: str
    absolute: float
    relative: float
    top1: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two runtimes, or precisions, say of the same inputs.

    In fp32, `layer` is the first that differs, where an output does. It is None where no layer differs by itself: the
    difference is then gone when values between the layers are given out, for layers cannot be fused where they are.
    In less, each layer differs.
    """

    runtime: RuntimeName
    against: RuntimeName
    precision: str
    "What `runtime` computes in, as a `Predictor` says it."
    against_precision: str
    inputs: int
    skipped: int
    "Objects of the source that cannot be decoded."
    tolerance: float
    outputs: tuple[OutputDifference, ...]
    layer: Layer | None
    evidence: Evidence
    "How far the answers are apart; of a detection, the outputs of the network."
    worst: tuple[Worst, ...] = ()
    "The inputs that are farthest apart, worst first; of random ones, the key is the number from 0."

    @property
    def is_lower(self) -> bool:
        """Whether a side computes in less than fp32."""
        return is_lower(self.precision, self.against_precision)

    @property
    def agrees(self) -> bool:
        """Whether no output differs by more than the tolerance, as a part of its largest value.

        In less than fp32, whether the agreement, or the upper end of its interval, is 1 less the tolerance.
        """
        if not self.is_lower:
            return all(output.relative <= self.tolerance for output in self.outputs)
        reached = self.evidence.agreement if self.evidence.interval is None else self.evidence.interval[1]
        return reached >= 1 - self.tolerance

    def as_json(self) -> dict[str, Any]:
        """The comparison as plain JSON types; an infinite difference is null."""
        return {"agrees": self.agrees, **_finite(asdict(self) | {"evidence": self.evidence.as_json()})}


def check(
    model: str | Path | ModelCard,
    against: RuntimeName,
    source: str | Path | None = None,
    options: Options | None = None,
    card_options: CardOptions | None = None,
    tolerance: float | None = None,
    truth: str | None = None,
) -> Comparison:
    """Run a network in `options.runtime` and in another runtime, or in a lower precision and in fp32, and compare what
    is answered.

    Args:
        model: as `run`.
        against: the runtime that is right, in fp32; the same one where the card has another precision.
        source: what to run it on, as `run`: a sample of 64, or the first `options.limit`. Random inputs, the same at
            every call, where it is None.
        options: as `run`.
        card_options: as `run`; with its `precision`.
        tolerance: the largest difference that is none, as a part of an output's largest value; by default 1e-4. Where
            a side computes in less than fp32, how much less than 1 the agreement may be; by default 0.01.
        truth: as `quantize`: what accuracy is measured by.

    Raises:
        UsageError: both runtimes are the same, and the precision as well; or it is not there; or `truth` is given
            without a source, or for another task.
        SourceError: as `run`; or no input can be decoded, or is answered with numbers, or `truth` has a class of none.
        ModelError, StoreError: as `run`.

    Example:
        >>> check("resnet-18-symbol.json", "mxnet", "photos/").agrees  # doctest: +SKIP
        True
    """
    options = options or Options()
    resolved = open_model(model, options, card_options or CardOptions())
    tell_assumptions(resolved)
    return compare(resolved, against, source, options, tolerance, truth)


def compare(
    model: Model,
    against: RuntimeName,
    source: str | Path | None,
    options: Options,
    tolerance: float | None = None,
    truth: str | None = None,
) -> Comparison:
    """As `check`, for a model that has been opened.

    Example:
        >>> compare(model, "onnxruntime", None, Options(), 1e-4).inputs  # doctest: +SKIP
        64
    """
    if against == options.runtime and model.card.precision == "fp32":
        raise UsageError(
            f"{against} is compared with itself", "name another one with --runtime or --against, or a --precision"
        )
    if tolerance is not None and not 0 <= tolerance < 1:
        raise UsageError(f"--tolerance {tolerance} is no part of 1", "leave it out for the default")
    if truth is not None and source is None:
        raise UsageError("--truth is of objects, and without SOURCE inputs are random", "name the SOURCE of its keys")
    known = None if truth is None else read_truth(truth, model.card, options)
    names = class_names(model.labels)
    other = replace(options, runtime=against)
    predictors = loaded(model, options), loaded(in_fp32(model), other)
    precisions = predictors[0].precision, predictors[1].precision
    if tolerance is None:
        tolerance = LOWER_TOLERANCE if is_lower(*precisions) else TOLERANCE
    with _inputs(model, predictors[0], source, options) as inputs:
        classes = right_classes(inputs.refs, names, known)
        tallies = _Tallies(model, predictors[0].output_names)
        keys: list[str] = []
        while some := list(islice(inputs.rows, predictors[0].batch_size)):
            batch = np.stack([row for _, row in some])
            keys += [key for key, _ in some]
            tallies.add(batch, predictors[0](batch), predictors[1](batch))
    if tallies.worst is None:
        raise SourceError(f"no object of {source} can be decoded", "infermill plan says why")
    apart = joined(tallies.differences)
    evidence = evidence_of(apart, [classes.get(key, NO_LABEL) for key in keys])
    outputs = tallies.outputs(evidence)
    differs = not is_lower(*precisions) and any(output.relative > tolerance for output in outputs)
    if not evidence.objects and not differs:
        raise SourceError(
            f"{against} in fp32 answers none of {len(keys)} inputs with numbers: there is nothing to compare",
            "check the network, and give a SOURCE with objects that it was made for",
        )
    layer = None
    if differs:
        del predictors  # memory for those that are loaded next
        loads = (lambda probe: loaded(probe, options)), (lambda probe: loaded(probe, other))
        layer = first_difference(model, loads, tallies.worst, tolerance)
    worst = worst_of(apart, evidence, names, keys)
    return Comparison(
        options.runtime, against, *precisions, len(keys), inputs.skipped, tolerance, outputs, layer, evidence, worst
    )


def is_lower(*precisions: str) -> bool:
    """Whether one of them is less than fp32.

    Example:
        >>> is_lower("int8", "fp32")
        True
    """
    return any(precision != "fp32" for precision in precisions)


def loaded(model: Model, options: Options) -> Predictor:
    """A model's predictor, with the streams and the batch of a job."""
    return load_predictor(model, options, Meter())[0]


class _Tallies:
    """What is known of each output, and the input whose answers are farthest apart."""

    def __init__(self, model: Model, names: tuple[str, ...]) -> None:
        # Boxes come in no order that two answers would share.
        is_detection = model.card.task == "detection"
        self._card = replace(model.card, task="raw") if is_detection else model.card
        self.differences: list[Differences] = []
        self._deviations = dict.fromkeys(names, Deviation(0.0, 0.0))
        self._farthest = -1.0
        self._inputs = 0
        self.worst: Batch | None = None
        "That input, as a batch of one."

    def add(self, batch: Batch, found: Arrays, expected: Arrays) -> None:
        compared = answers(self._card, expected), answers(self._card, found)
        self.differences.append(differences(self._card.task, *compared, first=self._inputs))
        self._inputs += len(batch)
        for name, one, other in zip(self._deviations, found, expected, strict=True):
            for row in range(len(batch)):
                apart, before = deviation(one[row], other[row]), self._deviations[name]
                if apart.relative > self._farthest:
                    self._farthest, self.worst = apart.relative, batch[row : row + 1]
                self._deviations[name] = Deviation(
                    max(apart.absolute, before.absolute), max(apart.largest, before.largest)
                )

    def outputs(self, evidence: Evidence) -> tuple[OutputDifference, ...]:
        top1 = evidence.agreement if evidence.measure == "top-1" else None
        return tuple(
            OutputDifference(name, apart.absolute, apart.relative, top1) for name, apart in self._deviations.items()
        )


class _Inputs:
    """Keys, and rows as the network takes them, made one by one; `skipped` counts what cannot be decoded."""

    def __init__(self, rows: Iterator[tuple[str, Row | None]], refs: Sequence[ObjectRef] = ()) -> None:
        self.skipped = 0
        self.rows = self._decoded(rows)
        self.refs = refs

    def _decoded(self, rows: Iterator[tuple[str, Row | None]]) -> Iterator[tuple[str, Row]]:
        for key, row in rows:
            if row is None:
                self.skipped += 1
            else:
                yield key, row


@contextmanager
def _inputs(model: Model, predictor: Predictor, source: str | Path | None, options: Options) -> Iterator[_Inputs]:
    if source is None:
        rows = _random_rows(predictor, options.limit or INPUTS)
        yield _Inputs((str(number), row) for number, row in enumerate(rows))
        return
    sample = Sample(options.limit or INPUTS)
    with rereadable(str(source)) as listed:
        where, batches = list_source(listed, options.suffix, options, suffixes_of(model))
        for table in cut(batches, options.partition_objects, options.partition_bytes, options.limit):
            sample.add(table)
        if not sample.refs:
            raise empty_source(str(source))
        stages = stages_of(where, model, options, lambda: network_of(predictor, rows_for(model, predictor)))
        refs = sample.refs
        yield _Inputs(((ref.key, decoded(ref, stages)) for ref in refs), refs)


def decoded(ref: ObjectRef, stages: Stages) -> Row | None:
    """An object as the network takes it, or None where it cannot be fetched or decoded."""
    try:
        row = stages.decode(stages.fetch(ref, lambda _: None))
    except BadInputError:
        return None
    return row if row.dtype.names is None else row["pixels"]  # without the image's size, which no runtime needs


def _random_rows(predictor: Predictor, count: int) -> Iterator[Row]:
    """Pictures of coloured patches, which differ more from each other than noise does; or random tensors."""
    random = np.random.default_rng(0)
    shape, dtype = predictor.input_shape, np.dtype(predictor.input_dtype)
    for _ in range(count):
        if dtype == np.uint8 and len(shape) == 3:
            grid = int(random.integers(1, _GRID + 1))
            patches = random.integers(0, 256, (grid, grid, shape[2]), np.uint8)
            yield patches[np.ix_(*(np.arange(length) * grid // length for length in shape[:2]))]
        elif dtype.kind == "f":
            yield random.standard_normal(shape).astype(dtype)
        else:
            yield random.integers(0, 2, shape).astype(dtype)  # what an index, a flag and a count may all be


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
