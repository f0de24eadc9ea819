"""Where the pixels of an image lie in the network's input, and the way back."""

import math
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from infermill.models.card import Preprocess, Resize


class Axis(NamedTuple):
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

    def before_resizing(self, positions: NDArray[np.float64]) -> NDArray[np.float64]:
        """Where positions in the result were before resizing; outside of the image too."""
        return (positions - self.border + self.first) * (self.before / self.after)

    def edges(self) -> tuple[float, float]:
        """The kept range in input pixels."""
        return self.first * self.before / self.after, self.stop * self.before / self.after

    def exact_edges(self) -> tuple[float, float] | None:
        """`edges()`, where float32, in which Pillow takes them, holds them without rounding."""
        denominator = self.after // math.gcd(self.before, self.after)
        is_binary = denominator & (denominator - 1) == 0
        edges = self.edges()
        return edges if is_binary and all(float(np.float32(edge)) == edge for edge in edges) else None


def axes(width: int, height: int, preprocess: Preprocess) -> tuple[Axis, Axis]:
    """Columns and rows of an image of this size, by the rules of torchvision's Resize and CenterCrop, and of
    Ultralytics' LetterBox.
    """
    after_width, after_height = _resized(width, height, preprocess.resize)
    crop_height, crop_width = after_height, after_width
    if preprocess.crop is not None:
        crop_height, crop_width = preprocess.crop.center
    elif preprocess.letterbox is not None:
        crop_height, crop_width = preprocess.letterbox
    return _axis(width, after_width, crop_width), _axis(height, after_height, crop_height)


def _resized(width: int, height: int, resize: Resize | None) -> tuple[int, int]:
    if resize is None:
        return width, height
    if resize.exact is not None:
        return resize.exact[1], resize.exact[0]
    if resize.letterbox is not None:
        ratio = min(resize.letterbox[0] / height, resize.letterbox[1] / width)
        return max(round(width * ratio), 1), max(round(height * ratio), 1)
    shorter = cast(int, resize.shorter)
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


def _axis(before: int, after: int, crop: int) -> Axis:
    if crop >= after:
        return Axis(before, after, 0, after, (crop - after) // 2, crop)
    first = round((after - crop) / 2)
    return Axis(before, after, first, first + crop, 0, crop)


def in_image(boxes: NDArray[np.floating[Any]], width: int, height: int, preprocess: Preprocess) -> NDArray[np.float32]:
    """Boxes (xmin, ymin, xmax, ymax) in pixels of the network's input, in those of an upright image of this size.

    What sticks out is cut off: where nothing of a box is in the image, it has no width or no height.

    Example:
        >>> letterbox = Preprocess(resize=Resize(letterbox=(640, 640)))
        >>> in_image(np.array([[0, 80, 320, 700]]), 1280, 960, letterbox).tolist()
        [[0.0, 0.0, 640.0, 960.0]]
    """
    columns, rows = axes(width, height, preprocess)
    corners = boxes.astype(np.float64)
    placed = np.empty(boxes.shape, np.float32)
    placed[:, 0::2] = columns.before_resizing(corners[:, 0::2]).clip(0, width)
    placed[:, 1::2] = rows.before_resizing(corners[:, 1::2]).clip(0, height)
    return placed


def sized_type(pixels: tuple[int, ...]) -> np.dtype[np.void]:
    """The type of a row that carries the size of its image: `pixels` uint8 of this shape, `size` (width, height)."""
    return np.dtype([("pixels", np.uint8, pixels), ("size", np.int32, (2,))])
