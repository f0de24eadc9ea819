"""A job on Spark with so many partitions a task: python benchmarks/spark_engine.py PHOTOS CARD OUT OBJECTS PER_TASK."""

import sys

import infermill
from infermill import Options
from infermill.engines.spark import on
from infermill.limits import usable_cores
from infermill.session import spark_session


def main(photos: str, card: str, out: str, partition_objects: str, partitions_per_task: str) -> None:
    with spark_session(Options(master=f"local[{usable_cores()}]")) as session:
        options = Options(partition_objects=int(partition_objects))
        infermill.run(photos, card, out, options, engine=on(session, int(partitions_per_task)))


if __name__ == "__main__":
    main(*sys.argv[1:])
