"""What a driver and its workers say to each other.

driver ──── Task ────► worker      one after the other
       ◄─── Ask ──────             whenever the pipeline wants another partition
       ──── Assignment ►           or None, when there is none left
       ◄─── Counts ───             a few times a second
       ◄─── Said ─────             a line for the log
       ◄─── PartitionReport        when its part is there
       ◄─── Raised or Done         at the end of each task; after Raised, the worker ends
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infermill.jobspec import Job  # not here: with engines, which start their workers soon


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker is to do: partitions of a job, or, where `suspects` are given, each of these rows by itself."""

    job: "Job"
    suspects: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """A worker has room for another partition."""


@dataclass(frozen=True, slots=True)
class Done:
    """A worker has done its task, and waits for another."""


@dataclass(frozen=True, slots=True)
class Said:
    """A line for the log."""

    level: int
    text: str


@dataclass(frozen=True, slots=True)
class Raised:
    """An exception on its way to the driver."""

    error: Exception
    traceback: str
