import tracemalloc
from collections.abc import Iterator

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from infermill import plan
from infermill.errors import StoreError
from infermill.plan import (
    PARTITIONS_PER_FILE,
    REVISION_SCHEMA,
    PlanInfo,
    Revision,
    cut,
    known_bytes,
    partition_reader,
    write_plan,
)
from infermill.sources.objects import LISTING_SCHEMA
from infermill.types import ObjectRef


def batches_of(sizes: list[list[int]]) -> Iterator[pa.RecordBatch]:
    """A listing: keys count up, `sizes` are those of the objects of each batch."""
    number = 0
    for batch in sizes:
        keys = [f"{number + row}.jpg" for row in range(len(batch))]
        number += len(batch)
        yield pa.record_batch(
            [pa.array(keys, pa.string()), pa.array(batch, pa.int64()), pa.nulls(len(batch), pa.string())],
            schema=LISTING_SCHEMA,
        )


def keys_of(partitions: list[pa.Table]) -> list[str]:
    return [key for table in partitions for key in table["key"].to_pylist()]


LISTINGS = st.lists(st.lists(st.integers(-1, 100), max_size=30), max_size=12)


@settings(max_examples=300, deadline=None)
@given(
    sizes=LISTINGS,
    max_objects=st.integers(1, 20),
    max_bytes=st.integers(1, 400),
    limit=st.none() | st.integers(0, 100),
    double_every=st.integers(1, 5),
)
@example(sizes=[[50, 500, 50]], max_objects=9, max_bytes=100, limit=None, double_every=1000)
@example(sizes=[[100], [], [1]], max_objects=9, max_bytes=100, limit=None, double_every=1000)
def test_every_object_is_in_one_partition_in_order_and_no_partition_is_too_large(
    sizes: list[list[int]], max_objects: int, max_bytes: int, limit: int | None, double_every: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "DOUBLE_EVERY", double_every)
        partitions = list(cut(batches_of(sizes), max_objects, max_bytes, limit))
    known = [size for batch in sizes for size in batch][:limit]
    assert keys_of(partitions) == [f"{number}.jpg" for number in range(len(known))]
    assert [size for table in partitions for size in table["size"].to_pylist()] == known
    for number, table in enumerate(partitions):
        growth = 2 ** (number // double_every)
        assert 1 <= table.num_rows <= max_objects * growth
        assert known_bytes(table) <= max_bytes * growth or table.num_rows == 1
        # As large as may be: what comes next would not have fitted.
        if number + 1 < len(partitions):
            following = max(partitions[number + 1]["size"][0].as_py(), 0)
            assert table.num_rows == max_objects * growth or known_bytes(table) + following > max_bytes * growth


def test_a_partition_does_not_depend_on_how_the_listing_was_batched() -> None:
    sizes = [number * 7 % 13 for number in range(500)]
    whole = [table.to_pylist() for table in cut(batches_of([sizes]), 10, 40, None)]
    pieces = [table.to_pylist() for table in cut(batches_of([[size] for size in sizes]), 10, 40, None)]
    assert whole == pieces


def test_a_limit_stops_the_listing() -> None:
    def endless() -> Iterator[pa.RecordBatch]:
        while True:
            yield from batches_of([[1] * 10])

    assert sum(table.num_rows for table in cut(endless(), 7, 1000, 25)) == 25


def write(partitions: list[pa.Table]) -> tuple[plan.PlanInfo, dict[str, bytes]]:
    files: dict[str, bytes] = {}
    return write_plan(partitions, "abc", files.__setitem__), files


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.lists(
            st.builds(
                ObjectRef,
                st.text(st.characters(codec="utf-8"), max_size=20),
                st.integers(-1, 2**62),
                st.none() | st.text(st.characters(codec="utf-8"), max_size=5),
            ),
            min_size=1,
            max_size=5,
        ),
        max_size=2 * PARTITIONS_PER_FILE + 3,
    )
)
def test_a_plan_round_trips(partitions: list[list[ObjectRef]]) -> None:
    tables = [
        pa.Table.from_pylist([{"key": r.key, "size": r.size, "etag": r.etag} for r in refs], schema=LISTING_SCHEMA)
        for refs in partitions
    ]
    info, files = write(tables)
    assert info.partitions == len(partitions)
    assert info.objects == sum(len(refs) for refs in partitions)
    refs = partition_reader([info], files.__getitem__)
    assert [refs(number) for number in range(info.partitions)] == partitions


def test_a_plan_of_several_files() -> None:
    count = 2 * PARTITIONS_PER_FILE + 1
    tables = list(cut(batches_of([[3] * (2 * count - 1)]), 2, 1000, None))
    info, files = write(tables)
    assert (info.partitions, info.objects, info.size_bytes) == (count, 2 * count - 1, 3 * (2 * count - 1))
    assert sorted(files) == ["abc-00000.parquet", "abc-00001.parquet", "abc-00002.parquet"]
    reads: list[str] = []

    def read(name: str) -> bytes:
        reads.append(name)
        return files[name]

    refs = partition_reader([info], read)
    found = [ref.key for number in range(count) for ref in refs(number)]
    assert found == [f"{number}.jpg" for number in range(2 * count - 1)]
    assert reads == sorted(files)
    assert [ref.key for ref in refs(1)] == ["2.jpg", "3.jpg"]


@pytest.mark.parametrize("damage", [b"", b"not Parquet", b"PAR1" * 10])
def test_a_damaged_plan_is_told(damage: bytes) -> None:
    info = PlanInfo("abc", 2 * PARTITIONS_PER_FILE, 0, 0, "")
    with pytest.raises(StoreError, match=r"plan file abc-00001\.parquet is damaged"):
        partition_reader([info], lambda name: damage)(PARTITIONS_PER_FILE)


def test_a_plan_of_exactly_one_file_has_no_second_one() -> None:
    _, files = write(list(cut(batches_of([[1] * PARTITIONS_PER_FILE]), 1, 10, None)))
    assert list(files) == ["abc-00000.parquet"]


def test_an_appended_plan_numbers_its_partitions_on() -> None:
    first, files = write(list(cut(batches_of([[1] * 5]), 2, 10, None)))
    tables = list(cut(batches_of([[1] * 130]), 2, 10, None, first=first.end))
    appended = write_plan(tables, "def", files.__setitem__, first.end)
    assert (appended.first, appended.end) == (3, 3 + 65)
    assert [name for name, _ in appended.files] == ["def-00000.parquet", "def-00001.parquet"]
    assert [numbers for _, numbers in appended.files] == [range(3, 67), range(67, 68)]
    refs = partition_reader([first, appended], files.__getitem__)
    assert [ref.key for ref in refs(2)] == ["4.jpg"]
    assert [ref.key for ref in refs(3)] == ["0.jpg", "1.jpg"]
    assert [ref.key for ref in refs(67)] == ["128.jpg", "129.jpg"]


def test_appended_partitions_grow_with_the_number_of_those_before() -> None:
    partitions = list(cut(batches_of([[1] * 8]), 2, 10, None, first=plan.DOUBLE_EVERY))
    assert [table.num_rows for table in partitions] == [4, 4]


def test_a_revision_round_trips() -> None:
    def rows(*numbers: int) -> pa.Table:
        columns = [numbers, [f"{n}.jpg" for n in numbers], [n - 1 for n in numbers], [None] * len(numbers)]
        return pa.table([pa.array(column) for column in columns], names=REVISION_SCHEMA.names).cast(REVISION_SCHEMA)

    revision = Revision(Revision.write([(7, rows(1, 5)), (2, rows(0))]))
    assert (revision.partitions, revision.objects) == ([7, 2], 3)
    assert 7 in revision
    assert 0 not in revision
    assert revision.rows(7) == [1, 5]
    assert revision.refs(7) == [ObjectRef("1.jpg", 0), ObjectRef("5.jpg", 4)]
    assert revision.refs(2) == [ObjectRef("0.jpg", -1)]
    nothing = Revision(Revision.write([]))
    assert (nothing.partitions, nothing.objects) == ([], 0)


def test_the_digest_of_a_plan_follows_its_content() -> None:
    first, _ = write(list(cut(batches_of([[1, 2, 3]]), 2, 10, None)))
    again, _ = write(list(cut(batches_of([[1, 2, 3]]), 2, 10, None)))
    other, _ = write(list(cut(batches_of([[1, 2, 4]]), 2, 10, None)))
    assert first == again
    assert first.sha256 != other.sha256


def test_an_empty_listing_makes_an_empty_plan() -> None:
    info, files = write(list(cut(batches_of([[], []]), 2, 10, None)))
    assert (info.partitions, info.objects, files) == (0, 0, {})


def peak_bytes(objects: int) -> int:
    """The most memory that a plan of so many objects takes, in Python and in Arrow."""
    peak = 0
    before = pa.total_allocated_bytes()

    def listing() -> Iterator[pa.RecordBatch]:
        nonlocal peak
        for batch in batches_of([[100_000] * 1000] * (objects // 1000)):
            peak = max(peak, pa.total_allocated_bytes() - before)
            yield batch

    tracemalloc.start()
    try:
        info = write_plan(cut(listing(), 512, 64 << 20, None), "abc", lambda name, content: None)
        python_peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert info.objects == objects
    return peak + python_peak


def test_memory_does_not_grow_with_the_listing() -> None:
    assert peak_bytes(400_000) < 1.3 * peak_bytes(100_000)


def test_a_revision_leaves_out_partitions_whose_rows_are_superseded_already() -> None:
    row = pa.Table.from_pylist([{"row": 3, "key": "a", "size": 1, "etag": None}], REVISION_SCHEMA)
    revision = Revision(Revision.write([(7, row.slice(0, 0)), (8, row)]))
    assert (revision.partitions, revision.objects) == ([8], 1)
