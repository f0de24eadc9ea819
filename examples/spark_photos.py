"""Classify the images in a folder inside Spark: as a column of a DataFrame, and as a function of SQL.

    python examples/spark_photos.py PHOTOS/ model.yaml

`pip install 'infermill[spark]'` brings Spark and Java. On a cluster, give the builder its master or remote.
"""

import os
import sys

from pyspark.sql import SparkSession

from infermill import InfermillError
from infermill.java import find_java
from infermill.spark import predict, register


def main(folder: str, model: str) -> None:
    os.environ["JAVA_HOME"] = str(find_java().home)
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    spark = SparkSession.builder.master("local[*]").config("spark.log.level", "ERROR").getOrCreate()
    photos = spark.read.format("binaryFile").load(folder)

    for row in predict(photos, model).select("path", "prediction").orderBy("path").collect():
        error, top = row.prediction.error, row.prediction.top
        print(row.path, f"{error.code}: {error.message}" if error else top[0].label, sep="\t")

    photos.createOrReplaceTempView("photos")
    register(spark, "classify", model)
    spark.sql("SELECT classify(content).top[0].label AS label, count(*) FROM photos GROUP BY label").show()
    spark.stop()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: spark_photos.py PHOTOS/ model.yaml")
    try:
        main(*sys.argv[1:])
    except InfermillError as error:
        sys.exit(f"error: {error}")
