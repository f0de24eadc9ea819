"""From a network's arrays to the columns of a part."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from infermill.models.card_file import parse_card
from infermill.models.model import Model
from infermill.predictions import TOP_TYPE, Classification, Embedding, Raw, activate

logits = hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 12)), elements=st.floats(-80, 80, width=32))


def _model(top_k: int, activation: str = "none", labels: tuple[str, ...] | None = None) -> Model:
    card = {"name": "x", "files": {"onnx": "x.onnx"}, "output": {"top_k": top_k, "activation": activation}}
    return Model(parse_card(card, "test"), Path("x.onnx"), labels, "sha256:0")


@given(logits)
def test_softmax_is_that_of_float64(values: NDArray[np.float32]) -> None:
    exact = np.exp(values.astype(np.float64))
    np.testing.assert_allclose(activate(values, "softmax"), exact / exact.sum(axis=1, keepdims=True), atol=1e-6)


@given(logits)
def test_sigmoid_is_that_of_float64(values: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(activate(values, "sigmoid"), 1 / (1 + np.exp(-values.astype(np.float64))), atol=1e-6)


def test_large_logits_do_not_overflow() -> None:
    values = np.array([[1e30, -1e30, 0]], np.float32)
    assert activate(values, "softmax").tolist() == [[1, 0, 0]]
    assert activate(values, "sigmoid").tolist() == [[1, 0, 0.5]]


@given(logits, st.integers(1, 15))
def test_top_k_is_a_stable_sort(values: NDArray[np.float32], top_k: int) -> None:
    (index, score), finite = Classification(_model(top_k)).finish((values,))
    expected = np.argsort(-values, axis=1, kind="stable")[:, :top_k]
    np.testing.assert_array_equal(score, np.take_along_axis(values, expected, axis=1))
    assert finite.all()
    # Which of equal scores are within the k is open; their order is not.
    distinct = [len(set(row)) == len(row) for row in values.tolist()]
    np.testing.assert_array_equal(index[distinct], expected[distinct])


def test_a_row_with_one_nan_or_infinity_is_not_finite() -> None:
    values = np.zeros((4, 3), np.float32)
    values[1, 2], values[2, 0], values[3, 1] = np.nan, np.inf, -np.inf
    for tasks in (Classification(_model(2, "softmax")), Embedding(3, "none"), Raw(["x"], (values,))):
        _, finite = tasks.finish((values,))
        assert finite.tolist() == [True, False, False, False]


def test_the_column_of_a_classification() -> None:
    tasks = Classification(_model(2, labels=("cat", "dog", "owl")))
    kept, _ = tasks.finish((np.array([[0.1, 0.7, 0.2], [0, 0, 0], [0.5, 0.2, 0.3]], np.float32),))
    column = tasks.columns(kept, np.array([True, False, True]))["top"]
    assert column.type == TOP_TYPE
    rows = [row and [(one["index"], one["label"], round(one["score"], 3)) for one in row] for row in column.to_pylist()]
    assert rows == [[(1, "dog", 0.7), (2, "owl", 0.2)], None, [(0, "cat", 0.5), (2, "owl", 0.3)]]


def test_the_column_of_an_embedding() -> None:
    tasks = Embedding(2, "none")
    kept, _ = tasks.finish((np.array([[1, 2], [3, 4]], np.float32),))
    column = tasks.columns(kept, np.array([False, True]))["embedding"]
    assert column.type == pa.list_(pa.float32(), 2)
    assert column.to_pylist() == [None, [3, 4]]


def test_the_column_of_raw_outputs_keeps_dtypes_and_shapes() -> None:
    arrays = (np.arange(12, dtype=np.float32).reshape(2, 2, 3), np.array([[7], [8]], np.int64))
    tasks = Raw(["boxes", "count"], arrays)
    kept, _ = tasks.finish(arrays)
    column = tasks.columns(kept, np.array([True, False]))["outputs"]
    assert column.to_pylist() == [{"boxes": [0, 1, 2, 3, 4, 5], "count": [7]}, None]
    boxes, count = column.type
    assert (boxes.type, boxes.metadata) == (pa.list_(pa.float32(), 6), {b"shape": b"2,3"})
    assert count.type == pa.list_(pa.int64(), 1)


def test_without_any_prediction_the_types_are_the_same() -> None:
    arrays = (np.zeros((1, 2), np.float32),)
    for tasks in (Classification(_model(1)), Embedding(2, "none"), Raw(["x"], arrays)):
        kept, _ = tasks.finish(arrays)
        (some,) = tasks.columns(kept, np.array([True])).values()
        (none,) = tasks.columns(None, np.array([False])).values()
        assert some.type == none.type
        assert none.null_count == 1
