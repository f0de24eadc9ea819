"""Rates after start-up, measured from outside, in the same way for everything.

A way predicts 12 images and then many, each in a whole process. What the many take longer is what the images between
them take: the rate after start-up is (many - 12) / (seconds of many - seconds of 12), both of the same round.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from material import TWELVE, Material
from measuring import ChildError, median
from ways import Way

FINALISTS = 4
"So many ways of the peers are measured in every round; the others in the first."


@dataclass(slots=True)
class Series:
    """What a way measured, a value a round."""

    way: Way
    starts: list[float] = field(default_factory=list)
    "Seconds of a whole process over 12 images."
    wholes: list[float] = field(default_factory=list)
    "Seconds of a whole process over many."
    rates: list[float] = field(default_factory=list)
    "Images per second after start-up."
    peaks_mb: list[float] = field(default_factory=list)
    failed: str = ""
    out: Path | None = None

    def measure(
        self, made: Material, twelve: Path | str, many: Path | str, count: int, start: float | None = None
    ) -> None:
        """One round; a way that fails twice is not tried again. `start` is that of 12 where it is known already."""
        if self.failed:
            return
        try:
            self._round(made, twelve, many, count, start)
        except ChildError:
            try:
                self._round(made, twelve, many, count, start)
            except ChildError as error:
                self.failed = str(error).replace(f"{made.work}/", "")

    def _round(self, made: Material, twelve: Path | str, many: Path | str, count: int, start: float | None) -> None:
        start = start or self.way.run(twelve, made.out("twelve")).seconds
        self.out = made.out(self.way.name.replace("/", " ")[:80])
        whole = self.way.run(many, self.out)
        self.starts.append(start)
        self.wholes.append(whole.seconds)
        self.peaks_mb.append(whole.peak_mb)
        between = whole.seconds - start
        # A start that took as long as everything, as on a machine that does something else, says nothing.
        self.rates.append((count - TWELVE) / between if between > 0 else count / whole.seconds)


def finalists(measured: Sequence[Series]) -> list[Series]:
    """The fastest ways, which are measured again."""
    return ranked(measured)[:FINALISTS]


def best_of_each(measured: Sequence[Series]) -> list[Series]:
    """Of each peer the way with the best rate, the fastest peer first, those of one round last."""
    best: dict[str, Series] = {}
    for series in ranked(measured):
        best.setdefault(series.way.group, series)
    return [*best.values()]


def ranked(measured: Sequence[Series]) -> list[Series]:
    """Those that could be measured: first those of all rounds, and of them the fastest."""
    could = (series for series in measured if not series.failed)
    return sorted(could, key=lambda series: (len(series.rates), median(series.rates)), reverse=True)


def times(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """How many times faster, a round a value: the median, the lowest and the highest."""
    ratios = [one / other for one, other in zip(ours, theirs, strict=False)]
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else f"{ratios[0]:.2f}"


def failures(measured: Sequence[Series], lacking: dict[str, str]) -> list[str]:
    """A line for each way that could not be measured, with the reason."""
    lines = [f"- {name}: not installed: {reason}" for name, reason in lacking.items()]
    return lines + [f"- {series.way.name}: failed: {series.failed}" for series in measured if series.failed]
