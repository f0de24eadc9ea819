"""Plain PNG files are read as Pillow reads them, or not at all."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from infermill.decode import png


def _file(mode: str, width: int, height: int, seed: int = 0, **save: object) -> bytes:
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    # In steps, so that the encoder chooses different filters.
    values = np.random.default_rng(seed).integers(0, 4, shape, np.uint8).cumsum(axis=0, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG", **save)
    return file.getvalue()


def _with_chunk(data: bytes, kind: bytes, content: bytes) -> bytes:
    """The file with one more chunk behind its header."""
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return data[:33] + chunk + data[33:]


def _plain(data: bytes) -> NDArray[np.uint8] | None:
    size = png.plain_size(data)
    return None if size is None else png.decode_plain(data, size)


def _pillow(data: bytes) -> NDArray[np.uint8] | None:
    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except (OSError, SyntaxError, ValueError):
        return None


sizes = st.integers(1, 50)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["L", "RGB", "RGBA"]), sizes, sizes, st.integers(0, 9), st.integers(0, 99))
def test_pixels_are_those_of_pillow(mode: str, width: int, height: int, level: int, seed: int) -> None:
    data = _with_chunk(_file(mode, width, height, seed, compress_level=level), b"gAMA", struct.pack(">I", 45455))
    assert png.plain_size(data) == (width, height)
    np.testing.assert_array_equal(_plain(data), _pillow(data))


def test_pixels_in_many_chunks() -> None:
    data = _file("RGB", 300, 300, compress_level=0)
    assert data.count(b"IDAT") > 1
    np.testing.assert_array_equal(_plain(data), _pillow(data))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_what_is_damaged_is_read_as_pillow_reads_it_or_left_to_it(data: st.DataObject) -> None:
    good = bytearray(_file(data.draw(st.sampled_from(["L", "RGB", "RGBA"])), 9, 7))
    for at in data.draw(st.lists(st.integers(0, len(good) - 1), min_size=1, max_size=3)):
        good[at] ^= 1 << data.draw(st.integers(0, 7))
    damaged = bytes(good[: data.draw(st.integers(0, len(good)) | st.just(len(good)))])
    pixels = _plain(damaged)
    if pixels is not None:
        np.testing.assert_array_equal(pixels, _pillow(damaged))


@pytest.mark.parametrize("kind", [b"eXIf", b"tRNS", b"acTL", b"iCCP", b"tEXt", b"zTXt", b"xxXx", b"IHDR"])
def test_what_could_matter_is_left_to_pillow(kind: bytes) -> None:
    assert _plain(_with_chunk(_file("RGB", 9, 7), kind, b"\0" * 13)) is None


def test_other_kinds_are_left_to_pillow() -> None:
    palette, sixteen, interlaced = io.BytesIO(), io.BytesIO(), bytearray(_file("RGB", 9, 7))
    Image.new("P", (9, 7)).save(palette, "PNG")
    Image.new("I;16", (9, 7)).save(sixteen, "PNG")
    interlaced[28] = 1
    for data in (palette.getvalue(), sixteen.getvalue(), bytes(interlaced), b"", png.MAGIC, b"\xff\xd8\xff"):
        assert png.plain_size(data) is None


def test_text_is_left_to_pillow() -> None:
    """It may hold an orientation."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", "exif")
    assert _plain(_file("RGB", 9, 7, pnginfo=info)) is None
