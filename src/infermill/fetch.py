"""Refs -> bytes, and what a store's answer means for the one input that it is about."""

import errno
import os
import re
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
    is_unnameable,
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
_ESCAPED_BYTE = re.compile(r"\\x([89a-f][0-9a-f])")


def fetcher(source: Source, options: StoreOptions) -> Fetch:
    """A function from a ref to its bytes; it blocks without the GIL, and is called from many threads at once.

    It raises BadInputError where the object is missing, changed since it was listed, or unreadable, and
    StoreError where the store is at fault.
    """

    @lru_cache(maxsize=64)
    def store_of(scheme: str, container: str) -> "ObjectStore":
        return open_store(Location(scheme, container, ""), options)

    @lru_cache(maxsize=64)
    def exact_store_of(scheme: str, container: str) -> "Callable[[str, str | None], bytes]":
        bucket, client = open_s3_client(Location(scheme, container, ""), options)
        return lambda key, etag: _get_exactly(client, bucket, key, etag)

    root = locate(source.root)

    def fetch(ref: ObjectRef) -> "ReadableBuffer":
        place = _place(ref.key, source, root)
        if place.is_local:
            return _read_file(place.uri, ref.etag)
        try:
            wanted: GetOptions = {"if_match": ref.etag} if ref.etag else {}
            answer = store_of(place.scheme, place.container).get(place.path, options=wanted)
            _check_size(answer.meta["size"])
            return answer.bytes()
        except STORE_ERRORS as error:
            if place.scheme == "s3" and is_unnameable(error):
                return exact_store_of(place.scheme, place.container)(place.path, ref.etag)
            raise _object_error(error, place.uri) from None

    return fetch


def _place(key: str, source: Source, root: Location) -> Location:
    if not source.keys_are_uris:
        # Not `joined`: a key may begin with a slash, or end with one.
        return Location(root.scheme, root.container, key if not root.is_local else f"{root.path}/{key}")
    return locate(key) if "://" in key else locate(Path(source.root, key))


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


def _read_file(path: str, etag: str | None) -> bytes:
    try:
        with _open_file(path) as file:
            status = os.fstat(file.fileno())
            if etag is not None and etag_of(status) != etag:
                raise BadInputError("fetch", "changed", "it was overwritten after the source was listed")
            _check_size(status.st_size)
            return file.read()
    except FileNotFoundError:
        raise BadInputError("fetch", "missing", "it is not there any more") from None
    except OSError as error:
        if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOMEM}:
            raise explain(error, path) from None
        raise BadInputError("fetch", "unreadable", error.strerror or str(error)) from None


def _check_size(size: int) -> None:
    if size > MAX_OBJECT_BYTES:
        raise BadInputError("fetch", "too_large", f"{size} bytes, more than the limit of {MAX_OBJECT_BYTES}")


def _open_file(path: str) -> FileIO:
    try:
        return FileIO(path)
    except FileNotFoundError:
        # A name that is not UTF-8 has its odd bytes as \xNN in the key.
        raw = _ESCAPED_BYTE.sub(lambda match: chr(0xDC00 + int(match[1], 16)), path)
        if raw == path:
            raise
        return FileIO(raw)


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
        if code in {"PreconditionFailed", "412"}:
            raise BadInputError("fetch", "changed", "it was overwritten after the source was listed") from None
        raise explain(error, f"s3://{bucket}/{key}") from None
    except BotoCoreError as error:
        raise explain(error, f"s3://{bucket}/{key}") from None
