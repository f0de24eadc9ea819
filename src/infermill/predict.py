"""The network in memory: `load_model(card) -> predict`."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import PIL.Image
from numpy.typing import ArrayLike, NDArray

from infermill.decode.image import image_decoder, prepare, prepare_array
from infermill.decode.tensor import tensor_decoder, to_row
from infermill.errors import BadInputError
from infermill.fetch import fetch_uri, fetcher
from infermill.limits import usable_cores
from infermill.meter import Meter
from infermill.models.card import ModelCard, Preprocess
from infermill.models.opening import open_model
from infermill.predictions import infer, needs_sizes
from infermill.runtimes import Predictor
from infermill.types import CardOptions, Failure, Options, Source
from infermill.worker import load_predictor

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

Input: TypeAlias = str | os.PathLike[str] | bytes | PIL.Image.Image | ArrayLike
Predict: TypeAlias = Callable[[Sequence[Input]], "list[Prediction]"]
Row = NDArray[np.generic]
_ContentOf: TypeAlias = Callable[[Any], "ReadableBuffer"]


@dataclass(frozen=True, slots=True)
class Label:
    """One of the best classes; `label` is None where the model has no labels."""

    index: int
    label: str | None
    score: float


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels of the upright image; (0, 0) is its upper left corner."""

    xmin: float
    ymin: float
    xmax: float
    ymax: float


@dataclass(frozen=True, slots=True)
class Detected:
    """Something that was found in an image; `label` is None where the model has none for its class."""

    label: str | None
    index: int
    score: float
    box: Box


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the network says of one input: one of `top`, `detections`, `embedding` and `outputs` by task, or `error`."""

    top: tuple[Label, ...] | None = None
    detections: tuple[Detected, ...] | None = None
    embedding: NDArray[np.float32] | None = None
    outputs: dict[str, NDArray[np.generic]] | None = None
    error: Failure | None = None


def load_model(
    model: str | os.PathLike[str] | ModelCard,
    options: Options | None = None,
    card_options: CardOptions | None = None,
) -> Predict:
    """Load a network, and return the function that predicts with it.

    Args:
        model: a model card, as a path, a URI or an object, a bare `.onnx`, or an MXNet checkpoint.
        options: runtime, decode profile, threads and how stores are reached.
        card_options: what the model card does not say, or says otherwise.

    Returns:
        A function from a list of paths, URIs, encoded images, PIL images or uint8 arrays (HWC RGB, or HW grey), to a
        list of as many predictions in the same order. Where the card has `preprocess: null`, it takes paths or bytes
        of `.npy` files, arrays and lists of numbers. An input that cannot be predicted has its `error` set.

    Raises:
        ModelError: the card or the network is wrong.
        StoreError: of the function: the store of a URI does not answer, or denies access.

    Example:
        >>> predict = load_model("model.yaml")  # doctest: +SKIP
        >>> predict(["cat.jpg"])[0].top[0].label  # doctest: +SKIP
        'Egyptian cat'
        >>> load_model("tabular.onnx")([[5.1, 3.5, 1.4, 0.2]])[0].top[0].index  # doctest: +SKIP
        0
    """
    options = options or Options()
    resolved = open_model(model, options, card_options)
    predictor, tasks = load_predictor(resolved, options, Meter())
    preprocess = resolved.card.preprocess
    sized = needs_sizes(resolved)
    fetch = fetcher(Source(str(Path.cwd()), keys_are_uris=True), options)

    def content_of(item: bytes | str | os.PathLike[str]) -> "ReadableBuffer":
        return fetch_uri(fetch, item) if isinstance(item, str) and "://" in item else _content(item)

    if preprocess is None:
        convert = _tensor_rows(predictor, content_of)
    else:
        convert = _image_rows(preprocess, options, content_of, sized=sized)

    def row_of(item: Input) -> Row | Failure:
        try:
            return convert(item)
        except BadInputError as error:
            return error.failure

    def predict(items: Sequence[Input]) -> list[Prediction]:
        if isinstance(items, str | bytes | os.PathLike | PIL.Image.Image):
            raise TypeError("predict takes a list of inputs: write predict([image])")
        with ThreadPoolExecutor(options.threads or usable_cores()) as pool:
            rows = pool.map(row_of, items)
            return [one for batch in _batches(rows, predictor.batch_size) for one in predict_batch(batch)]

    def predict_batch(batch: list[Row | Failure]) -> Iterator[Prediction]:
        good = [array for array in batch if not isinstance(array, Failure)]
        rows = iter(())  # type: Iterator[Prediction]
        if good:
            values, finite = tasks.finish(infer(predictor, np.stack(good)))
            rows = _predictions(tasks.columns(values, finite), finite)
        for array in batch:
            yield Prediction(error=array) if isinstance(array, Failure) else next(rows)

    return predict


def _image_rows(
    preprocess: Preprocess, options: Options, content_of: _ContentOf, *, sized: bool
) -> Callable[[Any], Row]:
    decode = image_decoder(preprocess, options.decode, options.max_pixels, sized=sized)

    def to_pixels(item: Any) -> Row:
        if isinstance(item, PIL.Image.Image):
            return prepare(item, preprocess, options.decode, options.max_pixels, sized=sized)
        if isinstance(item, np.ndarray):
            return prepare_array(item, preprocess, options.decode, options.max_pixels, sized=sized)
        return decode(content_of(item))

    return to_pixels


def _tensor_rows(predictor: Predictor, content_of: _ContentOf) -> Callable[[Any], Row]:
    shape, dtype = predictor.input_shape, predictor.input_dtype
    decode = tensor_decoder(shape, dtype)

    def to_tensor(item: Any) -> Row:
        if isinstance(item, bytes | str | os.PathLike):
            return decode(content_of(item))
        return to_row(item, shape, dtype)

    return to_tensor


def _batches(arrays: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(islice(arrays, size)):
        yield batch


def _content(item: bytes | str | os.PathLike[str]) -> bytes:
    if isinstance(item, bytes):
        return item
    path = Path(item)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise BadInputError("fetch", "missing", f"{path} does not exist") from None
    except ValueError:
        raise BadInputError("fetch", "missing", "no file can have this name") from None
    except OSError as error:
        raise BadInputError("fetch", "unreadable", f"{path}: {error.strerror}") from None


def _predictions(columns: dict[str, Any], finite: NDArray[np.bool_]) -> Iterator[Prediction]:
    for row, is_finite in enumerate(finite):
        if not is_finite:
            yield Prediction(error=Failure("predict", "nonfinite", "the network answered NaN or infinity"))
        elif "top" in columns:
            yield Prediction(top=tuple(Label(**one) for one in columns["top"][row].as_py()))
        elif "detections" in columns:
            found = columns["detections"][row].as_py()
            yield Prediction(detections=tuple(Detected(**one | {"box": Box(**one["box"])}) for one in found))
        elif "embedding" in columns:
            yield Prediction(embedding=columns["embedding"][row].values.to_numpy())
        else:
            outputs = columns["outputs"][row]
            shapes = {field.name: field.metadata[b"shape"] for field in outputs.type}
            yield Prediction(
                outputs={
                    name: values.values.to_numpy().reshape([int(n) for n in shapes[name].split(b",") if n])
                    for name, values in outputs.items()
                }
            )
