"""How far the answers of two forms of a network are apart, on the same inputs: in fp32, and in less.

Pure functions over arrays, so that a batch at a time is enough:

    outputs of a batch, twice ─► answers ─► differences ─► joined ─► evidence_of ─► Evidence
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from infermill.errors import ModelError
from infermill.models.card import ModelCard
from infermill.predictions import activate
from infermill.types import Task

Arrays = tuple[NDArray[np.generic], ...]
Measure = Literal["top-1", "cosine", "relative error"]
MEASURES: dict[Task, Measure] = {"classification": "top-1", "embedding": "cosine", "raw": "relative error"}
NO_LABEL = -1
WORST = 10
THRESHOLD = 0.5
"Of a network that gives one number: with more than this, an input is of its class."
# The 0.975 quantile of the normal distribution.
_Z = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Proportion:
    """`count` of `of` objects.

    Example:
        >>> Proportion(497, 500).share
        0.994
    """

    count: int
    of: int

    @property
    def share(self) -> float:
        """The part of 1; that of no objects is 0."""
        return self.count / self.of if self.of else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval for the share of all objects, of which these are a random sample: Wilson's score interval
        (E. B. Wilson, J. Am. Stat. Assoc. 22, 1927), which holds near 0 and 1, too (Brown, Cai and DasGupta,
        Statistical Science 16, 2001).

        Example:
            >>> [round(bound, 4) for bound in Proportion(500, 500).interval]
            [0.9924, 1.0]
        """
        if not self.of:
            return 0.0, 1.0
        share, weight = self.share, _Z**2 / self.of
        centre = (share + weight / 2) / (1 + weight)
        half = _Z / (1 + weight) * math.sqrt(share * (1 - share) / self.of + weight / (4 * self.of))
        # At the ends the formula gives 0 and 1, less what rounding takes.
        low = 0.0 if self.count == 0 else max(centre - half, 0.0)
        return low, 1.0 if self.count == self.of else min(centre + half, 1.0)


@dataclass(frozen=True, slots=True)
class Differences:
    """One entry for each object that fp32 answers with numbers: what both say, and how far that is apart.

    `delta` [N] float64 is, of a classification, the largest difference of a class's score; of an embedding
    1 - cosine similarity; of raw outputs the largest difference as a part of the largest value of that output, and of
    outputs without fractions the part of their numbers that differ; at most 1. It is NaN where only the other form
    answers NaN or infinity. `best` [N, 2] int64 has both best classes, and is [N, 0] for other tasks; of a network
    with one score, the class is 1 where that is over 0.5, and else 0.
    """

    task: Task
    index: NDArray[np.int64]
    "Which row of the inputs each entry is."
    delta: NDArray[np.float64]
    best: NDArray[np.int64]

    @property
    def agrees(self) -> NDArray[np.bool_]:
        """Whether both best classes are the same; for classification."""
        return np.asarray((self.best[:, 0] == self.best[:, 1]) & ~np.isnan(self.delta))


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a network in less precision is worth beside fp32, measured on the `objects` that fp32 answers with numbers.

    `agreement` is the part of objects with the same best class (`measure` is `top-1`), with its 95 % `interval`; of an
    embedding the mean cosine similarity, and of raw outputs 1 less the mean relative error, without an interval.
    `max_delta` and `mean_delta` are over objects, as `Differences` has them.
    """

    measure: Measure
    objects: int
    agreement: float
    interval: tuple[float, float] | None
    max_delta: float
    mean_delta: float
    nonfinite: int
    "Objects for which only the lower precision answers NaN or infinity: they do not agree, and have no delta."
    accuracy: tuple[Proportion, Proportion] | None
    "In fp32 and in less, of the objects that have a label; None where none has."
    worst: tuple[int, ...]
    "Rows of the inputs, worst first: NaN, then another best class, then the largest delta."

    def as_json(self) -> dict[str, Any]:
        """The evidence as plain JSON types, less the worst rows, which mean nothing without the inputs' keys."""
        data = {name: value for name, value in asdict(self).items() if name != "worst"}
        if self.accuracy is not None:
            shares = [{**asdict(one), "share": one.share, "interval": list(one.interval)} for one in self.accuracy]
            data["accuracy"] = dict(zip(("fp32", "this"), shares, strict=True))
        return data | {"interval": None if self.interval is None else list(self.interval)}


def check_measurable(card: ModelCard) -> None:
    """Raise where it is not known how answers would be compared.

    Raises:
        ModelError: the task is detection.
    """
    if card.task not in MEASURES:
        raise ModelError(
            f"there is no measure for how far two answers of the task {card.task} are apart",
            "a card with `task: raw` compares the network's own outputs, by their relative error",
        )


def answers(card: ModelCard, outputs: Arrays) -> Arrays:
    """What is compared of a network's outputs: the scores [N, classes] or the vectors [N, dimensions] in float32, after
    the card's activation, and NaN where the network answers NaN or infinity; of raw outputs each as it is.
    """
    if card.task == "raw":
        return outputs
    values = outputs[0].reshape(len(outputs[0]), -1).astype(np.float32, copy=False)
    # A softmax would take minus infinity for a score of 0.
    is_number = np.asarray(np.isfinite(values).all(axis=1))[:, None]
    return (np.where(is_number, activate(np.where(is_number, values, 0), card.output.activation), np.nan),)


def differences(task: Task, before: Arrays, after: Arrays, first: int = 0) -> Differences:
    """Compare the answers to a batch, row by row.

    Args:
        task: classification, embedding or raw.
        before: in fp32, as `answers` gives them.
        after: the same in less precision.
        first: the number of the batch's first row among the inputs.

    Example:
        >>> one = np.array([[0.25, 0.75], [0.5, 0.5]]), np.array([[0.5, 0.5], [0.5, 0.5]])
        >>> differences("classification", one[:1], one[1:]).delta
        array([0.25, 0.  ])
    """
    rows = np.flatnonzero(_finite(before))
    before, after = tuple(array[rows] for array in before), tuple(array[rows] for array in after)
    is_number = _finite(after)
    best = np.zeros((len(rows), 0), np.int64)
    if task == "classification":
        best = np.stack([_best(_rows(array[0])) for array in (before, after)], axis=1)
    delta = np.full(len(rows), np.nan)
    if is_number.any():
        pairs = [(_rows(one)[is_number], _rows(two)[is_number]) for one, two in zip(before, after, strict=True)]
        delta[is_number] = np.max([_delta(task, *pair) for pair in pairs], axis=0)
    return Differences(task, rows + first, delta, best)


def _best(scores: NDArray[Any]) -> NDArray[np.int64]:
    """The best class of each row; of one number, 1 where it is over the threshold, and else 0."""
    if scores.shape[1] == 1:
        return np.asarray(scores[:, 0] > THRESHOLD, np.int64)
    # Of equal scores the lower index is the better one, here as in a job.
    return np.asarray(scores.argmax(axis=1), np.int64)


def class_names(labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The names of the best classes: where a network gives one number, and has one label, those of 0 and of 1.

    Example:
        >>> class_names(("cat",))
        ('not cat', 'cat')
    """
    return (f"not {labels[0]}", labels[0]) if labels is not None and len(labels) == 1 else labels


def _rows(array: NDArray[Any]) -> NDArray[Any]:
    """An output with one dim for all that a row has."""
    return array.reshape(len(array), math.prod(array.shape[1:]))


def _finite(arrays: Arrays) -> NDArray[np.bool_]:
    """Which rows hold numbers alone."""
    masks = [np.isfinite(_rows(array)).all(axis=1) for array in arrays if array.dtype.kind == "f"]
    return np.asarray(np.logical_and.reduce([np.ones(len(arrays[0]), np.bool_), *masks]))


def _delta(task: Task, before: NDArray[Any], after: NDArray[Any]) -> NDArray[np.float64]:
    if before.dtype.kind != "f":
        return np.asarray((before != after).mean(axis=1), np.float64)
    one, other = before.astype(np.float64), after.astype(np.float64)
    if task == "embedding":
        lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        cosine = (one * other).sum(axis=1) / np.where(lengths == 0, 1.0, lengths)
        is_same = (one == other).all(axis=1)  # two vectors of zeros have no angle, and are the same
        return np.where(is_same, 0.0, np.clip(1.0 - cosine, 0.0, 1.0))
    apart = np.abs(one - other).max(axis=1, initial=0.0)
    if task == "classification":
        return np.asarray(apart)
    largest = np.abs(one).max(axis=1, initial=0.0)
    # Of an output of nothing but zeros, any other value is wrong altogether.
    return np.asarray(np.minimum(apart / np.where(largest == 0, np.where(apart == 0, 1.0, apart), largest), 1.0))


def joined(parts: Sequence[Differences]) -> Differences:
    """The differences of several batches, of which there is at least one, as one."""
    return Differences(
        parts[0].task,
        np.concatenate([part.index for part in parts]),
        np.concatenate([part.delta for part in parts]),
        np.concatenate([part.best for part in parts]),
    )


def evidence_of(found: Differences, labels: Sequence[int] | None = None, worst: int = WORST) -> Evidence:
    """Sum up what was found.

    Args:
        found: the differences of all objects.
        labels: the right class of each input, by its row; -1 where it is not known.
        worst: how many of the worst objects are named.

    Example:
        >>> before = np.array([[0.1, 0.9], [0.6, 0.4]])
        >>> found = differences("classification", (before,), (np.array([[0.2, 0.8], [0.4, 0.6]]),))
        >>> evidence = evidence_of(found, labels=[1, 0])
        >>> evidence.agreement, evidence.worst, [one.share for one in evidence.accuracy]
        (0.5, (1, 0), [1.0, 0.5])
    """
    is_number = ~np.isnan(found.delta)
    numbers = found.delta[is_number]
    mean = float(numbers.mean()) if len(numbers) else 0.0
    is_classification = found.task == "classification"
    agrees = found.agrees if is_classification else is_number
    same = Proportion(int(agrees.sum()), len(agrees))
    order = np.lexsort((found.index, -np.nan_to_num(found.delta), agrees, is_number))
    return Evidence(
        measure=MEASURES[found.task],
        objects=len(found.delta),
        # What is no number has nothing in common with one: a similarity of 0.
        agreement=same.share if is_classification else same.share * (1.0 - mean),
        interval=same.interval if is_classification else None,
        max_delta=float(numbers.max(initial=0.0)),
        mean_delta=mean,
        nonfinite=int((~is_number).sum()),
        accuracy=_accuracy(found, np.asarray(labels, np.int64)) if is_classification and labels is not None else None,
        worst=tuple(found.index[order[:worst]].tolist()),
    )


@dataclass(frozen=True, slots=True)
class Worst:
    """An input whose answers are far apart: the best class of each, by its label where there is one, and how far."""

    key: str
    expected: str | None
    "In fp32, of the runtime that is right; other tasks have no classes."
    found: str | None
    delta: float | None
    "None where only the other one answers NaN or infinity."


def worst_of(
    found: Differences, evidence: Evidence, names: tuple[str, ...] | None, keys: Sequence[str]
) -> tuple[Worst, ...]:
    """The worst inputs; `keys` are those of all.

    Example:
        >>> found = differences("classification", (np.array([[0.1, 0.9]]),), (np.array([[0.6, 0.4]]),))
        >>> worst_of(found, evidence_of(found), ("cat", "dog"), ["a.jpg"])
        (Worst(key='a.jpg', expected='dog', found='cat', delta=0.5),)
    """
    places = {row: place for place, row in enumerate(found.index.tolist())}

    def worst(row: int) -> Worst:
        delta, best = float(found.delta[places[row]]), found.best[places[row]].tolist()
        expected, other = [str(one) if names is None else names[one] for one in best] or (None, None)
        return Worst(keys[row], expected, other, None if math.isnan(delta) else delta)

    return tuple(worst(row) for row in evidence.worst)


def _accuracy(found: Differences, labels: NDArray[np.int64]) -> tuple[Proportion, Proportion] | None:
    label = labels[found.index]
    is_labelled = label != NO_LABEL
    if not is_labelled.any():
        return None
    is_right = (found.best == label[:, None]) & is_labelled[:, None]
    is_right[:, 1] &= ~np.isnan(found.delta)
    before, after = (Proportion(int(count), int(is_labelled.sum())) for count in is_right.sum(axis=0))
    return before, after
