"""A process that dies at any step of the protocol: `run` finishes the job, and each row is there once.

On a file system the steps are told by Python's audit events; on S3, by the requests that a proxy sees.
"""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

import infermill
from infermill import Options
from infermill.engines import Engine
from infermill.engines.local import start
from tests.fault_proxy import Call, FaultProxy, Request
from tests.images import encoded, photo
from tests.networks import tiny_classifier
from tests.servers import Bucket

CARD = "name: tiny\nfiles: {onnx: tiny.onnx}\npreprocess: {resize: {exact: [32, 32]}}\noutput: {top_k: 2}\n"
OBJECTS = 6
FLAGS = ("--partition-objects", "3", "--json")
COMMAND = str(Path(sys.executable).with_name("infermill"))
# Every Python process that finds this module runs it at its start. It counts what the process does to the output, and
# ends it, as by a power cut, before step CRASH_AT.
CRASH = """
import os, signal, sys

ROLE = "worker" if any("engines.child" in word for word in sys.orig_argv) else "driver"
EVENTS = {"open", "os.link", "os.rename", "os.remove", "os.mkdir"}
out, crash_at = os.environ["CRASH_IN"], int(os.environ["CRASH_AT"])
trace = os.open(os.environ["CRASH_TRACE"], os.O_WRONLY | os.O_APPEND)
steps = 0
# The bit of its own: it holds that of O_DIRECTORY, too.
TMPFILE = getattr(os, "O_TMPFILE", 0) & ~os.O_DIRECTORY

def step(event, arguments):
    global steps
    if event not in EVENTS or (event == "open" and not arguments[2] & (os.O_CREAT | TMPFILE)):
        return
    paths = [str(argument) for argument in arguments[:2]]
    if event == "os.link" and arguments[3] >= 0:
        paths[1] = os.readlink(f"/proc/self/fd/{arguments[3]}") + "/" + paths[1]
    if any(path.startswith(out) for path in paths):
        steps += 1
        os.write(trace, f"{event} {' '.join(paths)}\\n".encode())
        if steps == crash_at:
            os.kill(os.getpid(), signal.SIGKILL)

if ROLE == os.environ["CRASH_ROLE"]:
    sys.addaudithook(step)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model, a few photos, and the module that crashes."""
    tiny_classifier(tmp_path / "tiny.onnx", classes=10, size=32)
    (tmp_path / "model.yaml").write_text(CARD)
    (tmp_path / "photos").mkdir()
    for number in range(OBJECTS):
        (tmp_path / f"photos/{number}.png").write_bytes(encoded(photo(number, (20, 20)), "PNG"))
    (tmp_path / "photos/bad.png").write_bytes(b"<html>")
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(CRASH)
    return tmp_path


def run_and_crash(
    folder: Path, out: Path, role: str, crash_at: int, workers: int, *flags: str
) -> tuple["subprocess.CompletedProcess[bytes]", list[str]]:
    """A run whose driver or workers die before a step, and the steps that they took."""
    with (folder / "trace").open("w+") as trace:
        environment = {
            "PYTHONPATH": str(folder / "site"),
            "CRASH_IN": str(out),
            "CRASH_AT": str(crash_at),
            "CRASH_ROLE": role,
            "CRASH_TRACE": trace.name,
        }
        command = [
            COMMAND,
            "run",
            "photos",
            "-m",
            "model.yaml",
            "-o",
            str(out),
            *FLAGS,
            "--workers",
            str(workers),
            *flags,
        ]
        done = subprocess.run(
            command,
            cwd=folder,
            env=os.environ | environment,
            capture_output=True,
            timeout=60,
            check=False,
        )
        trace.seek(0)
        return done, [re.sub(r"[0-9a-f]{12,}|\d{5}|/\S*/", "", line.strip()) for line in trace]


@pytest.fixture
def engine() -> Iterator[Engine]:
    """A worker that finishes one job after the other: only those that die need a process of their own."""
    with start(Options()) as started:
        yield started


def check_finished(
    source: str, card: Path, out: str, options: Options, expected: Sequence[object], engine: Engine
) -> None:
    """`run` finishes what is there, `verify` finds nothing, and one more `run` does nothing."""
    infermill.run(source, card, out, options, engine=engine)
    verification = infermill.verify(out, options)
    assert verification.problem_count == 0, verification.problems
    assert rows_of(out, options) == expected
    again = infermill.run(source, card, out, options, engine=engine)
    assert (again.model_loads, again.objects_per_second) == (0, 0.0)


def rows_of(out: str, options: Options) -> list[object]:
    rows = infermill.read(out, options).to_pylist()
    return [(row["key"], row["error"], row["top"] and [one["index"] for one in row["top"]]) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(("role", "workers"), [("driver", 1), ("worker", 1), ("worker", 2)])
def test_a_crash_at_any_step_on_a_file_system(folder: Path, engine: Engine, role: str, workers: int) -> None:
    options = Options(partition_objects=3)
    calm, steps = run_and_crash(folder, folder / "calm", role, 0, workers)
    assert calm.returncode == 0, calm.stderr
    expected = rows_of(str(folder / "calm"), options)
    assert len(expected) == OBJECTS + 1
    assert any("link" in step and "part-" in step for step in steps) == (role == "worker")
    for point in range(1, len(steps) + 1):
        out = folder / f"out-{point}"
        crashed, _ = run_and_crash(folder, out, role, point, workers)
        # The death of a worker is the driver's to mend; its successor dies at the same step, so that it may give up.
        assert crashed.returncode in ({-signal.SIGKILL} if role == "driver" else {0, 1}), crashed.stderr
        check_finished(str(folder / "photos"), folder / "model.yaml", str(out), options, expected, engine)


@pytest.mark.slow
def test_a_crash_at_any_request_to_s3(folder: Path, bucket: Bucket, engine: Engine) -> None:
    for path in (folder / "photos").iterdir():
        bucket.put(f"photos/{path.name}", path.read_bytes())
    with FaultProxy(bucket.endpoint) as proxy:
        through = Options(partition_objects=3, endpoint_url=proxy.url)
        infermill.run(f"{bucket.uri}/photos/", folder / "model.yaml", f"{bucket.uri}/calm", through)
        kinds = {(request.method, kind_of(request)) for request in proxy.requests}
        expected = rows_of(f"{bucket.uri}/calm", through)
        cases = [(method, kind, when, "driver") for method, kind in sorted(kinds) for when in ("before", "after")]
        cases += [(method, kind, when, "worker") for method, kind, when, _ in cases if kind in {"part-", "photos/"}]
        # A crash before a read is no other than one after the write before it.
        cases = [case for case in cases if case[0] == "PUT" or case[3] == "worker"]
        for number, (method, kind, when, victim) in enumerate(cases):
            out = f"{bucket.uri}/out-{number}"
            kill = Killer(victim)
            proxy.inject(Call(**{when: kill}), method, re.escape(kind))
            command = [COMMAND, "run", f"{bucket.uri}/photos/", "-m", "model.yaml", "-o", out, *FLAGS]
            command += ["--endpoint-url", proxy.url, "--workers", "2"]
            with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
                kill.process = psutil.Process(process.pid)
                _, error = process.communicate(timeout=60)
            assert kill.is_done.is_set(), (method, kind, error)
            assert process.returncode == (0 if victim == "worker" else -signal.SIGKILL), (method, kind, when, error)
            proxy.clear()
            check_finished(f"{bucket.uri}/photos/", folder / "model.yaml", out, through, expected, engine)


def kind_of(request: Request) -> str:
    """What a request is about, for all of its kind."""
    path = request.path.partition("?")[0]
    return re.sub(r"[0-9a-f]{12,}.*|\d{5}.*|(?<=photos/).*", "", path.split("/", 2)[-1].removeprefix("calm/"))


class Killer:
    """Kills a command, or its workers, when it is called."""

    def __init__(self, victim: str) -> None:
        self._victim = victim
        self.process: psutil.Process | None = None
        self.is_done = threading.Event()

    def __call__(self, _: Request) -> None:
        while self.process is None:
            time.sleep(0.01)
        for one in [self.process] if self._victim == "driver" else self.process.children():
            one.kill()
        self.is_done.set()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["files", "s3"])
def test_a_kill_at_any_moment(folder: Path, place: str, request: pytest.FixtureRequest) -> None:
    source, out, options, flags = str(folder / "photos"), str(folder / "out"), Options(partition_objects=3), list(FLAGS)
    if place == "s3":
        bucket: Bucket = request.getfixturevalue("bucket")
        for path in (folder / "photos").iterdir():
            bucket.put(f"photos/{path.name}", path.read_bytes())
        source, out = f"{bucket.uri}/photos/", f"{bucket.uri}/out"
        options = Options(partition_objects=3, endpoint_url=bucket.endpoint)
        flags += ["--endpoint-url", bucket.endpoint]
    engine: Engine = request.getfixturevalue("engine")  # with the credentials for the bucket
    infermill.run(source, folder / "model.yaml", f"{out}-calm", options, engine=engine)
    expected = rows_of(f"{out}-calm", options)
    moments = random.Random(7)
    for number in range(6):
        command = [COMMAND, "run", source, "-m", "model.yaml", "-o", f"{out}-{number}", *flags, "--workers", "2"]
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            time.sleep(moments.uniform(0.5, 2.5))
            process.kill()
        check_finished(source, folder / "model.yaml", f"{out}-{number}", options, expected, engine)
