"""Refs -> bytes, and what a store's answer means for the one input that it is about."""

import errno
import os
import stat
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from obstore import Bytes
from obstore.exceptions import PreconditionError

from infermill.errors import BadInputError, StoreError, UsageError
from infermill.hosts import is_web
from infermill.patience import is_passing, patiently
from infermill.reader import open_file
from infermill.stores import (
    NO_BUCKET,
    STORE_ERRORS,
    Location,
    boto3_errors,
    error_code,
    etag_of,
    explain,
    is_nameable,
    locate,
    open_s3_client,
    open_store,
    place_of,
)
from infermill.types import ObjectRef, Source, StoreOptions
from infermill.web import web_fetcher

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer
    from obstore import GetOptions
    from obstore.store import ObjectStore

Reserve = Callable[[int], None]
_Content = bytes | Bytes
MAX_OBJECT_BYTES = 1 << 30
DENIED_AT_FIRST = 64
"Where no object could be read, so many may be denied before the credentials are at fault."
WITNESS_SECONDS = 10.0
_ARCHIVED = {"InvalidObjectState", "BlobArchived"}  # S3's word, and Azure's
# Of the machine or a network file system, and not of one file.
_FAULTS = {
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.ENODEV,
    errno.EHOSTDOWN,
}


class Fetch(Protocol):
    """A ref -> its bytes; `reserve` is called with their number before they are read, and may block."""

    def __call__(self, ref: ObjectRef, reserve: Reserve = ..., /) -> "ReadableBuffer": ...


def fetcher(source: Source, options: StoreOptions) -> Fetch:
    """A function that fetches objects; it blocks without the GIL, and is called from many threads at once.

    A ref with an offset is that range of the object; no more than there is of it comes.

    It raises BadInputError where the object is missing, changed since it was listed, unreadable, or fails while
    others are read, and StoreError where the store is at fault.
    """

    opening = threading.Lock()

    @lru_cache(maxsize=64)
    def bucket_of(scheme: str, container: str) -> _Bucket:
        return _Bucket(Location(scheme, container, ""), options)

    root = locate(source.root)
    folder = None if source.keys_are_uris else Path(root.uri)
    fetch_url = web_fetcher(options, MAX_OBJECT_BYTES)

    def fetch(ref: ObjectRef, reserve: Reserve = lambda _: None, /) -> "ReadableBuffer":
        if source.keys_are_uris and is_web(ref.key):
            return fetch_url(ref.key, ref.etag, reserve)
        place = place_of(ref.key, source, root)
        if place.is_local:
            return _read_file(place.uri, ref, reserve, folder)
        with opening:
            bucket = bucket_of(place.scheme, place.container)
        return bucket.get(place, ref, reserve)

    return fetch


def fetch_uri(
    fetch: "Callable[[ObjectRef, Reserve], ReadableBuffer]", uri: str, reserve: Reserve = lambda _: None
) -> "ReadableBuffer":
    """What a URI names that nobody has looked at before; `fetch` is that of a source whose keys are URIs.

    Raises:
        BadInputError: as `fetcher`, and where its scheme is not read, or its host not allowed.
        StoreError: as `fetcher`.
    """
    try:
        if not is_web(uri):
            locate(uri)
        return fetch(ObjectRef(uri), reserve)
    except UsageError as error:
        raise BadInputError("fetch", "unreadable", error.message) from None


class _Bucket:
    """A bucket as one worker knows it: how it is reached, and witnesses that it answers, the objects read last."""

    def __init__(self, container: Location, options: StoreOptions) -> None:
        self._options = options
        self._opening = threading.Lock()
        self._open_store = lru_cache(maxsize=2)(
            lambda seconds: open_store(container, replace(options, store_deadline=seconds))
        )
        self._open_client = lru_cache(maxsize=1)(partial(open_s3_client, container, options))
        self._witnesses: tuple[str, ...] = ()
        self._denied = 0

    def get(self, place: Location, ref: ObjectRef, reserve: Reserve) -> _Content:
        """All that the store announced; a body that breaks off, or comes short, is asked for again."""
        open_object = self._opener(place, ref)
        try:
            with closing(patiently(open_object, place.uri, self._options)) as first:
                # This may wait for a slow network, which no deadline includes.
                admit(first.size_bytes, reserve)
                content = patiently(_reader(first, open_object), place.uri, self._options)
        except STORE_ERRORS as error:
            raise self._judge(error, place) from None
        if len(content) and is_nameable(place.path) and place.path not in self._witnesses[:1]:
            self._witnesses = (place.path, *self._witnesses[:1])  # two, so that one is another than a shard that fails
        return content

    def _opener(self, place: Location, ref: ObjectRef) -> "Callable[[], _Opened]":
        with self._opening:
            if is_nameable(place.path):
                return partial(_open, self._open_store(self._options.store_deadline), place.path, ref)
            bucket, client = self._open_client()
        return partial(_open_exactly, client, bucket, place.path, ref.etag)

    def _judge(self, error: Exception, place: Location) -> Exception:
        """What a failed get of an object means: its row, or the end of the job."""
        code = error_code(error)
        if code == "NoSuchKey" or (isinstance(error, FileNotFoundError) and code not in NO_BUCKET):
            return BadInputError("fetch", "missing", "it is not there")
        if code == "PreconditionFailed" or isinstance(error, PreconditionError):
            return BadInputError("fetch", "changed", "it was overwritten after the source was listed")
        if code in _ARCHIVED:
            return BadInputError("fetch", "unreadable", "it is archived, and must be restored first")
        if code == "AccessDenied" and self._grants_others(place):
            return BadInputError("fetch", "unreadable", "access to this object is denied")
        problem = explain(error, place.uri)
        if is_passing(error) and self._serves_others(place):
            return BadInputError("fetch", "store", f"{problem.message}, though other objects are read")
        return problem

    def _grants_others(self, place: Location) -> bool:
        """Whether only some objects are denied; credentials that were revoked are denied all of them."""
        if self._witnesses:
            return self._serves_others(place)
        with self._opening:
            self._denied += 1
            return self._denied < DENIED_AT_FIRST

    def _serves_others(self, place: Location) -> bool:
        """Whether another object that was read before still can be."""
        witness = next((path for path in self._witnesses if path != place.path), None)
        if witness is None:
            return False
        seconds = min(self._options.store_deadline, WITNESS_SECONDS)
        with self._opening:
            store = self._open_store(seconds)
        try:
            store.get_range(witness, start=0, length=1)
        except STORE_ERRORS as error:
            return isinstance(error, FileNotFoundError)  # deleted meanwhile: that, too, is an answer
        return True


class _Opened(NamedTuple):
    """An object whose body has not been read yet."""

    size_bytes: int
    read: Callable[[], _Content]
    close: Callable[[], object] = lambda: None


def _reader(first: _Opened, open_again: Callable[[], _Opened]) -> Callable[[], _Content]:
    """A function that reads the body of `first`, and when it is called again, opens the object again."""
    unread = [first]

    def read() -> _Content:
        with closing(unread.pop() if unread else open_again()) as opened:
            content = opened.read()
        if len(content) != opened.size_bytes:
            raise ConnectionError(f"{len(content)} of {opened.size_bytes} bytes came")
        return content

    return read


def _open(store: "ObjectStore", path: str, ref: ObjectRef) -> _Opened:
    wanted: GetOptions = {"if_match": ref.etag} if ref.etag else {}
    if ref.offset >= 0:
        wanted["range"] = (ref.offset, ref.offset + ref.size)
    answer = store.get(path, options=wanted)
    begin, end = answer.range
    return _Opened(end - begin, answer.bytes)


def _open_exactly(client: Any, bucket: str, key: str, etag: str | None) -> _Opened:
    condition = {"IfMatch": etag} if etag else {}
    with boto3_errors():
        answer = client.get_object(Bucket=bucket, Key=key, **condition)

    def read() -> bytes:
        with boto3_errors():
            return bytes(answer["Body"].read())

    return _Opened(answer["ContentLength"], read, answer["Body"].close)


def _read_file(path: str, ref: ObjectRef, reserve: Reserve, folder: Path | None) -> bytes:
    try:
        with open_file(path, ref.key) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadInputError("fetch", "unreadable", "it is not a file")
            if ref.etag and etag_of(status) != ref.etag:
                raise BadInputError("fetch", "changed", "it was overwritten after the source was listed")
            offset = max(ref.offset, 0)
            size = status.st_size if ref.offset < 0 else max(min(ref.size, status.st_size - offset), 0)
            admit(size, reserve)
            file.seek(offset)
            content = file.read(-1 if ref.offset < 0 else size)
            if len(content) != size:
                raise BadInputError("fetch", "changed", "it was cut short while it was read")
            return content
    except (FileNotFoundError, NotADirectoryError):
        if folder is not None and not folder.exists():
            raise StoreError(f"{folder} is not there any more", "mount it again; the same command resumes") from None
        raise BadInputError("fetch", "missing", "it is not there") from None
    except ValueError:
        raise BadInputError("fetch", "missing", "no file can have this name") from None
    except OSError as error:
        if error.errno in _FAULTS:
            raise explain(error, path) from None
        if error.errno == errno.EIO:
            raise BadInputError("fetch", "store", "the disk cannot read it") from None
        raise BadInputError("fetch", "unreadable", error.strerror or str(error)) from None


def admit(size: int, reserve: Reserve) -> None:
    """Reserve room for so many bytes, if they are not too many for one input."""
    if size > MAX_OBJECT_BYTES:
        raise BadInputError("fetch", "too_large", f"{size} bytes, more than the limit of {MAX_OBJECT_BYTES}")
    reserve(size)
