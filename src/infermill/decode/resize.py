"""Upright RGB pixels -> the network's size."""

from typing import NamedTuple

import numpy as np
from cykooz_resizer import CropBox, FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from numpy.typing import NDArray
from PIL import Image
from PIL.Image import Resampling, Transpose

from infermill.errors import BadInputError
from infermill.models.card import Filter, Preprocess
from infermill.models.geometry import Axis, axes, sized_type
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


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Refuse an image of too many pixels, before there is memory for it."""
    if width * height > max_pixels:
        raise BadInputError("decode", "too_large", f"{width} x {height} pixels, where {max_pixels} are allowed")


def divisor_of(width: int, height: int, turn: Transpose | None, preprocess: Preprocess) -> int:
    """By how much a JPEG can be decoded smaller and still be at least twice as large as its resized size."""
    if preprocess.resize is None or _FILTERS[preprocess.resize.filter][2] is None:
        return 1
    sides = axes(width, height, preprocess)
    for divisor in (8, 4, 2):
        # A partial block sticks out at the right and at the bottom; turned, it would shift the picture.
        is_whole = width % divisor == height % divisor == 0
        if (is_whole or turn is None) and all(axis.before >= 2 * divisor * axis.after for axis in sides):
            return divisor
    return 1


def fit(picture: Picture, preprocess: Preprocess, profile: DecodeProfile, max_pixels: int) -> Pixels:
    """Resize, crop and put a border around what is smaller: black around a crop, else as the letterbox says."""
    columns, rows = axes(picture.width, picture.height, preprocess)
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
    canvas = np.full((rows.length, columns.length, 3), preprocess.border, np.uint8)
    canvas[rows.border : rows.border + rows.size, columns.border : columns.border + columns.size] = kept
    return canvas


def with_size(pixels: Pixels, picture: Picture) -> NDArray[np.void]:
    """The pixels, and the size of the image that they were made of, in one record of `sized_type`.

    So a row stays one array on its way to the network, and only the tasks that ask for sizes have them.
    """
    record: NDArray[np.void] = np.empty((), sized_type(pixels.shape))
    record["pixels"], record["size"] = pixels, (picture.width, picture.height)
    return record


def _are_rows_first(columns: Axis, rows: Axis) -> bool:
    """Whether a Pillow from 12 to 13 may resize rows before columns, which rounds differently."""
    loss = rows.before - rows.after
    return loss > 0 and (loss > 2 * (columns.before - columns.after) or rows.before > 100 * columns.before)


def _resize_exactly(rgb: Pixels, columns: Axis, rows: Axis, resample: Resampling, support: float) -> Pixels:
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


def _resize_fast(picture: Picture, columns: Axis, rows: Axis, kernel: FilterType) -> Pixels:
    height, width = picture.pixels.shape[:2]
    left, right = (edge / picture.divisor for edge in columns.edges())
    top, bottom = (edge / picture.divisor for edge in rows.edges())
    box = CropBox(left, top, min(right, width) - left, min(bottom, height) - top)
    source = ImageData(width, height, PixelType.U8x3, picture.pixels.tobytes())
    made = ImageData(columns.size, rows.size, PixelType.U8x3)
    Resizer().resize(source, made, ResizeOptions(ResizeAlg.convolution(kernel), crop_box=box))
    return np.frombuffer(made.get_buffer(), np.uint8).reshape(rows.size, columns.size, 3)
