"""Whether a card fits its network, told without running it."""

import difflib
from collections.abc import Sequence

from infermill.errors import ModelError
from infermill.models.boxes import SEVERAL, check_boxes
from infermill.models.card import IMAGE_DTYPES, TENSOR_DTYPES, ModelCard, Preprocess
from infermill.models.onnx import FLOAT_DTYPES, Dim, NetworkInfo, TensorInfo, shown

_NO_NUMBERS = "name another output in `output.name`; scikit-learn's are tensors with options={'zipmap': False}"
_AS_TENSOR = "for a tensor that is given as it is, say `preprocess: null` in the card"
_FIX_SHAPE = "fix it: python -m onnxruntime.tools.make_dynamic_shape_fixed --dim_param {} --dim_value LENGTH IN OUT"
# What Arrow has a type for; the outputs of some networks have no declared type, and show it when they run.
_RAW_DTYPES = (*TENSOR_DTYPES, "uint16", "uint32", "uint64", "undefined")


def layout_of(shape: Sequence[Dim] | None) -> str | None:
    """Where 3 or 1 stands; None where that does not tell."""
    first, last = (None, None) if shape is None else (shape[1] in (1, 3), shape[3] in (1, 3))
    return None if first == last else "NCHW" if first else "NHWC"


def channels_and_size(image: TensorInfo, layout: str) -> tuple[Dim, Dim, Dim]:
    _, *dims = image.shape or (None,) * 4
    return (dims[0], dims[1], dims[2]) if layout == "NCHW" else (dims[2], dims[0], dims[1])


def only_input(network: str, name: str | None, info: NetworkInfo) -> TensorInfo:
    """The one input of a network; ModelError where there are more, or it is not called `name`."""
    names = [tensor.name for tensor in info.inputs]
    if name is not None and name not in names:
        raise ModelError(f"{network} has no input `{name}`", _nearest(name, names, "input.name"))
    if len(names) != 1:
        listed = ", ".join(map(str, info.inputs)) or "none"
        raise ModelError(f"{network} has {len(names)} inputs: {listed}", "export it with one input")
    return info.inputs[0]


def is_image(tensor: TensorInfo) -> bool:
    """Whether an input may be an image: 1 or 3 channels, as far as the shape tells, of a type that images have."""
    if tensor.dtype not in IMAGE_DTYPES:
        return False
    shape = (None,) * 4 if tensor.shape is None else tensor.shape
    return len(shape) == 4 and any(not isinstance(dim, int) or dim in (1, 3) for dim in (shape[1], shape[3]))


def image_input(network: str, name: str | None, info: NetworkInfo) -> TensorInfo:
    """The input of a network that takes images; ModelError where it cannot be one."""
    image = only_input(network, name, info)
    if image.shape is not None and len(image.shape) != 4:
        hint = f"it must have 4 dims: NCHW or NHWC; {_AS_TENSOR}"
        raise ModelError(f"the input {image} of {network} is no image", hint)
    if image.dtype not in IMAGE_DTYPES:
        hint = f"it must be float32, float16 or uint8; {_AS_TENSOR}"
        raise ModelError(f"the input {image} of {network} is no image", hint)
    return image


def tensor_input(network: str, name: str | None, info: NetworkInfo) -> TensorInfo:
    """The input of a network that takes tensors as they are; ModelError where its type is none that they can have."""
    tensor = only_input(network, name, info)
    if tensor.dtype not in TENSOR_DTYPES:
        hint = f"export it with one of: {', '.join(TENSOR_DTYPES)}"
        raise ModelError(f"the input {tensor} of {network} cannot be given", hint)
    return tensor


def tensor_shape(tensor: TensorInfo) -> tuple[int, ...]:
    """The shape that each row of an input has: all of its dims but the batch.

    Raises:
        ModelError: a dim has no fixed length.

    Example:
        >>> tensor_shape(TensorInfo("x", "float32", ("N", 28, 28), "Gemm"))
        (28, 28)
    """
    if not tensor.shape:
        raise ModelError(
            f"the input {tensor} has no dims, and rows need one for the batch", "export it with a fixed shape"
        )
    shape = tuple(dim for dim in tensor.shape[1:] if isinstance(dim, int))
    if len(shape) < len(tensor.shape) - 1:
        at, dim = next((at, dim) for at, dim in enumerate(tensor.shape[1:], 1) if not isinstance(dim, int))
        name = shown(str(dim or ""))
        what = f"dim {at}, `{name}`," if name else f"dim {at}"
        message = f"{what} of the input {tensor} has no fixed length, and rows must have one shape"
        raise ModelError(message, _FIX_SHAPE.format(name or "NAME"))
    return shape


def _nearest(name: str, known: Sequence[str], field: str) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean `{field}: {close[0]}`?" if close else f"set `{field}` to one of: {', '.join(known)}"


def check_network(card: ModelCard, labels: tuple[str, ...] | None, info: NetworkInfo) -> None:
    """Prove, before any input is read, that the card fits the network.

    Raises:
        ModelError: with the field of the card, and the tensor that it does not fit.
    """
    network = card.files.network
    takes = tensor_input if card.preprocess is None else image_input
    source = takes(network, card.input.name, info)
    if source.dtype != card.input.dtype:
        hint = f"set `input.dtype: {source.dtype}`"
        raise ModelError(f"the input {source} of {network} is not {card.input.dtype}, as the card says", hint)
    if card.preprocess is None:
        tensor_shape(source)
    else:
        _check_image(card, card.preprocess, source)
    outputs = chosen_outputs(card, info)
    if card.task == "detection":
        check_boxes(card, labels, outputs, (card.preprocess and card.preprocess.height_width) or (None, None))
    else:
        for tensor in outputs:
            _check_output(card, labels, tensor)
    if info.opset < 7:
        hint = "convert it: onnx.version_converter.convert_version(model, 17)"
        raise ModelError(f"{network} is written in opset {info.opset}; runtimes execute 7 and later", hint)


def _check_image(card: ModelCard, preprocess: Preprocess, image: TensorInfo) -> None:
    channels, *size = channels_and_size(image, card.input.layout)
    if isinstance(channels, int) and channels not in (1, 3):
        seen = layout_of(image.shape)
        hint = "images have 3 channels, or 1" if seen in (None, card.input.layout) else f"set `input.layout: {seen}`"
        message = f"the input {image} of {card.files.network} has {channels} channels in layout {card.input.layout}"
        raise ModelError(message, hint)
    _check_size(preprocess, image, size)
    _check_values(preprocess, image, grey=channels == 1)


def _check_size(preprocess: Preprocess, image: TensorInfo, size: Sequence[Dim]) -> None:
    made = preprocess.height_width
    wanted = [want if isinstance(want, int) else have for want, have in zip(size, made or (224, 224), strict=True)]
    if made is None:
        hint = f"add `preprocess.resize.exact: {wanted}`, or `preprocess.crop.center: {wanted}`"
        raise ModelError(f"preprocess makes no fixed size, and {image} needs one", hint)
    if list(made) != wanted:
        field = "crop.center" if preprocess.crop is not None else "resize.exact"
        field = "resize.letterbox" if preprocess.letterbox is not None else field
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
    """The outputs that predictions are made of, in the network's order: one; or for the task `raw`, unless one is
    named, all; or for a detection those of boxes, scores and, it may be, labels.

    Raises:
        ModelError: the network has no output of that name.
    """
    names = [tensor.name for tensor in info.outputs]
    if card.task == "detection" and card.output.format in SEVERAL:
        wanted = card.output.parts
        for part, name in wanted.items():
            if name not in names:
                hint = _nearest(name, names, f"output.names.{part}")
                raise ModelError(f"{card.files.network} has no output `{name}`", hint)
        return tuple(tensor for tensor in info.outputs if tensor.name in wanted.values())
    if card.output.name is None:
        return info.outputs if card.task == "raw" else info.outputs[:1]
    if card.output.name not in names:
        hint = _nearest(card.output.name, names, "output.name")
        raise ModelError(f"{card.files.network} has no output `{card.output.name}`", hint)
    return (info.outputs[names.index(card.output.name)],)


def _check_output(card: ModelCard, labels: tuple[str, ...] | None, output: TensorInfo) -> None:
    if card.task == "raw":
        if output.dtype not in _RAW_DTYPES:
            raise ModelError(f"the output {output} holds no numbers that can be written", _NO_NUMBERS)
        return
    if output.dtype not in FLOAT_DTYPES:
        hint = (
            "name another output in `output.name`, or set `task: raw`" if output.dtype in _RAW_DTYPES else _NO_NUMBERS
        )
        raise ModelError(f"the output {output} is no {card.task}: it holds no floating-point numbers", hint)
    shape = output.trimmed or (None, None)
    if len(shape) < 2 or (len(shape) > 2 and card.task == "classification"):
        hint = "name another output in `output.name`, or set `task: raw`"
        raise ModelError(f"the output {output} is no {card.task}: that is one row of numbers per input", hint)
    if card.task != "classification":
        return
    if card.output.activation == "softmax" and output.op == "Softmax":
        raise ModelError(f"the output {output} comes out of a Softmax already", "set `output.activation: none`")
    if card.output.activation == "softmax" and shape[1] == 1:
        raise ModelError(f"a softmax of the one number of {output} is always 1", "set `output.activation: sigmoid`")
    counts = {"`classes` says": card.classes, "`labels` has": None if labels is None else len(labels)}
    for what, count in counts.items():
        if count is not None and isinstance(shape[1], int) and count != shape[1]:
            hint = f"the network has {shape[1]} classes: use the labels, or the network, that belong together"
            raise ModelError(f"{what} {count}, and the output {output} has {shape[1]} classes", hint)
    if labels is not None and card.classes not in (None, len(labels)):
        raise ModelError(f"`classes` says {card.classes}, and `labels` has {len(labels)}", "remove `classes`")
