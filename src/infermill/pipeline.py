"""fetch ∥ decode ∥ predict: the hot path.

    refs ─► fetch threads ─► decode threads ─► predict threads ─► finished partitions
            bytes in flight   bounded queue      assemble a batch,
            are bounded       of images          run the network

Fetching and decoding begin while the network is being loaded. All stages run at once, over one endless stream of
inputs: a batch may hold images of two partitions, so that nothing drains where one partition ends. An input that cannot
be predicted becomes a failure at one place, `_guarded`; any other exception stops the pipeline and is raised to the
caller.
"""

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from infermill.errors import BadInputError, ModelError
from infermill.meter import Meter
from infermill.types import Failure, ObjectRef

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

Image = NDArray[np.uint8]
Arrays = tuple[NDArray[np.generic], ...]
Made = TypeVar("Made")
Item = TypeVar("Item")
MAX_BYTES_IN_FLIGHT = 64 << 20
# Partitions that are read and not yet taken by the caller: a slow caller, or one slow object, slows the rest down.
OPEN_PARTITIONS = 16
_POLL_SECONDS = 0.1
# A thread inside a read or the network cannot be interrupted; they are daemons, and are left behind.
_JOIN_SECONDS = 1.0


@dataclass(slots=True)
class PartitionRows:
    """A partition on its way: what is known of its rows. `kept` holds one array per kind of value, row by row."""

    partition: int
    refs: Sequence[ObjectRef]
    kept: Arrays | None = None
    failures: dict[int, Failure] = field(default_factory=dict)
    settled: int = 0

    @property
    def is_finished(self) -> bool:
        return self.settled == len(self.refs)

    def keep(self, row: int, values: Arrays, index: int) -> None:
        if self.kept is None:
            self.kept = tuple(np.zeros((len(self.refs), *array.shape[1:]), array.dtype) for array in values)
        for kept, array in zip(self.kept, values, strict=True):
            if array.shape[1:] != kept.shape[1:]:
                raise ModelError(
                    f"the network answers {list(array.shape[1:])} for one image and {list(kept.shape[1:])} for another",
                    "its outputs must have one shape; end it before the part whose length depends on the image",
                )
            kept[row] = array[index]

    def predicted(self) -> NDArray[np.bool_]:
        """Which rows have a prediction."""
        mask = np.ones(len(self.refs), np.bool_)
        mask[list(self.failures)] = False
        return mask


@dataclass(frozen=True, slots=True)
class Network:
    """A loaded network: `threads` threads call `predict` with batches of up to `batch_size` images."""

    predict: Callable[[Image], Arrays]
    finish: Callable[[Arrays], tuple[Arrays, NDArray[np.bool_]]]
    "What is kept of each row, and which rows are finite."
    threads: int
    batch_size: int


@dataclass(frozen=True, slots=True)
class Stages:
    """What the pipeline runs, and on how many threads."""

    fetch: "Callable[[ObjectRef, Callable[[int], None]], ReadableBuffer]"
    decode: "Callable[[ReadableBuffer], Image]"
    load: Callable[[], Network]
    fetch_threads: int
    decode_threads: int
    decoded_images: int
    "How many images may wait for the network."


@dataclass(frozen=True, slots=True)
class _Input:
    rows: PartitionRows
    row: int

    @property
    def ref(self) -> ObjectRef:
        return self.rows.refs[self.row]


def run_pipeline(
    partitions: Iterable[tuple[int, Sequence[ObjectRef]]], stages: Stages, meter: Meter
) -> Generator[PartitionRows]:
    """Predict every ref of every partition, and yield each partition when its last row is settled.

    Partitions are read lazily, and finish in about the order in which they come.
    """
    pipeline = _Pipeline(partitions, stages, meter)
    try:
        pipeline.start()
        yield from pipeline.finished()
    finally:
        pipeline.stop()


class _StoppedError(Exception):
    """The pipeline is stopping: a thread leaves its loop."""


class _Pipeline:
    def __init__(self, partitions: Iterable[tuple[int, Sequence[ObjectRef]]], stages: Stages, meter: Meter) -> None:
        self._stages = stages
        self._meter = meter
        self._inputs = self._read(partitions)
        self._room = threading.Semaphore(OPEN_PARTITIONS)
        self._inputs_lock = threading.Lock()
        self._budget = _ByteBudget(MAX_BYTES_IN_FLIGHT)
        self._fetched: queue.Queue[tuple[_Input, ReadableBuffer, _Lease] | None] = queue.Queue(4 * stages.fetch_threads)
        self._decoded: queue.Queue[tuple[_Input, Image] | None] = queue.Queue(stages.decoded_images)
        self._finished: queue.Queue[PartitionRows | BaseException | None] = queue.Queue()
        self._batch_lock = threading.Lock()
        self._rows_lock = threading.Lock()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        stages = self._stages
        fetched = _Countdown(stages.fetch_threads, lambda: self._put(self._fetched, None))
        decoded = _Countdown(stages.decode_threads, lambda: self._put(self._decoded, None))
        self._start_threads("fetch", stages.fetch_threads, self._fetch_loop, fetched)
        self._start_threads("decode", stages.decode_threads, self._decode_loop, decoded)
        network = stages.load()
        # As many partitions of one object can be stuck in batches that are not full.
        self._room.release(network.threads * network.batch_size)
        predicted = _Countdown(network.threads, lambda: self._finished.put(None))
        self._start_threads("predict", network.threads, lambda: self._predict_loop(network), predicted)

    def _start_threads(self, stage: str, count: int, loop: Callable[[], None], countdown: "_Countdown") -> None:
        self._meter.threads[stage] = count
        for number in range(count):
            name = f"{stage}-{number}"
            thread = threading.Thread(target=self._run, args=(loop, countdown), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def finished(self) -> Iterator[PartitionRows]:
        while True:
            try:
                item = self._finished.get(timeout=_POLL_SECONDS)  # so that Ctrl-C is seen
            except queue.Empty:
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            self._room.release()
            yield item

    def stop(self) -> None:
        self._stopping.set()
        self._budget.stop()
        deadline = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            thread.join(timeout=max(deadline - time.monotonic(), 0))

    def _run(self, loop: Callable[[], None], countdown: "_Countdown") -> None:
        try:
            loop()
            countdown.done()
        except _StoppedError:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again by `finished`, in the caller's thread
            self._stopping.set()
            self._budget.stop()
            self._finished.put(error)

    def _read(self, partitions: Iterable[tuple[int, Sequence[ObjectRef]]]) -> Iterator[_Input]:
        for partition, refs in partitions:
            while not self._room.acquire(timeout=_POLL_SECONDS):
                if self._stopping.is_set():
                    raise _StoppedError
            rows = PartitionRows(partition, refs)
            for row in range(len(refs)):
                yield _Input(rows, row)

    def _fetch_loop(self) -> None:
        while not self._stopping.is_set():
            with self._inputs_lock:
                item = next(self._inputs, None)
            if item is None:
                return
            lease = _Lease(self._budget)
            data = self._guarded("fetch", item, lambda: self._stages.fetch(item.ref, lease.take))  # noqa: B023
            self._meter.spend("fetch", -lease.waited_seconds)
            if data is None:
                lease.give_back()
            else:
                self._meter.fetched(lease.size_bytes)
                self._put(self._fetched, (item, data, lease))
                del data  # or the next wait holds it beyond its lease

    def _decode_loop(self) -> None:
        while (work := self._take(self._fetched)) is not None:
            item, data, lease = work
            image = self._guarded("decode", item, lambda: self._stages.decode(data))  # noqa: B023
            del data, work
            lease.give_back()
            if image is not None:
                self._put(self._decoded, (item, image))

    def _predict_loop(self, network: Network) -> None:
        while True:
            started = time.perf_counter()
            items, images = self._take_batch(network.batch_size)
            self._meter.spend("idle", time.perf_counter() - started)
            if not items:
                return
            started = time.perf_counter()
            values, finite = network.finish(network.predict(np.stack(images)))
            self._meter.spend("predict", time.perf_counter() - started)
            for index, item in enumerate(items):
                if finite[index]:
                    self._settle(item, values, index)
                else:
                    message = "the network answered NaN or infinity"
                    self._fail(item, Failure("predict", "nonfinite", message))

    def _take_batch(self, batch_size: int) -> tuple[list[_Input], list[Image]]:
        """A full batch, by one thread at a time; a shorter one at the very end only."""
        items: list[_Input] = []
        images: list[Image] = []
        with self._batch_lock:
            while len(items) < batch_size:
                work = self._take(self._decoded)
                if work is None:
                    break
                items.append(work[0])
                images.append(work[1])
        return items, images

    def _guarded(self, stage: str, item: _Input, make: Callable[[], Made]) -> Made | None:
        """The one place where an input becomes a failure."""
        started = time.perf_counter()
        try:
            return make()
        except BadInputError as error:
            self._fail(item, error.failure)
            return None
        finally:
            self._meter.spend(stage, time.perf_counter() - started)

    def _fail(self, item: _Input, failure: Failure) -> None:
        item.rows.failures[item.row] = failure
        self._meter.settled(failure.code)
        self._count_settled(item.rows)

    def _settle(self, item: _Input, values: Arrays, index: int) -> None:
        with self._rows_lock:
            item.rows.keep(item.row, values, index)
        self._meter.settled()
        self._count_settled(item.rows)

    def _count_settled(self, rows: PartitionRows) -> None:
        with self._rows_lock:
            rows.settled += 1
            is_finished = rows.is_finished
        if is_finished:
            self._finished.put(rows)

    def _put(self, target: "queue.Queue[Item]", item: Item) -> None:
        while not self._stopping.is_set():
            try:
                return target.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
        raise _StoppedError

    def _take(self, origin: "queue.Queue[Item | None]") -> Item | None:
        """The next item, or None at the end, which stays in the queue for the other threads."""
        while not self._stopping.is_set():
            try:
                item = origin.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if item is None:
                origin.put(None)
            return item
        raise _StoppedError


class _Countdown:
    """Calls `last` when the last of `count` threads is done."""

    def __init__(self, count: int, last: Callable[[], None]) -> None:
        self._left = count
        self._last = last
        self._lock = threading.Lock()

    def done(self) -> None:
        with self._lock:
            self._left -= 1
            is_last = self._left == 0
        if is_last:
            self._last()


class _ByteBudget:
    """Bounds the bytes between fetch and decode; one larger object passes alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._stopped = False
        self._changed = threading.Condition()

    def acquire(self, size: int) -> None:
        with self._changed:
            while self._used and self._used + size > self._limit and not self._stopped:
                self._changed.wait()
            if self._stopped:
                raise _StoppedError
            self._used += size

    def release(self, size: int) -> None:
        with self._changed:
            self._used -= size
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


class _Lease:
    """One object's share of the budget, from before its bytes are read until they are decoded."""

    def __init__(self, budget: _ByteBudget) -> None:
        self._budget = budget
        self.size_bytes = 0
        self.waited_seconds = 0.0

    def take(self, size_bytes: int) -> None:
        started = time.perf_counter()
        self._budget.acquire(size_bytes)
        self.size_bytes = size_bytes
        self.waited_seconds = time.perf_counter() - started

    def give_back(self) -> None:
        self._budget.release(self.size_bytes)
