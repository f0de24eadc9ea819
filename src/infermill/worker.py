"""What a worker does with its share of a job, whichever engine started it."""

import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

from infermill.decode.image import image_decoder
from infermill.errors import UsageError
from infermill.fetch import fetcher
from infermill.meter import Meter
from infermill.models.model import Model
from infermill.output import PLAN_FOLDER, Output, rows_table
from infermill.pipeline import Network, PartitionRows, Stages, run_pipeline
from infermill.plan import PlanInfo, partition_reader
from infermill.predictions import TaskRows, rows_for
from infermill.runtimes import Predictor, load
from infermill.types import Options, PartitionReport, Source

FETCH_THREADS = 4
REMOTE_FETCH_THREADS = 32
WRITE_THREADS = 2
DECODED_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Job:
    """All that a worker must know: small, picklable, and the same for every worker."""

    source: Source
    model: Model
    output: str
    options: Options
    plan: PlanInfo

    @property
    def notes(self) -> dict[str, str]:
        """What tells this job's parts from those of others; written into each."""
        return {"plan": self.plan.plan_id, "digest": self.model.digest}


def run_partitions(job: Job, ids: Sequence[int], meter: Meter) -> Iterator[PartitionReport]:
    """Predict the partitions `ids` in one pipeline, and create their parts.

    Yields:
        One report per partition, when its part is there.

    Raises:
        ModelError: the network cannot be loaded.
        StoreError: the source or the output does not answer; what is finished stays.
    """
    output = Output(job.output, job.options)
    refs = partition_reader(job.plan.plan_id, lambda name: output.read_existing(f"{PLAN_FOLDER}/{name}"))
    loaded = functools.cache(lambda: load_predictor(job.model, job.options, meter))

    def write(rows: PartitionRows) -> PartitionReport:
        predictor, tasks = loaded()
        started = time.perf_counter()
        report = _report(rows, predictor)
        table = rows_table(rows.refs, tasks.columns(rows.kept, rows.predicted()), rows.failures)
        report = output.create_part(rows.partition, table, report, job.notes)
        meter.spend("write", time.perf_counter() - started)
        return report

    stages = stages_of(job.source, job.model, job.options, lambda: network_of(*loaded()))
    finished = run_pipeline(((number, refs(number)) for number in ids), stages, meter)
    # Left in this order: after an error, the pipeline stops before the last writes are waited for.
    with ThreadPoolExecutor(WRITE_THREADS, "write") as pool, closing(finished):
        yield from _bounded(pool.submit(write, rows) for rows in finished)


def load_predictor(model: Model, options: Options, meter: Meter) -> tuple[Predictor, TaskRows]:
    """Load the network, once per worker."""
    check_options(options)
    predictor = load(model, options.runtime, options.threads or usable_cores())
    meter.model_loads += 1
    return predictor, rows_for(model, predictor)


def check_options(options: Options) -> None:
    """Raise UsageError where a number cannot be right."""
    for name in ("limit", "threads", "decode_threads", "max_pixels", "partition_objects", "partition_bytes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} is less than 1", "leave it out for the default")


def network_of(predictor: Predictor, tasks: TaskRows) -> Network:
    """A predictor and its task, as the pipeline runs them."""
    return Network(predictor, tasks.finish, predictor.streams, predictor.batch_size)


def stages_of(source: Source, model: Model, options: Options, load: Callable[[], Network]) -> Stages:
    """The functions and thread counts of this worker's pipeline."""
    is_local = source.root.startswith("/") and not source.keys_are_uris
    height, width = model.card.preprocess.height_width or (1, 1)
    return Stages(
        fetch=fetcher(source, options),
        decode=image_decoder(model.card.preprocess, options.decode, options.max_pixels),
        load=load,
        fetch_threads=FETCH_THREADS if is_local else REMOTE_FETCH_THREADS,
        decode_threads=options.decode_threads or usable_cores(),
        decoded_images=max(DECODED_BYTES // (height * width * 3), 1),
    )


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _bounded(writes: Iterable["Future[PartitionReport]"]) -> Iterator[PartitionReport]:
    """Results in order, with at most a few writes waiting, so that a slow store slows the pipeline down."""
    waiting: list[Future[PartitionReport]] = []
    for write in writes:
        waiting.append(write)
        while waiting and (waiting[0].done() or len(waiting) > 2 * WRITE_THREADS):
            yield waiting.pop(0).result()
    for write in waiting:
        yield write.result()


def _report(rows: PartitionRows, predictor: Predictor) -> PartitionReport:
    codes: dict[str, int] = {}
    examples: dict[str, str] = {}
    for row, failure in sorted(rows.failures.items()):
        codes[failure.code] = codes.get(failure.code, 0) + 1
        examples.setdefault(failure.code, rows.refs[row].key)
    ok = len(rows.refs) - len(rows.failures)
    return PartitionReport(rows.partition, ok, predictor.runtime, predictor.precision, codes, examples)
