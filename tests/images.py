"""Test images that are made, not downloaded: every variant that must decode (GOOD), and what must be refused (BAD)."""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops
from PIL.Image import Resampling, Transpose

from infermill.types import FailureCode

TO_STORED = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_90,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_270,
}
"EXIF orientation -> how an upright image is turned to be stored with it."


def photo(seed: int, size: tuple[int, int]) -> Image.Image:
    """A smooth, coloured RGB image (width, height) with detail at several scales."""
    random = np.random.default_rng(seed)
    picture = np.full((size[1], size[0], 3), 128.0)
    for cells, amplitude in ((2, 70), (5, 40), (12, 15)):
        grid = Image.fromarray(random.integers(0, 256, (cells, cells, 3), np.uint8))
        picture += (np.asarray(grid.resize(size, Resampling.BICUBIC), np.float64) - 128) * amplitude / 128
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    """The image as a file."""
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def jpeg_bytes(image: Image.Image, **options: Any) -> bytes:
    """The image as a JPEG, close to the original unless `options` say otherwise."""
    return encoded(image, "JPEG", **{"quality": 95, "subsampling": 0, **options})


def png_bytes(width: int, height: int, bits: int, color_type: int, data: bytes) -> bytes:
    """A PNG from its raw rows, big-endian, in formats that Pillow does not write."""
    row = len(data) // height
    rows = b"".join(b"\0" + data[at : at + row] for at in range(0, len(data), row))
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def tiff_bytes(pixels: NDArray[Any], bits: int, photometric: int = 1, sample_format: int = 1) -> bytes:
    """A little-endian TIFF of one strip from [height, width, samples], in formats that Pillow does not write."""
    height, width, samples = pixels.shape
    data = pixels.tobytes()
    extra = struct.pack("<3H", bits, bits, bits)
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, samples, bits if samples == 1 else 8 + len(data))]
    tags += [(259, 3, 1, 1), (262, 3, 1, photometric), (273, 4, 1, 8), (277, 3, 1, samples), (278, 4, 1, height)]
    tags += [(279, 4, 1, len(data)), (339, 3, 1, sample_format)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHLL", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<L", 8 + len(data) + len(extra)) + data + extra + directory


def exif_bytes(orientation: int) -> bytes:
    """EXIF data with nothing but an orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def cmyk_jpeg(image: Image.Image, transform: int) -> bytes:
    """An Adobe JPEG of four inks without black: CMYK (transform 0), or YCCK (2), which Pillow does not write."""
    inks = ImageChops.invert(image)
    if transform == 2:
        bands = [ImageChops.invert(band) for band in inks.convert("YCbCr").split()]
    else:
        bands = list(inks.split())
    data = bytearray(jpeg_bytes(Image.merge("CMYK", [*bands, Image.new("L", image.size, 0)])))
    data[data.index(b"Adobe") + 11] = transform
    return bytes(data)


def _high_bytes(image: Image.Image, order: str) -> NDArray[np.uint16]:
    """16-bit samples [height, width, bands] with the image in the high bytes and noise in the low ones."""
    high = np.atleast_3d(np.asarray(image)).astype(np.uint16) << 8
    low = np.random.default_rng(0).integers(0, 256, high.shape, np.uint16)
    samples: NDArray[np.uint16] = np.bitwise_or(high, low).astype(f"{order}u2")
    return samples


def _with_segment(jpeg: bytes, marker: int, body: bytes) -> bytes:
    return jpeg[:2] + bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def _jpegs(image: Image.Image) -> Iterator[tuple[str, bytes, Image.Image]]:
    grey = image.convert("L")
    plain = jpeg_bytes(image)
    yield "jpeg", plain, image
    yield "jpeg progressive", jpeg_bytes(image, progressive=True), image
    yield "jpeg 4:2:0", jpeg_bytes(image, subsampling=2), image
    yield "jpeg restart markers", jpeg_bytes(image, restart_marker_blocks=3), image
    yield "jpeg grey", jpeg_bytes(grey), grey.convert("RGB")
    yield "jpeg RGB stored as RGB", jpeg_bytes(image, keep_rgb=True), image
    yield "jpeg CMYK", cmyk_jpeg(image, 0), image
    yield "jpeg YCCK", cmyk_jpeg(image, 2), image
    yield "jpeg junk behind", plain + b"\r\nadvertisement", image
    yield "jpeg junk before a marker", plain[:-2] + b"\0\0" + plain[-2:], image
    yield "jpeg damaged EXIF", _with_segment(plain, 0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"), image
    yield "jpeg EXIF that is none", _with_segment(plain, 0xE1, b"Exif\0\0none"), image
    yield "jpeg EXIF behind a large profile", jpeg_bytes(image, icc_profile=bytes(70_000), exif=exif_bytes(1)), image
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation="6"/>'
    yield "jpeg XMP orientation", _with_segment(jpeg_bytes(image.transpose(TO_STORED[6])), 0xE1, xmp), image
    yield "mpo", encoded(image, "MPO", save_all=True, append_images=[grey.convert("RGB")], quality=95), image


def _turned(image: Image.Image) -> Iterator[tuple[str, bytes, Image.Image]]:
    yield "jpeg orientation 1", jpeg_bytes(image, exif=exif_bytes(1)), image
    for orientation, turn in TO_STORED.items():
        stored, exif = image.transpose(turn), exif_bytes(orientation)
        yield f"jpeg orientation {orientation}", jpeg_bytes(stored, exif=exif), image
        yield f"png orientation {orientation}", encoded(stored, "PNG", exif=exif), image
        yield f"webp orientation {orientation}", encoded(stored, "WEBP", lossless=True, exif=exif), image
        yield f"tiff orientation {orientation}", encoded(stored, "TIFF", exif=exif), image
    stored = image.transpose(TO_STORED[6])
    yield "jpeg CMYK orientation 6", _with_segment(cmyk_jpeg(stored, 0), 0xE1, exif_bytes(6)), image


def _pngs_and_bmps(image: Image.Image) -> Iterator[tuple[str, bytes, Image.Image]]:
    grey, palette, bilevel = image.convert("L"), image.quantize(32), image.convert("1")
    veiled, size = image.copy(), image.size
    veiled.putalpha(grey)
    for picture in (image, grey, palette, bilevel):
        yield f"png {picture.mode}", encoded(picture, "PNG"), picture.convert("RGB")
        yield f"bmp {picture.mode}", encoded(picture, "BMP"), picture.convert("RGB")
    yield "png RGBA", encoded(veiled, "PNG"), image
    yield "png LA", encoded(veiled.convert("LA"), "PNG"), grey.convert("RGB")
    yield "png RGB with transparent colour", encoded(image, "PNG", transparency=(1, 2, 3)), image
    yield (
        "png P with transparency",
        encoded(palette, "PNG", transparency=bytes(range(0, 256, 8))),
        palette.convert("RGB"),
    )
    yield "png P with one transparent", encoded(palette, "PNG", transparency=3), palette.convert("RGB")
    yield "png animated", encoded(image, "PNG", save_all=True, append_images=[grey.convert("RGB")]), image
    yield "png 16-bit grey", png_bytes(*size, 16, 0, _high_bytes(grey, ">").tobytes()), grey.convert("RGB")
    yield (
        "png 16-bit LA",
        png_bytes(*size, 16, 4, _high_bytes(veiled.convert("LA"), ">").tobytes()),
        grey.convert("RGB"),
    )
    yield "png 16-bit RGB", png_bytes(*size, 16, 2, _high_bytes(image, ">").tobytes()), image
    yield "png 16-bit RGBA", png_bytes(*size, 16, 6, _high_bytes(veiled, ">").tobytes()), image


def _others(image: Image.Image) -> Iterator[tuple[str, bytes, Image.Image]]:
    grey, palette, bilevel = image.convert("L"), image.quantize(32), image.convert("1")
    veiled, second = image.copy(), ImageChops.invert(image)
    veiled.putalpha(grey)
    upright = palette.convert("RGB")
    yield "gif", encoded(palette, "GIF"), upright
    yield "gif transparent", encoded(palette, "GIF", transparency=2), upright
    yield "gif animated", encoded(palette, "GIF", save_all=True, append_images=[second.quantize(32)]), upright
    yield "webp lossless", encoded(image, "WEBP", lossless=True), image
    yield "webp lossy", encoded(image, "WEBP", quality=95), image
    yield "webp RGBA", encoded(veiled, "WEBP", lossless=True, exact=True), image
    yield "webp animated", encoded(image, "WEBP", lossless=True, save_all=True, append_images=[second]), image
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"):
        yield f"tiff {compression}", encoded(image, "TIFF", compression=compression), image
    yield "tiff jpeg", encoded(image, "TIFF", compression="jpeg", quality=95), image
    yield "tiff P", encoded(palette, "TIFF"), upright
    yield "tiff bilevel", encoded(bilevel, "TIFF", compression="group4"), bilevel.convert("RGB")
    yield "tiff CMYK", encoded(Image.merge("CMYK", [*second.split(), Image.new("L", image.size)]), "TIFF"), image
    yield "tiff RGBA", encoded(veiled, "TIFF"), image
    yield "tiff pages", encoded(image, "TIFF", save_all=True, append_images=[second]), image
    yield "tiff big", encoded(image, "TIFF", big_tiff=True), image
    yield "tiff 16-bit grey", tiff_bytes(_high_bytes(grey, "<"), 16), grey.convert("RGB")
    deep = Image.fromarray(_high_bytes(grey, "<")[..., 0])
    yield "tiff 16-bit grey, compressed", encoded(deep, "TIFF", compression="tiff_lzw"), grey.convert("RGB")
    yield "tiff 16-bit grey, big-endian", encoded(deep.convert("I").convert("I;16B"), "TIFF"), grey.convert("RGB")
    yield "tiff 16-bit RGB", tiff_bytes(_high_bytes(image, "<"), 16, photometric=2), image
    pixel = Image.new("RGB", (1, 1), (200, 100, 50))
    yield "1x1 jpeg", jpeg_bytes(pixel), pixel
    yield "1x1 webp", encoded(pixel, "WEBP", lossless=True), pixel
    for kind in ("PNG", "BMP", "TIFF"):
        yield f"1x1 {kind.lower()}", encoded(pixel, kind), pixel
    yield "1x1 gif", encoded(pixel.quantize(2), "GIF"), pixel


def _make_good() -> dict[str, tuple[bytes, Image.Image]]:
    image = photo(1, (61, 43))
    variants = [*_jpegs(image), *_turned(image), *_pngs_and_bmps(image), *_others(image)]
    return {name: (data, reference) for name, data, reference in variants}


GOOD = _make_good()
"Name -> the file, and the upright RGB image that it shows."


def tolerance(name: str) -> int:
    """How far a value of the decoded image may be from the reference: 0 for lossless formats."""
    if name == "jpeg 4:2:0" or name in {"mpo", "webp lossy", "tiff jpeg"}:
        return 40
    return 14 if name.startswith(("jpeg", "1x1 jpeg")) else 0


def _patched_size(jpeg: bytes, width: int, height: int) -> bytes:
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes((data[at] ^ 0xFF,)) + data[at + 1 :]


def _make_bad() -> dict[str, tuple[bytes, FailureCode]]:
    image = photo(2, (160, 120))
    grey = np.asarray(image.convert("L"))[..., None]
    jpeg, png = jpeg_bytes(image), encoded(image, "PNG")
    huge = png_bytes(60_000, 60_000, 8, 2, b"\0" * 60_000)
    bad: dict[str, tuple[bytes, FailureCode]] = {
        "empty": (b"", "empty"),
        "html.jpg": (b"\n<!DOCTYPE html><title>404 Not Found</title>", "unsupported"),
        "text": ("no image: ä\n".encode() * 40, "unsupported"),
        "pdf": (b"%PDF-1.7\n" + bytes(100), "unsupported"),
        "psd": (b"8BPS\0\1" + bytes(100), "unsupported"),
        "heic": (b"\0\0\0\x18ftypheic" + bytes(100), "unsupported"),
        "wav": (b"RIFF\x24\0\0\0WAVEfmt " + bytes(100), "unsupported"),
        "binary": (bytes(range(256)), "unsupported"),
        "jpeg, 12 bits": (jpeg.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "unsupported"),
        "tiff, floating point": (tiff_bytes(grey.astype(np.float32), 32, sample_format=3), "unsupported"),
        "tiff, 32 bits": (tiff_bytes(grey.astype(np.int32), 32, sample_format=2), "unsupported"),
        "tiff, 16 bits, white is 0": (tiff_bytes(grey.astype(np.uint16), 16, photometric=0), "unsupported"),
        "tiff, strip at a fraction": (
            tiff_bytes(grey, 8).replace(struct.pack("<HH", 273, 4), struct.pack("<HH", 273, 11)),
            "corrupt",
        ),
        "png bomb": (huge, "too_large"),
        "jpeg bomb": (_patched_size(jpeg, 65_000, 65_000), "too_large"),
        "jpeg, closed in the middle": (jpeg[: len(jpeg) // 2] + b"\xff\xd9", "corrupt"),
        "png, header checksum": (_flipped(png, 30), "corrupt"),
        "png, damaged data": (_flipped(png, len(png) // 2), "corrupt"),
        "gif, damaged data": (encoded(image.quantize(), "GIF").replace(b"\xff", b"\xfe"), "corrupt"),
    }
    cut = {
        "jpeg": jpeg,
        "jpeg progressive": jpeg_bytes(image, progressive=True),
        "jpeg CMYK": cmyk_jpeg(image, 0),
        "png": png,
        "gif": encoded(image.quantize(), "GIF"),
        "webp": encoded(image, "WEBP"),
        "webp lossless": encoded(image, "WEBP", lossless=True),
        "bmp": encoded(image, "BMP"),
        "tiff": encoded(image, "TIFF"),
        "tiff lzw": encoded(image, "TIFF", compression="tiff_lzw"),
    }
    for name, data in cut.items():
        for percent in (10, 50, 99):
            bad[f"{name}, {percent} % of it"] = data[: len(data) * percent // 100], "truncated"
    return bad


BAD = _make_bad()
"Name -> the file, and the code that it is refused with."
