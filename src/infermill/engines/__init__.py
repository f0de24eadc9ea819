"""Where workers run. An engine is a module whose `start(options)` gives, in a context, a function that runs a job."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import TYPE_CHECKING, Any

from infermill.errors import UsageError
from infermill.imports import leave_out_no_more
from infermill.meter import Meter
from infermill.types import EngineName, Options, PartitionReport

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from infermill.jobspec import Job  # not here: engines are imported first, to start their workers soon

Engine = Callable[["Job", Sequence[int], Meter], Iterator[PartitionReport]]
"Runs the partitions of a job that are named, and yields a report when the part of each is there."
MODULES: dict[EngineName, str] = {"local": "infermill.engines.local", "spark": "infermill.engines.spark"}


def start(options: Options) -> AbstractContextManager[Engine]:
    """Start the workers of `options.engine`, or what starts them.

    Raises:
        UsageError: there is no such engine, its extra is not installed, or an option is for another one.
    """
    check_options(options)
    started: AbstractContextManager[Engine] = _module(options.engine).start(options)
    return started


def check_options(options: Options) -> None:
    """Raise UsageError where options for engines do not go together."""
    if options.engine not in MODULES:
        raise UsageError(f"there is no engine {options.engine!r}", f"choose one of {', '.join(MODULES)}")
    if options.engine != "spark" and (options.master or options.remote or options.conf):
        raise UsageError("--master, --remote and --conf are for Spark", "add --engine spark")
    if options.master and options.remote:
        raise UsageError("--master and --remote do not go together", "--remote is for a Spark Connect server")


def survey(options: Options) -> list[dict[str, Any]]:
    """What each executor of a Spark cluster is, asked of a session as the options say.

    Raises:
        UsageError, InfermillError: as `start`; and where no task can be run.
    """
    executors: list[dict[str, Any]] = _module("spark").survey_of(options)
    return executors


def on_session(session: "SparkSession", options: Options) -> Engine:
    """The engine that runs jobs on a Spark session, classic or Connect.

    Raises:
        UsageError: it is no session, or the options ask for another one.
    """
    if options.master or options.remote or options.conf:
        raise UsageError(
            "master, remote and conf are for a session that infermill starts, and engine= is one that is there",
            "leave them out, or leave out engine= and pass Options(engine='spark', …)",
        )
    engine: Engine = _module("spark").on(session)
    return engine


def _module(name: EngineName) -> ModuleType:
    if name == "spark":
        leave_out_no_more()
    try:
        return importlib.import_module(MODULES[name])
    except ImportError as error:
        if name != "spark":
            raise
        raise UsageError(f"Spark cannot be used: {error}", "pip install 'infermill[spark]'") from None
