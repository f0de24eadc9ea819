"""fetch ∥ decode ∥ predict: the hot path.

    refs ─► fetch threads ─► fetched ─► compute threads, about one a core ─► finished partitions
            bytes in flight             each decodes until there are a few batches,
            are bounded                 and then runs the network until there are none

Fetching and decoding begin while the network is being loaded. All of it runs at once, over one endless stream of
inputs: a batch may hold images of two partitions, so that nothing drains where one partition ends. Decoding and the
network share their threads: with threads of their own they took each other's core, and its caches, in the middle of a
batch. An input that cannot be predicted becomes a failure at one place, `_guarded`; any other exception stops the
pipeline and is raised to the caller.
"""

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from infermill.errors import BadInputError, ModelError
from infermill.leases import ByteBudget, Lease
from infermill.meter import Meter
from infermill.types import Failure, ObjectRef, Stage

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

Image = NDArray[Any]
"What is decoded: an image, or a tensor where the network takes those."
Arrays = tuple[NDArray[np.generic], ...]
Made = TypeVar("Made")
MAX_BYTES_IN_FLIGHT = 64 << 20
# Partitions that are read and not yet taken by the caller: a slow caller, or one slow object, slows the rest down.
OPEN_PARTITIONS = 16
# Decoding and the network displace each other from the caches of a core: so each goes on for a while.
BATCHES_IN_A_ROW = 4
# At the end, what is left is shared: no thread has a whole batch to do while the others have none.
LAST_BATCH_SIZE = 2
_POLL_SECONDS = 0.1
# A thread inside a read or the network cannot be interrupted; they are daemons, and are left behind.
_JOIN_SECONDS = 1.0


class Share(NamedTuple):
    """A partition as a worker gets it: its refs, and the rows that are known to fail."""

    partition: int
    refs: Sequence[ObjectRef]
    verdicts: Mapping[int, Failure] = {}


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
    """A loaded network: up to `streams` threads at once call `predict` with batches of up to `batch_size` images."""

    predict: Callable[[Image], Arrays]
    "Raises MemoryError where there is no memory for a batch of this length."
    finish: Callable[[Arrays], tuple[Arrays, NDArray[np.bool_]]]
    "What is kept of each row, and which rows are finite."
    streams: int
    batch_size: int
    is_on_cores: bool = True
    "It computes on the cores that decode, and not on a device of its own."
    is_fixed: bool = False
    "Shorter batches cost as much as full ones."


Watch = Callable[[Literal["decode", "predict"], Sequence[tuple[int, int]]], AbstractContextManager[None]]
"Is told, by the thread that does it, which (partition, row) are decoded or predicted while the context is open."


def unwatched(_stage: Literal["decode", "predict"], _rows: Sequence[tuple[int, int]]) -> AbstractContextManager[None]:
    """A `Watch` that looks away."""
    return nullcontext()


@dataclass(frozen=True, slots=True)
class Stages:
    """What the pipeline runs, and on how many threads."""

    fetch: "Callable[[ObjectRef, Callable[[int], None]], ReadableBuffer]"
    decode: "Callable[[ReadableBuffer], Image]"
    load: Callable[[], Network]
    fetch_threads: int
    compute_threads: int
    decoded_images: int
    "How many images may wait for the network."
    watch: Watch = unwatched


@dataclass(frozen=True, slots=True)
class _Input:
    rows: PartitionRows
    row: int

    @property
    def ref(self) -> ObjectRef:
        return self.rows.refs[self.row]

    @property
    def place(self) -> tuple[int, int]:
        return self.rows.partition, self.row


class _Fetched(NamedTuple):
    item: _Input
    data: "ReadableBuffer"
    lease: Lease


class _Decoded(NamedTuple):
    item: _Input
    image: Image


def run_pipeline(shares: Iterable[Share], stages: Stages, meter: Meter) -> Generator[PartitionRows]:
    """Predict every ref of every partition, and yield each partition when its last row is settled.

    Partitions are read lazily, and finish in about the order in which they come.
    """
    pipeline = _Pipeline(shares, stages, meter)
    try:
        pipeline.start()
        yield from pipeline.finished()
    finally:
        pipeline.stop()


class _StoppedError(Exception):
    """The pipeline is stopping: a thread leaves its loop."""


class _Pipeline:
    def __init__(self, shares: Iterable[Share], stages: Stages, meter: Meter) -> None:
        self._stages = stages
        self._meter = meter
        self._inputs = self._read(shares)
        self._inputs_lock = threading.Lock()
        self._open_partitions = threading.Semaphore(OPEN_PARTITIONS)
        self._budget = ByteBudget(MAX_BYTES_IN_FLIGHT)
        self._lock = threading.Lock()
        # All below is held under the lock; the conditions are its waiting rooms, for fetch and for compute threads.
        self._room, self._work = threading.Condition(self._lock), threading.Condition(self._lock)
        self._network: Network | None = None
        self._batch_size = 0
        self._fetched: deque[_Fetched] = deque()
        self._decoded: deque[_Decoded] = deque()
        self._fetching, self._decoding, self._predicting = stages.fetch_threads, 0, 0
        self._finished: queue.Queue[PartitionRows | BaseException | None] = queue.Queue()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        stages = self._stages
        self._start_threads("fetch", stages.fetch_threads, self._fetch_loop)
        self._start_threads("compute", stages.compute_threads, self._compute_loop)
        network = stages.load()
        # As many partitions of one object can be stuck in batches that are not full.
        self._open_partitions.release(network.streams * network.batch_size)
        with self._lock:
            self._network, self._batch_size = network, network.batch_size
            self._work.notify_all()
        if not network.is_on_cores:
            self._start_threads("compute", network.streams, self._compute_loop)

    def _start_threads(self, kind: str, count: int, loop: Callable[[], None]) -> None:
        for _ in range(count):
            thread = threading.Thread(target=self._run, args=(loop,), name=f"{kind}-{len(self._threads)}", daemon=True)
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
            self._open_partitions.release()
            yield item

    def stop(self) -> None:
        self._stop_threads()
        deadline = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            thread.join(timeout=max(deadline - time.monotonic(), 0))

    def _stop_threads(self) -> None:
        self._stopping.set()
        self._budget.stop()
        with self._lock:
            self._room.notify_all()
            self._work.notify_all()

    def _run(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except _StoppedError:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again by `finished`, in the caller's thread
            self._stop_threads()
            self._finished.put(error)

    def _read(self, shares: Iterable[Share]) -> Iterator[_Input]:
        for partition, refs, verdicts in shares:
            while not self._open_partitions.acquire(timeout=_POLL_SECONDS):
                if self._stopping.is_set():
                    raise _StoppedError
            rows = PartitionRows(partition, refs)
            if rows.is_finished:  # without a row
                self._finished.put(rows)
            for row in range(len(refs)):
                if row in verdicts:
                    self._fail(_Input(rows, row), verdicts[row])
                else:
                    yield _Input(rows, row)

    def _fetch_loop(self) -> None:
        while not self._stopping.is_set():
            with self._inputs_lock:
                item = next(self._inputs, None)
            if item is None:
                break
            lease = Lease(self._budget)
            data = self._guarded("fetch", item, lambda: self._stages.fetch(item.ref, lease.take))  # noqa: B023
            self._meter.spend("fetch", -lease.waited_seconds)
            if data is None:
                lease.give_back()
            else:
                self._meter.fetched(lease.size_bytes)
                self._hand_over(_Fetched(item, data, lease))
                del data  # or the next wait holds it beyond its lease
        with self._lock:
            self._fetching -= 1
            self._work.notify_all()

    def _hand_over(self, fetched: _Fetched) -> None:
        with self._lock:
            while len(self._fetched) >= 4 * self._stages.fetch_threads and not self._stopping.is_set():
                self._room.wait()
            self._fetched.append(fetched)
            self._work.notify()

    def _compute_loop(self) -> None:
        work: _Fetched | list[_Decoded] | None = []
        while (work := self._next_work(was_predicting=isinstance(work, list))) is not None:
            if isinstance(work, list):
                self._predict(work)
            else:
                self._decode(*work)

    def _next_work(self, *, was_predicting: bool) -> _Fetched | list[_Decoded] | None:
        """What is most worth doing: a batch to predict or an object to decode; None at the end of all."""
        with self._lock:
            while not self._stopping.is_set():
                can_predict = self._can_predict()
                if can_predict and (was_predicting or len(self._decoded) >= self._enough()):
                    return self._take_batch()
                if self._fetched and len(self._decoded) + self._decoding < self._max_decoded():
                    self._decoding += 1
                    self._room.notify()
                    return self._fetched.popleft()
                if can_predict:
                    return self._take_batch()
                if self._is_all_decoded() and not self._decoded and self._network is not None:
                    if self._predicting == 0:
                        self._finished.put(None)
                    return None
                started = time.perf_counter()
                self._work.wait()
                self._meter.spend("idle", time.perf_counter() - started)
        raise _StoppedError

    def _can_predict(self) -> bool:
        if self._network is None or self._predicting == self._network.streams or not self._decoded:
            return False
        return len(self._decoded) >= self._batch_size or self._is_all_decoded()

    def _enough(self) -> int:
        """Decoded images for which a thread turns from decoding to the network."""
        on_cores = self._network is not None and self._network.is_on_cores
        return self._batch_size * (BATCHES_IN_A_ROW if on_cores else 1)

    def _max_decoded(self) -> int:
        return max(self._stages.decoded_images, self._enough())

    def _is_all_decoded(self) -> bool:
        return not (self._fetching or self._fetched or self._decoding)

    def _take_batch(self) -> list[_Decoded]:
        self._predicting += 1
        self._work.notify()  # for there is room to decode
        size = min(self._batch_size, len(self._decoded))
        if self._is_last_stretch():
            size = min(size, max(math.ceil(len(self._decoded) / self._stages.compute_threads), LAST_BATCH_SIZE))
        return [self._decoded.popleft() for _ in range(size)]

    def _is_last_stretch(self) -> bool:
        """Whether shorter batches let the threads end at about the same time."""
        network = self._network
        assert network is not None  # noqa: S101 - a batch is taken only when there is one
        return self._is_all_decoded() and network.is_on_cores and not network.is_fixed

    def _decode(self, item: _Input, data: "ReadableBuffer", lease: Lease) -> None:
        with self._stages.watch("decode", (item.place,)):
            image = self._guarded("decode", item, lambda: self._stages.decode(data))
        lease.give_back()
        with self._lock:
            self._decoding -= 1
            if image is not None:
                self._decoded.append(_Decoded(item, image))
            if self._is_all_decoded():
                self._work.notify_all()
            else:
                self._work.notify()

    def _predict(self, batch: list[_Decoded]) -> None:
        started = time.perf_counter()
        with self._stages.watch("predict", [one.item.place for one in batch]):
            self._predict_within_memory(batch)
        self._meter.spend("predict", time.perf_counter() - started)
        with self._lock:
            self._predicting -= 1
            if self._is_all_decoded():
                self._work.notify_all()
            else:
                self._work.notify()

    def _predict_within_memory(self, batch: list[_Decoded]) -> None:
        """Predict a batch, in halves where there is not memory enough for the whole."""
        network = self._network
        assert network is not None  # noqa: S101 - a batch is taken only when there is one
        try:
            values, finite = network.finish(network.predict(np.stack([one.image for one in batch])))
        except MemoryError as error:
            if len(batch) == 1 or network.is_fixed:
                for item, _ in batch:
                    self._fail(item, Failure("predict", "oom", str(error) or "no memory for the smallest batch"))
                return
            half = len(batch) // 2
            with self._lock:
                self._batch_size = min(self._batch_size, half)
            self._meter.halve_batch()
            self._predict_within_memory(batch[:half])
            self._predict_within_memory(batch[half:])
            return
        for index, (item, _) in enumerate(batch):
            if finite[index]:
                self._settle(item, values, index)
            else:
                self._fail(item, Failure("predict", "nonfinite", "the network answered NaN or infinity"))

    def _guarded(self, stage: Stage, item: _Input, make: Callable[[], Made]) -> Made | None:
        """The one place where an input becomes a failure."""
        started = time.perf_counter()
        try:
            return make()
        except BadInputError as error:
            self._fail(item, error.failure)
        except MemoryError as error:
            self._fail(item, Failure(stage, "oom", str(error) or "no memory for it"))
        finally:
            self._meter.spend(stage, time.perf_counter() - started)
        return None

    def _fail(self, item: _Input, failure: Failure) -> None:
        item.rows.failures[item.row] = failure
        self._meter.settled(failure.code)
        self._count_settled(item.rows)

    def _settle(self, item: _Input, values: Arrays, index: int) -> None:
        with self._lock:
            item.rows.keep(item.row, values, index)
        self._meter.settled()
        self._count_settled(item.rows)

    def _count_settled(self, rows: PartitionRows) -> None:
        with self._lock:
            rows.settled += 1
            is_finished = rows.is_finished
        if is_finished:
            self._finished.put(rows)
