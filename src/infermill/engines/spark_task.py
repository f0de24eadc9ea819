"""What runs in the Python worker of a Spark executor: a share of a job's partitions, done by a worker process.

The worker process is the same as on one machine, and stays for the next task, with the network loaded. An input that
brings it down costs one row, as it does there, and not the task.
"""

import atexit
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyspark
from pyspark import TaskContext

from infermill import __version__, shipping
from infermill.engines import Engine, local
from infermill.errors import StoreError
from infermill.jobspec import Job
from infermill.meter import Meter
from infermill.models.model import Model
from infermill.output import JOB_FILE, Output
from infermill.record import FOLDER
from infermill.shipping import ShippedModel
from infermill.task_resources import task_cores, task_devices, visible_gpus
from infermill.types import Options
from infermill.worker import trust_stores

RUNTIMES = ("openvino", "onnxruntime")
DECODERS = ("pillow", "simplejpeg", "cykooz-resizer")
RUNNING_FOLDER = f"{FOLDER}/running"
_engines: dict[tuple[object, ...], Engine] = {}
_open_engines = ExitStack()
atexit.register(_open_engines.close)


@dataclass(frozen=True, slots=True)
class Work:
    """A job on Spark: what its tasks are pickled with."""

    job: Job
    model: ShippedModel
    shares: Sequence[Sequence[int]]
    "The partitions of each task."
    run: str
    "Names what this run leaves in the output while it runs."
    witnesses: Sequence[str] = ()
    "Files of the source that the driver sees: a machine on which none of them is there does not see the source."


def run(work: Work, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Do the tasks whose numbers come in, and answer with a report for each partition and the counts of each task.

    Raises:
        RuntimeError: an error of infermill, as `shipping.translated` reads it.
    """
    with shipping.errors_told():
        for batch in batches:
            for number in batch["id"].to_pylist():
                yield from _do(work, number)


def _do(work: Work, number: int) -> Iterator[pa.RecordBatch]:
    context = TaskContext.get()
    assert context is not None  # noqa: S101 - this is a task
    options = replace(work.job.options, threads=work.job.options.threads or task_cores())
    job, meter = replace(work.job, options=options, model=_model(work.model)), Meter()
    trust_stores(job)
    _check_files(job, work.witnesses)
    place, note = Output(job.output, options), f"{RUNNING_FOLDER}/{work.run}-{number}-{context.attemptNumber()}"
    place.create(note, socket.gethostname().encode())
    try:
        done = {}
        if context.attemptNumber() > 0 and job.revision is None:
            done = place.reports(job.notes, of=work.shares[number])
        for report in done.values():
            yield _answer({"report": asdict(report)})
        todo = [partition for partition in work.shares[number] if partition not in done]
        if todo:
            for report in _engine(options, task_devices())(job, todo, meter):
                yield _answer({"report": asdict(report)})
    finally:
        place.delete([note])
    worker = f"{socket.gethostname()}/{os.getpid()}"
    yield _answer({"worker": worker, "counts": asdict(meter.drain()), "versions": versions()})


def _check_files(job: Job, witnesses: Sequence[str]) -> None:
    """Raise StoreError where this machine does not see what the driver sees: no object of it is missing."""
    needed = [f"{job.output}/{JOB_FILE}", *(() if job.source.keys_are_uris else (job.source.root,))]
    absent = [path for path in needed if path.startswith("/") and not is_there(path)]
    # A mount point without its mount is there, and empty.
    if not absent and witnesses and not any(map(is_there, witnesses)):
        absent = [witnesses[0]]
    if absent:
        raise StoreError(
            f"{absent[0]} is there on the driver, and not on {socket.gethostname()}",
            "mount source and output at the same path on every node, or use a store",
        )


def is_there(path: str) -> bool:
    """Whether this process sees a file or folder of that name."""
    return os.path.exists(path)  # noqa: PTH110 - where a folder may not be entered, Path.exists is an error


def _answer(content: Mapping[str, object]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"answer": [json.dumps(content)]})


@functools.lru_cache(maxsize=1)
def _model(shipped: ShippedModel) -> Model:
    return shipped.open()


def _engine(options: Options, environment: Mapping[str, str]) -> Engine:
    """The worker process of this Python worker; a task on another device gets another one."""
    key = (options.runtime, *sorted(environment.items()))
    if key not in _engines:
        _open_engines.close()
        _engines.clear()
        _engines[key] = _open_engines.enter_context(local.start(options, environment))
    return _engines[key]


def describe(seconds: float, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Say what this executor is, after so long, in which the others get their tasks, too."""
    for _ in batches:
        pass
    time.sleep(seconds)
    executor, cores = _executor()
    yield _answer(
        {
            "host": socket.gethostname(),
            "executor": executor,
            "cores": cores or task_cores(),
            "python": platform.python_version(),
            "executable": sys.executable,
            "infermill": __version__,
            "spark": pyspark.__version__,  # the cluster's own, whatever this Python has installed
            "versions": versions(),
            "runtimes": {name: importlib.util.find_spec(name) is not None for name in RUNTIMES},
            "gpus": visible_gpus(),
        }
    )


@functools.cache
def versions() -> dict[str, str]:
    """Those that predictions depend on; empty for what is not installed."""
    return {package: _version(package) for package in (*RUNTIMES, *DECODERS)}


def _version(package: str) -> str:
    """Read from its files: importing it takes a second."""
    for name in (package, f"{package}-gpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _executor() -> tuple[str, int | None]:
    """A name for this executor on its host, and its cores: from its command line, for Spark tells neither to Python."""
    pid = os.getpid()
    while pid > 1:
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # no Linux
            break
        if "--executor-id" in arguments and "--cores" in arguments:
            cores = arguments[arguments.index("--cores") + 1]
            return arguments[arguments.index("--executor-id") + 1], int(cores)
        pid = parent
    return "", None
