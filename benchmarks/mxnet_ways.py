"""One way of predicting a folder of photos by an MXNet checkpoint, in a process of its own.

    python mxnet_ways.py WAY WORK MXNET_PYTHON PHOTOS

prints seconds. Each way predicts the first 64 photos first, which starts everything and loads the network; the rest is
steady state.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import infermill as im
from infermill import CardOptions, Options, engines
from infermill.limits import usable_cores
from infermill.session import spark_session

Predict = Callable[[Path, Path], object]
IMAGENET = CardOptions(
    task="classification",
    shorter=256,
    crop=(224, 224),
    scale=1 / 255,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    activation="softmax",
)


@contextmanager
def recipe(work: Path, mxnet_python: str, batch_size: int) -> Iterator[Predict]:
    """The recipe of 2017: an RDD of keys, `mapPartitions`, a Module that is loaded once a process, `collect`."""
    os.environ |= {"PYSPARK_PYTHON": mxnet_python, "OMP_NUM_THREADS": "1"}
    with spark_session(Options(master=f"local[{usable_cores()}]", conf=("spark.task.cpus=1",))) as session:
        predict = partial(_predict_partition, prefix=str(work / "resnet18"), batch_size=batch_size)

        def run(photos: Path, out: Path) -> None:
            keys = sorted(str(path) for path in photos.iterdir())
            found = session.sparkContext.parallelize(keys, usable_cores()).mapPartitions(predict).collect()
            assert len(found) == len(keys)
            out.write_text(json.dumps(found))

        yield run


def _predict_partition(keys: Iterator[str], prefix: str, batch_size: int) -> Iterator[tuple[str, list[list[float]]]]:
    """What an executor does: fetch and decode a batch, and predict it, by turns."""
    import mxnet as mx  # type: ignore[import-not-found]
    import numpy as np

    module = mx.__dict__.get("loaded_once")
    if module is None:
        symbol, arguments, auxiliary = mx.model.load_checkpoint(prefix, 0)
        module = mx.mod.Module(symbol, label_names=None)
        module.bind(for_training=False, data_shapes=[("data", (batch_size, 3, 224, 224))])
        module.set_params(arguments, auxiliary)
        mx.loaded_once = module
    mean, std = mx.nd.array([0.485, 0.456, 0.406]), mx.nd.array([0.229, 0.224, 0.225])
    while batch := list(islice(keys, batch_size)):
        images = mx.nd.zeros((batch_size, 3, 224, 224))
        for index, key in enumerate(batch):
            image = mx.image.imdecode(Path(key).read_bytes())
            image, _ = mx.image.center_crop(mx.image.resize_short(image, 256), (224, 224))
            images[index] = mx.image.color_normalize(image.astype("float32") / 255, mean, std).transpose((2, 0, 1))
        module.forward(mx.io.DataBatch([images]), is_train=False)
        scores = mx.nd.softmax(module.get_outputs()[0]).asnumpy()[: len(batch)]
        top = np.argsort(-scores, axis=1)[:, :5]
        for key, row, best in zip(batch, scores, top, strict=True):
            yield key, [[int(index), float(row[index])] for index in best]


@contextmanager
def job(work: Path, mxnet_python: str, **options: Any) -> Iterator[Predict]:
    """`infermill run` on this machine, its worker started before."""
    chosen = Options(**options)
    with engines.start(chosen) as engine:
        checkpoint = work / "resnet18-symbol.json"
        yield lambda photos, out: im.run(photos, checkpoint, out, chosen, IMAGENET, engine=engine)


WAYS: dict[str, Callable[[Path, str], Any]] = {
    "recipe_8": partial(recipe, batch_size=8),
    "recipe_64": partial(recipe, batch_size=64),
    "mxnet": lambda work, python: job(work, python, runtime="mxnet", runtime_python=python),
    "translated": job,
}


def main() -> None:
    way, work, mxnet_python, photos = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    started = time.perf_counter()
    with WAYS[way](work, mxnet_python) as run:
        run(work / "warm", work / f"warm-{way}-{time.time_ns()}")
        ready = time.perf_counter()
        run(work / photos, work / f"out-{way}-{time.time_ns()}")
        done = time.perf_counter()
    print(json.dumps({"start": ready - started, "steady": done - ready}))


if __name__ == "__main__":
    main()
