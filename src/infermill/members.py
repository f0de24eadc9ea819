"""A ref into a shard -> the bytes of the member, or its pixels where the shard holds those."""

import io
import mmap
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from infermill.errors import BadInputError
from infermill.fetch import Fetch, Reserve, admit, fetcher
from infermill.sources import cifar, recordio
from infermill.types import DAMAGED, ObjectRef, ShardFormat, Source, Split, StoreOptions

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

WINDOW_BYTES = 1 << 20
"Members of a shard are read so many bytes at a time, so that a store, or a disk, is not asked for each of them."
WINDOWS = 16
"So many windows are kept: 16 MiB beside the bytes in flight."
_UNPACKED_SHARDS = 8
_Key = tuple[str, str | None, int]


def member_fetcher(source: Source, options: StoreOptions) -> Fetch:
    """A function that fetches members of shards, as `fetch.fetcher` does objects, of a source with `shards`.

    What it returns of a RecordIO or tar shard is a file; of CIFAR, an array of pixels, uint8 RGB [32, 32, 3].

    Example:
        >>> fetch = member_fetcher(Source("/photos", shards="tar"), StoreOptions())
        >>> len(fetch(ObjectRef("a.tar#1.jpg", size=1024, offset=512)))  # doctest: +SKIP
        1024
    """
    shards = source.shards
    assert shards is not None  # noqa: S101 - of other sources, fetch.fetcher fetches the objects
    whole = fetcher(replace(source, shards=None), options)
    windows = _Windows(whole)
    name = cifar.name_of(shards)
    images = _UnpackedImages(whole, name) if name else None

    def fetch(ref: ObjectRef, reserve: Reserve = lambda _: None, /) -> "ReadableBuffer":
        shard, _, member = ref.key.partition("#")
        if ref.offset == DAMAGED:
            raise BadInputError("fetch", "corrupt", "the shard is damaged: what is there cannot be told apart")
        if ref.offset < 0:
            raise BadInputError("fetch", "missing", "it is not in the shard")
        if images is not None and not shard.endswith(".bin"):
            admit(ref.size, reserve)
            return _picture(images.read(shard, ref.etag, member, ref.offset))
        place = ObjectRef(shard, ref.size, ref.etag, ref.offset)
        if ref.size == 0:
            content: ReadableBuffer = b""
        elif ref.size > WINDOW_BYTES // 2:
            content = whole(place, reserve)
        else:
            admit(ref.size, reserve)
            content = windows.read(place)
        return _UNPACK[shards](content)

    return fetch


def _record(content: "ReadableBuffer") -> "ReadableBuffer":
    try:
        return recordio.image_of(content)
    except recordio.DamagedError as error:
        raise BadInputError("fetch", "corrupt", str(error)) from None


def _picture(content: "ReadableBuffer") -> "ReadableBuffer":
    planes = np.frombuffer(memoryview(content), np.uint8)
    if len(planes) != cifar.IMAGE_BYTES:
        raise BadInputError("fetch", "truncated", "the shard ends before the image does")
    return cifar.as_picture(planes).data


def _as_it_is(content: "ReadableBuffer") -> "ReadableBuffer":
    return content


_UNPACK: "dict[ShardFormat, Callable[[ReadableBuffer], ReadableBuffer]]" = {
    "recordio": _record,
    "tar": _as_it_is,
    "cifar10": _picture,
    "cifar100": _picture,
}


class _Windows:
    """The pieces of shards that were asked for last; each is read by the first thread that wants it."""

    def __init__(self, read: "Callable[[ObjectRef], ReadableBuffer]") -> None:
        self._read = read
        self._lock = threading.Lock()
        self._windows: OrderedDict[_Key, Future[memoryview]] = OrderedDict()

    def read(self, ref: ObjectRef) -> bytes:
        """The bytes of a ref, whose key is that of the shard, and whose size is half a window or less."""
        number, begin = divmod(ref.offset, WINDOW_BYTES)
        content = bytes(self._window(ref, number)[begin : begin + ref.size])
        if begin + ref.size > WINDOW_BYTES:
            content += self._window(ref, number + 1)[: ref.size - len(content)]
        if len(content) < ref.size:
            raise BadInputError("fetch", "truncated", "the shard ends before it does")
        return content

    def _window(self, ref: ObjectRef, number: int) -> memoryview:
        key = (ref.key, ref.etag, number)
        with self._lock:
            known = self._windows.get(key)
            window = self._windows[key] = known or Future()
            self._windows.move_to_end(key)
            while len(self._windows) > WINDOWS:
                self._windows.popitem(last=False)
        if known is None:
            try:
                content = self._read(ObjectRef(ref.key, WINDOW_BYTES, ref.etag, number * WINDOW_BYTES))
                window.set_result(memoryview(content).cast("B"))
            except BaseException as error:  # noqa: BLE001 - raised below, in each thread that waits for it
                with self._lock:
                    self._windows.pop(key, None)  # who comes later asks again
                window.set_exception(error)
        return window.result()


class _UnpackedImages:
    """The images of shards that cannot be read in ranges: each shard is unpacked once, into a file without a name."""

    def __init__(self, read: "Callable[[ObjectRef], ReadableBuffer]", name: cifar.Name) -> None:
        self._read = read
        self._name = name
        self._lock = threading.Lock()
        self._unpacked = lru_cache(maxsize=_UNPACKED_SHARDS)(self._unpack)

    def read(self, shard: str, etag: str | None, member: str, offset: int) -> bytes:
        """The bytes of an image `offset` bytes behind the first one of its batch."""
        batch = member.rpartition("/")[0]
        with self._lock:
            images, begins = self._unpacked(shard, etag, cifar.split_of(batch, self._name))
        begin = begins.get(batch)
        content = b"" if begin is None else images[begin + offset : begin + offset + cifar.IMAGE_BYTES]
        if len(content) < cifar.IMAGE_BYTES:
            raise BadInputError("fetch", "missing", "it is not in the shard")
        return content

    def _unpack(self, shard: str, etag: str | None, split: Split) -> tuple[mmap.mmap, dict[str, int]]:
        content = self._read(ObjectRef(shard, etag=etag))
        begins: dict[str, int] = {}
        is_archive = cifar.is_archive(shard)
        with tempfile.TemporaryFile(prefix="infermill-") as file:
            try:
                for batch in cifar.batches(io.BytesIO(content), shard, self._name, split):
                    begins[batch.name if is_archive else ""] = file.tell()
                    file.write(batch.images.tobytes())
            except cifar.DamagedError as error:
                raise BadInputError("fetch", "corrupt", str(error)) from None
            file.flush()
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), begins
