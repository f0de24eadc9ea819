"""Operators that move numbers and leave them as they are."""

import math
from collections.abc import Sequence

import numpy as np

from infermill.models.mxnet.graph import Step, Tensor, Translate
from infermill.models.mxnet.operators_layers import inside
from infermill.models.onnx import Dim

_INT64 = np.iinfo(np.int64)


def flatten(step: Step) -> Tensor:
    return step.data if step.data.rank == 2 else step.add("Flatten", step.data, axis=1)


def reshape(step: Step) -> Tensor:
    attributes = step.attributes
    codes, backwards = attributes.integers("shape", ()), attributes.boolean("reverse", False)
    if not codes:
        # Before 0.9: 0 is what -1 is now, and the first length may stay.
        codes = tuple(code or -1 for code in attributes.integers("target_shape"))
        if attributes.boolean("keep_highest", False):
            codes = (0, *codes[1:])
    # So that a length that is not known is found again where it is kept.
    shape = [f"?{index}" if dim is None else dim for index, dim in enumerate(step.data.shape)]
    if backwards:
        # A split's operands stand behind its code, also when it is read from the right.
        turned = _new_shape(step, codes[::-1], shape[::-1], backwards=True)[::-1]
    else:
        turned = _new_shape(step, codes, shape)
    return step.reshape(step.data, _for_onnx(step, turned, shape))


def _new_shape(step: Step, codes: tuple[int, ...], shape: Sequence[Dim], *, backwards: bool = False) -> list[Dim]:
    """MXNet's codes put into dims: 0 keeps one, -1 is what is left, -2 keeps the rest, -3 joins two, -4 splits one."""
    result: list[Dim] = []
    position, rest = 0, list(codes)

    def take() -> Dim:
        nonlocal position
        if position >= len(shape):
            raise step.refused(f"its shape {codes} asks for more dimensions than {list(shape)} has")
        position += 1
        return shape[position - 1]

    while rest:
        code = rest.pop(0)
        if code == 0:
            result.append(take())
        elif code == -2:
            result += [take() for _ in range(position, len(shape))]
        elif code == -3:
            first, second = take(), take()
            result.append(first * second if isinstance(first, int) and isinstance(second, int) else None)
        elif code == -4 and len(rest) >= 2 and not backwards:
            result += _split(step, take(), rest.pop(0), rest.pop(0))
        elif code > 0 or code == -1:
            result.append(code)
            position += 1
        else:
            raise step.refused(f"its shape is {codes}")
    return result


def _split(step: Step, whole: Dim, left: int, right: int) -> list[Dim]:
    if isinstance(whole, int) and -1 in (left, right):
        known = right if left == -1 else left
        if known < 1 or whole % known:
            raise step.refused(f"{whole} cannot be split into {left} times {right}")
        return [whole // known if code == -1 else code for code in (left, right)]
    return [left, right]


def _for_onnx(step: Step, dims: list[Dim], shape: Sequence[Dim]) -> list[int]:
    """Lengths, with at most one -1: where the batch stays in its place it is kept, else it is what is left."""
    rest = range(1, step.data.rank)
    result = [
        dim if isinstance(dim, int) else 0 if dim is not None and [dim] == shape[index : index + 1] else -1
        for index, dim in enumerate(dims)
    ]
    numbers = [dim for dim in shape[1:] if isinstance(dim, int)]
    if result[:1] == [-1] and len(numbers) == len(rest) and math.prod(result[1:]) == math.prod(numbers):
        result[0] = 0  # -1 before all numbers of an input: that is the batch
    if result.count(-1) > 1:
        raise step.refused(f"its new shape {result} has more than one length that varies with the batch")
    if not isinstance(shape[0], int) and -1 not in result and 0 not in result:
        raise step.refused(f"its new shape {result} fixes the length of the batch")
    if (
        result[:1] == [0]
        and -1 not in result
        and 0 not in result[1:]
        and math.prod(result[1:]) != math.prod(step.lengths(step.data, rest))
    ):
        raise step.refused(f"{list(shape[1:])} numbers of each input do not fit {result[1:]}")
    return result


def transpose(step: Step) -> Tensor:
    rank = step.data.rank
    axes = step.attributes.integers("axes", tuple(reversed(range(rank))))
    return step.add("Transpose", step.data, perm=[step.axis(axis, rank) for axis in axes])


def swap_axes(step: Step) -> Tensor:
    perm = list(range(step.data.rank))
    first, second = (step.axis(step.attributes.integer(name, 0), len(perm)) for name in ("dim1", "dim2"))
    perm[first], perm[second] = perm[second], perm[first]
    return step.add("Transpose", step.data, perm=perm)


def expand_dims(step: Step) -> Tensor:
    axis = step.axis(step.attributes.integer("axis"), step.data.rank + 1)
    return step.add("Unsqueeze", step.data, step.integers([axis]))


def squeeze(step: Step) -> Tensor:
    rank = step.data.rank
    if step.node.attrs.get("axis", "None") in ("None", "()"):
        axes = [axis for axis, dim in enumerate(step.data.shape) if dim == 1]  # the batch stays, also if it is one
    else:
        axes = [step.axis(axis, rank) for axis in step.attributes.integers("axis")]
    return step.add("Squeeze", step.data, step.integers(axes)) if axes else step.data


def concat(step: Step) -> Tensor:
    tensors = step.inputs
    like = next((tensor for tensor in tensors if tensor.value is None), tensors[0])
    axis = step.axis(step.attributes.integer("dim", 1), tensors[0].rank)
    return step.add("Concat", *(step.like_data(tensor, like) for tensor in tensors), axis=axis)


def stack(step: Step) -> Tensor:
    axis = step.axis(step.attributes.integer("axis", 0), step.data.rank + 1)
    where = step.integers([axis])
    return step.add("Concat", *(step.add("Unsqueeze", tensor, where) for tensor in step.inputs), axis=axis)


def slice_channel(step: Step) -> dict[str, Tensor]:
    count, axis = step.attributes.integer("num_outputs"), step.axis(step.attributes.integer("axis", 1), step.data.rank)
    length = step.lengths(step.data, [axis])[0]
    # A name costs what many numbers do.
    if step.countable(count * 64) < 1 or length % count:
        raise step.refused(f"{length} channels cannot be divided by {count}")
    parts = [step.data]
    if count > 1:
        parts = step.add_many("Split", count, step.data, step.integers([length // count] * count), axis=axis)
    if step.attributes.boolean("squeeze_axis", False):
        parts = [step.add("Squeeze", part, step.integers([axis])) for part in parts]
    return {f"output{index}": part for index, part in enumerate(parts)}


def slice_axis(step: Step) -> Tensor:
    attributes = step.attributes
    axis, end = step.axis(attributes.integer("axis"), step.data.rank), attributes.optional_integer("end")
    return cut(step, step.data, {axis: (attributes.integer("begin"), _INT64.max if end is None else end, 1)})


def slice_by_index(step: Step) -> Tensor:
    begin, end = step.attributes.optional_integers("begin"), step.attributes.optional_integers("end")
    steps = step.attributes.optional_integers("step", ()) or (None,) * len(begin)
    if not len(begin) == len(end) == len(steps) <= step.data.rank:
        raise step.refused(f"it has {len(begin)} beginnings, {len(end)} ends and {len(steps)} steps")
    return cut(
        step,
        step.data,
        {axis: _range(*bounds) for axis, bounds in enumerate(zip(begin, end, steps, strict=True))},
    )


def _range(begin: int | None, end: int | None, step: int | None) -> tuple[int, int, int]:
    if step is not None and step < 0:
        return (_INT64.max if begin is None else begin, _INT64.min if end is None else end, step)
    return (begin or 0, _INT64.max if end is None else end, 1 if step is None else step)


def cut(step: Step, tensor: Tensor, ranges: dict[int, tuple[int, int, int]]) -> Tensor:
    """A part of a tensor: of each axis begin, end and step."""
    begins, ends, steps = (step.integers(list(values)) for values in zip(*ranges.values(), strict=True))
    return step.add("Slice", tensor, begins, ends, step.integers(list(ranges)), steps)


def slice_like(step: Step) -> Tensor:
    like = step.input(1)
    axes = step.attributes.integers("axes", ())
    if not axes:
        axes = tuple(axis for axis in range(step.data.rank) if step.data.shape[axis] != like.shape[axis])
    axes = tuple(step.axis(axis, step.data.rank) for axis in axes)
    lengths = step.lengths(like, axes)
    if not axes:
        return step.data
    return cut(step, step.data, {axis: (0, length, 1) for axis, length in zip(axes, lengths, strict=True)})


def crop(step: Step) -> Tensor:
    attributes = step.attributes
    alike = len(step.node.inputs) == 2
    wanted = step.lengths(step.input(1), [2, 3]) if alike else list(attributes.integers("h_w"))
    lengths, offset = step.lengths(step.data, [2, 3]), attributes.integers("offset", (0, 0))
    if attributes.boolean("center_crop", False):
        offset = tuple((length - size) // 2 for length, size in zip(lengths, wanted, strict=True))
    ranges = {axis: (start, start + size, 1) for axis, start, size in zip((2, 3), offset, wanted, strict=True)}
    return cut(step, step.data, ranges)


def reverse(step: Step) -> Tensor:
    axes = [step.axis(axis, step.data.rank) for axis in step.attributes.integers("axis")]
    return cut(step, step.data, dict.fromkeys(axes, (_INT64.max, _INT64.min, -1)))


def pad(step: Step) -> Tensor:
    widths = step.attributes.integers("pad_width")
    mode = step.attributes.choice("mode", ("constant", "edge", "reflect"))
    if len(widths) != 2 * step.data.rank:
        raise step.refused(f"its pad_width has {len(widths)} numbers for {step.data.rank} dimensions")
    value = step.number(step.attributes.number("constant_value", 0.0)) if mode == "constant" else None
    return step.add("Pad", step.data, step.integers([*widths[::2], *widths[1::2]]), value, mode=mode)


def tile(step: Step) -> Tensor:
    reps, tensor = list(step.attributes.integers("reps")), step.data
    if len(reps) > tensor.rank:
        tensor = step.add("Unsqueeze", tensor, step.integers(list(range(len(reps) - tensor.rank))))
    reps = [1] * (tensor.rank - len(reps)) + reps
    return step.add("Tile", tensor, step.integers(reps))


def repeat(step: Step) -> Tensor:
    count, axis = step.attributes.integer("repeats"), step.attributes.optional_integer("axis")
    if axis is None:
        raise step.refused("it has no axis, and would mix the inputs of a batch")
    axis = step.axis(axis, step.data.rank)
    length = step.lengths(step.data, [axis])[0]
    step.countable(length * count)
    return step.add("Gather", step.data, step.integers(np.repeat(np.arange(length), count)), axis=axis)


def take(step: Step) -> Tensor:
    axis = step.axis(step.attributes.integer("axis", 0), step.data.rank)
    indices = inside(step, step.input(1), step.lengths(step.data, [axis])[0])
    return step.add("Gather", step.data, indices, axis=axis)


def broadcast_axis(step: Step) -> Tensor:
    axes, sizes = step.attributes.integers("axis", ()), step.attributes.integers("size", ())
    target = [1] * step.data.rank
    for axis, size in zip(axes, sizes, strict=True):
        target[step.axis(axis, step.data.rank)] = size
    return step.add("Expand", step.data, step.integers(target))


def broadcast_to(step: Step) -> Tensor:
    target = [size or 1 for size in step.attributes.integers("shape")]
    return step.add("Expand", step.data, step.integers(target))


def broadcast_like(step: Step) -> Tensor:
    if step.node.attrs.get("lhs_axes", "None") != "None":
        raise step.refused("it has lhs_axes")
    return step.add("Expand", step.data, step.add("Shape", step.input(1)))


def _filled(value: float) -> Translate:
    return lambda step: step.add("Add", step.add("Mul", step.data, step.number(0)), step.number(value))


def depth_to_space(step: Step) -> Tensor:
    return step.add("DepthToSpace", step.data, blocksize=step.attributes.integer("block_size"))


def space_to_depth(step: Step) -> Tensor:
    return step.add("SpaceToDepth", step.data, blocksize=step.attributes.integer("block_size"))


SHAPE: dict[str, Translate] = {
    **dict.fromkeys(("Flatten", "flatten"), flatten),
    **dict.fromkeys(("Reshape", "reshape"), reshape),
    **dict.fromkeys(("Concat", "concat"), concat),
    **dict.fromkeys(("SliceChannel", "split"), slice_channel),
    **dict.fromkeys(("slice", "crop"), slice_by_index),
    **dict.fromkeys(("SwapAxes", "swapaxes", "SwapAxis"), swap_axes),
    **dict.fromkeys(("Pad", "pad"), pad),
    **dict.fromkeys(("reverse", "flip"), reverse),
    **dict.fromkeys(("broadcast_axis", "broadcast_axes"), broadcast_axis),
    "transpose": transpose,
    "expand_dims": expand_dims,
    "squeeze": squeeze,
    "stack": stack,
    "slice_axis": slice_axis,
    "slice_like": slice_like,
    "Crop": crop,
    "tile": tile,
    "repeat": repeat,
    "take": take,
    "broadcast_to": broadcast_to,
    "broadcast_like": broadcast_like,
    "zeros_like": _filled(0),
    "ones_like": _filled(1),
    "depth_to_space": depth_to_space,
    "space_to_depth": space_to_depth,
}
