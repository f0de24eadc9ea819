"""The examples run as they are documented, and are short."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.networks import tiny_classifier
from tests.test_job import write_photos

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    tiny_classifier(tmp_path / "tiny.onnx", classes=10, size=32)
    (tmp_path / "model.yaml").write_text(
        "name: tiny\nfiles: {onnx: tiny.onnx}\npreprocess: {resize: {exact: [32, 32]}}\n"
        f"labels: [{', '.join(f'class {i}' for i in range(10))}]\n"
    )
    write_photos(tmp_path / "photos", 3)
    return tmp_path


def run_example(name: str, *arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_classify_folder(work: Path) -> None:
    (work / "photos/bad.jpg").touch()
    lines = run_example("classify_folder.py", "photos", "model.yaml", "out", cwd=work).splitlines()
    assert lines[0] == "bad.jpg\tempty: 0 bytes"
    assert [line.split("\t")[0] for line in lines[1:]] == [f"photo-{i:03d}.png" for i in range(3)]
    assert all(line.split("\t")[1].startswith("class ") for line in lines[1:])


def test_predict_in_memory(work: Path) -> None:
    lines = run_example("predict_in_memory.py", "model.yaml", "photos/photo-000.png", cwd=work).splitlines()
    assert len({line.split(": ", 1)[1] for line in lines[:4]}) == 1
    assert lines[4].startswith("cut-off bytes: ")


def test_spark_photos(work: Path) -> None:
    (work / "photos/bad.jpg").write_text("text")
    printed = run_example("spark_photos.py", "photos", "model.yaml", cwd=work)
    rows = [line.partition("\t") for line in printed.splitlines() if line.startswith("file:")]
    assert [path.rpartition("/")[2] for path, _, _ in rows] == ["bad.jpg", *(f"photo-{i:03d}.png" for i in range(3))]
    assert rows[0][2].startswith("unsupported: ")
    assert all(label.startswith("class ") for _, _, label in rows[1:])
    assert "NULL" in printed


def test_examples_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 40
