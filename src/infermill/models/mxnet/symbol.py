"""The graph of an MXNet network, as `symbol.json` has it, upgraded to 1.9.1.

    {"nodes": [{"op", "name", "inputs": [[node, output, version], …], "attrs" | "attr" | "param": {…}}, …],
     "arg_nodes": […], "heads": [[node, output, version], …], "attrs": {"mxnet_version": ["int", 10901]}}

The upgrades are those of src/nnvm/legacy_json_util.cc in MXNet 1.9.1.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from infermill.errors import ModelError
from infermill.models.files import SYMBOL, read_bounded
from infermill.models.onnx import shown

_MAX_NODES, _MAX_INPUTS = 50_000, 100_000
# Longer ones, which many nodes may name, would fill memory.
_MAX_NAME = 512
_HIDDEN_KEYS = ("ctx_group", "lr_mult", "wd_mult", "force_mirroring", "mirror_stage", "profiler_scope")
# What MXNet keeps in this form is for training; but of variables, these say what the network takes.
_KEPT_KEYS = ("__shape__", "__dtype__")
# The inputs that an operator has, where a file from before 0.9 may leave out the last ones.
_INPUT_NAMES = {
    "BatchNorm": ("data", "gamma", "beta", "moving_mean", "moving_var"),
    "BatchNorm_v1": ("data", "gamma", "beta", "moving_mean", "moving_var"),
    "CuDNNBatchNorm": ("data", "gamma", "beta", "moving_mean", "moving_var"),
    "IdentityAttachKLSparseReg": ("data", "moving_avg"),
    "InstanceNorm": ("data", "gamma", "beta"),
    "Convolution": ("data", "weight", "bias"),
    "Convolution_v1": ("data", "weight", "bias"),
    "Deconvolution": ("data", "weight", "bias"),
    "FullyConnected": ("data", "weight", "bias"),
    "Embedding": ("data", "weight"),
    "SoftmaxOutput": ("data", "label"),
    "Softmax": ("data", "label"),
    "LinearRegressionOutput": ("data", "label"),
    "LogisticRegressionOutput": ("data", "label"),
    "MAERegressionOutput": ("data", "label"),
    "SVMOutput": ("data", "label"),
}
_NO_BIAS_BY_DEFAULT = {"Deconvolution": "True"}
_LABEL_SLOT = 1
_NOT_A_SYMBOL = "give what MXNet saved as PREFIX-symbol.json"
_SAVE_AGAIN = "download or save it again"


@dataclass(frozen=True, slots=True)
class Node:
    """An operator, or a variable (`op` is "null"): its inputs are outputs of earlier nodes."""

    op: str
    name: str
    attrs: Mapping[str, str]
    inputs: tuple[tuple[int, int], ...]
    "Of each: the index of the node, and of its output."


@dataclass(frozen=True, slots=True)
class Symbol:
    """Nodes in topological order, and which of their outputs the network answers with."""

    nodes: tuple[Node, ...]
    heads: tuple[tuple[int, int], ...]
    version: tuple[int, int, int]
    "Of the MXNet that wrote the file; upgrades to 1.9.1 have been applied."

    @property
    def labels(self) -> frozenset[str]:
        """The variables that only training feeds: the second input of output layers, and `…label`."""
        slots = (
            self.nodes[node.inputs[_LABEL_SLOT][0]]
            for node in self.nodes
            if len(node.inputs) > _LABEL_SLOT and _INPUT_NAMES.get(node.op, ())[_LABEL_SLOT:] == ("label",)
        )
        named = (node for node in self.nodes if node.name.endswith("label"))
        return frozenset(node.name for node in (*slots, *named) if node.op == "null")

    def input_name(self, parameters: Collection[str]) -> str:
        """The variable that is neither a parameter nor a label; it is called `data` in almost every network.

        Raises:
            ModelError: there is none, or there are more.
        """
        known = self.labels.union(parameters)
        candidates = [node.name for node in self.nodes if node.op == "null" and node.name not in known]
        if "data" in candidates:
            return "data"
        if not candidates:
            raise ModelError("the symbol has no input: its parameters have every variable", "export the network again")
        if len(candidates) > 1:
            listed = ", ".join(f"`{shown(name)}`" for name in candidates[:5])
            raise ModelError(
                f"the symbol has {len(candidates)} variables without parameters: {listed}",
                "networks of one input can be translated; check that the symbol and the parameters belong together",
            )
        return candidates[0]


def is_symbol(content: bytes) -> bool:
    """Whether a file is a symbol, told by what it holds; it may be damaged all the same.

    Example:
        >>> is_symbol(b'{"nodes": [], "heads": []}')
        True
    """
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(data, dict) and "nodes" in data and "heads" in data


def read_symbol(path: Path) -> Symbol:
    """Read a `symbol.json` of any version of MXNet.

    Args:
        path: a local file.

    Raises:
        ModelError: the file cannot be read, is no symbol, or its graph is not one.

    Example:
        >>> read_symbol(Path("resnet-18-symbol.json")).nodes[0].name  # doctest: +SKIP
        'data'
    """
    content = read_bounded(path, SYMBOL)
    try:
        data = json.loads(content)
    except RecursionError:
        raise ModelError(f"{path} is nested too deeply to be a symbol of MXNet", _NOT_A_SYMBOL) from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}", _NOT_A_SYMBOL) from None
    if not isinstance(data, dict) or not isinstance(data.get("nodes"), list) or not isinstance(data.get("heads"), list):
        raise ModelError(f"{path} is JSON, and no symbol of MXNet: it has no nodes and heads", _NOT_A_SYMBOL)
    try:
        return _upgraded(_parsed(data))
    except _GraphError as error:
        raise ModelError(f"{path}: {error}", _SAVE_AGAIN) from None


class _GraphError(Exception):
    """What is wrong with the graph; the caller knows the file's name."""


def _parsed(data: Mapping[str, Any]) -> Symbol:
    if len(data["nodes"]) > _MAX_NODES:
        raise _GraphError(f"it has {len(data['nodes'])} nodes, and networks have fewer than {_MAX_NODES}")
    nodes = tuple(_node(number, node) for number, node in enumerate(data["nodes"]))
    inputs = len(data["heads"]) + sum(len(node.inputs) for node in nodes)
    if inputs > _MAX_INPUTS:
        raise _GraphError(f"its nodes have {inputs} inputs, and those of networks fewer than {_MAX_INPUTS}")
    heads = tuple(_entry(head, len(nodes), "a head") for head in data["heads"])
    if not heads:
        raise _GraphError("it has no heads: it answers nothing")
    return Symbol(nodes, heads, _version(data.get("attrs")))


def _node(number: int, data: Any) -> Node:
    where = f"node {number}"
    if not isinstance(data, dict):
        raise _GraphError(f"{where} is no object")
    op, name, inputs = data.get("op"), data.get("name"), data.get("inputs", [])
    if not isinstance(op, str) or not isinstance(name, str) or not isinstance(inputs, list):
        raise _GraphError(f"{where} lacks an op, a name or its inputs")
    if max(len(op), len(name)) > _MAX_NAME:
        raise _GraphError(f"{where} has a name of {max(len(op), len(name))} characters")
    where = f"node {number} ({name!r})"
    try:
        (op + name).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write
        raise _GraphError(f"{where} has a name that is no Unicode text") from None
    if data.get("subgraphs"):
        raise _GraphError(f"{where} is {op}, which runs a graph inside of this one; that is not supported")
    attrs: dict[str, str] = {}
    for key in ("param", "attr", "attrs"):  # the first one stands beside the second before 0.9
        found = data.get(key) or {}
        if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
            raise _GraphError(f"{where} has attributes that are no texts")
        attrs |= found
    if op == "null" and inputs:
        raise _GraphError(f"{where} is a variable, and has inputs")
    # An input that comes later would be a cycle, or an order in which nothing can be computed.
    return Node(op, name, _plain(attrs), tuple(_entry(entry, number, f"an input of {where}") for entry in inputs))


def _entry(data: Any, nodes: int, what: str) -> tuple[int, int]:
    is_numbers = isinstance(data, list) and len(data) in (2, 3) and all(type(number) is int for number in data)
    if not is_numbers or not 0 <= data[0] < nodes or not 0 <= data[1] < _MAX_NODES:
        raise _GraphError(f"{what} names no earlier node: {json.dumps(data)[:100]}")
    return data[0], data[1]


def _plain(attrs: Mapping[str, str]) -> dict[str, str]:
    """Without what is for training or for placing nodes on devices."""
    return {
        key: value
        for key, value in attrs.items()
        if key in _KEPT_KEYS or not (key.startswith("__") or key.startswith(_HIDDEN_KEYS) or key.endswith(_HIDDEN_KEYS))
    }


def _version(attrs: Any) -> tuple[int, int, int]:
    """`["int", 10901]` is 1.9.1; without it, the file is from 0.8 or before."""
    if not isinstance(attrs, dict) or "mxnet_version" not in attrs:
        return (0, 8, 0)
    match attrs["mxnet_version"]:
        case ["int", int(number)] if 0 <= number < 10**8:
            return (number // 10_000, number // 100 % 100, number % 100)
        case other:
            raise _GraphError(f"its mxnet_version is {json.dumps(other)[:100]}")


def _upgraded(symbol: Symbol) -> Symbol:
    if symbol.version < (0, 9, 0):
        symbol = _with_left_out_inputs(symbol)
    if symbol.version < (0, 9, 5):
        symbol = replace(symbol, nodes=tuple(map(_with_optional_axis, symbol.nodes)))
    names: set[str] = set()
    for node in symbol.nodes:
        if node.op == "null" and node.name in names:
            raise _GraphError(f"two variables are called {node.name!r}")
        names.add(node.name)
    return symbol


def _with_left_out_inputs(symbol: Symbol) -> Symbol:
    """Before 0.9, a node's auxiliary inputs are not in the file: they follow the others, as `<node>_<input>`."""
    nodes: list[Node] = []
    moved: list[int] = []
    for node in symbol.nodes:
        inputs = [(moved[index], output) for index, output in node.inputs]
        for name in _left_out(node):
            inputs.append((len(nodes), 0))
            nodes.append(Node("null", f"{node.name}_{name}" if node.name else name, {}, ()))
        moved.append(len(nodes))
        nodes.append(replace(node, inputs=tuple(inputs)))
    heads = tuple((moved[index], output) for index, output in symbol.heads)
    return replace(symbol, nodes=tuple(nodes), heads=heads)


def _left_out(node: Node) -> Iterator[str]:
    names = _INPUT_NAMES.get(node.op, ())
    if names[-1:] == ("bias",) and node.attrs.get("no_bias", _NO_BIAS_BY_DEFAULT.get(node.op)) in ("True", "true", "1"):
        names = names[:-1]
    yield from names[len(node.inputs) :]


def _with_optional_axis(node: Node) -> Node:
    """Before 0.9.5, the axis -1 of these meant: over everything."""
    if node.op in ("argmin", "argmax") and node.attrs.get("axis") == "-1":
        return replace(node, attrs={key: value for key, value in node.attrs.items() if key != "axis"})
    return node
