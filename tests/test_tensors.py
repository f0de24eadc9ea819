"""A job over tensors, from the command to its rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import infermill
from tests.networks import tiny_tabular
from tests.test_cli import infermill as infermill_command

CARD = "name: tabular\nfiles: {onnx: tabular.onnx}\npreprocess: null\noutput: {top_k: 2}\nlabels: [a, b, c, d]\n"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    tiny_tabular(tmp_path / "tabular.onnx", (2, 3))
    (tmp_path / "model.yaml").write_text(CARD)
    (tmp_path / "rows").mkdir()
    for number, row in enumerate(np.random.default_rng(0).normal(size=(40, 2, 3))):
        np.save(tmp_path / "rows" / f"{number:02d}.npy", row)
    whole = (tmp_path / "rows" / "00.npy").read_bytes()
    (tmp_path / "rows" / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "rows" / "w-empty.npy").touch()
    (tmp_path / "rows" / "x-cut.npy").write_bytes(whole[:-1])
    (tmp_path / "rows" / "y-header.npy").write_bytes(whole[:10] + b"{" * 118 + whole[128:])
    np.save(tmp_path / "rows" / "z-shape.npy", np.zeros((3, 2)))
    return tmp_path


@pytest.mark.parametrize(("runtime", "batch"), [("openvino", None), ("onnxruntime", 16)])
def test_every_tensor_has_its_row(work: Path, runtime: infermill.types.RuntimeName, batch: int | None) -> None:
    tiny_tabular(work / "tabular.onnx", (2, 3), batch=batch)
    options = infermill.Options(runtime=runtime, partition_objects=7)
    summary = infermill.run(work / "rows", work / "model.yaml", work / "out", options)
    assert (summary.planned, summary.ok, summary.failed) == (44, 40, 4)
    rows = infermill.read(work / "out").to_pylist()
    assert {row["key"]: row["error"]["code"] for row in rows if row["error"]} == {
        "w-empty.npy": "empty",
        "x-cut.npy": "truncated",
        "y-header.npy": "corrupt",
        "z-shape.npy": "unsupported",
    }
    predict = infermill.load_model(work / "model.yaml", options)
    for row, prediction in zip(rows, predict([work / "rows" / row["key"] for row in rows]), strict=True):
        expected = prediction.top and [(one.index, one.label, one.score) for one in prediction.top]
        assert (row["top"] and [tuple(one.values()) for one in row["top"]]) == expected
    assert infermill.verify(work / "out").problems == ()


def test_the_command_line_knows_tensors(work: Path) -> None:
    def command(*arguments: str) -> Any:
        done = infermill_command(*arguments, "--json", cwd=work)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    inspection = command("inspect", "tabular.onnx", "--write", "guessed.yaml")
    assert "preprocess: null" in inspection["card_yaml"]
    assert inspection["problem"] is None
    estimate = command("plan", "rows", "-m", "guessed.yaml")
    assert (estimate["objects"], estimate["expected_failures"]) == (44, 4)
    summary = command("run", "rows", "--suffix", ".npy", "-m", "tabular.onnx", "-o", "out")
    assert (summary["ok"], summary["failed"]) == (40, 4)


def test_a_folder_without_tensors_holds_nothing(work: Path) -> None:
    (work / "photos").mkdir()
    (work / "photos" / "cat.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(infermill.SourceError, match="holds no objects to predict on") as caught:
        infermill.run(work / "photos", work / "model.yaml", work / "out")
    assert ".npy" in caught.value.hint


def test_a_job_over_images_is_not_resumed_with_tensors(work: Path) -> None:
    tiny_tabular(work / "square.onnx", (3, 8, 8))
    card = "name: square\nfiles: {onnx: square.onnx}\n"
    (work / "images.yaml").write_text(card + "preprocess: {resize: {exact: [8, 8]}}\n")
    (work / "tensors.yaml").write_text(card + "preprocess: null\n")
    options = infermill.Options(suffix=(".jpg",))
    assert infermill.run(work / "rows", work / "images.yaml", work / "out", options).failures_by_code == {
        "truncated": 1
    }
    with pytest.raises(infermill.JobMismatchError, match=r"preprocess\.color: RGB -> None"):
        infermill.run(work / "rows", work / "tensors.yaml", work / "out", options)
