"""`infermill.spark.predict` over `binaryFile`: python benchmarks/spark_column.py PHOTOS CARD OUT."""

import sys

from infermill import Options
from infermill.limits import usable_cores
from infermill.session import spark_session
from infermill.spark import predict


def main(photos: str, card: str, out: str) -> None:
    # As for `predict_batch_udf`: a task for each core.
    conf = ("spark.task.cpus=1", "spark.sql.files.openCostInBytes=0")
    with spark_session(Options(master=f"local[{usable_cores()}]", conf=conf)) as session:
        rows = session.read.format("binaryFile").load(photos).select("path", "content")
        predict(rows, card).select("path", "prediction.top.index", "prediction.top.score").write.parquet(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
