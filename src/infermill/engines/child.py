"""A worker process: it asks for partitions, and answers with their reports.

It ends when its driver does.
"""

import ctypes
import importlib
import logging
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Literal

from infermill.engines.messages import Ask, Done, Raised, Said, Task
from infermill.errors import InfermillError, RuntimeDiedError
from infermill.imports import leave_out
from infermill.jobspec import Job
from infermill.journal import Journal
from infermill.meter import Meter
from infermill.runtimes import MODULES
from infermill.trace import Trace
from infermill.types import Assignment
from infermill.worker import LoadedNetwork, run_partitions, trust_stores, try_each

TELL_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1


class _Driver:
    """The other end of the connection."""

    def __init__(self, connection: "Connection[object, object]") -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._answers: queue.SimpleQueue[object] = queue.SimpleQueue()
        threading.Thread(target=self._receive, name="receive", daemon=True).start()

    def receive_task(self) -> Task:
        task = self._answers.get()
        assert isinstance(task, Task)  # noqa: S101
        return task

    def _receive(self) -> None:
        try:
            while True:
                self._answers.put(self._connection.recv())
        except (EOFError, OSError):
            os._exit(1)

    def send(self, message: object) -> None:
        with self._sending:
            self._connection.send(message)

    def assignments(self) -> Iterator[Assignment]:
        """Partitions, one at a time, until the driver has no more."""
        while True:
            self.send(Ask())
            assignment = self._answers.get()
            if not isinstance(assignment, Assignment):
                return
            yield assignment


class _Log(logging.Handler):
    """Leaves what a worker has to say to the driver, which knows where its user looks."""

    def __init__(self, driver: _Driver) -> None:
        super().__init__(logging.WARNING)
        self._driver = driver

    def emit(self, record: logging.LogRecord) -> None:
        self._driver.send(Said(record.levelno, record.getMessage()))


class _Watch:
    """The journal's notes; where a runtime's process dies, so does this one, in the same way, and the note stays."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def __call__(
        self, stage: Literal["decode", "predict"], rows: Sequence[tuple[int, int]]
    ) -> AbstractContextManager[None]:
        note = self._journal.note(stage, rows)
        return note if stage == "decode" else _dying_too(note)


@contextmanager
def _dying_too(note: AbstractContextManager[None]) -> Iterator[None]:
    with note:
        try:
            yield
        except RuntimeDiedError as error:
            if error.status < 0:
                signal.raise_signal(-error.status)
            os._exit(max(error.status, 1))


def _die_with_driver() -> None:
    """Linux kills this process when the thread that started it ends; elsewhere, the end of the connection must do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Run the worker whose connection and journal are open as the file descriptors in the arguments."""
    connection, journal, runtime = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    leave_out()
    _die_with_driver()
    driver = _Driver(Connection(connection))
    logging.getLogger("infermill").addHandler(_Log(driver))
    with suppress(BrokenPipeError):
        _work(driver, Journal(journal), runtime)
    # Not by the interpreter's end: threads of native libraries may still run.
    os._exit(1)


def _work(driver: _Driver, journal: Journal, runtime: str) -> None:
    """Do one task after the other, with the network loaded once, until one fails or the driver ends."""
    with suppress(Exception):  # loading the network will say it
        importlib.import_module(MODULES[runtime])  # type: ignore[index]
    importlib.import_module("numpy.ma")  # Arrow does it where it meets the first array; here there is time
    network = LoadedNetwork()
    try:
        while True:
            task = driver.receive_task()
            trust_stores(task.job)
            meter = Meter(Trace() if task.job.profile else None)
            if task.suspects is None:
                _run(driver, task.job, journal, network, meter)
            else:
                try_each(task.job, task.suspects, meter, _Watch(journal), network)
            driver.send(meter.drain())
            driver.send(Done())
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001 - raised again by the driver
        driver.send(_raised(error))


def _run(driver: _Driver, job: Job, journal: Journal, network: LoadedNetwork, meter: Meter) -> None:
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(TELL_SECONDS):
            driver.send(meter.drain())

    telling = threading.Thread(target=tell, name="tell", daemon=True)
    telling.start()
    try:
        for report in run_partitions(job, driver.assignments(), meter, _Watch(journal), network):
            driver.send(meter.drain())
            driver.send(report)
    finally:
        ended.set()
        telling.join()


def _raised(error: Exception) -> Raised:
    text = "" if isinstance(error, InfermillError) else traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    except Exception:  # noqa: BLE001 - whatever an exception of a library does when it is pickled
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return Raised(error, text)
