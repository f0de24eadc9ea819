"""Makers of small, seeded ONNX networks whose answers depend on the picture."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from infermill.models.card import ModelCard, Preprocess

Layout = Literal["NCHW", "NHWC"]
Dtype = Literal["float32", "float16", "uint8"]
ELEMENT_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "uint8": TensorProto.UINT8}
FILTERS, GRID = 8, 4


class Network:
    """Collects nodes and weights; the name of a node's output is returned."""

    def __init__(self, dtype: str = "float32", seed: int = 0) -> None:
        self.dtype = np.dtype(dtype)
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def node(self, op: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        name = name or f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name, **attributes))
        return name

    def weight(self, values: NDArray[np.floating]) -> str:
        name = f"weight{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(values.astype(self.dtype), name))
        return name

    def gemm(self, source: str, inside: int, outside: int, name: str = "") -> str:
        weight = self.weight(self.random.normal(0, 2 / np.sqrt(inside), (inside, outside)))
        bias = self.weight(self.random.normal(0, 0.1, outside))
        return self.node("Gemm", source, weight, bias, name=name)

    def save(
        self,
        path: Path,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        *,
        opset: int = 17,
        ir_version: int = 8,
        external_data: bool = False,
    ) -> Path:
        if ir_version < 4:
            weights = [helper.make_tensor_value_info(w.name, w.data_type, w.dims) for w in self.weights]
            inputs = [*inputs, *weights]
        graph = helper.make_graph(self.nodes, path.stem, inputs, outputs, self.weights)
        opsets = [helper.make_operatorsetid("", opset)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, producer_name="tests")
        location = f"{path.name}.data"
        path.with_name(location).unlink(missing_ok=True)
        onnx.save_model(model, path, save_as_external_data=external_data, location=location, size_threshold=0)
        return path


def _image(size: int | None, batch: int | None, layout: Layout, dtype: str, channels: int) -> onnx.ValueInfoProto:
    height, width = ("height", "width") if size is None else (size, size)
    dims = [channels, height, width] if layout == "NCHW" else [height, width, channels]
    return helper.make_tensor_value_info("images", ELEMENT_TYPES[dtype], ["N" if batch is None else batch, *dims])


def _features(net: Network, size: int | None, layout: Layout, dtype: str, channels: int) -> tuple[str, int]:
    """The features of each picture, and how many they are: of a 4x4 grid, or of the whole where the size is open."""
    tip = "images"
    if layout == "NHWC":
        tip = net.node("Transpose", tip, perm=[0, 3, 1, 2])
    if dtype == "uint8":
        tip = net.node("Cast", tip, to=TensorProto.FLOAT)
        tip = net.node("Mul", tip, net.weight(np.array(1 / 255)))
    kernel = net.weight(net.random.normal(0, 0.5, (FILTERS, channels, 3, 3)))
    tip = net.node("Relu", net.node("Conv", tip, kernel, pads=[1] * 4, strides=[2, 2]))
    if size is None:
        return net.node("Flatten", net.node("GlobalAveragePool", tip)), FILTERS
    cell = size // 2 // GRID
    tip = net.node("AveragePool", tip, kernel_shape=[cell, cell], strides=[cell, cell])
    return net.node("Flatten", tip), FILTERS * GRID * GRID


def tiny_classifier(
    path: Path,
    classes: int = 10,
    size: int | None = 32,
    *,
    batch: int | None = None,
    layout: Layout = "NCHW",
    dtype: Dtype = "float32",
    channels: int = 3,
    softmax: bool = False,
    external_data: bool = False,
    nan_on_black: bool = False,
    output_shape: Sequence[int | str] | None = None,
    opset: int = 17,
    ir_version: int = 8,
    seed: int = 0,
) -> Path:
    """Input `images`, output `logits` [N, classes], or `probabilities` with `softmax`.

    It is made for inputs of 0..1 (uint8: 0..255). With `nan_on_black` the answer is NaN where the mean of the
    input is below 0.01. `output_shape` is declared instead of [N, classes]; where it ends in 1x1, so do the answers.
    """
    net = Network("float32" if dtype == "uint8" else dtype, seed)
    tip, count = _features(net, size, layout, dtype, channels)
    tip = net.gemm(tip, count, classes, name="" if softmax or nan_on_black or output_shape else "logits")
    if nan_on_black:
        brightness = net.node("ReduceMean", "images", axes=[1, 2, 3], keepdims=0)
        excess = net.node("Sub", brightness, net.weight(np.array(0.01)))
        factor = net.node("Reshape", net.node("Sqrt", excess), _shape(net, [-1, 1]))
        tip = net.node("Mul", tip, factor, name="" if softmax or output_shape else "logits")
    if softmax:
        tip = net.node("Softmax", tip, axis=1, name="" if output_shape else "probabilities")
    shape = list(output_shape or ["N" if batch is None else batch, classes])
    if output_shape:
        target = [0 if isinstance(dim, str) else dim for dim in output_shape]
        tip = net.node("Reshape", tip, _shape(net, target), name="probabilities" if softmax else "logits")
    output = helper.make_tensor_value_info(tip, ELEMENT_TYPES[str(net.dtype)], shape)
    image = _image(size, batch, layout, dtype, channels)
    return net.save(path, [image], [output], opset=opset, ir_version=ir_version, external_data=external_data)


def _shape(net: Network, shape: list[int]) -> str:
    name = f"shape{len(net.weights)}"
    net.weights.append(numpy_helper.from_array(np.array(shape, np.int64), name))
    return name


def tiny_embedding(path: Path, dimensions: int = 16, size: int = 32, seed: int = 0) -> Path:
    """Input `images` float32 NCHW of 0..1, output `embedding` [N, dimensions]."""
    net = Network(seed=seed)
    tip, count = _features(net, size, "NCHW", "float32", 3)
    tip = net.gemm(tip, count, dimensions, name="embedding")
    output = helper.make_tensor_value_info(tip, TensorProto.FLOAT, ["N", dimensions])
    return net.save(path, [_image(size, None, "NCHW", "float32", 3)], [output])


def tiny_tabular(
    path: Path,
    shape: Sequence[int | str | None] = (6,),
    classes: int = 4,
    *,
    batch: int | None = None,
    dtype: str = "float32",
    output: str = "logits",
    seed: int = 0,
) -> Path:
    """Input `rows` [N, *shape] of any type, output [N, classes]: a linear function of the numbers in a row."""
    net = Network("float16" if dtype == "float16" else "float32", seed)
    tip = "rows" if dtype in ("float32", "float16") else net.node("Cast", "rows", to=TensorProto.FLOAT)
    inside = math.prod(dim for dim in shape if isinstance(dim, int))
    tip = net.node("Reshape", tip, _shape(net, [-1, inside]))
    net.gemm(tip, inside, classes, name=output)
    first = "N" if batch is None else batch
    element_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    rows = helper.make_tensor_value_info("rows", element_type, [first, *shape])
    return net.save(
        path, [rows], [helper.make_tensor_value_info(output, ELEMENT_TYPES[str(net.dtype)], [first, classes])]
    )


def preprocess_of(card: ModelCard) -> Preprocess:
    """The preprocessing of a card that takes images."""
    assert card.preprocess is not None
    return card.preprocess


def tiny_raw(path: Path, size: int = 32, seed: int = 0) -> Path:
    """Input `images` float32 NCHW of 0..1, outputs `boxes` float32 [N, 5, 4] and `kind` int64 [N]."""
    net = Network(seed=seed)
    tip, count = _features(net, size, "NCHW", "float32", 3)
    boxes = net.node("Reshape", net.gemm(tip, count, 20), _shape(net, [-1, 5, 4]), name="boxes")
    kind = net.node("ArgMax", net.gemm(tip, count, 6), axis=1, keepdims=0, name="kind")
    outputs = [
        helper.make_tensor_value_info(boxes, TensorProto.FLOAT, ["N", 5, 4]),
        helper.make_tensor_value_info(kind, TensorProto.INT64, ["N"]),
    ]
    return net.save(path, [_image(size, None, "NCHW", "float32", 3)], outputs)


def pictures(count: int, size: int = 32, seed: int = 0) -> NDArray[np.uint8]:
    """Seeded uint8 RGB pictures [count, size, size, 3] of coarse patches, so that they differ clearly."""
    patches = np.random.default_rng(seed).integers(0, 256, (count, GRID, GRID, 3), np.uint8)
    return patches.repeat(size // GRID, axis=1).repeat(size // GRID, axis=2)
