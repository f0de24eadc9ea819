"""Layers with weights: convolutions, fully connected layers, normalisation by statistics of training, embeddings."""

import math
from collections.abc import Sequence

import numpy as np

from infermill.models.mxnet.graph import Step, Tensor, Translate

LAYOUTS = ("None", "NCW", "NCHW", "NCDHW", "NWC", "NHWC", "NDHWC")


def to_channels_first(step: Step, tensor: Tensor, layout: str) -> Tensor:
    """The tensor with the channels as its second axis, where `layout` has them last."""
    if not layout.endswith("C"):
        return tensor
    return step.add("Transpose", tensor, perm=[0, tensor.rank - 1, *range(1, tensor.rank - 1)])


def from_channels_first(step: Step, tensor: Tensor, layout: str) -> Tensor:
    """The opposite of `to_channels_first`."""
    if not layout.endswith("C"):
        return tensor
    return step.add("Transpose", tensor, perm=[0, *range(2, tensor.rank), 1])


def channels(step: Step, tensor: Tensor) -> int:
    """How many channels a tensor has that has them first."""
    if tensor.rank < 2:
        raise step.refused(f"its input has {tensor.rank} dimensions, and no channels")
    return step.lengths(tensor, [1])[0]


def per_axis(step: Step, name: str, default: int, kernel: Sequence[int]) -> tuple[int, ...]:
    """An attribute with one integer for each axis of the kernel, none of them less than its default."""
    values = step.attributes.integers(name, (default,) * len(kernel))
    if len(values) != len(kernel):
        raise step.refused(f"its kernel is {tuple(kernel)}, and `{name}` is {values}")
    if any(value < default for value in values):
        raise step.refused(f"its `{name}` is {values}")
    return values


def convolution(step: Step) -> Tensor:
    attributes = step.attributes
    kernel, filters = attributes.integers("kernel"), attributes.integer("num_filter")
    layout, groups = attributes.choice("layout", LAYOUTS, "None"), attributes.integer("num_group", 1)
    data = to_channels_first(step, step.data, layout)
    inside = channels(step, data) // max(groups, 1)
    if layout.endswith("C"):
        weight = step.parameter(1, (filters, *kernel, inside))
        weight = step.add("Transpose", weight, perm=[0, weight.rank - 1, *range(1, weight.rank - 1)])
    else:
        weight = step.parameter(1, (filters, inside, *kernel))
    bias = None if attributes.boolean("no_bias", False) else step.parameter(2, (filters,))
    result = step.add(
        "Conv",
        data,
        weight,
        bias,
        kernel_shape=kernel,
        strides=per_axis(step, "stride", 1, kernel),
        dilations=per_axis(step, "dilate", 1, kernel),
        pads=per_axis(step, "pad", 0, kernel) * 2,
        group=groups,
    )
    return from_channels_first(step, result, layout)


def deconvolution(step: Step) -> Tensor:
    attributes = step.attributes
    kernel, filters = attributes.integers("kernel"), attributes.integer("num_filter")
    layout, groups = attributes.choice("layout", LAYOUTS, "None"), attributes.integer("num_group", 1)
    if layout.endswith("C"):
        raise step.refused(f"its layout is {layout}")
    inside = channels(step, step.data)
    weight = step.parameter(1, (inside, filters // max(groups, 1), *kernel))
    bias = None if attributes.boolean("no_bias", True) else step.parameter(2, (filters,))
    stride, dilate = per_axis(step, "stride", 1, kernel), per_axis(step, "dilate", 1, kernel)
    pads, adj = per_axis(step, "pad", 0, kernel), per_axis(step, "adj", 0, kernel)
    target = attributes.integers("target_shape", ())
    # (0, 0) is how older versions print that there is none.
    if any(target):
        lengths = step.lengths(step.data, range(2, step.data.rank))
        total = [
            s * (length - 1) + d * (k - 1) + 1 - t
            for s, length, d, k, t in zip(stride, lengths, dilate, kernel, target, strict=True)
        ]
        if min(total) < 0:
            raise step.refused(f"its target_shape {target} is too large")
        pads, adj = tuple((value + 1) // 2 for value in total), tuple(value % 2 for value in total)
    # The output grows at the end: by less padding, as long as there is some.
    less = [min(pad, extra) for pad, extra in zip(pads, adj, strict=True)]
    return step.add(
        "ConvTranspose",
        step.data,
        weight,
        bias,
        kernel_shape=kernel,
        strides=stride,
        dilations=dilate,
        pads=[*pads, *(pad - cut for pad, cut in zip(pads, less, strict=True))],
        output_padding=[extra - cut for extra, cut in zip(adj, less, strict=True)],
        group=groups,
    )


def fully_connected(step: Step) -> Tensor:
    hidden = step.attributes.integer("num_hidden")
    no_bias, data = step.attributes.boolean("no_bias", False), step.data
    if not step.attributes.boolean("flatten", True) and data.rank > 2:
        weight = step.parameter(1, (hidden, *step.lengths(data, [-1])))
        product = step.add("MatMul", data, step.add("Transpose", weight, perm=[1, 0]))
        return product if no_bias else step.add("Add", product, step.parameter(2, (hidden,)))
    if data.rank != 2:
        data = step.add("Flatten", data, axis=1)
    weight = step.parameter(1, (hidden, *step.lengths(data, [1])))
    return step.add("Gemm", data, weight, None if no_bias else step.parameter(2, (hidden,)), transB=1)


def batch_norm(step: Step) -> dict[str, Tensor]:
    attributes = step.attributes
    axis = step.axis(attributes.integer("axis", 1), step.data.rank)
    eps = attributes.number("eps", 1e-3)
    shape = tuple(step.lengths(step.data, [axis]))
    gamma, beta, mean, variance = (_statistics(step, index, shape) for index in range(1, 5))
    if attributes.boolean("fix_gamma", True):
        gamma = step.constant(np.ones(shape), np.float32)
    perm = [index for index in range(step.data.rank) if index != axis]
    perm.insert(1, axis)
    moved = axis != 1
    # Of float16 MXNet, too, computes it in float32; OpenVINO takes no data of another type than the statistics.
    data = step.cast(step.data, np.float32)
    data = step.add("Transpose", data, perm=perm) if moved else data
    result = step.add("BatchNormalization", data, gamma, beta, mean, variance, epsilon=eps)
    if moved:
        result = step.add("Transpose", result, perm=np.argsort(perm).tolist())
    outputs = {"output": step.cast(result, step.data.dtype)}
    if attributes.boolean("output_mean_var", False):
        spread = step.add("Sqrt", step.add("Add", variance, step.number(eps, variance)))
        of_before = step.node.op == "BatchNorm_v1"
        outputs |= {"mean": mean, "var": variance if of_before else step.add("Reciprocal", spread)}
    return outputs


def _statistics(step: Step, index: int, shape: tuple[int, ...]) -> Tensor:
    return step.constant(step.values(index, shape), np.float32)


def embedding(step: Step) -> Tensor:
    rows, columns = step.attributes.integer("input_dim"), step.attributes.integer("output_dim")
    step.parameter(1, (rows, columns))
    return step.add("Gather", step.input(1), inside(step, step.data, rows))


def inside(step: Step, indices: Tensor, length: int) -> Tensor:
    """Indices as integers; what is outside of 0 to `length` is clipped, or counted on from the other end."""
    mode = step.attributes.choice("mode", ("clip", "wrap", "raise"), "clip")
    if mode == "raise":
        raise step.refused("its mode is `raise`, and ONNX cannot stop for an index")
    indices = step.cast(indices, np.int64)
    if mode == "wrap":
        return step.add("Mod", indices, step.integers(length))
    return step.add("Clip", indices, step.integers(0), step.integers(length - 1))


def upsampling(step: Step) -> Tensor:
    attributes = step.attributes
    scale = attributes.integer("scale")
    if attributes.choice("sample_type", ("nearest", "bilinear")) == "bilinear":
        count = channels(step, step.data)
        kernel, pad = 2 * scale - scale % 2, math.ceil((scale - 1) / 2)
        return step.add(
            "ConvTranspose",
            step.data,
            step.parameter(1, (count, 1, kernel, kernel)),
            kernel_shape=[kernel, kernel],
            strides=[scale, scale],
            pads=[pad] * 4,
            group=count,
        )
    target = [length * scale for length in step.lengths(step.data, [2, 3])]
    grown = [_nearest(step, tensor, target) for tensor in step.inputs]
    if len(grown) == 1:
        return grown[0]
    if attributes.choice("multi_input_mode", ("concat", "sum"), "concat") == "sum":
        return step.add("Sum", *grown)
    return step.add("Concat", *grown, axis=1)


def _nearest(step: Step, tensor: Tensor, target: list[int]) -> Tensor:
    lengths = step.lengths(tensor, [2, 3])
    if any(wanted % length for wanted, length in zip(target, lengths, strict=True)):
        raise step.refused(f"an input of {lengths} pixels cannot be repeated to {target}")
    scales = [1, 1, *(wanted / length for wanted, length in zip(target, lengths, strict=True))]
    return step.add(
        "Resize",
        tensor,
        None,
        step.constant(scales, np.float32),
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )


LAYERS: dict[str, Translate] = {
    "Convolution": convolution,
    "Convolution_v1": convolution,
    "Deconvolution": deconvolution,
    "FullyConnected": fully_connected,
    "BatchNorm": batch_norm,
    "BatchNorm_v1": batch_norm,
    "CuDNNBatchNorm": batch_norm,
    "_contrib_SyncBatchNorm": batch_norm,
    "Embedding": embedding,
    "UpSampling": upsampling,
}
