"""Streams and batches that were probed on this machine: small files in the cache folder, one for each case."""

import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infermill.errors import InfermillError
from infermill.limits import usable_cores
from infermill.models.files import cache_errors, cache_folder
from infermill.types import RuntimeName

FORMAT = 1
KEPT_DAYS = 30
"Then it is probed again: neighbours, kernels and clocks change, and a key does not tell."
MAX_TRIES = 2
"Probes that did not end, as where memory ran out: the default is taken after so many."
ALONE_SECONDS = 60.0
"So long does a worker wait for the probe of another one, which may be stopped, or on another machine."
MAX_BYTES = 1 << 14
MAX_STREAMS = 1 << 12
MAX_BATCH_SIZE = 1 << 16
_CPUINFO_BYTES = 1 << 13  # of the first core; the others are its equals
_DISTRIBUTIONS = {"openvino": ("openvino",), "onnxruntime": ("onnxruntime", "onnxruntime-gpu"), "mxnet": ()}


@dataclass(frozen=True, slots=True)
class Choice:
    """Streams, rows of a batch, and why; on what day it was probed."""

    streams: int
    batch_size: int
    why: str
    date: str


class Choices:
    """The choice for one network, on this machine, with this share of it."""

    def __init__(self, digest: str, runtime: RuntimeName, threads: int, workers: int) -> None:
        self._key = {
            "digest": digest,
            "runtime": runtime,
            "version": _version_of(runtime),
            "processor": _processor(),
            "gpus": _gpus(),
            "cores": usable_cores(),
            "threads": threads,
            "workers": workers,
        }

    @property
    def path(self) -> Path:
        """Where it is kept.

        Raises:
            InfermillError: there is no place for a cache.
        """
        name = hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()[:32]
        return cache_folder() / "tuning" / f"{name}.json"

    def read(self) -> Choice | None:
        """What was chosen; None where nothing was, or too long ago, or the file is damaged."""
        content = self._content()
        try:
            choice = Choice(content["streams"], content["batch_size"], content["why"], content["date"])
            age = datetime.date.today() - datetime.date.fromisoformat(choice.date)
            is_right = (
                type(choice.streams) is int
                and type(choice.batch_size) is int
                and type(choice.why) is str
                and 1 <= choice.streams <= MAX_STREAMS
                and 1 <= choice.batch_size <= MAX_BATCH_SIZE
                and abs(age.days) <= KEPT_DAYS
            )
        except (KeyError, TypeError, ValueError):
            return None
        return choice if is_right else None

    def write(self, streams: int, batch_size: int, why: str) -> None:
        """Keep a choice, and the day.

        Raises:
            InfermillError: the cache folder cannot be written.
        """
        today = datetime.date.today().isoformat()
        self._write({"streams": streams, "batch_size": batch_size, "why": why, "date": today})

    def begin(self) -> bool:
        """Note that a probe begins, until `write`; False where probes before this one did not end.

        Raises:
            InfermillError: the cache folder cannot be written.
        """
        tries = self._content().get("tries", 0)
        if type(tries) is int and tries >= MAX_TRIES:
            return False
        self._write({"tries": tries + 1 if type(tries) is int else 1})
        return True

    @contextmanager
    def alone(self, meanwhile: Callable[[], object]) -> Iterator[None]:
        """Keep other workers of this user and machine from probing at the same time.

        Args:
            meanwhile: called again and again while another one probes.

        Raises:
            InfermillError: the cache folder cannot be written, or the other one does not end.
        """
        deadline = time.monotonic() + ALONE_SECONDS
        path = self.path.with_name("probe.lock")
        with cache_errors():
            path.parent.mkdir(0o700, parents=True, exist_ok=True)
            file = path.open("ab")
        with file:
            while not _is_locked(file.fileno()):
                if time.monotonic() > deadline:
                    raise InfermillError(
                        "the probe of another worker does not end", f"delete {path} if none is running"
                    )
                meanwhile()
            yield

    def _content(self) -> dict[str, Any]:
        with suppress(InfermillError, OSError, ValueError, KeyError, TypeError, RecursionError):
            with self.path.open("rb") as file:
                content: dict[str, Any] = json.loads(file.read(MAX_BYTES))
            if (content["format"], content["key"]) == (FORMAT, self._key):
                return content
        return {}

    def _write(self, content: dict[str, Any]) -> None:
        path = self.path
        private = path.with_name(f".{uuid.uuid4().hex}")
        with cache_errors():
            path.parent.mkdir(0o700, parents=True, exist_ok=True)
            try:
                private.write_text(json.dumps({"format": FORMAT, "key": self._key, **content}, indent=1))
                private.replace(path)
            finally:
                private.unlink(missing_ok=True)


def _is_locked(descriptor: int) -> bool:
    with cache_errors():
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.001)  # where `meanwhile` does nothing
            return False
    return True


def _version_of(runtime: RuntimeName) -> str:
    for name in _DISTRIBUTIONS[runtime]:
        with suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
    return ""


def _processor() -> str:
    """The processor's name, and a hash of what it can do: a virtual machine may hide some of it."""
    try:
        with Path("/proc/cpuinfo").open("rb") as file:
            text = file.read(_CPUINFO_BYTES).decode(errors="replace")
    except OSError:  # no Linux
        return f"{platform.machine()} {platform.processor()}"
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    features = fields.get("flags", fields.get("Features", ""))
    name = fields.get("model name", fields.get("CPU part", platform.machine()))
    numbers = " ".join(fields.get(part, "") for part in ("cpu family", "model", "stepping", "cache size"))
    return f"{name} {numbers} {hashlib.sha256(features.encode()).hexdigest()[:16]}"


def _gpus() -> str:
    """The models of NVIDIA's GPUs that this process may use, as far as the driver's files tell."""
    models = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        with suppress(OSError):
            models += re.findall(r"^Model:\s*(.*)$", path.read_text(errors="replace"), re.MULTILINE)
    return f"{', '.join(models)} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}".strip()
