"""What the peers share: bytes to the network's input, as the reference does it, and its output to five classes.

Every peer that prepares its images in Python takes this, so that they differ in what moves the data, and not in how
well somebody wrote NumPy. The arithmetic is one multiplication and one subtraction a pixel, in place.
"""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
FACTOR, OFFSET = 1 / (255 * STD), MEAN / STD
BATCH = 32


def arguments() -> tuple[str, str, str, int, str]:
    """PHOTOS NETWORK OUT SIDE WAY of a peer's command line: SIDE is 224 or 32, WAY one of those the peer knows."""
    photos, network, out, side, way = sys.argv[1:]
    return photos, network, out, int(side), way


def paths(photos: str) -> list[str]:
    """The photos of a folder."""
    return sorted(str(path) for path in Path(photos).iterdir())


def crop(image: Any, side: int) -> Any:
    """An RGB image: its shorter side 256 by Pillow's antialiased bilinear, of it the centre 224; one of 32 stays."""
    if side == 32:
        return image
    factor = 256 / min(image.size)
    image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BILINEAR)
    left, upper = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, upper, left + side, upper + side))


def normalise(pixels: Any) -> Any:
    """uint8 [..., height, width, 3] as float32 [..., 3, height, width], with ImageNet's mean and deviation."""
    values = pixels.astype(np.float32)
    values *= FACTOR
    values -= OFFSET
    return np.ascontiguousarray(np.moveaxis(values, -1, -3))


def prepare(content: bytes, side: int) -> Any:
    """The bytes of an image as the network's input, float32 [3, side, side]."""
    return normalise(np.asarray(crop(Image.open(io.BytesIO(content)).convert("RGB"), side)))


def top5(logits: Any) -> tuple[Any, Any]:
    """Indices (int32) and scores (float32) of the five best classes, each [N, 5], of logits [N, classes]."""
    index = np.argsort(-logits, axis=1)[:, :5].astype(np.int32)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores = exponentials / exponentials.sum(axis=1, keepdims=True)
    return index, np.take_along_axis(scores, index, axis=1).astype(np.float32)


def session(network: str, threads: int) -> Any:
    """The network in ONNX Runtime; 0 threads is ONNX Runtime's own choice, one for each core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
