"""What a network was trained with, told from its graph: the preprocessing, and the size of its images.

Sources: example/image-classification (`train_imagenet.py`, `test_score.py`), example/ssd (`demo.py`) and
python/mxnet/gluon/model_zoo/vision of MXNet 1.x.
"""

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infermill.models.mxnet.params import Params
from infermill.models.mxnet.symbol import Symbol
from infermill.types import Task

_IMAGENET_PIXELS = (123.68, 116.779, 103.939)
_SSD_PIXELS = (123.0, 117.0, 104.0)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Sides of images that networks are usually trained with, the most usual first.
USUAL_SIDES = (224, 299, 28, 32, 227, 300, 512, 64, 96, 112, 128, 160, 192, 256, 320, 416, 448, 608)
_CONVOLUTIONS = ("Convolution", "Convolution_v1")
# Behind these, a layer's weights tell nothing of the input.
_SEQUENCE_OPS = ("Embedding", "RNN", "dot", "batch_dot")
_SSD_PRIORS_300 = 6


@dataclass(frozen=True, slots=True)
class Family:
    """How networks of a kind take their images: `(pixel · scale - mean) / std`."""

    name: str
    side: int = 224
    scale: float = 1.0
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    task: Task | None = None
    "What its networks do, where the end of the graph tells something else."

    @property
    def preprocess(self) -> dict[str, Any]:
        """The fields of a card."""
        return {"scale": self.scale, "mean": self.mean, "std": self.std}


def family_of(symbol: Symbol) -> Family:
    """The family that a network's graph looks like.

    Example:
        >>> family_of(read_symbol(Path("resnet-18-symbol.json"))).mean  # doctest: +SKIP
        (0.0, 0.0, 0.0)
    """
    names = {node.name for node in symbol.nodes}
    ops = [node.op for node in symbol.nodes]
    gluon = any(name.endswith("_fwd") for name in names)
    if "MultiBoxDetection" in ops or "_contrib_MultiBoxDetection" in ops:
        priors = sum(op in ("MultiBoxPrior", "_contrib_MultiBoxPrior") for op in ops)
        side = 300 if priors == _SSD_PRIORS_300 and "relu4_3" in names else 512
        return Family("SSD of MXNet's example/ssd", side, mean=_SSD_PIXELS)
    if gluon:
        side = 299 if any(name.startswith("inception") for name in names) else 224
        # SqueezeNet ends in a pooling of its classes, as networks do whose features are wanted.
        task: Task | None = "classification" if any(name.startswith("squeezenet") for name in names) else None
        return Family("Gluon's model zoo", side, 1 / 255, _IMAGENET_MEAN, _IMAGENET_STD, task)
    if any(node.op == "BatchNorm" and node.name == "bn_data" for node in symbol.nodes):
        return Family("MXNet's ResNet, which normalises by itself (bn_data)")
    if "mixed_conv" in names or any(name.startswith("mixed_10_") for name in names):
        return Family("MXNet's Inception-v3", 299, mean=_IMAGENET_PIXELS)
    return Family("MXNet's example/image-classification", mean=_IMAGENET_PIXELS)


def input_shapes(
    symbol: Symbol, params: Params, family: Family, height_width: tuple[int, int] | None
) -> tuple[tuple[int, ...], ...]:
    """The shapes that one input may have, without the batch, the likeliest first; none where nothing tells them.

    The input variable may declare it. Else the first weights on the way tell: a convolution the channels of images,
    which are `height_width` in size or, without, that of the family or another usual one; a fully connected layer
    how many numbers a row has.

    Raises:
        ModelError: the network has not exactly one input.
    """
    arrays = {**params.arg, **params.aux}
    name = symbol.input_name(arrays)
    tip = next(index for index, node in enumerate(symbol.nodes) if node.name == name)
    declared = _declared(symbol.nodes[tip].attrs.get("__shape__"))
    if declared is not None:
        is_resized = len(declared) == 3 and height_width is not None
        return ((declared[0], *(height_width or ())),) if is_resized else (declared,)
    is_flattened = False
    for index, node in enumerate(symbol.nodes):
        if not node.inputs or node.inputs[0][0] != tip:
            continue
        tip = index
        is_flattened = is_flattened or node.op in ("Flatten", "flatten")
        weight = arrays.get(symbol.nodes[node.inputs[1][0]].name) if len(node.inputs) > 1 else None
        if node.op in _SEQUENCE_OPS:
            break
        if node.op == "FullyConnected" and weight is not None and weight.ndim == 2:
            return (_row(weight.shape[1], is_image=is_flattened),)
        if node.op in _CONVOLUTIONS and weight is not None and weight.ndim == 4:
            channels = weight.shape[1] * _groups(node.attrs)
            sides = dict.fromkeys((family.side, *USUAL_SIDES))
            return tuple((channels, *size) for size in ([height_width] if height_width else [(s, s) for s in sides]))
    return ()


def _declared(text: str | None) -> tuple[int, ...] | None:
    """`(0, 3, 224, 224)`, as a variable may say it, less the batch."""
    try:
        shape = ast.literal_eval(text or "None")
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # TypeError: `{[]: 0}`
        return None
    is_shape = isinstance(shape, tuple) and len(shape) > 1 and all(type(dim) is int and dim > 0 for dim in shape[1:])
    return shape[1:] if is_shape else None


def _groups(attrs: Mapping[str, str]) -> int:
    text = attrs.get("num_group", "1")
    return int(text) if text.isdecimal() and len(text) < 6 else 1


def _row(count: int, *, is_image: bool) -> tuple[int, ...]:
    """A flattened image is told by its number of pixels: 784 are 28x28, and 3,072 are 32x32 of three colours."""
    for channels in (1, 3):
        side = math.isqrt(count // channels)
        if is_image and side in USUAL_SIDES and channels * side * side == count:
            return (channels, side, side)
    return (count,)
