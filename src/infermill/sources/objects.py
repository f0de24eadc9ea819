"""Folders, prefixes and globs: object refs from a listing."""

import functools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import obstore
import pyarrow as pa
import pyarrow.compute as pc

from infermill.errors import SourceError
from infermill.stores import STORE_ERRORS, Location, explain, is_unnameable, open_s3_client, open_store
from infermill.types import Source, StoreOptions

LISTING_SCHEMA = pa.schema([("key", pa.string()), ("size", pa.int64()), ("etag", pa.string())])
BATCH_ROWS = 16_384
# A path segment that starts with a dot, `.` and `..` apart: in a bucket these are names like any other.
_HIDDEN = r"\.(?:[^./]|\.[^/])"
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
        return Source(base.uri), map(keep, _list_folder(Path(base.uri)))
    listing = _list_store(base, options)
    return Source(base.container), map(keep, listing)


def single_file(location: Location) -> tuple[Source, Iterator[pa.RecordBatch]]:
    """One local file, whatever its suffix."""
    path = Path(location.uri)
    batch = _batch([path.name], str(path.parent))
    return Source(str(path.parent)), iter([batch])


def list_object_or_prefix(
    location: Location, options: StoreOptions, suffixes: Sequence[str]
) -> tuple[Source, Iterator[pa.RecordBatch]]:
    """The object of that name where there is one, else everything below that name."""
    store = open_store(location, options)
    try:
        meta = store.head(location.path)
    except FileNotFoundError:
        return list_prefix(Location(location.scheme, location.container, location.path + "/"), options, suffixes, "")
    except STORE_ERRORS as error:
        raise explain(error, location.uri) from None
    row = {"key": location.path, "size": meta["size"], "etag": meta["e_tag"]}
    batch = pa.RecordBatch.from_pylist([row], schema=LISTING_SCHEMA)
    return Source(location.container), iter([batch])


def etag_of(status: os.stat_result) -> str:
    """The etag of a local file, as object_store writes it: inode, modification time in ns and size, in hex."""
    return f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"


def _list_folder(root: Path) -> Iterator[pa.RecordBatch]:
    """Depth first, sorted within each folder; names only are held, for one folder at a time and its parents."""
    pending = [""]
    while pending:
        folder = pending.pop()
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
        files.sort()
        pending.extend(sorted(folders, reverse=True))
        for start in range(0, len(files), BATCH_ROWS):
            yield _batch(files[start : start + BATCH_ROWS], str(root))


def _batch(names: Sequence[str], root: str) -> pa.RecordBatch:
    keys, sizes, etags = [], [], []
    descriptor = os.open(root, os.O_RDONLY)
    try:
        for name in names:
            try:
                status = os.stat(name, dir_fd=descriptor)
            except OSError:
                status = None  # a broken link or a name that just vanished: its row will say so
            if status is not None and not _is_file(status.st_mode):
                continue
            keys.append(printable(name))
            sizes.append(-1 if status is None else status.st_size)
            etags.append(None if status is None else etag_of(status))
    finally:
        os.close(descriptor)
    return pa.record_batch(
        [pa.array(keys, pa.string()), pa.array(sizes, pa.int64()), pa.array(etags, pa.string())], schema=LISTING_SCHEMA
    )


def _is_file(mode: int) -> bool:
    return mode & 0o170000 == 0o100000


def printable(name: str) -> str:
    r"""A file name as a key: bytes that are not UTF-8 become `\xNN`."""
    return name if name.isascii() else name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _list_store(base: Location, options: StoreOptions) -> Iterator[pa.RecordBatch]:
    last_key = ""
    try:
        store = open_store(base, options)
        for chunk in obstore.list(store, base.path or None, chunk_size=BATCH_ROWS, return_arrow=True):
            batch = pa.record_batch(chunk)
            columns = [batch[name].cast(field.type) for name, field in zip(_OBSTORE_NAMES, LISTING_SCHEMA, strict=True)]
            last_key = columns[0][-1].as_py()
            yield pa.record_batch(columns, schema=LISTING_SCHEMA)
    except STORE_ERRORS as error:
        if not (base.scheme == "s3" and is_unnameable(error)):
            raise explain(error, base.uri) from None
        yield from _list_s3_exactly(base, last_key, options)


def _list_s3_exactly(base: Location, after: str, options: StoreOptions) -> Iterator[pa.RecordBatch]:
    """Go on behind the key `after` with boto3, which names every key that S3 can hold."""
    bucket, client = open_s3_client(base, options)
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=base.path, StartAfter=after)
    for page in pages:
        rows = [{"key": o["Key"], "size": o["Size"], "etag": o["ETag"]} for o in page.get("Contents", ())]
        yield pa.RecordBatch.from_pylist(rows, schema=LISTING_SCHEMA)


def _filtered(batch: pa.RecordBatch, prefix: str, suffixes: tuple[str, ...], glob: str | None) -> pa.RecordBatch:
    keys = batch["key"]
    start = f"(?s)^{_escaped(prefix)}"
    keep = pc.invert(pc.match_substring_regex(keys, f"{start}(?:.*/)?{_HIDDEN}"))
    lowered = pc.utf8_lower(keys)
    endings = [pc.ends_with(lowered, suffix) for suffix in suffixes]
    keep = pc.and_(keep, functools.reduce(pc.or_, endings))
    keep = pc.and_(keep, pc.invert(pc.ends_with(keys, "/")))  # the markers that consoles write for folders
    if glob is not None:
        keep = pc.and_(keep, pc.match_substring_regex(keys, f"{start}{glob}$"))
    return batch.filter(keep)


def _glob_regex(pattern: str) -> str:
    """A glob as a regular expression: `*` and `?` stay within a path segment, `**/` crosses any number of them."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    return "".join(
        _WILDCARDS.get(part)
        or ("[^" + part[2:] if part.startswith("[!") else part if part[:1] == "[" else _escaped(part))
        for part in parts
    )


def _escaped(text: str) -> str:
    return re.sub(r"[.^$*+?{}|()\[\]\\]", r"\\\g<0>", text)
