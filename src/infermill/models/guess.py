"""A first model card for a network that came without one."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infermill.errors import ModelError, guide
from infermill.models.boxes import FORMATS, guess_boxes
from infermill.models.card import Files, ModelCard
from infermill.models.card_file import parse_card
from infermill.models.fit import (
    channels_and_size,
    image_input,
    is_image,
    layout_of,
    only_input,
    tensor_input,
)
from infermill.models.onnx import FLOAT_DTYPES, Dim, NetworkInfo, TensorInfo
from infermill.types import CardOptions, Task

NORMALISING_OPS = ("Sub", "Mul", "Div", "Add", "BatchNormalization")
POOLING_OPS = ("GlobalAveragePool", "GlobalMaxPool", "AveragePool", "MaxPool", "ReduceMean", "ReduceMax")
ENDS_OF_CLASSIFIERS = ("Softmax", "Sigmoid", "HardSigmoid")
EMBEDDING_OPS = (*POOLING_OPS, "LpNormalization", "LayerNormalization", "Div")
_IMAGE_OPTIONS = ("shorter", "exact", "letterbox", "filter", "crop", "color", "scale", "mean", "std", "layout")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MXNET_SSD_MEAN = (123.0, 117.0, 104.0)
"Of MXNet's example/ssd, for pixels of 0..255."


@dataclass(frozen=True, slots=True)
class Known:
    """What is told of a network elsewhere than in its graph. `values` are the fields of how pixels become numbers."""

    files: Files | None = None
    task: Task | None = None
    labels: tuple[str, ...] | None = None
    values: Mapping[str, Any] | None = None
    values_reason: str = ""


NOTHING_KNOWN = Known()


def guess_card(
    path: Path, info: NetworkInfo, given: CardOptions, known: Known = NOTHING_KNOWN
) -> tuple[ModelCard, tuple[str, ...]]:
    """A first card for the network at `path`, and one sentence for each thing in it that is assumed.

    What is `given` is for the caller to put into the card; here, the rest is guessed to go with it.

    Raises:
        ModelError: the network takes something else than one image or one tensor.
    """
    result = info.outputs[0]
    notes: list[str] = []
    takes_images = is_image(only_input(path.name, None, info)) or bool(image_options(given))
    boxes = _guess_boxes(path.name, info, given) if takes_images else None
    if takes_images:
        fields = _guess_image(image_input(path.name, None, info), given, notes, boxes, known)
    else:
        tensor = tensor_input(path.name, None, info)
        fields = {"input": {"name": tensor.name, "dtype": tensor.dtype}, "preprocess": None}
        notes.append(f"preprocess is null: {tensor} is no image, so that it is given tensors (.npy) as they are")
    task = given.task or ("detection" if boxes else known.task or _guess_task(result, takes_images=takes_images))
    output = boxes or {"activation": "none"}
    if given.task is None:
        notes.append(f"task is {task}: the output is {result}")
    if boxes and given.format is None:
        notes.append("output is " + ", ".join(f"{name}: {value}" for name, value in boxes.items()))
    if len(info.outputs) > 1 and task != "raw" and "names" not in output:
        notes.append(f"the output is the first of {len(info.outputs)}, `{result.name}`")
    if task == "classification":
        output["activation"], reason = _guess_activation(result)
        if given.activation is None:
            notes.append(f"output.activation is {output['activation']}: {reason}")
    if task in ("classification", "detection") and given.labels is None and known.labels is None:
        notes.append("labels are unknown: predictions have class numbers only")
    card = {
        "name": path.stem,
        "files": {"onnx": path.name} if known.files is None else known.files.given,
        "labels": known.labels,
        "task": task,
        **fields,
        "output": output,
    }
    return parse_card(card, path.name), tuple(notes)


def image_options(given: CardOptions) -> list[str]:
    """The options that are given and make sense for images only, as flags.

    Example:
        >>> image_options(CardOptions(crop=(224, 224), top_k=3))
        ['--crop']
    """
    return [f"--{name}" for name in _IMAGE_OPTIONS if getattr(given, name) is not None]


def check_image_options(given: CardOptions) -> None:
    """Raise ModelError for options that ask for what a card with `preprocess: null` does not do."""
    options = image_options(given)
    if options:
        hint = "leave them out, or write another card: `infermill inspect NETWORK.onnx --write model.yaml`"
        raise ModelError(f"the card has `preprocess: null`, and {', '.join(options)} would preprocess images", hint)


def _guess_boxes(network: str, info: NetworkInfo, given: CardOptions) -> dict[str, Any] | None:
    """The `output` of a network that detects; None where it does something else."""
    if given.task not in (None, "detection"):
        return None
    image = image_input(network, None, info)
    _, *size = channels_and_size(image, given.layout or layout_of(image.shape) or "NCHW")
    guessed = guess_boxes(info, size)
    if given.format is not None:
        return guessed if guessed and guessed["format"] == given.format else {"format": given.format}
    if guessed is None and given.task == "detection":
        listed = ", ".join(map(str, info.outputs))
        hint = f"say which with --format: {', '.join(FORMATS)}; see {guide('detection.md')}"
        raise ModelError(f"{network} writes boxes in no format that its outputs tell: {listed}", hint)
    return guessed


def _guess_image(
    image: TensorInfo, given: CardOptions, notes: list[str], boxes: dict[str, Any] | None, known: Known
) -> dict[str, object]:
    layout = given.layout or layout_of(image.shape)
    if layout is None:
        layout = "NCHW"
        notes.append(f"input.layout is NCHW: the shape of {image} does not tell")
    channels, *lengths = channels_and_size(image, layout)
    usual = 224 if boxes is None else 640
    size = [length if isinstance(length, int) else usual for length in lengths]
    stretched = max(size) <= 64 or size[0] != size[1]
    if size != lengths and given.crop is None and not (stretched and given.exact):
        notes.append(f"images are made {size[0]}x{size[1]}: {image} has no fixed height and width")
    if boxes is not None:
        preprocess = _guess_for_boxes(boxes["format"], image, (size[0], size[1]), given, notes)
    else:
        preprocess = _guess_size((size[0], size[1]), given, notes, stretched=stretched)
        preprocess |= _guess_values(image, size, channels, given, notes, known)
    return {"input": {"name": image.name, "layout": layout, "dtype": image.dtype}, "preprocess": preprocess}


def _guess_task(result: TensorInfo, *, takes_images: bool) -> Task:
    if result.trimmed is None or len(result.trimmed) != 2 or result.dtype not in FLOAT_DTYPES:
        return "raw"
    if not takes_images and result.trimmed[1] == 1 and result.op not in ENDS_OF_CLASSIFIERS:
        return "raw"  # a regression, more likely than two classes
    named = re.search(r"emb|feat|pool|hidden|vector", result.name, re.IGNORECASE)
    return "embedding" if named or result.op in EMBEDDING_OPS else "classification"


def _guess_activation(result: TensorInfo) -> tuple[str, str]:
    if result.op in ENDS_OF_CLASSIFIERS:
        return "none", f"the network ends in {result.op}"
    if result.trimmed is not None and result.trimmed[-1] == 1:
        return "sigmoid", f"the network ends in {result.op}, with one number per input"
    return "softmax", f"the network ends in {result.op}"


def _guess_size(size: tuple[int, int], given: CardOptions, notes: list[str], *, stretched: bool) -> dict[str, object]:
    is_guessed = given.shorter is None and given.exact is None and given.letterbox is None
    if given.letterbox is not None:
        return {"resize": {"letterbox": size}}
    if stretched or given.exact == size:
        if is_guessed:
            notes.append(f"preprocess.resize stretches images to {size[0]}x{size[1]}")
        return {"resize": {"exact": size}}
    shorter = round(size[0] / 0.875)
    if is_guessed:
        notes.append(f"preprocess.resize makes the shorter side {shorter}")
    if given.crop is None:
        notes.append(f"preprocess.crop cuts {size[0]}x{size[1]} out of the centre")
    return {"resize": {"shorter": shorter}, "crop": {"center": size}}


def _guess_for_boxes(
    box_format: str, image: TensorInfo, size: tuple[int, int], given: CardOptions, notes: list[str]
) -> dict[str, object]:
    """All of the image is there: in a letterbox as YOLO is trained, or stretched."""
    kind = "letterbox" if box_format.startswith("yolo") else "exact"
    if given.shorter is None and given.exact is None and given.letterbox is None:
        notes.append(f"preprocess.resize.{kind} is {size[0]}x{size[1]}, as networks of the format {box_format} have it")
    fields: dict[str, object] = {"resize": {kind: size}}
    if image.dtype == "uint8":
        reason = "none, since the network takes bytes"
    elif box_format == "mxnet-ssd":
        fields["mean"], reason = MXNET_SSD_MEAN, "those of MXNet's example/ssd"
    else:
        fields["scale"], reason = 1 / 255, "x / 255 and no more, as most detectors have it"
    _note_values(given, notes, reason)
    if given.color is None:
        notes.append("preprocess.color is RGB")
    return fields


def _guess_values(
    image: TensorInfo, size: Sequence[int], channels: Dim, given: CardOptions, notes: list[str], known: Known
) -> dict[str, object]:
    fields: dict[str, object] = {"scale": 1 / 255}
    if image.dtype == "uint8":
        fields, reason = {}, "none, since the network takes bytes"
    elif image.op in NORMALISING_OPS:
        fields, reason = {}, f"none, since the network begins with its own ({image.op})"
    elif max(size) <= 64 or channels == 1:
        reason = "x / 255 and no more, as small networks have it"
    elif known.values is not None:
        fields, reason = dict(known.values), known.values_reason
    else:
        fields |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        reason = "those of ImageNet training"
    _note_values(given, notes, reason)
    if channels != 1 and given.color is None:
        notes.append("preprocess.color is RGB")
    return fields


def _note_values(given: CardOptions, notes: list[str], reason: str) -> None:
    said = {"scale": given.scale, "mean": given.mean, "std": given.std}
    guessed = [f"preprocess.{name}" for name, value in said.items() if value is None]
    if guessed:
        notes.append(f"{', '.join(guessed)}: {reason}")
