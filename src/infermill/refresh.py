"""Refs -> the same refs, with the size and etag that the objects have now."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from infermill.errors import SourceError
from infermill.hosts import is_web
from infermill.patience import is_passing, patiently
from infermill.reader import open_file
from infermill.sources.shards import list_members
from infermill.stores import (
    STORE_ERRORS,
    Location,
    boto3_errors,
    error_code,
    etag_of,
    explain,
    is_nameable,
    locate,
    open_s3_client,
    open_store,
    place_of,
)
from infermill.types import IN_NO_SHARD, Source, StoreOptions

if TYPE_CHECKING:
    from obstore.store import ObjectStore

THREADS = 32
Version = tuple[int, str | None]
"A size, -1 where it is unknown, and an etag."
UNKNOWN: Version = (-1, None)


def refresher(source: Source, options: StoreOptions) -> Callable[[pa.Table], pa.Table]:
    """A function from rows with the columns key, size and etag to the same rows as their objects are now.

    Objects that are gone keep what was known of them; of those that cannot be looked at, nothing is known. Members
    of shards get the columns offset and label.
    It raises StoreError where the store does not answer.
    """
    return _member_refresher(source, options) if source.shards else _object_refresher(source, options)


def _object_refresher(source: Source, options: StoreOptions) -> Callable[[pa.Table], pa.Table]:
    root = locate(source.root)

    @lru_cache(maxsize=64)
    def store_of(scheme: str, container: str) -> "ObjectStore":
        return open_store(Location(scheme, container, ""), options)

    @lru_cache(maxsize=64)
    def client_of(scheme: str, container: str) -> tuple[str, Any]:
        return open_s3_client(Location(scheme, container, ""), options)

    def look(key: str, known: Version) -> Version:
        if source.keys_are_uris and is_web(key):
            return UNKNOWN
        place = place_of(key, source, root)
        try:
            if place.is_local:
                with open_file(place.uri, key) as file:
                    status = os.fstat(file.fileno())
                return status.st_size, etag_of(status)
            if not is_nameable(place.path):
                bucket, client = client_of(place.scheme, place.container)
                return patiently(lambda: _look_exactly(bucket, client, place.path), place.uri, options)
            store = store_of(place.scheme, place.container)
            meta = patiently(lambda: store.head(place.path), place.uri, options)
        except (FileNotFoundError, NotADirectoryError):
            return known
        except STORE_ERRORS as error:
            if is_passing(error):
                raise explain(error, place.uri) from None
            return known if error_code(error) == "404" else UNKNOWN
        return meta["size"], meta["e_tag"]

    def refreshed(rows: pa.Table) -> pa.Table:
        keys, sizes, etags = (rows[name].to_pylist() for name in ("key", "size", "etag"))
        with ThreadPoolExecutor(THREADS) as pool:
            now = list(pool.map(look, keys, zip(sizes, etags, strict=True)))
        for place, name in enumerate(("size", "etag")):
            column = rows.schema.get_field_index(name)
            rows = rows.set_column(
                column, rows.field(name), pa.array([one[place] for one in now], rows.field(name).type)
            )
        return rows

    return refreshed


def _member_refresher(source: Source, options: StoreOptions) -> Callable[[pa.Table], pa.Table]:
    @lru_cache(maxsize=2)  # the rows of a partition lie in one shard, or in neighbours
    def listed(shard: str) -> tuple[pa.Table, dict[str, int]]:
        batch = pa.record_batch({"key": [shard]})
        try:
            members = pa.Table.from_batches(list_members(source, [batch], ("",), options))
        except (SourceError, ValueError):  # it is not there any more, or holds nothing
            return pa.table({}), {}
        names = members["key"].to_pylist()
        return members, {names[row]: row for row in range(len(names) - 1, -1, -1)}

    def look(row: dict[str, Any]) -> dict[str, Any]:
        members, places = listed(row["key"].partition("#")[0])
        place = places.get(row["key"])
        if place is None:
            return row | {"offset": IN_NO_SHARD}
        now: dict[str, Any] = members.slice(place, 1).to_pylist()[0]
        return row | now

    def refreshed(rows: pa.Table) -> pa.Table:
        schema = rows.schema.insert(rows.schema.get_field_index("label"), pa.field("offset", pa.int64()))
        return pa.Table.from_pylist([look(row) for row in rows.to_pylist()], schema)

    return refreshed


def _look_exactly(bucket: str, client: Any, key: str) -> Version:
    with boto3_errors():
        meta = client.head_object(Bucket=bucket, Key=key)
    return meta["ContentLength"], meta["ETag"]
