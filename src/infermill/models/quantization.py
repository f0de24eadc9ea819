"""A network in int8: QDQ pairs where values go into a node that computes, and none around what is kept in float.

    x ─► Q ─► DQ ─► Conv ─► Relu ─► Q ─► DQ ─► Conv ─► … ─► Gemm ─► logits
                     ▲ DQ ◄─ weights in 7 bits, per channel

Weights have 7 of their 8 bits. A processor without VNNI adds two products of 8 bits in 16, where they saturate: with 8
bits, a network would answer otherwise there than on a processor that has it. Evidence must hold on the next machine,
too, and 7 bits never saturate.

What is quantized are inputs, and not outputs: a network's own output stays float, and there is no rounding between a
convolution and its activation. A node is then kept in float by giving it its float inputs again: everything is
quantized once, and each choice of nodes is a cheap copy.
"""

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from infermill.errors import ModelError
from infermill.models.executable import executable
from infermill.models.model import Model
from infermill.models.onnx import DTYPES, inferred, read_network

# From its import on, ONNX Runtime sends events to Microsoft, and leaves a device id in the home directory.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

Batch = NDArray[Any]
BATCH_SIZE = 8
COMPUTING = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# What lies between those and can take bytes; a Relu and a Clip are part of what is before them, in both runtimes.
JOINING = ("Add", "Mul", "LeakyRelu", "GlobalAveragePool", "AveragePool", "MaxPool", "Concat", "Resize", "Pad", "Split")
PASSING = ("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice")
QUANTIZED_OPS = (
    "QuantizeLinear",
    "DynamicQuantizeLinear",
    "QLinearConv",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
)
_OPTIONS = {
    "OpTypesToExcludeOutputQuantization": [*COMPUTING, *JOINING, *PASSING],
    "ForceQuantizeNoInputCheck": True,
}
# What onnxruntime.quantization raises on graphs that it does not expect.
_FAILURES = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, NotImplementedError, AssertionError)


@dataclass(frozen=True, slots=True)
class Quantized:
    """A network in float, with its BatchNorms folded, and all of it in int8.

    `nodes` can be kept in float, in topological order; what only reshapes values for them then goes with them. `macs`
    are the multiplications of each node that computes, for one input, and empty where shapes cannot be told.
    """

    floating: onnx.ModelProto
    int8: onnx.ModelProto
    nodes: tuple[str, ...]
    macs: dict[str, int]

    def keeping(self, kept: Iterable[str]) -> onnx.ModelProto:
        """The network in int8, with these nodes in float."""
        model = onnx.ModelProto()
        model.CopyFrom(self.int8)
        wanted = self._with_passing(set(kept))
        inputs = {node.name: node.input for node in self.floating.graph.node if node.name in wanted}
        for node in model.graph.node:
            if node.name in inputs:
                node.input[:] = inputs[node.name]
        weights = {tensor.name for tensor in model.graph.initializer}
        model.graph.initializer.extend(
            tensor for tensor in self.floating.graph.initializer if tensor.name not in weights
        )
        _prune(model.graph)
        return model

    def _with_passing(self, kept: set[str]) -> set[str]:
        """These nodes, and those that pass values on to them alone."""
        in_int8 = set(self.nodes) - kept
        needed: set[str] = set()
        for node in reversed(self.floating.graph.node):
            is_passing = node.op_type in PASSING and needed.intersection(node.output)
            if node.name in in_int8 or is_passing:
                needed.update(node.input)
            elif node.op_type in PASSING:
                kept = kept | {node.name}
        return kept

    def int8_share(self, kept: Iterable[str]) -> float | None:
        """The part of all multiplications that is in int8 when these nodes are in float; None where it is not known."""
        if not self.macs:
            return None
        done = set(self.nodes) - set(kept)
        return sum(macs for name, macs in self.macs.items() if name in done) / sum(self.macs.values())


def _prune(graph: onnx.GraphProto) -> None:
    """Take out the nodes and weights whose values nobody uses any more."""
    used = {output.name for output in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if used.intersection(node.output):
            used.update(node.input)
            for attribute in node.attribute:
                used.update(name for inner in attribute.g.node for name in inner.input)
            nodes.append(node)
    weights = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(nodes))
    graph.initializer.extend(weights)


def check_quantizable(model: Model) -> None:
    """Raise where a network cannot be quantized, as far as it is known before anything is run.

    Raises:
        ModelError: it is quantized already, has nothing that can be, or is not in fp32.
    """
    network = read_network(model.network)
    operators = {node.op_type for node in network.graph.node}
    if found := sorted(operators.intersection(QUANTIZED_OPS)):
        raise ModelError(
            f"{model.card.files.network} is quantized already: it has {found[0]}",
            "give the network that it was made from",
        )
    if not operators.intersection(COMPUTING):
        raise ModelError(
            f"{model.card.files.network} has no {', '.join(COMPUTING[:-1])} or {COMPUTING[-1]}, so that int8 would not "
            "make it faster",
            "run it as it is",
        )
    kinds = {DTYPES.get(tensor.data_type, "undefined") for tensor in network.graph.initializer}
    if halves := kinds & {"float16", "bfloat16", "float64"}:
        raise ModelError(
            f"{model.card.files.network} has weights in {halves.pop()}, which are not quantized", "export it in float32"
        )


def quantize_network(model: Model, rows: Iterable[NDArray[np.generic]]) -> Quantized:
    """Quantize all of a network, with the ranges of its values that `rows` show.

    Args:
        model: the network in fp32.
        rows: inputs as a job decodes them, one by one: images uint8 [height, width, 3], or tensors.

    Raises:
        ModelError: onnxruntime cannot quantize the network.

    Example:
        >>> quantized = quantize_network(model, rows)  # doctest: +SKIP
        >>> quantized.int8_share(())  # doctest: +SKIP
        1.0
    """
    from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    failures = (*_FAILURES, ort_errors.Fail, ort_errors.InvalidGraph, ort_errors.NotImplemented)
    with tempfile.TemporaryDirectory(prefix="infermill-") as folder:
        folded, written = Path(folder, "folded.onnx"), Path(folder, "int8.onnx")
        try:
            quant_pre_process(str(model.network), str(folded), skip_symbolic_shape=True)
            floating = read_network(folded)
            _name_nodes(floating)
            onnx.save(floating, folded)
            nodes = _quantizable(floating)
            quantize_static(
                str(folded), str(written), _reader(replace(model, network=folded), rows), QuantFormat.QDQ,
                op_types_to_quantize=[*COMPUTING, *JOINING, *PASSING], nodes_to_quantize=nodes, per_channel=True,
                reduce_range=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                extra_options=_OPTIONS,
            )  # fmt: skip
            int8 = read_network(written)
        except failures as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ModelError(
                f"onnxruntime cannot quantize {model.card.files.network}: {reason}",
                "export it for inference, and again",
            ) from None
    _rename_biases(floating.graph, int8.graph)
    passing = {node.name for node in floating.graph.node if node.op_type in PASSING}
    return Quantized(floating, int8, tuple(name for name in nodes if name not in passing), _macs(floating, model))


def _rename_biases(floating: onnx.GraphProto, int8: onnx.GraphProto) -> None:
    """Tell a bias out of a DequantizeLinear from the float one, whose name it has."""
    weights = {tensor.name for tensor in floating.initializer}
    renamed = {name: f"{name}_dequantized" for node in int8.node for name in node.output if name in weights}
    for node in int8.node:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]


def _name_nodes(model: onnx.ModelProto) -> None:
    """Give each node a name of its own: that is what `nodes_to_quantize` tells them apart by."""
    taken: set[str] = set()
    for number, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{number}"
        while node.name in taken:
            node.name += "_"
        taken.add(node.name)


def _quantizable(model: onnx.ModelProto) -> list[str]:
    """The nodes that can be in int8: those that compute, and what lies between two of them.

    What is in front of the first one is preprocessing, and what is behind the last one is small: both stay exact.
    """
    below: set[str] = set()
    for node in model.graph.node:
        if node.op_type in COMPUTING or below.intersection(node.input):
            below.update(node.output)
    above: set[str] = set()
    nodes = []
    for node in reversed(model.graph.node):
        is_between = below.intersection(node.input) and above.intersection(node.output)
        if node.op_type in COMPUTING or (is_between and node.op_type in (*JOINING, *PASSING)):
            nodes.append(node.name)
        if node.op_type in COMPUTING or above.intersection(node.output):
            above.update(node.input)
    return nodes[::-1]


class _Reader:
    """A `CalibrationDataReader`: what the network is fed in a job, batch by batch."""

    def __init__(self, name: str, feed: Callable[[Batch], Batch], batches: Iterator[Batch]) -> None:
        self._name, self._feed, self._batches = name, feed, batches

    def get_next(self) -> dict[str, Batch] | None:
        batch = next(self._batches, None)
        return None if batch is None else {self._name: self._feed(batch)}


def _reader(model: Model, rows: Iterable[NDArray[np.generic]]) -> _Reader:
    """The rows, after the preprocessing that the executable graph has in front of the network."""
    import onnxruntime as ort

    source = next(iter(_sources(read_network(model.network).graph)))
    with executable(model) as graph:
        batches = _batches(rows, graph.fixed_batch)
        if model.card.preprocess is None:
            return _Reader(source.name, lambda batch: batch, batches)
        front = (
            onnx.load(graph.network) if isinstance(graph.network, Path) else onnx.ModelProto.FromString(graph.network)
        )
    last = next(at for at, node in enumerate(front.graph.node) if source.name in node.output)
    del front.graph.node[last + 1 :], front.graph.output[:], front.graph.initializer[:], front.graph.value_info[:]
    front.graph.output.append(source)
    session = ort.InferenceSession(front.SerializeToString(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return _Reader(source.name, lambda batch: session.run(None, {name: batch})[0], batches)


def _sources(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto]:
    """The inputs of a graph that are no weights."""
    weights = {tensor.name for tensor in graph.initializer}
    return (value for value in graph.input if value.name not in weights)


def _batches(rows: Iterable[NDArray[np.generic]], fixed: int | None) -> Iterator[Batch]:
    """Batches of the only length that the network takes, if it has one; the last row then fills what is missing."""
    size, pending = fixed or BATCH_SIZE, list[NDArray[np.generic]]()
    for row in rows:
        pending.append(row)
        if len(pending) == size:
            yield np.stack(pending)
            pending.clear()
    if pending:
        yield np.stack([*pending, *[pending[-1]] * ((fixed or len(pending)) - len(pending))])


def _macs(floating: onnx.ModelProto, model: Model) -> dict[str, int]:
    """Multiplications of each node that computes, for one input; empty where a shape cannot be told."""
    sized = onnx.ModelProto()
    sized.CopyFrom(floating)
    height_width = model.card.height_width or (0, 0)
    is_last = model.card.input.layout == "NHWC"
    sizes = (1, *height_width, 0) if is_last else (1, 0, *height_width)
    batch = 1
    for value in _sources(sized.graph):
        dims = value.type.tensor_type.shape.dim
        for dim, size in zip(dims, sizes, strict=False):
            dim.dim_value = dim.dim_value or size
        batch = dims[0].dim_value if dims else 1
    del sized.graph.value_info[:]
    graph = inferred(sized).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.output, *graph.input):
        shapes[value.name] = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    macs = {node.name: _macs_of(node, shapes) // batch for node in graph.node if node.op_type in COMPUTING}
    return macs if all(macs.values()) else {}


def _macs_of(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    """Multiplications of a node: those for each number that it gives, or for ConvTranspose that it takes."""
    source, weight, result = (shapes.get(name, (0,)) for name in (*node.input[:2], node.output[0]))
    if node.op_type == "Conv":
        return math.prod(result) * math.prod(weight[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(source) * math.prod(weight[1:])
    is_turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return math.prod(result) * (weight[-1] if is_turned else weight[-2:][0])
