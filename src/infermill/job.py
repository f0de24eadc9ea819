"""START HERE: a job on the driver.

run()       resolve the model -> plan, or resume the plan that is there -> engine -> summary and _SUCCESS
estimate()  the same without writing anything: count the source, predict a sample of it
"""

import datetime
import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from infermill import __version__
from infermill.engines import local
from infermill.errors import InfermillError, JobMismatchError, SourceError, StoreError, UsageError
from infermill.meter import Meter
from infermill.models.card import ModelCard
from infermill.models.model import Model, open_model
from infermill.output import JOB_FILE, PLAN_FOLDER, SUCCESS_FILE, Output
from infermill.pipeline import run_pipeline
from infermill.plan import PlanInfo, cut, known_bytes, write_plan
from infermill.runtimes import import_early
from infermill.sources import canonical, list_source, rereadable
from infermill.types import CardOptions, ObjectRef, Options, PartitionReport, Source, Summary
from infermill.worker import Job, check_options, load_predictor, network_of, stages_of

PROBE_OBJECTS = 64
FORMAT = 1
Display = Callable[[Meter], AbstractContextManager[object]]
"Shows a meter while the context is open."
logger = logging.getLogger("infermill")


def run(
    source: str | Path,
    model: str | Path | ModelCard,
    output: str | Path,
    options: Options | None = None,
    card_options: CardOptions | None = None,
    display: Display = nullcontext,
) -> Summary:
    """Predict everything in `source`, and account for every object in `output`.

    A job that `output` already holds, finished or not, is finished rather than repeated: its plan counts, and
    only partitions without a part are predicted.

    Args:
        source: a folder, file, glob, manifest, or an `s3://`, `gs://`, `az://` or `file://` URI; `-` for a
            manifest on standard input.
        model: a model card, as a path, a URI or an object, or a bare `.onnx`.
        output: a folder or a URI, new or with the same job in it.
        options: how the job is run.
        card_options: what the model card does not say, or says otherwise.
        display: shows the progress.

    Raises:
        ModelError: the card or the network is wrong; raised before the first object is read.
        JobMismatchError: `output` holds a job with another fingerprint.
        SourceError: `source` does not exist, cannot be listed, or is empty.
        StoreError: a store refuses or does not answer; what is finished stays, and the same call resumes.

    Example:
        >>> run("photos/", "model.yaml", "out/", Options(limit=1000)).failed  # doctest: +SKIP
        0
    """
    started = time.monotonic()
    options = options or Options()
    check_options(options)
    parse_budget(options.max_failures)
    import_early(options.runtime)
    resolved = open_model(model, options, card_options or CardOptions())
    _tell_assumptions(resolved)
    place = Output(str(output), options)
    meter = Meter()
    with rereadable(str(source)) as listed, display(meter):
        fingerprint = _fingerprint(listed, resolved, options)
        found = _read_job(place)
        if found is None:
            place.probe()
            found = _plan_job(listed, fingerprint, place, options, meter)
        job = _checked(found, fingerprint, resolved, place, options)
        done = place.parts()
        reports = place.reports(done.values(), job.notes)
        todo = [number for number in range(job.plan.partitions) if number not in done]
        meter.todo = job.plan.objects - sum(report.ok + report.failed for report in reports)
        if done and todo:
            logger.info("resuming: %d of %d partitions are done", len(done), job.plan.partitions)
        if todo:
            reports.extend(local.run(job, todo, meter))
    summary = _summary(job, reports, meter, time.monotonic() - started)
    _finish(place, summary, reports)
    return summary


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
    """Count the source and predict a random sample of 64 objects; nothing is written.

    Raises:
        ModelError, SourceError, StoreError: as `run`.
    """
    options = options or Options()
    check_options(options)
    resolved = open_model(model, options, card_options or CardOptions())
    _tell_assumptions(resolved)
    started = time.monotonic()
    sample = _Sample(PROBE_OBJECTS)
    objects = size_bytes = partitions = 0
    with rereadable(str(source)) as listed:
        where, batches = list_source(listed, options.suffix, options)
        for table in cut(batches, options.partition_objects, options.partition_bytes, options.limit):
            partitions += 1
            objects += table.num_rows
            size_bytes += known_bytes(table)
            sample.add(table)
    if not objects:
        raise _empty(str(source))
    list_seconds = time.monotonic() - started
    meter = Meter()
    predictor, tasks = load_predictor(resolved, options, meter)
    stages = stages_of(where, resolved, options, lambda: network_of(predictor, tasks))
    started = time.monotonic()
    for _ in run_pipeline([(0, sample.refs)], stages, meter):
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


def parse_budget(text: str | None) -> Callable[[int], float]:
    """How many of `planned` objects may fail, from `10`, `1%` or None (all of them).

    Raises:
        UsageError: it is neither a number nor a percentage.
    """
    if text is None:
        return lambda planned: planned
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise UsageError(f"--max-failures {text} is neither a number nor a percentage", "write 10, or 1%")
    return (lambda planned: planned * number / 100) if text.endswith("%") else (lambda _: number)


def _tell_assumptions(model: Model) -> None:
    for line in model.assumptions:
        logger.warning("assumed: %s", line)


def _read_job(place: Output) -> dict[str, Any] | None:
    content = place.read(JOB_FILE)
    if content is None:
        return None
    try:
        data: dict[str, Any] = json.loads(content)
        if data["format"] == FORMAT:
            Source(**data["source"]), PlanInfo(**data["plan"]), dict(data["fingerprint"])
            return data
    except (ValueError, KeyError, TypeError):
        pass
    raise JobMismatchError(
        f"{place.uri}/{JOB_FILE} is damaged, or not of format {FORMAT}",
        "use the infermill that wrote it, or another output",
    )


def _plan_job(
    source: str, fingerprint: dict[str, Any], place: Output, options: Options, meter: Meter
) -> dict[str, Any]:
    """List the source, write the plan, then the job that names it: who creates job.json first, wins."""
    started = time.perf_counter()
    plan_id = uuid.uuid4().hex[:12]
    created: list[str] = []

    def create(name: str, content: bytes) -> None:
        created.append(f"{PLAN_FOLDER}/{name}")
        place.create(created[-1], content)

    def counted(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        for table in tables:
            meter.listed += table.num_rows
            yield table

    try:
        where, batches = list_source(source, options.suffix, options)
        tables = cut(batches, options.partition_objects, options.partition_bytes, options.limit)
        plan = write_plan(counted(tables), plan_id, create)
        if not plan.objects:
            raise _empty(source)
    except InfermillError:
        place.delete(created)
        raise
    meter.spend("list", time.perf_counter() - started)
    job = {
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "fingerprint": fingerprint,
        "source": asdict(where),
        "plan": asdict(plan),
    }
    # From here on job.json may name our plan, whatever the store says: it is deleted only when another one has won.
    place.create(JOB_FILE, json.dumps(job, indent=1).encode())
    winner = _read_job(place)
    if winner is None:
        raise StoreError(f"{place.uri}/{JOB_FILE} can neither be created nor read", "run the same command again")
    if winner["plan"]["plan_id"] != plan_id:
        place.delete(created)
    return winner


def _fingerprint(source: str, model: Model, options: Options) -> dict[str, Any]:
    """What must be the same for two runs to be one job, flat, by the names that a refusal shows."""
    preprocess = model.card.preprocess.model_dump(mode="json")
    return {
        "source": canonical(source, options),
        "suffix": sorted(suffix.lower() for suffix in options.suffix) if options.suffix is not None else None,
        "limit": options.limit,
        "model": model.digest,
        **{f"preprocess.{name}": value for name, value in preprocess.items()},
        "decode": options.decode,
        "max_pixels": options.max_pixels,
        "infermill": __version__,
    }


def _checked(found: dict[str, Any], fingerprint: dict[str, Any], model: Model, place: Output, options: Options) -> Job:
    differences = [
        f"{name}: {found['fingerprint'].get(name)} -> {value}"
        for name, value in fingerprint.items()
        if found["fingerprint"].get(name) != value
    ]
    if differences:
        raise JobMismatchError(
            f"{place.uri} holds another job:\n  " + "\n  ".join(differences),
            "write to another output, or repeat the job with the settings it was started with",
        )
    return Job(Source(**found["source"]), model, place.uri, options, PlanInfo(**found["plan"]))


def _empty(source: str) -> SourceError:
    return SourceError(
        f"{source} holds no objects to predict on",
        "hidden files and other suffixes than those of images are skipped; see --suffix",
    )


def _summary(job: Job, reports: Sequence[PartitionReport], meter: Meter, seconds: float) -> Summary:
    codes: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for report in reports:
        codes.update(report.failures_by_code)
        examples = dict(report.example_keys) | examples
    return Summary(
        planned=job.plan.objects,
        ok=sum(report.ok for report in reports),
        failed=codes.total(),
        failures_by_code=dict(codes.most_common()),
        example_keys=examples,
        seconds=round(seconds, 3),
        objects_per_second=round(meter.objects / seconds, 2),
        stage_seconds={stage: round(spent, 3) for stage, spent in meter.stage_seconds.items()},
        workers=1,
        model_loads=meter.model_loads,
        runtime=", ".join(sorted({report.runtime for report in reports})),
        precision=", ".join(sorted({report.precision for report in reports})),
        digest=job.model.digest,
        output=job.output,
    )


def _finish(place: Output, summary: Summary, reports: Sequence[PartitionReport]) -> None:
    """Create _SUCCESS, once, when every object of the plan is accounted for."""
    if summary.planned != summary.ok + summary.failed:
        raise StoreError(
            f"{place.uri} accounts for {summary.ok + summary.failed} of {summary.planned} objects",
            "parts were deleted or replaced while the job ran; run the same command again",
        )
    counts = {report.partition: [report.ok, report.failed] for report in reports}
    parts = [[number, *counts[number]] for number in sorted(counts)]
    content = summary.as_json() | {"parts": parts}
    place.create(SUCCESS_FILE, json.dumps(content).encode())


class _Sample:
    """A uniform sample of a stream of unknown length, the same at every call: the refs that drew the lowest numbers."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._random = np.random.default_rng(0)
        self._drawn: list[tuple[float, ObjectRef]] = []

    def add(self, table: pa.Table) -> None:
        numbers = self._random.random(table.num_rows)
        best = np.argsort(numbers)[: self._size]
        rows = zip(*(table.take(best)[name].to_pylist() for name in ("key", "size", "etag")), strict=True)
        drawn = [(float(number), ObjectRef(*row)) for number, row in zip(numbers[best], rows, strict=True)]
        self._drawn = sorted([*self._drawn, *drawn], key=lambda pair: pair[0])[: self._size]

    @property
    def refs(self) -> list[ObjectRef]:
        return [ref for _, ref in self._drawn]
