"""Jobs over shards: RecordIO and tar, on the file system and on an S3 server."""

import gzip
import io
import os
import tarfile
import tracemalloc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

import infermill
from infermill import Options
from infermill.errors import BadInputError, SourceError, StoreError, UsageError
from infermill.estimation import estimate
from infermill.members import WINDOW_BYTES, member_fetcher
from infermill.plan import refs_of
from infermill.sources import canonical, list_source
from infermill.sources.shards import shards_of
from infermill.types import ObjectRef, StoreOptions
from tests.fault_proxy import ALWAYS, FaultProxy, Reply, Truncate
from tests.servers import Bucket
from tests.shards import packed, png, tar_of, tiny_card, write_records

SMALL = Options(partition_objects=4)


@pytest.fixture
def card(tmp_path: Path) -> Path:
    return tiny_card(tmp_path / "model", top_k=1)


def listed(uri: str, suffix: tuple[str, ...] | None = None, options: StoreOptions | None = None) -> list[ObjectRef]:
    _, batches = list_source(uri, suffix, options or StoreOptions())
    return [ref for batch in batches for ref in refs_of(pa.table(batch))]


def fetched(uri: str, options: StoreOptions | None = None, suffix: tuple[str, ...] | None = ("",)) -> dict[str, bytes]:
    options = options or StoreOptions()
    source, batches = list_source(uri, suffix, options)
    fetch = member_fetcher(source, options)
    return {ref.key: bytes(fetch(ref)) for batch in batches for ref in refs_of(pa.table(batch))}


def by_key(rows: pa.Table) -> dict[str, dict[str, object]]:
    return {row["key"]: row for row in rows.to_pylist()}


def codes(rows: pa.Table) -> dict[str, str]:
    return {row["key"]: row["error"]["code"] for row in rows.to_pylist() if row["error"]}


def ten_records(path: Path, keys: Sequence[int] | None = None) -> Path:
    return write_records(path, [packed(png(number), [number, 0.5]) for number in range(10)], keys)


def test_a_shard_of_records_is_predicted_like_the_files_in_it(tmp_path: Path, card: Path) -> None:
    ten_records(tmp_path / "photos.rec", range(100, 110))
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.png").write_bytes(png(number))
    summary = infermill.run(tmp_path / "photos.rec", card, tmp_path / "out", SMALL)
    infermill.run(folder, card, tmp_path / "out-files")
    assert (summary.planned, summary.ok) == (10, 10)
    rows, plain = infermill.read(tmp_path / "out"), infermill.read(tmp_path / "out-files")
    assert rows.column_names == ["key", "etag", "size", "label", "top", "error"]
    assert plain.column_names == ["key", "etag", "size", "top", "error"]
    assert rows["key"].to_pylist() == [f"photos.rec#{number}" for number in range(100, 110)]
    assert rows["top"].to_pylist() == plain["top"].to_pylist()
    assert rows.schema.field("label").type == pa.list_(pa.float32())
    assert rows["label"].to_pylist() == [[number, 0.5] for number in range(10)]
    assert infermill.verify(tmp_path / "out").problems == ()
    assert infermill.status(tmp_path / "out").left == 0


def test_records_without_an_index_are_numbered(tmp_path: Path) -> None:
    ten_records(tmp_path / "a.rec")
    refs = listed(str(tmp_path / "a.rec"))
    assert [ref.key for ref in refs] == [f"a.rec#{number}" for number in range(10)]
    assert list(fetched(str(tmp_path / "a.rec"), suffix=None).values()) == [png(number) for number in range(10)]


def test_an_index_may_name_some_records_in_any_order(tmp_path: Path) -> None:
    ten_records(tmp_path / "a.rec", range(10))
    lines = (tmp_path / "a.idx").read_text().splitlines(keepends=True)
    (tmp_path / "a.idx").write_text(lines[7] + lines[2])
    assert [ref.key for ref in listed(str(tmp_path / "a.rec"))] == ["a.rec#2", "a.rec#7"]


@pytest.mark.parametrize("offset", [3, 10**9, 10**17])
def test_an_entry_that_leads_nowhere_is_a_failure_and_the_others_are_predicted(
    tmp_path: Path, card: Path, offset: int
) -> None:
    ten_records(tmp_path / "a.rec", range(10))
    with (tmp_path / "a.idx").open("a") as index:
        index.write(f"bad\t{offset}\n")
    infermill.run(tmp_path / "a.rec", card, tmp_path / "out")
    rows = infermill.read(tmp_path / "out")
    assert codes(rows) == {"a.rec#bad": "corrupt"}
    assert len(rows) == 11


def test_an_index_that_is_none_is_refused(tmp_path: Path, card: Path) -> None:
    ten_records(tmp_path / "a.rec")
    (tmp_path / "a.idx").write_bytes(b"\x00\x01\x02" * 4_000)
    with pytest.raises(SourceError, match=r"a\.idx is no index of records: line 1"):
        infermill.run(tmp_path / "a.rec", card, tmp_path / "out")


def test_damage_costs_its_records_and_is_a_row(tmp_path: Path, card: Path) -> None:
    path = ten_records(tmp_path / "a.rec")
    content = bytearray(path.read_bytes())
    third = listed(str(path))[3].offset
    content[third] ^= 0xFF
    path.write_bytes(content[:-100])
    summary = infermill.run(path, card, tmp_path / "out", SMALL)
    assert (summary.planned, summary.ok, summary.failures_by_code) == (10, 8, {"corrupt": 2})
    assert infermill.read(tmp_path / "out")["key"].to_pylist()[3] == f"a.rec#@{third}"
    assert infermill.verify(tmp_path / "out").problems == ()


def test_a_poisoned_record_costs_one_row_which_has_its_label(tmp_path: Path, card: Path) -> None:
    contents = [png(0), b"<html>", png(1)[:-400], b"", png(2)]
    write_records(tmp_path / "a.rec", [packed(one, [number]) for number, one in enumerate(contents)])
    infermill.run(tmp_path / "a.rec", card, tmp_path / "out")
    rows = infermill.read(tmp_path / "out")
    assert codes(rows) == {"a.rec#1": "unsupported", "a.rec#2": "truncated", "a.rec#3": "empty"}
    assert rows["label"].to_pylist() == [[number] for number in range(5)]


def test_tars_are_predicted_with_their_classes(tmp_path: Path, card: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(3):
        files = {
            f"{n}.{suffix}": png(n) if suffix == "png" else b"%d" % n for n in range(3) for suffix in ("png", "cls")
        }
        (folder / f"train-{shard:03d}.tar").write_bytes(tar_of(files))
    (folder / "notes.txt").write_text("not a shard")
    for uri in (f"{folder}/*.tar", f"tar:{folder}", f"tar:{folder}/train-*"):
        assert [ref.key for ref in listed(uri)] == [
            f"train-{shard:03d}.tar#{number}.png" for shard in range(3) for number in range(3)
        ]
    infermill.run(f"{folder}/*.tar", card, tmp_path / "out", SMALL)
    rows = infermill.read(tmp_path / "out")
    assert rows["label"].to_pylist() == ["0", "1", "2"] * 3
    assert rows["error"].null_count == 9
    assert infermill.verify(tmp_path / "out").problems == ()
    assert estimate(f"{folder}/*.tar", card).objects == 9


def test_a_manifest_may_list_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.tar").write_bytes(tar_of({"0.png": png(0)}))
    (tmp_path / "shards.txt").write_text(f"a.tar\n{tmp_path}/a.tar\n")
    assert fetched("tar:shards.txt") == {"a.tar#0.png": png(0), f"{tmp_path}/a.tar#0.png": png(0)}
    (tmp_path / "urls.txt").write_text("http://127.0.0.1/a.tar\n")
    with pytest.raises(SourceError, match="cannot be read as a shard"):
        listed("tar:urls.txt", options=StoreOptions(allow_host=("127.0.0.1",)))


def test_a_link_in_a_tar_is_followed_nowhere(tmp_path: Path, card: Path) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        link = tarfile.TarInfo("../../etc/passwd.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    (tmp_path / "a.tar").write_bytes(sink.getvalue())
    infermill.run(tmp_path / "a.tar", card, tmp_path / "out")
    assert codes(infermill.read(tmp_path / "out")) == {"a.tar#../../etc/passwd.png": "empty"}


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar", "a.rec"])
def test_compressed_shards_are_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(tar_of({"a.png": png(0)})))
    with pytest.raises(UsageError, match="is compressed") as caught:
        listed(str(tmp_path / name))
    assert "unpack it" in caught.value.hint


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    ten_records(tmp_path / "a.rec")
    for name in ("a.idx", "pipe.tar"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "shards.txt").write_text(f"{tmp_path}/pipe.tar\n")
    with pytest.raises(SourceError, match=r"pipe\.tar is not a file"):
        listed(f"tar:{tmp_path}/shards.txt")
    with pytest.raises(SourceError, match=r"a\.idx is not a file"):
        listed(str(tmp_path / "a.rec"))


def test_a_shard_whose_name_is_not_utf8_is_read(tmp_path: Path) -> None:
    ten_records(tmp_path / "a.rec", range(20, 30))
    for suffix in ("rec", "idx"):
        (tmp_path / f"a.{suffix}").rename(os.fsdecode(bytes(tmp_path) + b"/\xff." + suffix.encode()))
    found = fetched(f"recordio:{tmp_path}", suffix=None)
    assert next(iter(found.items())) == (r"\xff.rec#20", png(0))


def test_an_index_is_found_whatever_the_case_of_the_ending(tmp_path: Path) -> None:
    ten_records(tmp_path / "a.rec", range(20, 30)).rename(tmp_path / "a.REC")
    assert listed(str(tmp_path / "a.REC"))[0].key == "a.REC#20"


@pytest.mark.parametrize("ending", ["rec", "idx", "tar"])
def test_a_listing_of_shards_outlives_a_store_that_is_busy(
    bucket: Bucket, fault_proxy: FaultProxy, tmp_path: Path, ending: str
) -> None:
    ten_records(tmp_path / "a.rec", range(10))
    (tmp_path / "a.tar").write_bytes(tar_of({f"{number}.png": png(number) for number in range(10)}))
    for name in ("a.rec", "a.idx", "a.tar"):
        bucket.put(name, (tmp_path / name).read_bytes())
    # object_store takes this answer for a final one.
    busy = fault_proxy.inject(Reply(400, "RequestTimeout"), "GET", rf"a\.{ending}", times=2)
    options = replace(bucket.options, endpoint_url=fault_proxy.url)
    assert len(listed(f"{bucket.uri}/a.{ending.replace('idx', 'rec')}", options=options)) == 10
    assert busy.hits == 2


def test_what_cannot_be_a_shard_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a#b.tar").write_bytes(tar_of({}))
    with pytest.raises(SourceError, match="its name holds a #"):
        listed(str(tmp_path / "a#b.tar"))
    with pytest.raises(SourceError, match="does not exist"):
        listed(str(tmp_path / "missing.rec"))
    with pytest.raises(UsageError, match="--suffix takes nothing"):
        listed(str(tmp_path / "missing.rec"), (".jpg",))
    with pytest.raises(UsageError, match="is compressed"):
        shards_of("tar:photos.tar.zst")
    with pytest.raises(UsageError, match="there is no split 'valid'"):
        shards_of("cifar10:folder?split=valid")


def test_the_same_shards_are_the_same_source_however_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ten_records(tmp_path / "a.rec")
    monkeypatch.chdir(tmp_path)
    ways = ("a.rec", "recordio:a.rec", f"{tmp_path}/a.rec", "./a.rec")
    assert {canonical(way, StoreOptions()) for way in ways} == {f"recordio:{tmp_path}/a.rec"}
    assert canonical("cifar10:x?split=test", StoreOptions()) == f"cifar10:{tmp_path}/x?split=test"


def test_a_shard_that_changes_changes_all_its_members(tmp_path: Path, card: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "a.tar").write_bytes(tar_of({"0.png": png(0), "0.cls": b"old", "1.png": png(1)}))
    (folder / "b.tar").write_bytes(tar_of({"2.png": png(2)}))
    source, out = f"tar:{folder}", tmp_path / "out"
    infermill.run(source, card, out)
    before = by_key(infermill.read(out))
    # The members have moved, so that what the plan says of their place holds no more.
    (folder / "a.tar").write_bytes(tar_of({"new.png": png(9), "0.cls": b"new", "0.png": png(0), "1.png": png(7)}))
    (folder / "c.tar").write_bytes(tar_of({"3.png": png(3)}))
    summary = infermill.run(source, card, out, existing="append")
    assert (summary.new, summary.changed, summary.unchanged) == (2, 2, 1)
    after = by_key(infermill.read(out))
    assert after.keys() == before.keys() | {"a.tar#new.png", "c.tar#3.png"}
    assert after["a.tar#0.png"]["label"] == "new"
    assert after["a.tar#0.png"]["top"] == before["a.tar#0.png"]["top"]
    assert after["a.tar#1.png"]["top"] != before["a.tar#1.png"]["top"]
    assert after["b.tar#2.png"] == before["b.tar#2.png"]
    assert infermill.verify(out).problems == ()


def test_retry_finds_members_where_they_are_now(tmp_path: Path, card: Path) -> None:
    shard, out = tmp_path / "a.tar", tmp_path / "out"
    shard.write_bytes(tar_of({"0.png": png(0), "1.png": b"", "2.png": b"", "2.cls": b"two"}))
    infermill.run(shard, card, out)
    assert codes(infermill.read(out)) == {"a.tar#1.png": "empty", "a.tar#2.png": "empty"}
    shard.write_bytes(tar_of({"x.png": png(8), "1.png": png(1), "1.cls": b"one"}))
    summary = infermill.retry(out, codes=["empty"])
    assert summary.retried == 2
    rows = by_key(infermill.read(out))
    assert rows["a.tar#1.png"]["label"] == "one"
    assert rows["a.tar#1.png"]["error"] is None
    assert codes(infermill.read(out)) == {"a.tar#2.png": "missing"}
    assert rows["a.tar#2.png"]["label"] == "two"
    shard.unlink()
    assert infermill.retry(out, codes=["missing"]).failed == 1
    assert infermill.verify(out).problems == ()


def test_a_shard_that_is_overwritten_while_the_job_runs_is_not_read_as_the_old_one(tmp_path: Path) -> None:
    shard = tmp_path / "a.tar"
    shard.write_bytes(tar_of({"0.png": png(0)}))
    source, batches = list_source(str(shard), None, StoreOptions())
    refs = [ref for batch in batches for ref in refs_of(pa.table(batch))]
    shard.write_bytes(tar_of({"9.png": png(9)}))
    with pytest.raises(BadInputError, match="overwritten"):
        member_fetcher(source, StoreOptions())(refs[0])


def test_shards_in_a_bucket_are_predicted(bucket: Bucket, card: Path, tmp_path: Path) -> None:
    write_records(tmp_path / "a.rec", [packed(png(number), [number]) for number in range(300)], range(300))
    for name in ("a.rec", "a.idx"):
        bucket.put(f"records/{name}", (tmp_path / name).read_bytes())
    files = {f"{number:03d}.png": png(number) for number in range(40)}
    bucket.put("tars/b-0.tar", tar_of(files))
    bucket.put("tars/b-1.tar", tar_of({"big.png": bytes(3 * WINDOW_BYTES) + b"end", "small.png": b"small"}))
    options = bucket.options
    assert fetched(f"{bucket.uri}/records/a.rec", options, None) == {
        f"records/a.rec#{number}": png(number) for number in range(300)
    }
    found = fetched(f"tar:{bucket.uri}/tars/", options)
    assert {key: found[f"tars/b-0.tar#{key}"] for key in files} == files
    assert found["tars/b-1.tar#big.png"].endswith(b"end")
    assert len(found["tars/b-1.tar#big.png"]) == 3 * WINDOW_BYTES + 3
    assert found["tars/b-1.tar#small.png"] == b"small"
    job = Options(partition_objects=50, endpoint_url=options.endpoint_url, region=options.region)
    out = f"{bucket.uri}/out"
    summary = infermill.run(f"recordio:{bucket.uri}/records/", card, out, job)
    assert (summary.planned, summary.ok) == (300, 300)
    assert infermill.read(out, options)["label"].to_pylist() == [[number] for number in range(300)]
    assert infermill.verify(out, options).problems == ()


def test_a_store_is_asked_for_bounded_ranges_and_not_for_each_member(
    bucket: Bucket, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    write_records(tmp_path / "a.rec", [packed(png(number), [number]) for number in range(400)])
    content = (tmp_path / "a.rec").read_bytes()
    bucket.put("a.rec", content)
    broken = fault_proxy.inject(Truncate(0.5), method="GET", path=r"a\.rec", first=2)
    options = replace(bucket.options, endpoint_url=fault_proxy.url)
    assert len(content) > WINDOW_BYTES
    source, batches = list_source(f"{bucket.uri}/a.rec", None, options)
    refs = [ref for batch in batches for ref in refs_of(pa.table(batch))]
    windows = -(-len(content) // WINDOW_BYTES)
    listing = ranges_of(fault_proxy)
    assert len(listing) <= windows + 2
    fault_proxy.inject(Truncate(0.5), method="GET", path=r"a\.rec")
    fetch = member_fetcher(source, options)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda ref: bytes(fetch(ref)), refs)) == [png(number) for number in range(400)]
    assert broken.hits == 1
    asked = ranges_of(fault_proxy)
    assert len(asked) - len(listing) == windows + 1
    assert all(end - begin < WINDOW_BYTES for begin, end in asked)


def ranges_of(proxy: FaultProxy) -> list[tuple[int, int]]:
    """The first and the last byte of each range that was asked for, of one version of an object."""
    gets = [request for request in proxy.requests if request.method == "GET" and "range" in request.headers]
    assert all(request.headers["if-match"] for request in gets)
    spans = [request.headers["range"].removeprefix("bytes=").split("-") for request in gets]
    return [(int(begin), int(end)) for begin, end in spans]


def test_records_that_lie_far_apart_are_listed_without_what_is_between(
    bucket: Bucket, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    write_records(tmp_path / "a.rec", [packed(bytes(400_000), [number]) for number in range(5)], range(5))
    for name in ("a.rec", "a.idx"):
        bucket.put(name, (tmp_path / name).read_bytes())
    refs = listed(f"{bucket.uri}/a.rec", None, replace(bucket.options, endpoint_url=fault_proxy.url))
    assert [ref.label for ref in refs] == [[number] for number in range(5)]
    assert sum(end - begin + 1 for begin, end in ranges_of(fault_proxy)) < 50_000


def test_an_object_that_is_overwritten_is_a_failure_of_all_its_members(bucket: Bucket) -> None:
    bucket.put("a.tar", tar_of({"0.png": png(0), "1.png": png(1)}))
    source, batches = list_source(f"{bucket.uri}/a.tar", None, bucket.options)
    refs = [ref for batch in batches for ref in refs_of(pa.table(batch))]
    bucket.put("a.tar", tar_of({"0.png": png(5), "1.png": png(6)}))
    fetch = member_fetcher(source, bucket.options)
    for ref in refs:
        with pytest.raises(BadInputError, match="overwritten"):
            fetch(ref)
    bucket.delete("a.tar")
    with pytest.raises(BadInputError, match="not there"):
        fetch(refs[0])


def test_a_shard_that_fails_while_another_is_read_costs_its_members(bucket: Bucket, fault_proxy: FaultProxy) -> None:
    files = {"0.png": png(0), "1.png": bytes(WINDOW_BYTES), "2.png": png(2)}
    for name in ("a.tar", "b.tar"):
        bucket.put(name, tar_of(files))
    options = replace(bucket.options, endpoint_url=fault_proxy.url, store_deadline=0.6)
    source, batches = list_source(f"tar:{bucket.uri}", None, options)
    refs = [ref for batch in batches for ref in refs_of(pa.table(batch))]
    fetch = member_fetcher(source, options)
    for first in (refs[0], refs[3]):
        assert fetch(first) == png(0)
    fault_proxy.inject(Reply(503, "SlowDown"), "GET", r"b\.tar", times=ALWAYS)
    with pytest.raises(BadInputError, match="other objects are read") as caught:
        fetch(refs[5])
    assert caught.value.failure.code == "store"
    fault_proxy.inject(Reply(503, "SlowDown"), "GET", r"a\.tar", times=ALWAYS)
    with pytest.raises(StoreError, match="does not answer"):
        fetch(refs[2])


def test_listing_and_fetching_hold_little_of_a_large_shard(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of({f"{number}.png": bytes(4 << 20) for number in range(20)}))
    tracemalloc.start()
    try:
        refs = listed(str(path))
        assert len(refs) == 20
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
