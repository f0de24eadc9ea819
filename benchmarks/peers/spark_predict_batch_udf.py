# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "pyspark==4.3.0",
#     "numpy==2.4.6",
#     "onnxruntime==1.32.0",
#     "pandas==2.3.3",
#     "pillow==13.0.0",
#     "pyarrow==26.0.1",
# ]
# ///
"""Spark's `predict_batch_udf` over `binaryFile`, with Pillow, NumPy and ONNX Runtime; Parquet.

    spark_predict_batch_udf.py PHOTOS NETWORK OUT SIDE WAY

https://spark.apache.org/docs/latest/api/python/reference/api/pyspark.ml.functions.predict_batch_udf.html. WAY:
    threads  ONNX Runtime as it comes: a thread for each core in each of as many tasks as cores
    single   a thread of ONNX Runtime for each task
"""

import os
import sys

import numpy as np
from pyspark.ml.functions import predict_batch_udf
from pyspark.sql import SparkSession
from pyspark.sql.types import ArrayType, FloatType, IntegerType, StructField, StructType

from preprocessing import BATCH, arguments, prepare, session, top5


def main():
    photos, network, out, side, way = arguments()
    threads = 1 if way == "single" else 0

    def make_predict():
        loaded = session(network, threads)

        def predict(contents):
            pixels = np.stack([prepare(content, side) for content in contents])
            (logits,) = loaded.run(None, {loaded.get_inputs()[0].name: pixels})
            index, score = top5(logits)
            return {"index": index, "score": score}

        return predict

    os.environ["PYSPARK_PYTHON"] = sys.executable
    builder = SparkSession.builder.master(f"local[{len(os.sched_getaffinity(0))}]")
    # Spark would count every photo as 4 MB more than it is, and put 31 into a task; now each core has a task.
    builder = builder.config("spark.sql.files.openCostInBytes", 0).config("spark.ui.enabled", "false")
    spark = builder.config("spark.log.level", "ERROR").getOrCreate()
    top = StructType([StructField("index", ArrayType(IntegerType())), StructField("score", ArrayType(FloatType()))])
    classify = predict_batch_udf(make_predict, return_type=top, batch_size=BATCH)
    rows = spark.read.format("binaryFile").load(photos).withColumn("top", classify("content"))
    rows.select("path", "top.index", "top.score").write.parquet(out)
    spark.stop()


if __name__ == "__main__":
    main()
