"""RecordIO: records and their labels in the `.rec` files that MXNet's `im2rec` writes.

    record   one frame (cflag 0), or several (1, 2 …, 3) where the magic number, aligned to 4 bytes, is in the data:
             it is taken out there, and put back between the frames when they are joined
    frame    u32 0xced7230a · u32 cflag << 29 | length · data, padded to 4 bytes
    data     u32 flag · f32 label · u64 id · u64 id2 · flag x f32 labels · the image file

All numbers are little-endian; a label is the one of the header where the flag is 0. The formats:
https://github.com/dmlc/dmlc-core/blob/main/include/dmlc/recordio.h and `mxnet.recordio.pack`.
"""

import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

MAGIC = struct.pack("<I", 0xCED7230A)
_FRAME = struct.Struct("<4sI")
_HEADER = struct.Struct("<IfQQ")
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
# More than records have, and few enough for a file that was made to be read again and again.
_MAX_FRAMES = 1_024
_MAX_GAPS = 1_000
_MAX_LABELS = 16_384
_SEARCH_BYTES = 1 << 20
_MAX_INDEX_LINE = 1_024


class DamagedError(ValueError):
    """There is no whole record at this place."""


class Record(NamedTuple):
    """Where a record's frames are in the file, and its labels; None where it holds no image of `im2rec`."""

    offset: int
    size: int
    label: NDArray[np.float32] | None


class Gap(NamedTuple):
    """Bytes in which no record can be found."""

    offset: int
    size: int


def records(file: BinaryIO, file_bytes: int) -> Iterator[Record | Gap]:
    """All records, one after the other; after damage, from the next frame on that begins one.

    Example:
        >>> import io
        >>> frame = MAGIC + struct.pack("<I", 28) + struct.pack("<IfQQ", 0, 7.0, 1, 0) + b"JPEG"
        >>> [record.label.tolist() for record in records(io.BytesIO(frame), len(frame))]
        [[7.0]]
    """
    offset = gaps = 0
    while offset < file_bytes:
        try:
            record = record_at(file, offset, file_bytes)
        except DamagedError:
            gaps += 1
            end = _next_beginning(file, offset + 4, file_bytes) if gaps < _MAX_GAPS else file_bytes
            yield Gap(offset, end - offset)
            offset = end
        else:
            yield record
            offset += _padded(record.size)


def record_at(file: BinaryIO, offset: int, file_bytes: int) -> Record:
    """The record that begins at an offset; only the headers of its frames, and its labels, are read.

    Raises:
        DamagedError: none does, or it is not whole.
    """
    pieces: list[tuple[int, int]] = []
    place, cflag = offset, _MIDDLE
    while cflag not in {_WHOLE, _LAST}:
        cflag, length = _frame_at(file, place, file_bytes, is_first=not pieces)
        pieces.append((place + _FRAME.size, length))
        place += _FRAME.size + _padded(length)
        if len(pieces) > _MAX_FRAMES:
            raise DamagedError(f"it has more than {_MAX_FRAMES} frames")
    begin, length = pieces[-1]
    return Record(offset, begin + length - offset, _labels(file, pieces))


def image_of(frames: "ReadableBuffer") -> "ReadableBuffer":
    """The image file in a record.

    Raises:
        DamagedError: it is not a record, not whole, or holds no image of `im2rec`.
    """
    content = memoryview(frames).cast("B")
    pieces: list[memoryview] = []
    place, cflag = 0, _MIDDLE
    while cflag not in {_WHOLE, _LAST}:
        if len(content) - place < _FRAME.size:
            raise DamagedError("the record ends before its last frame")
        magic, word = _FRAME.unpack_from(content, place)
        cflag, length = word >> 29, word & (1 << 29) - 1
        if magic != MAGIC or cflag not in ({_MIDDLE, _LAST} if pieces else {_WHOLE, _FIRST}):
            raise DamagedError("no record begins there")
        place += _FRAME.size
        pieces.append(content[place : place + length])
        if len(pieces[-1]) < length:
            raise DamagedError("the record ends before its data do")
        place += _padded(length)
    joined = pieces[0] if len(pieces) == 1 else memoryview(MAGIC.join(pieces))
    if len(joined) < _HEADER.size:
        raise DamagedError("the record holds no image: it is shorter than the header of one")
    begin = _HEADER.size + 4 * _HEADER.unpack_from(joined)[0]
    if begin > len(joined):
        raise DamagedError("the record holds no image: its header announces more labels than there are bytes")
    return joined[begin:]


def index_entries(file: BinaryIO) -> Iterator[tuple[str, int]]:
    """The keys and offsets of an `.idx` file: lines of key, tab and offset.

    Raises:
        DamagedError: a line is something else.
    """
    number = 0
    while line := file.readline(_MAX_INDEX_LINE):
        number += 1
        key, _, offset = line.rstrip(b"\r\n").rpartition(b"\t")
        if not key or not offset.isascii() or not offset.isdigit() or len(offset) > 18 or not line.endswith(b"\n"):
            if line.strip():
                raise DamagedError(f"line {number} is not a key, a tab and an offset")
            continue
        yield key.decode("utf-8", "backslashreplace"), int(offset)


def _frame_at(file: BinaryIO, offset: int, file_bytes: int, *, is_first: bool) -> tuple[int, int]:
    """The cflag and the length of the frame at an offset."""
    if offset + _FRAME.size > file_bytes:
        raise DamagedError("the file ends before the frame does")
    magic, word = _FRAME.unpack(_read(file, offset, _FRAME.size))
    cflag, length = word >> 29, word & (1 << 29) - 1
    if magic != MAGIC or cflag not in ({_WHOLE, _FIRST} if is_first else {_MIDDLE, _LAST}):
        raise DamagedError("no frame begins there")
    if offset + _FRAME.size + length > file_bytes:
        raise DamagedError("the file ends before the data do")
    return cflag, length


def _labels(file: BinaryIO, pieces: list[tuple[int, int]]) -> NDArray[np.float32] | None:
    header = _beginning(file, pieces, _HEADER.size)
    if len(header) < _HEADER.size:
        return None
    flag, label, _, _ = _HEADER.unpack(header)
    if flag == 0:
        return np.array([label], np.float32)
    if flag > _MAX_LABELS:
        return None
    values = _beginning(file, pieces, _HEADER.size + 4 * flag)[_HEADER.size :]
    return np.frombuffer(values, "<f4").astype(np.float32) if len(values) == 4 * flag else None


def _beginning(file: BinaryIO, pieces: list[tuple[int, int]], count: int) -> bytes:
    """The first bytes of a record, its frames joined."""
    found = b""
    for number, (offset, length) in enumerate(pieces):
        found += (MAGIC if number else b"") + _read(file, offset, min(length, count))
        if len(found) >= count:
            break
    return found[:count]


def _read(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    content = file.read(count)
    if len(content) < count:
        raise DamagedError("the file was cut short while it was read")
    return content


def _next_beginning(file: BinaryIO, offset: int, file_bytes: int) -> int:
    """Where the next record seems to begin; the end of the file where none does."""
    while offset < file_bytes:
        file.seek(offset)
        window = file.read(_SEARCH_BYTES + len(MAGIC) - 1)
        if not window:
            break
        at = window.find(MAGIC)
        while at >= 0:
            if (offset + at) % 4 == 0:
                with suppress(DamagedError):
                    _frame_at(file, offset + at, file_bytes, is_first=True)
                    return offset + at
            at = window.find(MAGIC, at + 1)
        offset += _SEARCH_BYTES
    return file_bytes


def _padded(length: int) -> int:
    return -(-length // 4) * 4
