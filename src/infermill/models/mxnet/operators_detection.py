"""Single-shot detectors: anchors, boxes from anchors, and the suppression of what overlaps.

Both operators that suppress order the boxes first, and then let ONNX's NonMaxSuppression choose. What it is given as
scores are ranks, in the plane of the box's class:

    class 0   3 . . 0        the first box is of class 0 and the best, the second of class 1; a 0 is never chosen
    class 1   . 2 1 0

so that ties are decided as MXNet does, and a box competes with its own class alone.
"""

import numpy as np

from infermill.models.mxnet.graph import Step, Tensor, Translate
from infermill.models.mxnet.operators_shape import cut

_INT64 = np.iinfo(np.int64)


@np.errstate(over="ignore", divide="ignore", invalid="ignore")
def multibox_prior(step: Step) -> Tensor:
    """src/operator/contrib/multibox_prior.cc, whose arithmetic is float32."""
    attributes = step.attributes
    height, width = step.lengths(step.data, [2, 3])
    sizes = np.array(attributes.numbers("sizes", (1.0,)), np.float32)
    given = attributes.numbers("ratios", (1.0,))
    steps, offsets = attributes.numbers("steps", (-1.0, -1.0)), attributes.numbers("offsets", (0.5, 0.5))
    if len(steps) != 2 or len(offsets) != 2 or not len(sizes) or not given or min(given) <= 0:
        raise step.refused(f"it has {len(sizes)} sizes, ratios {given}, steps {steps} and offsets {offsets}")
    step.countable(height * width * (len(sizes) + len(given) - 1))
    ratios = np.sqrt(np.array(given, np.float32))
    if min(steps) <= 0:
        steps = (1 / height, 1 / width)
    # Every size with the first ratio, then the other ratios with the first size; half of each side counts.
    half_height = np.concatenate([sizes / ratios[0], sizes[0] / ratios[1:]]) / 2
    half_width = np.concatenate([sizes * ratios[0], sizes[0] * ratios[1:]]) * np.float32(height / width) / 2
    half = np.stack([half_width, half_height], -1)
    y = (np.arange(height, dtype=np.float32) + np.float32(offsets[0])) * np.float32(steps[0])
    x = (np.arange(width, dtype=np.float32) + np.float32(offsets[1])) * np.float32(steps[1])
    centre = np.stack(np.meshgrid(x, y), -1)[:, :, None, :]
    boxes = np.concatenate([centre - half, centre + half], -1).reshape(1, -1, 4)
    return step.constant(np.clip(boxes, 0, 1) if attributes.boolean("clip", False) else boxes, np.float32)


def multibox_detection(step: Step) -> Tensor:
    """src/operator/contrib/multibox_detection.cc: rows of class, score and corners; a class of -1 is nothing."""
    attributes = step.attributes
    classes, count = step.lengths(step.data, [1, 2])
    step.countable(count * classes)
    scores = cut(step, step.data, {1: (1, _INT64.max, 1)})
    best = step.add("ReduceMax", scores, step.integers([1]), keepdims=0)
    label = step.cast(step.add("ArgMax", scores, axis=1, keepdims=0), np.float32)
    valid = step.add("GreaterOrEqual", best, step.number(attributes.number("threshold", 0.01)))
    boxes = _decoded(step, step.input(1), step.input(2), count)
    last = step.integers([2])
    rows = step.add("Concat", step.add("Unsqueeze", label, last), step.add("Unsqueeze", best, last), boxes, axis=2)
    in_place = _where(step, *_ordered(step, rows, valid, _falling_where(step, valid, count), count))
    threshold, topk = attributes.number("nms_threshold", 0.5), attributes.integer("nms_topk", -1)
    if not 0 < threshold <= 1:
        return in_place
    kept = min(topk, count) if topk > 0 else count
    order = step.add("Where", valid, best, step.number(-2))
    rows, valid = _sorted(step, rows, valid, order, kept)
    same = classes - 1
    if attributes.boolean("force_suppress", False):
        same = 1
    label = step.reshape(cut(step, rows, {2: (0, 1, 1)}), [0, -1])
    plane = _plane(step, label, step.constant(np.arange(same), np.float32), everything=same == 1)
    # MXNet suppresses at the threshold, ONNX above it.
    below = float(np.nextafter(np.float32(threshold), np.float32(0)))
    chosen = _chosen(step, cut(step, rows, {2: (2, 6, 1)}), valid, plane, below, kept)
    label = step.add("Where", chosen, label, step.number(-1))
    named = step.add("Concat", step.add("Unsqueeze", label, last), cut(step, rows, {2: (1, 6, 1)}), axis=2)
    result = _where(step, named, valid)
    if kept == count:
        return result
    # What is beyond `nms_topk` stays where it was before the sorting, without its class.
    rest = cut(step, in_place, {1: (kept, _INT64.max, 1)})
    gone = step.add("Min", cut(step, rest, {2: (0, 1, 1)}), step.number(-1))
    rest = step.add("Concat", gone, cut(step, rest, {2: (1, 6, 1)}), axis=2)
    return step.add("Concat", result, rest, axis=1)


@np.errstate(over="ignore")
def _decoded(step: Step, offsets: Tensor, anchors: Tensor, count: int) -> Tensor:
    """Corners, from anchors and what the network says of each: the centre's shift and the sides' logarithm."""
    variances = step.attributes.numbers("variances", (0.1, 0.1, 0.2, 0.2))
    if len(variances) != 4:
        raise step.refused(f"its variances are {variances}")
    shift, growth = np.split(np.array(variances, np.float32), 2)
    offsets = step.reshape(offsets, [-1, count, 4])
    low, high = cut(step, anchors, {2: (0, 2, 1)}), cut(step, anchors, {2: (2, 4, 1)})
    sides = step.add("Sub", high, low)
    centre = step.add("Div", step.add("Add", low, high), step.number(2))
    moved = step.add("Mul", cut(step, offsets, {2: (0, 2, 1)}), step.constant(shift, np.float32))
    centre = step.add("Add", step.add("Mul", moved, sides), centre)
    grown = step.add("Exp", step.add("Mul", cut(step, offsets, {2: (2, 4, 1)}), step.constant(growth, np.float32)))
    half = step.add("Div", step.add("Mul", grown, sides), step.number(2))
    corners = step.add("Concat", step.add("Sub", centre, half), step.add("Add", centre, half), axis=2)
    if not step.attributes.boolean("clip", True):
        return corners
    return step.add("Clip", corners, step.number(0), step.number(1))


def box_nms(step: Step) -> dict[str, Tensor]:
    """src/operator/contrib/bounding_box-inl.h: the boxes that are kept, best first, and then rows of -1."""
    attributes, data = step.attributes, step.data
    count, width = step.lengths(data, [-2, -1])
    step.countable(count)
    topk = attributes.integer("topk", -1)
    kept = count if topk < 0 else min(topk, count)
    if kept < 1:
        return {"output0": data}
    start, score_at = attributes.integer("coord_start", 2), attributes.integer("score_index", 1)
    id_at, background = attributes.integer("id_index", -1), attributes.integer("background_id", -1)
    if not (0 <= start <= width - 4 and 0 <= score_at < width and id_at < width):
        raise step.refused(f"rows of {width} have no coordinates at {start}, score at {score_at} or class at {id_at}")
    rows = data if data.rank == 3 else step.reshape(data, [-1, count, width])
    scores, label = _column(step, rows, score_at), _column(step, rows, max(id_at, 0))
    valid = step.add("Greater", scores, step.number(attributes.number("valid_thresh", 0.0)))
    if id_at >= 0:  # also where the background is -1, which it is unless the symbol says otherwise
        foreground = step.add("Not", step.add("Equal", label, step.number(background)))
        valid = step.add("And", valid, foreground)
    # Scores may be below any number that could stand for "invalid": they are ordered first, and validity after.
    rows, valid = _sorted(step, rows, valid, scores, count)
    rows, valid = _ordered(step, rows, valid, _falling_where(step, valid, count), kept)
    boxes = cut(step, rows, {2: (start, start + 4, 1)})
    if attributes.choice("in_format", ("corner", "center"), "corner") == "center":
        boxes = _corners(step, boxes)
    label = step.add("Floor", _column(step, rows, max(id_at, 0)))
    everything = id_at < 0 or attributes.boolean("force_suppress", False)
    plane = _plane(step, label, _range_of(step, label, valid), everything=everything)
    threshold = attributes.number("overlap_thresh", 0.5)
    if threshold < 0:
        raise step.refused(f"its overlap_thresh is {threshold}")
    chosen = valid
    if threshold < 1:
        # ONNX Runtime suppresses above the threshold, as MXNet does here, and OpenVINO from it on.
        above = float(np.nextafter(np.float32(threshold), np.float32(1)))
        above = max(above, float(np.finfo(np.float32).tiny))
        chosen = _chosen(step, _upright(step, boxes), valid, plane, above, kept)
    result = _where(step, *_ordered(step, rows, chosen, _falling_where(step, chosen, kept), kept))
    result = _converted(step, result, start, width)
    if kept < count:
        result = step.add("Pad", result, step.integers([0, 0, 0, 0, count - kept, 0]), step.number(-1))
    if data.rank != 3:
        result = step.reshape(result, [dim if isinstance(dim, int) else -1 for dim in data.shape])
    return {"output0": result}


def _column(step: Step, rows: Tensor, index: int) -> Tensor:
    return step.reshape(cut(step, rows, {2: (index, index + 1, 1)}), [0, -1])


def _ordered(step: Step, rows: Tensor, flags: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` rows with the largest keys and their flags; no two keys are equal."""
    indices = step.add_many("TopK", 2, keys, step.integers([count]), axis=1)[1]
    return _at(step, rows, flags, indices)


def _sorted(step: Step, rows: Tensor, flags: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The same, and equal keys stay in their order, which OpenVINO's TopK does not care for.

    key       9 5 5 1       in descending order
    index     2 3 0 1       of the 5s, the wrong one first
    group     0 1 1 2       so the second sorting is by group, and by index in it
    """
    total = step.lengths(keys, [1])[0]
    descending, indices = step.add_many("TopK", 2, keys, step.integers([total]), axis=1)
    if total > 1:
        before, after = cut(step, descending, {1: (0, total - 1, 1)}), cut(step, descending, {1: (1, total, 1)})
        larger = step.cast(step.add("Greater", before, after), np.int64)
        groups = step.add("CumSum", larger, step.integers(1))
        groups = step.add("Pad", groups, step.integers([0, 1, 0, 0]))
        unique = step.add("Add", step.add("Mul", groups, step.integers(total)), indices)
        smallest = step.add_many("TopK", 2, unique, step.integers([count]), axis=1, largest=0)[0]
        indices = step.add("Mod", smallest, step.integers(total))
    return _at(step, rows, flags, indices)


def _at(step: Step, rows: Tensor, flags: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    chosen = step.add("GatherElements", step.cast(flags, np.int32), indices, axis=1)
    indices = step.add("Unsqueeze", indices, step.integers([2]))
    return step.add("GatherND", rows, indices, batch_dims=1), step.cast(chosen, np.bool_)


def _falling_where(step: Step, flags: Tensor, count: int) -> Tensor:
    """Keys that put the flagged in front and leave the order as it is."""
    falling = np.arange(count, 0, -1, dtype=np.float32)
    keys = step.constant(falling, np.float32), step.constant(falling - count, np.float32)
    return step.add("Where", flags, *keys)


def _where(step: Step, rows: Tensor, flags: Tensor) -> Tensor:
    """Rows of -1 where there is no flag."""
    return step.add("Where", step.add("Unsqueeze", flags, step.integers([2])), rows, step.number(-1))


def _range_of(step: Step, label: Tensor, valid: Tensor) -> Tensor:
    """Every class from the least to the largest that occurs."""
    label = step.add("Where", valid, label, step.number(0))
    low, high = (step.add(op, label, keepdims=0) for op in ("ReduceMin", "ReduceMax"))
    return step.add("Range", low, step.add("Add", high, step.number(1)), step.number(1))


def _plane(step: Step, label: Tensor, classes: Tensor, *, everything: bool) -> Tensor:
    """Of which class each box is: [N, classes, boxes]; one class where everything competes."""
    if everything:
        label = step.add("Mul", label, step.number(0))
        classes = step.constant([0], np.float32)
    of_box = step.add("Unsqueeze", label, step.integers([1]))
    return step.add("Equal", of_box, step.add("Unsqueeze", classes, step.integers([0, 2])))


def _chosen(step: Step, boxes: Tensor, valid: Tensor, plane: Tensor, threshold: float, count: int) -> Tensor:
    """Which of the ordered boxes are left: [N, boxes]."""
    ranks = step.constant(np.arange(count, 0, -1), np.float32)
    ranked = step.add("Unsqueeze", step.add("Where", valid, ranks, step.number(0)), step.integers([1]))
    scores = step.add("Where", plane, ranked, step.number(0))
    selected = step.add(
        "NonMaxSuppression",
        boxes,
        scores,
        step.integers([count]),
        step.constant([threshold], np.float32),
        step.constant([0], np.float32),
    )
    where = step.add("Gather", selected, step.integers([0, 2]), axis=1)
    zeros = step.add("Mul", step.cast(valid, np.int32), step.constant(0, np.int32))
    ones = step.add("Mul", cut(step, selected, {1: (0, 1, 1)}), step.integers(0))
    ones = step.cast(step.reshape(step.add("Add", ones, step.integers(1)), [-1]), np.int32)
    return step.cast(step.add("ScatterND", zeros, where, ones), np.bool_)


def _upright(step: Step, boxes: Tensor) -> Tensor:
    """Boxes with negative sides as boxes without an area: they overlap nothing, where ONNX would turn them."""
    low, high = cut(step, boxes, {2: (0, 2, 1)}), cut(step, boxes, {2: (2, 4, 1)})
    return step.add("Concat", low, step.add("Max", low, high), axis=2)


def _corners(step: Step, boxes: Tensor) -> Tensor:
    centre = cut(step, boxes, {2: (0, 2, 1)})
    half = step.add("Div", cut(step, boxes, {2: (2, 4, 1)}), step.number(2))
    return step.add("Concat", step.add("Sub", centre, half), step.add("Add", centre, half), axis=2)


def _centres(step: Step, boxes: Tensor) -> Tensor:
    low, high = cut(step, boxes, {2: (0, 2, 1)}), cut(step, boxes, {2: (2, 4, 1)})
    middle = step.add("Div", step.add("Add", low, high), step.number(2))
    return step.add("Concat", middle, step.add("Sub", high, low), axis=2)


def _converted(step: Step, rows: Tensor, start: int, width: int) -> Tensor:
    """The coordinates in the format that is asked for."""
    names = ("corner", "center")
    given, wanted = (step.attributes.choice(name, names, "corner") for name in ("in_format", "out_format"))
    if given == wanted:
        return rows
    boxes = cut(step, rows, {2: (start, start + 4, 1)})
    converted = _corners(step, boxes) if wanted == "corner" else _centres(step, boxes)
    # MXNet takes a negative first coordinate for that of an empty row, and leaves it as it is.
    first = cut(step, boxes, {2: (0, 1, 1)})
    converted = step.add("Where", step.add("Less", first, step.number(0)), boxes, converted)
    parts = [converted]
    if start > 0:
        parts.insert(0, cut(step, rows, {2: (0, start, 1)}))
    if start + 4 < width:
        parts.append(cut(step, rows, {2: (start + 4, width, 1)}))
    return step.add("Concat", *parts, axis=2)


DETECTION: dict[str, Translate] = {
    "_contrib_MultiBoxPrior": multibox_prior,
    "MultiBoxPrior": multibox_prior,
    "_contrib_MultiBoxDetection": multibox_detection,
    "MultiBoxDetection": multibox_detection,
    "_contrib_box_nms": box_nms,
    "_contrib_box_non_maximum_suppression": box_nms,
}
