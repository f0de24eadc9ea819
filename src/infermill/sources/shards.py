"""Shards: object refs into files that hold many inputs, one after the other.

    photos.rec · shards/*.tar · tar:s3://bucket/prefix/ · recordio:folder/ · cifar10:cifar-10-python.tar.gz?split=test

A shard is listed by reading what stands between its members: headers, labels, an index. The members have the shard's
etag, and the keys `shard#member`: the key of the `.idx` or the number of a record, the name of a file, a batch and a
row of CIFAR. Where a shard is damaged, a row `shard#@offset` stands for what is lost.
"""

import io
import os
import re
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, get_args

import pyarrow as pa
from obstore.exceptions import PreconditionError

from infermill.errors import SourceError, UsageError
from infermill.hosts import is_web
from infermill.reader import ObjectReader, open_file
from infermill.sources import cifar, recordio, tar
from infermill.sources.objects import LISTING_SCHEMA
from infermill.stores import (
    STORE_ERRORS,
    Location,
    etag_of,
    explain,
    is_nameable,
    locate,
    open_store,
    place_of,
)
from infermill.types import DAMAGED, ShardFormat, Source, Split, StoreOptions

if TYPE_CHECKING:
    from obstore.store import ObjectStore

ENDINGS: dict[str, ShardFormat] = {".rec": "recordio", ".tar": "tar"}
_COMPRESSED = (".tar.gz", ".tgz", ".rec.gz", ".tar.zst", ".tar.bz2", ".tar.xz")
_LABELS: dict[ShardFormat, pa.DataType] = {
    "recordio": pa.list_(pa.float32()),
    "tar": pa.string(),
    "cifar10": pa.int32(),
    "cifar100": pa.int32(),
}
_SCHEME = re.compile(rf"(?s)({'|'.join(get_args(ShardFormat))}):(?!//)(.+)")
_SPLIT = re.compile(r"(?s)(.*)\?split=(\w*)")
_ENDING = re.compile(r"(?i)\.rec\Z")
_BATCH_ROWS = 1_024
_INDEX_ROWS = 4_096
# Between headers that lie further apart, what is read beside them costs more than another request.
_NEAR_BYTES = 64 << 10
_STREAM_BUFFER_BYTES = 1 << 20
_SEEK_BUFFER_BYTES = 4_096
_FILE_BUFFER_BYTES = 256 << 10
THREADS = 16


@dataclass(frozen=True, slots=True)
class Shards:
    """Which shards a source names: `uri` leads to them, and `split` is that of CIFAR."""

    format: ShardFormat
    uri: str
    split: Split = "all"

    def among(self, found: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Those of some objects that are shards: of a folder of CIFAR, the batches of the split."""
        name = cifar.name_of(self.format)
        for batch in found:
            if name is None or cifar.is_archive(self.uri):
                yield batch
            else:
                yield batch.filter(
                    pa.array([cifar.is_batch(key, name, self.split) for key in batch["key"].to_pylist()])
                )


def shards_of(uri: str) -> Shards | None:
    """The shards that a source names, by a scheme or by what it ends in; None where it names objects.

    Raises:
        UsageError: they are compressed, or the split is none.

    Example:
        >>> shards_of("cifar10:cifar-10-python.tar.gz?split=test")
        Shards(format='cifar10', uri='cifar-10-python.tar.gz', split='test')
    """
    scheme = _SCHEME.fullmatch(uri)
    if scheme is None:
        if uri.lower().endswith(_COMPRESSED):
            raise _compressed(uri)
        ending = next((ending for ending in ENDINGS if uri.lower().endswith(ending)), None)
        return Shards(ENDINGS[ending], uri) if ending else None
    shards = Shards(scheme[1], scheme[2])  # type: ignore[arg-type]
    if cifar.name_of(shards.format) is None:
        if shards.uri.lower().endswith(_COMPRESSED):
            raise _compressed(uri)
        return shards
    query = _SPLIT.fullmatch(shards.uri)
    if query is None:
        return shards
    if query[2] not in get_args(Split):
        raise UsageError(f"{uri}: there is no split {query[2]!r}", f"write ?split= and {' or '.join(get_args(Split))}")
    return Shards(shards.format, query[1], query[2])  # type: ignore[arg-type]


def label_type(source: Source) -> pa.DataType | None:
    """The type of the column `label`; None where a source has no labels."""
    return _LABELS[source.shards] if source.shards else None


def list_members(
    source: Source,
    found: Iterable[pa.RecordBatch],
    suffixes: tuple[str, ...],
    options: StoreOptions,
    split: Split = "all",
) -> Iterator[pa.RecordBatch]:
    """The members of shards, in order, with the columns key, size, etag, offset and label.

    Args:
        source: with the format of its shards.
        found: the shards, as a listing of objects has them.
        suffixes: what the names of files in a tar end in.
        options: how stores are reached.
        split: of an archive of CIFAR.

    Raises:
        SourceError: a shard is not there, or is not of the format at all.
        StoreError: access is denied, or the store does not answer.

    Example:
        >>> shards = pa.record_batch({"key": ["a.tar"]})
        >>> members = list_members(Source("/photos", shards="tar"), [shards], (".jpg",), StoreOptions())
        >>> next(members)["key"].to_pylist()  # doctest: +SKIP
        ['a.tar#1.jpg', 'a.tar#2.jpg']
    """
    listing = _Listing(source, suffixes, options, split)
    keys = (key for batch in found for key in batch["key"].to_pylist())
    if source.is_local:
        return (batch for key in keys for part in listing.parts(key) for batch in part())
    return _at_once(part for key in keys for part in listing.parts(key))


def _at_once(parts: Iterator[Callable[[], Iterator[pa.RecordBatch]]]) -> Iterator[pa.RecordBatch]:
    """The batches of some parts that are read ahead, in order; of a single one, as they come."""
    head = list(islice(parts, 2))
    if len(head) == 1:
        yield from head[0]()
        return
    waiting: deque[Future[list[pa.RecordBatch]]] = deque()
    pool = ThreadPoolExecutor(THREADS, "list")
    try:
        for part in chain(head, parts):
            waiting.append(pool.submit(lambda part=part: list(part())))  # type: ignore[misc]
            if len(waiting) == THREADS:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class _Member(NamedTuple):
    """A member as its format's module finds it."""

    name: str
    offset: int
    size: int
    label: Any = None


class _Opened(NamedTuple):
    """A shard that is being read."""

    file: BinaryIO
    size: int
    etag: str | None


class _Listing:
    def __init__(self, source: Source, suffixes: tuple[str, ...], options: StoreOptions, split: Split) -> None:
        self._source = source
        self._suffixes = suffixes
        self._options = options
        self._split = split
        self._root = locate(source.root)
        self._opening = threading.Lock()
        self._schema = LISTING_SCHEMA.append(pa.field("offset", pa.int64())).append(
            pa.field("label", label_type(source) or pa.null())
        )

        @lru_cache(maxsize=64)
        def store_of(scheme: str, container: str) -> "ObjectStore":
            return open_store(Location(scheme, container, ""), options)

        self._store_of = store_of

    def parts(self, shard: str) -> Iterator[Callable[[], Iterator[pa.RecordBatch]]]:
        """What can be read at once to list a shard."""
        if "#" in shard or is_web(shard):
            raise SourceError(
                f"{shard} cannot be read as a shard: its name holds a #, or it is a URL",
                "rename it, or copy it to a store",
            )
        name = cifar.name_of(self._source.shards)
        if name is not None:
            yield partial(self._batches, shard, partial(_images, shard, name, self._split))
        elif self._source.shards == "tar":
            yield partial(self._batches, shard, partial(_files, self._suffixes))
        else:
            entries = self._index_of(shard)
            if entries is not None:
                while piece := sorted(islice(entries, _INDEX_ROWS), key=_offset):
                    buffer_bytes = _SEEK_BUFFER_BYTES if _are_apart(piece) else _STREAM_BUFFER_BYTES
                    yield partial(self._batches, shard, partial(_indexed_records, piece), buffer_bytes)
                return
            yield partial(self._batches, shard, _numbered_records)

    def _batches(
        self,
        shard: str,
        read: Callable[[BinaryIO, int], Iterator[_Member]],
        buffer_bytes: int = _STREAM_BUFFER_BYTES,
    ) -> Iterator[pa.RecordBatch]:
        with self._opened(shard, buffer_bytes) as (file, size, etag):
            members = read(file, size)
            while batch := list(islice(members, _BATCH_ROWS)):
                columns = [
                    pa.array([f"{shard}#{member.name}" for member in batch], pa.string()),
                    pa.array([member.size for member in batch], pa.int64()),
                    pa.array([etag] * len(batch), pa.string()),
                    pa.array([member.offset for member in batch], pa.int64()),
                    pa.array([member.label for member in batch], self._schema.field("label").type),
                ]
                yield pa.record_batch(columns, schema=self._schema)

    def _index_of(self, shard: str) -> Iterator[tuple[str, int]] | None:
        """The entries of the `.idx` beside a `.rec`; None where there is none."""
        index = f"{_ENDING.sub('', shard)}.idx"
        place = self._place(index)
        try:
            with self._open(place, index, _SEEK_BUFFER_BYTES):
                return self._entries(index, place.uri)
        except FileNotFoundError:
            return None
        except STORE_ERRORS as error:
            raise explain(error, place.uri) from None

    def _entries(self, index: str, uri: str) -> Iterator[tuple[str, int]]:
        with self._opened(index, _STREAM_BUFFER_BYTES) as (file, _, _):
            try:
                yield from recordio.index_entries(file)
            except recordio.DamagedError as error:
                raise SourceError(
                    f"{uri} is no index of records: {error}", "remove it; the records are then found without it"
                ) from None

    def _place(self, shard: str) -> Location:
        place = place_of(shard, self._source, self._root)
        if not place.is_local and not is_nameable(place.path):
            raise SourceError(f"no part of {place.uri} can be read: its name is none for a shard", "rename it")
        return place

    @contextmanager
    def _opened(self, key: str, buffer_bytes: int) -> Iterator[_Opened]:
        """A shard or an index, open for reading; what the store says of it, in the words of a user."""
        place = self._place(key)
        try:
            with self._open(place, key, buffer_bytes) as file:
                raw = file.raw
                if isinstance(raw, ObjectReader):
                    opened = _Opened(file, raw.size, raw.etag)
                else:
                    status = os.fstat(file.fileno())
                    if not stat.S_ISREG(status.st_mode):
                        raise SourceError(f"{place.uri} is not a file", "name files, or a folder with files")
                    opened = _Opened(file, status.st_size, etag_of(status))
                if self._source.shards in {"recordio", "tar"} and file.peek(2)[:2] == b"\x1f\x8b":
                    raise _compressed(place.uri)
                yield opened
        except PreconditionError:
            raise SourceError(f"{place.uri} was overwritten while it was read", "run the same command again") from None
        except recordio.DamagedError as error:
            raise SourceError(f"{place.uri}: {error}", "run the same command again") from None
        except STORE_ERRORS as error:
            raise explain(error, place.uri) from None

    def _open(self, place: Location, key: str, buffer_bytes: int) -> io.BufferedReader:
        if place.is_local:
            return io.BufferedReader(open_file(place.uri, key), _FILE_BUFFER_BYTES)
        with self._opening:
            store = self._store_of(place.scheme, place.container)
        return io.BufferedReader(ObjectReader(store, place, self._options), buffer_bytes)


def _offset(entry: tuple[str, int]) -> int:
    return entry[1]


def _are_apart(entries: list[tuple[str, int]]) -> bool:
    return entries[-1][1] - entries[0][1] > _NEAR_BYTES * len(entries)


def _indexed_records(entries: list[tuple[str, int]], file: BinaryIO, file_bytes: int) -> Iterator[_Member]:
    for key, offset in entries:
        try:
            record = recordio.record_at(file, offset, file_bytes)
        except recordio.DamagedError:
            yield _Member(key, DAMAGED, 0)
        else:
            yield _Member(key, record.offset, record.size, record.label)


def _numbered_records(file: BinaryIO, file_bytes: int) -> Iterator[_Member]:
    number = 0
    for found in recordio.records(file, file_bytes):
        if isinstance(found, recordio.Gap):
            yield _Member(f"@{found.offset}", DAMAGED, found.size)
        else:
            yield _Member(str(number), found.offset, found.size, found.label)
            number += 1


def _files(suffixes: tuple[str, ...], file: BinaryIO, file_bytes: int) -> Iterator[_Member]:
    for found in tar.files(file, file_bytes, suffixes):
        if isinstance(found, tar.Damage):
            yield _Member(f"@{found.offset}", DAMAGED, file_bytes - found.offset)
        else:
            yield _Member(*found)


def _images(shard: str, name: cifar.Name, split: Split, file: BinaryIO, _file_bytes: int) -> Iterator[_Member]:
    is_archive = cifar.is_archive(shard)
    begin, step = 0, cifar.IMAGE_BYTES
    if shard.endswith(".bin"):  # the images lie in the file itself, each behind its label
        step = cifar.record_bytes(name)
        begin = step - cifar.IMAGE_BYTES
    try:
        for batch in cifar.batches(file, shard, name, split):
            folder = f"{batch.name}/" if is_archive else ""
            for row, label in enumerate(batch.labels.tolist()):
                yield _Member(f"{folder}{row:04d}", begin + row * step, cifar.IMAGE_BYTES, label)
    except cifar.DamagedError as error:
        raise SourceError(
            f"{shard} cannot be read as {name}: {error}", "download it again from https://www.cs.toronto.edu/~kriz/"
        ) from None


def _compressed(uri: str) -> UsageError:
    return UsageError(
        f"{uri} is compressed: no part of it can be read without all that comes before",
        "unpack it to .tar or .rec; images are compressed already, so it grows little",
    )
