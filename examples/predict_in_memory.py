"""Predict on images that are paths, bytes, Pillow images or arrays, without a job and without files.

python examples/predict_in_memory.py model.yaml photo.jpg
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import infermill


def main(card: str, photo: str) -> None:
    model = infermill.load_model(card)
    image = Image.open(photo).convert("RGB")
    inputs = {
        "path": Path(photo),
        "bytes": Path(photo).read_bytes(),
        "Pillow image": image,
        "uint8 array [height, width, 3]": np.asarray(image),
        "broken bytes": Path(photo).read_bytes()[:100],
    }
    for kind, prediction in zip(inputs, model.predict(list(inputs.values())), strict=True):
        if prediction.error is None:
            best = prediction.top[0]
            print(f"{kind}: {best.label} {best.score:.3f}")
        else:
            print(f"{kind}: {prediction.error.code}: {prediction.error.message}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: predict_in_memory.py model.yaml photo.jpg")
    main(*sys.argv[1:])
