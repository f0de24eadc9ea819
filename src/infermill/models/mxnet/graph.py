"""The ONNX graph while it grows: tensors whose types and shapes are known, and what one MXNet node adds to them.

Tensors carry MXNet's own names (`conv0_output`), so that the two can be compared layer by layer. What one MXNet node
needs in between is named after it, with a slash.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, DTypeLike, NDArray
from onnx import TensorProto, TypeProto, helper, numpy_helper, shape_inference

from infermill.errors import ModelError
from infermill.models.mxnet.attributes import Attributes, described
from infermill.models.mxnet.symbol import Node
from infermill.models.onnx import Dim, shown

# The first whose reductions all take their axes in the same way (as an input), and the newest that IR version 8 holds,
# which every ONNX Runtime since 1.14 and every OpenVINO since 2023 reads.
OPSET, IR_VERSION = 18, 8
# The runtime `mxnet` is no way around it: it takes the shapes of a network from its translation.
ASK_FOR_IT = "save the network from MXNet without it, or ask for it where infermill is from, with the symbol file"
_OPSETS = [helper.make_operatorsetid("", OPSET)]
_MAX_SHAPE_ELEMENTS = 64
_MAX_COUNT = 2**24


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A tensor of the graph. A dim is a length, or the batch (`"batch"`), or None where it depends on the batch.

    `value` is there for parameters and constants.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[Dim, ...]
    value: NDArray[Any] | None = None

    @property
    def rank(self) -> int:
        """The number of dims."""
        return len(self.shape)


class _ShapeError(Exception):
    """ONNX cannot tell the shape of an output: its inputs have too few dimensions."""


class Graph:
    """Nodes and weights of the ONNX graph, in the order in which they are added."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, NDArray[Any]] = {}
        self.enumerated = 0

    def add(
        self, node: Node, op: str, inputs: Sequence[Tensor | None], outputs: Sequence[str], **attributes: Any
    ) -> list[Tensor]:
        """One ONNX node, its outputs' types and shapes inferred; `node` is whom to blame."""
        used = [tensor for tensor in inputs if tensor is not None]
        # OpenVINO refuses an empty name at the end where a bias could be.
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        for tensor in used:
            if tensor.value is not None:
                self.initializers.setdefault(tensor.name, tensor.value)
        names = ["" if tensor is None else tensor.name for tensor in inputs]
        proto = helper.make_node(op, names, list(outputs), outputs[0], **attributes)
        types = {tensor.name: _type(tensor) for tensor in used}
        values = {
            tensor.name: numpy_helper.from_array(tensor.value, tensor.name)
            for tensor in used
            if tensor.value is not None and tensor.value.size <= _MAX_SHAPE_ELEMENTS
        }
        try:
            inferred = shape_inference.infer_node_outputs(
                onnx.defs.get_schema(op, OPSET), proto, types, values, opset_imports=_OPSETS
            )
            tensors = [_tensor(name, inferred.get(name)) for name in outputs]
        except (shape_inference.InferenceError, onnx.checker.ValidationError, _ShapeError) as error:
            shapes = ", ".join(f"`{shown(tensor.name)}` {_shown_shape(tensor)}" for tensor in used)
            raise ModelError(
                f"{described(node)} does not fit its inputs {shapes}: {str(error).strip().splitlines()[-1]}",
                "check that the symbol and the parameters belong together, and the input's shape",
            ) from None
        self.nodes.append(proto)
        return tensors


class Step:
    """One node of MXNet while it becomes nodes of ONNX: its attributes, its inputs, and what is added for it."""

    def __init__(self, graph: Graph, node: Node, read: Callable[[int], Tensor]) -> None:
        self.node = node
        self.attributes = Attributes(node)
        self._graph = graph
        self._read = read
        self._first = len(graph.nodes)
        self._count = 0

    @property
    def data(self) -> Tensor:
        """The first input."""
        return self.input(0)

    @property
    def inputs(self) -> list[Tensor]:
        """All of them."""
        return [self.input(index) for index in range(len(self.node.inputs))]

    def input(self, index: int) -> Tensor:
        """An input, read when it is asked for: the labels of a loss have no value.

        Raises:
            ModelError: the node has fewer inputs, or this one is a parameter without a value.
        """
        if index >= len(self.node.inputs):
            raise ModelError(
                f"{described(self.node)} has {len(self.node.inputs)} inputs, where input {index + 1} is needed",
                "the symbol file is damaged: export it again",
            )
        return self._read(index)

    def parameter(self, index: int, shape: tuple[int, ...]) -> Tensor:
        """An input of this shape, of the type that the data has.

        Raises:
            ModelError: it has another shape.
        """
        tensor = self.input(index)
        if tensor.shape != shape:
            raise ModelError(
                f"{described(self.node)} needs `{shown(tensor.name)}` as {shape}, and it is {_shown_shape(tensor)}",
                "check that the symbol and the parameters belong together, and the input's shape",
            )
        return self.like_data(tensor)

    def values(self, index: int, shape: tuple[int, ...]) -> NDArray[Any]:
        """The numbers of a parameter.

        Raises:
            ModelError: it is computed by the network, or has another shape.
        """
        tensor = self.parameter(index, shape)
        if tensor.value is None:
            raise self.refused(f"`{shown(tensor.name)}` is computed, and not a parameter")
        return tensor.value

    def like_data(self, tensor: Tensor, data: Tensor | None = None) -> Tensor:
        """A constant in the floating type of the data: MXNet infers the type of parameters from it."""
        dtype = (data or self.data).dtype
        if tensor.value is None or tensor.dtype == dtype or "f" not in tensor.dtype.kind + dtype.kind:
            return tensor
        return replace(
            tensor, name=f"{tensor.name}/{dtype.name}", dtype=dtype, value=tensor.value.astype(dtype, copy=False)
        )

    def constant(self, value: ArrayLike, dtype: DTypeLike) -> Tensor:
        """A constant of this step."""
        with np.errstate(over="ignore"):  # a bound of 1e9 is infinite in float16, as in MXNet
            array = np.asarray(value, dtype)
        return Tensor(self._new_name("constant"), array.dtype, array.shape, array)

    def integers(self, value: ArrayLike) -> Tensor:
        """Axes, shapes and indices."""
        return self.constant(value, np.int64)

    def number(self, value: float, data: Tensor | None = None) -> Tensor:
        """A scalar of the type of the data."""
        return self.constant(value, (data or self.data).dtype)

    def add(self, op: str, *inputs: Tensor | None, **attributes: Any) -> Tensor:
        """A node of ONNX with one output."""
        return self.add_many(op, 1, *inputs, **attributes)[0]

    def add_many(self, op: str, count: int, *inputs: Tensor | None, **attributes: Any) -> list[Tensor]:
        """A node of ONNX with several outputs."""
        names = [self._new_name(op) for _ in range(count)]
        return self._graph.add(self.node, op, inputs, names, **attributes)

    def reshape(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """Reshape, 0 and -1 with ONNX's meaning; a parameter is reshaped here and now."""
        return self.add("Reshape", tensor, self.integers(list(shape)))

    def cast(self, tensor: Tensor, dtype: DTypeLike) -> Tensor:
        """The tensor in another type."""
        if tensor.dtype == np.dtype(dtype):
            return tensor
        return self.add("Cast", tensor, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def countable(self, count: int) -> int:
        """A count of numbers that are enumerated here.

        Raises:
            ModelError: float32 cannot count those of the whole graph; no network has that many, but a damaged symbol
                may.
        """
        if not 0 <= count <= _MAX_COUNT - self._graph.enumerated:
            raise self.refused(f"it would enumerate {count} numbers")
        self._graph.enumerated += count
        return count

    def lengths(self, tensor: Tensor, axes: Sequence[int]) -> list[int]:
        """The lengths of these axes.

        Raises:
            ModelError: one of them depends on the length of the batch.
        """
        dims = [tensor.shape[axis] for axis in axes]
        lengths = [dim for dim in dims if isinstance(dim, int)]
        if len(lengths) < len(dims):
            raise self.refused(
                f"the length of its input {_shown_shape(tensor)} along {list(axes)} varies with the batch"
            )
        return lengths

    def axis(self, value: int, rank: int) -> int:
        """An axis counted from the front.

        Raises:
            ModelError: there is none such.
        """
        if not -rank <= value < rank:
            raise self.refused(f"there is no axis {value} in {rank} dimensions")
        return value % rank

    def refused(self, why: str) -> ModelError:
        """The error for what is MXNet's, but has no translation."""
        return ModelError(
            f"{described(self.node)} cannot be translated to ONNX: {why}",
            ASK_FOR_IT,
        )

    def finish(self, outputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Give the outputs MXNet's names."""
        renamed: dict[str, str] = {}
        finished = []
        made = {name for proto in self._graph.nodes[self._first :] for name in proto.output}
        for suffix, tensor in outputs.items():
            name = f"{self.node.name}_{suffix}"
            if tensor.name in made and tensor.name not in renamed:
                renamed[tensor.name] = name
                finished.append(replace(tensor, name=name))
            else:
                finished += self._graph.add(self.node, "Identity", [tensor], [name])
        for proto in self._graph.nodes[self._first :]:
            for names in (proto.input, proto.output):
                names[:] = [renamed.get(name, name) for name in names]
            proto.name = proto.output[0]
        return finished

    def _new_name(self, what: str) -> str:
        self._count += 1
        return f"{self.node.name}/{what}{self._count}"


Translate = Callable[[Step], Tensor | dict[str, Tensor]]


def _type(tensor: Tensor) -> TypeProto:
    element = helper.np_dtype_to_tensor_dtype(tensor.dtype)
    return helper.make_tensor_type_proto(element, tensor.shape)


def _tensor(name: str, inferred: TypeProto | None) -> Tensor:
    if inferred is None or not inferred.tensor_type.HasField("shape"):
        raise _ShapeError(f"the shape of `{shown(name)}` cannot be told")
    element = inferred.tensor_type.elem_type or TensorProto.FLOAT
    dims = tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in inferred.tensor_type.shape.dim
    )
    return Tensor(name, helper.tensor_dtype_to_np_dtype(element), dims)


def _shown_shape(tensor: Tensor) -> str:
    return f"({', '.join(str(dim or '?') for dim in tensor.shape)})"
