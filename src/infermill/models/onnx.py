"""What an ONNX file holds, told without running it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from infermill.errors import ModelError

Dim = int | str | None
MAX_PROTOBUF_BYTES = 2**31 - 1
DTYPES = {number: name.lower() for name, number in onnx.TensorProto.DataType.items()} | {1: "float32", 11: "float64"}
FLOAT_DTYPES = ("float32", "float16", "bfloat16", "float64")
INT8_OPS = ("DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger")
# Operators that pass values on as they are: what stands behind them tells more about the network.
PASSIVE_OPS = (
    "Cast", "Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Dropout",
    "QuantizeLinear", "DequantizeLinear",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """An input or an output of a network.

    A dim of `shape` is a length, a symbol or None; the whole is None where not even the rank is told. `op` is the
    operator that first computes with the input, or that last computed the output. `dtype` is `sequence`, `map` or
    `optional` where it is no tensor.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...] | None
    op: str

    @property
    def trimmed(self) -> tuple[Dim, ...] | None:
        """The shape without the 1x1 that is left of height and width after pooling."""
        shape = self.shape
        while shape is not None and len(shape) > 2 and shape[-1] == 1:
            shape = shape[:-1]
        return shape

    def __str__(self) -> str:
        dims = "of unknown shape" if self.shape is None else f"[{', '.join(str(dim or '?') for dim in self.shape)}]"
        return f"`{shown(self.name)}` ({self.dtype} {shown(dims)})"


@dataclass(frozen=True, slots=True)
class NetworkInfo:
    """What a network takes and gives, and where it comes from. `file_bytes` counts external weights too."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    opset: int
    producer: str
    ir_version: int
    nodes: int
    file_bytes: int
    is_quantised: bool = False
    "It quantises what is between its layers, to 8 bits."

    def computed_in(self, precision: str) -> str:
        """What its layers are computed in where its floats have this precision: `int8` and, where that is not fp32, the
        rest behind a plus.

        Example:
            >>> inspect_network(Path("resnet18-int8.onnx")).computed_in("bf16")  # doctest: +SKIP
            'int8+bf16'
        """
        if not self.is_quantised:
            return precision
        return "int8" if precision == "fp32" else f"int8+{precision}"


@dataclass(frozen=True, slots=True)
class ExternalTensor:
    """A weight that is kept outside the ONNX file: `length` bytes from `offset` in `file`."""

    tensor: onnx.TensorProto
    location: str
    file: Path
    offset: int
    length: int


def shown(name: str) -> str:
    """A name out of a network, in one line: a damaged one may hold line breaks and control characters."""
    return repr(name)[1:-1]


def read_network(path: Path) -> onnx.ModelProto:
    """Parse an ONNX file; external weights stay outside.

    Raises:
        ModelError: the file cannot be read, or is not ONNX.
    """
    try:
        if path.stat().st_size > MAX_PROTOBUF_BYTES:
            raise ModelError(
                f"{path} is larger than 2 GiB, which no ONNX file can be",
                "save it with external data: onnx.save_model(model, path, save_as_external_data=True)",
            )
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", "check the path") from None
    if data.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path} is a Git LFS pointer, not the network itself", "run: git lfs pull")
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except DecodeError:
        model = onnx.ModelProto()
    if not model.graph.node or not model.graph.output or not all(isinstance(text, str) for text in _strings(model)):
        hint = "download or export it again" if path.suffix == ".onnx" else "give a file that ends in .onnx"
        raise ModelError(f"{path} is not an ONNX network, or it is damaged ({len(data)} bytes)", hint)
    return model


def _strings(model: onnx.ModelProto) -> Iterator[str]:
    """The strings that are read here: protobuf gives those that are not UTF-8 as bytes."""
    graph = model.graph
    yield from (model.producer_name, model.producer_version, *(item.domain for item in model.opset_import))
    for value in (*graph.input, *graph.output):
        yield from (value.name, *(dim.dim_param for dim in value.type.tensor_type.shape.dim))
    for node in graph.node:
        yield from (node.op_type, node.name, *node.input, *node.output)
    for tensor in _tensors(model):
        yield from (tensor.name, *(text for entry in tensor.external_data for text in (entry.key, entry.value)))


def external_files(model: onnx.ModelProto, path: Path) -> dict[str, Path]:
    """The files beside the model at `path` that hold weights of it: location in the model -> local file.

    Raises:
        ModelError: as `external_tensors`.
    """
    return {external.location: external.file for external in external_tensors(model, path)}


def external_names(path: Path) -> tuple[str, ...]:
    """The same files by their names alone, whether or not they are there: what to fetch beside an ONNX file.

    Raises:
        ModelError: as `read_network`; or a name is absolute or has `..`.
    """
    tensors = [tensor for tensor in _tensors(read_network(path)) if tensor.data_location == tensor.EXTERNAL]
    return tuple(sorted({_location(tensor, path) for tensor in tensors}))


def external_tensors(model: onnx.ModelProto, path: Path) -> tuple[ExternalTensor, ...]:
    """The weights that the model at `path` keeps in other files, each proven to lie in the model's own folder.

    Raises:
        ModelError: a location is absolute, has `..`, leads out by a symbolic link, or names no complete file.
    """
    return tuple(_located(tensor, path) for tensor in _tensors(model) if tensor.data_location == tensor.EXTERNAL)


def load_weights(externals: tuple[ExternalTensor, ...]) -> None:
    """Put weights from other files into their model.

    Example:
        >>> load_weights(external_tensors(network, path))  # doctest: +SKIP
    """
    for external in externals:
        with external.file.open("rb") as file:
            file.seek(external.offset)
            external.tensor.raw_data = file.read(external.length)
        del external.tensor.external_data[:]
        external.tensor.data_location = external.tensor.DEFAULT


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model, those in attributes, subgraphs and functions included."""
    pending: list[onnx.GraphProto | onnx.FunctionProto] = [model.graph, *model.functions]
    for training in model.training_info:
        pending += [training.initialization, training.algorithm]
    while pending:
        graph = pending.pop()
        attributes = [attribute for node in graph.node for attribute in node.attribute]
        if isinstance(graph, onnx.GraphProto):
            yield from graph.initializer
            yield from (part for sparse in graph.sparse_initializer for part in (sparse.values, sparse.indices))
        else:
            attributes += graph.attribute_proto
        for attribute in attributes:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            pending += attribute.graphs
            if attribute.HasField("g"):
                pending.append(attribute.g)


def _location(tensor: onnx.TensorProto, path: Path) -> str:
    location = PurePosixPath(next((entry.value for entry in tensor.external_data if entry.key == "location"), ""))
    if location.is_absolute() or ".." in location.parts:
        raise _outside(tensor, str(location), path)
    return str(location)


def _outside(tensor: onnx.TensorProto, location: str, path: Path) -> ModelError:
    return ModelError(
        f"{path}: the weights of `{shown(tensor.name)}` at {location!r} are outside the model's folder",
        "keep the files with weights beside the .onnx, as files and not as links",
    )


def _located(tensor: onnx.TensorProto, path: Path) -> ExternalTensor:
    location, folder = _location(tensor, path), path.parent.resolve()
    where = f"{path}: the weights of `{shown(tensor.name)}` at {location!r}"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    try:
        file = (folder / location).resolve()
        if not file.is_relative_to(folder):
            raise _outside(tensor, location, path)
        if not file.is_file():
            raise ModelError(f"{where} are missing", f"put {location!r} beside {path.name}")
        size, offset = file.stat().st_size, int(entries.get("offset", "0"))
        length = int(entries.get("length", size - offset))
    except (OSError, ValueError) as error:
        raise ModelError(f"{where} cannot be read: {error}", "download or export the network again") from None
    if offset < 0 or length < 0 or offset + length > size:
        raise ModelError(f"{where} are incomplete: the file has {size} bytes", "download or export the network again")
    return ExternalTensor(tensor, location, file, offset, length)


def inspect_network(path: Path) -> NetworkInfo:
    """What the network at `path` takes and gives.

    Raises:
        ModelError: the file is not ONNX, or its external weights are not beside it.

    Example:
        >>> inspect_network(Path("resnet18.onnx")).inputs[0].shape  # doctest: +SKIP
        ('N', 3, 224, 224)
    """
    return describe(read_network(path), path)


def describe(model: onnx.ModelProto, path: Path) -> NetworkInfo:
    """What a model that was read from `path` takes and gives."""
    sizes = {external.file: external.file.stat().st_size for external in external_tensors(model, path)}
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    outputs = graph.output
    if any(not all(isinstance(dim, int) for dim in (_shape(value) or (None, None))[1:]) for value in outputs):
        outputs = inferred(model).graph.output
    return NetworkInfo(
        inputs=tuple(_tensor(value, _first_op(graph, value.name)) for value in inputs),
        outputs=tuple(_tensor(value, _last_op(graph, value.name)) for value in outputs),
        opset=max((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), default=0),
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        ir_version=model.ir_version,
        nodes=len(graph.node),
        file_bytes=path.stat().st_size + sum(sizes.values()),
        is_quantised=_is_quantised(graph),
    )


def _is_quantised(graph: onnx.GraphProto) -> bool:
    """Weights alone, which are 8-bit on disk and multiplied as floats, do not count."""
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            zero = next(iter(node.input[2:3]), "")  # its type is the type that is quantised to
            if types.get(zero, onnx.TensorProto.UINT8) in (onnx.TensorProto.UINT8, onnx.TensorProto.INT8):
                return True
        elif node.op_type in INT8_OPS:
            return True
    return False


def inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the shapes that can be told of its tensors; as it is where nothing can."""
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        return model  # shapes that nobody knows are checked after the first batch


def _tensor(value: onnx.ValueInfoProto, op: str) -> TensorInfo:
    kind = value.type.WhichOneof("value")
    if kind not in ("tensor_type", None):
        return TensorInfo(value.name, kind.removesuffix("_type"), None, op)
    return TensorInfo(value.name, DTYPES.get(value.type.tensor_type.elem_type, "undefined"), _shape(value), op)


def _shape(value: onnx.ValueInfoProto) -> tuple[Dim, ...] | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return tuple(dim.dim_value if dim.dim_value > 0 else dim.dim_param or None for dim in tensor.shape.dim)


def _first_op(graph: onnx.GraphProto, name: str) -> str:
    op = ""
    for node in graph.node:  # in topological order: one pass follows the chain
        if name in node.input and op in ("", *PASSIVE_OPS):
            op, name = node.op_type, next(iter(node.output), "")
    return op


def _last_op(graph: onnx.GraphProto, name: str) -> str:
    op = ""
    for node in reversed(graph.node):
        if name in node.output and op in ("", *PASSIVE_OPS):
            op, name = node.op_type, next(iter(node.input), "")
    return op
