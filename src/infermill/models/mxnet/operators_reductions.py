"""Operators that look at several numbers at once: softmax, sums over axes, norms, products of matrices."""

import numpy as np

from infermill.models.mxnet.graph import Step, Tensor, Translate
from infermill.models.mxnet.operators_layers import channels, inside


def softmax_output(step: Step) -> Tensor:
    over_channels, over_last = (step.attributes.boolean(name, False) for name in ("multi_output", "preserve_shape"))
    if step.data.rank > 2 and not over_channels and not over_last:
        raise step.refused("it has neither multi_output nor preserve_shape, where MXNet's answer depends on oneDNN")
    return step.add("Softmax", step.data, axis=1 if over_channels else -1)


def softmax_activation(step: Step) -> Tensor:
    mode = step.attributes.choice("mode", ("instance", "channel"), "instance")
    return step.add("Softmax", step.data, axis=1 if mode == "channel" else -1)


def _softmax(op: str, *, negated: bool = False) -> Translate:
    def translate(step: Step) -> Tensor:
        if step.attributes.boolean("use_length", False):
            raise step.refused("it has use_length")
        data, temperature = step.data, step.attributes.optional_number("temperature")
        if negated:
            data = step.add("Neg", data)
        if temperature is not None:
            data = step.add("Div", data, step.number(temperature))
        result = step.add(op, data, axis=step.axis(step.attributes.integer("axis", -1), data.rank))
        dtype = step.attributes.choice("dtype", ("None", "float16", "float32", "float64"), "None")
        return result if dtype == "None" else step.cast(result, dtype)

    return translate


def _axes(step: Step) -> list[int]:
    rank = step.data.rank
    if step.node.attrs.get("axis", "None") in ("None", "()"):
        axes = list(range(rank))
    else:
        axes = [step.axis(axis, rank) for axis in step.attributes.integers("axis")]
        if step.attributes.boolean("exclude", False):
            axes = [axis for axis in range(rank) if axis not in axes]
    return axes


def _reduction(op: str) -> Translate:
    def translate(step: Step) -> Tensor:
        return _reduced(step, op, step.data)

    return translate


def _reduced(step: Step, op: str, data: Tensor) -> Tensor:
    axes, keep = _axes(step), step.attributes.boolean("keepdims", False)
    if not axes:
        return data
    result = step.add(op, data, step.integers(axes), keepdims=int(keep))
    # A number by itself is an array of one in MXNet.
    return result if result.rank else step.reshape(result, [1])


def norm(step: Step) -> Tensor:
    order = step.attributes.integer("ord", 2)
    if order not in (1, 2):
        raise step.refused(f"its ord is {order}")
    return _reduced(step, f"ReduceL{order}", step.data)


def argmax(step: Step) -> Tensor:
    return _extreme(step, "ArgMax")


def argmin(step: Step) -> Tensor:
    return _extreme(step, "ArgMin")


def _extreme(step: Step, op: str) -> Tensor:
    axis, keep = _one_axis(step, step.attributes.optional_integer("axis")), step.attributes.boolean("keepdims", False)
    return step.cast(step.add(op, step.data, axis=axis, keepdims=int(keep)), np.float32)


def argmax_channel(step: Step) -> Tensor:
    return step.cast(step.add("ArgMax", step.data, axis=1, keepdims=0), np.float32)


def _one_axis(step: Step, axis: int | None) -> int:
    if axis is None:
        raise step.refused("it has no axis, and would mix the inputs of a batch")
    return step.axis(axis, step.data.rank)


def _last_axis(step: Step) -> int:
    """The attribute `axis` of what goes along the last one unless it says otherwise."""
    return _one_axis(step, step.attributes.optional_integer("axis") if "axis" in step.node.attrs else -1)


def top_k(step: Step) -> Tensor | dict[str, Tensor]:
    """Of equal numbers, ONNX Runtime takes the first; MXNet and OpenVINO take either."""
    attributes, data = step.attributes, step.data
    axis, kind = _last_axis(step), attributes.choice("ret_typ", ("value", "indices", "mask", "both"), "indices")
    length = step.lengths(data, [axis])[0]
    count = attributes.integer("k", 1)
    if count > length:
        raise step.refused(f"its k is {count}, of {length}")
    largest = not attributes.boolean("is_ascend", False)
    wanted = step.integers([count if count > 0 else length])
    values, indices = step.add_many("TopK", 2, data, wanted, axis=axis, largest=int(largest))
    if kind == "mask":
        zeros = step.add("Mul", data, step.number(0))
        ones = step.add("Add", step.add("Mul", values, step.number(0)), step.number(1))
        return step.add("ScatterElements", zeros, indices, ones, axis=axis)
    if kind == "value":
        return {"output0": values}
    dtype = attributes.choice("dtype", ("float16", "float32", "float64", "uint8", "int32", "int64"), "float32")
    indices = step.cast(indices, dtype)
    return indices if kind == "indices" else {"output0": values, "output1": indices}


def pick(step: Step) -> Tensor:
    data, indices, axis = step.data, step.input(1), _last_axis(step)
    if indices.rank < data.rank:
        indices = step.add("Unsqueeze", indices, step.integers([axis]))
    if indices.shape != (*data.shape[:axis], 1, *data.shape[axis + 1 :]):
        raise step.refused("its index has another shape than its data")
    indices = inside(step, indices, step.lengths(data, [axis])[0])
    picked = step.add("GatherElements", data, indices, axis=axis)
    if step.attributes.boolean("keepdims", False):
        return picked
    return step.add("Squeeze", picked, step.integers([axis]))


def one_hot(step: Step) -> Tensor:
    """Indices that are outside give a row of `off_value`: ONNX's OneHot counts negative ones from the end."""
    attributes = step.attributes
    names = ("float16", "float32", "float64", "uint8", "int8", "int32", "int64")
    dtype = attributes.choice("dtype", names, "float32")
    places = step.integers(np.arange(step.countable(attributes.integer("depth"))))
    indices = step.add("Unsqueeze", step.cast(step.data, np.int64), step.integers([-1]))
    on, off = attributes.number("on_value", 1.0), attributes.number("off_value", 0.0)
    return step.add("Where", step.add("Equal", indices, places), step.constant(on, dtype), step.constant(off, dtype))


def l2_normalization(step: Step) -> Tensor:
    mode = step.attributes.choice("mode", ("instance", "channel", "spatial"), "instance")
    data = step.data
    axes = {"instance": range(1, data.rank), "channel": range(1, 2), "spatial": range(2, data.rank)}[mode]
    squares = step.add("ReduceSumSquare", data, step.integers(list(axes)), keepdims=1)
    return step.add("Div", data, _root(step, squares, step.attributes.number("eps", 1e-10)))


def _root(step: Step, squares: Tensor, eps: float) -> Tensor:
    return step.add("Sqrt", step.add("Add", squares, step.number(eps)))


def local_response(step: Step) -> Tensor:
    attributes = step.attributes
    return step.add(
        "LRN",
        step.data,
        alpha=attributes.number("alpha", 1e-4),
        beta=attributes.number("beta", 0.75),
        bias=attributes.number("knorm", 2.0),
        size=attributes.integer("nsize"),
    )


def instance_norm(step: Step) -> Tensor:
    count = channels(step, step.data)
    scale, shift = step.parameter(1, (count,)), step.parameter(2, (count,))
    eps = step.attributes.number("eps", 1e-3)
    return step.add("InstanceNormalization", step.data, scale, shift, epsilon=eps)


def layer_norm(step: Step) -> Tensor:
    data = step.data
    if step.attributes.boolean("output_mean_var", False):
        raise step.refused("it has output_mean_var")
    axis = step.axis(step.attributes.integer("axis", -1), data.rank)
    length = step.lengths(data, [axis])[0]
    along = [length if index == axis else 1 for index in range(data.rank)]
    scale, shift = (step.reshape(step.parameter(index, (length,)), along) for index in (1, 2))
    standard = _standardised(step, data, [axis], step.attributes.number("eps", 1e-5))
    return step.add("Add", step.add("Mul", standard, scale), shift)


def group_norm(step: Step) -> Tensor:
    data, groups = step.data, step.attributes.integer("num_groups", 1)
    if step.attributes.boolean("output_mean_var", False):
        raise step.refused("it has output_mean_var")
    # MXNet has one gamma and one beta for each group, not for each channel.
    scale, shift = (step.reshape(step.parameter(index, (groups,)), [groups, 1]) for index in (1, 2))
    grouped = step.reshape(data, [0, groups, -1])
    standard = _standardised(step, grouped, [2], step.attributes.number("eps", 1e-5))
    scaled = step.add("Add", step.add("Mul", standard, scale), shift)
    return step.reshape(scaled, [0, *step.lengths(data, range(1, data.rank))])


def _standardised(step: Step, data: Tensor, axes: list[int], eps: float) -> Tensor:
    where = step.integers(axes)
    centred = step.add("Sub", data, step.add("ReduceMean", data, where, keepdims=1))
    variance = step.add("ReduceMean", step.add("Mul", centred, centred), where, keepdims=1)
    return step.add("Div", centred, _root(step, variance, eps))


def batch_dot(step: Step) -> Tensor:
    operands = []
    for index, name in enumerate(("transpose_a", "transpose_b")):
        tensor = step.like_data(step.input(index))
        if tensor.rank not in (2, 3):
            raise step.refused(f"an input has {tensor.rank} dimensions")
        if step.attributes.boolean(name, False):
            tensor = step.add("Transpose", tensor, perm=[1, 0] if tensor.rank == 2 else [0, 2, 1])
        operands.append(tensor)
    return step.add("MatMul", *operands)


def dot(step: Step) -> Tensor:
    if step.data.rank != 2 or step.input(1).rank != 2:
        raise step.refused("an input has not two dimensions")
    return batch_dot(step)


REDUCTIONS: dict[str, Translate] = {
    **dict.fromkeys(("SoftmaxOutput", "Softmax"), softmax_output),
    "SoftmaxActivation": softmax_activation,
    "softmax": _softmax("Softmax"),
    "log_softmax": _softmax("LogSoftmax"),
    "softmin": _softmax("Softmax", negated=True),
    "mean": _reduction("ReduceMean"),
    "prod": _reduction("ReduceProd"),
    **dict.fromkeys(("sum", "sum_axis"), _reduction("ReduceSum")),
    **dict.fromkeys(("max", "max_axis"), _reduction("ReduceMax")),
    **dict.fromkeys(("min", "min_axis"), _reduction("ReduceMin")),
    "norm": norm,
    "argmax": argmax,
    "argmin": argmin,
    "argmax_channel": argmax_channel,
    "topk": top_k,
    "pick": pick,
    "one_hot": one_hot,
    "L2Normalization": l2_normalization,
    "LRN": local_response,
    "InstanceNorm": instance_norm,
    "LayerNorm": layer_norm,
    "GroupNorm": group_norm,
    "batch_dot": batch_dot,
    "dot": dot,
}
