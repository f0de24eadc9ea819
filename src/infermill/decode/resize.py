"""Upright RGB pixels -> the network's size, by the rules of torchvision's Resize and CenterCrop."""

import math
from typing import NamedTuple, cast

import numpy as np
from cykooz_resizer import CropBox, FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from numpy.typing import NDArray
from PIL import Image
from PIL.Image import Resampling, Transpose

from infermill.errors import BadInputError
from infermill.models.card import Filter, Preprocess, Resize
from infermill.types import DecodeProfile

Pixels = NDArray[np.uint8]

# Pillow's filter, how many pixels of the smaller image it reaches, and the same filter of cykooz.
_FILTERS: dict[Filter, tuple[Resampling, float, FilterType | None]] = {
    "nearest": (Resampling.NEAREST, 0.0, None),
    "box": (Resampling.BOX, 0.5, None),
    "bilinear": (Resampling.BILINEAR, 1.0, FilterType.bilinear),
    "hamming": (Resampling.HAMMING, 1.0, None),
    "bicubic": (Resampling.BICUBIC, 2.0, FilterType.catmull_rom),
    "lanczos": (Resampling.LANCZOS, 3.0, FilterType.lanczos3),
}


class Picture(NamedTuple):
    """Upright RGB pixels, the size that they stand for, and by how much they were decoded smaller than that."""

    pixels: Pixels
    width: int
    height: int
    divisor: int = 1


class _Axis(NamedTuple):
    """One side of an image, in pixels: its length before and after resizing, the range [first, stop) of the latter
    that is kept, and its place in the result: the border in front of it and the length of it all.
    """

    before: int
    after: int
    first: int
    stop: int
    border: int
    length: int

    @property
    def kept(self) -> slice:
        return slice(self.first, self.stop)

    @property
    def size(self) -> int:
        return self.stop - self.first

    def reach(self, support: float) -> slice:
        """The input pixels that a filter reads for the kept ones, and a few more."""
        if self.before == self.after:
            return self.kept
        scale = self.before / self.after
        margin = support * max(scale, 1.0) + 1.0
        first = math.floor((self.first + 0.5) * scale - margin)
        stop = math.ceil((self.stop - 0.5) * scale + margin)
        return slice(max(first, 0), min(stop, self.before))

    def edges(self) -> tuple[float, float]:
        """The kept range in input pixels."""
        return self.first * self.before / self.after, self.stop * self.before / self.after

    def exact_edges(self) -> tuple[float, float] | None:
        """`edges()`, where float32, in which Pillow takes them, holds them without rounding."""
        denominator = self.after // math.gcd(self.before, self.after)
        is_binary = denominator & (denominator - 1) == 0
        edges = self.edges()
        return edges if is_binary and all(float(np.float32(edge)) == edge for edge in edges) else None


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Refuse an image of too many pixels, before there is memory for it."""
    if width * height > max_pixels:
        raise BadInputError("decode", "too_large", f"{width} x {height} pixels, where {max_pixels} are allowed")


def _axes(width: int, height: int, preprocess: Preprocess) -> tuple[_Axis, _Axis]:
    """Columns and rows, by the rules of torchvision's Resize and CenterCrop."""
    after_width, after_height = _resized(width, height, preprocess.resize)
    crop_height, crop_width = preprocess.crop.center if preprocess.crop else (after_height, after_width)
    return _axis(width, after_width, crop_width), _axis(height, after_height, crop_height)


def _resized(width: int, height: int, resize: Resize | None) -> tuple[int, int]:
    if resize is None:
        return width, height
    if resize.exact is not None:
        return resize.exact[1], resize.exact[0]
    shorter = cast(int, resize.shorter)
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


def _axis(before: int, after: int, crop: int) -> _Axis:
    if crop >= after:
        return _Axis(before, after, 0, after, (crop - after) // 2, crop)
    first = round((after - crop) / 2)
    return _Axis(before, after, first, first + crop, 0, crop)


def divisor_of(width: int, height: int, turn: Transpose | None, preprocess: Preprocess) -> int:
    """By how much a JPEG can be decoded smaller and still be at least twice as large as its resized size."""
    if preprocess.resize is None or _FILTERS[preprocess.resize.filter][2] is None:
        return 1
    sides = _axes(width, height, preprocess)
    for divisor in (8, 4, 2):
        # A partial block sticks out at the right and at the bottom; turned, it would shift the picture.
        is_whole = width % divisor == height % divisor == 0
        if (is_whole or turn is None) and all(axis.before >= 2 * divisor * axis.after for axis in sides):
            return divisor
    return 1


def fit(picture: Picture, preprocess: Preprocess, profile: DecodeProfile, max_pixels: int) -> Pixels:
    """Resize, crop and put a black border around what is smaller than the crop."""
    columns, rows = _axes(picture.width, picture.height, preprocess)
    check_pixels(columns.after, max(rows.before, rows.after), max_pixels)
    resample, support, fast = _FILTERS[preprocess.resize.filter if preprocess.resize else "nearest"]
    if columns.before == columns.after and rows.before == rows.after:
        kept = picture.pixels[rows.kept, columns.kept]
    elif profile == "fast" and fast is not None and columns.after <= columns.before and rows.after <= rows.before:
        # cykooz 4.0 reads outside of its memory where it enlarges a part of an image (bicubic).
        kept = _resize_fast(picture, columns, rows, fast)
    elif resample == Resampling.NEAREST or _are_rows_first(columns, rows):
        resized = Image.fromarray(picture.pixels).resize((columns.after, rows.after), resample)
        kept = np.asarray(resized)[rows.kept, columns.kept]
    else:
        kept = _resize_exactly(picture.pixels, columns, rows, resample, support)
    if (rows.size, columns.size) == (rows.length, columns.length):
        return np.ascontiguousarray(kept)
    canvas = np.zeros((rows.length, columns.length, 3), np.uint8)
    canvas[rows.border : rows.border + rows.size, columns.border : columns.border + columns.size] = kept
    return canvas


def _are_rows_first(columns: _Axis, rows: _Axis) -> bool:
    """Whether a Pillow from 12 to 13 may resize rows before columns, which rounds differently."""
    loss = rows.before - rows.after
    return loss > 0 and (loss > 2 * (columns.before - columns.after) or rows.before > 100 * columns.before)


def _resize_exactly(rgb: Pixels, columns: _Axis, rows: _Axis, resample: Resampling, support: float) -> Pixels:
    """What resizing the whole and cropping gives, bit for bit, without most of what the crop drops.

    Pillow resizes the columns, rounds to 8 bits, and then resizes the rows, so that two calls do what one does:

        ┌───────────────┐ columns ┌───┬──────┬──┐ kept  ┌──────┐ rows ┌──────┐
        │▒▒▒▒ reach ▒▒▒▒│ ──────► │▒▒▒│▒▒▒▒▒▒│▒▒│ ────► │▒▒▒▒▒▒│ ───► │ kept │
        └───────────────┘         └───┴──────┴──┘       └──────┘      └──────┘
    """
    reach, first = rows.reach(support), 0
    if columns.before == columns.after:
        band = Image.fromarray(rgb[reach, columns.kept])
    else:
        band = Image.fromarray(rgb[reach])
        if edges := columns.exact_edges():
            band = band.resize((columns.size, band.height), resample, (edges[0], 0, edges[1], band.height))
        else:
            band, first = band.resize((columns.after, band.height), resample), columns.first
    if rows.before == rows.after:
        return np.asarray(band)[:, first : first + columns.size]
    # The weights depend on the height of it all: the rows out of reach stay, and stay black.
    strip = Image.new("RGB", (columns.size, rows.before))
    strip.paste(band, (-first, reach.start))
    if edges := rows.exact_edges():
        return np.asarray(strip.resize((columns.size, rows.size), resample, (0, edges[0], columns.size, edges[1])))
    return np.asarray(strip.resize((columns.size, rows.after), resample))[rows.kept]


def _resize_fast(picture: Picture, columns: _Axis, rows: _Axis, kernel: FilterType) -> Pixels:
    height, width = picture.pixels.shape[:2]
    left, right = (edge / picture.divisor for edge in columns.edges())
    top, bottom = (edge / picture.divisor for edge in rows.edges())
    box = CropBox(left, top, min(right, width) - left, min(bottom, height) - top)
    source = ImageData(width, height, PixelType.U8x3, picture.pixels.tobytes())
    made = ImageData(columns.size, rows.size, PixelType.U8x3)
    Resizer().resize(source, made, ResizeOptions(ResizeAlg.convolution(kernel), crop_box=box))
    return np.frombuffer(made.get_buffer(), np.uint8).reshape(rows.size, columns.size, 3)
