"""A source -> batches of object refs, in the order in which they will be predicted."""

import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from infermill.errors import SourceError, StoreError, UsageError
from infermill.sources import manifest, objects
from infermill.sources.shards import ENDINGS, Shards, list_members, shards_of
from infermill.stores import Location, endpoint_of, explain, locate, without_secrets
from infermill.types import Source, StoreOptions

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TENSOR_SUFFIXES = (".npy",)
MANIFEST_SUFFIXES = (".txt", ".parquet")
# With the byte that page headers and footers begin with: the name of a file may begin with PAR1, too.
_PARQUET = b"PAR1\x15"
_GLOB = re.compile(r"[*?\[]")


def list_source(
    uri: str, suffix: tuple[str, ...] | None, options: StoreOptions, default: tuple[str, ...] = IMAGE_SUFFIXES
) -> tuple[Source, Iterator[pa.RecordBatch]]:
    """Say what `uri` is, and list it as a stream of Arrow batches with the columns key, size and etag.

    Those of shards have the columns offset and label as well.

    Args:
        uri: a folder, file, glob, `file://`, `s3://`, `gs://` or `az://` prefix, glob or object, a manifest
            (`.txt`, one URI a line, or `.parquet`), or shards (see `sources.shards`). See `rereadable` for
            standard input.
        suffix: take only keys that end so, whatever their case; None is `default`, ("",) is everything.
            Single objects, manifests and globs that name an extension are taken as they are when it is None. Of
            tar shards, these are the suffixes of the files in them; records and CIFAR have none.
        options: how stores are reached.
        default: the suffixes to take where none are named.

    Raises:
        SourceError: the source does not exist.
        StoreError: access is denied, or the store does not answer.

    Example:
        >>> import tempfile
        >>> source, batches = list_source(tempfile.mkdtemp(), None, StoreOptions())
        >>> sum(batch.num_rows for batch in batches)
        0
    """
    shards = shards_of(uri)
    if shards is None:
        return _list_objects(uri, suffix, options, default)
    if suffix is not None and shards.format != "tar":
        raise UsageError(f"--suffix takes nothing of {uri}: its members have no file names", "leave --suffix out")
    return _list_shards(shards, _suffixes(default if suffix is None else suffix), options)


def _list_shards(
    shards: Shards, suffixes: tuple[str, ...], options: StoreOptions
) -> tuple[Source, Iterator[pa.RecordBatch]]:
    endings = tuple(ending for ending, name in ENDINGS.items() if name == shards.format)
    source, found = _list_objects(shards.uri, None, options, endings or ("",))
    source = replace(source, shards=shards.format)
    return source, list_members(source, shards.among(found), suffixes, options, shards.split)


def _list_objects(
    uri: str, suffix: tuple[str, ...] | None, options: StoreOptions, default: tuple[str, ...]
) -> tuple[Source, Iterator[pa.RecordBatch]]:
    location = locate(uri)
    suffixes = _suffixes(default if suffix is None else suffix)
    if _is_glob(location, options):
        base, pattern = _split_glob(location)
        if suffix is None and "." in pattern.rpartition("/")[2]:
            suffixes = ("",)
        return objects.list_prefix(base, options, suffixes, pattern)
    if _is_folder(location):
        return objects.list_prefix(location, options, suffixes, "")
    if location.path.lower().endswith(MANIFEST_SUFFIXES):
        return manifest.from_file(location, options)
    if location.is_local:
        return objects.single_file(location)
    below = Location(location.scheme, location.container, location.path + "/")
    return objects.single_object(location, options) or objects.list_prefix(below, options, suffixes, "")


def canonical(uri: str, options: StoreOptions) -> str:
    """The source as a fingerprint knows it: absolute, however it was written; a manifest is its content.

    Raises:
        SourceError, StoreError: a manifest cannot be read.
    """
    shards = shards_of(uri)
    if shards is not None:
        split = "" if shards.split == "all" else f"?split={shards.split}"
        return f"{shards.format}:{_canonical(shards.uri, options)}{split}"
    return _canonical(uri, options)


def _canonical(uri: str, options: StoreOptions) -> str:
    location = locate(uri)
    is_manifest = location.path.lower().endswith(MANIFEST_SUFFIXES) and not _is_glob(location, options)
    if is_manifest and not _is_folder(location):
        return f"manifest sha256:{manifest.digest(location, options)} in {Path.cwd()}"
    if location.is_local:
        return location.uri.rstrip("/") or "/"
    endpoint = endpoint_of(options) if location.scheme == "s3" else None
    return f"{location.uri} at {without_secrets(endpoint)}" if endpoint else location.uri


@contextmanager
def rereadable(uri: str) -> Iterator[str]:
    """The source; for `-`, a copy of standard input that can be read more than once, while the context lasts.

    Raises:
        UsageError: standard input is closed.
    """
    if uri != "-":
        yield uri
        return
    if sys.stdin is None:  # as Python has it where the process was started without one
        raise UsageError("`-` is a manifest on standard input, which is closed", "pipe one in, or name a file")
    start = sys.stdin.buffer.read(len(_PARQUET))
    suffix = ".parquet" if start == _PARQUET else ".txt"
    with tempfile.NamedTemporaryFile(prefix="standard-input-", suffix=suffix) as copy:
        copy.write(start)
        shutil.copyfileobj(sys.stdin.buffer, copy)
        copy.flush()
        yield copy.name


def _is_glob(location: Location, options: StoreOptions) -> bool:
    return _GLOB.search(location.path) is not None and not _exists(location, options)


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


def _split_glob(location: Location) -> tuple[Location, str]:
    before_wildcard = _GLOB.split(location.path, 1)[0]
    cut = before_wildcard.rfind("/") + 1
    base = Location(location.scheme, location.container, location.path[:cut])
    if base.is_local and not _exists(base, StoreOptions()):
        raise SourceError(f"{base.uri} does not exist", "check the part of the glob before the first wildcard")
    return base, location.path[cut:]


def _suffixes(suffix: tuple[str, ...]) -> tuple[str, ...]:
    if not suffix:
        raise UsageError("an empty list of suffixes takes nothing", "pass '' to take every key")
    return tuple(one.lower() for one in suffix)
