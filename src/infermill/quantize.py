"""`infermill quantize`: a network in int8, with the evidence for it measured on objects of the user's own.

source ─► a sample, in three parts ─┬► calibrate: the ranges of values          ─► the network in int8
                                    ├► select: which nodes have to stay in float ─► the same, less these
                                    └► held out: the evidence                    ─► the card
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infermill.check import Row, decoded, loaded
from infermill.errors import InfermillError, SourceError, UsageError
from infermill.estimation import Sample
from infermill.evidence import (
    NO_LABEL,
    Differences,
    Evidence,
    Worst,
    answers,
    check_measurable,
    class_names,
    differences,
    evidence_of,
    joined,
    worst_of,
)
from infermill.job import empty_source, tell_assumptions
from infermill.jobspec import check_options, suffixes_of
from infermill.models.card import Accuracy, CardEvidence, Files, ModelCard
from infermill.models.card_file import write_card
from infermill.models.conversion import create_new
from infermill.models.inspection import card_beside
from infermill.models.model import Model
from infermill.models.opening import open_card, open_model
from infermill.models.quantization import Quantized, check_quantizable, quantize_network
from infermill.plan import cut
from infermill.predictions import rows_for
from infermill.runtimes import Predictor
from infermill.sensitivity import Choice, choose_nodes
from infermill.sources import list_source, rereadable
from infermill.stages import Stages
from infermill.truth import read_truth, right_classes
from infermill.types import CardOptions, ObjectRef, Options
from infermill.worker import network_of, stages_of

OBJECTS = 800
TARGET = 0.99
FEWEST_HELD_OUT = 50
PROBE_ROWS = 16
_AT_ONCE = 64
_ANSWERED = "objects to measure with that fp32 answers with numbers"
CARD_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Quantization:
    """What `quantize` has found, and the files that it wrote: none where it agrees less than was asked for."""

    card: Path | None
    network: Path | None
    evidence: Evidence
    worst: tuple[Worst, ...]
    calibrated: int
    "Objects that the ranges of values are from."
    selected: int
    "Objects by which the nodes in float were chosen."
    skipped: int
    "Objects of the sample that cannot be fetched or decoded."
    unanswered: int
    "Objects held out that fp32 answers with NaN or infinity: they are not compared."
    kept_in_float: tuple[str, ...]
    nodes: int
    "How many could have been kept in float."
    int8_share: float | None
    "The part of multiplications that is in int8; None where it is not known."
    tries: int
    runtime: str
    source: str
    of: str
    "Digest of the model in fp32."
    min_agreement: float | None

    @property
    def passed(self) -> bool:
        """Whether it agrees as much as was asked for."""
        return self.min_agreement is None or self.evidence.agreement >= self.min_agreement

    def as_json(self) -> dict[str, Any]:
        """The result as plain JSON types."""
        paths = {name: None if path is None else str(path) for name, path in self._paths()}
        worst = [asdict(one) for one in self.worst]
        data = {name: getattr(self, name) for name in self.__slots__ if name not in ("card", "network", "worst")}
        return {"passed": self.passed, **paths, **data, "evidence": self.evidence.as_json(), "worst": worst} | {
            "kept_in_float": list(self.kept_in_float)
        }

    def _paths(self) -> tuple[tuple[str, Path | None], ...]:
        return ("card", self.card), ("network", self.network)


def quantize(
    model: str | Path | ModelCard,
    source: str | Path,
    output: str | Path,
    options: Options | None = None,
    card_options: CardOptions | None = None,
    *,
    objects: int = OBJECTS,
    min_agreement: float | None = None,
    truth: str | None = None,
) -> Quantization:
    """Write a network in int8 and a card for it that says how far its answers are from those in fp32.

    Args:
        model: as `run`.
        source: as `run`: a sample of it is used, an eighth to calibrate, a quarter to choose what stays in float, and
            the rest, which neither has seen, to measure.
        output: the card, `.yaml`; the network lies beside it. Neither may be there.
        options: as `run`; evidence is measured in `options.runtime`.
        card_options: as `run`.
        objects: of the sample.
        min_agreement: where it agrees less, nothing is written. Nodes are kept in float until the selection agrees so
            much (without it: 0.99) and a little more, or half of the multiplications are in float.
        truth: a Parquet file with the columns `key` and `label`, for a classification; the labels of shards count
            where it is not given.

    Raises:
        UsageError: a number or a path cannot be right, a file is there already, or `truth` is given for another task.
        ModelError: the network cannot be quantized, or answers of its task cannot be compared.
        SourceError: fewer than 50 objects are left to measure, or fp32 answers fewer with numbers; or `truth` has a
            class of none of them.
        StoreError: as `run`.

    Example:
        >>> quantize("model.yaml", "photos/", "model-int8.yaml").evidence.agreement  # doctest: +SKIP
        0.992
    """
    options, card_options, output = options or Options(), card_options or CardOptions(), Path(output)
    network = _network_beside(output)
    _check_numbers(options, objects, min_agreement)
    opened = open_model(model, options, card_options)
    check_measurable(opened.card)
    check_quantizable(opened)
    if opened.card.precision != "fp32":
        hint = "leave --precision out, or quantize a card without `precision`; the new card may be run with it"
        raise UsageError(
            f"int8 is compared with fp32, and this model is to be computed in {opened.card.precision}", hint
        )
    tell_assumptions(opened)
    known = None if truth is None else read_truth(truth, opened.card, options)
    names = class_names(opened.labels)
    predictor = loaded(opened, options)
    with rereadable(str(source)) as listed:
        inputs = _Inputs(listed, str(source), opened, predictor, options, objects)
        classes = right_classes(inputs.held_out, names, known)
        quantized = quantize_network(opened, [row for _, row in inputs.take(inputs.calibrate)])
        with tempfile.TemporaryDirectory(prefix="infermill-") as folder:
            trial = _Trial(opened, quantized, Path(folder, "int8.onnx"), options)
            rows = [row for _, row in inputs.take(inputs.select)]
            choice = _choose(trial, predictor, inputs, rows, min_agreement or TARGET)
            other = trial.load(choice.kept)
            content = trial.path.read_bytes()
            found, seen = _measure(opened, predictor, other, inputs.take(inputs.held_out))
    evidence = evidence_of(found, [classes.get(ref.key, NO_LABEL) for ref in seen])
    if evidence.objects < FEWEST_HELD_OUT:
        raise inputs.too_few(evidence.objects, _ANSWERED)
    worst = worst_of(found, evidence, names, [ref.key for ref in seen])
    result = Quantization(
        None, None, evidence, worst, len(inputs.calibrate), len(rows), inputs.skipped,
        len(seen) - evidence.objects, choice.kept, len(quantized.nodes), quantized.int8_share(choice.kept),
        choice.tries, options.runtime, str(source), opened.digest, min_agreement,
    )  # fmt: skip
    if not result.passed:
        return result
    before = open_card(model, options, card_options)
    card = card_beside(before.card, before.base, options, output)
    card = replace(card, name=output.stem, files=Files(onnx=network.name), evidence=_record(result))
    create_new(network, content)
    try:
        create_new(output, write_card(card).encode())
    except InfermillError:
        network.unlink()
        raise
    return replace(result, card=output, network=network)


def _network_beside(output: Path) -> Path:
    if output.suffix not in CARD_SUFFIXES:
        raise UsageError(f"{output} does not end in .yaml", "name the card to write, as in -o model-int8.yaml")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {output.parent}", "name a file in a folder that is there")
    network = output.with_suffix(".onnx")
    for path in (output, network):
        if path.exists():
            raise UsageError(f"{path} is there already", "name a new file")
    return network


def _check_numbers(options: Options, objects: int, min_agreement: float | None) -> None:
    check_options(options)
    if min_agreement is not None and not 0 < min_agreement <= 1:
        raise UsageError(f"--min-agreement {min_agreement} is no part of 1", "write 0.99 for 99 %")
    if _parts(objects)[2] < FEWEST_HELD_OUT:
        hint = (
            f"take {FEWEST_HELD_OUT * 8 // 5} or more: of fewer than {FEWEST_HELD_OUT} held out, nothing would follow"
        )
        raise UsageError(f"--objects {objects} leaves {_parts(objects)[2]} to measure", hint)
    if options.runtime == "mxnet":
        raise UsageError("MXNet does not execute int8 as ONNX has it", "leave --runtime out, or take onnxruntime")


def _parts(objects: int) -> tuple[int, int, int]:
    """How many objects are to calibrate, to select and to measure."""
    calibrate, select = objects // 8, objects // 4
    return calibrate, select, objects - calibrate - select


class _Inputs:
    """A sample of the source in three parts that share no object; what cannot be decoded is counted and left out."""

    def __init__(
        self, listed: str, source: str, model: Model, predictor: Predictor, options: Options, objects: int
    ) -> None:
        sample = Sample(objects)
        where, batches = list_source(listed, options.suffix, options, suffixes_of(model))
        for table in cut(batches, options.partition_objects, options.partition_bytes, options.limit):
            sample.add(table)
        if not sample.refs:
            raise empty_source(source)
        self._source = source
        self._stages: Stages = stages_of(
            where, model, options, lambda: network_of(predictor, rows_for(model, predictor))
        )
        refs = list({ref.key: ref for ref in sample.refs}.values())  # a manifest may name one object twice
        calibrate, select, _ = _parts(len(refs))
        self.calibrate, self.select = refs[:calibrate], refs[calibrate : calibrate + select]
        self.held_out = refs[calibrate + select :]
        self.skipped = 0
        if len(self.held_out) < FEWEST_HELD_OUT:
            raise self.too_few(len(self.held_out))

    def take(self, refs: Sequence[ObjectRef]) -> Iterator[tuple[ObjectRef, Row]]:
        """The objects that can be decoded, in order."""
        taken = 0
        with ThreadPoolExecutor(self._stages.fetch_threads, "fetch") as pool:
            for some in _chunks(refs, _AT_ONCE):
                for ref, row in zip(some, pool.map(lambda ref: decoded(ref, self._stages), some), strict=True):
                    if row is None:
                        self.skipped += 1
                    else:
                        taken += 1
                        yield ref, row
        if taken < (FEWEST_HELD_OUT if refs is self.held_out else 1):
            raise self.too_few(taken)

    def too_few(self, count: int, what: str = "objects to measure with") -> SourceError:
        return SourceError(
            f"{self._source} has {count} {what}, and it takes {FEWEST_HELD_OUT}",
            f"give {FEWEST_HELD_OUT * 8 // 5} objects or more: an eighth is to calibrate, and a quarter to choose "
            "what stays in float; infermill plan says what cannot be decoded or predicted",
        )


def _chunks(refs: Sequence[ObjectRef], size: int) -> Iterator[Sequence[ObjectRef]]:
    return (refs[at : at + size] for at in range(0, len(refs), size))


class _Trial:
    """Networks with some of their nodes in float, written to one file and loaded."""

    def __init__(self, model: Model, quantized: Quantized, path: Path, options: Options) -> None:
        self._quantized, self._options = quantized, options
        self.nodes, self.path = quantized.nodes, path
        self.model = replace(model, network=path, checkpoint=None)

    def int8_share(self, kept: tuple[str, ...]) -> float:
        """Of multiplications, or of nodes where those are not known."""
        share = self._quantized.int8_share(kept)
        return 1.0 - len(kept) / len(self.nodes) if share is None else share

    def load(self, kept: Iterable[str]) -> Predictor:
        self.path.write_bytes(self._quantized.keeping(kept).SerializeToString())
        return loaded(self.model, self._options)


def _choose(trial: _Trial, predictor: Predictor, inputs: _Inputs, rows: list[Row], target: float) -> Choice:
    """Which nodes to keep in float, by what the rows of the selection show."""
    card = trial.model.card
    expected = [answers(card, predictor(batch)) for batch in _batches(rows, predictor.batch_size)]

    def measure(kept: tuple[str, ...], few: bool) -> Evidence:
        other = trial.load(kept)
        batches = list(_batches(rows, predictor.batch_size))
        if few:
            batches = batches[: max(PROBE_ROWS // predictor.batch_size, 1)]
        pairs = zip(expected, batches, strict=False)
        found = joined([differences(card.task, one, answers(card, other(batch))) for one, batch in pairs])
        if not few and not len(found.index):
            raise inputs.too_few(0, _ANSWERED)
        return evidence_of(found)

    return choose_nodes(trial.nodes, measure, trial.int8_share, target)


def _batches(rows: Sequence[Row], size: int) -> Iterator[NDArray[Any]]:
    return (np.stack(rows[at : at + size]) for at in range(0, len(rows), size))


def _measure(
    model: Model, predictor: Predictor, other: Predictor, inputs: Iterator[tuple[ObjectRef, Row]]
) -> tuple[Differences, list[ObjectRef]]:
    """Both networks on the objects that are held out, a batch at a time."""
    seen: list[ObjectRef] = []
    parts: list[Differences] = []
    while some := list(islice(inputs, predictor.batch_size)):
        batch = np.stack([row for _, row in some])
        before, after = (answers(model.card, network(batch)) for network in (predictor, other))
        parts.append(differences(model.card.task, before, after, len(seen)))
        seen += [ref for ref, _ in some]
    return joined(parts), seen


def _record(result: Quantization) -> CardEvidence:
    """The evidence, as the card has it."""
    found, accuracy = result.evidence, None
    if found.accuracy is not None:
        before, after = found.accuracy
        accuracy = Accuracy(
            objects=before.of, fp32=before.share, fp32_interval=before.interval, this=after.share,
            this_interval=after.interval,
        )  # fmt: skip
    return CardEvidence(
        of=result.of, source=result.source, runtime=result.runtime, objects=found.objects, measure=found.measure,
        agreement=found.agreement, interval=found.interval, max_delta=found.max_delta, mean_delta=found.mean_delta,
        nonfinite=found.nonfinite, accuracy=accuracy, int8_share=result.int8_share, kept_in_float=result.kept_in_float,
    )  # fmt: skip
