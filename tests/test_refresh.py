"""Rows as their objects are now, wherever these lie."""

import os
from pathlib import Path

import pyarrow as pa
import pytest

from infermill.errors import StoreError
from infermill.plan import REVISION_SCHEMA
from infermill.refresh import refresher
from infermill.stores import etag_of
from infermill.types import Source, StoreOptions
from tests.servers import Answer, Bucket, ScriptedStore


def rows(*keys: str) -> pa.Table:
    return pa.table([[0] * len(keys), keys, [-1] * len(keys), ["old"] * len(keys)], schema=REVISION_SCHEMA)


def versions(table: pa.Table) -> list[tuple[int, str | None]]:
    return [(row["size"], row["etag"]) for row in table.to_pylist()]


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"abc")
    (tmp_path / os.fsdecode(b"\xff.jpg")).write_bytes(b"d")
    refreshed = refresher(Source(str(tmp_path)), StoreOptions())(rows("a.jpg", "gone.jpg", r"\xff.jpg", "a.jpg/b"))
    assert refreshed.schema == REVISION_SCHEMA
    assert refreshed["key"].to_pylist() == ["a.jpg", "gone.jpg", r"\xff.jpg", "a.jpg/b"]
    assert versions(refreshed) == [
        (3, etag_of((tmp_path / "a.jpg").stat())),
        (-1, "old"),
        (1, etag_of((tmp_path / os.fsdecode(b"\xff.jpg")).stat())),
        (-1, "old"),
    ]


def test_objects_with_any_key_and_a_manifest_of_both(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "c.jpg").write_bytes(b"abc")
    bucket.put("a.jpg", b"ab")
    bucket.put("x//y.jpg", b"abcd")
    keys = ["a.jpg", "gone.jpg", "x//y.jpg", "x//gone.jpg"]
    etags = [bucket.client.head_object(Bucket=bucket.name, Key=key)["ETag"] for key in ("a.jpg", "x//y.jpg")]
    expected = [(2, etags[0]), (-1, "old"), (4, etags[1]), (-1, "old")]
    assert versions(refresher(Source(bucket.uri), bucket.options)(rows(*keys))) == expected
    uris = [*(f"{bucket.uri}/{key}" for key in keys), "c.jpg"]
    listed = refresher(Source(str(tmp_path), keys_are_uris=True), bucket.options)(rows(*uris))
    assert versions(listed) == [*expected, (3, etag_of((tmp_path / "c.jpg").stat()))]


def test_what_may_not_be_looked_at_is_unknown_and_a_store_that_is_down_is_told(scripted_store: ScriptedStore) -> None:
    options = StoreOptions(
        endpoint_url=scripted_store.options.endpoint_url, region=scripted_store.options.region, store_deadline=0.5
    )
    scripted_store.objects["/photos/b.jpg"] = b"ab"
    scripted_store.answer("photos/a.jpg", Answer(403), method="HEAD")
    refresh = refresher(Source("s3://photos"), options)
    assert versions(refresh(rows("a.jpg"))) == [(-1, None)]
    assert versions(refresh(rows("b.jpg")))[0][0] == 2
    scripted_store.answer("photos/b.jpg", Answer(503, "SlowDown"))
    with pytest.raises(StoreError, match=r"s3://photos/b\.jpg"):
        refresh(rows("b.jpg"))
