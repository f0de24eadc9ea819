"""The rows of a job, as Arrow."""

import os
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from infermill.errors import UsageError
from infermill.output import Output, damaged
from infermill.types import StoreOptions


def read(output: str | os.PathLike[str], options: StoreOptions | None = None) -> pa.Table:
    """All rows of a job as one Arrow table, in the order of the plan.

    Returns:
        key, etag, size, the prediction column of the task (`top`, `detections`, `embedding` or `outputs`) and `error`;
        before the prediction a column `label` where the source has labels: of RecordIO (list of float32), tar
        (string) and CIFAR (int32).

    Raises:
        UsageError: no part is there.
        StoreError: access is denied, the store does not answer, or a part is damaged.

    Example:
        >>> read("out/").column_names  # doctest: +SKIP
        ['key', 'etag', 'size', 'top', 'error']
    """
    return pa.concat_tables(_tables(output, options))


def read_batches(output: str | os.PathLike[str], options: StoreOptions | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of a job as Arrow batches, one part in memory at a time; else like `read`."""
    for table in _tables(output, options):
        yield from table.to_batches()


def _tables(output: str | os.PathLike[str], options: StoreOptions | None) -> Iterator[pa.Table]:
    place = Output(os.fspath(output), options or StoreOptions())
    empty = True
    for table in tables(place):
        empty = False
        yield table
    if empty:
        raise UsageError(f"{place.uri} holds no part-*.parquet", "name the folder that `infermill run -o` wrote")


def tables(place: Output) -> Iterator[pa.Table]:
    """The rows, part by part in the order of the plan."""
    for _, name in sorted(place.parts().items()):
        content = place.read(name)
        if content is not None:
            # Not `pq.read_table`: its threads may hold `content` until after the interpreter has ended, and abort.
            try:
                part = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
            except (pa.ArrowException, OSError) as error:
                raise damaged(f"{place.uri}/{name}", error) from None
            yield part.replace_schema_metadata(None)
