"""What a job would be, told without an output: count the source, predict a sample of it."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from infermill.budget import Budget
from infermill.job import empty_source, tell_assumptions
from infermill.jobspec import check_options, suffixes_of
from infermill.meter import Meter
from infermill.models.card import ModelCard
from infermill.models.opening import open_model
from infermill.pipeline import run_pipeline
from infermill.plan import cut, known_bytes, refs_of
from infermill.runtimes import check_runtime
from infermill.sources import list_source, rereadable
from infermill.stages import Share
from infermill.tuning import Work
from infermill.types import CardOptions, ObjectRef, Options
from infermill.worker import load_predictor, network_of, stages_of, waiting_rows

PROBE_OBJECTS = 64


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a job would be. `seconds` and `expected_failures` are extrapolated from a sample of `probed` objects."""

    objects: int
    size_bytes: int
    partitions: int
    probed: int
    objects_per_second: float
    seconds: float
    expected_failures: int
    probe_failures: dict[str, int]
    list_seconds: float


def estimate(
    source: str | Path,
    model: str | Path | ModelCard,
    options: Options | None = None,
    card_options: CardOptions | None = None,
) -> Estimate:
    """Count the source and predict a random sample of 64 objects; there is no output.

    Streams and batch are probed and kept in the cache, as the job would do, if it will be long enough.

    Raises:
        ModelError, SourceError, StoreError: as `run`.
    """
    options = options or Options()
    check_options(options)
    Budget.parse(options.max_failures)
    resolved = open_model(model, options, card_options or CardOptions())
    check_runtime(resolved, options.runtime, options.runtime_python, is_here=True)
    tell_assumptions(resolved)
    started = time.monotonic()
    sample = Sample(PROBE_OBJECTS)
    objects = size_bytes = partitions = 0
    with rereadable(str(source)) as listed:
        where, batches = list_source(listed, options.suffix, options, suffixes_of(resolved))
        for table in cut(batches, options.partition_objects, options.partition_bytes, options.limit):
            partitions += 1
            objects += table.num_rows
            size_bytes += known_bytes(table)
            sample.add(table)
    if not objects:
        raise empty_source(str(source))
    list_seconds = time.monotonic() - started
    meter = Meter()
    # One worker with the cores, and the work, of them all.
    work = Work(objects, waiting_rows(resolved))
    together = replace(options, workers=1, threads=options.threads and options.threads * options.workers)
    predictor, tasks = load_predictor(resolved, together, meter, work)
    stages = stages_of(where, resolved, together, lambda: network_of(predictor, tasks))
    started = time.monotonic()
    for _ in run_pipeline([Share(0, sample.refs)], stages, meter):
        pass
    rate = len(sample.refs) / (time.monotonic() - started)
    failed = meter.failures.total()
    return Estimate(
        objects=objects,
        size_bytes=size_bytes,
        partitions=partitions,
        probed=len(sample.refs),
        objects_per_second=rate,
        seconds=objects / rate,
        expected_failures=round(objects * failed / len(sample.refs)),
        probe_failures=dict(meter.failures),
        list_seconds=list_seconds,
    )


class Sample:
    """A uniform sample of a stream of unknown length, the same at every call: the refs that drew the lowest numbers."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._random = np.random.default_rng(0)
        self._drawn: list[tuple[float, ObjectRef]] = []

    def add(self, table: pa.Table) -> None:
        numbers = self._random.random(table.num_rows)
        best = np.argsort(numbers)[: self._size]
        drawn = [(float(number), ref) for number, ref in zip(numbers[best], refs_of(table.take(best)), strict=True)]
        self._drawn = sorted([*self._drawn, *drawn], key=lambda pair: pair[0])[: self._size]

    @property
    def refs(self) -> list[ObjectRef]:
        return [ref for _, ref in self._drawn]
