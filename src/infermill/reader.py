"""Files and objects, opened to be read piece by piece."""

import io
import os
import re
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from infermill.patience import patiently
from infermill.stores import Location
from infermill.types import StoreOptions

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from obstore import GetOptions
    from obstore.store import ObjectStore

_BUFFER_BYTES = 1 << 20
_ESCAPED_BYTE = re.compile(r"\\x(5c|[89a-f][0-9a-f])")


class ObjectReader(io.RawIOBase):
    """An object as a seekable file that is read range by range, all of the same version: `size` bytes, and `etag`.

    Each request is sent again until the deadline of the store. Reading raises PreconditionError when the object has
    been replaced since it was opened.
    """

    def __init__(self, store: "ObjectStore", location: Location, options: StoreOptions) -> None:
        self._store = store
        self._location = location
        self._options = options
        meta = patiently(lambda: store.head(location.path), location.uri, options)
        self.size, self.etag = meta["size"], meta["e_tag"]
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer).cast("B")
        end = min(self._position + len(view), self.size)
        if end <= self._position:
            return 0
        options: GetOptions = {"range": (self._position, end)}
        if self.etag is not None:
            options["if_match"] = self.etag
        data = patiently(
            lambda: memoryview(self._store.get(self._location.path, options=options).bytes()),
            self._location.uri,
            self._options,
        )
        view[: len(data)] = data
        self._position += len(data)
        return len(data)


def open_reader(location: Location, store: "ObjectStore", options: StoreOptions) -> io.BufferedReader:
    """A file or object, for reading in pieces; `store` is the one that `open_store` gives for the location."""
    if location.is_local:
        return Path(location.uri).open("rb")
    return io.BufferedReader(ObjectReader(store, location, options), _BUFFER_BYTES)


def open_file(path: str, key: str) -> FileIO:
    r"""A local file by its path, which ends in its key; where none is called so, `\xNN` in the key is that byte.

    It never blocks; what is there may be no regular file.
    """
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
