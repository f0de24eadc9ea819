"""The graph that the runtimes execute: the network, with its preprocessing in front where it takes images.

    uint8 NHWC RGB ─► Transpose ─► Gather ─► Cast ─► Mul ─► Add ─► the network ─► the outputs that are wanted
                      to NCHW      to BGR            scale  mean
                                                     /std   /std

Moving bytes is four times cheaper than moving floats, and a plane of NCHW is one block of memory: so the transposition
comes first and the order of colours second. With this order the preprocessing of ResNet-18 costs nothing that can
be measured on OpenVINO, and 0.2 of 22 ms on ONNX Runtime; with the transposition last 0.5 and 1.1 ms.
"""

import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from infermill.models.card import Input, Preprocess
from infermill.models.fit import check_network, chosen_outputs, tensor_shape
from infermill.models.model import Model
from infermill.models.onnx import (
    MAX_PROTOBUF_BYTES,
    Dim,
    TensorInfo,
    describe,
    external_tensors,
    load_weights,
    read_network,
)

# ITU-R 601 luminance in 16-bit fixed point, as Pillow's convert("L") has it (src/libImaging/Convert.c).
# Every number on the way is an integer below 2**24, which float32 holds exactly.
LUMINANCE, LUMINANCE_HALF, LUMINANCE_UNIT = (19595.0, 38470.0, 7471.0), 32768.0, 1 / 65536
_RESERVE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Executable:
    """A network that takes uint8 RGB images, or tensors as they are.

    `network` is the ONNX file's content, or its path where the weights are too large to be in it. `fixed_batch` is
    the only batch length that it takes, or None. `input_shape` and `input_dtype` are those of one row: for images,
    height, width and 3 of uint8.
    """

    network: bytes | Path
    fixed_batch: int | None
    input_shape: tuple[int, ...]
    input_dtype: str
    output_names: tuple[str, ...]
    precision: str
    "As `NetworkInfo.computed_in` says it."


@contextmanager
def executable(model: Model, max_bytes: int = MAX_PROTOBUF_BYTES) -> Iterator[Executable]:
    """The graph to load for `model`; its files, if it has any, are there until the context ends.

    Its one input is uint8 [N, height, width, 3] in RGB, or the network's own where the card has `preprocess: null`;
    its outputs are those that the card's task uses.

    Raises:
        ModelError: the network cannot be read, or does not fit the card.

    Example:
        >>> with executable(model) as graph:  # doctest: +SKIP
        ...     session = onnxruntime.InferenceSession(graph.network)
    """
    network = read_network(model.network)
    info = describe(network, model.network)
    check_network(model.card, model.labels, info)
    outputs = tuple(output.name for output in chosen_outputs(model.card, info))
    source, preprocess = info.inputs[0], model.card.preprocess
    batch = None if source.shape is None else source.shape[0]
    name, dtype = source.name, source.dtype
    if preprocess is None:
        shape = tensor_shape(source)
    else:
        shape, dtype = (*(preprocess.height_width or (0, 0)), 3), "uint8"
        name = _put_in_front(network.graph, model.card.input, preprocess, source)
    _set_input(network, name, dtype, ("batch" if batch is None else batch, *shape))
    _keep_outputs(network.graph, outputs)
    result = functools.partial(
        Executable,
        fixed_batch=batch if isinstance(batch, int) else None,
        input_shape=shape,
        input_dtype=dtype,
        output_names=outputs,
        precision=info.computed_in(model.card.precision),
    )
    externals = external_tensors(network, model.network)
    # The size on disk: protobuf has to serialise a message to know its size.
    if model.network.stat().st_size + sum(external.length for external in externals) + _RESERVE_BYTES <= max_bytes:
        load_weights(externals)
        yield result(network.SerializeToString())
        return
    with tempfile.TemporaryDirectory(prefix="infermill-") as folder:
        path = Path(folder, "infermill-executable.onnx")
        path.write_bytes(network.SerializeToString())
        for location, file in {external.location: external.file for external in externals}.items():
            _link_or_copy(file, Path(folder, location))
        yield result(path)


def _put_in_front(graph: onnx.GraphProto, card: Input, preprocess: Preprocess, image: TensorInfo) -> str:
    """Put preprocessing in front of the graph, and return the name of its input."""
    layout, dims = card.layout, image.shape or (None,) * 4
    front = _Front(_unused_prefix(graph))
    source = front.tip
    if dims[1 if layout == "NCHW" else 3] == 1:
        front.add_grey(preprocess, layout, image.dtype)
    else:
        front.add_colour(preprocess, layout, image.dtype)
    front.add("Identity")
    front.nodes[-1].output[0] = image.name
    nodes = [*front.nodes, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return source


def _set_input(network: onnx.ModelProto, name: str, dtype: str, shape: tuple[Dim, ...]) -> None:
    # From IR version 4 on, a weight that is listed as an input can be fed, which bars it from constant folding.
    del network.graph.input[:]
    network.graph.input.append(helper.make_tensor_value_info(name, _element_type(dtype), shape))
    network.ir_version = max(network.ir_version, 4)


def _unused_prefix(graph: onnx.GraphProto) -> str:
    names = {name for node in graph.node for name in (*node.input, *node.output, node.name)}
    names |= {tensor.name for tensor in graph.initializer}
    prefix = "infermill"
    while any(name.startswith(f"{prefix}.") for name in names):
        prefix += "_"
    return prefix


class _Front:
    """A chain of nodes that grows at its tip."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.tip = self._new_name("images")

    def _new_name(self, what: str) -> str:
        return f"{self._prefix}.{len(self.nodes)}.{what}"

    def add(self, op: str, constant: NDArray[np.generic] | None = None, **attributes: Any) -> None:
        """One node that takes the tip, and a constant as its second operand where one is given."""
        inputs = [self.tip]
        if constant is not None:
            inputs.append(self._new_name("constant"))
            # Not an initializer: those must be listed as inputs before IR version 4.
            self.nodes.append(helper.make_node("Constant", [], inputs[1:], value=numpy_helper.from_array(constant)))
        self.tip = self._new_name(op)
        self.nodes.append(helper.make_node(op, inputs, [self.tip], self.tip, **attributes))

    def add_colour(self, preprocess: Preprocess, layout: str, dtype: str) -> None:
        channel_axis = 3
        if layout == "NCHW":
            self.add("Transpose", perm=[0, 3, 1, 2])
            channel_axis = 1
        factor, offset = folded(preprocess)
        if preprocess.color == "BGR":
            self.add("Gather", np.array([2, 1, 0]), axis=channel_axis)
        if dtype != "uint8":
            per_channel = (3, 1, 1) if layout == "NCHW" else (3,)
            self._normalise(factor.reshape(per_channel), offset.reshape(per_channel), dtype)

    def add_grey(self, preprocess: Preprocess, layout: str, dtype: str) -> None:
        self.add("Cast", to=TensorProto.FLOAT)
        self.add("MatMul", np.array(LUMINANCE, np.float32).reshape(3, 1))
        self.add("Add", np.array(LUMINANCE_HALF, np.float32))
        self.add("Mul", np.array(LUMINANCE_UNIT, np.float32))
        self.add("Floor")
        if layout == "NCHW":
            self.add("Transpose", perm=[0, 3, 1, 2])
        factor, offset = folded(preprocess)
        if dtype == "uint8":
            self.add("Cast", to=TensorProto.UINT8)
        else:
            self._normalise(factor[:1], offset[:1], dtype)

    def _normalise(self, factor: NDArray[np.float32], offset: NDArray[np.float32], dtype: str) -> None:
        self.add("Cast", to=TensorProto.FLOAT)
        if np.any(factor != 1):
            self.add("Mul", factor)
        if np.any(offset != 0):
            self.add("Add", offset)
        if dtype != "float32":
            self.add("Cast", to=_element_type(dtype))


def _element_type(dtype: str) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def folded(preprocess: Preprocess) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """`(x · scale - mean) / std` as `x · factor + offset`, per channel in the order of the card.

    Example:
        >>> folded(Preprocess(scale=0.5, mean=(1, 2, 3), std=(2, 2, 2)))[1]
        array([-0.5, -1. , -1.5], dtype=float32)
    """
    std = np.array(preprocess.std)
    return (preprocess.scale / std).astype(np.float32), (-np.array(preprocess.mean) / std).astype(np.float32)


def _keep_outputs(graph: onnx.GraphProto, names: tuple[str, ...]) -> None:
    kept = [output for output in graph.output if output.name in names]
    del graph.output[:]
    graph.output.extend(kept)


def _link_or_copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)  # both runtimes refuse symbolic links that lead out of the folder
    except OSError:
        shutil.copyfile(source, target)
