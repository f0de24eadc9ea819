"""Executors of Apache Spark as workers.

    driver                                          Python worker of an executor          worker process
    range(tasks) ─ mapInArrow ─► partition numbers ─► spark_task.run ─► engines.local ─► run_partitions
    the output's listing ◄─────────────────────────────── parts ◄─────────────────────────────┘
    collect ◄──────────────────────── counts, and what the listing cannot tell

Spark schedules, and tries again what dies with a machine; DataFrames are all that is used of it, so that Spark Connect
does as well as classic Spark. What is done is seen in the output while the tasks run, since a task answers at its end.
"""

import json
import logging
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from pyspark import inheritable_thread_target
from pyspark.resource import ResourceProfile, ResourceProfileBuilder, TaskResourceRequests
from pyspark.sql import SparkSession
from pyspark.sql.functions import spark_partition_id

from infermill import shipping
from infermill.engines import Engine, spark_task
from infermill.errors import InfermillError, UsageError
from infermill.hosts import is_web
from infermill.jobspec import Job
from infermill.meter import Counts, Meter
from infermill.output import PLAN_FOLDER, Output
from infermill.plan import partition_reader
from infermill.runtimes import missing
from infermill.session import first_line, local_cores, spark_session
from infermill.stores import locate, place_of
from infermill.types import Options, PartitionReport, RuntimeName

TASKS_PER_SLOT = 3
"So that an executor which is slower than others gets less to do."
PARTITIONS_PER_TASK = 8
"At most: a pipeline runs empty at the end of each task, and other executors may join later."
TAIL_PARTITIONS = 20
"Of which it is told where they are, when no more are left."
WITNESSES = 64
"So many files, at most, of which an executor must see one."
_POLL_SECONDS = 1.0
_LONGEST_POLL_SECONDS = 30.0
_SPREAD_SECONDS = 0.3
_SETTLED_SECONDS = 3.0
"Without another executor, until a survey has seen all: those of a cluster that has just started come one by one."
_SURVEYS = 20
"At most, of a cluster that grows and grows."
_PARALLELISM = ("spark.default.parallelism", "spark.sql.leafNodeDefaultParallelism")
"Whoever sets these, has other numbers of partitions than cores."
PATIENCE_SECONDS = 60.0
"Without an executor, until it is said that there is none; Spark itself waits for ever."
_WRONG_PYTHON = re.compile(r".*(ModuleNotFoundError: |Cannot run program|PYTHON_VERSION_MISMATCH).*")
logger = logging.getLogger("infermill")


@contextmanager
def start(options: Options) -> Iterator[Engine]:
    """Start Spark, or connect to it, as the options say, when there is something to run: not for a job that is done.

    Raises:
        UsageError, InfermillError: as `session.spark_session`.
    """
    _check(options)
    session = spark_session(options)
    with ExitStack() as started:

        @cache
        def start_once() -> SparkSession:
            _tell_start(options)
            return started.enter_context(session)

        def run(job: Job, ids: Sequence[int], meter: Meter) -> Iterator[PartitionReport]:
            meter.activity = "starting Spark"
            yield from on(start_once())(job, ids, meter)

        yield run


def _tell_start(options: Options) -> None:
    """It takes some ten seconds."""
    where = options.remote or options.master or "this machine"
    logger.info("starting Spark on %s", where if "token=" not in where else "a Spark Connect server")


def _check(options: Options) -> None:
    if options.workers > 1:
        raise UsageError(
            "--workers is for this machine: on Spark, every executor is one",
            "set their number with --conf spark.executor.instances=N",
        )


def on(session: SparkSession, partitions_per_task: int | None = None) -> Engine:
    """The engine that runs jobs on a session: a classic one, or one of Spark Connect.

    Args:
        session: the session.
        partitions_per_task: how many partitions one task does, in one pipeline. (default: by the number of executors)

    Raises:
        UsageError: it is no session.
    """
    if not hasattr(session, "addArtifacts"):  # classic sessions and those of Spark Connect have no class in common
        raise UsageError(
            f"engine={session!r} is no Spark session",
            "pass what SparkSession.builder.getOrCreate() returns; without engine=, Options(engine='spark') starts one",
        )
    return partial(_run, session, partitions_per_task)


def _run(
    session: SparkSession, partitions_per_task: int | None, job: Job, ids: Sequence[int], meter: Meter
) -> Iterator[PartitionReport]:
    _check(job.options)
    meter.activity = "waiting for executors"
    versions = _Versions([job.options.runtime, *spark_task.DECODERS])
    shape = _shape(session, job.options.runtime, versions)
    job = replace(job, options=job.options.for_workers(), todo=job.todo // shape.slots)
    meter.activity = "waiting for the first partition"
    per_task = partitions_per_task or min(-(-len(ids) // (TASKS_PER_SLOT * shape.slots)), PARTITIONS_PER_TASK)
    shares = [tuple(ids[at : at + per_task]) for at in range(0, len(ids), per_task)]
    model = shipping.ship_model(session, job.model, job.options)
    run, place = uuid.uuid4().hex, Output(job.output, job.options)
    witnesses = () if shipping.runs_here(session) else _witnesses(place, job, ids[0])
    function = shipping.task(spark_task.run, spark_task.Work(job, model, shares, run, witnesses))
    frame = session.range(0, len(shares), 1, len(shares)).mapInArrow(function, "answer string", profile=shape.profile)
    watch = _Watch(place, job, shares, meter, run)
    place.delete(watch.notes())  # of a driver that was killed
    answer = _Collected(session, frame)
    try:
        while not answer.is_done(watch.pause_seconds):
            yield from watch.new_reports()
        yield from _answered(answer.rows(), watch, meter, versions)
    finally:
        answer.cancel()


def _witnesses(place: Output, job: Job, partition: int) -> tuple[str, ...]:
    """Files of a partition that are there; what was deleted, or never there, is missing on every machine."""
    root = locate(job.source.root)
    if not (root.is_local or job.source.keys_are_uris):
        return ()
    refs = partition_reader(job.plans, lambda name: place.read_existing(f"{PLAN_FOLDER}/{name}"))(partition)
    keys = [ref.key.partition("#")[0] if job.source.shards else ref.key for ref in refs[:WITNESSES]]
    places = [place_of(key, job.source, root) for key in dict.fromkeys(keys) if not is_web(key)]
    return tuple(one.uri.replace("//", "/") for one in places if one.is_local and spark_task.is_there(one.uri))


def _answered(rows: Sequence[str], watch: "_Watch", meter: Meter, versions: "_Versions") -> Iterator[PartitionReport]:
    workers: set[str] = set()
    for row in rows:
        answer = json.loads(row)
        if "report" in answer:
            report = PartitionReport(**answer["report"])
            if watch.is_new(report):
                yield report
        else:
            workers.add(answer["worker"])
            versions.compare(answer["worker"].partition("/")[0], answer["versions"])
            # Its objects were counted when their parts were seen.
            meter.add(replace(Counts(**answer["counts"]), objects=0, failures={}))
    meter.workers = len(workers)


class _Versions:
    """Where executors have other versions than the driver, or than each other, of what predictions depend on."""

    def __init__(self, compared: Sequence[str]) -> None:
        self._compared = compared
        self._first = {name: (version, "the driver") for name, version in spark_task.versions().items() if version}
        self._told: set[str] = set()

    def compare(self, host: str, found: Mapping[str, str]) -> None:
        """Tell once how the Python on a host differs."""
        others = self.others(host, found)
        if others and others not in self._told:
            self._told.add(others)
            logger.warning("predictions may differ a little: %s", others)

    def others(self, host: str, found: Mapping[str, str]) -> str:
        """How it differs, in words."""
        told = []
        for name in self._compared:
            version = found.get(name)
            if version:
                first, whose = self._first.setdefault(name, (version, host))
                told += [f"{name} {version}, and {whose} has {first}"] if version != first else []
        return f"{host} has {'; '.join(told)}" if told else ""


class _Watch:
    """Sees in the output what is done and what is being done."""

    def __init__(self, place: Output, job: Job, shares: Sequence[Sequence[int]], meter: Meter, run: str) -> None:
        self._place = place
        self._notes = job.notes
        self._run = run
        self._meter = meter
        self._tasks = {partition: number for number, share in enumerate(shares) for partition in share}
        self._left = set(self._tasks)
        # Of those that are revised: their reports are in the answers of the tasks.
        self._old = set(place.parts())
        self._hosts: dict[str, str] = {}
        self.pause_seconds = _POLL_SECONDS

    def new_reports(self) -> Iterator[PartitionReport]:
        started = time.monotonic()
        found = self._place.reports(self._notes, of=self._left - self._old)
        for report in found.values():
            if self.is_new(report):
                yield report
        done = f"{len(self._tasks) - len(self._left):,}/{len(self._tasks):,} partitions"
        is_tail = 0 < len(self._left) <= min(TAIL_PARTITIONS, len(self._tasks) - 1)
        self._meter.detail = f"{done}, last: {self._tail()}" if is_tail else done
        # Listing 10,000 parts takes a second, and costs money.
        self.pause_seconds = min(max(_POLL_SECONDS, 20 * (time.monotonic() - started)), _LONGEST_POLL_SECONDS)

    def is_new(self, report: PartitionReport) -> bool:
        if report.partition not in self._left:
            return False
        self._left.remove(report.partition)
        self._meter.add(Counts(objects=report.ok + report.failed, failures=report.failures_by_code))
        return True

    def _tail(self) -> str:
        """Which partitions are last, and where."""
        hosts: dict[int, set[str]] = {}
        tasks = {self._tasks[partition] for partition in self._left}
        for name in self.notes():
            run, task, _ = name.rpartition("/")[2].split("-")
            if run == self._run and int(task) in tasks:
                if name not in self._hosts:
                    content = self._place.read(name)
                    self._hosts[name] = content.decode() if content else "?"
                hosts.setdefault(int(task), set()).add(self._hosts[name])
        places: dict[str, list[str]] = {}
        for partition in sorted(self._left):
            where = " and ".join(sorted(hosts.get(self._tasks[partition], ())))
            places.setdefault(where or "no executor yet", []).append(str(partition))
        return "; ".join(f"{', '.join(numbers)} on {host}" for host, numbers in places.items())

    def notes(self) -> list[str]:
        """The notes of the tasks that run, and of those that were killed."""
        return [f"{spark_task.RUNNING_FOLDER}/{name}" for name in self._place.names(spark_task.RUNNING_FOLDER)]


class _Collected:
    """A DataFrame's rows, collected in a thread of its own, so that the caller can watch and cancel."""

    def __init__(self, session: SparkSession, frame: Any) -> None:
        self._tag = f"infermill-{uuid.uuid4().hex}"
        if isinstance(session, SparkSession):
            # Its `interruptTag` finds only what the calling thread itself has started.
            self._add_tag, self._interrupt = session.sparkContext.addJobTag, session.sparkContext.cancelJobsWithTag
        else:
            self._add_tag, self._interrupt = session.addTag, session.interruptTag
        self._pool = ThreadPoolExecutor(1, "spark")
        collect = inheritable_thread_target(session)(self._collect)
        self._rows: Future[list[str]] = self._pool.submit(collect, frame)

    def _collect(self, frame: Any) -> list[str]:
        self._add_tag(self._tag)  # of this thread alone
        return [row.answer for row in frame.collect()]

    def is_done(self, within_seconds: float) -> bool:
        with suppress(TimeoutError):
            self._rows.exception(timeout=within_seconds)
        return self._rows.done()

    def rows(self) -> list[str]:
        """What the tasks answered.

        Raises:
            InfermillError: as a task raised it, or that Spark gave up.
        """
        error = self._rows.exception()
        if error is None:
            return self._rows.result()
        told = shipping.translated(error)
        if told is not None:
            raise told from None
        reason = first_line(error)
        if wrong_python := _WRONG_PYTHON.search(str(error)):
            raise InfermillError(
                f"the Python of the executors cannot run Spark's tasks: {wrong_python[0].strip()}",
                f"name a Python 3.{sys.version_info.minor} that has what infermill depends on, as it is called there: "
                "--conf spark.pyspark.python=…",
            ) from None
        raise InfermillError(
            f"Spark gave up: {reason}",
            "finished parts stay, and the same command resumes; the logs of the executors say more",
        ) from error

    def cancel(self) -> None:
        while not self.is_done(_POLL_SECONDS):
            self._interrupt(self._tag)  # again and again: it may not have begun
        self._pool.shutdown()


@dataclass(frozen=True, slots=True)
class Shape:
    """How many tasks run at once, and what a task must ask for to have an executor to itself."""

    slots: int
    profile: ResourceProfile | None = None


def _shape(session: SparkSession, runtime: RuntimeName, versions: _Versions) -> Shape:
    """Ask an executor what it has.

    Raises:
        InfermillError: it lacks what runs the network.
    """
    cores = local_cores(session.conf.get("spark.master")) if shipping.runs_here(session) else None
    if cores is not None:
        return Shape(max(cores // int(session.conf.get("spark.task.cpus", "1")), 1))
    # One task asks for all executors: each of several would leave a Python worker behind, and where tasks need no
    # profile, they would take turns with these, so that each of them loaded the network.
    (executor,) = _described(session, session.range(0, 1, 1, 1), 0.0)
    if executor["runtimes"].get(runtime) is False:
        raise missing(runtime, executor["host"], executor["executable"], "it is not installed")
    versions.compare(executor["host"], executor["versions"])
    cores = executor["cores"]
    if any(session.conf.get(name, None) is not None for name in _PARALLELISM):
        parallelism = cores * len(survey(session))
    else:
        # A DataFrame has as many partitions as there are cores; Spark Connect tells that nowhere else.
        (last,) = session.range(1 << 16).select(spark_partition_id().alias("number")).tail(1)
        parallelism = last["number"] + 1
    return shape_of(session.conf.get, parallelism, cores)


def shape_of(setting: Callable[[str, str | None], str | None], parallelism: int, cores: int) -> Shape:
    """The shape of a cluster that has so many cores, and so many in each executor, by the settings of its session."""
    # With dynamic allocation, a profile would ask for executors of its own beside those that are there.
    is_dynamic = setting("spark.dynamicAllocation.enabled", "false") == "true"
    task_cpus = setting("spark.task.cpus", None)
    if is_dynamic or cores == 1 or task_cpus is not None:
        return Shape(max(parallelism // int(task_cpus or 1), 1))
    whole = TaskResourceRequests().cpus(cores)
    gpus = setting("spark.task.resource.gpu.amount", None)
    if gpus is not None:  # which a profile does not take over
        whole = whole.resource("gpu", float(gpus))
    return Shape(max(parallelism // cores, 1), ResourceProfileBuilder().require(whole).build)


def survey_of(options: Options) -> list[dict[str, Any]]:
    """The survey of a session that is started, or connected to, as the options say."""
    _tell_start(options)
    with spark_session(options) as session:
        return survey(session)


def survey(session: SparkSession) -> list[dict[str, Any]]:
    """What each executor is: its host, cores, Python, versions (`others`: which are not the driver's) and GPUs.

    Raises:
        InfermillError: Spark runs no task, or its Python workers cannot run infermill; with the reason.
    """
    executors: dict[tuple[str, str], dict[str, Any]] = {}
    newest = time.monotonic()
    for _ in range(_SURVEYS):
        # Spark gives each free executor a task before it gives any of them a second one.
        tasks = max(4 * len(executors), 8)
        described = _described(session, session.range(0, tasks, 1, tasks), _SPREAD_SECONDS)
        found = {(one["host"], one["executor"]): one for one in described}
        if not found.keys() <= executors.keys():
            newest = time.monotonic()
        elif time.monotonic() - newest > _SETTLED_SECONDS:
            break
        executors |= found
    versions = _Versions(list(spark_task.versions()))
    return [one | {"others": versions.others(one["host"], one["versions"])} for _, one in sorted(executors.items())]


def _described(session: SparkSession, tasks: Any, seconds: float) -> list[dict[str, Any]]:
    """What the executors of some tasks say of themselves; each task takes so long, and so leaves others to others."""
    if not shipping.runs_here(session):
        shipping.ship_code(session)
    function = shipping.task(spark_task.describe, seconds)
    answer = _Collected(session, tasks.mapInArrow(function, "answer string"))
    try:
        if not answer.is_done(PATIENCE_SECONDS):
            logger.warning(
                "no executor has answered for %.0f s: has the cluster one to give, with the cores and the memory that "
                "spark.executor.cores and spark.executor.memory ask for? Its web page says",
                PATIENCE_SECONDS,
            )
            while not answer.is_done(_POLL_SECONDS):
                pass
        return [json.loads(row) for row in answer.rows()]
    finally:
        answer.cancel()
