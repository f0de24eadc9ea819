# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "ray[data]==2.60.0",
#     "numpy==2.4.6",
#     "onnxruntime==1.32.0",
#     "pandas==2.3.3",
#     "pillow==13.0.0",
#     "pyarrow==26.0.1",
# ]
# ///
"""Ray Data: `read_images`, a function that prepares, an actor that predicts, Parquet.

    ray_data.py PHOTOS NETWORK OUT SIDE WAY

https://docs.ray.io/en/latest/data/working-with-images.html and …/batch_inference.html. WAY:
    actor   the guide's: `read_images`, a function that prepares, an actor with the network, ONNX Runtime as it comes
    actors  the whole of it in as many actors as cores, each with a thread of ONNX Runtime
"""

import os

import numpy as np
import ray
from PIL import Image

from preprocessing import BATCH, arguments, crop, normalise, prepare, session, top5


def prepare_row(row, side):
    return {"path": row["path"], "pixels": normalise(np.asarray(crop(Image.fromarray(row["image"]), side)))}


class Classifier:
    def __init__(self, network, side, threads):
        self.session, self.side = session(network, threads), side
        self.name = self.session.get_inputs()[0].name

    def __call__(self, batch):
        if "bytes" in batch:
            pixels = np.stack([prepare(content, self.side) for content in batch["bytes"]])
        else:
            pixels = batch["pixels"]
        (logits,) = self.session.run(None, {self.name: pixels})
        index, score = top5(logits)
        return {"path": batch["path"], "index": index, "score": score}


def main():
    photos, network, out, side, way = arguments()
    cores = len(os.sched_getaffinity(0))
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    if way == "actor":
        images = ray.data.read_images(photos, mode="RGB", include_paths=True)
        rows = images.map(prepare_row, fn_kwargs={"side": side})
        actors, threads = 1, 0
    else:
        rows = ray.data.read_binary_files(photos, include_paths=True)
        actors, threads = cores, 1
    predicted = rows.map_batches(
        Classifier,
        fn_constructor_args=(network, side, threads),
        batch_size=BATCH,
        num_cpus=1 if way == "actor" else 0.5,
        compute=ray.data.ActorPoolStrategy(size=actors),
    )
    predicted.write_parquet(out)


if __name__ == "__main__":
    main()
