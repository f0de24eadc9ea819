"""The runtime `mxnet`: MXNet's own answers, from a process of its own that leaves nothing behind."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image

import infermill
from infermill.errors import ModelError, RuntimeDiedError, UsageError
from infermill.layers import deviation
from infermill.models.card_file import parse_card
from infermill.models.model import Model
from infermill.models.opening import open_model
from infermill.runtimes import Predictor, load
from infermill.runtimes.mxnet import find_python
from infermill.session import spark_session
from infermill.types import Options, RuntimeName, StoreOptions
from tests.checkpoints import write_checkpoint
from tests.mxnet_checkpoints import IMAGENET, checkpoint_model
from tests.networks import pictures, tiny_classifier

TOLERANCE = 1e-4


def answer(predictor: Predictor, batch: NDArray[Any]) -> NDArray[Any]:
    """The first output."""
    return predictor(batch)[0]


def running(where: str = "mxnet_child", parent: psutil.Process | None = None) -> list[psutil.Process]:
    """The processes that have `where` in their command; of all, or of those that `parent` has started."""
    found = []
    for process in parent.children() if parent else psutil.process_iter():
        with suppress(psutil.Error):
            if any(where in word for word in process.cmdline()):
                found.append(process)
    return found


def started_by(load_it: Callable[[], Predictor]) -> tuple[Predictor, psutil.Process]:
    """A predictor, and its process of MXNet."""
    before = running(parent=psutil.Process())
    predictor = load_it()
    (process,) = [one for one in running(parent=psutil.Process()) if one not in before]
    return predictor, process


@pytest.fixture(scope="module")
def predictor(small_checkpoints: Path, mxnet_python: Path) -> Iterator[Predictor]:
    """The residual network, loaded once."""
    yield load(checkpoint_model(small_checkpoints / "residual"), "mxnet", 2, str(mxnet_python))


@pytest.fixture
def impostor(tmp_path: Path, mxnet_python: Path) -> Callable[[str], str]:
    """A maker of programs that stand for MXNet's Python, run some lines of it first, and then what they are given."""

    def make(lines: str) -> str:
        before, program = tmp_path / "before.py", tmp_path / "python"
        run = 'import runpy, sys\ndel sys.argv[:2]\nrunpy.run_path(sys.argv[0], run_name="__main__")\n'
        before.write_text(f"{textwrap.dedent(lines)}\n{run}")
        program.write_text(f'#!/bin/sh\nexec "{mxnet_python}" -I "{before}" "$@"\n')
        program.chmod(0o755)
        return str(program)

    return make


# --- the same answers


@pytest.mark.parametrize("name", ["residual", "grey", "rows"])
@pytest.mark.parametrize("runtime", ["mxnet", "openvino"])
def test_answers_are_those_of_module(
    small_checkpoints: Path, mxnet_python: Path, name: str, runtime: RuntimeName
) -> None:
    predictor = load(checkpoint_model(small_checkpoints / name), runtime, 2, str(mxnet_python))
    with np.load(small_checkpoints / f"{name}.npz") as truth:
        found = predictor(truth["given"])
        assert predictor.output_names == tuple(truth.files[1:])
        for output, array in zip(predictor.output_names, found, strict=True):
            assert deviation(array, truth[output]).relative < TOLERANCE
        assert deviation(found[0][:1], found[0][1:2]).relative > 0.01, "different inputs, different answers"


@pytest.mark.parametrize(("name", "size"), [("residual", 32), ("grey", 28)])
@pytest.mark.parametrize("preprocess", [{}, {"scale": 1 / 127.5, "mean": [1] * 3}, {**IMAGENET, "color": "BGR"}])
def test_preprocessing_is_that_of_the_other_runtimes(
    small_checkpoints: Path, mxnet_python: Path, name: str, size: int, preprocess: dict[str, Any]
) -> None:
    if name == "grey" and "color" in preprocess:
        preprocess = {"scale": 1 / 255, "mean": [0.13] * 3, "std": [0.31] * 3}
    model = checkpoint_model(small_checkpoints / name, preprocess=preprocess)
    batch = np.random.default_rng(3).integers(0, 256, (5, size, size, 3), np.uint8)
    for found, expected in zip(
        load(model, "mxnet", 1, str(mxnet_python))(batch), load(model, "openvino", 1)(batch), strict=True
    ):
        assert deviation(found, expected).relative < TOLERANCE


def test_the_named_output_is_given(small_checkpoints: Path, mxnet_python: Path) -> None:
    model = checkpoint_model(small_checkpoints / "grey", output={"name": "fc1_output"})
    predictor = load(model, "mxnet", 1, str(mxnet_python))
    assert predictor.output_names == ("fc1_output",)
    assert [array.shape for array in predictor(pictures(3, 28))] == [(3, 4)]


# --- batches and threads


def test_a_batch_of_any_length_is_answered_row_by_row(predictor: Predictor) -> None:
    images = pictures(21)
    singles = np.concatenate([answer(predictor, images[i : i + 1]) for i in range(21)])
    for count in (1, 2, 7, 8, 9, 16, 21):
        found = answer(predictor, images[:count])
        assert found.shape == (count, 10)
        np.testing.assert_allclose(found, singles[:count], atol=1e-5)
    np.testing.assert_array_equal(answer(predictor, images[::2]), answer(predictor, images[::2].copy()))


def test_calls_of_many_threads_are_answered_as_in_a_row(predictor: Predictor) -> None:
    images = pictures(60)
    batches = [images[i : i + 1 + i % 11] for i in range(0, 48, 3)] * 3
    serial = [answer(predictor, one) for one in batches]
    with ThreadPoolExecutor(4) as pool:
        for found, expected in zip(pool.map(lambda one: answer(predictor, one), batches), serial, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-6)


def test_answers_stay_valid_after_the_next_call(predictor: Predictor) -> None:
    images = pictures(16)
    first = answer(predictor, images[:8])
    kept = first.copy()
    predictor(images[8:])
    np.testing.assert_array_equal(first, kept)


def test_a_predictor_tells_what_it_is(predictor: Predictor) -> None:
    assert (predictor.runtime, predictor.device, predictor.precision) == ("mxnet", "cpu", "fp32")
    assert (predictor.input_shape, predictor.input_dtype) == ((32, 32, 3), "uint8")
    assert (predictor.streams, predictor.batch_size, predictor.is_fixed) == (1, 8, False)


def test_a_wrong_shape_is_told_in_one_line(predictor: Predictor) -> None:
    with pytest.raises(ModelError, match=r"mxnet cannot execute .*residual-symbol\.json: .*\[64, 64, 3\]") as caught:
        predictor(pictures(2, 64))
    assert "\n" not in caught.value.message
    assert predictor(pictures(2))[0].shape == (2, 10)


# --- what cannot be executed


def test_a_network_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tiny_classifier(tmp_path / "tiny.onnx")
    card = parse_card({"name": "t", "files": {"onnx": "tiny.onnx"}, "preprocess": {"resize": {"exact": [32, 32]}}}, "")
    with pytest.raises(ModelError, match=r"tiny\.onnx is no MXNet checkpoint") as caught:
        load(Model(card, path, None, "sha256:0"), "mxnet", 1)
    assert "--runtime openvino" in caught.value.hint


def test_files_that_mxnet_refuses_are_told_in_one_line(
    small_checkpoints: Path, mxnet_python: Path, tmp_path: Path
) -> None:
    model = checkpoint_model(small_checkpoints / "residual")
    assert model.checkpoint is not None
    damaged = tmp_path / "damaged.params"
    for content in (b"", b"\x12\x01" + bytes(200), model.checkpoint.params.read_bytes()[:-2000]):
        damaged.write_bytes(content)
        broken = replace(model, checkpoint=replace(model.checkpoint, params=damaged))
        with pytest.raises(ModelError, match=r"mxnet cannot execute .*residual-symbol\.json: ") as caught:
            load(broken, "mxnet", 1, str(mxnet_python))
        assert "\n" not in caught.value.message


@pytest.mark.parametrize("estimates", [False, True])
def test_what_cannot_run_is_told_before_any_work(tmp_path: Path, estimates: bool) -> None:
    (tmp_path / "photos").mkdir()
    Image.fromarray(pictures(1)[0]).save(tmp_path / "photos/0.png")
    network = tiny_classifier(tmp_path / "tiny.onnx")
    checkpoint = write_checkpoint(tmp_path, "small")
    nowhere = str(tmp_path / "nowhere")
    for model, python, message in [
        (network, None, r"tiny\.onnx is no MXNet checkpoint"),
        (checkpoint, nowhere, "--runtime-python .*nowhere is no program"),
    ]:
        options = Options(runtime="mxnet", runtime_python=python)
        with pytest.raises(UsageError, match=message):
            if estimates:
                infermill.estimate(tmp_path / "nothing", model, options)
            else:
                infermill.run(tmp_path / "photos", model, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


# --- its Python


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Nothing says where MXNet's Python is, and the cache is empty."""
    monkeypatch.delenv("INFERMILL_MXNET_PYTHON", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return monkeypatch


def test_the_python_is_found_where_it_is_said(nowhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_python(sys.executable) == Path(sys.executable)
    nowhere.setenv("INFERMILL_MXNET_PYTHON", sys.executable)
    assert find_python() == Path(sys.executable)
    assert find_python("/bin/sh") == Path("/bin/sh")
    with pytest.raises(UsageError, match=r"--runtime-python /nowhere/python is no program"):
        find_python("/nowhere/python")
    nowhere.setenv("INFERMILL_MXNET_PYTHON", str(tmp_path))
    with pytest.raises(UsageError, match=r"INFERMILL_MXNET_PYTHON .* is no program"):
        find_python()


def test_an_environment_in_the_cache_is_found(nowhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cached = tmp_path / "cache/infermill/mxnet/bin/python"
    checkout = Path(__file__).parents[1] / ".make/mxnet/bin/python"
    if checkout.exists():
        assert find_python() == checkout
        return
    with pytest.raises(UsageError, match="there is no Python with mxnet") as caught:
        find_python()
    assert f"python3.11 -m venv {tmp_path}/cache/infermill/mxnet" in caught.value.hint
    assert "pip install mxnet==1.9.1 'numpy<1.24'" in caught.value.hint
    cached.parent.mkdir(parents=True)
    cached.symlink_to(sys.executable)
    assert find_python() == cached


@pytest.mark.parametrize(("python", "reason"), [(sys.executable, "No module named 'mxnet'"), ("/bin/false", "")])
def test_a_python_without_mxnet_is_told(small_checkpoints: Path, python: str, reason: str) -> None:
    with pytest.raises(UsageError, match=f"{python} cannot run mxnet: .*{reason}") as caught:
        load(checkpoint_model(small_checkpoints / "rows"), "mxnet", 1, python)
    assert "pip install mxnet==1.9.1" in caught.value.hint


def test_the_process_gets_no_secrets(
    small_checkpoints: Path, impostor: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("DATABASE_URL", "hidden")
    monkeypatch.setenv("MXNET_CPU_PRIORITY_NTHREADS", "3")
    python = impostor(f"import os\nopen({str(tmp_path / 'environment')!r}, 'w').write(repr(dict(os.environ)))")
    load(checkpoint_model(small_checkpoints / "rows"), "mxnet", 2, python)
    seen = (tmp_path / "environment").read_text()
    assert "hidden" not in seen
    assert "'MXNET_CPU_PRIORITY_NTHREADS': '3'" in seen
    assert "'OMP_NUM_THREADS': '2'" in seen


# --- its life


def test_it_ends_with_its_predictor(small_checkpoints: Path, mxnet_python: Path) -> None:
    predictor, started = started_by(
        lambda: load(checkpoint_model(small_checkpoints / "rows"), "mxnet", 1, str(mxnet_python))
    )
    del predictor
    started.wait(timeout=10)


def test_it_ends_with_the_process_that_started_it(small_checkpoints: Path, mxnet_python: Path) -> None:
    script = f"""
import sys, time
from pathlib import Path
from tests.mxnet_checkpoints import checkpoint_model
from infermill.runtimes import load
predictor = load(checkpoint_model(Path({str(small_checkpoints / "rows")!r})), "mxnet", 1, {str(mxnet_python)!r})
print("ready", flush=True)
time.sleep(60)
"""
    root = Path(__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        (child,) = psutil.Process(process.pid).children()
        process.kill()
    child.wait(timeout=10)


def test_after_ctrl_c_no_batch_gets_the_answer_of_another(
    small_checkpoints: Path, impostor: Callable[[str], str]
) -> None:
    python = impostor("""
        import time
        import mxnet
        forward = mxnet.mod.Module.forward
        def slow_forward(self, batch, is_train=None):
            time.sleep(5 if len(batch.data[0]) == 5 else 0)
            forward(self, batch, is_train)
        mxnet.mod.Module.forward = slow_forward
    """)
    predictor, started = started_by(lambda: load(checkpoint_model(small_checkpoints / "residual"), "mxnet", 1, python))
    interrupt = threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):  # also where this thread stands still meanwhile
        interrupt.start()
        predictor(pictures(5))
    interrupt.join()
    with pytest.raises(RuntimeDiedError, match="the process of mxnet died") as caught:
        predictor(pictures(3))
    assert "load the model again" in caught.value.hint
    assert not started.is_running()


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGABRT])
def test_its_death_is_told(small_checkpoints: Path, mxnet_python: Path, sent: signal.Signals) -> None:
    predictor, started = started_by(
        lambda: load(checkpoint_model(small_checkpoints / "residual"), "mxnet", 1, str(mxnet_python))
    )
    started.send_signal(sent)
    with pytest.raises(RuntimeDiedError, match=f"the process of mxnet died .{sent.name}") as caught:
        predictor(pictures(2))
    assert caught.value.status == -sent
    with pytest.raises(RuntimeDiedError):
        predictor(pictures(2))


# --- jobs


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A few pictures, one of which is white, and one of which is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, picture in enumerate(pictures(12)):
        Image.fromarray(picture // 2).save(folder / f"{number:02}.png")
    Image.fromarray(np.full((32, 32, 3), 255, np.uint8)).save(folder / "07.png")
    (folder / "bad.png").write_bytes(b"<html>")
    return folder


def run(folder: Path, photos: Path, name: str, python: object, **options: Any) -> tuple[infermill.Summary, list[Any]]:
    """A job on the residual network: its summary and its rows."""
    output = photos.parent / name
    chosen: dict[str, Any] = {"runtime": "mxnet", "runtime_python": str(python), "threads": 2, **options}
    summary = infermill.run(photos, folder / "residual.yaml", output, Options(partition_objects=4, **chosen))
    return summary, infermill.read(output).to_pylist()


def test_a_job_has_the_rows_of_the_other_runtimes(small_checkpoints: Path, mxnet_python: Path, photos: Path) -> None:
    summary, rows = run(small_checkpoints, photos, "out", mxnet_python)
    assert (summary.runtime, summary.ok, summary.failed) == ("mxnet", 12, 1)
    other, expected = run(small_checkpoints, photos, "other", mxnet_python, runtime="openvino")
    assert other.digest == summary.digest
    assert [row["error"] for row in rows] == [row["error"] for row in expected]
    for row, known in zip(rows, expected, strict=True):
        if row["error"] is None:
            assert row["top"][0]["index"] == known["top"][0]["index"]
            assert row["top"][0]["score"] == pytest.approx(known["top"][0]["score"], abs=TOLERANCE)


@pytest.mark.slow
def test_executors_of_spark_start_the_python_that_is_said(
    small_checkpoints: Path, impostor: Callable[[str], str], photos: Path, tmp_path: Path, nowhere: pytest.MonkeyPatch
) -> None:
    python = impostor(f"import os\nopen({str(tmp_path / 'parent')!r}, 'a').write(f'{{os.getppid()}} ')")
    with spark_session(Options(master="local[2]")) as session:
        options = Options(runtime="mxnet", runtime_python=python)
        summary = infermill.run(photos, small_checkpoints / "residual.yaml", tmp_path / "out", options, engine=session)
    assert (summary.runtime, summary.ok, summary.failed) == ("mxnet", 12, 1)
    assert str(os.getpid()) not in (tmp_path / "parent").read_text().split()


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [("SIGSEGV", "native_crash"), ("SIGKILL", "oom")])
def test_an_input_that_kills_mxnet_is_a_row(
    small_checkpoints: Path, impostor: Callable[[str], str], photos: Path, sent: str, code: str
) -> None:
    python = impostor(f"""
        import os, signal
        import mxnet
        forward = mxnet.mod.Module.forward
        def forward_or_die(self, batch, is_train=None):
            if (batch.data[0].min(axis=(1, 2, 3)) > 2).asnumpy().any():
                signal.signal(signal.SIGSEGV, signal.SIG_DFL)
                os.kill(os.getpid(), signal.{sent})
            forward(self, batch, is_train)
        mxnet.mod.Module.forward = forward_or_die
    """)
    summary, rows = run(small_checkpoints, photos, "out", python)
    assert (summary.planned, summary.ok, dict(summary.failures_by_code)) == (13, 11, {code: 1, "unsupported": 1})
    (culprit,) = [row for row in rows if row["error"] is not None and row["error"]["stage"] == "predict"]
    assert (culprit["key"], culprit["error"]["code"]) == ("07.png", code)
    assert psutil.wait_procs(running(str(Path(python).parent)), timeout=10)[1] == []


def test_a_card_and_its_checkpoint_predict_in_memory(
    small_checkpoints: Path, mxnet_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERMILL_MXNET_PYTHON", str(mxnet_python))
    card = small_checkpoints / "residual.yaml"
    image = pictures(1)[0]
    (found,) = infermill.load_model(card, Options(runtime="mxnet"))([image])
    (expected,) = infermill.load_model(card)([image])
    assert found.top is not None
    assert expected.top is not None
    assert found.top[0].index == expected.top[0].index
    assert found.top[0].score == pytest.approx(expected.top[0].score, abs=TOLERANCE)
    assert open_model(card, StoreOptions()).checkpoint is not None
    assert os.environ["INFERMILL_MXNET_PYTHON"] == str(mxnet_python)
