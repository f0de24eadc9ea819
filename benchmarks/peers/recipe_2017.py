# /// script
# requires-python = ">=3.10,<3.12"
# dependencies = [
#     "mxnet==1.9.1",
#     "pyspark==4.3.0",
#     "numpy==1.23.5",
# ]
# ///
"""The recipe of 2017: an RDD of keys, `mapPartitions`, MXNet's Module that is loaded once a process; Parquet.

    recipe_2017.py PHOTOS CHECKPOINT OUT SIDE WAY

CHECKPOINT is the prefix of a symbol and its parameters. A task fetches and decodes a batch, and predicts it, by turns.
The recipe resizes with MXNet's own OpenCV, without antialiasing. One thread of MXNet a task. WAY:
    8   a batch of 8 images
    64  a batch of 64 images
"""

import os
import sys
from functools import partial
from itertools import islice
from pathlib import Path

from pyspark.sql import SparkSession


def predict_partition(keys, prefix, side, batch_size):
    import mxnet as mx
    import numpy as np

    module = mx.__dict__.get("loaded_once")
    if module is None:
        symbol, arguments, auxiliary = mx.model.load_checkpoint(prefix, 0)
        module = mx.mod.Module(symbol, label_names=None)
        module.bind(for_training=False, data_shapes=[("data", (batch_size, 3, side, side))])
        module.set_params(arguments, auxiliary)
        mx.loaded_once = module
    mean, std = mx.nd.array([0.485, 0.456, 0.406]), mx.nd.array([0.229, 0.224, 0.225])
    while batch := list(islice(keys, batch_size)):
        images = mx.nd.zeros((batch_size, 3, side, side))
        for number, key in enumerate(batch):
            image = mx.image.imdecode(Path(key).read_bytes())
            if side != 32:
                image, _ = mx.image.center_crop(mx.image.resize_short(image, 256), (side, side))
            image = mx.image.color_normalize(image.astype("float32") / 255, mean, std)
            images[number] = image.transpose((2, 0, 1))
        module.forward(mx.io.DataBatch([images]), is_train=False)
        scores = mx.nd.softmax(module.get_outputs()[0]).asnumpy()[: len(batch)]
        top = np.argsort(-scores, axis=1)[:, :5]
        for key, row, best in zip(batch, scores, top, strict=True):
            yield key, best.tolist(), row[best].tolist()


def main():
    photos, prefix, out, side, way = sys.argv[1:]
    cores = len(os.sched_getaffinity(0))
    os.environ.update(PYSPARK_PYTHON=sys.executable, OMP_NUM_THREADS="1")
    builder = SparkSession.builder.master(f"local[{cores}]").config("spark.ui.enabled", "false")
    spark = builder.config("spark.log.level", "ERROR").getOrCreate()
    predict = partial(predict_partition, prefix=prefix, side=int(side), batch_size=int(way))
    keys = sorted(str(path) for path in Path(photos).iterdir())
    predicted = spark.sparkContext.parallelize(keys, cores).mapPartitions(predict)
    spark.createDataFrame(predicted, "path string, index array<int>, score array<float>").write.parquet(out)
    spark.stop()


if __name__ == "__main__":
    main()
