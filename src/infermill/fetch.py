"""Refs -> bytes, and what a store's answer means for the one input that it is about."""

import errno
import os
import re
import stat
import threading
from collections.abc import Callable
from contextlib import closing
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from obstore.exceptions import PreconditionError

from infermill.errors import BadInputError
from infermill.stores import (
    STORE_ERRORS,
    Location,
    etag_of,
    explain,
    is_denied_object,
    is_nameable,
    locate,
    open_s3_client,
    open_store,
)
from infermill.types import ObjectRef, Source, StoreOptions

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer
    from obstore import GetOptions
    from obstore.store import ObjectStore

Reserve = Callable[[int], object]
MAX_OBJECT_BYTES = 1 << 30
_ESCAPED_BYTE = re.compile(r"\\x(5c|[89a-f][0-9a-f])")


class Fetch(Protocol):
    """A ref -> its bytes; `reserve` is called with their number before they are read, and may block."""

    def __call__(self, ref: ObjectRef, reserve: Reserve = ..., /) -> "ReadableBuffer": ...


def fetcher(source: Source, options: StoreOptions) -> Fetch:
    """A function that fetches objects; it blocks without the GIL, and is called from many threads at once.

    It raises BadInputError where the object is missing, changed since it was listed, or unreadable, and
    StoreError where the store is at fault.
    """

    opening = threading.Lock()

    @lru_cache(maxsize=64)
    def store_of(scheme: str, container: str) -> "ObjectStore":
        return open_store(Location(scheme, container, ""), options)

    @lru_cache(maxsize=64)
    def s3_client_of(scheme: str, container: str) -> tuple[str, Any]:
        return open_s3_client(Location(scheme, container, ""), options)

    root = locate(source.root)

    def fetch(ref: ObjectRef, reserve: Reserve = lambda _: None, /) -> "ReadableBuffer":
        place = _place(ref.key, source, root)
        if place.is_local:
            return _read_file(place.uri, ref, reserve)
        if not is_nameable(place.path):
            with opening:
                bucket, client = s3_client_of(place.scheme, place.container)
            return _get_exactly(client, bucket, place.path, ref.etag, reserve)
        with opening:
            store = store_of(place.scheme, place.container)
        return _get(store, place, ref.etag, reserve)

    return fetch


def _place(key: str, source: Source, root: Location) -> Location:
    if not source.keys_are_uris:
        # Not `joined`: a key may begin with a slash, or end with one.
        return Location(root.scheme, root.container, key if not root.is_local else f"{root.path}/{key}")
    return locate(key) if "://" in key else locate(Path(source.root, key))


def _get(store: "ObjectStore", place: Location, etag: str | None, reserve: Reserve) -> "ReadableBuffer":
    wanted: GetOptions = {"if_match": etag} if etag else {}
    try:
        answer = store.get(place.path, options=wanted)
        _admit(answer.meta["size"], reserve)
        return answer.bytes()
    except STORE_ERRORS as error:
        raise _object_error(error, place.uri) from None


def _object_error(error: Exception, uri: str) -> Exception:
    if isinstance(error, FileNotFoundError):
        if "NoSuchBucket" in str(error):
            return explain(error, uri)
        return BadInputError("fetch", "missing", "it is not there any more")
    if isinstance(error, PreconditionError):
        return BadInputError("fetch", "changed", "it was overwritten after the source was listed")
    if is_denied_object(error):
        return BadInputError("fetch", "unreadable", "access to this object is denied")
    return explain(error, uri)


def _read_file(path: str, ref: ObjectRef, reserve: Reserve) -> bytes:
    try:
        with _open_file(path, ref.key) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadInputError("fetch", "unreadable", "it is not a file")
            if ref.etag and etag_of(status) != ref.etag:
                raise BadInputError("fetch", "changed", "it was overwritten after the source was listed")
            _admit(status.st_size, reserve)
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise BadInputError("fetch", "missing", "it is not there any more") from None
    except ValueError:
        raise BadInputError("fetch", "missing", "no file has a name with a null character") from None
    except OSError as error:
        if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOMEM}:
            raise explain(error, path) from None
        raise BadInputError("fetch", "unreadable", error.strerror or str(error)) from None


def _admit(size: int, reserve: Reserve) -> None:
    if size > MAX_OBJECT_BYTES:
        raise BadInputError("fetch", "too_large", f"{size} bytes, more than the limit of {MAX_OBJECT_BYTES}")
    reserve(size)


def _open_file(path: str, key: str) -> FileIO:
    try:
        return FileIO(path, opener=_open_at_once)
    except FileNotFoundError:
        raw = _ESCAPED_BYTE.sub(_unescaped, key)
        if raw == key:
            raise
        return FileIO(path.removesuffix(key) + raw, opener=_open_at_once)


def _unescaped(match: re.Match[str]) -> str:
    """What `printable` wrote as `\\xNN`."""
    byte = int(match[1], 16)
    return chr(byte if byte < 0x80 else 0xDC00 + byte)


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a named pipe that a manifest lists would block for ever


def _get_exactly(client: Any, bucket: str, key: str, etag: str | None, reserve: Reserve) -> bytes:
    from botocore.exceptions import BotoCoreError, ClientError

    condition = {"IfMatch": etag} if etag else {}
    try:
        answer = client.get_object(Bucket=bucket, Key=key, **condition)
        with closing(answer["Body"]) as body:
            _admit(answer["ContentLength"], reserve)
            return bytes(body.read())
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code == "NoSuchKey":
            raise BadInputError("fetch", "missing", "it is not there any more") from None
        if code == "PreconditionFailed":
            raise BadInputError("fetch", "changed", "it was overwritten after the source was listed") from None
        if is_denied_object(error):
            raise BadInputError("fetch", "unreadable", "access to this object is denied") from None
        raise explain(error, f"s3://{bucket}/{key}") from None
    except BotoCoreError as error:
        raise explain(error, f"s3://{bucket}/{key}") from None
