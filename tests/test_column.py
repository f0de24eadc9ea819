"""What a Python worker of Spark does with a column, without Spark."""

import time
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from infermill.column import SHARE_BYTES, SHARE_ROWS, ColumnJob, predict_column
from infermill.models.opening import open_model
from infermill.parts import ERROR_TYPE
from infermill.predictions import TOP_TYPE
from infermill.shipping import ShippedModel
from infermill.types import CardOptions, Options, StoreOptions
from tests.images import jpeg_bytes, photo
from tests.networks import tiny_classifier

TYPE = pa.struct([("top", TOP_TYPE), ("error", ERROR_TYPE)])
IMAGES = [jpeg_bytes(photo(number, (40, 30))) for number in range(7)]


@pytest.fixture
def job(tmp_path: Path) -> ColumnJob:
    """A job whose network no other test has."""
    network = tiny_classifier(tmp_path / "tiny.onnx", seed=zlib.crc32(tmp_path.name.encode()))
    model = open_model(network, StoreOptions(), CardOptions(top_k=1))
    return ColumnJob(ShippedModel(model.digest, model), Options(threads=2), TYPE)


def best(batches: list[pa.Array]) -> list[Any]:
    return [row["top"] and row["top"][0]["index"] for batch in batches for row in batch.to_pylist()]


def test_rows_come_in_their_order_and_in_small_batches(job: ColumnJob) -> None:
    alone = best([next(predict_column(job, iter([pa.array([image])]))) for image in IMAGES])
    inputs = [IMAGES[number % 7] for number in range(2100)]
    batches = (pa.array(inputs[start : start + 700], pa.binary()) for start in (0, 700, 1400))
    answers = list(predict_column(job, batches))
    assert best(answers) == [alone[number % 7] for number in range(2100)]
    assert {answer.type for answer in answers} == {TYPE}
    assert max(map(len, answers)) <= SHARE_ROWS


def test_batches_are_cut_by_bytes_too(job: ColumnJob) -> None:
    rows = [bytes(SHARE_BYTES // 2 + 1)] * 3 + [b""] * 3 + [None]
    answers = list(predict_column(job, iter([pa.array(rows, pa.binary())])))
    assert [len(answer) for answer in answers] == [1, 1, 5]
    codes = [row["error"]["code"] for answer in answers for row in answer.to_pylist()]
    assert codes == ["unsupported"] * 3 + ["empty"] * 4


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_an_empty_batch_and_slices_of_both_binary_types(job: ColumnJob, kind: pa.DataType) -> None:
    whole = pa.array(IMAGES, kind)
    answers = list(predict_column(job, iter([whole.slice(0, 0), whole.slice(2, 3)])))
    assert best(answers) == best(list(predict_column(job, iter([whole]))))[2:5]
    assert list(predict_column(job, iter([]))) == []


def test_a_relative_path_is_told_from_a_file_that_is_missing(job: ColumnJob) -> None:
    (answer,) = predict_column(job, iter([pa.array(["photos/a.jpg", "file:a.jpg", "/nowhere/a.jpg"])]))
    errors = [error["error"] for error in answer.to_pylist()]
    assert [error["code"] for error in errors] == ["unreadable", "unreadable", "missing"]
    assert errors[0]["message"] == "'photos/a.jpg' is a relative path, and executors have folders of their own"


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_paths_of_both_string_types(job: ColumnJob, kind: pa.DataType, tmp_path: Path) -> None:
    (tmp_path / "a b.jpg").write_bytes(IMAGES[0])
    uris = [f"{tmp_path}/a b.jpg", f"file:{tmp_path}/a b.jpg", f"file://{tmp_path}/a%20b.jpg", None]
    (answer,) = predict_column(job, iter([pa.array(uris, kind)]))
    (told,) = predict_column(job, iter([pa.array(IMAGES[:1])]))
    assert answer.to_pylist()[:3] == told.to_pylist() * 3
    assert answer[3]["error"]["code"].as_py() == "empty"


def test_urls_that_may_not_be_fetched_are_rows(job: ColumnJob) -> None:
    urls = ["https://photos.example.org/1.jpg", "https://me:secret@photos.example.org/1.jpg", "http:///1.jpg"]
    (answer,) = predict_column(job, iter([pa.array(urls)]))
    errors = [row["error"] for row in answer.to_pylist()]
    assert [error["code"] for error in errors] == ["unreadable"] * 3
    assert errors[0]["message"].startswith("objects on photos.example.org are not fetched")


@pytest.mark.parametrize("values", [[1, 2], [[0.5]], [{"a": 1}], [True]])
def test_other_columns_are_refused(job: ColumnJob, values: list[Any]) -> None:
    with pytest.raises(RuntimeError, match='"error": "UsageError", "message": "the column holds'):
        list(predict_column(job, iter([pa.array(values)])))


def test_the_network_stays_in_the_process(job: ColumnJob, tmp_path: Path) -> None:
    first = list(predict_column(job, iter([pa.array(IMAGES)])))
    (tmp_path / "tiny.onnx").unlink()
    assert list(predict_column(job, iter([pa.array(IMAGES)]))) == first


def test_who_wants_no_more_waits_for_nothing(job: ColumnJob) -> None:
    started = time.monotonic()
    answers = predict_column(job, iter([pa.array(IMAGES * 100)] * 20))
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 5
