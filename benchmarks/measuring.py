"""What every benchmark shares: the machine's name, children with what they cost, a server, medians and a table."""

import json
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

MEMORY_EVERY_SECONDS = 0.1
LONGEST_SECONDS = 600.0
"What has not ended by then is killed, and has failed: a peer that waits for a worker which does not start, say."


def machine() -> str:
    """Processor, cores and the versions that matter."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    libraries = ", ".join(f"{name} {version(name)}" for name in ("openvino", "onnxruntime", "pillow", "simplejpeg"))
    cores = len(os.sched_getaffinity(0))
    return f"{names[0]}, {cores} cores, Python {platform.python_version()}, {libraries}"


class ChildError(Exception):
    """A process that did not end well; the text says why, in a line."""


@dataclass(frozen=True, slots=True)
class Child:
    """A finished process: what it printed, its wall time, CPU time, and the most memory that it had at once.

    Its workers are counted with it. Memory is the proportional set size: a page that processes share counts once.
    """

    stdout: str
    seconds: float
    cpu_seconds: float
    peak_mb: float

    @property
    def json(self) -> dict[str, Any]:
        return dict(json.loads(self.stdout))


def run_child(*command: str, **environment: str) -> Child:
    """Run a command to its end.

    Raises:
        ChildError: it ended with another exit code than 0, or not in time.
    """
    before, started = _children_cpu_seconds(), time.perf_counter()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=os.environ | environment)
        peak_bytes = 0
        while process.poll() is None:
            if time.perf_counter() - started > LONGEST_SECONDS:
                _kill(psutil.Process(process.pid))
                process.wait()
                raise ChildError(f"it did not end within {LONGEST_SECONDS:.0f} s")
            with suppress(psutil.NoSuchProcess):
                peak_bytes = max(peak_bytes, _memory_bytes(psutil.Process(process.pid)))
            with suppress(subprocess.TimeoutExpired):
                process.wait(MEMORY_EVERY_SECONDS)
        seconds = time.perf_counter() - started
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise ChildError(f"exit code {process.returncode}: {_reason(err.read().decode(errors='replace'))}")
        cpu_seconds = _children_cpu_seconds() - before
        return Child(out.read().decode(), seconds, cpu_seconds, peak_bytes / 1e6)


def _kill(process: psutil.Process) -> None:
    for one in [*process.children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess):
            one.kill()


def _reason(told: str) -> str:
    """The line of a standard error that says what went wrong."""
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:") or "Error:" in line or "Exception:" in line]
    return (errors or lines or ["it said nothing"])[-1][:300]


def _children_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _memory_bytes(process: psutil.Process) -> int:
    total = 0
    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            total += one.memory_full_info().pss
    return total


def infermill(*arguments: str, **environment: str) -> Child:
    """Run the command line in a process of its own."""
    return run_child(str(Path(sys.executable).with_name("infermill")), *arguments, **environment)


@contextmanager
def s3_server() -> Iterator[tuple[str, psutil.Process]]:
    """An S3 server on this machine: its URL, and its process, whose CPU seconds are its cost."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"GATEWAY_PORT": str(port), "BIND_HOST": "127.0.0.1", "SERVICES": "s3", "LOG_LEVEL": "ERROR"}
    command = str(Path(sys.executable).with_name("ministack"))
    process = subprocess.Popen(
        [command], env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/_ministack/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def cpu_seconds(process: psutil.Process) -> float:
    """CPU seconds of a process and its children."""
    family = [process, *process.children(recursive=True)]
    return float(sum(sum(member.cpu_times()[:2]) for member in family))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Sequence[float], form: str) -> str:
    """The median, and the lowest and the highest of several."""
    if len(values) == 1:
        return f"{values[0]:{form}} (1 round)"
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


median = statistics.median
