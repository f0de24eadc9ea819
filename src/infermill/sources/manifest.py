"""Manifests: object refs from a list that somebody else made."""

import codecs
import hashlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infermill.errors import SourceError, UsageError
from infermill.hosts import AllowList, check_urls, is_web
from infermill.reader import open_reader
from infermill.sources.objects import BATCH_ROWS, LISTING_SCHEMA
from infermill.stores import STORE_ERRORS, Location, explain, locate, open_store
from infermill.types import Source, StoreOptions

KEY_COLUMNS = ("uri", "url", "key", "path")


def from_file(location: Location, options: StoreOptions) -> tuple[Source, Iterator[pa.RecordBatch]]:
    """A text manifest, or a Parquet one with a column `uri` (or url, key, path) and maybe `size` and `etag`.

    Relative paths in it hang below the current folder.
    """
    allowed = AllowList(options.allow_host)
    batches = _checked(_batches(location, options), location.uri)
    return Source(str(Path.cwd()), keys_are_uris=True), _permitted(batches, allowed, location.uri)


def digest(location: Location, options: StoreOptions) -> str:
    """The sha256 of a manifest's content, in hex."""
    try:
        with open_reader(location, open_store(location, options), options) as reader:
            return hashlib.file_digest(reader, "sha256").hexdigest()
    except STORE_ERRORS as error:
        raise explain(error, location.uri) from None


def _batches(location: Location, options: StoreOptions) -> Generator[pa.RecordBatch]:
    with open_reader(location, open_store(location, options), options) as reader:
        if location.path.lower().endswith(".parquet"):
            yield from _rows(reader, location.uri)
        else:
            yield from _lines(reader)


def _checked(batches: Generator[pa.RecordBatch], where: str) -> Iterator[pa.RecordBatch]:
    """The same batches: what cannot be read or understood is told with the manifest's name, before the job starts."""
    try:
        with closing(batches):
            for batch in batches:
                for root in pc.unique(pc.extract_regex(batch["key"], r"(?s)^(?P<root>[^/]*://[^/]*)").field("root")):
                    if root.is_valid and not is_web(root.as_py()):
                        locate(f"{root.as_py()}/")
                yield batch
    except UnicodeDecodeError as error:
        raise SourceError(f"{where} is not UTF-8: {error}", "write the manifest as UTF-8, one URI a line") from None
    except UsageError as error:
        raise SourceError(f"{where}: {error.message}", error.hint) from None
    except pa.ArrowException as error:
        raise SourceError(f"{where} cannot be read: {error}", "a text manifest must end in .txt") from None
    except STORE_ERRORS as error:
        raise explain(error, where) from None


def _permitted(batches: Iterable[pa.RecordBatch], allowed: AllowList, where: str) -> Iterator[pa.RecordBatch]:
    """The same batches, if their URLs may be fetched and written to the plan."""
    for batch in batches:
        check_urls(batch["key"], allowed, where)
        yield batch


def _lines(lines: Iterable[bytes]) -> Generator[pa.RecordBatch]:
    keys = (line.rstrip(b"\r\n") for line in _without_mark(lines))
    filled = (key for key in keys if key)
    while batch := list(islice(filled, BATCH_ROWS)):
        unknown = len(batch)
        names = pa.array([key.decode() for key in batch], pa.string())
        yield pa.record_batch(
            [names, pa.array([-1] * unknown, pa.int64()), pa.nulls(unknown, pa.string())], schema=LISTING_SCHEMA
        )


def _without_mark(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines without the byte order mark that Windows programs begin a file with."""
    for number, line in enumerate(lines):
        yield line.removeprefix(codecs.BOM_UTF8) if number == 0 else line


def _rows(reader: BinaryIO, where: str) -> Iterator[pa.RecordBatch]:
    file = pq.ParquetFile(reader)
    names = file.schema_arrow.names
    key = next((name for name in KEY_COLUMNS if name in names), None)
    if key is None:
        raise SourceError(
            f"{where} has none of the columns {', '.join(KEY_COLUMNS)}", f"its columns are {', '.join(names)}"
        )
    wanted = [key, *(name for name in ("size", "etag") if name in names)]
    for batch in file.iter_batches(BATCH_ROWS, columns=wanted, use_threads=False):
        keys = batch[key].cast(pa.string())
        if keys.null_count:
            raise SourceError(f"{where} has rows without a {key}", "every row must name an object")
        size = batch["size"].cast(pa.int64()) if "size" in wanted else pa.array([-1] * len(keys), pa.int64())
        etag = batch["etag"].cast(pa.string()) if "etag" in wanted else pa.nulls(len(keys), pa.string())
        yield pa.record_batch([keys, size.fill_null(-1), etag], schema=LISTING_SCHEMA)
