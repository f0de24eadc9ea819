"""MXNet's graph as ONNX's: node by node, with MXNet's numbers and MXNet's names."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from infermill.errors import ModelError
from infermill.models.mxnet.attributes import described
from infermill.models.mxnet.graph import ASK_FOR_IT, IR_VERSION, OPSET, Graph, Step, Tensor
from infermill.models.mxnet.operators import OPERATORS
from infermill.models.mxnet.params import Params
from infermill.models.mxnet.symbol import Node, Symbol
from infermill.models.onnx import MAX_PROTOBUF_BYTES, shown

# For all that is not weights; protobuf would have to serialise the whole to know its size.
_RESERVE_BYTES = 16 << 20


def translate(symbol: Symbol, params: Params, input_shape: tuple[int, ...], name: str) -> onnx.ModelProto:
    """The network as ONNX: opset 18, float32 in, the batch's length open.

    A tensor is called what `symbol.get_internals().list_outputs()` calls it in MXNet: `conv0_output`. Labels of losses
    and parameters that the graph does not use are left out. Parameters in float16 are computed with as float32, as
    MXNet's Module does, unless the network itself casts to float16.

    Args:
        input_shape: of one input, without the batch: `(3, 224, 224)`.
        name: of the graph.

    Raises:
        ModelError: an operator that has no translation, a parameter that is missing, or shapes that do not fit.

    Example:
        >>> translate(read_symbol(path), read_params(params), (3, 224, 224), "resnet-18")  # doctest: +SKIP
    """
    return _Translation(symbol, params, input_shape).model(name)


class _Translation:
    def __init__(self, symbol: Symbol, params: Params, input_shape: tuple[int, ...]) -> None:
        self._symbol = symbol
        self._values: dict[str, NDArray[Any]] = {**params.arg, **params.aux}
        self._graph = Graph()
        self._nodes = _unique_names(symbol)
        self._outputs: dict[tuple[int, int], Tensor] = {}
        self._input = Tensor(symbol.input_name(self._values), np.dtype(np.float32), ("batch", *input_shape))

    def model(self, name: str) -> onnx.ModelProto:
        for index, node in enumerate(self._nodes):
            if node.op != "null":
                self._translate(index, node)
        heads = {tensor.name: tensor for tensor in map(self._read, self._symbol.heads)}
        if sum(value.nbytes for value in self._graph.initializers.values()) + _RESERVE_BYTES > MAX_PROTOBUF_BYTES:
            raise ModelError(
                f"{name} has more than 2 GiB of parameters, which no ONNX file can hold",
                "networks of this size cannot be imported: take a smaller one",
            )
        graph = helper.make_graph(
            self._graph.nodes, name, [_value_info(self._input)], [_value_info(tensor) for tensor in heads.values()]
        )
        model: onnx.ModelProto = helper.make_model(
            graph,
            opset_imports=[helper.make_operatorsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="infermill",
        )
        # In place, and only now: `from_array`, `make_graph` and `make_model` would copy all of them, each once more.
        for weight, value in self._graph.initializers.items():
            model.graph.initializer.add(
                name=weight,
                data_type=helper.np_dtype_to_tensor_dtype(value.dtype),
                dims=value.shape,
                raw_data=value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes(),
            )
        return model

    def _translate(self, index: int, node: Node) -> None:
        operator = OPERATORS.get(node.op)
        if operator is None:
            raise ModelError(
                f"{described(node)}: this operator has no translation to ONNX",
                ASK_FOR_IT,
            )
        step = Step(self._graph, node, lambda position: self._read(node.inputs[position]))
        try:
            result = operator(step)
        except (ValueError, IndexError, ArithmeticError) as error:
            # Operators take their attributes for consistent, as MXNet has checked them: tuples of one length, no zeros.
            raise ModelError(
                f"the attributes of {described(node)} do not fit each other or its inputs: {error}",
                "the symbol file is damaged: export it again",
            ) from None
        outputs = step.finish(result if isinstance(result, dict) else {"output": result})
        self._outputs |= {(index, position): output for position, output in enumerate(outputs)}

    def _read(self, source: tuple[int, int]) -> Tensor:
        tensor = self._outputs.get(source)
        if tensor is not None:
            return tensor
        node = self._nodes[source[0]]
        if node.op != "null":
            raise ModelError(
                f"output {source[1]} of {described(node)} has no translation to ONNX",
                ASK_FOR_IT,
            )
        tensor = self._input if node.name == self._input.name else self._parameter(node)
        self._outputs[source] = tensor
        return tensor

    def _parameter(self, node: Node) -> Tensor:
        value = self._values.get(node.name)
        if value is None:
            raise ModelError(
                f"the parameters have no array `{shown(node.name)}`, which the symbol needs",
                "check that the symbol and the parameters belong together",
            )
        if value.dtype.kind == "f":
            value = value.astype(np.float32, copy=False)
        return Tensor(node.name, value.dtype, value.shape, value)


def _unique_names(symbol: Symbol) -> list[Node]:
    """The nodes, renamed where two operators share a name, which MXNet allows."""
    seen: set[str] = set()
    nodes = []
    for index, node in enumerate(symbol.nodes):
        unique = replace(node, name=f"{node.name}_{index}") if node.op != "null" and node.name in seen else node
        seen.add(unique.name)
        nodes.append(unique)
    return nodes


def _value_info(tensor: Tensor) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, helper.np_dtype_to_tensor_dtype(tensor.dtype), tensor.shape)
