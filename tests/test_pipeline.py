"""The pipeline alone, over functions that are small enough to know their answers."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from infermill import pipeline
from infermill.errors import BadInputError, ModelError, StoreError
from infermill.meter import Meter
from infermill.pipeline import run_pipeline
from infermill.stages import Arrays, Network, PartitionRows, Share, Stages
from infermill.types import Failure, ObjectRef
from infermill.verdict import bottleneck


def _fetch(ref: ObjectRef, reserve: Callable[[int], None]) -> bytes:
    reserve(max(ref.size, 1))
    if ref.key.startswith("missing"):
        raise BadInputError("fetch", "missing", "gone")
    return ref.key.encode()


def _decode(data: bytes) -> NDArray[np.uint8]:
    if data.startswith(b"corrupt"):
        raise BadInputError("decode", "corrupt", "damaged")
    return np.full((2, 2, 3), int(data.split(b"-")[1]) % 256, np.uint8)


def _predict(batch: NDArray[np.uint8]) -> Arrays:
    return (batch.astype(np.float32).mean(axis=(1, 2, 3)),)


def _finish(outputs: Arrays) -> tuple[Arrays, NDArray[np.bool_]]:
    return outputs, outputs[0] != 13.0


NETWORK = Network(_predict, _finish, streams=2, batch_size=4)
STAGES = Stages(
    fetch=_fetch,
    decode=_decode,  # type: ignore[arg-type]
    load=lambda: NETWORK,
    fetch_threads=3,
    compute_threads=2,
    decoded_images=12,
)


def _shares(partitions: Iterable[Sequence[ObjectRef]]) -> Iterator[Share]:
    return (Share(number, refs) for number, refs in enumerate(partitions))


def _with(**changes: Any) -> Stages:
    network = replace(NETWORK, **changes)
    return replace(STAGES, load=lambda: network)


kinds = st.lists(st.lists(st.sampled_from(["good", "missing", "corrupt"]), min_size=1, max_size=20), max_size=8)


@settings(max_examples=40, deadline=None)
@given(kinds)
def test_every_row_is_settled_once_whatever_fails(partitions: list[list[str]]) -> None:
    numbered: list[list[ObjectRef]] = []
    count = 0
    for kind_list in partitions:
        numbered.append([ObjectRef(f"{kind}-{count + i}", 1) for i, kind in enumerate(kind_list)])
        count += len(kind_list)
    meter = Meter()
    finished = {rows.partition: rows for rows in run_pipeline(_shares(numbered), STAGES, meter)}
    assert sorted(finished) == list(range(len(partitions)))
    for number, refs in enumerate(numbered):
        _check_rows(finished[number], refs)
    assert meter.objects == count
    assert meter.failures.total() == sum(len(rows.failures) for rows in finished.values())


def _check_rows(rows: PartitionRows, refs: Sequence[ObjectRef]) -> None:
    assert rows.refs == refs
    for row, ref in enumerate(refs):
        kind, number = ref.key.split("-")
        if kind != "good":
            assert rows.failures[row].code == kind
        elif int(number) % 256 == 13:
            assert (rows.failures[row].stage, rows.failures[row].code) == ("predict", "nonfinite")
        else:
            assert row not in rows.failures
            assert rows.kept is not None
            assert rows.kept[0][row] == int(number) % 256
    assert rows.predicted().tolist() == [row not in rows.failures for row in range(len(refs))]


def test_batches_are_full_across_partitions_and_the_last_ones_are_shared() -> None:
    lengths: list[int] = []

    def predict(batch: NDArray[np.uint8]) -> Arrays:
        lengths.append(len(batch))
        return _predict(batch)

    partitions = [[ObjectRef(f"good-{10 * p + i}", 1) for i in range(3)] for p in range(7)]
    list(run_pipeline(_shares(partitions), _with(predict=predict), Meter()))
    assert sorted(lengths, reverse=True) == [4, 4, 4, 4, 3, 2]  # the last 5 on two threads


@pytest.mark.parametrize("stage", ["fetch", "decode", "load", "predict", "finish"])
def test_any_other_error_stops_the_pipeline_and_reaches_the_caller(stage: str) -> None:
    def broken(*_: object) -> object:
        raise StoreError("the store is down")

    stages = replace(STAGES, **{stage: broken}) if stage in {"fetch", "decode", "load"} else _with(**{stage: broken})  # type: ignore[arg-type]
    refs = [ObjectRef(f"good-{i}", 1) for i in range(100)]
    with pytest.raises(StoreError, match="the store is down"):
        list(run_pipeline([Share(0, refs)], stages, Meter()))
    _wait_until(lambda: not _pipeline_threads())


def test_an_error_of_the_plan_reaches_the_caller() -> None:
    def shares() -> list[Share]:
        raise StoreError("the plan is gone")

    with pytest.raises(StoreError, match="the plan is gone"):
        list(run_pipeline((share for share in shares()), STAGES, Meter()))


def test_a_caller_that_leaves_stops_all_threads_at_once() -> None:
    refs = [[ObjectRef(f"good-{i}", 1)] for i in range(5000)]
    finished = run_pipeline(_shares(refs), STAGES, Meter())
    next(finished)
    started = time.monotonic()
    finished.close()
    assert time.monotonic() - started < 2
    _wait_until(lambda: not _pipeline_threads())


def test_bytes_between_fetch_and_decode_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "MAX_BYTES_IN_FLIGHT", 1000)
    lock = threading.Lock()
    in_flight = peak = 0

    def fetch(ref: ObjectRef, reserve: Callable[[int], None]) -> bytes:
        nonlocal in_flight, peak
        reserve(400)
        with lock:
            in_flight += 400
            peak = max(peak, in_flight)
        return ref.key.encode().ljust(400)

    def decode(data: bytes) -> NDArray[np.uint8]:
        nonlocal in_flight
        time.sleep(0.002)
        with lock:
            in_flight -= 400
        return _decode(data.strip())

    stages = replace(STAGES, fetch=fetch, decode=decode, fetch_threads=8)  # type: ignore[arg-type]
    refs = [ObjectRef(f"good-{i}") for i in range(60)]  # their size is not known before they are fetched
    list(run_pipeline([Share(0, refs)], stages, Meter()))
    assert peak <= 800


def test_one_object_larger_than_the_bound_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "MAX_BYTES_IN_FLIGHT", 10)
    refs = [ObjectRef(f"good-{i}", 400) for i in range(5)]
    (rows,) = run_pipeline([Share(0, refs)], STAGES, Meter())
    assert rows.is_finished


def test_fetching_and_decoding_begin_while_the_network_is_loaded() -> None:
    decoded = threading.Semaphore(0)

    def decode(data: bytes) -> NDArray[np.uint8]:
        decoded.release()
        return _decode(data)

    def load() -> Network:
        for _ in range(STAGES.decoded_images):
            assert decoded.acquire(timeout=10)
        return NETWORK

    refs = [ObjectRef(f"good-{i}", 1) for i in range(40)]
    stages = replace(STAGES, decode=decode, load=load)  # type: ignore[arg-type]
    assert sum(1 for _ in run_pipeline([Share(0, refs)], stages, Meter())) == 1


def _slow(batch: NDArray[np.uint8]) -> Arrays:
    time.sleep(0.02)
    return _predict(batch)


def test_the_meter_knows_where_the_time_went() -> None:
    meter = Meter()
    refs = [ObjectRef(f"good-{i}", 1) for i in range(40)]
    list(run_pipeline([Share(0, refs)], _with(predict=_slow), meter))
    assert meter.stage_seconds["predict"] >= 10 * 0.02
    assert meter.stage_seconds["predict"] > meter.stage_seconds["decode"]


def test_threads_that_wait_for_the_network_are_not_without_work() -> None:
    meter = Meter()
    refs = [ObjectRef(f"good-{i}", 1) for i in range(40)]
    stages = replace(_with(predict=_slow, streams=1), compute_threads=4)
    list(run_pipeline([Share(0, refs)], stages, meter))
    assert meter.stage_seconds["idle"] >= meter.waits["network"] > 3 * 0.02
    assert meter.looks and meter.decoded_seen > meter.looks
    assert bottleneck(meter.pace_seconds) == "predict"


def test_a_caller_that_is_slow_slows_the_pipeline_down() -> None:
    meter = Meter()
    partitions = [[ObjectRef(f"good-{20 * p + i}", 1) for i in range(20)] for p in range(500)]
    finished = run_pipeline(_shares(partitions), STAGES, meter)
    next(finished)
    time.sleep(0.5)
    settled = meter.objects
    time.sleep(0.3)
    assert meter.objects == settled
    assert settled <= 20 * (pipeline.OPEN_PARTITIONS + NETWORK.batch_size * NETWORK.streams + 1)
    assert 1 + len(list(finished)) == 500


def test_one_slow_object_does_not_let_partitions_pile_up() -> None:
    release = threading.Event()

    def fetch(ref: ObjectRef, reserve: Callable[[int], None]) -> bytes:
        if ref.key == "good-0":
            release.wait(10)
        return _fetch(ref, reserve)

    meter = Meter()
    partitions = [[ObjectRef(f"good-{2 * p + i}", 1) for i in range(2)] for p in range(500)]
    finished = run_pipeline(_shares(partitions), replace(STAGES, fetch=fetch), meter)
    collected = [next(finished) for _ in range(100)]
    release.set()
    collected += list(finished)
    assert sorted(rows.partition for rows in collected) == list(range(500))


def test_outputs_whose_shape_depends_on_the_image_are_an_error() -> None:
    def finish(outputs: Arrays) -> tuple[Arrays, NDArray[np.bool_]]:
        length = 1 if np.asarray(outputs[0], np.float32).max() < 4 else 2
        return (np.zeros((len(outputs[0]), length)),), np.ones(len(outputs[0]), np.bool_)

    refs = [ObjectRef(f"good-{i}", 1) for i in range(40)]
    with pytest.raises(ModelError, match="for one image"):
        list(run_pipeline([Share(0, refs)], _with(finish=finish), Meter()))


def test_rows_that_are_known_to_fail_are_not_touched() -> None:
    known = {0: Failure("decode", "native_crash", "it died"), 3: Failure("predict", "timeout", "it hung")}
    refs = [ObjectRef(f"touched-{i}" if i in known else f"good-{i}", 1) for i in range(4)]

    def fetch(ref: ObjectRef, reserve: Callable[[int], None]) -> bytes:
        assert not ref.key.startswith("touched")
        return _fetch(ref, reserve)

    (rows,) = run_pipeline([Share(7, refs, known)], replace(STAGES, fetch=fetch), Meter())
    assert (rows.partition, rows.failures) == (7, known)
    all_known = dict.fromkeys(range(4), known[0])
    (rows,) = run_pipeline([Share(8, refs, all_known)], replace(STAGES, fetch=fetch), Meter())
    assert rows.failures == all_known


def test_the_watch_knows_what_is_in_hand() -> None:
    lock = threading.Lock()
    in_hand: list[tuple[str, tuple[int, int]]] = []
    seen: list[tuple[str, tuple[int, int]]] = []

    @contextmanager
    def watch(stage: str, rows: Sequence[tuple[int, int]]) -> Iterator[None]:
        entries = [(stage, row) for row in rows]
        with lock:
            in_hand.extend(entries)
            seen.extend(entries)
        yield
        with lock:
            for entry in entries:
                in_hand.remove(entry)

    def decode(data: bytes) -> NDArray[np.uint8]:
        assert ("decode", (0, int(data.split(b"-")[1]))) in in_hand
        return _decode(data)

    refs = [ObjectRef(f"good-{i}", 1) for i in range(10)]
    list(run_pipeline([Share(0, refs)], replace(STAGES, decode=decode, watch=watch), Meter()))  # type: ignore[arg-type]
    assert not in_hand
    assert sorted(seen) == [(stage, (0, row)) for stage in ("decode", "predict") for row in range(10)]


@pytest.mark.parametrize("fits", [1, 3, 0])
def test_a_batch_without_memory_is_halved(fits: int) -> None:
    lengths: list[int] = []

    def predict(batch: NDArray[np.uint8]) -> Arrays:
        if len(batch) > fits:
            raise MemoryError("no memory")
        lengths.append(len(batch))
        return _predict(batch)

    meter = Meter()
    refs = [ObjectRef(f"good-{i}", 1) for i in range(13)]
    (rows,) = run_pipeline([Share(0, refs)], _with(predict=predict, streams=1), meter)
    assert sum(lengths) == (13 if fits else 0)
    assert {failure.code for failure in rows.failures.values()} == (set() if fits else {"oom"})
    # Once is enough: later batches are short from the start.
    assert meter.halved_batches == {1: 3, 3: 1, 0: 3}[fits]


def test_a_fixed_batch_without_memory_is_not_halved() -> None:
    """It would be padded to its length again."""

    def predict(batch: NDArray[np.uint8]) -> Arrays:
        if (batch == 2).all(axis=(1, 2, 3)).any():
            raise MemoryError("no memory")
        return _predict(batch)

    meter = Meter()
    refs = [ObjectRef(f"good-{i}", 1) for i in range(12)]
    (rows,) = run_pipeline([Share(0, refs)], _with(predict=predict, streams=1, is_fixed=True), meter)
    assert {failure.code for failure in rows.failures.values()} == {"oom"}
    assert len(rows.failures) == NETWORK.batch_size
    assert meter.halved_batches == 0


def test_a_partition_without_rows_is_finished_at_once() -> None:
    shares = [Share(number, []) for number in range(3 * pipeline.OPEN_PARTITIONS)]
    assert len(list(run_pipeline(shares, STAGES, Meter()))) == len(shares)


def test_decoding_without_memory_is_a_row() -> None:
    def decode(data: bytes) -> NDArray[np.uint8]:
        if data == b"good-2":
            raise MemoryError
        return _decode(data)

    refs = [ObjectRef(f"good-{i}", 1) for i in range(5)]
    (rows,) = run_pipeline([Share(0, refs)], replace(STAGES, decode=decode), Meter())  # type: ignore[arg-type]
    assert {row: (failure.stage, failure.code) for row, failure in rows.failures.items()} == {2: ("decode", "oom")}


def test_a_network_on_a_device_of_its_own_leaves_the_cores_to_decoding() -> None:
    """With one compute thread for decoding, predicting goes on beside it."""
    decoding = threading.Event()

    def decode(data: bytes) -> NDArray[np.uint8]:
        if data == b"good-9":
            decoding.wait(10)
        return _decode(data)

    def predict(batch: NDArray[np.uint8]) -> Arrays:
        decoding.set()
        return _predict(batch)

    stages = replace(_with(predict=predict, is_on_cores=False), decode=decode, compute_threads=1)  # type: ignore[arg-type]
    refs = [ObjectRef(f"good-{i}", 1) for i in range(10)]
    started = time.monotonic()
    list(run_pipeline([Share(0, refs)], stages, Meter()))
    assert time.monotonic() - started < 5


def _pipeline_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("fetch-", "compute-"))]


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
