"""What a worker does with its share of a job, whichever engine started it."""

import functools
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import numpy as np

from infermill.decode.image import Row, image_decoder, prepare_array
from infermill.decode.tensor import tensor_decoder, to_row
from infermill.errors import BadInputError, StoreError
from infermill.fetch import fetcher
from infermill.jobspec import Job, check_options
from infermill.limits import usable_cores
from infermill.members import member_fetcher
from infermill.meter import Meter
from infermill.models.fit import tensor_shape
from infermill.models.model import Model
from infermill.models.onnx import inspect_network
from infermill.output import PLAN_FOLDER, Output
from infermill.parts import rows_table
from infermill.patience import has_answered
from infermill.pipeline import run_pipeline
from infermill.plan import Revision, partition_reader
from infermill.predictions import TaskRows, infer, needs_sizes
from infermill.runtimes import Predictor
from infermill.sources.cifar import name_of
from infermill.sources.shards import label_type
from infermill.stages import Network, PartitionRows, Share, Stages, Watch, unwatched
from infermill.tuning import Work, load_tuned
from infermill.types import Assignment, ObjectRef, Options, PartitionReport, Source

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

FETCH_THREADS = 4
REMOTE_FETCH_THREADS = 32
WRITE_THREADS = 2
# What one core decodes while the other one loads the network.
DECODED_BYTES = 64 << 20
NO_WORK = Work()


class LoadedNetwork:
    """The network that a worker has loaded: it stays for the next share of a job."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: tuple[object, ...] | None = None
        self._loaded: tuple[Predictor, TaskRows] | None = None

    def get(self, model: Model, options: Options, meter: Meter, work: Work = NO_WORK) -> tuple[Predictor, TaskRows]:
        """A model's predictor and its task, loaded where it is not the one that is there."""
        key = (model.digest, options.runtime, options.runtime_python, options.batch, _threads(options))
        with self._lock:
            if self._loaded is None or self._key != key:
                self._loaded = None  # before the next one takes as much memory
                self._loaded, self._key = load_predictor(model, options, meter, work), key
            return self._loaded


def run_partitions(
    job: Job,
    assignments: Iterable[Assignment],
    meter: Meter,
    watch: Watch = unwatched,
    network: LoadedNetwork | None = None,
) -> Iterator[PartitionReport]:
    """Predict the partitions that are assigned, in one pipeline, and create their parts; or revise rows of parts.

    Args:
        job: the job.
        assignments: which partitions; read one by one, when there is room for another.
        meter: counts what is done.
        watch: is told which rows are worked on.
        network: the one of this worker, where it has more than one share to do.

    Yields:
        One report per partition, when its part is there.

    Raises:
        ModelError: the network cannot be loaded.
        StoreError: the source or the output does not answer; what is finished stays.
    """
    output = Output(job.output, job.options)
    revision, refs = _revision_and_refs(job, output)
    network = network or LoadedNetwork()
    label = label_type(job.source)

    still = threading.Event()
    still.set()
    work = Work(job.todo, waiting_rows(job.model), still)

    def loaded() -> tuple[Predictor, TaskRows]:
        return network.get(job.model, job.options, meter, work)

    def shares() -> Iterator[Share]:
        for number, verdicts in assignments:
            yield Share(number, refs(number), verdicts)
            still.wait()  # a probe has the cores to itself

    def write(rows: PartitionRows) -> PartitionReport:
        predictor, tasks = loaded()
        started = time.perf_counter()
        report = _report(rows, predictor, _threads(job.options))
        table = rows_table(rows.refs, tasks.columns(rows.kept, rows.predicted()), rows.failures, label)
        if rows.partition in revision:
            report = output.revise_part(rows.partition, revision.rows(rows.partition), table, report, job.notes)
        else:
            report = output.create_part(rows.partition, table, report, job.notes)
        meter.spend("write", started)
        return report

    stages = stages_of(job.source, job.model, job.options, lambda: network_of(*loaded()), watch)
    finished = run_pipeline(shares(), stages, meter)
    # Left in this order: after an error, the pipeline stops before the last writes are waited for.
    with ThreadPoolExecutor(WRITE_THREADS, "write") as pool, closing(finished):
        try:
            yield from _bounded(pool.submit(write, rows) for rows in finished)
        except StoreError:
            pool.shutdown(wait=False, cancel_futures=True)  # or each of them would wait for the same store
            raise
    if meter.trace is not None and job.profile is not None:
        output.create(f"{job.profile}/worker-{os.getpid()}-{uuid.uuid4().hex[:8]}.json", meter.trace.as_json())


def trust_stores(job: Job) -> None:
    """Wait for the stores of a job from the first request on: the driver has reached them."""
    for uri in (job.output, *(() if job.source.keys_are_uris else (job.source.root,))):
        has_answered(uri, job.options)


def try_each(job: Job, places: Sequence[tuple[int, int]], meter: Meter, watch: Watch, network: LoadedNetwork) -> None:
    """Decode and predict rows one by one, with nothing else under way: what dies here, dies of the row in hand."""
    refs = functools.lru_cache(maxsize=4)(_revision_and_refs(job, Output(job.output, job.options))[1])
    predictor = network_of(*network.get(job.model, job.options, meter))
    stages = stages_of(job.source, job.model, job.options, lambda: predictor)
    for partition, row in places:
        with suppress(BadInputError, MemoryError):  # which the pipeline books
            data = stages.fetch(refs(partition)[row], lambda _: None)
            with watch("decode", [(partition, row)]):
                image = stages.decode(data)
            with watch("predict", [(partition, row)]):
                predictor.predict(image[None])


def _revision_and_refs(job: Job, output: Output) -> tuple[Revision, Callable[[int], list[ObjectRef]]]:
    """The rows that are revised, and a function from a partition to what is to be predicted of it."""
    planned = partition_reader(job.plans, lambda name: output.read_existing(f"{PLAN_FOLDER}/{name}"))
    revision = Revision(output.read_existing(job.revision) if job.revision else Revision.write([]))
    return revision, lambda number: (revision.refs if number in revision else planned)(number)


def load_predictor(model: Model, options: Options, meter: Meter, work: Work = NO_WORK) -> tuple[Predictor, TaskRows]:
    """Load the network, with streams and a batch that suit the work and the machine."""
    check_options(options)
    loaded = load_tuned(model, options, _threads(options), work)
    meter.loaded()
    return loaded


def network_of(predictor: Predictor, tasks: TaskRows) -> Network:
    """A predictor and its task, as the pipeline runs them."""
    return Network(
        functools.partial(infer, predictor),
        tasks.finish,
        predictor.streams,
        predictor.batch_size,
        is_on_cores=predictor.device == "cpu",
        is_fixed=predictor.is_fixed,
    )


def stages_of(
    source: Source, model: Model, options: Options, load: Callable[[], Network], watch: Watch = unwatched
) -> Stages:
    """The functions and thread counts of this worker's pipeline."""
    preprocess = model.card.preprocess
    holds_pixels = name_of(source.shards) is not None
    if preprocess is None:
        shape, dtype = tensor_shape(inspect_network(model.network).inputs[0]), model.card.input.dtype
        decode = tensor_decoder(shape, dtype)
        if holds_pixels:
            decode = _of_array(to_row, shape, dtype)
    else:
        decode = image_decoder(preprocess, options.decode, options.max_pixels, sized=needs_sizes(model))
        if holds_pixels:
            prepare = functools.partial(prepare_array, sized=needs_sizes(model))
            decode = _of_array(prepare, preprocess, options.decode, options.max_pixels)
    return Stages(
        fetch=member_fetcher(source, options) if source.shards else fetcher(source, options),
        decode=decode,
        load=load,
        fetch_threads=FETCH_THREADS if source.is_local else REMOTE_FETCH_THREADS,
        compute_threads=_threads(options),
        decoded_images=waiting_rows(model),
        watch=watch,
    )


def waiting_rows(model: Model) -> int:
    """How many decoded rows may wait for the network."""
    preprocess = model.card.preprocess
    if preprocess is None:
        shape = tensor_shape(inspect_network(model.network).inputs[0])
        row_bytes = math.prod(shape) * np.dtype(model.card.input.dtype).itemsize
    else:
        row_bytes = math.prod(preprocess.height_width or (1, 1)) * 3
    return max(DECODED_BYTES // row_bytes, 1)


def _of_array(prepare: Callable[..., Row], *arguments: object) -> "Callable[[ReadableBuffer], Row]":
    """A decoder of pixels that are fetched as they are."""
    return lambda data: prepare(np.asarray(data), *arguments)


def _threads(options: Options) -> int:
    """Threads that decode and run the network, in each worker."""
    return options.threads or max(usable_cores() // options.workers, 1)


def _bounded(writes: Iterable["Future[PartitionReport]"]) -> Iterator[PartitionReport]:
    """Results in order, with at most a few writes waiting, so that a slow store slows the pipeline down."""
    waiting: list[Future[PartitionReport]] = []
    for write in writes:
        waiting.append(write)
        while waiting and (waiting[0].done() or len(waiting) > 2 * WRITE_THREADS):
            yield waiting.pop(0).result()
    for write in waiting:
        yield write.result()


def _report(rows: PartitionRows, predictor: Predictor, threads: int) -> PartitionReport:
    codes: dict[str, int] = {}
    examples: dict[str, str] = {}
    for row, failure in sorted(rows.failures.items()):
        codes[failure.code] = codes.get(failure.code, 0) + 1
        examples.setdefault(failure.code, rows.refs[row].key)
    ok = len(rows.refs) - len(rows.failures)
    choice: dict[str, int | str] = {
        "streams": predictor.streams, "batch": predictor.batch_size, "threads": threads, "reason": predictor.reason
    }  # fmt: skip
    return PartitionReport(rows.partition, ok, predictor.runtime, predictor.precision, codes, examples, choice)
