"""Predict on images that are paths, bytes, Pillow images or arrays, without a job and without files.

python examples/predict_in_memory.py model.yaml photo.jpg
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import infermill


def main(card: str, photo: str) -> None:
    predict = infermill.load_model(card)
    image = Image.open(photo).convert("RGB")
    kinds = ("path", "bytes", "Pillow image", "uint8 array [height, width, 3]", "cut-off bytes")
    content = Path(photo).read_bytes()
    predictions = predict([Path(photo), content, image, np.asarray(image), content[:1000]])
    for kind, prediction in zip(kinds, predictions, strict=True):
        if prediction.top:
            best = prediction.top[0]
            print(f"{kind}: {best.label} {best.score:.3f}")
        elif prediction.error:
            print(f"{kind}: {prediction.error.code}: {prediction.error.message}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: predict_in_memory.py model.yaml photo.jpg")
    try:
        main(*sys.argv[1:])
    except (infermill.InfermillError, OSError) as error:
        sys.exit(f"error: {error}")
