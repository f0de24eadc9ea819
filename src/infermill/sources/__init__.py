"""A source -> batches of object refs, in the order in which they will be predicted."""

import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from infermill.errors import SourceError, UsageError
from infermill.sources import manifest, objects
from infermill.stores import Location, explain, locate
from infermill.types import Source, StoreOptions

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MANIFEST_SUFFIXES = (".txt", ".parquet")
_GLOB = re.compile(r"[*?\[]")


def list_source(
    uri: str, suffix: tuple[str, ...] | None, options: StoreOptions
) -> tuple[Source, Iterator[pa.RecordBatch]]:
    """Say what `uri` is, and list it as a stream of Arrow batches with the columns key, size and etag.

    Args:
        uri: a folder, file, glob, `file://`, `s3://`, `gs://` or `az://` prefix, glob or object, a manifest
            (`.txt`, one URI a line, or `.parquet`), or `-` for a text manifest on standard input.
        suffix: take only keys that end so, whatever their case; None is every image format, ("",) is everything.
            Single objects, manifests and globs that name an extension are taken as they are when it is None.

    Raises:
        SourceError: the source does not exist.
        StoreError: access is denied, or the store does not answer.

    Example:
        >>> import tempfile
        >>> source, batches = list_source(tempfile.mkdtemp(), None, StoreOptions())
        >>> sum(batch.num_rows for batch in batches)
        0
    """
    if uri == "-":
        return manifest.from_stdin()
    location = locate(uri)
    wildcard = _GLOB.search(location.path)
    if wildcard and not (location.is_local and Path(location.uri).exists()):
        base, pattern = _split_glob(location, wildcard.start())
        if suffix is None and "." in pattern.rpartition("/")[2]:
            suffix = ("",)
        return objects.list_prefix(base, options, _suffixes(suffix), pattern)
    if location.is_local:
        path = Path(location.uri)
        try:
            is_folder = path.stat() and path.is_dir()
        except OSError as error:
            raise explain(error, str(uri)) from None
    else:
        is_folder = location.path in {"", location.path.rstrip("/") + "/"}
    if is_folder:
        return objects.list_prefix(location, options, _suffixes(suffix), "")
    if location.path.lower().endswith(MANIFEST_SUFFIXES):
        return manifest.from_file(location, options)
    if location.is_local:
        return objects.single_file(location)
    return objects.list_object_or_prefix(location, options, _suffixes(suffix))


def canonical(uri: str) -> str:
    """The source as a fingerprint knows it: absolute, however it was written."""
    return uri if uri == "-" else locate(uri).uri.rstrip("/")


def _split_glob(location: Location, first_wildcard: int) -> tuple[Location, str]:
    cut = location.path.rfind("/", 0, first_wildcard) + 1
    base = Location(location.scheme, location.container, location.path[:cut])
    if base.is_local and not Path(base.uri).is_dir():
        raise SourceError(f"{base.uri} does not exist", "check the part of the glob before the first wildcard")
    return base, location.path[cut:]


def _suffixes(suffix: tuple[str, ...] | None) -> tuple[str, ...]:
    if suffix is None:
        return IMAGE_SUFFIXES
    if not suffix:
        raise UsageError("an empty list of suffixes takes nothing", "pass '' to take every key")
    return tuple(one.lower() for one in suffix)
