"""START HERE: a job on the driver.

run()    resolve the model -> plan, or resume or append to the job that is there -> engine -> summary and _SUCCESS
retry()  the rows that failed for a passing reason -> engine -> summary and _SUCCESS
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import pyarrow as pa

from infermill import engines
from infermill.budget import Budget
from infermill.changes import Changes, failed_rows
from infermill.driver import Driver
from infermill.engines import Engine
from infermill.errors import MisfitError, SourceError, StoreError, UsageError
from infermill.jobspec import check_options, suffixes_of
from infermill.meter import Meter
from infermill.models.card import ModelCard
from infermill.models.model import Model
from infermill.models.opening import open_model
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
    discard_record,
    fingerprint,
    model_reference,
    move_aside,
    read_record,
)
from infermill.refresh import refresher
from infermill.runtimes import check_runtime
from infermill.sources import list_source, rereadable
from infermill.types import RETRYABLE, CardOptions, FailureCode, Options, Summary

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

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
        model: a model card, as a path, a URI or an object, a bare `.onnx`, or an MXNet checkpoint.
        output: a folder or a URI, new or with the same job in it.
        options: how the job is run.
        card_options: what the model card does not say, or says otherwise.
        display: shows the progress.
        existing: what becomes of a job that is there. `resume`: it is finished. `append`: it is finished, the source
            is listed again, what is new is added, and what has changed is predicted again. `overwrite`: it is moved
            aside, into a folder in `output`, and the job starts anew.
        engine: where the workers run: a Spark session, classic or Connect; None starts what `options.engine` says.

    Raises:
        ModelError: the card or the network is wrong; raised before the first object is predicted, and where they do not
            fit each other, no job is left of this call.
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
        driver = Driver(place, opened, options, meter, running, started, profile=_profile_folder(options))
        now = fingerprint(listed, opened, options)
        record = None if existing == "overwrite" else read_record(place)
        if record is None:
            place.probe()
            kept = {"model": model_reference(model), "card_options": absolute(card_options)}
            record, is_ours = _plan(driver, listed, now, kept, existing == "overwrite")
            changes = {"new": record.objects, "changed": 0, "unchanged": 0}
            check_same_job(record, now, place.uri)
            try:
                driver.finish(record)
            except MisfitError:
                # Who else works on it gets the same answer from the same network, and has begun nothing either.
                if is_ours and not meter.model_loads:
                    with suppress(StoreError):  # the other error says more
                        discard_record(place, record)
                raise
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
        driver = Driver(place, opened, options, meter, running, started, profile=_profile_folder(options))
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


def _profile_folder(options: Options) -> str | None:
    return f"{FOLDER}/profile/{datetime.now(UTC):%Y%m%d-%H%M%S}" if options.profile else None


def _plan(
    driver: Driver, source: str, now: Mapping[str, Any], kept: Mapping[str, Any], overwrite: bool
) -> tuple[Record, bool]:
    """List the source, write the plan, then the record that names it: who creates that first, wins.

    Returns the job that counts, and whether it is ours.
    """
    started = time.perf_counter()
    options = driver.options
    where, batches = list_source(source, options.suffix, options, suffixes_of(driver.model))
    tables = cut(_counted(batches, driver.meter), options.partition_objects, options.partition_bytes, options.limit)
    plan = NewPlan(driver.place, tables)
    driver.meter.spend("list", started)
    if not plan.info.objects:
        raise empty_source(source)
    if overwrite:
        folder = move_aside(driver.place, plan.files)
        if folder is not None:
            logger.info("the old job lies in %s/%s", driver.place.uri, folder)
    record = create_record(driver.place, plan, Record(now, where, (plan.info,), **kept))
    return record, plan.info in record.plans


def _append(driver: Driver, source: str, named: str, record: Record) -> tuple[Record, dict[str, Any]]:
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
        driver.meter.spend("list", started)
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


def _failed(driver: Driver, record: Record, codes: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """The rows to retry, by partition, with the sizes and etags that the objects have now."""
    refreshed = refresher(record.source, driver.options)
    for number, report in sorted(driver.reports.items()):
        if not report.failures_by_code.keys().isdisjoint(codes):
            yield number, refreshed(failed_rows(driver.place, part_name(number), codes))


def _counted(batches: Iterable[pa.RecordBatch], meter: Meter) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        meter.listed += batch.num_rows
        yield batch
