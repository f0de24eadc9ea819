"""What an ONNX file holds, told without running it, and whether a card fits it."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from infermill.errors import ModelError
from infermill.models.card import ModelCard, Preprocess

Dim = int | str | None
MAX_PROTOBUF_BYTES = 2**31 - 1
DTYPES = {number: name.lower() for name, number in onnx.TensorProto.DataType.items()} | {1: "float32", 11: "float64"}
FLOAT_DTYPES = ("float32", "float16", "bfloat16", "float64")
# Operators that pass values on as they are: what stands behind them tells more about the network.
PASSIVE_OPS = ("Cast", "Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Dropout")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """An input or an output of a network.

    A dim of `shape` is a length, a symbol or None; the whole is None where not even the rank is told. `op` is the
    operator that first computes with the input, or that last computed the output.
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
        return f"`{_shown(self.name)}` ({self.dtype} {_shown(dims)})"


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


@dataclass(frozen=True, slots=True)
class ExternalTensor:
    """A weight that is kept outside the ONNX file: `length` bytes from `offset` in `file`."""

    tensor: onnx.TensorProto
    location: str
    file: Path
    offset: int
    length: int


def _shown(name: str) -> str:
    return repr(name)[1:-1]  # a damaged name may hold line breaks and control characters


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
        f"{path}: the weights of `{_shown(tensor.name)}` at {location!r} are outside the model's folder",
        "keep the files with weights beside the .onnx, as files and not as links",
    )


def _located(tensor: onnx.TensorProto, path: Path) -> ExternalTensor:
    location, folder = _location(tensor, path), path.parent.resolve()
    where = f"{path}: the weights of `{_shown(tensor.name)}` at {location!r}"
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
        outputs = _inferred(model).graph.output
    return NetworkInfo(
        inputs=tuple(_tensor(value, _first_op(graph, value.name)) for value in inputs),
        outputs=tuple(_tensor(value, _last_op(graph, value.name)) for value in outputs),
        opset=max((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), default=0),
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        ir_version=model.ir_version,
        nodes=len(graph.node),
        file_bytes=path.stat().st_size + sum(sizes.values()),
    )


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        return model  # shapes that nobody knows are checked after the first batch


def _tensor(value: onnx.ValueInfoProto, op: str) -> TensorInfo:
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


def layout_of(shape: Sequence[Dim] | None) -> str | None:
    """Where 3 or 1 stands; None where that does not tell."""
    first, last = (None, None) if shape is None else (shape[1] in (1, 3), shape[3] in (1, 3))
    return None if first == last else "NCHW" if first else "NHWC"


def channels_and_size(image: TensorInfo, layout: str) -> tuple[Dim, Dim, Dim]:
    _, *dims = image.shape or (None,) * 4
    return (dims[0], dims[1], dims[2]) if layout == "NCHW" else (dims[2], dims[0], dims[1])


def image_input(network: str, name: str | None, info: NetworkInfo) -> TensorInfo:
    names = [tensor.name for tensor in info.inputs]
    if name is not None and name not in names:
        raise ModelError(f"{network} has no input `{name}`", _nearest(name, names, "input.name"))
    if len(names) != 1:
        listed = ", ".join(map(str, info.inputs)) or "none"
        raise ModelError(f"{network} has {len(names)} inputs: {listed}", "export it with one input, the image")
    image = info.inputs[0]
    if image.shape is not None and len(image.shape) != 4:
        raise ModelError(f"the input {image} of {network} is no image", "it must have 4 dims: NCHW or NHWC")
    if image.dtype not in ("float32", "float16", "uint8"):
        raise ModelError(f"the input {image} of {network} is no image", "it must be float32, float16 or uint8")
    return image


def _nearest(name: str, known: Sequence[str], field: str) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean `{field}: {close[0]}`?" if close else f"set `{field}` to one of: {', '.join(known)}"


def check_network(card: ModelCard, labels: tuple[str, ...] | None, info: NetworkInfo) -> None:
    """Prove, before any image is read, that the card fits the network.

    Raises:
        ModelError: with the field of the card, and the tensor that it does not fit.
    """
    network = card.files.onnx
    image = image_input(network, card.input.name, info)
    if image.dtype != card.input.dtype:
        hint = f"set `input.dtype: {image.dtype}`"
        raise ModelError(f"the input {image} of {network} is not {card.input.dtype}, as the card says", hint)
    channels, *size = channels_and_size(image, card.input.layout)
    if isinstance(channels, int) and channels not in (1, 3):
        seen = layout_of(image.shape)
        hint = "images have 3 channels, or 1" if seen in (None, card.input.layout) else f"set `input.layout: {seen}`"
        raise ModelError(f"the input {image} of {network} has {channels} channels in layout {card.input.layout}", hint)
    _check_size(card, image, size)
    _check_values(card.preprocess, image, grey=channels == 1)
    for tensor in chosen_outputs(card, info):
        _check_output(card, labels, tensor)
    if info.opset < 7:
        hint = "convert it: onnx.version_converter.convert_version(model, 17)"
        raise ModelError(f"{network} is written in opset {info.opset}; runtimes execute 7 and later", hint)


def _check_size(card: ModelCard, image: TensorInfo, size: Sequence[Dim]) -> None:
    made = card.preprocess.height_width
    wanted = [want if isinstance(want, int) else have for want, have in zip(size, made or (224, 224), strict=True)]
    if made is None:
        hint = f"add `preprocess.resize.exact: {wanted}`, or `preprocess.crop.center: {wanted}`"
        raise ModelError(f"preprocess makes no fixed size, and {image} needs one", hint)
    if list(made) != wanted:
        field = "crop.center" if card.preprocess.crop is not None else "resize.exact"
        hint = f"set `preprocess.{field}: {wanted}`"
        raise ModelError(f"preprocess makes images of {list(made)}, and {image} takes {wanted}", hint)


def _check_values(preprocess: Preprocess, image: TensorInfo, *, grey: bool) -> None:
    normalised = preprocess.scale != 1 or any(preprocess.mean) or set(preprocess.std) != {1.0}
    if image.dtype == "uint8" and normalised:
        hint = "remove `preprocess.scale`, `preprocess.mean` and `preprocess.std`"
        raise ModelError(f"{image} takes bytes, which cannot be normalised", hint)
    if grey and (len(set(preprocess.mean)) > 1 or len(set(preprocess.std)) > 1):
        hint = "give the same number three times in `preprocess.mean`, and in `preprocess.std`"
        raise ModelError(f"{image} takes grey images, and preprocess has mean or std for each colour", hint)
    if grey and preprocess.color == "BGR":
        raise ModelError(f"{image} takes grey images, which have no order of colours", "remove `preprocess.color`")


def chosen_outputs(card: ModelCard, info: NetworkInfo) -> tuple[TensorInfo, ...]:
    """The outputs that predictions are made of: all of them for the task `raw`, unless one is named.

    Raises:
        ModelError: the network has no output of that name.
    """
    names = [tensor.name for tensor in info.outputs]
    if card.output.name is None:
        return info.outputs if card.task == "raw" else info.outputs[:1]
    if card.output.name not in names:
        hint = _nearest(card.output.name, names, "output.name")
        raise ModelError(f"{card.files.onnx} has no output `{card.output.name}`", hint)
    return (info.outputs[names.index(card.output.name)],)


def _check_output(card: ModelCard, labels: tuple[str, ...] | None, output: TensorInfo) -> None:
    if card.task == "raw":
        return
    if output.dtype not in FLOAT_DTYPES:
        hint = "name another output in `output.name`, or set `task: raw`"
        raise ModelError(f"the output {output} is no {card.task}: it holds no floating-point numbers", hint)
    shape = output.trimmed or (None, None)
    if len(shape) < 2 or (len(shape) > 2 and card.task == "classification"):
        hint = "name another output in `output.name`, or set `task: raw`"
        raise ModelError(f"the output {output} is no {card.task}: that is one row of numbers per image", hint)
    if card.task != "classification":
        return
    if card.output.activation == "softmax" and output.op == "Softmax":
        raise ModelError(f"the output {output} comes out of a Softmax already", "set `output.activation: none`")
    counts = {"`classes` says": card.classes, "`labels` has": None if labels is None else len(labels)}
    for what, count in counts.items():
        if count is not None and isinstance(shape[1], int) and count != shape[1]:
            hint = f"the network has {shape[1]} classes: use the labels, or the network, that belong together"
            raise ModelError(f"{what} {count}, and the output {output} has {shape[1]} classes", hint)
    if labels is not None and card.classes not in (None, len(labels)):
        raise ModelError(f"`classes` says {card.classes}, and `labels` has {len(labels)}", "remove `classes`")
