"""Makers of shards: RecordIO as `im2rec` writes it, tars like those of WebDataset, CIFAR as its home has it."""

import io
import pickle
import struct
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.networks import tiny_classifier

MAGIC = struct.pack("<I", 0xCED7230A)
CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def png(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """A picture that differs from those of other seeds."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def png_of(planes: NDArray[np.uint8]) -> bytes:
    """The picture that a row of CIFAR holds."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(planes.reshape(3, 32, 32).transpose(1, 2, 0))).save(file, "PNG")
    return file.getvalue()


def packed(content: bytes, labels: Sequence[float], id_: int = 0) -> bytes:
    """The data of a record: one label in its header, or many behind it."""
    if len(labels) == 1:
        return struct.pack("<IfQQ", 0, labels[0], id_, 0) + content
    return struct.pack("<IfQQ", len(labels), 0, id_, 0) + np.array(labels, "<f4").tobytes() + content


def framed(data: bytes) -> bytes:
    """A record: split into frames at each magic number that is aligned in the data."""
    at = [place for place in range(0, len(data) - 3, 4) if data[place : place + 4] == MAGIC]
    begins, ends = [0, *(place + 4 for place in at)], [*at, len(data)]
    pieces = [data[begin:end] for begin, end in zip(begins, ends, strict=True)]
    flags = [0] if len(pieces) == 1 else [1, *([2] * (len(pieces) - 2)), 3]
    frames = [
        MAGIC + struct.pack("<I", flag << 29 | len(piece)) + piece + bytes(-len(piece) % 4)
        for flag, piece in zip(flags, pieces, strict=True)
    ]
    return b"".join(frames)


def write_records(path: Path, datas: Sequence[bytes], keys: Sequence[int] | None = None) -> Path:
    """A `.rec` file, and with keys, its `.idx`."""
    frames = [framed(data) for data in datas]
    path.write_bytes(b"".join(frames))
    if keys is not None:
        offsets = np.cumsum([0, *(len(frame) for frame in frames)])
        lines = [f"{key}\t{offset}\n" for key, offset in zip(keys, offsets, strict=False)]
        path.with_suffix(".idx").write_text("".join(lines))
    return path


def tar_of(files: Mapping[str, bytes]) -> bytes:
    """A tar of files, in their order."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return sink.getvalue()


def cifar_images(count: int, seed: int = 0) -> tuple[NDArray[np.uint8], list[int]]:
    """Rows of 3,072 bytes, and their labels."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, 3_072)).astype(np.uint8)
    return images, [int(label) for label in random.integers(0, 10, count)]


def cifar10_batch(images: NDArray[np.uint8], labels: Sequence[int]) -> bytes:
    """A batch of the python version."""
    names = [f"image_{row:06d}.png".encode() for row in range(len(labels))]
    return pickle.dumps({b"data": images, b"labels": list(labels), b"filenames": names}, protocol=2)


def cifar10_binary(images: NDArray[np.uint8], labels: Sequence[int]) -> bytes:
    """A batch of the binary version."""
    return b"".join(bytes([label]) + image.tobytes() for label, image in zip(labels, images, strict=True))


def write_cifar10(path: Path, per_batch: int) -> Path:
    """The archive of the python version, with so many images in each of its six batches."""
    folder = "cifar-10-batches-py"
    files = {f"{folder}/batches.meta": pickle.dumps({b"label_names": [name.encode() for name in CIFAR10_NAMES]}, 2)}
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        files[f"{folder}/{name}"] = cifar10_batch(*cifar_images(per_batch, number))
    return write_compressed(path, files)


def write_cifar10_binary(path: Path, per_batch: int) -> Path:
    """The archive of the binary version, with the images of `write_cifar10`."""
    folder = "cifar-10-batches-bin"
    files = {f"{folder}/batches.meta.txt": "".join(f"{name}\n" for name in CIFAR10_NAMES).encode()}
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        files[f"{folder}/{name}.bin"] = cifar10_binary(*cifar_images(per_batch, number))
    return write_compressed(path, files)


def write_compressed(path: Path, files: Mapping[str, bytes]) -> Path:
    """A `.tar.gz` of these files."""
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def tiny_card(folder: Path, top_k: int) -> Path:
    """The card of a tiny classifier of 32x32 pixels, in a new folder."""
    folder.mkdir()
    tiny_classifier(folder / "tiny.onnx", size=32)
    path = folder / "model.yaml"
    path.write_text(
        "name: tiny\nfiles: {onnx: tiny.onnx}\n"
        f"preprocess: {{resize: {{exact: [32, 32]}}, scale: 0.00392156862745098}}\noutput: {{top_k: {top_k}}}\n"
    )
    return path
