"""A source -> batches of object refs, in the order in which they will be predicted."""

import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from infermill.errors import SourceError, StoreError, UsageError
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
    if wildcard and not _exists(location, options):
        base, pattern = _split_glob(location, wildcard.start())
        if suffix is None and "." in pattern.rpartition("/")[2]:
            suffix = ("",)
        return objects.list_prefix(base, options, _suffixes(suffix), pattern)
    if _is_folder(location):
        return objects.list_prefix(location, options, _suffixes(suffix), "")
    if location.path.lower().endswith(MANIFEST_SUFFIXES):
        return manifest.from_file(location, options)
    if location.is_local:
        return objects.single_file(location)
    below = Location(location.scheme, location.container, location.path + "/")
    return objects.single_object(location, options) or objects.list_prefix(below, options, _suffixes(suffix), "")


def canonical(uri: str) -> str:
    """The source as a fingerprint knows it: absolute, however it was written."""
    return uri if uri == "-" else locate(uri).uri.rstrip("/")


def _exists(location: Location, options: StoreOptions) -> bool:
    """Whether something is there that is called so: wildcards in its name are then no wildcards."""
    try:
        if location.is_local:
            return Path(location.uri).exists()
        return not location.path.endswith("/") and objects.single_object(location, options) is not None
    except (StoreError, OSError):
        return False  # the listing has the last word


def _is_folder(location: Location) -> bool:
    if not location.is_local:
        return not location.path or location.path.endswith("/")
    try:
        return stat.S_ISDIR(Path(location.uri).stat().st_mode)
    except OSError as error:
        raise explain(error, location.uri) from None


def _split_glob(location: Location, first_wildcard: int) -> tuple[Location, str]:
    cut = location.path.rfind("/", 0, first_wildcard) + 1
    base = Location(location.scheme, location.container, location.path[:cut])
    if base.is_local and not _exists(base, StoreOptions()):
        raise SourceError(f"{base.uri} does not exist", "check the part of the glob before the first wildcard")
    return base, location.path[cut:]


def _suffixes(suffix: tuple[str, ...] | None) -> tuple[str, ...]:
    if suffix is None:
        return IMAGE_SUFFIXES
    if not suffix:
        raise UsageError("an empty list of suffixes takes nothing", "pass '' to take every key")
    return tuple(one.lower() for one in suffix)
