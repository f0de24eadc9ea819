"""Public data sets -> one object an image, as photos in a bucket are.

cifar-10-python.tar.gz ─► TO/test_batch/0042.png … ─► TO/labels.parquet (key, label, name), which comes last
"""

import hashlib
import io
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from infermill.durable import private_file
from infermill.errors import BadInputError, SourceError
from infermill.hosts import target_of
from infermill.models.files import cache_folder
from infermill.output import Output
from infermill.reader import open_reader
from infermill.sources import cifar, list_source
from infermill.stores import STORE_ERRORS, explain, locate, open_store
from infermill.types import CIFAR10_URL, DatasetHome, Split, StoreOptions
from infermill.web import web_fetcher

LABELS_FILE = "labels.parquet"
THREADS = 32
_HOME = "*.toronto.edu"  # where the pages of the address above have moved to, and may again
_MAX_ARCHIVE_BYTES = 1 << 30
_MAX_WAITING = 1_024
logger = logging.getLogger("infermill")


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What lies in `to` now: `images`, of which `skipped` were there before, and `labels`, the file of their labels."""

    to: str
    images: int
    skipped: int
    labels: str

    def as_json(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        return asdict(self)


def unpack_cifar10(
    to: str,
    archive: str | Path | None = None,
    split: Split = "test",
    options: StoreOptions | None = None,
    home: DatasetHome | None = None,
) -> Unpacked:
    """Write the images of CIFAR-10 as PNG files, and their labels as a table with the columns key, label and name.

    The keys are those that a job on `to` has. What is there already, with the same size, is not written again.

    Args:
        to: a folder, or the URI of a prefix.
        archive: a path or URI of the python or the binary version; None downloads it, once, and keeps it in the cache.
        split: which images.
        options: how stores are reached.
        home: where it is downloaded from.

    Raises:
        SourceError: the archive is not there, not the one that was announced, or no archive of CIFAR-10.
        StoreError: `to` cannot be written.

    Example:
        >>> unpack_cifar10("s3://bucket/cifar10/test", "cifar-10-python.tar.gz").images  # doctest: +SKIP
        10000
    """
    options, home = options or StoreOptions(), home or DatasetHome()
    place = Output(to, options)
    path = str(archive) if archive is not None else str(_downloaded(home, options))
    if archive is not None:
        _warn_of_others(path, home.sha256, options)
    with _opened(path, options) as file:
        names = _names(path, file)
    there = _sizes(place.uri, options)
    rows: list[dict[str, Any]] = []
    skipped = 0
    with _opened(path, options) as file, ThreadPoolExecutor(THREADS, "put") as pool:
        images = _images(path, file, split)
        while batch := list(islice(images, _MAX_WAITING)):
            skipped += sum(pool.map(lambda one: _put(place, there, *one[:2]), batch))
            rows += [{"key": _key(place, name), "label": label, "name": names[label]} for name, _, label in batch]
    schema = pa.schema([("key", pa.string()), ("label", pa.int32()), ("name", pa.string())])
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(sorted(rows, key=lambda row: row["key"]), schema), sink)
    place.update(LABELS_FILE, lambda _: sink.getvalue())
    return Unpacked(place.uri, len(rows), skipped, f"{place.uri}/{LABELS_FILE}")


def _images(path: str, file: BinaryIO, split: Split) -> Iterator[tuple[str, cifar.Images, int]]:
    """The names of the objects, with their planes and labels."""
    try:
        for batch in cifar.batches(file, path, "cifar10", split):
            for row, label in enumerate(batch.labels.tolist()):
                yield f"{batch.name}/{row:04d}.png", batch.images[row], label
    except cifar.DamagedError as error:
        raise _no_archive(path, error) from None


def _names(path: str, file: BinaryIO) -> list[str]:
    if not cifar.is_archive(path):
        raise _no_archive(path, f"its name does not end in {' or '.join(cifar.ARCHIVE_SUFFIXES)}")
    try:
        names = cifar.class_names(file, "cifar10") or []
    except cifar.DamagedError as error:
        raise _no_archive(path, error) from None
    return [*names, *(str(label) for label in range(len(names), cifar.MAX_LABEL + 1))]


def _no_archive(path: str, reason: object) -> SourceError:
    return SourceError(
        f"{path} is no archive of CIFAR-10: {reason}", f"leave --archive out to download it from {CIFAR10_URL}"
    )


def _key(place: Output, name: str) -> str:
    """The key that a job gives an object: the whole one in a bucket, or the path below the folder."""
    location = locate(place.uri)
    return name if location.is_local else location.joined(name).path


def _sizes(uri: str, options: StoreOptions) -> dict[str, int]:
    """The images that are there, by their keys."""
    if locate(uri).is_local and not Path(uri).exists():
        return {}
    _, batches = list_source(f"{uri}/", (".png",), options)
    pairs = (zip(batch["key"].to_pylist(), batch["size"].to_pylist(), strict=True) for batch in batches)
    return {key: size for pair in pairs for key, size in pair}


def _put(place: Output, there: dict[str, int], name: str, planes: cifar.Images) -> bool:
    """Write an image as PNG; True where it was there."""
    sink = io.BytesIO()
    Image.fromarray(cifar.as_picture(planes)).save(sink, "PNG")
    content = sink.getvalue()
    size = there.get(_key(place, name))
    if size == len(content):
        return True
    if size is not None:
        place.remove([name])
    place.create(name, content)
    return False


@contextmanager
def _opened(path: str, options: StoreOptions) -> Iterator[io.BufferedReader]:
    """The archive, and what its store says of it while it is read, in the words of a user."""
    location = locate(path)
    try:
        with open_reader(location, open_store(location, options), options) as file:
            yield file
    except STORE_ERRORS as error:
        raise explain(error, path) from None


def _warn_of_others(path: str, sha256: str, options: StoreOptions) -> None:
    with _opened(path, options) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        logger.warning("%s is not the archive of the data set's home: its sha256 is %s", path, digest)


def _downloaded(home: DatasetHome, options: StoreOptions) -> Path:
    """The archive in the cache, downloaded where it is not there."""
    target = target_of(home.url)
    path = cache_folder() / "datasets" / f"{home.sha256[:16]}-{target.path.rpartition('/')[2]}"
    try:
        if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == home.sha256:
            return path
        logger.info("downloading %s", target.shown)
        allowed = replace(options, allow_host=(target.label, _HOME))
        content = web_fetcher(allowed, _MAX_ARCHIVE_BYTES)(home.url, None, lambda _: None)
        digest = hashlib.sha256(content).hexdigest()
        if digest != home.sha256:
            raise SourceError(
                f"{target.shown} is not the archive that it was: its sha256 is {digest}, and not {home.sha256}",
                "download it yourself, and pass it with --archive, if it can be trusted",
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with private_file(path, bytes(content)) as private:
            private.replace(path)
    except BadInputError as error:
        raise SourceError(
            f"{target.shown} cannot be downloaded: {error}", "download it yourself, and pass it with --archive"
        ) from None
    except OSError as error:
        raise explain(error, str(path)) from None
    return path
