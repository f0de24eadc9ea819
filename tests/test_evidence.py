"""How far two forms of a network are apart: intervals, differences by task, accuracy, and the worst objects."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from infermill.errors import ModelError
from infermill.evidence import Proportion, answers, check_measurable, differences, evidence_of, joined
from infermill.models.card import ModelCard
from infermill.models.card_file import parse_card
from infermill.types import Task

scores = arrays(np.float32, st.tuples(st.integers(1, 12), st.just(5)), elements=st.floats(0, 1, width=32))
TASKS: list[Task] = ["classification", "embedding", "raw"]


def card_of(**fields: Any) -> ModelCard:
    return parse_card({"name": "tiny", "files": {"onnx": "tiny.onnx"}, **fields})


# --- intervals


@pytest.mark.parametrize(  # R: prop.test(k, n, correct = FALSE)$conf.int
    ("count", "of", "low", "high"),
    [(0, 10, 0.0, 0.2775328), (5, 10, 0.2365931, 0.7634069), (10, 10, 0.7224672, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_intervals_are_those_of_wilson(count: int, of: int, low: float, high: float) -> None:
    assert Proportion(count, of).interval == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 5000).flatmap(lambda of: st.tuples(st.integers(0, of), st.just(of))))
def test_an_interval_holds_its_share_and_shrinks_with_more_objects(drawn: tuple[int, int]) -> None:
    count, of = drawn
    low, high = Proportion(count, of).interval
    assert 0 <= low <= Proportion(count, of).share <= high <= 1
    more_low, more_high = Proportion(4 * count, 4 * of).interval
    assert more_high - more_low < high - low
    missing = Proportion(of - count, of).interval
    assert (1 - missing[1], 1 - missing[0]) == pytest.approx((low, high)), "it is symmetric"


@pytest.mark.parametrize("share", [0.9, 0.97, 0.99])
def test_intervals_hold_the_truth_in_about_95_percent(share: float) -> None:
    counts = np.random.default_rng(0).binomial(1000, share, 4000)
    bounds = np.array([Proportion(int(count), 1000).interval for count in counts])
    held = ((bounds[:, 0] <= share) & (share <= bounds[:, 1])).mean()
    assert 0.93 < held < 0.97


# --- properties of every task


@pytest.mark.parametrize("task", TASKS)
@given(before=scores)
def test_the_same_answers_agree_entirely(task: Task, before: NDArray[np.float32]) -> None:
    found = evidence_of(differences(task, (before,), (before.copy(),)))
    assert (found.agreement, found.max_delta, found.mean_delta, found.nonfinite) == (1.0, 0.0, 0.0, 0)
    assert found.objects == len(before)


@pytest.mark.parametrize("task", TASKS)
@given(before=scores, seed=st.integers(0, 2**32), cut=st.integers(0, 12))
def test_batches_add_up_to_the_whole(task: Task, before: NDArray[np.float32], seed: int, cut: int) -> None:
    after = np.random.default_rng(seed).random(before.shape, np.float32)
    cut = min(cut, len(before))
    parts = [
        differences(task, (before[part],), (after[part],), part.start)
        for part in (slice(0, cut), slice(cut, len(before)))
    ]
    whole = evidence_of(differences(task, (before,), (after,)), worst=100)
    assert evidence_of(joined(parts), worst=100) == whole
    assert sorted(whole.worst) == list(range(len(before)))
    assert 0 <= whole.mean_delta <= whole.max_delta <= 1
    assert 0 <= whole.agreement <= 1


@given(before=scores, seed=st.integers(0, 2**32))
def test_a_classification_is_counted_as_defined(before: NDArray[np.float32], seed: int) -> None:
    random = np.random.default_rng(seed)
    after = random.random(before.shape, np.float32)
    labels = random.integers(-1, 5, len(before)).tolist()
    found = evidence_of(differences("classification", (before,), (after,)), labels, worst=1)
    same = [int(np.argmax(one)) == int(np.argmax(two)) for one, two in zip(before, after, strict=True)]
    assert found.agreement == sum(same) / len(same)
    assert found.interval == Proportion(sum(same), len(same)).interval
    largest = np.abs(before.astype(np.float64) - after).max(axis=1)
    assert (found.max_delta, found.mean_delta) == pytest.approx((largest.max(), largest.mean()))
    wrong = [row for row, is_same in enumerate(same) if not is_same] or range(len(same))
    assert found.worst == (max(wrong, key=lambda row: largest[row]),)
    labelled = [row for row, label in enumerate(labels) if label >= 0]
    if not labelled:
        assert found.accuracy is None
    else:
        right = [sum(int(array[row].argmax()) == labels[row] for row in labelled) for array in (before, after)]
        assert found.accuracy == tuple(Proportion(count, len(labelled)) for count in right)


def test_one_number_is_of_two_classes() -> None:
    before = np.array([[0.9], [0.6], [0.2], [0.5], [0.4]], np.float32)
    after = np.array([[0.8], [0.4], [0.1], [0.5], [np.nan]], np.float32)
    found = differences("classification", (before,), (after,))
    assert found.best.tolist() == [[1, 1], [1, 0], [0, 0], [0, 0], [0, 0]]
    evidence = evidence_of(found, labels=[1, 1, 0, 1, 0])
    assert (evidence.agreement, evidence.worst[:2]) == (0.6, (4, 1))
    assert evidence.accuracy == (Proportion(4, 5), Proportion(2, 5))
    (scores,) = answers(card_of(output={"activation": "sigmoid"}), (np.array([[-0.1], [0.1]], np.float32),))
    assert differences("classification", (scores,), (scores[::-1],)).best.tolist() == [[0, 1], [1, 0]]


# --- tasks without classes


def test_embeddings_are_compared_by_their_angle() -> None:
    before = np.array([[1, 0], [1, 0], [0, 0], [0, 0], [1, 1]], np.float32)
    after = np.array([[5, 0], [0, 2], [0, 0], [0, 1], [1, 0]], np.float32)
    found = differences("embedding", (before,), (after,))
    assert found.delta == pytest.approx([0, 1, 0, 1, 1 - math.sqrt(0.5)])
    evidence = evidence_of(found)
    assert (evidence.measure, evidence.interval, evidence.accuracy) == ("cosine", None, None)
    assert evidence.agreement == pytest.approx(1 - found.delta.mean())
    assert evidence.worst[:2] == (1, 3)


def test_raw_outputs_are_compared_as_parts_of_their_largest_value() -> None:
    boxes = np.array([[[10, 20], [30, 40]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]], np.float32)
    kinds = np.array([[1, 2], [3, 4], [5, 6]], np.int64)
    other_boxes = boxes + np.array([2, 0, 1], np.float32)[:, None, None]
    other_kinds = np.array([[1, 2], [3, 9], [5, 6]], np.int64)
    found = differences("raw", (boxes, kinds), (other_boxes, other_kinds))
    assert found.delta == pytest.approx([2 / 40, 0.5, 1.0])
    assert evidence_of(found).measure == "relative error"
    assert evidence_of(found, labels=[0, 0, 0]).accuracy is None


def test_detection_has_no_measure() -> None:
    card = card_of(task="detection", output={"format": "yolov8"})
    with pytest.raises(ModelError, match=r"no measure.*detection") as told:
        check_measurable(card)
    assert "task: raw" in told.value.hint
    check_measurable(card_of(task="embedding"))


# --- what is no number


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("task", TASKS)
def test_what_only_the_lower_precision_cannot_answer_does_not_agree(task: Task, bad: float) -> None:
    before = np.eye(4, dtype=np.float32)
    after = before.copy()
    after[2, 3] = bad
    evidence = evidence_of(differences(task, (before,), (after,)), labels=[0, 1, 2, 3])
    assert (evidence.objects, evidence.nonfinite, evidence.agreement) == (4, 1, 0.75)
    assert (evidence.max_delta, evidence.worst[0]) == (0.0, 2)
    if task == "classification":
        assert evidence.accuracy == (Proportion(4, 4), Proportion(3, 4))


def test_what_fp32_cannot_answer_is_left_out() -> None:
    before = np.eye(3, dtype=np.float32)
    before[1, 0] = np.nan
    found = differences("classification", (before,), (np.eye(3, dtype=np.float32),), first=10)
    assert found.index.tolist() == [10, 12]
    assert evidence_of(found).objects == 2


def test_where_fp32_answers_nothing_nothing_agrees() -> None:
    before = np.full((3, 3), np.nan, np.float32)
    evidence = evidence_of(differences("classification", (before,), (before,)))
    assert (evidence.objects, evidence.agreement, evidence.interval) == (0, 0.0, (0.0, 1.0))


def test_nothing_but_nan_has_no_agreement() -> None:
    before = np.eye(2, dtype=np.float32)
    evidence = evidence_of(differences("embedding", (before,), (np.full_like(before, np.nan),)))
    assert (evidence.agreement, evidence.max_delta, evidence.nonfinite) == (0.0, 0.0, 2)


# --- from a network's outputs


def test_answers_are_those_after_the_activation() -> None:
    logits = np.array([[[[1.0]], [[3.0]]]], np.float64)
    (values,) = answers(card_of(output={"activation": "softmax"}), (logits, logits))
    assert values.dtype == np.float32
    assert values == pytest.approx(np.array([[1, math.e**2]]) / (1 + math.e**2))
    for infinity in (np.inf, -np.inf):
        (bad,) = answers(card_of(output={"activation": "softmax"}), (np.array([[infinity, 1.0]]),))
        assert np.isnan(bad).any(), "a job would refuse it"
    raw = answers(card_of(task="raw"), (logits, logits))
    assert raw[0] is logits and len(raw) == 2


def test_evidence_is_plain_json() -> None:
    before, after = np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32)[[0, 1, 2, 0]]
    evidence = evidence_of(differences("classification", (before,), (after,)), labels=[0, 1, 2, 3])
    data = json.loads(json.dumps(evidence.as_json()))
    assert data["agreement"] == 0.75
    assert data["interval"] == pytest.approx([0.300642, 0.954413], abs=1e-5)
    assert "worst" not in data, "rows without keys"
    assert (data["accuracy"]["fp32"]["share"], data["accuracy"]["this"]["count"]) == (1.0, 3)
    json.dumps(evidence_of(differences("raw", (before,), (after,))).as_json())
