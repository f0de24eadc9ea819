"""Object refs -> numbered partitions, as immutable Parquet files with one row group a partition."""

import hashlib
import json
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infermill.errors import StoreError
from infermill.types import ObjectRef

PARTITIONS_PER_FILE = 64
# Partitions double in size every 1,000, so that 10,000 of them hold half a billion objects, without
# knowing the length of the listing in advance.
DOUBLE_EVERY = 1_000
REVISION_SCHEMA = pa.schema([("row", pa.int64()), ("key", pa.string()), ("size", pa.int64()), ("etag", pa.string())])
_REVISED_KEY = b"infermill.partitions"


@dataclass(frozen=True, slots=True)
class PlanInfo:
    """The figures of a plan. `sha256` is over its files; `size_bytes` counts the objects whose size is known."""

    plan_id: str
    partitions: int
    objects: int
    size_bytes: int
    sha256: str
    first: int = 0
    "The number of its first partition."

    @property
    def end(self) -> int:
        """The number after that of its last partition."""
        return self.first + self.partitions

    @property
    def files(self) -> list[tuple[str, range]]:
        """Its files, in order, and which partitions are in each."""
        starts = range(self.first, self.end, PARTITIONS_PER_FILE)
        return [
            (_file_name(self.plan_id, start - self.first), range(start, min(start + PARTITIONS_PER_FILE, self.end)))
            for start in starts
        ]


def cut(
    batches: Iterable[pa.RecordBatch], max_objects: int, max_bytes: int, limit: int | None, first: int = 0
) -> Iterator[pa.Table]:
    """Cut a listing into partitions; memory is that of one partition and one batch.

    Args:
        batches: the columns key, size (-1: unknown) and etag; others go with them.
        max_objects: objects of a partition, at most; doubled every 1,000 partitions.
        max_bytes: bytes of a partition, at most (one larger object is a partition by itself); doubled likewise.
        limit: take only the first objects.
        first: the number of the first partition.

    Example:
        >>> refs = pa.record_batch({"key": ["a", "b", "c"], "size": [1, 1, 1], "etag": ["", "", ""]})
        >>> [table.num_rows for table in cut([refs], 2, 1000, None)]
        [2, 1]
    """
    number = first
    pending = pa.table({})
    for batch in _first(batches, limit):
        pending = pa.concat_tables([pending, pa.Table.from_batches([batch])]) if pending.num_rows else pa.table(batch)
        while True:
            growth = 1 << min(number // DOUBLE_EVERY, 40)
            end = _end_of_partition(pending, max_objects * growth, max_bytes * growth)
            if end is None:
                break
            yield pending.slice(0, end).combine_chunks()
            pending = pending.slice(end)
            number += 1
    if pending.num_rows:
        yield pending.combine_chunks()


def _first(batches: Iterable[pa.RecordBatch], limit: int | None) -> Iterator[pa.RecordBatch]:
    left = limit
    for batch in batches:
        if left is not None:
            batch = batch.slice(0, left)  # noqa: PLW2901
            left -= batch.num_rows
        if batch.num_rows:
            yield batch
        if left == 0:
            return


def _end_of_partition(refs: pa.Table, max_objects: int, max_bytes: int) -> int | None:
    """Where the first partition of `refs` ends, or None while the listing may still add to it."""
    head = refs.slice(0, max_objects + 1)
    sizes = np.maximum(head["size"].to_numpy(), 0)
    fitting = int(np.searchsorted(np.cumsum(sizes), max_bytes, side="right"))
    end = min(max(fitting, 1), max_objects)
    return end if end < refs.num_rows else None


def write_plan(
    partitions: Iterable[pa.Table], plan_id: str, create: Callable[[str, bytes], object], first: int = 0
) -> PlanInfo:
    """Number the partitions and create the files of the plan.

    Args:
        partitions: tables with the columns key, size and etag, as `cut` makes them.
        plan_id: names the plan, so that two drivers that plan at once do not mix.
        create: called with the name and the content of each file.
        first: the number of the first partition.
    """
    digest = hashlib.sha256()
    count = objects = size_bytes = 0
    sink = pa.BufferOutputStream()
    writer: pq.ParquetWriter | None = None
    for table in partitions:
        if writer is None:
            writer = pq.ParquetWriter(sink, table.schema, compression="zstd", write_statistics=False)
        writer.write_table(table, row_group_size=table.num_rows)
        count += 1
        objects += table.num_rows
        size_bytes += known_bytes(table)
        if count % PARTITIONS_PER_FILE == 0:
            _finish(writer, sink, _file_name(plan_id, count - 1), digest.update, create)
            writer, sink = None, pa.BufferOutputStream()
    if writer is not None:
        _finish(writer, sink, _file_name(plan_id, count - 1), digest.update, create)
    return PlanInfo(plan_id, count, objects, size_bytes, digest.hexdigest(), first)


def known_bytes(refs: pa.Table) -> int:
    """The bytes of the objects whose size is known."""
    return int(np.maximum(refs["size"].to_numpy(), 0).sum())


def _finish(
    writer: pq.ParquetWriter,
    sink: pa.BufferOutputStream,
    name: str,
    update: Callable[[bytes], None],
    create: Callable[[str, bytes], object],
) -> None:
    writer.close()
    content = sink.getvalue().to_pybytes()
    update(content)
    create(name, content)


def _file_name(plan_id: str, place: int) -> str:
    """The file of the partition at `place`, counted from the plan's first."""
    return f"{plan_id}-{place // PARTITIONS_PER_FILE:05d}.parquet"


def partition_reader(plans: Sequence[PlanInfo], read: Callable[[str], bytes]) -> Callable[[int], list[ObjectRef]]:
    """A function from a partition's number to its refs; it keeps the plan file that it read last.

    Args:
        plans: of one job, in the order of their partitions.
        read: the content of a plan file by its name.
    """
    firsts = [plan.first for plan in plans]

    @lru_cache(maxsize=1)
    def open_file(name: str) -> pq.ParquetFile:
        return pq.ParquetFile(pa.BufferReader(read(name)))

    def refs(partition: int) -> list[ObjectRef]:
        plan = plans[bisect(firsts, partition) - 1]
        place = partition - plan.first
        name = _file_name(plan.plan_id, place)
        try:
            table = open_file(name).read_row_group(place % PARTITIONS_PER_FILE, use_threads=False)
        except (pa.ArrowException, OSError, IndexError) as error:
            raise StoreError(f"the plan file {name} is damaged: {error}", "start anew with --overwrite") from None
        return refs_of(table)

    return refs


def refs_of(table: pa.Table) -> list[ObjectRef]:
    """The refs in the rows of a listing, a plan or a revision."""
    names = [name for name in ("key", "size", "etag", "offset", "label") if name in table.column_names]
    return [ObjectRef(*row) for row in zip(*(table[name].to_pylist() for name in names), strict=True)]


class Revision:
    """Rows of parts that are to be superseded, and the refs that they are predicted from.

    The file is like one of a plan: a row group a partition, here with the number of each row in its part.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._metadata = pq.read_metadata(pa.BufferReader(content))
        numbers: list[int] = json.loads(self._metadata.metadata[_REVISED_KEY])
        self._groups = {number: group for group, number in enumerate(numbers)}

    @staticmethod
    def write(revised: Iterable[tuple[int, pa.Table]]) -> bytes:
        """The content for partitions and their rows: REVISION_SCHEMA, and where they lie in shards, where and what."""
        numbers: list[int] = []
        sink = pa.BufferOutputStream()
        tables = ((number, table) for number, table in revised if table.num_rows)  # or another driver was faster
        first = next(tables, None)
        schema = REVISION_SCHEMA if first is None else first[1].schema
        with pq.ParquetWriter(sink, schema, compression="zstd", write_statistics=False) as writer:
            for number, table in chain([first] if first else [], tables):
                writer.write_table(table, row_group_size=table.num_rows)
                numbers.append(number)
            writer.add_key_value_metadata({_REVISED_KEY.decode(): json.dumps(numbers)})
        content: bytes = sink.getvalue().to_pybytes()
        return content

    @property
    def partitions(self) -> list[int]:
        return list(self._groups)

    @property
    def objects(self) -> int:
        return int(self._metadata.num_rows)

    def __contains__(self, partition: int) -> bool:
        return partition in self._groups

    def refs(self, partition: int) -> list[ObjectRef]:
        """What to predict of a partition."""
        return refs_of(self._read(partition))

    def rows(self, partition: int) -> list[int]:
        """The rows of the part that these refs stand for, ascending."""
        rows: list[int] = self._read(partition, ["row"])["row"].to_pylist()
        return rows

    def _read(self, partition: int, columns: list[str] | None = None) -> pa.Table:
        # Opened anew each time: many threads ask.
        file = pq.ParquetFile(pa.BufferReader(self._content), metadata=self._metadata)
        return file.read_row_group(self._groups[partition], columns, use_threads=False)
