"""Tar shards in the manner of WebDataset: `key.jpg`, and beside it `key.cls` with its class.

The files of one key follow each other. The format of the labels: https://github.com/webdataset/webdataset
"""

import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

from infermill.sources.objects import HIDDEN, printable

LABEL_SUFFIX = "cls"
_STEM = re.compile(r"(?s)((?:.*/)?[^/.]*)\.?([^/]*)")
_HIDDEN = re.compile(f"(?:^|/){HIDDEN}")
_MAX_LABEL_BYTES = 4_096
# A name of 64 KiB is longer than any store takes; with more, the headers of a hostile member would fill the memory.
_MAX_HEADER_BYTES = 64 << 10
_MAX_FILES_OF_A_KEY = 1_024
# No name of a file has as many; tarfile's search for numbers takes the square of their digits (CVE-2024-6232).
_TOO_MANY_DIGITS = re.compile(rb"\d{256}")
# What tarfile raises on headers that are damaged, or made to confuse it.
_DAMAGE = (tarfile.TarError, ArithmeticError, LookupError, RecursionError, ValueError)


class File(NamedTuple):
    """A file in a tar, and the class that is given beside it."""

    name: str
    offset: int
    size: int
    label: str | None


class Damage(NamedTuple):
    """Where a tar cannot be read any further."""

    offset: int


class _HeaderReader:
    """A file for tarfile, which may read so many bytes between two members, and not more."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.left_bytes = 0

    def read(self, count: int) -> bytes:
        self.left_bytes -= count
        if count < 0 or self.left_bytes < 0:
            raise tarfile.ReadError("the headers of a member are too large")
        content = self._file.read(count)
        if _TOO_MANY_DIGITS.search(content):
            raise tarfile.ReadError("a number in a header is too long")
        return content

    def seek(self, offset: int) -> int:
        return self._file.seek(offset)

    def tell(self) -> int:
        return self._file.tell()


def files(file: BinaryIO, file_bytes: int, suffixes: Sequence[str]) -> Iterator[File | Damage]:
    """The files whose names end with one of the suffixes; only headers and classes are read.

    Links and sparse files hold no bytes of their own here: their size is 0. Hidden files are skipped.

    Args:
        file: the tar.
        file_bytes: its length.
        suffixes: in lower case.

    Example:
        >>> import io
        >>> member = tarfile.TarInfo("1.jpg")
        >>> content = member.tobuf() + bytes(2 * tarfile.BLOCKSIZE)
        >>> list(files(io.BytesIO(content), len(content), (".jpg",)))
        [File(name='1.jpg', offset=512, size=0, label=None)]
    """
    pending: list[File] = []
    key, label = "", None
    for member in _members(file, file_bytes):
        if isinstance(member, Damage):
            yield from (one._replace(label=label) for one in pending)
            yield member
            return
        name = member.name
        if _HIDDEN.search(name):  # as `._1.jpg`, which macOS puts before `1.jpg`
            continue
        stem, suffix = _STEM.fullmatch(name).groups()  # type: ignore[union-attr]
        is_other = stem != key or any(one.name == name for one in pending)
        if is_other or len(pending) == _MAX_FILES_OF_A_KEY:
            yield from (one._replace(label=label) for one in pending)
            pending, key, label = [], stem, None if is_other else label
        if suffix.lower() == LABEL_SUFFIX:
            label = _label(file, member)
        elif name.lower().endswith(tuple(suffixes)):
            pending.append(member)
    yield from (one._replace(label=label) for one in pending)


def _members(file: BinaryIO, file_bytes: int) -> Iterator[File | Damage]:
    """Everything but folders and devices; at the end, where that is not the end of a tar, the damage."""
    reader = _HeaderReader(file)
    offset = 0
    try:
        reader.left_bytes = _MAX_HEADER_BYTES
        with tarfile.open(fileobj=reader, mode="r:") as archive:  # type: ignore[call-overload]
            while (member := archive.next()) is not None:
                if member.size < 0 or archive.offset <= offset:
                    raise tarfile.ReadError("a size is negative")
                if member.isreg() or member.issym() or member.islnk():
                    size = member.size if member.isreg() and not member.issparse() else 0
                    # A file that goes on behind the end of the tar is truncated, which decoding it will tell.
                    size = max(min(size, file_bytes - member.offset_data), 0)
                    yield File(printable(member.name), member.offset_data, size, None)
                offset = archive.offset
                archive.members = []  # or they would all be kept
                reader.left_bytes = _MAX_HEADER_BYTES
    except _DAMAGE:
        yield Damage(min(offset, file_bytes))
        return
    file.seek(offset)
    if offset > file_bytes or file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        yield Damage(min(offset, file_bytes))


def _label(file: BinaryIO, member: File) -> str | None:
    if member.size > _MAX_LABEL_BYTES:
        return None
    file.seek(member.offset)
    return file.read(member.size).decode("utf-8", "backslashreplace").strip()
