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
from infermill.types import DetectionFormat

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
    classes_hidden: bool = False,
    opset: int = 17,
    ir_version: int = 8,
    seed: int = 0,
) -> Path:
    """Input `images`, output `logits` [N, classes], or `probabilities` with `softmax`.

    It is made for inputs of 0..1 (uint8: 0..255). With `nan_on_black` the answer is NaN where the mean of the
    input is below 0.01. `output_shape` is declared instead of [N, classes]; where it ends in 1x1, so do the answers.
    With `classes_hidden`, the output is `shown`, and only running it tells how many classes there are.
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
    shape: list[int | str] = list(output_shape or ["N" if batch is None else batch, classes])
    if classes_hidden:
        nothing = net.node("Mul", net.node("ReduceMax", "images", axes=[0, 1, 2, 3]), net.weight(np.array(0)))
        all_of = net.node("Add", net.node("Reshape", nothing, _shape(net, [1])), net.weight(np.array([classes])))
        end = net.node("Cast", all_of, to=TensorProto.INT64)
        tip, shape = net.node("Slice", tip, _shape(net, [0]), end, _shape(net, [1]), name="shown"), ["N", "C"]
    if output_shape:
        target = [0 if isinstance(dim, str) else dim for dim in output_shape]
        tip = net.node("Reshape", tip, _shape(net, target), name="probabilities" if softmax else "logits")
    output = helper.make_tensor_value_info(tip, ELEMENT_TYPES[str(net.dtype)], shape)
    image = _image(size, batch, layout, dtype, channels)
    return net.save(path, [image], [output], opset=opset, ir_version=ir_version, external_data=external_data)


def tiny_unanswered(path: Path) -> Path:
    """`tiny_classifier`, less its answers: it ends in the logarithm of what is below 0, and so in NaN."""
    model = onnx.load(tiny_classifier(path))
    model.graph.node[-1].output[0] = "scores"
    for op, before, after in (("Abs", "scores", "size"), ("Neg", "size", "below"), ("Log", "below", "logits")):
        model.graph.node.append(helper.make_node(op, [before], [after], op.lower()))
    onnx.save(model, path)
    return path


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


def tiny_quantised(path: Path, bits: Literal[8, 16] = 8) -> Path:
    """`tiny_classifier` with QuantizeLinear and DequantizeLinear around its layers, as ONNX Runtime puts them there."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Pictures(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rows = iter(pictures(8).transpose(0, 3, 1, 2).astype(np.float32)[:, None] / 255)

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            rows = next(self._rows, None)
            return None if rows is None else {"images": rows}

    source = tiny_classifier(path.with_name("float.onnx"), opset=21)
    # 7 bits for weights: without VNNI, sums of products of 8 bits overflow.
    quantize_static(
        source,
        path,
        Pictures(),
        activation_type=QuantType.QUInt8 if bits == 8 else QuantType.QUInt16,
        weight_type=QuantType.QInt8,
        reduce_range=True,
    )
    return path


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


def tiny_detector(
    path: Path,
    box_format: DetectionFormat,
    size: int = 64,
    *,
    count: bool = False,
    normalized_yxyx: bool = False,
    nan_on_black: bool = False,
    dtype: Dtype = "float32",
    producer: str = "tests",
) -> Path:
    """Input `images` NCHW of 0..1. Finds what is bright in red (class 0) and what is bright in green (class 1), each
    with its brightness as the score, and once more 1 pixel to the right with 0.9 of that.
    """
    net = Network(dtype)
    spot, boxes = _bright_boxes(net, size)
    if nan_on_black:
        brightness = net.node("ReduceMean", "images", axes=[1, 2, 3], keepdims=0)
        doubt = net.node("Mul", net.node("Sqrt", net.node("Sub", brightness, _constant(net, 0.01))), _constant(net, 0))
        spot = net.node("Add", spot, net.node("Reshape", doubt, _shape(net, [-1, 1])))
    scores = net.node("Concat", spot, net.node("Mul", spot, _constant(net, 0.9)), axis=1)  # [N, 4]
    shifted = net.node("Add", boxes, _constant(net, [1, 0, 1, 0]))
    boxes = net.node("Concat", boxes, shifted, axis=1)  # [N, 4, 4]
    outputs = _written(net, box_format, size, scores, boxes, normalized_yxyx=normalized_yxyx)
    if count:
        ones = net.node("Greater", scores, _constant(net, 0))
        number = net.node("ReduceSum", net.node("Cast", ones, to=ELEMENT_TYPES[dtype]), _shape(net, [1]), keepdims=0)
        outputs.append((net.node("Identity", number, name="num_detections"), ["N"]))
    values = [helper.make_tensor_value_info(name, ELEMENT_TYPES[dtype], shape) for name, shape in outputs]
    path = net.save(path, [_image(size, None, "NCHW", dtype, 3)], values)
    model = onnx.load(path)
    model.producer_name = producer
    onnx.save(model, path)
    return path


def _constant(net: Network, values: Any) -> str:
    return net.weight(np.array(values))


def _bright_boxes(net: Network, size: int) -> tuple[str, str]:
    """How bright red and green are where they are bright [N, 2], and the corners of that [N, 2, 4]."""
    colours = net.node("Slice", "images", _shape(net, [0]), _shape(net, [2]), _shape(net, [1]))
    mask = net.node("Cast", net.node("Greater", colours, _constant(net, 0.5)), to=ELEMENT_TYPES[str(net.dtype)])
    spot = net.node("ReduceMax", net.node("Mul", colours, mask), axes=[2, 3], keepdims=0)
    sides = []
    for reduced_axis in (2, 3):  # columns, then rows
        line = net.node("ReduceMax", mask, axes=[reduced_axis], keepdims=0)
        far = net.node("Mul", net.node("Sub", _constant(net, 1), line), _constant(net, 1000))
        first = net.node("ReduceMin", net.node("Add", far, _constant(net, np.arange(size))), axes=[2], keepdims=1)
        last = net.node("ReduceMax", net.node("Mul", line, _constant(net, np.arange(size) + 1)), axes=[2], keepdims=1)
        sides.append((first, last))
    (left, right), (top, bottom) = sides
    return spot, net.node("Concat", left, top, right, bottom, axis=2)


def _written(
    net: Network, box_format: DetectionFormat, size: int, scores: str, boxes: str, *, normalized_yxyx: bool
) -> list[tuple[str, list[int | str]]]:
    """The outputs of a format, and their shapes."""
    column = net.node("Reshape", scores, _shape(net, [-1, 4, 1]))
    zeros = net.node("Mul", column, _constant(net, 0))
    classes = net.node("Add", zeros, _constant(net, [[0], [1], [0], [1]]))
    if box_format == "boxes-labels-scores":
        if normalized_yxyx:
            swapped = net.node("Gather", boxes, _shape(net, [1, 0, 3, 2]), axis=2)
            boxes = net.node("Div", swapped, _constant(net, size))
        net.node("Identity", boxes, name="detection_boxes" if normalized_yxyx else "boxes")
        net.node("Reshape", classes, _shape(net, [-1, 4]), name="labels")
        net.node("Identity", scores, name="scores")
        return [(net.nodes[-3].output[0], ["N", 4, 4]), ("labels", ["N", 4]), ("scores", ["N", 4])]
    if box_format == "mxnet-ssd":
        nothing = net.node("Cast", net.node("Equal", column, _constant(net, 0)), to=ELEMENT_TYPES[str(net.dtype)])
        classes = net.node("Sub", classes, net.node("Mul", nothing, _constant(net, 2)))
        boxes = net.node("Div", boxes, _constant(net, size))
        return [(net.node("Concat", classes, column, boxes, axis=2, name="detections"), ["N", 4, 6])]
    if box_format == "yolov10":
        return [(net.node("Concat", boxes, column, classes, axis=2, name="output0"), ["N", 4, 6])]
    if box_format == "boxes-scores":
        others = net.node("Sub", _constant(net, 1), classes)
        net.node("Identity", boxes, name="boxes")
        net.node("Mul", column, net.node("Concat", others, classes, axis=2), name="scores")
        return [("boxes", ["N", 4, 4]), ("scores", ["N", 4, 2])]
    to_centre = np.array([[0.5, 0, -1, 0], [0, 0.5, 0, -1], [0.5, 0, 1, 0], [0, 0.5, 0, 1]])
    boxes = net.node("MatMul", boxes, _constant(net, to_centre))
    one_hot = net.node("Concat", net.node("Sub", _constant(net, 1), classes), classes, axis=2)
    if box_format == "yolov5":
        return [(net.node("Concat", boxes, column, one_hot, axis=2, name="output0"), ["N", 4, 7])]
    rows = net.node("Concat", boxes, net.node("Mul", column, one_hot), axis=2)
    return [(net.node("Transpose", rows, perm=[0, 2, 1], name="output0"), ["N", 6, 4])]


def pictures(count: int, size: int = 32, seed: int = 0) -> NDArray[np.uint8]:
    """Seeded uint8 RGB pictures [count, size, size, 3] of coarse patches, so that they differ clearly."""
    patches = np.random.default_rng(seed).integers(0, 256, (count, GRID, GRID, 3), np.uint8)
    return patches.repeat(size // GRID, axis=1).repeat(size // GRID, axis=2)
