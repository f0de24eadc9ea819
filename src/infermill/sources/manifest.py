"""Manifests: object refs from a list that somebody else made."""

import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from infermill.errors import SourceError
from infermill.sources.objects import BATCH_ROWS, LISTING_SCHEMA
from infermill.stores import STORE_ERRORS, Location, explain, open_reader
from infermill.types import Source, StoreOptions

KEY_COLUMNS = ("uri", "url", "key", "path")


def from_stdin() -> tuple[Source, Iterator[pa.RecordBatch]]:
    """One URI or path a line on standard input; relative paths hang below the current folder."""
    return Source(str(Path.cwd()), keys_are_uris=True), _lines(sys.stdin.buffer, "standard input")


def from_file(location: Location, options: StoreOptions) -> tuple[Source, Iterator[pa.RecordBatch]]:
    """A text manifest, or a Parquet one with a column `uri` (or url, key, path) and maybe `size` and `etag`."""
    source = Source(str(Path.cwd()), keys_are_uris=True)
    try:
        reader = open_reader(location, options)
    except STORE_ERRORS as error:
        raise explain(error, location.uri) from None
    if location.path.lower().endswith(".parquet"):
        return source, _rows(reader, location.uri)
    return source, _lines(reader, location.uri)


def _lines(lines: Iterable[bytes], where: str) -> Iterator[pa.RecordBatch]:
    keys = (line.rstrip(b"\r\n") for line in lines)
    filled = (key for key in keys if key)
    while batch := list(islice(filled, BATCH_ROWS)):
        try:
            names = pa.array([key.decode() for key in batch], pa.string())
        except UnicodeDecodeError as error:
            raise SourceError(f"{where} is not UTF-8: {error}", "write the manifest as UTF-8, one URI a line") from None
        unknown = len(batch)
        yield pa.record_batch(
            [names, pa.array([-1] * unknown, pa.int64()), pa.nulls(unknown, pa.string())], schema=LISTING_SCHEMA
        )


def _rows(reader: BinaryIO, where: str) -> Iterator[pa.RecordBatch]:
    try:
        file = pq.ParquetFile(reader)
    except pa.ArrowInvalid as error:
        raise SourceError(f"{where} is not a Parquet file: {error}", "a text manifest must end in .txt") from None
    names = file.schema_arrow.names
    key = next((name for name in KEY_COLUMNS if name in names), None)
    if key is None:
        raise SourceError(
            f"{where} has none of the columns {', '.join(KEY_COLUMNS)}", f"its columns are {', '.join(names)}"
        )
    wanted = [key, *(name for name in ("size", "etag") if name in names)]
    for batch in file.iter_batches(BATCH_ROWS, columns=wanted):
        keys = batch[key].cast(pa.string())
        if keys.null_count:
            raise SourceError(f"{where} has rows without a {key}", "every row must name an object")
        size = batch["size"].cast(pa.int64()) if "size" in wanted else pa.array([-1] * len(keys), pa.int64())
        etag = batch["etag"].cast(pa.string()) if "etag" in wanted else pa.nulls(len(keys), pa.string())
        yield pa.record_batch([keys, size.fill_null(-1), etag], schema=LISTING_SCHEMA)
