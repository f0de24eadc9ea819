"""One worker, in this process."""

from collections.abc import Iterator, Sequence

from infermill.meter import Meter
from infermill.types import PartitionReport
from infermill.worker import Job, run_partitions


def run(job: Job, ids: Sequence[int], meter: Meter) -> Iterator[PartitionReport]:
    """Run the partitions in one pipeline of threads."""
    return run_partitions(job, ids, meter)
