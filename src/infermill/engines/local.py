"""Worker processes on this machine.

An input can bring down the process that decodes or predicts it, and no `except` helps against that. So the driver
touches no input: workers do, and when one dies, its journal tells which inputs it had in hand. These are tried one by
one in another process, until it is known which of them kill; the partitions that were lost are then done again, with
that knowledge. A worker that hangs is killed, and its journal read in the same way.
"""

import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from infermill.engines import Engine
from infermill.engines.messages import Ask, Done, Raised, Said, Task
from infermill.errors import InfermillError, death_of
from infermill.journal import Entry, Journal
from infermill.meter import Counts, Meter
from infermill.types import Assignment, Failure, FailureCode, Options, PartitionReport

if TYPE_CHECKING:
    from infermill.jobspec import Job  # not here: this module is imported first, to start the workers soon

MAX_DEATHS = 3
"Of workers in a row without a finished partition or a culprit in between, before the job stops."
_POLL_SECONDS = 0.2
_STDERR = 2
# Not -m: what it would run as __main__ would not have the classes that are unpickled here.
_MAIN = "from infermill.engines.child import main; main()"
Place = tuple[int, int]
"A partition and a row in it."
logger = logging.getLogger("infermill")
_early: "list[_Child]" = []


def start_early() -> None:
    """Start a worker with the default runtime, for the first job of this process, whose options are not known yet.

    It ends with this process, or with the thread that calls this.
    """
    _early.append(_Child(Options(), {}))


@contextmanager
def start(options: Options, environment: Mapping[str, str] | None = None) -> Iterator[Engine]:
    """Start `options.workers` workers, which import their libraries while the driver imports its own, and plans.

    Args:
        options: of the job; but for the runtime and the number of workers, those of each job count when it is run.
        environment: variables for the workers, beside those of this process.
    """
    workers = _Workers(options, environment or {})
    try:
        workers.start()
        yield workers.run
    finally:
        workers.stop()


class _Workers:
    def __init__(self, options: Options, environment: Mapping[str, str]) -> None:
        self._options = options
        self._environment = environment
        self._lock = threading.Lock()
        self._children: list[_Child] = []
        self._threads: list[threading.Thread] = []
        self.is_stopped = False
        self._idle: list[_Child] = []
        # A worker ends with the thread that started it (see `child`), and supervisors end with their job.
        self._spawner = ThreadPoolExecutor(1, "spawn")

    def start(self) -> None:
        if not self._environment:
            self._idle, self._children = _early[: self._options.workers], list(_early)
            _early.clear()
        while len(self._idle) < self._options.workers:
            self._idle.append(self._spawn())

    def run(self, job: "Job", ids: Sequence[int], meter: Meter) -> Iterator[PartitionReport]:
        board = _Board(ids)
        events: queue.SimpleQueue[PartitionReport | BaseException | None] = queue.SimpleQueue()
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        running = meter.workers = min(self._options.workers, len(ids))
        for number in range(running):
            supervise = _Supervisor(self, job, board, meter, events).run
            self._threads.append(threading.Thread(target=supervise, name=f"worker-{number}", daemon=True))
            self._threads[-1].start()
        while running:
            try:
                event = events.get(timeout=_POLL_SECONDS)  # so that Ctrl-C is seen
            except queue.Empty:
                continue
            if isinstance(event, BaseException):
                raise event
            if event is None:
                running -= 1
            else:
                yield event

    def child(self) -> "_Child":
        """A worker without a task: one that was started early or is done with another, or a new one."""
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return self._spawn()

    def is_done(self, child: "_Child") -> None:
        """It has done its task, and may get another."""
        with self._lock:
            self._idle.append(child)

    def _spawn(self) -> "_Child":
        child = self._spawner.submit(_Child, self._options, self._environment).result()
        with self._lock:
            self._children = [one for one in self._children if not one.is_closed] + [child]
            if self.is_stopped:
                child.kill()
        return child

    def stop(self) -> None:
        with self._lock:
            self.is_stopped = True
            for child in self._children:
                child.kill()
        for thread in self._threads:
            thread.join()
        for child in self._children:
            child.close()
        self._spawner.shutdown()


class _Child:
    """A worker process, with the connection to it and its journal."""

    def __init__(self, options: Options, environment: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        self.journal = Journal()
        descriptors = (theirs.fileno(), self.journal.descriptor)
        # What it prints is not the command's result. -P: no module of the current folder stands in for another.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _MAIN, *map(str, descriptors), options.runtime],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            stdout=_STDERR,
            env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            process_group=0,  # Ctrl-C in a terminal is for the driver alone
        )
        theirs.close()
        self.connection: Connection[object, object] = Connection(ours.detach())
        self.killed_for: list[Entry] = []
        self.is_closed = False

    def kill(self) -> None:
        self._process.kill()

    def messages(self, item_timeout_seconds: float) -> Iterator[object]:
        """What the worker says, until it is done or dead. It is killed where it works too long at its inputs."""
        watched: dict[float, Entry] = {}
        while True:
            try:
                if self.connection.poll(_POLL_SECONDS):
                    message = self.connection.recv()
                    match message:
                        case Said():
                            logger.log(message.level, message.text)
                        case Raised():
                            self.kill()
                            self.close()
                            if message.traceback:
                                message.error.add_note(message.traceback)
                            raise message.error
                        case _:
                            yield message
                    if isinstance(message, Done):
                        return
            except (EOFError, OSError):
                return
            # Half of the time, and not the oldest alone: where native code hangs with Python's lock held, all that is
            # in hand hangs with it, and what began before the culprit is overdue first.
            old = _older_than(item_timeout_seconds / 2, self.journal.entries())
            # Twice the same: an entry that is being written can be read as another one.
            stuck = [entry for entry in old if watched.get(entry.started) == entry]
            if not self.killed_for and _older_than(item_timeout_seconds, stuck):
                self.killed_for = stuck
                self.kill()
            watched = {entry.started: entry for entry in old}

    def answer(self, message: object) -> None:
        with suppress(OSError):  # it is dead, which `messages` will say
            self.connection.send(message)

    def end(self) -> "_Death":
        """Wait for the end of the process, and say what it was."""
        code = self._process.wait()
        entries = self.journal.entries()
        self.close()
        if self.killed_for:
            return _Death("timeout", "it took longer than --item-timeout", self.killed_for)
        if code == -signal.SIGKILL:
            return _Death("oom", "the worker was killed (SIGKILL), as the system does where memory runs out", entries)
        return _Death("native_crash", f"the worker died ({death_of(code)})", entries)

    def close(self) -> None:
        """Wait for the end of the process, and give back what belongs to it."""
        if not self.is_closed:
            self.is_closed = True
            self._process.wait()
            self.connection.close()
            self.journal.close()


def _older_than(seconds: float, entries: Iterable[Entry]) -> list[Entry]:
    now = time.monotonic()
    return [entry for entry in entries if now - entry.started > seconds]


@dataclass(frozen=True, slots=True)
class _Death:
    """How a worker ended, and what it had in hand."""

    code: FailureCode
    reason: str
    entries: Sequence[Entry]

    def verdicts(self) -> dict[Place, Failure]:
        """The culprit, where only one input was in hand."""
        places = self.suspects()
        if len(places) != 1:
            return {}
        stage = self.entries[0].stage
        doing = "decoded" if stage == "decode" else "predicted"
        return {places[0]: Failure(stage, self.code, f"{self.reason} while it was {doing}")}

    def suspects(self) -> list[Place]:
        return [place for entry in self.entries for place in entry.rows]


class _Board:
    """The partitions that are not handed out, and what is known of their rows."""

    def __init__(self, ids: Iterable[int]) -> None:
        self._lock = threading.Lock()
        self._todo = deque(Assignment(number) for number in ids)

    def take(self) -> Assignment | None:
        with self._lock:
            return self._todo.popleft() if self._todo else None

    def give_back(self, lost: Iterable[Assignment], verdicts: Mapping[Place, Failure]) -> None:
        for assignment in lost:
            known = {row: failure for (number, row), failure in verdicts.items() if number == assignment.partition}
            with self._lock:
                self._todo.appendleft(Assignment(assignment.partition, {**assignment.verdicts, **known}))

    @property
    def is_empty(self) -> bool:
        return not self._todo


class _Supervisor:
    """One place for a worker: it is served until nothing is left to do, and replaced when it dies."""

    def __init__(
        self,
        workers: _Workers,
        job: "Job",
        board: _Board,
        meter: Meter,
        events: "queue.SimpleQueue[PartitionReport | BaseException | None]",
    ) -> None:
        self._workers = workers
        self._job = job
        self._board = board
        self._meter = meter
        self._events = events
        self._deaths = 0

    def run(self) -> None:
        try:
            while True:
                death, lost = self._serve(self._workers.child())
                if self._workers.is_stopped:
                    return
                if death is not None and (lost or not self._board.is_empty):
                    self._board.give_back(lost, self._verdicts(death))
                if self._board.is_empty:
                    break
            self._events.put(None)
        except BaseException as error:  # noqa: BLE001 - raised again by the driver's thread
            self._events.put(error)

    def _serve(self, child: _Child) -> tuple[_Death | None, list[Assignment]]:
        """Give a worker what it asks for; at its death, what it had not finished."""
        open_: dict[int, Assignment] = {}
        unreported = Counter[str]()
        child.answer(Task(self._job))
        for message in child.messages(self._job.options.item_timeout):
            match message:
                case Ask():
                    assignment = self._board.take()
                    if assignment is not None:
                        open_[assignment.partition] = assignment
                    child.answer(assignment)
                case Counts():
                    self._meter.add(message)
                    unreported.update({"": message.objects, **message.failures})
                case PartitionReport():
                    self._deaths = 0
                    del open_[message.partition]
                    unreported.subtract({"": message.ok + message.failed, **message.failures_by_code})
                    self._events.put(message)
                case Done():
                    self._workers.is_done(child)
                    return None, []
        objects = unreported.pop("", 0)
        # What is lost will be counted again.
        self._meter.add(Counts(objects=-max(objects, 0), failures={code: -n for code, n in (+unreported).items()}))
        return child.end(), list(open_.values())

    def _verdicts(self, death: _Death) -> dict[Place, Failure]:
        """Which inputs kill a worker, of those that the dead one had in hand."""
        self._deaths += 1
        verdicts = death.verdicts() if death.code == "timeout" else {}
        suspects = [] if verdicts else death.suspects()
        if suspects:
            logger.warning("%s; trying the %d objects that it had in hand one by one", death.reason, len(suspects))
        while suspects:
            death_of_one = self._try_each(suspects)
            if death_of_one is None:
                break
            culprit = death_of_one.verdicts()
            if not culprit:
                break
            verdicts |= culprit
            suspects = suspects[suspects.index(next(iter(culprit))) + 1 :]
        if verdicts:
            self._deaths = 0
        elif self._deaths >= MAX_DEATHS:
            raise InfermillError(
                f"{death.reason} {self._deaths} times in a row, and no single input explains it",
                "the same command resumes; try a longer --item-timeout"
                if death.code == "timeout"
                else "the same command resumes; try --threads 1, another --runtime, or a machine with more memory",
            )
        return verdicts

    def _try_each(self, suspects: Sequence[Place]) -> _Death | None:
        child = self._workers.child()
        child.answer(Task(self._job, tuple(suspects)))
        for message in child.messages(self._job.options.item_timeout):
            match message:
                case Counts():
                    self._meter.add(message)
                case Done():
                    self._workers.is_done(child)
                    return None
        return child.end()
