"""What the driver and its workers both know of a job.

Apart from `worker`, which imports all that decodes and predicts: the driver does neither.
"""

from dataclasses import dataclass
from typing import get_args

from infermill.errors import UsageError
from infermill.hosts import AllowList
from infermill.models.model import Model
from infermill.plan import PlanInfo
from infermill.runtimes import MODULES
from infermill.sources import IMAGE_SUFFIXES, TENSOR_SUFFIXES
from infermill.types import DecodeProfile, Options, Source


@dataclass(frozen=True, slots=True)
class Job:
    """All that a worker must know: small, picklable, and the same for every worker."""

    source: Source
    model: Model
    output: str
    options: Options
    plans: tuple[PlanInfo, ...]
    "The plan that the job was started with, and those that were appended; their partitions are numbered on."
    revision: str | None = None
    "The file of the rows that are predicted again."
    profile: str | None = None
    "The folder in the output for what the threads of each worker did and when."
    todo: int = 0
    "The objects of this run, for each of its workers; 0: not known."

    @property
    def notes(self) -> dict[str, str]:
        """What tells this job's parts from those of others; written into each."""
        return {"plan": self.plans[0].plan_id, "digest": self.model.digest}


def check_options(options: Options) -> None:
    """Raise UsageError where a number cannot be right."""
    for name in ("limit", "workers", "threads", "batch", "max_pixels", "partition_objects", "partition_bytes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} is less than 1", "leave it out for the default")
    if not 0 < options.item_timeout < float("inf"):
        raise UsageError(f"--item-timeout {options.item_timeout} is no number of seconds", "leave it out for 300")
    if options.runtime not in MODULES:
        raise UsageError(f"there is no runtime {options.runtime!r}", f"choose one of {', '.join(MODULES)}")
    if options.decode not in get_args(DecodeProfile):
        raise UsageError(f"there is no decode profile {options.decode!r}", "choose exact or fast")
    AllowList(options.allow_host)


def suffixes_of(model: Model) -> tuple[str, ...]:
    """What the names of a model's inputs end in, where nobody says it."""
    return TENSOR_SUFFIXES if model.card.preprocess is None else IMAGE_SUFFIXES
