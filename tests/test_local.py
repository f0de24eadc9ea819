"""Worker processes: what brings one down costs one row, and nothing else."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image

import infermill
from infermill import Options
from infermill.engines.local import start, start_early
from infermill.meter import Meter
from tests.images import jpeg_bytes, photo
from tests.networks import tiny_classifier

CARD = "name: tiny\nfiles: {onnx: tiny.onnx}\npreprocess: {resize: {exact: [32, 32]}}\noutput: {top_k: 2}\n"
# A Python process runs a module of this name at its start. It stands in for a decoder with a bug: an image that ends
# with one of these words, behind the end of its JPEG, does what the word says.
POISON = """
import ctypes, os, signal
import simplejpeg

real = simplejpeg.decode_jpeg

def decode_jpeg(data, *args, **kwargs):
    if data.endswith(b"CRASH"):
        ctypes.string_at(0)
    if data.endswith(b"LOOP"):
        while True:
            pass
    if data.endswith(b"HANG"):
        ctypes.PyDLL(None).pause()  # PyDLL: and holds the GIL
    if data.endswith(b"HUGE"):
        bytearray(1 << 60)
    if data.endswith(b"KILL"):
        os.kill(os.getpid(), signal.SIGKILL)
    if data.endswith(b"EXIT"):
        os._exit(3)
    if data.endswith(b"ONCE") and not os.path.exists(os.environ["ONCE"]):
        open(os.environ["ONCE"], "x").close()
        os._exit(3)
    if data.endswith(b"SLOW"):
        import time
        time.sleep(0.1)
    return real(data, *args, **kwargs)

simplejpeg.decode_jpeg = decode_jpeg
"""
# The same for the runtime: a white image is one that it cannot take.
POISONED_RUNTIME = """
import ctypes
import onnxruntime

real = onnxruntime.InferenceSession.run

def run(self, names, feed, *args):
    (batch,) = feed.values()
    if (batch == 77).all(axis=(1, 2, 3)).any():
        ctypes.PyDLL(None).pause()  # PyDLL: and holds the GIL
    if (batch == 255).all(axis=(1, 2, 3)).any():
        ctypes.string_at(0)
    if len(batch) > 2 and (batch == 0).all(axis=(1, 2, 3)).any():
        raise onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException(
            "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 1"
        )
    return real(self, names, feed, *args)

onnxruntime.InferenceSession.run = run
"""


@pytest.fixture
def card(tmp_path: Path) -> Path:
    tiny_classifier(tmp_path / "tiny.onnx", classes=10, size=32)
    (tmp_path / "model.yaml").write_text(CARD)
    return tmp_path / "model.yaml"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    return folder


@pytest.fixture
def poison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def put(code: str) -> None:
        folder = tmp_path / "site"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(code)
        # Not for this process, which has started: for the workers, which get its path.
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setenv("ONCE", str(tmp_path / "once"))

    return put


def write(folder: Path, count: int, odd: dict[int, bytes]) -> None:
    plain = [jpeg_bytes(photo(seed, (40, 30))) for seed in range(8)]
    for number in range(count):
        (folder / f"{number:03d}.jpg").write_bytes(plain[number % 8] + odd.get(number, b""))


def test_poison_costs_one_row_each(photos: Path, card: Path, tmp_path: Path, poison: Callable[[str], None]) -> None:
    poison(POISON)
    write(photos, 500, {100: b"CRASH", 333: b"LOOP", 480: b"HUGE"})
    summary = infermill.run(photos, card, tmp_path / "out", Options(partition_objects=64, item_timeout=2.0))
    assert (summary.planned, summary.ok) == (500, 497)
    rows = {row["key"]: row for row in infermill.read(tmp_path / "out").to_pylist()}
    assert len(rows) == 500
    errors = {key: row["error"] for key, row in rows.items() if row["error"]}
    assert {key: error["code"] for key, error in errors.items()} == {
        "100.jpg": "native_crash",
        "333.jpg": "timeout",
        "480.jpg": "oom",
    }
    assert all(error["stage"] == "decode" for error in errors.values())
    assert errors["100.jpg"]["message"] == "the worker died (SIGSEGV) while it was decoded"
    assert all(row["top"] for key, row in rows.items() if key not in errors)


def test_neighbours_of_poison_are_predicted_as_without_it(
    photos: Path, card: Path, tmp_path: Path, poison: Callable[[str], None]
) -> None:
    write(photos, 20, {})
    infermill.run(photos, card, tmp_path / "clean")
    poison(POISON)
    write(photos, 20, {3: b"HANG", 4: b"KILL", 5: b"EXIT", 6: b"CRASH"})
    summary = infermill.run(photos, card, tmp_path / "out", Options(item_timeout=2.0, workers=2, partition_objects=5))
    assert summary.failures_by_code == {"timeout": 1, "oom": 1, "native_crash": 2}
    clean, rows = (infermill.read(tmp_path / name).to_pylist() for name in ("clean", "out"))
    for number in (n for n in range(20) if n not in (3, 4, 5, 6)):
        assert [one["index"] for one in rows[number]["top"]] == [one["index"] for one in clean[number]["top"]]


def test_poison_of_the_network_is_found_in_its_batch(
    photos: Path, card: Path, tmp_path: Path, poison: Callable[[str], None]
) -> None:
    poison(POISONED_RUNTIME)
    write(photos, 30, {})
    Image.new("RGB", (32, 32), "white").save(photos / "white.png")
    summary = infermill.run(photos, card, tmp_path / "out", Options(runtime="onnxruntime"))
    assert (summary.ok, summary.failures_by_code) == (30, {"native_crash": 1})
    (error,) = [row["error"] for row in infermill.read(tmp_path / "out").to_pylist() if row["error"]]
    assert error["stage"] == "predict"


def test_a_network_that_hangs_is_ended(photos: Path, card: Path, tmp_path: Path, poison: Callable[[str], None]) -> None:
    poison(POISONED_RUNTIME)
    write(photos, 20, {})
    Image.new("RGB", (32, 32), (77, 77, 77)).save(photos / "grey.png")
    summary = infermill.run(photos, card, tmp_path / "out", Options(runtime="onnxruntime", item_timeout=3.0))
    assert (summary.ok, summary.failures_by_code) == (20, {"timeout": 1})


def test_what_began_before_a_hang_is_not_to_blame(
    photos: Path, card: Path, tmp_path: Path, poison: Callable[[str], None]
) -> None:
    poison(POISON)
    write(photos, 20, {0: b"SLOW", 1: b"HANG"})  # the slow one wakes up, and waits for Python's lock
    summary = infermill.run(photos, card, tmp_path / "out", Options(item_timeout=2.0, threads=2))
    assert (summary.ok, summary.failures_by_code) == (19, {"timeout": 1})
    (failed,) = [row["key"] for row in infermill.read(tmp_path / "out").to_pylist() if row["error"]]
    assert failed == "001.jpg"


def test_a_runtime_out_of_memory_goes_on_with_smaller_batches(
    photos: Path, card: Path, tmp_path: Path, poison: Callable[[str], None]
) -> None:
    poison(POISONED_RUNTIME)
    write(photos, 30, {})
    Image.new("RGB", (32, 32), "black").save(photos / "black.png")
    summary = infermill.run(photos, card, tmp_path / "out", Options(runtime="onnxruntime", threads=1))
    assert (summary.ok, summary.failed) == (31, 0)
    assert summary.halved_batches >= 2


def test_a_death_that_no_input_explains_costs_a_retry(
    photos: Path, card: Path, tmp_path: Path, poison: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    poison(POISON)
    write(photos, 40, {20: b"ONCE"})
    meters: list[Meter] = []

    def display(meter: Meter) -> "threading.Lock":
        meters.append(meter)
        return threading.Lock()  # a context manager that does nothing

    with caplog.at_level(logging.WARNING, "infermill"):
        summary = infermill.run(photos, card, tmp_path / "out", Options(partition_objects=10), display=display)
    assert (summary.ok, summary.failed) == (40, 0)
    assert meters[0].objects == 40
    assert "the worker died (exit code 3); trying the" in caplog.text


def test_workers_that_cannot_start_stop_the_job(
    photos: Path, card: Path, tmp_path: Path, poison: Callable[[str], None]
) -> None:
    poison("import os; os._exit(7)")
    write(photos, 2, {})
    with pytest.raises(infermill.InfermillError, match=r"the worker died \(exit code 7\) 3 times in a row"):
        infermill.run(photos, card, tmp_path / "out")


def test_workers_share_the_partitions(photos: Path, card: Path, tmp_path: Path, poison: Callable[[str], None]) -> None:
    poison(POISON)
    write(photos, 40, dict.fromkeys(range(40), b"SLOW"))
    summary = infermill.run(photos, card, tmp_path / "out", Options(workers=2, threads=1, partition_objects=2))
    assert (summary.workers, summary.model_loads, summary.ok) == (2, 2, 40)


def test_workers_end_with_the_job(photos: Path, card: Path, tmp_path: Path) -> None:
    before = set(psutil.Process().children())
    write(photos, 3, {})
    infermill.run(photos, card, tmp_path / "out", Options(workers=2))
    assert set(psutil.Process().children()) == before


def test_a_worker_that_is_started_early_does_the_job(photos: Path, card: Path, tmp_path: Path) -> None:
    before = set(psutil.Process().children())
    start_early()
    (early,) = set(psutil.Process().children()) - before
    write(photos, 3, {})
    with start(Options(workers=2)) as engine:
        assert early in set(psutil.Process().children())
        assert len(set(psutil.Process().children()) - before) == 2
        assert infermill.run(photos, card, tmp_path / "out", Options(workers=1), engine=engine).ok == 3
    assert set(psutil.Process().children()) == before


@pytest.fixture
def slow_job(
    photos: Path, card: Path, tmp_path: Path, poison: Callable[[str], None]
) -> Iterator["subprocess.Popen[str]"]:
    poison(POISON)
    write(photos, 100, dict.fromkeys(range(100), b"SLOW"))
    command = [str(Path(sys.executable).with_name("infermill")), "run", "photos", "-m", "model.yaml", "-o", "out"]
    process = subprocess.Popen(
        [*command, "--json", "--partition-objects", "4", "--workers", "2"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: len(list((tmp_path / "out").glob("*.parquet"))) >= 2)
    with process:
        yield process
        process.kill()


def wait_until(is_true: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_workers_end_with_their_driver(slow_job: "subprocess.Popen[str]") -> None:
    children = psutil.Process(slow_job.pid).children(recursive=True)
    assert len(children) == 2
    slow_job.kill()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive


def test_a_worker_that_hangs_ends_with_its_driver(
    photos: Path, tmp_path: Path, card: Path, poison: Callable[[str], None]
) -> None:
    """Though no thread of it can run Python any more."""
    poison(POISON)
    write(photos, 1, {0: b"HANG"})
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("infermill")), "run", "photos", "-m", "model.yaml", "-o", "out"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site"), "ONCE": ""},
        stderr=subprocess.DEVNULL,
    )
    wait_until((tmp_path / "out/_infermill/job.json").exists)
    time.sleep(2)
    (worker,) = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    _, alive = psutil.wait_procs([worker], timeout=5)
    assert not alive


def test_ctrl_c_in_a_terminal_is_for_the_driver(tmp_path: Path, photos: Path, card: Path) -> None:
    """A terminal sends it to all processes of the foreground group, the workers' imports not excepted."""
    write(photos, 3, {})
    for moment in (0.3, 0.5, 0.8):
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("infermill")), "run", "photos", "-m", "model.yaml", "-o", "out"],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            process_group=0,
        )
        wait_until(lambda: bool(psutil.Process(process.pid).children()))  # noqa: B023
        time.sleep(moment - 0.3)
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=30)
        assert process.returncode == 130
        assert error.startswith("error: stopped\n")
        assert "Traceback" not in error


def test_a_worker_that_is_killed_costs_nothing(slow_job: "subprocess.Popen[str]") -> None:
    children = psutil.Process(slow_job.pid).children(recursive=True)
    children[0].send_signal(signal.SIGKILL)
    out, err = slow_job.communicate(timeout=90)
    summary = json.loads(out)
    assert (summary["planned"], summary["ok"]) == (100, 100), err
    assert "SIGKILL" in err
