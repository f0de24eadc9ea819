# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "daft==0.7.26",
#     "numpy==2.4.6",
#     "onnxruntime==1.32.0",
#     "pillow==13.0.0",
#     "pyarrow==25.0.1",
# ]
# ///
"""Daft: `download`, images, and a class (`@daft.cls`) with a batch method that predicts; Parquet.

    daft_cls.py PHOTOS NETWORK OUT SIDE WAY

https://docs.daft.ai/en/stable/modalities/images/ and …/custom-code/cls/. WAY:
    native     the guide's: Daft decodes and resizes (to the size that the photos have by their shorter side) and crops;
               one instance, ONNX Runtime as it comes
    processes  the same with a process for each core, each with a thread of ONNX Runtime
    pillow     as `processes`, but the class gets the bytes, and prepares them by Pillow, as the reference does
"""

import os

import daft
import numpy as np
from daft import DataType, Series, col
from daft.functions import decode_image

from preprocessing import BATCH, arguments, normalise, prepare, session, top5

TOP = DataType.struct({"index": DataType.list(DataType.int32()), "score": DataType.list(DataType.float32())})


class Classifier:
    def __init__(self, network: str, side: int, threads: int):
        self.session, self.side = session(network, threads), side
        self.name = self.session.get_inputs()[0].name

    def _top(self, pixels):
        (logits,) = self.session.run(None, {self.name: pixels})
        return [
            {"index": index, "score": score}
            for index, score in zip(*(one.tolist() for one in top5(logits)), strict=True)
        ]

    @daft.method.batch(return_dtype=TOP, batch_size=BATCH)
    def of_images(self, images: Series) -> list:
        return self._top(normalise(np.stack(images.to_pylist())))

    @daft.method.batch(return_dtype=TOP, batch_size=BATCH)
    def of_bytes(self, contents: Series) -> list:
        return self._top(np.stack([prepare(content, self.side) for content in contents.to_pylist()]))


def main():
    photos, network, out, side, way = arguments()
    many = {"max_concurrency": len(os.sched_getaffinity(0)), "use_process": True}
    classifier = daft.cls(**({"max_concurrency": 1} if way == "native" else many))(Classifier)
    classifier = classifier(network, side, 0 if way == "native" else 1)
    rows = daft.from_glob_path(f"{photos}/*").with_column("content", col("path").download())
    if way == "pillow":
        rows = rows.with_column("top", classifier.of_bytes(col("content")))
    else:
        rows = rows.with_column("image", decode_image(col("content"), mode="RGB"))
        if side != 32:
            rows = rows.with_column("image", col("image").resize(341, 256))
            rows = rows.with_column("image", col("image").crop([(341 - side) // 2, (256 - side) // 2, side, side]))
        rows = rows.with_column("top", classifier.of_images(col("image")))
    rows.select("path", col("top")["index"].alias("index"), col("top")["score"].alias("score")).write_parquet(out)
    # Everything is written. Daft 0.7 sometimes crashes while Python shuts down, which would look like a failure.
    os._exit(0)


if __name__ == "__main__":
    main()
