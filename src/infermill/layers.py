"""The first layer of a network whose values differ between two runtimes.

    nodes in topological order    data ─ conv0 ─ bn0 ─ relu0 ─ … ─ fc1 ─ softmax
                                  └────── group ──────┘└──── group ────┘

A group of tensors at a time is made the outputs of a copy of the network, so that memory is bounded, and the copy is
run by both. What comes first in this order and differs has no input that does. That is not bisected: a difference may
be gone further on (a ReLU, a saturated softmax), so that a layer which agrees tells nothing of those before it, and a
group of 64 needs fewer runs.
"""

import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from infermill.models.card import Output
from infermill.models.model import Model
from infermill.models.mxnet.symbol import read_symbol
from infermill.models.onnx import external_files, inferred, read_network
from infermill.runtimes import Batch, Predictor

GROUP_TENSORS = 64
GROUP_BYTES = 32 << 20
"Of the values of one row."
# A length of batches that no other dim has: what has it after shape inference, has one entry for each row.
_BATCH = 7919
_COMPARED: dict[int, int] = {
    TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.DOUBLE: 8, TensorProto.INT64: 8, TensorProto.INT32: 4,
}  # fmt: skip
_MXNET_OUTPUT = re.compile(r"(.+)_output\d*")
Load = Callable[[Model], Predictor]


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far values are from those that are expected: the largest difference, and the largest value expected."""

    absolute: float
    largest: float

    @property
    def relative(self) -> float:
        """The difference as a part of the largest value."""
        return self.absolute / (self.largest or 1.0)


@dataclass(frozen=True, slots=True)
class Layer:
    """The first node whose values differ: how far, and how far those are that it is given."""

    node: str
    operator: str
    inside: float
    "The largest difference of what it takes; 0 where it takes nothing that is compared."
    outside: float
    "The largest difference of what it gives."
    relative: float
    "The same, as a part of the largest value."


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Values between layers that can be compared; `inputs` are those that they are computed from."""

    name: str
    node: str
    operator: str
    inputs: tuple[str, ...]
    info: onnx.ValueInfoProto
    row_bytes: int


def deviation(found: NDArray[np.generic], expected: NDArray[np.generic]) -> Deviation:
    """How far values are from those that are expected; NaN and infinity differ from everything but themselves.

    Example:
        >>> deviation(np.array([1.0, 2.5]), np.array([1.0, 2.0]))
        Deviation(absolute=0.5, largest=2.0)
    """
    if found.shape != expected.shape:
        return Deviation(math.inf, 0.0)
    one, other = found.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        distance = np.where((one == other) | (np.isnan(one) & np.isnan(other)), 0.0, np.abs(one - other))
    absolute = float(np.nan_to_num(distance, nan=math.inf, posinf=math.inf).max(initial=0.0))
    largest = float(np.abs(other[np.isfinite(other)]).max(initial=0.0))
    return Deviation(absolute, largest)


def first_difference(model: Model, loads: tuple[Load, Load], rows: Batch, tolerance: float) -> Layer | None:
    """Compare the values between the layers of a network, in order, until some differ.

    Args:
        model: the network. Where it has a checkpoint, only values that MXNet has too are compared.
        loads: the two runtimes.
        rows: what to run it on: one row shows it.
        tolerance: the largest relative difference that is none.

    Returns:
        The first layer that differs, or None where none does: what a runtime gives out it cannot fuse with what
        follows, so that an error of fusing is gone here.

    Raises:
        ModelError: a runtime cannot execute the network.

    Example:
        >>> first_difference(model, (load_openvino, load_mxnet), rows, 1e-4)  # doctest: +SKIP
        Layer(node='bn0', operator='BatchNorm', inside=2.4e-07, outside=0.31, relative=0.08)
    """
    network = read_network(model.network)
    sources = {name: tuple(filter(None, node.input)) for node in network.graph.node for name in node.output}
    seen: dict[str, Deviation] = {}
    for group in _groups(_tensors(model, network)):
        with _giving_out(model, network, [tensor.info for tensor in group]) as probe:
            answers = [_answers(load(probe), rows) for load in loads]
        for tensor in group:
            seen[tensor.name] = deviation(*(answer[tensor.name] for answer in answers))
        for tensor in group:
            if seen[tensor.name].relative > tolerance:
                inside = max((seen[name].absolute for name in _compared(tensor.inputs, sources, seen)), default=0.0)
                found = seen[tensor.name]
                return Layer(tensor.node, tensor.operator, inside, found.absolute, found.relative)
    return None


def _answers(predictor: Predictor, rows: Batch) -> dict[str, NDArray[np.generic]]:
    return dict(zip(predictor.output_names, predictor(rows), strict=True))


def _compared(names: Sequence[str], sources: Mapping[str, Sequence[str]], seen: Mapping[str, object]) -> set[str]:
    """The tensors that were compared, of those that these are computed from, on each way the nearest."""
    found: set[str] = set()
    pending, visited = list(names), set(names)
    while pending:
        name = pending.pop()
        if name in seen:
            found.add(name)
            continue
        before = [source for source in sources.get(name, ()) if source not in visited]
        visited.update(before)
        pending += before
    return found


def _tensors(model: Model, network: onnx.ModelProto) -> list[_Tensor]:
    """What can be compared, in topological order: has one entry for each row, and is in the checkpoint as well."""
    operators = None
    if model.checkpoint is not None:
        nodes = read_symbol(model.checkpoint.symbol).nodes
        operators = {node.name: node.op for node in nodes if node.op != "null"}
    values = _values(network)
    tensors = []
    if model.card.preprocess is not None:
        tensors += [
            _tensor(source.name, "(preprocessing)", "", (), values[source.name])
            for source in network.graph.input
            if source.name in values
        ]
    for node in network.graph.node:
        for name in filter(values.__contains__, node.output):
            label, operator = node.name or name, node.op_type
            if operators is not None:
                match = _MXNET_OUTPUT.fullmatch(name)
                if match is None or match[1] not in operators:
                    continue
                label, operator = match[1], operators[match[1]]
            tensors.append(_tensor(name, label, operator, tuple(filter(None, node.input)), values[name]))
    return tensors


def _values(network: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    """The tensors that have one entry for each row, by name."""
    marked = onnx.ModelProto()
    marked.CopyFrom(network)
    weights = {tensor.name for tensor in network.graph.initializer}
    batch = _BATCH
    for value in marked.graph.input:
        if value.name not in weights:
            for dim in value.type.tensor_type.shape.dim[:1]:
                dim.dim_value = batch = dim.dim_value or _BATCH
    # What is declared of them has a batch of any length.
    del marked.graph.value_info[:]
    for value in marked.graph.output:
        value.type.tensor_type.ClearField("shape")
    graph = inferred(marked).graph
    found = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        dims = [dim.dim_value for dim in kind.shape.dim]
        if value.name not in weights and kind.elem_type in _COMPARED and dims[:1] == [batch] and all(dims):
            found[value.name] = helper.make_tensor_value_info(
                value.name, kind.elem_type, ["batch" if batch == _BATCH else batch, *dims[1:]]
            )
    return found


def _tensor(name: str, node: str, operator: str, inputs: tuple[str, ...], info: onnx.ValueInfoProto) -> _Tensor:
    kind = info.type.tensor_type
    row_bytes = math.prod(dim.dim_value for dim in kind.shape.dim[1:]) * _COMPARED[kind.elem_type]
    return _Tensor(name, node, operator, inputs, info, row_bytes)


def _groups(tensors: Sequence[_Tensor]) -> Iterator[list[_Tensor]]:
    group: list[_Tensor] = []
    for tensor in tensors:
        room = GROUP_BYTES - sum(one.row_bytes for one in group)
        if group and (len(group) == GROUP_TENSORS or tensor.row_bytes > room):
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group


@contextmanager
def _giving_out(model: Model, network: onnx.ModelProto, outputs: Sequence[onnx.ValueInfoProto]) -> Iterator[Model]:
    """The model with other outputs; its files are there until the context ends."""
    card = replace(model.card, task="raw", output=Output(), labels=None, classes=None)
    del network.graph.output[:]
    network.graph.output.extend(outputs)
    with tempfile.TemporaryDirectory(prefix="infermill-") as folder:
        path = Path(folder, model.network.name)
        path.write_bytes(network.SerializeToString())
        for name, file in external_files(network, model.network).items():
            Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, Path(folder, name))
        yield replace(model, card=card, network=path, labels=None)
