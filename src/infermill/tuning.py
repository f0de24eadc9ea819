"""How many streams a network runs in, and how long its batches are: as told, as probed, or the runtime's default.

A probe measures a few settings in turn, in short slices, so that a machine whose speed drifts, or that has other work,
slows each of them alike. Compute threads decode, too (see ARCHITECTURE.md), so that there are no others to choose.
"""

import functools
import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from infermill.choices import Choices
from infermill.errors import InfermillError
from infermill.limits import free_memory
from infermill.models.model import Model
from infermill.predictions import TaskRows, blank, infer, rows_for
from infermill.runtimes import Predictor, load
from infermill.stages import BATCHES_IN_A_ROW
from infermill.types import Options

PROBE_SECONDS = 2.0
WORTH_SECONDS = 60.0
"Shorter jobs are not probed: what a good choice saves is less than what it costs."
WORTH_ROWS = 1_000
"A stream; with fewer, one batch is too much of the job to be spent on timing it."
SLICE_SECONDS = 0.05
MIN_ROUNDS = 3
BATCH_FACTORS = (2.0, 4.0, 0.5, 8.0, 16.0)
"The lengths that are tried, beside the default; where time is short, the first ones."
STREAMS_FACTORS = (1.0, 4.0)
MARGIN = 1.03
"What is not better than the default by this factor may as well be noise."
FEWER_STREAMS_MARGIN = 1.10
"Where several cores share a batch they wait for each other at each layer, and the more so when one of them decodes."
HOPELESS = (0.6, 0.8, 0.9)
"What is below this part of the best after one round, two, or more, is not measured again."
MEMORY_SHARE = 0.25
"Of the free memory, for the batches of a probe."
QUICK_CALL_SECONDS = 0.02
TIMED_CALLS, TIMING_SECONDS = 4, 0.1
AS_TOLD = "as told (--batch)"
FIXED = "fixed batch of the network"
SHORT = "default: the job is short"
NO_JOB = "default: it is not known how much there is to do"
NO_MEMORY = "default: there is no memory for a probe"
UNFINISHED = "the default, since the probes before this did not end"
TOO_SLOW = "default: a batch takes {seconds:.1f} s, too long to try others"
NOT_PROBED = "default of mxnet"


class Setting(NamedTuple):
    """How many calls at once share the cores, and how many rows each has."""

    streams: int
    batch_size: int


class Work(NamedTuple):
    """What a worker has to do, and what is still while it probes."""

    rows: int = 0
    "How many rows it will predict; 0: not known."
    waiting_rows: int = 1 << 12
    "How many rows may wait for the network."
    still: threading.Event | None = None
    "Is cleared while the machine should do nothing else."


Rate = Callable[[Setting, float], float]
"Rows a second of a setting, measured for so many seconds, and for one call a stream at least."
Round = Mapping[Setting, float]
"What was measured in turn, in rows a second."


def load_tuned(model: Model, options: Options, threads: int, work: Work) -> tuple[Predictor, TaskRows]:
    """Load a network with the streams and the batch that suit this machine; `Predictor.reason` says why these.

    Args:
        model: the model.
        options: its runtime, and the length of a batch where that is told.
        threads: the cores that it may use.
        work: what is to be done. A choice that is kept is always taken; there is a probe only where none is, and the
            work takes longer than a minute.

    Raises:
        ModelError, UsageError: as `runtimes.load`.
    """
    load_with = functools.partial(load, model, options.runtime, threads, options.runtime_python)
    if options.batch is not None or options.runtime == "mxnet":
        predictor = load_with(batch_size=options.batch)
        why = NOT_PROBED if options.batch is None else FIXED if predictor.is_fixed else AS_TOLD
        return _with_rows(model, predictor, why)
    choices = Choices(model.digest, options.runtime, threads, options.workers)
    kept = choices.read()
    if kept is not None:
        predictor = load_with(streams=kept.streams, batch_size=kept.batch_size)
        return _with_rows(model, predictor, f"cached probe of {kept.date}: {kept.why}")
    started = time.perf_counter()
    predictor = load_with()
    load_seconds = time.perf_counter() - started
    predictor, tasks = _with_rows(model, predictor, FIXED if predictor.is_fixed else SHORT if work.rows else NO_JOB)
    bench = _Bench(model, tasks, predictor, load_with, options.workers)
    try:
        tried = _worth_trying(bench, predictor, work, load_seconds, threads)
        if isinstance(tried, str):
            return replace(predictor, reason=tried), tasks
        chosen, why = _probed_once(bench, choices, tried, work.still)
    except InfermillError as error:  # without a cache, each worker would probe, at each start
        return replace(predictor, reason=f"default: {error.message}"), tasks
    except MemoryError:  # the job halves its batches, where it meets that
        return replace(predictor, reason=NO_MEMORY), tasks
    # Anew, for what the longest batch of the probe has taken is not given back by itself.
    del predictor, tasks, bench
    return _with_rows(model, load_with(streams=chosen.streams, batch_size=chosen.batch_size), f"probed: {why}")


def _worth_trying(
    bench: "_Bench", predictor: Predictor, work: Work, load_seconds: float, threads: int
) -> Sequence[Setting] | str:
    """The settings to try beside the default, or why none is tried."""
    if work.rows < WORTH_ROWS * predictor.streams:
        return predictor.reason
    row_seconds = bench.row_seconds()
    if work.rows * row_seconds / predictor.streams < WORTH_SECONDS:
        return predictor.reason
    is_on_cores = predictor.device == "cpu"
    tried = candidates(
        bench.default,
        threads if is_on_cores else 0,
        row_seconds,
        load_seconds,
        most_rows=0 if predictor.is_fixed else work.waiting_rows // (BATCHES_IN_A_ROW if is_on_cores else 1),
    )
    too_slow = TOO_SLOW.format(seconds=row_seconds * predictor.batch_size)
    return tried or (predictor.reason if predictor.is_fixed else too_slow)


def _with_rows(model: Model, predictor: Predictor, reason: str) -> tuple[Predictor, TaskRows]:
    predictor = replace(predictor, reason=reason)
    return predictor, rows_for(model, predictor)


def _probed_once(
    bench: "_Bench", choices: Choices, tried: Sequence[Setting], still: threading.Event | None
) -> tuple[Setting, str]:
    """Probe, or wait for the worker that does; the share of those that wait is as busy then as it will be later."""
    try:
        if still is not None:
            still.clear()
        with choices.alone(lambda: bench.run(bench.default, SLICE_SECONDS)):
            kept = choices.read()
            if kept is not None:
                return Setting(kept.streams, kept.batch_size), kept.why
            if not choices.begin():
                choices.write(*bench.default, UNFINISHED)
                return bench.default, UNFINISHED
            rounds = explore(bench.rate, bench.default, tried)
            chosen, ratio = choose(rounds, bench.default)
            why = f"the default, of {len(rounds[0])} settings"
            if chosen != bench.default:
                why = f"{ratio:.2f} x the default ({bench.default.batch_size} x {bench.default.streams} streams)"
            choices.write(*chosen, why)
            return chosen, why
    finally:
        if still is not None:
            still.set()


def candidates(
    default: Setting, threads: int, row_seconds: float, load_seconds: float, most_rows: int
) -> list[Setting]:
    """The settings that can be measured in the time of a probe, beside the default.

    Args:
        default: the runtime's own.
        threads: the cores; 0 where the number of streams is not to be chosen.
        row_seconds: what a row takes in the default, of one stream.
        load_seconds: what it takes to load the network once more, for another number of streams.
        most_rows: the longest batch; 0 where its length is not to be chosen.

    Example:
        >>> candidates(Setting(2, 8), 2, row_seconds=0.02, load_seconds=0.5, most_rows=64)
        [Setting(streams=2, batch_size=16)]
        >>> candidates(Setting(2, 8), 2, row_seconds=0.2, load_seconds=2.0, most_rows=64)
        []
    """

    def seconds(setting: Setting) -> float:
        call = setting.batch_size * row_seconds * setting.streams / default.streams
        return call + MIN_ROUNDS * max(call, SLICE_SECONDS)

    def lengths(factors: Sequence[float]) -> list[int]:
        every = (int(default.batch_size * factor) for factor in factors)
        return [rows for rows in every if rows == default.batch_size or 1 <= rows <= most_rows]

    tried: list[Setting] = []
    left = PROBE_SECONDS - seconds(default)
    for rows in lengths(BATCH_FACTORS):
        setting = Setting(default.streams, rows)
        if seconds(setting) <= left:
            left -= seconds(setting)
            tried.append(setting)
    for streams in dict.fromkeys((threads, threads // 2, 1)) if threads > 1 else ():
        others = [Setting(streams, rows) for rows in lengths(STREAMS_FACTORS)]
        cost = load_seconds + sum(map(seconds, others))
        if streams != default.streams and cost <= left:
            left -= cost
            tried += others
    return tried


def explore(
    rate: Rate, default: Setting, tried: Sequence[Setting], clock: Callable[[], float] = time.perf_counter
) -> list[Round]:
    """Measure the default and other settings in turn, forwards and backwards, until the time of a probe is over.

    A setting for which there is no memory, or that the runtime refuses, is left out.

    Raises:
        MemoryError: there is none for the default.
    """
    deadline = clock() + PROBE_SECONDS
    live: list[Setting] = [default]
    rate(default, 0.0)  # the first call of a length costs more than the next ones
    for setting in sorted(tried, key=lambda one: one.streams * one.batch_size):
        with suppress(MemoryError, InfermillError):
            rate(setting, 0.0)
            live.append(setting)
    rounds: list[Round] = []
    while len(live) > 1 or not rounds:
        started = clock()
        order = live if len(rounds) % 2 else live[::-1]
        measured: dict[Setting, float] = {}
        for setting in order:
            try:
                measured[setting] = rate(setting, SLICE_SECONDS)
            except (MemoryError, InfermillError):  # another worker may have loaded its network meanwhile
                if setting == default:
                    raise
        rounds.append(measured)
        took = clock() - started
        live = contenders(rounds, default)
        if clock() + (took if len(rounds) >= MIN_ROUNDS else 0.0) > deadline:
            break
    return rounds


def contenders(rounds: Sequence[Round], default: Setting) -> list[Setting]:
    """The default, and those of the last round that may yet be the best."""
    ratios = {setting: statistics.median(_ratios(rounds, setting, default)) for setting in rounds[-1]}
    enough = HOPELESS[min(len(rounds), len(HOPELESS)) - 1] * max(ratios.values())
    return [setting for setting, ratio in ratios.items() if setting == default or ratio >= enough]


def choose(rounds: Sequence[Round], default: Setting) -> tuple[Setting, float]:
    """The best setting, and how much better than the default it is; the default where that may be noise.

    A setting must be better by a margin in the median of its rounds, and be better at all in three of four of them. Of
    those about as good as the best, the one with the smallest batch is chosen: it takes less memory.

    Example:
        >>> choose([{Setting(2, 8): 100.0, Setting(2, 16): 110.0}] * 3, Setting(2, 8))
        (Setting(streams=2, batch_size=16), 1.1)
        >>> choose([{Setting(2, 8): 100.0, Setting(2, 16): 102.0}] * 3, Setting(2, 8))
        (Setting(streams=2, batch_size=8), 1.0)
    """
    better: dict[Setting, float] = {}
    for setting in rounds[-1]:
        ratios = _ratios(rounds, setting, default)
        margin = FEWER_STREAMS_MARGIN if setting.streams < default.streams else MARGIN
        is_better = sum(ratio > 1 for ratio in ratios) >= 0.75 * len(ratios)
        if len(ratios) >= MIN_ROUNDS and is_better and statistics.median(ratios) >= margin:
            better[setting] = statistics.median(ratios)
    if not better:
        return default, 1.0
    good = [setting for setting, ratio in better.items() if ratio * MARGIN >= max(better.values())]
    chosen = min(good, key=lambda one: (one.streams != default.streams, one.streams * one.batch_size))
    return chosen, better[chosen]


def _ratios(rounds: Sequence[Round], setting: Setting, default: Setting) -> list[float]:
    return [one[setting] / one[default] for one in rounds if setting in one]


class _Bench:
    """Measures what the pipeline does with a batch: from its rows to what is kept of them."""

    def __init__(
        self, model: Model, tasks: TaskRows, predictor: Predictor, load_with: Callable[..., Predictor], workers: int
    ) -> None:
        self._tasks = tasks
        self._row = blank(model, predictor)[0]
        self._load_with = load_with
        self._workers = workers
        self._predictors = {predictor.streams: predictor}
        self._resident_before = _resident_bytes()
        self._row_bytes: float | None = None
        self.default = Setting(predictor.streams, predictor.batch_size)

    def row_seconds(self) -> float:
        """What a row takes in a stream of the default."""
        predictor, rows = self._predictors[self.default.streams], self.default.batch_size
        short = rows if predictor.is_fixed else min(2, rows)
        taken = self._shortest(predictor, short)
        return taken / short if taken > QUICK_CALL_SECONDS else self._shortest(predictor, rows) / rows

    def _shortest(self, predictor: Predictor, rows: int) -> float:
        """Of a few calls, the one that was the least disturbed, and not the first of its length."""
        deadline, taken = time.perf_counter() + TIMING_SECONDS, [self._call(predictor, rows)]
        while len(taken) < TIMED_CALLS and time.perf_counter() < deadline:
            taken.append(self._call(predictor, rows))
        return min(taken)

    def _call(self, predictor: Predictor, rows: int) -> float:
        started = time.perf_counter()
        self._tasks.finish(infer(predictor, np.stack([self._row] * rows)))
        return time.perf_counter() - started

    def rate(self, setting: Setting, seconds: float) -> float:
        """As `Rate`.

        Raises:
            MemoryError: there is none for this setting.
            InfermillError: the runtime refuses it.
        """
        if setting == self.default and self._row_bytes is None:
            rate = self.run(setting, seconds)
            grown = _resident_bytes() - self._resident_before
            self._row_bytes = max(grown / (setting.streams * setting.batch_size), self._row.nbytes)
            return rate
        needed = (self._row_bytes or 0.0) * setting.streams * setting.batch_size * self._workers
        free = free_memory()
        if free is not None and needed > MEMORY_SHARE * free and setting != self.default:
            raise MemoryError("a batch of this length could take too much memory")
        return self.run(setting, seconds)

    def run(self, setting: Setting, seconds: float) -> float:
        """Rows a second, with a thread for each stream."""
        if setting.streams not in self._predictors:
            self._predictors[setting.streams] = self._load_with(streams=setting.streams)
        predictor = replace(self._predictors[setting.streams], batch_size=setting.batch_size)
        stop = time.perf_counter() + seconds

        def go(_: int) -> float:
            started, calls = time.perf_counter(), 0
            while not calls or time.perf_counter() < stop:
                self._call(predictor, setting.batch_size)
                calls += 1
            return calls * setting.batch_size / (time.perf_counter() - started)

        with ThreadPoolExecutor(setting.streams, "probe") as pool:
            return sum(pool.map(go, range(setting.streams)))


def _resident_bytes() -> int:
    """The memory of this process; 0 where the system does not tell."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0
