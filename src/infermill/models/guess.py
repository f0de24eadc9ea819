"""A first model card for a network that came without one."""

import re
from collections.abc import Sequence
from pathlib import Path

from infermill.models.card import ModelCard, parse_card
from infermill.models.onnx import FLOAT_DTYPES, Dim, NetworkInfo, TensorInfo, channels_and_size, image_input, layout_of
from infermill.types import CardOptions, Task

NORMALISING_OPS = ("Sub", "Mul", "Div", "Add", "BatchNormalization")
POOLING_OPS = ("GlobalAveragePool", "GlobalMaxPool", "AveragePool", "MaxPool", "ReduceMean", "ReduceMax")
EMBEDDING_OPS = (*POOLING_OPS, "LpNormalization", "LayerNormalization", "Div")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def guess_card(path: Path, info: NetworkInfo, given: CardOptions) -> tuple[ModelCard, tuple[str, ...]]:
    """A first card for the network at `path`, and one sentence for each thing in it that is assumed.

    What is `given` is for the caller to put into the card; here, the rest is guessed to go with it.

    Raises:
        ModelError: the network takes something else than one image.
    """
    image, result = image_input(path.name, None, info), info.outputs[0]
    notes: list[str] = []
    layout = given.layout or layout_of(image.shape)
    if layout is None:
        layout = "NCHW"
        notes.append(f"input.layout is NCHW: the shape of {image} does not tell")
    channels, *lengths = channels_and_size(image, layout)
    size = [length if isinstance(length, int) else 224 for length in lengths]
    stretched = max(size) <= 64 or size[0] != size[1]
    if size != lengths and given.crop is None and not (stretched and given.exact):
        notes.append(f"images are made {size[0]}x{size[1]}: {image} has no fixed height and width")
    preprocess = _guess_size((size[0], size[1]), given, notes, stretched=stretched)
    preprocess |= _guess_values(image, size, channels, given, notes)
    task, activation = given.task or _guess_task(result), "none"
    if given.task is None:
        notes.append(f"task is {task}: the output is {result}")
    if len(info.outputs) > 1 and task != "raw":
        notes.append(f"the output is the first of {len(info.outputs)}, `{result.name}`")
    if task == "classification":
        activation, reason = _guess_activation(result)
        if given.activation is None:
            notes.append(f"output.activation is {activation}: {reason}")
        if given.labels is None:
            notes.append("labels are unknown: predictions have class numbers only")
    card = {
        "name": path.stem,
        "files": {"onnx": path.name},
        "task": task,
        "input": {"name": image.name, "layout": layout, "dtype": image.dtype},
        "preprocess": preprocess,
        "output": {"activation": activation},
    }
    return parse_card(card, path.name), tuple(notes)


def _guess_task(result: TensorInfo) -> Task:
    if result.trimmed is None or len(result.trimmed) != 2 or result.dtype not in FLOAT_DTYPES:
        return "raw"
    named = re.search(r"emb|feat|pool|hidden|vector", result.name, re.IGNORECASE)
    return "embedding" if named or result.op in EMBEDDING_OPS else "classification"


def _guess_activation(result: TensorInfo) -> tuple[str, str]:
    if result.op in ("Softmax", "Sigmoid", "HardSigmoid"):
        return "none", f"the network ends in {result.op}"
    if result.trimmed is not None and result.trimmed[-1] == 1:
        return "sigmoid", f"the network ends in {result.op}, with one number per image"
    return "softmax", f"the network ends in {result.op}"


def _guess_size(size: tuple[int, int], given: CardOptions, notes: list[str], *, stretched: bool) -> dict[str, object]:
    is_guessed = given.shorter is None and given.exact is None
    if stretched:
        if is_guessed:
            notes.append(f"preprocess.resize stretches images to {size[0]}x{size[1]}")
        return {"resize": {"exact": size}}
    shorter = round(size[0] / 0.875)
    if is_guessed:
        notes.append(f"preprocess.resize makes the shorter side {shorter}")
    if given.crop is None:
        notes.append(f"preprocess.crop cuts {size[0]}x{size[1]} out of the centre")
    return {"resize": {"shorter": shorter}, "crop": {"center": size}}


def _guess_values(
    image: TensorInfo, size: Sequence[int], channels: Dim, given: CardOptions, notes: list[str]
) -> dict[str, object]:
    fields: dict[str, object] = {"scale": 1 / 255}
    if image.dtype == "uint8":
        fields, reason = {}, "none, since the network takes bytes"
    elif image.op in NORMALISING_OPS:
        fields, reason = {}, f"none, since the network begins with its own ({image.op})"
    elif max(size) <= 64 or channels == 1:
        reason = "x / 255 and no more, as small networks have it"
    else:
        fields |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        reason = "those of ImageNet training"
    said = {"scale": given.scale, "mean": given.mean, "std": given.std}
    guessed = [f"preprocess.{name}" for name, value in said.items() if value is None]
    if guessed:
        notes.append(f"{', '.join(guessed)}: {reason}")
    if channels != 1 and given.color is None:
        notes.append("preprocess.color is RGB")
    return fields
