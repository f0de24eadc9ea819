"""Folders, prefixes and globs: object refs from a listing."""

import functools
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import obstore
import pyarrow as pa
import pyarrow.compute as pc
from obstore.exceptions import InvalidPathError

from infermill.errors import SourceError
from infermill.patience import patiently
from infermill.stores import (
    STORE_ERRORS,
    Location,
    boto3_errors,
    etag_of,
    explain,
    is_nameable,
    open_s3_client,
    open_store,
)
from infermill.types import Source, StoreOptions

if TYPE_CHECKING:
    from obstore.store import ObjectStore

Keep = Callable[[pa.RecordBatch], pa.RecordBatch]
_COLUMNS: dict[str, pa.DataType] = {"key": pa.string(), "size": pa.int64(), "etag": pa.string()}
LISTING_SCHEMA = pa.schema(_COLUMNS)
BATCH_ROWS = 16_384
# A path segment that starts with a dot, `.` and `..` apart: in a bucket these are names like any other.
HIDDEN = r"\.(?:[^./]|\.[^/])"
_WILDCARD = re.compile(r"(\*\*/|\*\*|\*|\?|\[(?:![^/]|[^!/])[^]/]*\])")
_WILDCARDS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
_OBSTORE_NAMES = ("path", "size", "e_tag")


def list_prefix(
    base: Location, options: StoreOptions, suffixes: Sequence[str], pattern: str
) -> tuple[Source, Iterator[pa.RecordBatch]]:
    """Everything below `base` whose key has one of the suffixes and, below `base`, fits the glob `pattern`."""
    prefix = "" if base.is_local else base.path
    keep = functools.partial(
        _filtered, prefix=prefix, suffixes=tuple(suffixes), glob=_glob_regex(pattern) if pattern else None
    )
    if base.is_local:
        depth = pattern.count("/") if pattern and "**" not in pattern else None
        return Source(base.uri), map(keep, _list_folder(Path(base.uri), depth))
    return Source(base.container), _list_store(base, options, keep)


def single_file(location: Location) -> tuple[Source, Iterator[pa.RecordBatch]]:
    """One local file, whatever its suffix."""
    path = Path(location.uri)
    return Source(str(path.parent)), iter([_batch([path.name], str(path.parent))])


def single_object(location: Location, options: StoreOptions) -> tuple[Source, Iterator[pa.RecordBatch]] | None:
    """One object, whatever its suffix, or None where there is none of that name."""
    if is_nameable(location.path):
        try:
            store = open_store(location, options)
            meta = patiently(lambda: store.head(location.path), location.uri, options)
        except FileNotFoundError:
            return None
        except STORE_ERRORS as error:
            raise explain(error, location.uri) from None
        row = {"key": location.path, "size": meta["size"], "etag": meta["e_tag"]}
        batch = pa.RecordBatch.from_pylist([row], schema=LISTING_SCHEMA)
    else:
        # The object itself is the first key that begins with its name.
        batch = next(_list_s3_exactly(location, options, location.path, page_rows=1))
        if batch["key"].to_pylist() != [location.path]:
            return None
    return Source(location.container), iter([batch])


def _list_folder(root: Path, depth: int | None) -> Iterator[pa.RecordBatch]:
    """Depth first, sorted within each folder; names only are held, for a batch and the folders that are open.

    Args:
        root: where to begin; keys are relative to it.
        depth: how many folders deep to go; None is all the way.
    """
    names: list[str] = []
    pending = [""]
    while pending:
        folder = pending.pop()
        files, folders = _scan(root, folder)
        names.extend(files)
        if depth is None or folder.count("/") < depth:
            pending.extend(reversed(folders))
        while len(names) >= BATCH_ROWS or (names and not pending):
            yield _batch(names[:BATCH_ROWS], str(root))
            del names[:BATCH_ROWS]


def _scan(root: Path, folder: str) -> tuple[list[str], list[str]]:
    """The files and the folders of a folder, sorted, without those that are hidden."""
    files: list[str] = []
    folders: list[str] = []
    try:
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{folder}{entry.name}/")
                else:
                    files.append(folder + entry.name)
    except OSError as error:
        problem = explain(error, str(root / folder))
        raise SourceError(problem.message, problem.hint) from None
    return sorted(files), sorted(folders)


def _batch(names: Sequence[str], root: str) -> pa.RecordBatch:
    keys, sizes, etags = [], [], []
    for name in names:
        try:
            status = os.stat(f"{root}/{name}")  # noqa: PTH116
        except OSError:
            status = None  # a broken link or a name that just vanished: its row will say so
        if status is not None and not stat.S_ISREG(status.st_mode):
            continue
        keys.append(printable(name))
        sizes.append(-1 if status is None else status.st_size)
        etags.append(None if status is None else etag_of(status))
    return pa.record_batch(
        [pa.array(keys, pa.string()), pa.array(sizes, pa.int64()), pa.array(etags, pa.string())], schema=LISTING_SCHEMA
    )


def printable(name: str) -> str:
    r"""A file name as a key: where it is not UTF-8, the odd bytes and the backslashes become `\xNN`."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name.replace("\\", r"\x5c")).decode("utf-8", "backslashreplace")
    return name


def _list_store(base: Location, options: StoreOptions, keep: Keep) -> Iterator[pa.RecordBatch]:
    last_key = ""
    store = open_store(base, options)
    if is_nameable(base.path.removesuffix("/") or base.path) and not _has_leading_slashes(base, store, options):
        try:
            for batch in _list_patiently(store, base, options):
                # Not the last one: object_store names `a/` as `a`, and `a-1` comes between the two.
                last_key = max(last_key, pc.max(batch["key"]).as_py())
                yield _without_markers(keep(batch), store)
            return
        except InvalidPathError:
            pass
        except STORE_ERRORS as error:
            raise explain(error, base.uri) from None
    yield from map(keep, _list_s3_exactly(base, options, base.path, last_key))


def _list_patiently(store: "ObjectStore", base: Location, options: StoreOptions) -> Iterator[pa.RecordBatch]:
    """The listing; where a page breaks off, which object_store does not retry, it goes on behind the last batch."""
    listing: Iterator[Any] | None = None
    last_key: str | None = None

    def next_batch() -> pa.RecordBatch | None:
        nonlocal listing
        listing = listing or obstore.list(
            store, base.path or None, offset=last_key, chunk_size=BATCH_ROWS, return_arrow=True
        )
        try:
            chunk = next(listing, None)
        except STORE_ERRORS:
            listing = None
            raise
        return None if chunk is None else _listing_batch(pa.record_batch(chunk))

    while (batch := patiently(next_batch, base.uri, options)) is not None:
        yield batch
        last_key = max(last_key or "", pc.max(batch["key"]).as_py())


def _listing_batch(rows: pa.RecordBatch) -> pa.RecordBatch:
    columns = [rows[name].cast(field.type) for name, field in zip(_OBSTORE_NAMES, LISTING_SCHEMA, strict=True)]
    return pa.record_batch(columns, schema=LISTING_SCHEMA)


def _has_leading_slashes(base: Location, store: "ObjectStore", options: StoreOptions) -> bool:
    """Whether a bucket holds keys like `/a`, which object_store lists as `a`, and then does not find."""
    if base.scheme != "s3" or base.path:
        return False
    try:
        # Keys behind `.zzzz` are first those that begin with a slash; empty ones may be markers, see below.
        behind = patiently(lambda: next(obstore.list(store, offset=".zzzz"), ()), base.uri, options)
        first = next((one for one in behind if one["size"]), None)
        if first is not None:
            store.head(first["path"])
    except FileNotFoundError:
        return True
    except STORE_ERRORS:
        return False  # the listing has the last word
    return False


def _without_markers(batch: pa.RecordBatch, store: "ObjectStore") -> pa.RecordBatch:
    """Drop the empty objects `a/` that consoles write for folders: object_store lists them as `a`."""
    is_object = np.ones(batch.num_rows, bool)
    for row in np.flatnonzero(batch["size"].to_numpy() == 0):
        try:
            is_object[row] = store.head(batch["key"][int(row)].as_py())["size"] == 0
        except FileNotFoundError:
            is_object[row] = False
    return batch if is_object.all() else batch.filter(pa.array(is_object))


def _list_s3_exactly(
    base: Location, options: StoreOptions, prefix: str, after: str = "", page_rows: int = 1000
) -> Iterator[pa.RecordBatch]:
    """The keys that begin with `prefix`, behind the key `after`, with boto3: it names every key that S3 can hold."""
    bucket, client = open_s3_client(base, options)
    place = {"StartAfter": after}

    def next_page() -> Any:
        with boto3_errors():
            return client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=page_rows, **place)

    try:
        while place:
            page = patiently(next_page, base.uri, options)
            rows = [{"key": o["Key"], "size": o["Size"], "etag": o["ETag"]} for o in page.get("Contents", ())]
            yield pa.RecordBatch.from_pylist(rows, schema=LISTING_SCHEMA)
            place = {"ContinuationToken": page["NextContinuationToken"]} if page["IsTruncated"] else {}
    except STORE_ERRORS as error:
        raise explain(error, base.uri) from None


def _filtered(batch: pa.RecordBatch, prefix: str, suffixes: tuple[str, ...], glob: str | None) -> pa.RecordBatch:
    keys = batch["key"]
    start = f"(?s)^{_escaped(prefix)}"
    keep = pc.starts_with(keys, prefix)
    keep = pc.and_(keep, pc.invert(pc.match_substring_regex(keys, f"{start}(?:.*/)?{HIDDEN}")))
    lowered = pc.utf8_lower(keys)
    endings = [pc.ends_with(lowered, suffix) for suffix in suffixes]
    keep = pc.and_(keep, functools.reduce(pc.or_, endings))
    keep = pc.and_(keep, pc.invert(pc.ends_with(keys, "/")))  # the markers that consoles write for folders
    if glob is not None:
        keep = pc.and_(keep, pc.match_substring_regex(keys, f"{start}{glob}$"))
    return batch.filter(keep)


def _glob_regex(pattern: str) -> str:
    """A glob as a regular expression of RE2.

    `*`, `?`, `[a-z]` and `[!a-z]` stay within a path segment, `**/` is any number of folders.
    """
    literals_and_wildcards = _WILDCARD.split(pattern)
    return "".join(
        _escaped(part) if place % 2 == 0 else _WILDCARDS.get(part) or _class_regex(part[1:-1])
        for place, part in enumerate(literals_and_wildcards)
    )


def _class_regex(body: str) -> str:
    """The `a-z` or `!a-z` between brackets; a slash is never in it, and a range that runs backwards is empty."""
    ranges = [(low, high or low) for low, high in re.findall(r"(?s)(.)(?:-(.))?", body.removeprefix("!"))]
    around_slash = [pair for low, high in ranges for pair in ((low, min(high, ".")), (max(low, "0"), high))]
    inside = "".join(rf"\x{{{ord(low):x}}}-\x{{{ord(high):x}}}" for low, high in around_slash if low <= high)
    if body.startswith("!"):
        return f"[^/{inside}]"
    return f"[{inside}]" if inside else r"[^\x{0}-\x{10FFFF}]"


def _escaped(text: str) -> str:
    return re.sub(r"[.^$*+?{}|()\[\]\\]", r"\\\g<0>", text)
