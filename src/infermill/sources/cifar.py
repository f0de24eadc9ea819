"""CIFAR-10 and CIFAR-100 as their home has them: https://www.cs.toronto.edu/~kriz/cifar.html

Images are 3,072 bytes: the red, the green and the blue plane, each 32 x 32. The "binary version" has them one after the
other in `.bin` files, each behind its label (CIFAR-100: the coarse and then the fine one). The "python version" has
dicts, pickled: `data` is uint8 [n, 3072], and `labels` (CIFAR-100: `fine_labels`) a list. Both come as `.tar.gz`.
"""

import gzip
import pickle
import struct
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from infermill.sources.pickles import numbers, text_of, unpickled
from infermill.types import ShardFormat, Split

Name = Literal["cifar10", "cifar100"]
Images = NDArray[np.uint8]
IMAGE_BYTES = 3_072
ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar")
_SIDE = 32
MAX_LABEL = 255  # what the binary version has room for
# The archives of both hold less than 190 MB, and half as much again where Python 3 has pickled them for Python 2.
_MAX_UNPACKED_BYTES = 512 << 20
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    gzip.BadGzipFile,
    pickle.UnpicklingError,
    struct.error,
    tarfile.TarError,
    zlib.error,
)


class DamagedError(ValueError):
    """It is not what the home of CIFAR has, or damaged."""


class Batch(NamedTuple):
    """One file of the data set: images [n, 3072] and their labels, row by row."""

    name: str
    images: Images
    labels: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class _Layout:
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: bytes
    label_bytes: int

    def batches(self, split: Split) -> tuple[str, ...]:
        return {"train": self.train, "test": self.test, "all": self.train + self.test}[split]


_LAYOUTS: dict[Name, _Layout] = {
    "cifar10": _Layout(tuple(f"data_batch_{number}" for number in range(1, 6)), ("test_batch",), b"labels", 1),
    "cifar100": _Layout(("train",), ("test",), b"fine_labels", 2),
}


def name_of(shards: ShardFormat | None) -> Name | None:
    """The data set, where a source's shards are one."""
    match shards:
        case "cifar10" | "cifar100":
            return shards
        case _:
            return None


def is_archive(path: str) -> bool:
    """Whether a file is called like an archive of all batches."""
    return path.lower().endswith(ARCHIVE_SUFFIXES)


def is_batch(path: str, name: Name, split: Split) -> bool:
    """Whether a file is called like a batch of the split."""
    return _batch_name(path) in _LAYOUTS[name].batches(split)


def split_of(batch: str, name: Name) -> Split:
    """The split that a batch belongs to."""
    return "test" if batch in _LAYOUTS[name].test else "train"


def record_bytes(name: Name) -> int:
    """The length of a label and its image in the binary version."""
    return _LAYOUTS[name].label_bytes + IMAGE_BYTES


def batches(file: BinaryIO, path: str, name: Name, split: Split = "all") -> Iterator[Batch]:
    """The batches in an archive, in its order, or the one that a file is.

    Args:
        file: an archive (`.tar.gz`, `.tar`), a pickle or a `.bin` file.
        path: what it is called.
        name: which data set.
        split: which batches of an archive.

    Raises:
        DamagedError: it is none of these, or holds no batch of the split.
    """
    try:
        if not is_archive(path):
            yield _batch(path, file.read(_MAX_UNPACKED_BYTES), name)
            return
        wanted = _LAYOUTS[name].batches(split)
        missing = set(wanted)
        with tarfile.open(fileobj=_Unpacked(file), mode="r|") as archive:  # type: ignore[call-overload]
            for member in archive:
                if member.isreg() and is_batch(member.name, name, split):
                    content = archive.extractfile(member)
                    yield _batch(member.name, content.read() if content else b"", name)
                    missing.discard(_batch_name(member.name))
                    if not missing:
                        return
    except DamagedError:
        raise
    except _DAMAGE as error:
        raise DamagedError(f"it is damaged, or no file of {name}: {error}") from None
    if len(missing) == len(wanted):
        raise DamagedError(f"it holds none of the batches {', '.join(wanted)}")


def as_picture(planes: Images) -> Images:
    """An image as the decoders have them: RGB [height, width, 3].

    Example:
        >>> as_picture(np.arange(3072).astype(np.uint8))[0, :2].tolist()
        [[0, 0, 0], [1, 1, 1]]
    """
    return np.ascontiguousarray(planes.reshape(3, _SIDE, _SIDE).transpose(1, 2, 0))


def class_names(file: BinaryIO, name: Name) -> list[str] | None:
    """The names of the classes that an archive gives; None where it gives none.

    Raises:
        DamagedError: it is no archive, or damaged.
    """
    try:
        with tarfile.open(fileobj=_Unpacked(file), mode="r|") as archive:  # type: ignore[call-overload]
            for member in archive:
                base = PurePosixPath(member.name).name
                content = archive.extractfile(member) if member.isreg() else None
                if content and base in {"batches.meta.txt", "fine_label_names.txt"}:
                    names: list[str] = content.read().decode().split()
                    return names
                if content and base in {"batches.meta", "meta"}:
                    meta = unpickled(content.read())
                    key = b"label_names" if name == "cifar10" else b"fine_label_names"
                    return [text_of(label) for label in meta[key]]
    except _DAMAGE as error:
        raise DamagedError(f"it is damaged, or no archive of {name}: {error}") from None
    return None


class _Unpacked:
    """A stream of an archive's bytes, which ends with an error where there are more than belong there."""

    def __init__(self, file: BinaryIO) -> None:
        magic = file.read(2)
        file.seek(0)
        self._stream: Any = gzip.GzipFile(fileobj=file) if magic == b"\x1f\x8b" else file
        self._left_bytes = _MAX_UNPACKED_BYTES

    def read(self, count: int) -> bytes:
        content: bytes = self._stream.read(count)
        self._left_bytes -= len(content)
        if self._left_bytes < 0:
            raise DamagedError(f"it unpacks to more than {_MAX_UNPACKED_BYTES >> 20} MiB")
        return content


def _batch_name(path: str) -> str:
    return PurePosixPath(path).name.removesuffix(".bin")


def _batch(path: str, content: bytes, name: Name) -> Batch:
    layout = _LAYOUTS[name]
    if path.endswith(".bin"):
        length = record_bytes(name)
        if len(content) % length:
            raise DamagedError(f"{path} is cut short: its length is no multiple of {length}")
        rows = np.frombuffer(content, np.uint8).reshape(-1, length)
        labels = rows[:, layout.label_bytes - 1].astype(np.int32)
        return Batch(_batch_name(path), rows[:, layout.label_bytes :], labels)
    found = unpickled(content)
    images, labels = numbers(found[b"data"]), numbers(found[layout.labels])
    if images.dtype != np.uint8 or images.shape != (len(labels), IMAGE_BYTES) or labels.dtype.kind not in "iu":
        raise DamagedError(f"{path} does not hold images of {IMAGE_BYTES} bytes, and a label for each")
    if labels.size and not 0 <= labels.min() <= labels.max() <= MAX_LABEL:
        raise DamagedError(f"{path} has a label that is not in 0..{MAX_LABEL}")
    return Batch(_batch_name(path), images, labels.astype(np.int32))
