"""One way of predicting a folder of photos, in a process of its own: `python spark_ways.py WAY WORK` prints seconds.

Each way predicts 64 photos first, which starts everything and loads the network; the rest is steady state.
"""

import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from PIL import Image
from pyspark.ml.functions import predict_batch_udf
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.types import ArrayType, FloatType, IntegerType, StructField, StructType

import infermill as im
from infermill import Options, engines
from infermill.engines import Engine, spark
from infermill.limits import usable_cores
from infermill.session import spark_session
from infermill.spark import predict

Predict = Callable[[Path, Path], object]
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


@contextmanager
def local(work: Path) -> Iterator[Predict]:
    """The job on this machine, its worker started before."""
    with engines.start(Options()) as engine:
        yield _job(work, engine)


@contextmanager
def engine(work: Path) -> Iterator[Predict]:
    """The job on Spark, as many partitions a task as infermill chooses."""
    with spark_session(Options(master=_master())) as session:
        yield _job(work, spark.on(session))


@contextmanager
def engine_single(work: Path) -> Iterator[Predict]:
    """The same with a task for each partition, at whose end the pipeline runs empty."""
    with spark_session(Options(master=_master())) as session:
        yield _job(work, spark.on(session, partitions_per_task=1))


def _job(work: Path, running: Engine) -> Predict:
    return lambda photos, out: im.run(photos, work / "model-224.yaml", out, engine=running)


@contextmanager
def column(work: Path) -> Iterator[Predict]:
    """`infermill.spark.predict` over `binaryFile`."""
    with _session() as session:
        yield lambda photos, out: _write(predict(_read(session, photos), work / "model-224.yaml"), out)


@contextmanager
def batch_udf(work: Path) -> Iterator[Predict]:
    """Spark's own `predict_batch_udf` over `binaryFile`, with Pillow, NumPy, and ONNX Runtime as it comes."""
    with _batch_udf(work, threads=0) as run:
        yield run


@contextmanager
def batch_udf_single(work: Path) -> Iterator[Predict]:
    """The same with one thread of ONNX Runtime for each task, of which there are as many as cores."""
    with _batch_udf(work, threads=1) as run:
        yield run


@contextmanager
def _batch_udf(work: Path, threads: int) -> Iterator[Predict]:
    network = str(work / "resnet18.onnx")

    def make_predict() -> Callable[[NDArray[Any]], dict[str, NDArray[Any]]]:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        loaded = ort.InferenceSession(network, options)

        def predict_batch(contents: NDArray[Any]) -> dict[str, NDArray[Any]]:
            images = np.stack([_preprocess(content) for content in contents])
            (logits,) = loaded.run(None, {loaded.get_inputs()[0].name: images})
            index = np.argsort(-logits, axis=1)[:, :5].astype(np.int32)
            exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
            scores = exponentials / exponentials.sum(axis=1, keepdims=True)
            return {"index": index, "score": np.take_along_axis(scores, index, axis=1).astype(np.float32)}

        return predict_batch

    top = StructType([StructField("index", ArrayType(IntegerType())), StructField("score", ArrayType(FloatType()))])
    with _session() as session:
        classify = predict_batch_udf(make_predict, return_type=top, batch_size=32)
        yield lambda photos, out: _write(_read(session, photos).withColumn("prediction", classify("content")), out)


def _preprocess(content: bytes) -> NDArray[np.float32]:
    image = Image.open(io.BytesIO(content)).convert("RGB")
    factor = 256 / min(image.size)
    image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BILINEAR)
    left, upper = (image.width - 224) // 2, (image.height - 224) // 2
    pixels = np.asarray(image.crop((left, upper, left + 224, upper + 224)), np.float32) / 255
    return np.ascontiguousarray(((pixels - MEAN) / STD).transpose(2, 0, 1), np.float32)


@contextmanager
def _session() -> Iterator[SparkSession]:
    """As many tasks at once as there are cores, which is Spark's default.

    But for the cost of opening a file, for which Spark would put no more than 31 photos into a task, here 117.
    """
    conf = ("spark.task.cpus=1", "spark.sql.files.openCostInBytes=1048576")
    with spark_session(Options(master=_master(), conf=conf)) as session:
        yield session


def _master() -> str:
    return f"local[{usable_cores()}]"


def _read(session: SparkSession, photos: Path) -> DataFrame:
    return session.read.format("binaryFile").load(str(photos)).select("path", "content")


def _write(predicted: DataFrame, out: Path) -> None:
    predicted.select("path", "prediction").write.parquet(str(out))


WAYS = {one.__name__: one for one in (local, engine, engine_single, column, batch_udf, batch_udf_single)}


def main() -> None:
    way, work = sys.argv[1], Path(sys.argv[2])
    started = time.perf_counter()
    with WAYS[way](work) as run:
        run(work / "warm", work / f"warm-{way}-{time.time_ns()}")
        ready = time.perf_counter()
        run(work / "photos", work / f"out-{way}-{time.time_ns()}")
        done = time.perf_counter()
    print(json.dumps({"start": ready - started, "steady": done - ready}))


if __name__ == "__main__":
    main()
