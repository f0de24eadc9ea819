"""A column of a Spark DataFrame -> its predictions: what a Python worker does for `infermill.spark`.

Arrow batches ─► shares: slices of them, cut by bytes ─► pipeline ─► structs, in the order of the rows
one open stream: nothing drains between batches; the network stays in the process for the tasks to come
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from infermill.decode.image import prepare_array
from infermill.decode.tensor import to_row
from infermill.errors import BadInputError, UsageError
from infermill.fetch import Reserve, fetch_uri
from infermill.meter import Meter
from infermill.models.model import Model
from infermill.parts import errors_column
from infermill.pipeline import run_pipeline
from infermill.predictions import TaskRows, blank, infer, needs_sizes
from infermill.runtimes import Predictor
from infermill.shipping import ShippedModel, errors_told
from infermill.stages import PartitionRows, Share, Stages
from infermill.task_resources import task_cores, task_devices
from infermill.types import ObjectRef, Options, Source
from infermill.worker import load_predictor, network_of, stages_of

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_Fetch = Callable[[ObjectRef, Reserve], "ReadableBuffer"]
SHARE_BYTES = 32 << 20
SHARE_ROWS = 512
MODELS_IN_A_PROCESS = 2


@dataclass(frozen=True, slots=True)
class ColumnJob:
    """What a worker must know; `column_type` is the Arrow type of the predictions as Spark has it."""

    model: ShippedModel
    options: Options
    column_type: pa.DataType


@dataclass(frozen=True, slots=True)
class _Cell(ObjectRef):
    """A value of the column, which is there already, or is the URI of what has to be fetched."""

    value: Any = None


def predict_column(job: ColumnJob, batches: Iterator[pa.Array]) -> Iterator[pa.Array]:
    """Predict the rows of a task's batches: image bytes, URIs, or numbers, as the type of the column says.

    Yields:
        Structs of `job.column_type`, as many as there are rows and in their order, in batches of other lengths.

    Raises:
        RuntimeError: with the line of an InfermillError, for the driver.
    """
    with errors_told():
        first = next(batches, None)
        if first is None:
            return
        options = replace(job.options, threads=job.options.threads or task_cores(), workers=1)
        model, predictor, tasks = _loaded(job.model, _for_network(options))
        stages = _stages(first.type, model, options, predictor, tasks)
        with closing(run_pipeline(_shares(chain([first], batches)), stages, Meter())) as finished:
            yield from _in_order(finished, functools.partial(_column, tasks=tasks, column_type=job.column_type))


def load_batch_predict(job: ColumnJob) -> Callable[[NDArray[Any]], dict[str, NDArray[Any]]]:
    """Load the network, and return the function that `predict_batch_udf` calls with the rows of a batch."""
    with errors_told():
        options = replace(job.options, threads=job.options.threads or task_cores(), workers=1)
        model, predictor, tasks = _loaded(job.model, _for_network(options))
        stages = _stages(None, model, options, predictor, tasks)
        nothing, _ = tasks.finish(infer(predictor, blank(model, predictor)))
    names = _BATCH_NAMES.get(model.card.task, predictor.output_names)

    def predict(inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        share = Share(0, [_Cell("", value=value) for value in inputs])
        with errors_told(), closing(run_pipeline([share], stages, Meter())) as finished:
            (rows,) = finished
        kept = rows.kept or tuple(np.zeros((len(inputs), *array.shape[1:]), array.dtype) for array in nothing)
        for array in kept:
            array[list(rows.failures)] = {"f": np.nan, "i": -1}.get(array.dtype.kind, 0)
        return {name: _at_most_2d(array) for name, array in zip(names, kept, strict=True)}

    return predict


_BATCH_NAMES = {
    "classification": ("index", "score"),
    "embedding": ("embedding",),
    "detection": ("index", "score", "box", "count"),
}


def _at_most_2d(array: NDArray[Any]) -> NDArray[Any]:
    return array.reshape(len(array), -1) if array.ndim > 2 else array


# Tasks of one worker process come one after the other, and it is forked before it has loaded anything.
@functools.lru_cache(maxsize=MODELS_IN_A_PROCESS)
def _loaded(shipped: ShippedModel, options: Options) -> tuple[Model, Predictor, TaskRows]:
    os.environ.update(task_devices())  # which this process has for good
    model = shipped.open()
    return model, *load_predictor(model, options, Meter())


def _for_network(options: Options) -> Options:
    """What counts for how a network is loaded: whatever else differs, it is the same one."""
    return Options(
        runtime=options.runtime,
        runtime_python=options.runtime_python,
        threads=options.threads,
        batch=options.batch,
    )


def _stages(kind: pa.DataType | None, model: Model, options: Options, predictor: Predictor, tasks: TaskRows) -> Stages:
    """The pipeline for a column of this type; None: the values are NumPy's."""
    is_uri = kind is not None and (pa.types.is_string(kind) or pa.types.is_large_string(kind))
    source = Source("/", keys_are_uris=is_uri)
    stages = stages_of(source, model, options, lambda: network_of(predictor, tasks))
    if is_uri:
        return replace(stages, fetch=_uri_fetcher(stages.fetch))
    if kind is not None and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        return replace(stages, fetch=_content)
    shape, dtype = predictor.input_shape, predictor.input_dtype
    preprocess, decode, sized = model.card.preprocess, stages.decode, needs_sizes(model)

    def to_array(value: Any) -> NDArray[np.generic]:
        if isinstance(value, bytes):
            return decode(value)
        if preprocess is not None:
            # Spark has no unsigned bytes: what comes from its columns are wider integers.
            row = to_row(value, np.shape(value), "uint8")
            return prepare_array(row, preprocess, options.decode, options.max_pixels, sized=sized)
        return to_row(value, shape, dtype)

    if kind is None:
        return replace(stages, fetch=_as_it_is, decode=to_array)
    is_numbers = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_struct(kind)
    if preprocess is None and is_numbers:
        return replace(stages, fetch=_numbers, decode=to_array)
    taken = "tensors" if preprocess is None else "images"
    raise UsageError(
        f"the column holds {kind}, and the model {model.card.name} takes {taken}",
        "give a column of bytes or of URIs, or arrays of numbers for a model whose card has `preprocess: null`",
    )


def _present(cell: ObjectRef) -> Any:
    assert isinstance(cell, _Cell)  # noqa: S101 - `_shares` makes no others
    if cell.value is None or (isinstance(cell.value, pa.Scalar) and not cell.value.is_valid):
        raise BadInputError("fetch", "empty", "it is null")
    return cell.value


def _content(cell: ObjectRef, reserve: Reserve) -> "ReadableBuffer":
    content: ReadableBuffer = _present(cell).as_buffer()
    reserve(memoryview(content).nbytes)
    return content


def _as_it_is(cell: ObjectRef, _: Reserve) -> Any:
    return _present(cell)


def _numbers(cell: ObjectRef, _: Reserve) -> Any:
    """What `to_row` takes; where there are nulls among the numbers, lists, in which it finds them."""
    value = _present(cell)
    if isinstance(value, pa.StructScalar):
        return list(value.as_py().values())
    if pa.types.is_primitive(value.type.value_type) and not value.values.null_count:
        return value.values.to_numpy(zero_copy_only=False)
    return value.as_py()


def _uri_fetcher(fetch: _Fetch) -> _Fetch:
    def fetch_cell(cell: ObjectRef, reserve: Reserve) -> "ReadableBuffer":
        uri: str = _present(cell).as_py()
        if uri.startswith("file:/") and not uri.startswith("file://"):
            uri = uri.removeprefix("file:")  # as Spark's `binaryFile` writes a path
        if "://" not in uri and uri and not uri.startswith("/"):
            raise BadInputError(
                "fetch", "unreadable", f"{uri!r} is a relative path, and executors have folders of their own"
            )
        return fetch_uri(fetch, uri, reserve)

    return fetch_cell


def _shares(batches: Iterable[pa.Array]) -> Iterator[Share]:
    pieces = chain.from_iterable(map(_pieces, batches))
    for number, piece in enumerate(pieces):
        yield Share(number, [_Cell("", value=value) for value in piece])


def _pieces(batch: pa.Array) -> Iterator[pa.Array]:
    """Slices of a batch, of at most so many rows and bytes."""
    if pa.types.is_binary(batch.type) or pa.types.is_large_binary(batch.type):
        sizes = pc.fill_null(pc.binary_length(batch), 0).to_numpy(zero_copy_only=False)
    else:
        sizes = np.full(len(batch), batch.nbytes // max(len(batch), 1))
    ends, start, done_bytes = np.cumsum(sizes, dtype=np.int64), 0, 0
    while start < len(batch):
        fitting = int(np.searchsorted(ends, done_bytes + SHARE_BYTES, side="right"))
        end = min(max(fitting, start + 1), start + SHARE_ROWS)
        yield batch.slice(start, end - start)
        start, done_bytes = end, int(ends[end - 1])


def _in_order(finished: Iterable[PartitionRows], to_column: Callable[[PartitionRows], pa.Array]) -> Iterator[pa.Array]:
    """Shares finish in about the order in which they come; here exactly, and without what they were made of."""
    waiting: dict[int, pa.Array] = {}
    due = 0
    for rows in finished:
        waiting[rows.partition] = to_column(rows)
        while due in waiting:
            yield waiting.pop(due)
            due += 1


def _column(rows: PartitionRows, tasks: TaskRows, column_type: pa.DataType) -> pa.Array:
    columns = tasks.columns(rows.kept, rows.predicted())
    columns["error"] = errors_column(rows.failures, len(rows.refs))
    return pa.StructArray.from_arrays(list(columns.values()), names=list(columns)).cast(column_type)
