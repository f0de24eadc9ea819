"""The tasks: what a network's arrays mean, and the column that they become.

Each task has the same two verbs and no ancestor: `finish` turns what `infer` answers to a batch into arrays that are
kept per row, with a mask of the rows that are finite; `columns` turns the kept rows of a partition into Arrow.
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from infermill.detection import Detector
from infermill.errors import MisfitError, ModelError
from infermill.models.card import Preprocess
from infermill.models.geometry import in_image, sized_type
from infermill.models.model import Model
from infermill.runtimes import Predictor

Arrays = tuple[NDArray[np.generic], ...]
TOP_TYPE = pa.list_(pa.struct([("index", pa.int32()), ("label", pa.string()), ("score", pa.float32())]))

BOX_TYPE = pa.struct([(side, pa.float32()) for side in ("xmin", "ymin", "xmax", "ymax")])
DETECTIONS_TYPE = pa.list_(
    pa.struct([("label", pa.string()), ("index", pa.int32()), ("score", pa.float32()), ("box", BOX_TYPE)])
)


class Classification:
    """`top`: the k best classes, best first."""

    def __init__(self, model: Model) -> None:
        self._activation = model.card.output.activation
        self._top_k = model.card.output.top_k
        self._labels = pa.array(model.labels, pa.string()) if model.labels else None

    def finish(self, outputs: Arrays) -> tuple[Arrays, NDArray[np.bool_]]:
        logits = outputs[0].reshape(len(outputs[0]), -1).astype(np.float32, copy=False)
        finite = _finite_rows(logits)
        scores = activate(np.where(finite[:, None], logits, 0), self._activation)
        k = min(self._top_k, scores.shape[1])
        best = np.argpartition(scores, -k, axis=1)[:, -k:]
        rows = np.arange(len(scores))[:, None]
        # Ties go to the lower index, so that equal scores come out in the same order everywhere.
        order = np.lexsort((best, -scores[rows, best]), axis=1)
        best = best[rows, order]
        return (best.astype(np.int32), scores[rows, best]), finite

    def columns(self, kept: Arrays | None, predicted: NDArray[np.bool_]) -> dict[str, pa.Array]:
        if kept is None:
            return {"top": pa.nulls(len(predicted), TOP_TYPE)}
        index, score = (array[predicted] for array in kept)
        indices = pa.array(index.ravel(), pa.int32())
        labels = pa.nulls(len(indices), pa.string()) if self._labels is None else self._labels.take(indices)
        values = pa.StructArray.from_arrays(
            [indices, labels, pa.array(score.ravel(), pa.float32())], fields=list(TOP_TYPE.value_type)
        )
        return {"top": _lists(TOP_TYPE, values, predicted, index.shape[1])}


class Embedding:
    """`embedding`: the output as it is, flattened."""

    def __init__(self, dimensions: int, activation: str) -> None:
        self._activation = activation
        self._type = pa.list_(pa.float32(), dimensions)

    def finish(self, outputs: Arrays) -> tuple[Arrays, NDArray[np.bool_]]:
        vectors = outputs[0].reshape(len(outputs[0]), -1).astype(np.float32, copy=False)
        finite = _finite_rows(vectors)
        return (activate(np.where(finite[:, None], vectors, 0), self._activation),), finite

    def columns(self, kept: Arrays | None, predicted: NDArray[np.bool_]) -> dict[str, pa.Array]:
        if kept is None:
            return {"embedding": pa.nulls(len(predicted), self._type)}
        values = pa.array(kept[0].ravel(), pa.float32())
        return {"embedding": pa.FixedSizeListArray.from_arrays(values, type=self._type, mask=pa.array(~predicted))}


class Raw:
    """`outputs`: every output of the network, as a struct of lists in row-major order; the shape is in the schema."""

    def __init__(self, names: Sequence[str], examples: Arrays) -> None:
        self._names = names
        for name, array in zip(names, examples, strict=True):
            if not array.size:
                raise MisfitError(
                    f"the output `{name}` is {list(array.shape)} for a blank input: its length depends on the input",
                    "outputs must have one shape; end the network before that part",
                )
        lists = [pa.list_(pa.from_numpy_dtype(array.dtype), int(np.prod(array.shape[1:]))) for array in examples]
        shapes = [{"shape": ",".join(map(str, array.shape[1:]))} for array in examples]
        fields = [pa.field(name, kind, metadata=m) for name, kind, m in zip(names, lists, shapes, strict=True)]
        self._type = pa.struct(fields)

    def finish(self, outputs: Arrays) -> tuple[Arrays, NDArray[np.bool_]]:
        finite = np.ones(len(outputs[0]), np.bool_)
        for array in outputs:
            if np.issubdtype(array.dtype, np.inexact):
                finite &= _finite_rows(array)
        return outputs, finite

    def columns(self, kept: Arrays | None, predicted: NDArray[np.bool_]) -> dict[str, pa.Array]:
        if kept is None:
            return {"outputs": pa.nulls(len(predicted), self._type)}
        arrays = [
            pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), type=field.type)
            for array, field in zip(kept, self._type, strict=True)
        ]
        return {"outputs": pa.StructArray.from_arrays(arrays, fields=list(self._type), mask=pa.array(~predicted))}


class Detection:
    """`detections`: the boxes that are found, best first, in pixels of the upright image and within it."""

    def __init__(self, model: Model, preprocess: Preprocess, predictor: Predictor) -> None:
        self._preprocess = preprocess
        self._max_count = model.card.output.max_detections
        self._labels = pa.array(model.labels or (), pa.string())
        height, width, _ = predictor.input_shape
        self._detector = Detector(model.card.output, predictor.output_names, (height, width))

    def finish(self, outputs: Arrays) -> tuple[Arrays, NDArray[np.bool_]]:
        *arrays, sizes = outputs
        self._detector.check(arrays)
        rows, count = len(sizes), self._max_count
        finite = np.ones(rows, np.bool_)
        index, score = np.full((rows, count), -1, np.int32), np.zeros((rows, count), np.float32)
        box, found = np.zeros((rows, count, 4), np.float32), np.zeros(rows, np.int32)
        for row, (width, height) in enumerate(sizes.tolist()):
            candidates = self._detector.candidates([array[row] for array in arrays])
            if candidates is None:
                finite[row] = False
                continue
            placed = in_image(candidates.boxes, width, height, self._preprocess)
            # A border is no part of the image, and what lies in it is nothing.
            inside = np.flatnonzero((placed[:, 2:] > placed[:, :2]).all(axis=1))
            best = inside[self._detector.best(candidates.only(inside))]
            found[row] = length = len(best)
            index[row, :length], score[row, :length] = candidates.classes[best], candidates.scores[best]
            box[row, :length] = placed[best]
        return (index, score, box, found), finite

    def columns(self, kept: Arrays | None, predicted: NDArray[np.bool_]) -> dict[str, pa.Array]:
        if kept is None:
            return {"detections": pa.nulls(len(predicted), DETECTIONS_TYPE)}
        index, score, box, found = (cast(NDArray[Any], array)[predicted] for array in kept)
        is_taken = np.arange(index.shape[1]) < found[:, None]
        indices = index[is_taken]
        labels = self._labels.take(pa.array(indices, mask=indices >= len(self._labels)))
        sides = [pa.array(side, pa.float32()) for side in box[is_taken].T]
        values = pa.StructArray.from_arrays(
            [
                labels,
                pa.array(indices),
                pa.array(score[is_taken]),
                pa.StructArray.from_arrays(sides, fields=list(BOX_TYPE)),
            ],
            fields=list(DETECTIONS_TYPE.value_type),
        )
        lengths = np.zeros(len(predicted), np.int32)
        lengths[predicted] = found
        return {"detections": _lists(DETECTIONS_TYPE, values, predicted, lengths)}


TaskRows = Classification | Embedding | Raw | Detection


def rows_for(model: Model, predictor: Predictor) -> TaskRows:
    """The rows of the model's task; one blank input is predicted to learn the shapes of the outputs."""
    if model.card.task == "classification":
        return Classification(model)
    if model.card.task == "detection" and model.card.preprocess is not None:
        detection = Detection(model, model.card.preprocess, predictor)
        try:
            detection.finish(infer(predictor, blank(model, predictor)))
        except ModelError as error:
            raise MisfitError(error.message, error.hint) from None
        return detection
    example = predictor(blank(model, predictor))
    if model.card.task == "embedding":
        return Embedding(int(np.prod(example[0].shape[1:])), model.card.output.activation)
    return Raw(predictor.output_names, example)


def needs_sizes(model: Model) -> bool:
    """Whether the task needs the size of each image: rows are then records of `sized_type`."""
    return model.card.task == "detection"


def blank(model: Model, predictor: Predictor) -> NDArray[np.generic]:
    """A batch of one row of zeros; where it has a size, that of one pixel."""
    if needs_sizes(model):
        rows: NDArray[np.void] = np.zeros(1, sized_type(predictor.input_shape))
        rows["size"] = 1
        return rows
    return np.zeros((1, *predictor.input_shape), predictor.input_dtype)


def infer(predictor: Predictor, batch: NDArray[np.generic]) -> Arrays:
    """The outputs for a batch of rows, and as one more the sizes of the images, where the rows have them."""
    if batch.dtype.names is None:
        return predictor(batch)
    rows = cast(NDArray[np.void], batch)
    return (*predictor(rows["pixels"]), rows["size"])


def activate(values: NDArray[np.float32], activation: str) -> NDArray[np.float32]:
    """Softmax over the last axis, or the logistic function, in float32."""
    if activation == "softmax":
        exponentials = np.exp(values - values.max(axis=-1, keepdims=True))
        return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True), np.float32)
    if activation == "sigmoid":
        return np.asarray(0.5 * (1.0 + np.tanh(0.5 * values)), np.float32)
    return values


def _finite_rows(array: NDArray[Any]) -> NDArray[np.bool_]:
    return np.asarray(np.isfinite(array).reshape(len(array), -1).all(axis=1))


def _lists(
    kind: pa.DataType, values: pa.Array, present: NDArray[np.bool_], lengths: int | NDArray[np.int32]
) -> pa.Array:
    offsets = np.zeros(len(present) + 1, np.int32)
    np.cumsum(present * lengths, out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=kind, mask=pa.array(~present))
