"""Pooling, by window and over everything.

MXNet's `full` convention lets the last window hang over the padded image:

    image and padding   | p | x x x x x | p |
    window, stride 2    [ . . . ]   [ . . . ]
                            [ . . . ]   [ . . . ]      <- `full`: one more, whose last column is nowhere

What is nowhere never counts, while `count_include_pad` says whether the padding does. ONNX's `ceil_mode` leaves that
open, and the runtimes answer differently: so the ends are padded by what is needed instead.
"""

import math

import numpy as np
from numpy.typing import NDArray

from infermill.models.mxnet.graph import Step, Tensor, Translate
from infermill.models.mxnet.operators_layers import LAYOUTS, from_channels_first, per_axis, to_channels_first

_RESIZE_MODES = (
    "size",
    "like",
    "odd_scale",
    *(f"to_{kind}_{way}" for kind in ("even", "odd") for way in ("down", "up")),
)


def pooling(step: Step) -> Tensor:
    attributes = step.attributes
    layout = attributes.choice("layout", LAYOUTS, "None")
    kind = attributes.choice("pool_type", ("max", "avg", "sum", "lp"), "max")
    data = to_channels_first(step, step.data, layout)
    power = attributes.optional_integer("p_value") if kind == "lp" else 1
    if power not in (1, 2):
        raise step.refused(f"its p_value is {power}")
    if power == 2:
        data = step.add("Mul", data, data)
    if attributes.boolean("global_pool", False):
        pooled = _over_everything(step, data, kind)
    else:
        pooled = _by_window(step, data, kind)
    if power == 2:
        pooled = step.add("Sqrt", pooled)
    return from_channels_first(step, pooled, layout)


def _over_everything(step: Step, data: Tensor, kind: str) -> Tensor:
    if kind == "max":
        return step.add("GlobalMaxPool", data)
    if kind == "avg":
        return step.add("GlobalAveragePool", data)
    return step.add("ReduceSum", data, step.integers(list(range(2, data.rank))), keepdims=1)


def _by_window(step: Step, data: Tensor, kind: str) -> Tensor:
    kernel, strides, pads, over = _windows(step, data)
    window = {"kernel_shape": kernel, "strides": strides}
    if kind == "max":
        return step.add("MaxPool", data, pads=[*pads, *_sums(pads, over)], **window)
    if kind != "avg":
        data = _padded(step, data, pads, _sums(pads, over))
        mean = step.add("AveragePool", data, **window)
        return step.add("Mul", mean, step.number(math.prod(kernel)))
    if not step.attributes.boolean("count_include_pad", True):
        return step.add("AveragePool", data, pads=[*pads, *_sums(pads, over)], **window)
    if not any(over):
        return step.add("AveragePool", data, pads=[*pads, *pads], count_include_pad=1, **window)
    data = _padded(step, data, pads, pads)
    return step.add("AveragePool", data, pads=[*(0 for _ in pads), *over], **window)


def pooling_v1(step: Step) -> Tensor:
    """The pooling of before 0.9.5: what it pads with are zeros, which count in maxima too, and its mean divides by the
    whole window, also where that hangs over."""
    kind = step.attributes.choice("pool_type", ("max", "avg", "sum"), "max")
    if step.attributes.boolean("global_pool", False):
        return _over_everything(step, step.data, kind)
    kernel, strides, pads, over = _windows(step, step.data)
    window = {"kernel_shape": kernel, "strides": strides}
    if kind == "max":
        return step.add("MaxPool", _padded(step, step.data, pads, pads), pads=[*(0 for _ in pads), *over], **window)
    mean = step.add("AveragePool", _padded(step, step.data, pads, _sums(pads, over)), **window)
    return mean if kind == "avg" else step.add("Mul", mean, step.number(math.prod(kernel)))


def _windows(step: Step, data: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], list[int]]:
    """Kernel, strides, padding, and by how much the last window leaves the padded image."""
    kernel = step.attributes.integers("kernel")
    strides, pads = per_axis(step, "stride", 1, kernel), per_axis(step, "pad", 0, kernel)
    convention = step.attributes.choice("pooling_convention", ("valid", "full", "same"), "valid")
    if convention == "same":
        raise step.refused("its pooling_convention is `same`, for which MXNet's own shapes never fit")
    lengths = step.lengths(data, range(2, data.rank))
    if len(lengths) != len(kernel) or min(kernel) < 1:
        raise step.refused(f"its kernel is {kernel}, for an input of {data.rank} dimensions")
    over = [
        _overhang(length, k, s, p, convention) for length, k, s, p in zip(lengths, kernel, strides, pads, strict=True)
    ]
    if any(p + o >= k for k, p, o in zip(kernel, pads, over, strict=True)):
        raise step.refused("its last window lies outside of the image, where MXNet's own answer is not a number")
    return kernel, strides, pads, over


def _overhang(length: int, kernel: int, stride: int, pad: int, convention: str) -> int:
    """By how much the last window leaves the padded image."""
    if convention == "valid":
        return 0
    padded = length + 2 * pad
    windows = 1 + math.ceil((padded - kernel) / stride)
    return max(0, (windows - 1) * stride + kernel - padded)


def _sums(left: tuple[int, ...], right: list[int]) -> list[int]:
    return [a + b for a, b in zip(left, right, strict=True)]


def _padded(step: Step, data: Tensor, before: tuple[int, ...], after: tuple[int, ...] | list[int]) -> Tensor:
    if not any((*before, *after)):
        return data
    return step.add("Pad", data, step.integers([0, 0, *before, 0, 0, *after]), step.number(0))


def adaptive_average(step: Step) -> Tensor:
    size = step.attributes.integers("output_size", (1,))
    wanted = size * 2 if len(size) == 1 else size
    if wanted == (1, 1):
        return step.add("GlobalAveragePool", step.data)
    lengths = step.lengths(step.data, [2, 3])
    if len(wanted) != 2 or min(wanted) < 1:
        raise step.refused(f"its output_size is {size}")
    if any(length % count for length, count in zip(lengths, wanted, strict=True)):
        down, across = (_shares(step, *pair) for pair in zip(lengths, wanted, strict=True))
        rows = step.add("MatMul", step.constant(down, step.data.dtype), step.data)
        return step.add("MatMul", rows, step.constant(across.T, step.data.dtype))
    kernel = [length // count for length, count in zip(lengths, wanted, strict=True)]
    return step.add("AveragePool", step.data, kernel_shape=kernel, strides=kernel)


def _shares(step: Step, length: int, count: int) -> NDArray[np.float64]:
    """Of each of `count` windows that may overlap, how much each pixel counts: [count, length]."""
    step.countable(length * count)
    number, pixel = np.arange(count)[:, None], np.arange(length)
    inside = (pixel >= number * length // count) & (pixel < -(-(number + 1) * length // count))
    shares: NDArray[np.float64] = inside / inside.sum(axis=1, keepdims=True)
    return shares


def bilinear_resize(step: Step) -> Tensor:
    attributes = step.attributes
    mode = attributes.choice("mode", _RESIZE_MODES, "size")
    if mode != "size":
        raise step.refused(f"its mode is `{mode}`")
    scales = [attributes.optional_number("scale_height"), attributes.optional_number("scale_width")]
    lengths = step.lengths(step.data, [2, 3])
    sizes = [attributes.integer("height", 1), attributes.integer("width", 1)]
    if None not in scales:
        sizes = [int(length * (scale or 1)) for length, scale in zip(lengths, scales, strict=True)]
    aligned = attributes.boolean("align_corners", True)
    return step.add(
        "Resize",
        step.data,
        None,
        None,
        step.add("Concat", step.add("Shape", step.data, end=2), step.integers(sizes), axis=0),
        mode="linear",
        coordinate_transformation_mode="align_corners" if aligned else "pytorch_half_pixel",
    )


POOLING: dict[str, Translate] = {
    "Pooling": pooling,
    "Pooling_v1": pooling_v1,
    "_contrib_AdaptiveAvgPooling2D": adaptive_average,
    "_contrib_BilinearResize2D": bilinear_resize,
}
