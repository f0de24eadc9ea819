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
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from infermill.errors import BadInputError
from infermill.leases import ByteBudget, Fetched, Pace, Packing
from infermill.meter import Meter
from infermill.stages import BATCHES_IN_A_ROW, Image, Network, PartitionRows, Share, Stages
from infermill.types import Failure, ObjectRef, Stage

Made = TypeVar("Made")
MAX_BYTES_IN_FLIGHT = 64 << 20
FETCHED = 4
"So many objects wait to be decoded, for each fetch thread, and of those that a compute thread takes at once."
# Partitions that are read and not yet taken by the caller: a slow caller, or one slow object, slows the rest down.
OPEN_PARTITIONS = 16
# At the end, what is left is shared: no thread has a whole batch to do while the others have none.
LAST_BATCH_SIZE = 2
_POLL_SECONDS = 0.1
# A thread inside a read or the network cannot be interrupted; they are daemons, and are left behind.
_JOIN_SECONDS = 1.0


class _Input(NamedTuple):
    rows: PartitionRows
    row: int

    @property
    def ref(self) -> ObjectRef:
        return self.rows.refs[self.row]

    @property
    def place(self) -> tuple[int, int]:
        return self.rows.partition, self.row


class _Decoded(NamedTuple):
    item: _Input
    image: Image


class _Work(NamedTuple):
    """What a compute thread does next: objects to decode, or a batch to predict."""

    fetched: Sequence[Fetched[_Input]] = ()
    batch: Sequence[_Decoded] = ()


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
        self._partitions = self._read(shares)
        self._inputs: deque[_Input] = deque()
        self._inputs_lock = threading.Lock()
        self._open_partitions = threading.Semaphore(OPEN_PARTITIONS)
        self._budget = ByteBudget(MAX_BYTES_IN_FLIGHT)
        self._lock = threading.Lock()
        # All below is held under the lock; the conditions are its waiting rooms, for fetch and for compute threads.
        self._room, self._work = threading.Condition(self._lock), threading.Condition(self._lock)
        self._network: Network | None = None
        self._batch_size = 0
        self._fetched: deque[Fetched[_Input]] = deque()
        self._decoded: deque[_Decoded] = deque()
        self._fetching, self._decoding, self._predicting = stages.fetch_threads, 0, 0
        self._max_fetched = FETCHED * stages.fetch_threads
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

    def _read(self, shares: Iterable[Share]) -> Iterator[list[_Input]]:
        for partition, refs, verdicts in shares:
            while not self._open_partitions.acquire(timeout=_POLL_SECONDS):
                if self._stopping.is_set():
                    raise _StoppedError
            rows = PartitionRows(partition, refs)
            if rows.is_finished:  # without a row
                self._finished.put(rows)
            for row in verdicts:
                self._fail(_Input(rows, row), verdicts[row])
            yield [_Input(rows, row) for row in range(len(refs)) if row not in verdicts]

    def _fetch_loop(self) -> None:
        packing, pace = Packing(self._budget, self._hand_over), Pace()
        while inputs := self._take_inputs(min(pace.count, self._max_fetched // (2 * self._stages.fetch_threads))):
            started, waited = time.perf_counter(), packing.waited_seconds
            for item in inputs:
                data = self._guarded("fetch", item, self._stages.fetch, item.ref, packing.reserve)
                if data is None:
                    packing.drop()
                else:
                    packing.add(item, data)
                    del data  # or the next wait holds it beyond its budget
            pace.took(self._meter.spend("fetch", started, packing.waited_seconds - waited, len(inputs)))
            packing.hand_over()
        with self._lock:
            self._fetching -= 1
            self._work.notify_all()

    def _take_inputs(self, count: int) -> list[_Input]:
        """The next few inputs, of one partition; none at the end."""
        started = time.perf_counter()
        with self._inputs_lock:
            while not self._inputs and not self._stopping.is_set():
                partition = next(self._partitions, None)
                if partition is None:
                    break
                self._inputs.extend(partition)
            taken = [self._inputs.popleft() for _ in range(min(count, len(self._inputs)))]
        self._meter.wait("fetch", time.perf_counter() - started)
        return taken

    def _hand_over(self, fetched: list[Fetched[_Input]]) -> None:
        self._meter.fetched(sum(one.size_bytes for one in fetched))
        with self._lock:
            if len(self._fetched) >= self._max_fetched and not self._stopping.is_set():
                started = time.perf_counter()
                while len(self._fetched) >= self._max_fetched and not self._stopping.is_set():
                    self._room.wait()
                self._meter.wait("fetch", time.perf_counter() - started)
            self._fetched.extend(fetched)
            self._work.notify()

    def _compute_loop(self) -> None:
        pace, was_predicting = Pace(), True
        while (work := self._next_work(pace.count, was_predicting=was_predicting)) is not None:
            was_predicting = bool(work.batch)
            if was_predicting:
                self._predict(work.batch)
            else:
                pace.took(self._decode(work.fetched))

    def _next_work(self, objects: int, *, was_predicting: bool) -> _Work | None:
        """What is most worth doing: a batch to predict, or so many objects to decode; None at the end of all."""
        with self._lock:
            # Who decodes slowly is not far ahead in fetching: other workers may have nothing to do.
            self._max_fetched = FETCHED * max(self._stages.fetch_threads, objects)
            while not self._stopping.is_set():
                self._meter.look(len(self._fetched), len(self._decoded))
                can_predict = self._can_predict()
                if can_predict and (was_predicting or len(self._decoded) >= self._enough()):
                    return _Work(batch=self._take_batch())
                if self._fetched and (room := self._max_decoded() - len(self._decoded) - self._decoding) > 0:
                    return _Work(self._take_fetched(min(objects, room)))
                if can_predict:
                    return _Work(batch=self._take_batch())
                if self._is_all_decoded() and not self._decoded and self._network is not None:
                    if self._predicting == 0:
                        self._finished.put(None)
                    return None
                started, is_queueing = time.perf_counter(), self._is_network_full()
                self._work.wait()
                waited = self._meter.spend("idle", started)
                if is_queueing:
                    self._meter.wait("network", waited)
        raise _StoppedError

    def _take_fetched(self, count: int) -> list[Fetched[_Input]]:
        count = max(min(count, len(self._fetched) // self._stages.compute_threads), 1)
        self._decoding += count
        taken = [self._fetched.popleft() for _ in range(count)]
        if len(self._fetched) < self._max_fetched:
            self._room.notify()
        return taken

    def _is_network_full(self) -> bool:
        return self._network is not None and self._predicting == self._network.streams and bool(self._decoded)

    def _can_predict(self) -> bool:
        if self._network is None or not self._decoded or self._is_network_full():
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

    def _decode(self, fetched: Sequence[Fetched[_Input]]) -> float:
        started = time.perf_counter()
        decoded = []
        for item, data, _ in fetched:
            with self._stages.watch("decode", (item.place,)):
                image = self._guarded("decode", item, self._stages.decode, data)
            if image is not None:
                decoded.append(_Decoded(item, image))
        self._budget.release(sum(one.size_bytes for one in fetched))
        seconds = self._meter.spend("decode", started, objects=len(fetched))
        with self._lock:
            self._decoding -= len(fetched)
            self._decoded.extend(decoded)
            self._tell_of_work()
        return seconds

    def _predict(self, batch: Sequence[_Decoded]) -> None:
        started = time.perf_counter()
        with self._stages.watch("predict", [one.item.place for one in batch]):
            self._predict_within_memory(batch)
        self._meter.spend("predict", started, objects=len(batch))
        with self._lock:
            self._predicting -= 1
            self._tell_of_work()

    def _tell_of_work(self) -> None:
        if self._is_all_decoded():
            self._work.notify_all()
        else:
            self._work.notify()

    def _predict_within_memory(self, batch: Sequence[_Decoded]) -> None:
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
        rows_of: dict[int, tuple[PartitionRows, list[int], list[int]]] = {}
        for index, (item, _) in enumerate(batch):
            if finite[index]:
                _, rows, indices = rows_of.setdefault(item.rows.partition, (item.rows, [], []))
                rows.append(item.row)
                indices.append(index)
            else:
                self._fail(item, Failure("predict", "nonfinite", "the network answered NaN or infinity"))
        for partition, rows, indices in rows_of.values():
            with self._lock:
                partition.keep(rows, values, indices)
            self._settle(partition, len(rows))

    def _guarded(self, stage: Stage, item: _Input, make: Callable[..., Made], *arguments: Any) -> Made | None:
        """The one place where an input becomes a failure."""
        try:
            return make(*arguments)
        except BadInputError as error:
            self._fail(item, error.failure)
        except MemoryError as error:
            self._fail(item, Failure(stage, "oom", str(error) or "no memory for it"))
        return None

    def _fail(self, item: _Input, failure: Failure) -> None:
        item.rows.failures[item.row] = failure
        self._settle(item.rows, 1, failure.code)

    def _settle(self, rows: PartitionRows, count: int, code: str | None = None) -> None:
        self._meter.settled(count, code)
        with self._lock:
            rows.settled += count
            is_finished = rows.is_finished
        if is_finished:
            self._finished.put(rows)
