"""What a person sees while a job runs: a bar in a terminal, a log line every few seconds elsewhere."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from infermill.meter import Meter
from infermill.verdict import bottleneck

if TYPE_CHECKING:
    from rich.progress import Progress

REFRESH_SECONDS = 0.2
LOG_SECONDS = 5.0


_shown: "list[Progress]" = []


def hide() -> None:
    """Take the bar away, and give the cursor back, though the context is open: for a process that ends at once."""
    for progress in _shown:
        progress.stop()


@contextmanager
def show_progress(meter: Meter) -> Iterator[None]:
    """Show what a meter counts on standard error while the context is open."""
    rates = _Rates(meter)
    with _bar(meter, rates) if sys.stderr.isatty() else _log(meter, rates):
        yield


@contextmanager
def _log(meter: Meter, rates: "_Rates") -> Iterator[None]:
    started = time.monotonic()

    def log() -> None:
        rates.update()
        print(f"{time.monotonic() - started:6.0f} s  {_line(meter, rates)}", file=sys.stderr, flush=True)

    with _every(LOG_SECONDS, log):
        yield


@contextmanager
def _bar(meter: Meter, rates: "_Rates") -> Iterator[None]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.fields[line]}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        _shown.append(progress)
        task = progress.add_task("", total=None, line="")

        def refresh() -> None:
            rates.update()
            line = _line(meter, rates)
            progress.update(task, total=meter.todo, completed=meter.objects, line=line, refresh=True)

        with _every(REFRESH_SECONDS, refresh):
            yield


@contextmanager
def _every(seconds: float, action: Callable[[], None]) -> Iterator[None]:
    stopping = threading.Event()

    def loop() -> None:
        while not stopping.wait(seconds):
            action()

    thread = threading.Thread(target=loop, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


def _line(meter: Meter, rates: "_Rates") -> str:
    if meter.todo is None:
        return f"listing: {meter.listed:,} objects"
    if not (meter.model_loads or meter.objects):
        return meter.activity
    pace = rates.objects_per_second
    parts = [
        f"{meter.objects:,}/{meter.todo:,}",
        f"{meter.size_bytes / 1e6:,.0f} MB" if meter.size_bytes else "",
        f"{pace:,.1f}/s",
        f"ETA {duration((meter.todo - meter.objects) / pace) if pace else '?'}",
        f"{meter.failures.total():,} failed",
        f"{rates.bottleneck}-bound" if rates.bottleneck else "",
        meter.detail,
    ]
    return " · ".join(part for part in parts if part)


def duration(seconds: float) -> str:
    """`42 s`, `3:07`, or `5:03:07`."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours}:{minutes:02d}:{whole % 60:02d}"
    return f"{minutes}:{whole % 60:02d}" if minutes else f"{whole} s"


class _Rates:
    """The pace over the last few seconds, and the stage that sets it.

    Where objects are counted a partition at a time, over the last few partitions.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._history = [(time.monotonic(), 0, meter.pace_seconds)]
        self.objects_per_second = 0.0
        self.bottleneck = ""

    def update(self) -> None:
        now, stages = time.monotonic(), self._meter.pace_seconds
        if [objects for _, objects, _ in self._history[-2:]] == [self._meter.objects] * 2:
            self._history.pop()  # of a time in which nothing is done, its beginning and its end are enough
        self._history.append((now, self._meter.objects, stages))
        while now - self._history[0][0] > 2 * LOG_SECONDS and len({objects for _, objects, _ in self._history}) > 4:
            self._history.pop(0)
        then, objects, earlier = self._history[0]
        self.objects_per_second = (self._meter.objects - objects) / max(now - then, 1e-9)
        self.bottleneck = bottleneck({stage: stages[stage] - earlier[stage] for stage in stages})
