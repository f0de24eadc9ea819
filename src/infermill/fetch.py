"""Refs -> bytes, and what a store's answer means for the one input that it is about."""

import errno
import os
import re
import stat
import threading
from collections.abc import Callable
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obstore.exceptions import PreconditionError

from infermill.errors import BadInputError
from infermill.sources.objects import etag_of
from infermill.stores import (
    STORE_ERRORS,
    Location,
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

Fetch = Callable[[ObjectRef], "ReadableBuffer"]
MAX_OBJECT_BYTES = 1 << 30
_ESCAPED_BYTE = re.compile(r"\\x(5c|[89a-f][0-9a-f])")


def fetcher(source: Source, options: StoreOptions) -> Fetch:
    """A function from a ref to its bytes; it blocks without the GIL, and is called from many threads at once.

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

    def fetch(ref: ObjectRef) -> "ReadableBuffer":
        place = _place(ref.key, source, root)
        if place.is_local:
            return _read_file(place.uri, ref)
        if not is_nameable(place.path):
            with opening:
                bucket, client = s3_client_of(place.scheme, place.container)
            return _get_exactly(client, bucket, place.path, ref.etag)
        with opening:
            store = store_of(place.scheme, place.container)
        return _get(store, place, ref.etag)

    return fetch


def _place(key: str, source: Source, root: Location) -> Location:
    if not source.keys_are_uris:
        # Not `joined`: a key may begin with a slash, or end with one.
        return Location(root.scheme, root.container, key if not root.is_local else f"{root.path}/{key}")
    return locate(key) if "://" in key else locate(Path(source.root, key))


def _get(store: "ObjectStore", place: Location, etag: str | None) -> "ReadableBuffer":
    wanted: GetOptions = {"if_match": etag} if etag else {}
    try:
        answer = store.get(place.path, options=wanted)
        _check_size(answer.meta["size"])
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


def _read_file(path: str, ref: ObjectRef) -> bytes:
    try:
        with _open_file(path, ref.key) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadInputError("fetch", "unreadable", "it is not a file")
            if ref.etag and etag_of(status) != ref.etag:
                raise BadInputError("fetch", "changed", "it was overwritten after the source was listed")
            _check_size(status.st_size)
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise BadInputError("fetch", "missing", "it is not there any more") from None
    except ValueError:
        raise BadInputError("fetch", "missing", "no file has a name with a null character") from None
    except OSError as error:
        if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOMEM}:
            raise explain(error, path) from None
        raise BadInputError("fetch", "unreadable", error.strerror or str(error)) from None


def _check_size(size: int) -> None:
    if size > MAX_OBJECT_BYTES:
        raise BadInputError("fetch", "too_large", f"{size} bytes, more than the limit of {MAX_OBJECT_BYTES}")


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


def _get_exactly(client: Any, bucket: str, key: str, etag: str | None) -> bytes:
    from botocore.exceptions import BotoCoreError, ClientError

    condition = {"IfMatch": etag} if etag else {}
    try:
        answer = client.get_object(Bucket=bucket, Key=key, **condition)
        _check_size(answer["ContentLength"])
        return bytes(answer["Body"].read())
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
