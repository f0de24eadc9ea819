"""What a network that detects says of one image -> the best boxes, in pixels of the network's input.

    arrays of a row ─► candidates: score above the threshold ─► best: sorted, overlaps suppressed ─► at most so many

The formats are those of `models/boxes.py`. Equal scores keep the order of the network, so that the same arrays give
the same detections everywhere.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from infermill.errors import ModelError
from infermill.models.boxes import NEEDED_SHAPES, SCORED, SEVERAL, fits
from infermill.models.card import Output
from infermill.types import DetectionFormat

Floats = NDArray[np.float32]
# float32 holds every integer up to here, and no network has as many classes.
_MAX_CLASS = 1 << 24
_NORMALIZED: tuple[DetectionFormat, ...] = ("mxnet-ssd",)
_OVERLAPPING: tuple[DetectionFormat, ...] = ("yolov5", "yolov8", SCORED)


class Candidates(NamedTuple):
    """Boxes [n, 4] as (xmin, ymin, xmax, ymax), their scores [n] and classes [n]."""

    boxes: Floats
    scores: Floats
    classes: NDArray[np.int32]

    def only(self, chosen: NDArray[Any]) -> "Candidates":
        """Those of a mask or of indices."""
        return Candidates(self.boxes[chosen], self.scores[chosen], self.classes[chosen])


class Detector:
    """Reads the outputs of a network, as the card describes them."""

    def __init__(self, output: Output, names: Sequence[str], size: tuple[int, int]) -> None:
        self._output = output
        self._names = names
        height, width = size
        is_normalized = output.coordinates == "normalized"
        if output.coordinates is None:
            is_normalized = output.format in _NORMALIZED
        self._unit = np.array([width, height, width, height] if is_normalized else [1] * 4, np.float32)

    def check(self, arrays: Sequence[NDArray[Any]]) -> None:
        """Raise ModelError where the arrays of a batch are not what the card says: shapes may not be known before."""
        name = self._output.format
        if name is not None and name not in SEVERAL:
            if not fits(name, arrays[0].shape):
                raise ModelError(
                    f"the network answers {list(arrays[0].shape)} in `{self._names[0]}`, and the format {name} is "
                    f"{NEEDED_SHAPES[name]}",
                    "set another `output.format`, or name another output in `output.name`",
                )
            return
        parts = self._parts(arrays)
        if name == SCORED:
            self._check_scores(parts["boxes"].shape, parts["scores"].shape)
            return
        counts = {part: parts[part].size for part in ("labels", "scores")}
        if parts["boxes"].ndim != 3 or parts["boxes"].shape[2] != 4 or {*counts.values()} != {parts["boxes"].size // 4}:
            shapes = ", ".join(f"{part} {list(array.shape)}" for part, array in parts.items())
            raise ModelError(
                f"the network answers {shapes}, where [N, boxes, 4], [N, boxes] and [N, boxes] are wanted",
                f"name other outputs in `output.names`; scores of [N, boxes, classes] are the format {SCORED}",
            )

    def _check_scores(self, boxes: tuple[int, ...], scores: tuple[int, ...]) -> None:
        if len(scores) != 3 or not scores[2] or boxes != (*scores[:2], 4):
            raise ModelError(
                f"the network answers boxes {list(boxes)}, scores {list(scores)}, where [N, boxes, 4] and "
                "[N, boxes, classes] are wanted",
                "name other outputs in `output.names`, or set another `output.format`",
            )

    def candidates(self, row: Sequence[NDArray[Any]]) -> Candidates | None:
        """What may be kept of the outputs of one image; None where they hold NaN or infinity."""
        with np.errstate(over="ignore"):  # a box may be as large as it likes: it is cut to the image
            name = self._output.format
            if name == SCORED:
                candidates = self._scored(self._parts(row))
            elif name is None or name in SEVERAL:
                candidates = self._apart(self._parts(row))
            else:
                values = row[0].astype(np.float32, copy=False)
                is_finite = np.isfinite(values).all()
                candidates = _READERS[name](values, self._output.score_threshold) if is_finite else None
            return None if candidates is None else candidates._replace(boxes=candidates.boxes * self._unit)

    def best(self, candidates: Candidates) -> NDArray[np.intp]:
        """The indices of the candidates that are kept, best first."""
        order = np.argsort(-candidates.scores, kind="stable")
        if self._output.format in _OVERLAPPING:
            boxes, _, classes = candidates.only(order)
            order = order[suppress(boxes, classes, self._output.iou_threshold, self._output.max_detections)]
        return order[: self._output.max_detections]

    def _parts(self, arrays: Sequence[NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        by_name = dict(zip(self._names, arrays, strict=True))
        return {part: by_name[name] for part, name in self._output.parts.items()}

    def _apart(self, parts: Mapping[str, NDArray[Any]]) -> Candidates | None:
        count = parts["count"].ravel()[0] if "count" in parts else len(parts["boxes"])
        if not np.isfinite(count):
            return None
        taken = slice(max(int(count), 0))  # what stands behind may be anything
        boxes = parts["boxes"].astype(np.float32)[taken]
        scores, labels = (parts[part].ravel().astype(np.float32)[taken] for part in ("scores", "labels"))
        if not all(np.isfinite(array).all() for array in (boxes, scores, labels)):
            return None
        return _above(self._output.score_threshold, self._ordered(boxes), scores, labels)

    def _scored(self, parts: Mapping[str, NDArray[Any]]) -> Candidates | None:
        boxes, scores = (parts[part].astype(np.float32) for part in ("boxes", "scores"))
        if not all(np.isfinite(array).all() for array in (boxes, scores)):
            return None
        if self._output.background is not None:
            scores[:, self._output.background : self._output.background + 1] = 0  # which no threshold lets pass
        return _of_best_class(self._ordered(boxes), scores, self._output.score_threshold)

    def _ordered(self, boxes: Floats) -> Floats:
        return boxes[:, [1, 0, 3, 2]] if self._output.corners == "yxyx" else boxes


def suppress(boxes: Floats, classes: NDArray[np.int32], iou_threshold: float, max_count: int) -> list[int]:
    """The indices of boxes, which come best first, that no better one of their class overlaps by too much.

    Overlap is intersection over union, as in ONNX's NonMaxSuppression: what has exactly `iou_threshold` stays.

    Example:
        >>> boxes = np.array([[0, 0, 9, 9], [1, 0, 9, 9], [1, 0, 9, 9]], np.float32)
        >>> suppress(boxes, np.array([0, 0, 1], np.int32), 0.5, 10)
        [0, 2]
    """
    kept: list[int] = []
    left = np.arange(len(classes))
    while len(left) and len(kept) < max_count:
        first, left = int(left[0]), left[1:]
        kept.append(first)
        is_too_near = (classes[left] == classes[first]) & (_overlap(boxes[first], boxes[left]) > iou_threshold)
        left = left[~is_too_near]
    return kept


def _overlap(box: Floats, boxes: Floats) -> Floats:
    """Intersection over union of one box with others; 0 where there is no area."""
    with np.errstate(over="ignore", invalid="ignore"):
        sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
        common = sides.clip(0).prod(axis=1)
        union = (box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) - common
        overlap: Floats = np.divide(common, union, out=np.zeros_like(common), where=union > 0)
    return overlap


def _above(threshold: float, boxes: Floats, scores: Floats, classes: Floats) -> Candidates:
    chosen = (scores > threshold) & (classes >= 0)
    kept = classes[chosen].clip(0, _MAX_CLASS).astype(np.int32)
    return Candidates(boxes[chosen], scores[chosen], kept)


def _mxnet_ssd(rows: Floats, threshold: float) -> Candidates:
    return _above(threshold, rows[:, 2:6], rows[:, 1], rows[:, 0])


def _yolov10(rows: Floats, threshold: float) -> Candidates:
    return _above(threshold, rows[:, :4], rows[:, 4], rows[:, 5])


def _yolov5(rows: Floats, threshold: float) -> Candidates:
    rows = rows[rows[:, 4] > threshold]  # objectness, which no score exceeds
    return _centred(rows[:, :4], rows[:, 5:] * rows[:, 4:5], threshold)


def _yolov8(columns: Floats, threshold: float) -> Candidates:
    columns = columns[:, columns[4:].max(axis=0, initial=0) > threshold]
    return _centred(columns[:4].T, columns[4:].T, threshold)


def _centred(boxes: Floats, scores: Floats, threshold: float) -> Candidates:
    """Of boxes (x, y, width, height), each with scores for all classes."""
    half = boxes[:, 2:] / 2
    corners = np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], axis=1)
    return _of_best_class(corners, scores, threshold)


def _of_best_class(corners: Floats, scores: Floats, threshold: float) -> Candidates:
    best = scores.argmax(axis=1) if len(scores) else np.zeros(0, np.intp)
    return _above(threshold, corners, scores[np.arange(len(best)), best], best.astype(np.float32))


_READERS: Mapping[DetectionFormat, Callable[[Floats, float], Candidates]] = {
    "mxnet-ssd": _mxnet_ssd,
    "yolov5": _yolov5,
    "yolov8": _yolov8,
    "yolov10": _yolov10,
}
