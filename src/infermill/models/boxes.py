"""What a network of the task detection writes: its formats, told by the shapes and names of its outputs.

    mxnet-ssd            [N, boxes, 6]             class (-1: none), score, xmin, ymin, xmax, ymax in 0..1
    yolov10              [N, boxes, 6]             xmin, ymin, xmax, ymax in pixels of the input, score, class
    yolov5               [N, boxes, 5 + classes]   x, y, width, height in pixels of the input, objectness, scores
    yolov8               [N, 4 + classes, boxes]   x, y, width, height in pixels of the input, scores
    boxes-labels-scores  [N, boxes, 4], [N, boxes], [N, boxes] and, it may be, [N]: how many of the boxes count
    boxes-scores         [N, boxes, 4], [N, boxes, classes]

The first two and boxes-labels-scores have suppressed overlapping boxes themselves.
"""

import re
from collections.abc import Sequence
from typing import Any, get_args

from infermill.errors import ModelError, guide
from infermill.models.card import ModelCard
from infermill.models.onnx import FLOAT_DTYPES, Dim, NetworkInfo, TensorInfo
from infermill.types import DetectionFormat

FORMATS: tuple[DetectionFormat, ...] = get_args(DetectionFormat)
APART: DetectionFormat = "boxes-labels-scores"
SCORED: DetectionFormat = "boxes-scores"
SEVERAL = (APART, SCORED)
"These have several outputs."
NEEDED_SHAPES: dict[DetectionFormat, str] = {
    "mxnet-ssd": "[N, boxes, 6]",
    "yolov10": "[N, boxes, 6]",
    "yolov5": "[N, boxes, 5 + classes]",
    "yolov8": "[N, 4 + classes, boxes]",
}
_PARTS = {
    "boxes": "box",
    "labels": "label|class",
    "scores": "score|conf",
    "count": "^num|count",
}
# TensorFlow's object detection API writes more than the detections.
_BY_THE_WAY = re.compile("raw|multiclass|anchor|encoding|feature", re.IGNORECASE)
# The axis that has the classes, and how many numbers are before them.
_OF_CLASSES: dict[DetectionFormat, tuple[int, int]] = {"yolov5": (2, 5), "yolov8": (1, 4), SCORED: (2, 0)}
_STRIDES = (8, 16, 32, 64)
# The dim of the boxes, and how many of them each cell has.
_GRIDS: tuple[tuple[DetectionFormat, int, int], ...] = (("yolov5", 1, 3), ("yolov8", 2, 1))


def check_boxes(
    card: ModelCard, labels: tuple[str, ...] | None, outputs: Sequence[TensorInfo], size: Sequence[Dim]
) -> None:
    """Prove that the outputs can be what the card says.

    Args:
        card: a card of the task detection.
        labels: the names of the classes.
        outputs: those that predictions are made of.
        size: height and width of the network's input, as far as they are known.

    Raises:
        ModelError: they cannot, or the card does not say what they are.
    """
    if card.preprocess is None:
        raise ModelError(
            "the card has `preprocess: null`, and detection finds boxes in images", "set `task: raw`, or preprocess"
        )
    if card.output.activation != "none":
        raise ModelError(
            f"`output.activation: {card.output.activation}` is nothing for detection", "remove `output.activation`"
        )
    name = card.output.format
    if name is None:
        told = _told_by_shape(outputs[0], size)
        hint = f"set it to {told}" if told else f"set it to one of: {', '.join(FORMATS)}; see {guide('detection.md')}"
        raise ModelError("the task detection needs `output.format`", hint)
    if name in SEVERAL:
        _check_parts(card, outputs)
    else:
        _check_shape(name, outputs[0], size)
    background = card.output.background
    if background is not None and name != SCORED:
        raise ModelError(f"`output.background` is nothing for the format {name}", "remove `output.background`")
    if name == APART:
        return
    output = next(one for one in outputs if name != SCORED or one.name == card.output.names.scores)
    classes = _classes(name, output.shape)
    if background is not None and classes is not None and background >= classes:
        hint = "set it to the number of the class that is nothing, or remove it"
        raise ModelError(f"`output.background` is {background}, and the output {output} has {classes} classes", hint)
    counts = {"`classes` says": card.classes, "`labels` has": None if labels is None else len(labels)}
    for what, count in counts.items():
        if count is not None and classes is not None and count != classes:
            hint = f"the network has {classes} classes: use the labels, or the network, that belong together"
            raise ModelError(f"{what} {count}, and the output {output} has {classes} classes", hint)


def _check_shape(name: DetectionFormat, output: TensorInfo, size: Sequence[Dim]) -> None:
    told = _told_by_shape(output, size)
    is_other_way_round = {name, told} == {"yolov5", "yolov8"}
    if output.dtype not in FLOAT_DTYPES or not fits(name, output.shape) or is_other_way_round:
        hint = f"set `output.format: {told}`" if told else "name another output in `output.name`, or another format"
        raise ModelError(f"the output {output} is not of the format {name}: that is {NEEDED_SHAPES[name]}", hint)


def _check_parts(card: ModelCard, outputs: Sequence[TensorInfo]) -> None:
    names = card.output.names
    for output in outputs:
        shape = output.shape
        if output.name == names.boxes and (
            output.dtype not in FLOAT_DTYPES or (shape is not None and (len(shape) != 3 or shape[2] not in (4, None)))
        ):
            hint = "name another output in `output.names.boxes`; each image needs its row of boxes"
            raise ModelError(f"the output {output} holds no boxes: that is [N, boxes, 4]", hint)
        if output.name == names.scores and output.dtype not in FLOAT_DTYPES:
            hint = "name another output in `output.names.scores`"
            raise ModelError(f"the output {output} holds no scores: those are floating-point numbers", hint)
        if output.name == names.scores and card.output.format == SCORED and shape is not None and len(shape) != 3:
            hint = f"name another output in `output.names.scores`, or set `output.format: {APART}`"
            raise ModelError(f"the output {output} holds no scores of classes: that is [N, boxes, classes]", hint)


def fits(name: DetectionFormat, shape: tuple[Dim, ...] | None) -> bool:
    """Whether an output of this shape, as far as it is known, can be of a format that has one output."""
    if shape is None:
        return True  # it is seen when the network runs
    if len(shape) != 3:
        return False
    if name in ("mxnet-ssd", "yolov10"):
        return not isinstance(shape[2], int) or shape[2] == 6
    classes = _classes(name, shape)
    return classes is None or classes > 0


def _classes(name: DetectionFormat, shape: tuple[Dim, ...] | None) -> int | None:
    """How many classes the shape of an output tells."""
    if shape is None or name not in _OF_CLASSES:
        return None
    axis, before = _OF_CLASSES[name]
    dim = shape[axis]
    return dim - before if isinstance(dim, int) else None


def guess_boxes(info: NetworkInfo, size: Sequence[Dim]) -> dict[str, Any] | None:
    """The fields of `output` for a network that looks like a detector of this input size; None where it does not."""
    names = _told_by_names(info.outputs)
    if "labels" not in names and {"boxes", "scores"} <= names.keys():
        boxes, scores = (next(one for one in info.outputs if one.name == names[part]) for part in ("boxes", "scores"))
        if _are_of_the_same(boxes.shape, scores.shape):
            # As exports of SSD have it; nothing tells.
            order = {"coordinates": "normalized", "background": 0}
            return {"format": SCORED, "names": {"boxes": boxes.name, "scores": scores.name}, **order}
    if {"boxes", "labels", "scores"} <= names.keys():
        is_tensorflow = names["boxes"].startswith("detection_boxes")
        order = {"coordinates": "normalized", "corners": "yxyx"} if is_tensorflow else {}
        return {"format": APART, "names": names, **order}
    name = _told_by_shape(info.outputs[0], size)
    if name is None and _is_six_wide(info.outputs[0]):
        name = "yolov10" if info.producer.startswith("pytorch") else "mxnet-ssd"
    return None if name is None else {"format": name}


def _told_by_names(outputs: Sequence[TensorInfo]) -> dict[str, str]:
    """What outputs hold -> their names, where just one is called so."""
    named = [output.name for output in outputs if not _BY_THE_WAY.search(output.name)]
    found = {part: [name for name in named if re.search(words, name, re.IGNORECASE)] for part, words in _PARTS.items()}
    return {part: names[0] for part, names in found.items() if len(names) == 1}


def _are_of_the_same(boxes: tuple[Dim, ...] | None, scores: tuple[Dim, ...] | None) -> bool:
    """Whether these are shapes of boxes, and of their scores for each of several classes."""
    if boxes is None or scores is None or not len(boxes) == len(scores) == 3:
        return False
    return boxes[2] == 4 and boxes[1] == scores[1] and isinstance(scores[2], int) and scores[2] > 1


def _told_by_shape(output: TensorInfo, size: Sequence[Dim]) -> DetectionFormat | None:
    """YOLO has one box for each cell of three or four grids, or three of them, and no other network as many."""
    if output.shape is None or len(output.shape) != 3 or output.dtype not in FLOAT_DTYPES:
        return None
    for name, axis, boxes_a_cell in _GRIDS:
        boxes, classes = output.shape[axis], _classes(name, output.shape)
        if classes is not None and classes > 0 and (boxes == "anchors" or boxes in _box_counts(size, boxes_a_cell)):
            return name
    return None


def _box_counts(size: Sequence[Dim], boxes_a_cell: int) -> tuple[int, ...]:
    height, width = size
    if not isinstance(height, int) or not isinstance(width, int):
        return ()
    boxes = [(height // stride) * (width // stride) * boxes_a_cell for stride in _STRIDES]
    return sum(boxes[:3]), sum(boxes)


def _is_six_wide(output: TensorInfo) -> bool:
    shape = output.shape
    return shape is not None and len(shape) == 3 and shape[2] == 6 and output.dtype in FLOAT_DTYPES
