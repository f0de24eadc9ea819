"""START HERE: a job on the driver.

run()    resolve the model -> plan, or resume or append to the job that is there -> engine -> summary and _SUCCESS
retry()  the rows that failed for a passing reason -> engine -> summary and _SUCCESS
"""

import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import pyarrow as pa

from infermill import engines
from infermill.budget import Budget
from infermill.changes import Changes, failed_rows
from infermill.engines import Engine
from infermill.errors import SourceError, StoreError, UsageError
from infermill.meter import Meter
from infermill.models.card import ModelCard
from infermill.models.model import Model, open_model
from infermill.output import SUCCESS_FILE, Output
from infermill.parts import part_name
from infermill.plan import Revision, cut
from infermill.record import (
    FOLDER,
    NewPlan,
    Record,
    absolute,
    append_record,
    check_same_job,
    create_record,
    differing_totals,
    fingerprint,
    model_reference,
    move_aside,
    read_record,
    totals_of,
)
from infermill.refresh import refresher
from infermill.runtimes import check_runtime
from infermill.sources import list_source, rereadable
from infermill.types import RETRYABLE, CardOptions, FailureCode, Options, PartitionReport, Summary
from infermill.worker import Job, check_options, suffixes_of

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

NO_REVISION = Revision.write([])
Existing = Literal["resume", "append", "overwrite"]
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
    existing: Existing = "resume",
    engine: "Engine | SparkSession | None" = None,
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
        existing: what becomes of a job that is there. `resume`: it is finished. `append`: it is finished, the source
            is listed again, what is new is added, and what has changed is predicted again. `overwrite`: it is moved
            aside, into a folder in `output`, and the job starts anew.
        engine: where the workers run: a Spark session, classic or Connect; None starts what `options.engine` says.

    Raises:
        ModelError: the card or the network is wrong; raised before the first object is read.
        JobMismatchError: `output` holds a job with another fingerprint.
        SourceError: `source` does not exist, cannot be listed, or is empty.
        StoreError: a store refuses or does not answer; what is finished stays, and the same call resumes.
        BudgetError: more objects fail than `options.max_failures` allows, whatever becomes of those that are left; it
            is looked at when a partition is finished, and not after the last one.

    Example:
        >>> run("photos/", "model.yaml", "out/", Options(limit=1000)).failed  # doctest: +SKIP
        0
    """
    options, card_options = options or Options(), card_options or CardOptions()
    if existing == "append" and options.limit is not None:
        raise UsageError(
            "--limit and --append do not go together: which objects are the first ones changes with the source",
            "append without a limit, to a job that was started without one",
        )
    started = time.monotonic()
    opened = _open(model, options, card_options, is_here=engine is None or callable(engine))
    place, meter = Output(str(output), options), Meter()
    changes: dict[str, Any] = {}
    with _started(engine, options) as running, rereadable(str(source)) as listed, display(meter):
        driver = _Driver(place, opened, options, meter, running, started)
        now = fingerprint(listed, opened, options)
        record = None if existing == "overwrite" else read_record(place)
        if record is None:
            place.probe()
            kept = {"model": model_reference(model), "card_options": absolute(card_options)}
            record = _plan(driver, listed, now, kept, existing == "overwrite")
            changes = {"new": record.objects, "changed": 0, "unchanged": 0}
            check_same_job(record, now, place.uri)
            driver.finish(record)
        elif existing == "append":
            check_same_job(record, now, place.uri, appending=True)
            record, changes = _append(driver, listed, now["source"], record)
        else:
            check_same_job(record, now, place.uri)
            driver.finish(record)
    summary = replace(driver.summary(record), **(changes if existing == "append" else {}))
    if summary.planned != summary.ok + summary.failed:
        raise StoreError(
            f"{place.uri} accounts for {summary.ok + summary.failed} of {summary.planned} objects",
            "parts were deleted or replaced while the job ran; run the same command again",
        )
    driver.declare_success(record)
    return summary


def retry(
    output: str | Path,
    model: str | Path | ModelCard | None = None,
    codes: Sequence[str] = RETRYABLE,
    options: Options | None = None,
    card_options: CardOptions | None = None,
    display: Display = nullcontext,
    engine: "Engine | SparkSession | None" = None,
) -> Summary:
    """Predict again what failed for a reason that may pass; each new row takes the place of the old one.

    Nothing else is predicted, and parts without such a failure are not touched. An object that has changed since is
    predicted as it is now.

    Args:
        output: a folder or a URI with a job in it, finished or not.
        model: as in `run`; None is the one that the job was started with.
        codes: the failures that are tried again.
        options: how it is run; `suffix`, `limit`, `decode` and `max_pixels` are those of the job.
        card_options: None are those that the job was started with.
        display: shows the progress.
        engine: as in `run`.

    Raises:
        UsageError: there is no job, a code is not one of a failure, or `model` is None and the job was started with
            a model card that is no file.
        JobMismatchError: the model is not the one that it was.
        ModelError, StoreError: as `run`.

    Example:
        >>> retry("out/", codes=["missing"]).failed  # doctest: +SKIP
        0
    """
    started = time.monotonic()
    unknown = sorted(set(codes) - set(get_args(FailureCode)))
    if unknown:
        raise UsageError(f"--codes: no failure is called {', '.join(unknown)}", f"as {', '.join(RETRYABLE)} are")
    options, meter = options or Options(), Meter()
    place = Output(str(output), options)
    record = read_record(place)
    if record is None:
        raise UsageError(f"{place.uri} holds no job", "name the folder that `infermill run -o` wrote")
    model = record.model if model is None else model
    if model is None:
        raise UsageError(f"{place.uri} does not say where its model is", "pass it with -m")
    options = record.completed(options)
    opened = _open(model, options, card_options or record.card_options, is_here=engine is None or callable(engine))
    check_same_job(record, fingerprint(None, opened, options), place.uri)
    with _started(engine, options) as running, display(meter):
        driver = _Driver(place, opened, options, meter, running, started)
        driver.read_reports(record)
        revision = Revision.write(_failed(driver, record, codes))
        driver.predict(record, (), 0, revision)
    driver.declare_success(record)
    return replace(driver.summary(record), retried=Revision(revision).objects)


def tell_assumptions(model: Model) -> None:
    """Say what was guessed of a model."""
    for line in model.assumptions:
        logger.warning("assumed: %s", line)


def empty_source(source: str) -> SourceError:
    """The error of a source without objects."""
    return SourceError(
        f"{source} holds no objects to predict on",
        "hidden files and other suffixes than those of images (.npy for tensors) are skipped; see --suffix",
    )


def _started(engine: "Engine | SparkSession | None", options: Options) -> AbstractContextManager[Engine]:
    if engine is None:
        return engines.start(options)
    return nullcontext(engine if callable(engine) else engines.on_session(engine, options))


def _open(model: str | Path | ModelCard, options: Options, card_options: CardOptions, *, is_here: bool) -> Model:
    check_options(options)
    Budget.parse(options.max_failures)
    opened = open_model(model, options, card_options)
    is_here = is_here and options.engine == "local"
    check_runtime(opened, options.runtime, options.runtime_python, is_here=is_here)
    tell_assumptions(opened)
    return opened


@dataclass
class _Driver:
    """One command at work on a job."""

    place: Output
    model: Model
    options: Options
    meter: Meter
    engine: Engine
    started: float
    reports: dict[int, PartitionReport] = field(default_factory=dict)
    has_revised: bool = False

    def read_reports(self, record: Record) -> None:
        """Learn from the parts what is done. Those with other numbers may be another driver's, which has appended."""
        found = self.place.reports(record.notes)
        self.reports = {number: report for number, report in found.items() if number < record.partitions}

    def finish(self, record: Record) -> None:
        """Predict the partitions without a part."""
        self.read_reports(record)
        todo = [number for number in range(record.partitions) if number not in self.reports]
        if self.reports and todo:
            logger.info("resuming: %d of %d partitions are done", len(self.reports), record.partitions)
        done = sum(report.ok + report.failed for report in self.reports.values())
        self.predict(record, todo, record.objects - done)

    def predict(self, record: Record, ids: Sequence[int], objects: int, revision: bytes = NO_REVISION) -> None:
        """Predict partitions, which hold so many objects, and supersede the rows of a revision."""
        revised = Revision(revision)
        self.meter.todo = self.meter.objects + objects + revised.objects
        if not (ids or revised.objects):
            return
        job = Job(record.source, self.model, self.place.uri, self.options, record.plans)
        if not revised.objects:
            self.place.remove([SUCCESS_FILE])
            self._run(job, ids, record.objects)
            return
        self.place.probe_update()
        self.place.remove([SUCCESS_FILE])
        self.has_revised = True
        name = f"{FOLDER}/revisions/{uuid.uuid4().hex}.parquet"
        self.place.create(name, revision)
        try:
            self._run(replace(job, revision=name), [*ids, *revised.partitions], record.objects)
        finally:
            self.place.delete([name])

    def _run(self, job: Job, ids: Sequence[int], planned: int) -> None:
        budget = Budget.parse(self.options.max_failures)
        failed = sum(report.failed for report in self.reports.values())
        settled = failed + sum(report.ok for report in self.reports.values())
        for report in self.engine(job, ids, self.meter):
            was = self.reports.get(report.partition)
            self.reports[report.partition] = report
            failed += report.failed - (was.failed if was else 0)
            settled += 0 if was else report.ok + report.failed
            if was is None:  # superseding rows can only better it
                budget.check(failed, settled, planned)

    def summary(self, record: Record) -> Summary:
        """What is known of the job by now."""
        codes: Counter[str] = Counter()
        examples: dict[str, str] = {}
        reports = [self.reports[number] for number in sorted(self.reports)]
        for report in reports:
            codes.update(report.failures_by_code)
            examples = dict(report.example_keys) | examples
        seconds = time.monotonic() - self.started
        return Summary(
            planned=record.objects,
            ok=sum(report.ok for report in reports),
            failed=codes.total(),
            failures_by_code=dict(codes.most_common()),
            example_keys=examples,
            seconds=round(seconds, 3),
            objects_per_second=round(self.meter.objects / seconds, 2),
            stage_seconds={stage: round(spent, 3) for stage, spent in self.meter.stage_seconds.items()},
            workers=self.meter.workers,
            model_loads=self.meter.model_loads,
            halved_batches=self.meter.halved_batches,
            runtime=_all_of(report.runtime for report in reports),
            precision=_all_of(report.precision for report in reports),
            digest=self.model.digest,
            output=self.place.uri,
        )

    def declare_success(self, record: Record) -> None:
        """Leave a _SUCCESS with the totals, if every object of the plan is accounted for."""
        current = self.place.read(SUCCESS_FILE)
        others_appended = (read_record(self.place) or record).plans != record.plans
        if not self.has_revised and not others_appended and len(self.reports) == record.partitions:
            content = self._success(record)
            if current is None and self.place.create(SUCCESS_FILE, json.dumps(content).encode()):
                return
            if current is not None and not differing_totals(current, content):
                return
        self.place.update(SUCCESS_FILE, self._corrected_success)

    def _corrected_success(self, current: bytes | None) -> bytes | None:
        # Others may have appended and superseded rows meanwhile: what holds is the record and the parts.
        record = read_record(self.place)
        if record is None:
            return None
        self.read_reports(record)
        content = self._success(record)
        is_current = current is not None and not differing_totals(current, content)
        if len(self.reports) != record.partitions or is_current:
            return None
        return json.dumps(content).encode()

    def _success(self, record: Record) -> dict[str, Any]:
        return self.summary(record).as_json() | totals_of(record.objects, self.reports)


def _plan(driver: _Driver, source: str, now: Mapping[str, Any], kept: Mapping[str, Any], overwrite: bool) -> Record:
    """List the source, write the plan, then the record that names it: who creates that first, wins."""
    started = time.perf_counter()
    options = driver.options
    where, batches = list_source(source, options.suffix, options, suffixes_of(driver.model))
    tables = cut(_counted(batches, driver.meter), options.partition_objects, options.partition_bytes, options.limit)
    plan = NewPlan(driver.place, tables)
    driver.meter.spend("list", time.perf_counter() - started)
    if not plan.info.objects:
        raise empty_source(source)
    if overwrite:
        folder = move_aside(driver.place, plan.files)
        if folder is not None:
            logger.info("the old job lies in %s/%s", driver.place.uri, folder)
    return create_record(driver.place, plan, Record(now, where, (plan.info,), **kept))


def _append(driver: _Driver, source: str, named: str, record: Record) -> tuple[Record, dict[str, Any]]:
    """Finish the job, list the source again, plan what is new, and predict that and what has changed."""
    place, options = driver.place, driver.options
    while True:
        driver.finish(record)
        started = time.perf_counter()
        driver.meter.todo = None
        parts = {number: name for number, name in place.parts().items() if number in driver.reports}
        changes = Changes(place, parts)
        _, batches = list_source(source, options.suffix, options, suffixes_of(driver.model))
        tables = cut(
            changes.new_ones(_counted(batches, driver.meter)),
            options.partition_objects,
            options.partition_bytes,
            limit=None,
            first=record.partitions,
        )
        plan = NewPlan(place, tables, record.partitions)
        driver.meter.spend("list", time.perf_counter() - started)
        if changes.changed:
            place.probe_update()
        if changes.new:
            place.remove([SUCCESS_FILE])
            record = append_record(place, plan, record, named)
            if plan.info not in record.plans:
                continue  # another driver has appended; what it has planned is not new any more
        ids = range(plan.info.first, plan.info.end)
        driver.predict(record, ids, changes.new, Revision.write(changes.revised()))
        return record, {"new": changes.new, "changed": changes.changed, "unchanged": changes.unchanged}


def _failed(driver: _Driver, record: Record, codes: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """The rows to retry, by partition, with the sizes and etags that the objects have now."""
    refreshed = refresher(record.source, driver.options)
    for number, report in sorted(driver.reports.items()):
        if not report.failures_by_code.keys().isdisjoint(codes):
            yield number, refreshed(failed_rows(driver.place, part_name(number), codes))


def _counted(batches: Iterable[pa.RecordBatch], meter: Meter) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        meter.listed += batch.num_rows
        yield batch


def _all_of(names: Iterable[str]) -> str:
    return ", ".join(sorted({one for name in names for one in name.split(", ")}))
