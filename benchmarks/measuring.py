"""What every benchmark shares: the machine's name, children with their memory, a server, and a table."""

import json
import os
import platform
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


def machine() -> str:
    """Processor, cores and the versions that matter."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    libraries = ", ".join(f"{name} {version(name)}" for name in ("openvino", "onnxruntime", "pillow", "simplejpeg"))
    cores = len(os.sched_getaffinity(0))
    return f"{names[0]}, {cores} cores, Python {platform.python_version()}, {libraries}"


@dataclass(frozen=True, slots=True)
class Child:
    """A finished process: what it printed, its wall time, and the most memory that it and its workers had at once.

    Memory is the proportional set size: a page that processes share counts once.
    """

    stdout: str
    seconds: float
    peak_mb: float

    @property
    def json(self) -> dict[str, Any]:
        return dict(json.loads(self.stdout))


def run_child(*command: str, **environment: str) -> Child:
    """Run a command to its end; anything but success is an error."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdout=out, env=os.environ | environment)
        peak_bytes = 0
        while process.poll() is None:
            peak_bytes = max(peak_bytes, _memory_bytes(psutil.Process(process.pid)))
            with suppress(subprocess.TimeoutExpired):
                process.wait(MEMORY_EVERY_SECONDS)
        seconds = time.perf_counter() - started
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
        out.seek(0)
        return Child(out.read().decode(), seconds, peak_bytes / 1e6)


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


median = statistics.median
