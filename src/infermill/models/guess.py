"""A first model card for a network that came without one."""

import re
from pathlib import Path

from infermill.models.card import ModelCard, parse_card
from infermill.models.onnx import FLOAT_DTYPES, Dim, NetworkInfo, TensorInfo, channels_and_size, image_input, layout_of
from infermill.types import Task

NORMALISING_OPS = ("Sub", "Mul", "Div", "Add", "BatchNormalization")
POOLING_OPS = ("GlobalAveragePool", "GlobalMaxPool", "AveragePool", "MaxPool", "ReduceMean", "ReduceMax")
EMBEDDING_OPS = (*POOLING_OPS, "LpNormalization", "LayerNormalization", "Div")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def guess_card(path: Path, info: NetworkInfo) -> tuple[ModelCard, tuple[str, ...]]:
    """A first card for the network at `path`, and one sentence for each thing in it that is assumed.

    Raises:
        ModelError: the network takes something else than one image.
    """
    image, result = image_input(path.name, None, info), info.outputs[0]
    notes: list[str] = []
    layout = layout_of(image.shape)
    if layout is None:
        layout = "NCHW"
        notes.append(f"input.layout is NCHW: the shape of {image} does not tell")
    channels, *lengths = channels_and_size(image, layout)
    size = [length if isinstance(length, int) else 224 for length in lengths]
    if size != lengths:
        notes.append(f"images are made {size[0]}x{size[1]}: {image} has no fixed height and width")
    preprocess = _guess_preprocess(image, (size[0], size[1]), channels, notes)
    task, activation = _guess_task(result), "none"
    notes.append(f"task is {task}: the output is {result}")
    if len(info.outputs) > 1 and task != "raw":
        notes.append(f"the output is the first of {len(info.outputs)}, `{result.name}`")
    if task == "classification":
        activation = "none" if result.op in ("Softmax", "Sigmoid", "HardSigmoid") else "softmax"
        notes.append(f"output.activation is {activation}: the network ends in {result.op}")
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


def _guess_preprocess(image: TensorInfo, size: tuple[int, int], channels: Dim, notes: list[str]) -> dict[str, object]:
    fields: dict[str, object] = {}
    if max(size) <= 64 or size[0] != size[1]:
        fields["resize"] = {"exact": size}
        notes.append(f"preprocess.resize stretches images to {size[0]}x{size[1]}")
    else:
        shorter = round(size[0] / 0.875)
        fields |= {"resize": {"shorter": shorter}, "crop": {"center": size}}
        notes.append(f"preprocess.resize makes the shorter side {shorter}, and crop cuts {size[0]}x{size[1]} out of it")
    if image.dtype == "uint8":
        notes.append("preprocess has no scale, mean and std: the network takes bytes")
    elif image.op in NORMALISING_OPS:
        notes.append(f"preprocess has no scale, mean and std: the network begins with its own ({image.op})")
    elif max(size) <= 64 or channels == 1:
        fields["scale"] = 1 / 255
        notes.append("preprocess.scale is 1/255, without mean and std, as small networks have it")
    else:
        fields |= {"scale": 1 / 255, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        notes.append("preprocess.scale, mean and std are those of ImageNet training")
    if channels != 1:
        notes.append("preprocess.color is RGB")
    return fields
