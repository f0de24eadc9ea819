"""Plain PNG files: what Pillow decodes, without what it costs to ask it.

For a file of 32x32 pixels, Pillow takes ten times as long to read the chunks and to set itself up as to decode. So
files that hold nothing which could matter are read here, and their pixels go to Pillow's decoder of PNG data at once.
The format: https://www.w3.org/TR/png-3/#5DataRep.
"""

import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAGIC = b"\x89PNG\r\n\x1a\n"
_HEADER = struct.Struct(">II5B")
_LENGTH_AND_TYPE = struct.Struct(">I4s")
_EMPTY_CHUNK_BYTES = 12
_EIGHT_BITS = 8
_MODES = {0: "L", 2: "RGB", 6: "RGBA"}
"Colour types whose pixels are bytes."
_HARMLESS = {b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"sBIT", b"bKGD", b"tIME", b"hIST"}
"Chunks that Pillow reads, and that change neither pixels nor orientation."


def plain_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a PNG file whose header is plain: 8 bits, grey, RGB or RGBA, not interlaced; else None.

    Example:
        >>> import io
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (32, 24), "teal").save(file, "PNG")
        >>> plain_size(file.getvalue())
        (32, 24)
    """
    if len(data) < 16 + _HEADER.size or data[:16] != MAGIC + b"\0\0\0\rIHDR":
        return None
    width, height, bits, color, compression, filtering, interlace = _HEADER.unpack_from(data, 16)
    is_plain = bits == _EIGHT_BITS and color in _MODES and compression == filtering == interlace == 0
    return (width, height) if is_plain and width and height else None


def decode_plain(data: bytes, size: tuple[int, int]) -> NDArray[np.uint8] | None:
    """The pixels of a file of which `plain_size` knows the size, uint8 RGB [height, width, 3], without its alpha.

    None where it holds anything else, or is damaged: then Pillow has to decide.
    """
    content = _image_data(data)
    if content is None:
        return None
    mode = _MODES[data[25]]
    try:
        image = Image.frombytes(mode, size, content, "zip", mode, 0)
    except (OSError, ValueError):
        return None
    pixels = np.asarray(image)
    return np.repeat(pixels[..., None], 3, axis=2) if mode == "L" else pixels[..., :3]


def _image_data(data: bytes) -> bytes | None:
    """The data of all IDAT chunks, where all others are harmless and whole up to the end, IEND."""
    pieces = []
    at = len(MAGIC)
    while at + _EMPTY_CHUNK_BYTES <= len(data):
        length, kind = _LENGTH_AND_TYPE.unpack_from(data, at)
        end = at + 8 + length
        if kind == b"IDAT":
            pieces.append(data[at + 8 : end])
        elif data[end : end + 4] != zlib.crc32(data[at + 4 : end]).to_bytes(4, "big"):
            return None
        elif kind == b"IEND":
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        elif kind not in _HARMLESS and at != len(MAGIC):
            return None
        at = end + 4
    return None
