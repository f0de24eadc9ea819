"""What becomes of a job that is there already: append, retry and overwrite, on the file system and on S3."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import infermill
from infermill import Options
from infermill.changes import Changes
from infermill.errors import JobMismatchError, SourceError, StoreError, UsageError
from infermill.job import Existing
from infermill.output import Output
from infermill.parts import rows_table
from infermill.record import move_aside
from infermill.rows import tables
from infermill.sources.objects import LISTING_SCHEMA
from infermill.types import Failure, ObjectRef, PartitionReport, StoreOptions
from tests.networks import tiny_classifier
from tests.servers import Bucket, ScriptedStore
from tests.test_engines import CARD, png


@dataclass(frozen=True)
class Place:
    """A source that changes, and an output."""

    source: str
    output: str
    options: Options
    put: Callable[[str, bytes], object]
    delete: Callable[[str], object]

    def run(self, card: Path, **arguments: Any) -> infermill.Summary:
        return infermill.run(self.source, card, self.output, self.options, **arguments)

    def rows(self) -> dict[str, dict[str, Any]]:
        """The rows by the name of their key; no key may have two."""
        rows = infermill.read(self.output, self.options).to_pylist()
        named = {row["key"].rpartition("/")[2]: row for row in rows}
        assert len(named) == len(rows)
        return named

    def contents(self) -> dict[str, bytes]:
        place = Output(self.output, self.options)
        return {name: place.read_existing(name) for name in place.names()}

    def assert_verified(self) -> None:
        assert infermill.verify(self.output, self.options).problems == ()


def folder_place(tmp_path: Path) -> Place:
    folder = tmp_path / "photos"
    folder.mkdir()
    return Place(
        str(folder),
        str(tmp_path / "out"),
        Options(partition_objects=4),
        lambda key, data: (folder / key).write_bytes(data),
        lambda key: (folder / key).unlink(),
    )


def bucket_place(bucket: Bucket) -> Place:
    return Place(
        f"{bucket.uri}/photos/",
        f"{bucket.uri}/out",
        Options(partition_objects=4, endpoint_url=bucket.endpoint),
        lambda key, data: bucket.put(f"photos/{key}", data),
        lambda key: bucket.delete(f"photos/{key}"),
    )


@pytest.fixture(params=["files", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Eight photos, to be predicted in two partitions."""
    is_local = request.param == "files"
    return filled(folder_place(tmp_path) if is_local else bucket_place(request.getfixturevalue("bucket")))


@pytest.fixture
def here(tmp_path: Path) -> Place:
    """The same, on the file system."""
    return filled(folder_place(tmp_path))


def filled(place: Place) -> Place:
    for number in range(8):
        place.put(f"{number}.png", png(number))
    return place


@pytest.fixture
def card(tmp_path: Path) -> Path:
    tiny_classifier(tmp_path / "tiny.onnx", classes=10, size=32)
    (tmp_path / "model.yaml").write_text(CARD)
    return tmp_path / "model.yaml"


def top_of(card: Path, data: bytes) -> int:
    (prediction,) = infermill.load_model(card)([data])
    assert prediction.top is not None
    return prediction.top[0].index


def test_append_adds_what_is_new_and_redoes_what_has_changed(place: Place, card: Path) -> None:
    first = place.run(card)
    assert (first.new, first.changed, first.unchanged) == (None, None, None)
    before, files = place.rows(), place.contents()
    place.put("8.png", png(8))
    place.put("1b.png", png(9))
    place.put("5.png", png(105))
    summary = place.run(card, existing="append")
    assert (summary.new, summary.changed, summary.unchanged) == (2, 1, 7)
    assert (summary.planned, summary.ok, summary.failed, summary.model_loads) == (10, 10, 0, 1)
    after = place.rows()
    assert list(after) == [*before, "1b.png", "8.png"]
    assert after["5.png"]["etag"] != before["5.png"]["etag"]
    assert after["5.png"]["top"][0]["index"] == top_of(card, png(105))
    assert {name: row for name, row in after.items() if name in before and name != "5.png"} == {
        name: row for name, row in before.items() if name != "5.png"
    }
    assert place.contents()["part-00000.parquet"] == files["part-00000.parquet"]
    assert json.loads(place.contents()["_SUCCESS"])["parts"] == [[0, 4, 0], [1, 4, 0], [2, 2, 0]]
    place.assert_verified()
    again = place.run(card, existing="append")
    assert (again.new, again.changed, again.unchanged, again.model_loads) == (0, 0, 10, 0)
    assert place.run(card).model_loads == 0
    assert infermill.status(place.output, place.options).appended == 1


def test_append_to_nothing_is_a_job(here: Place, card: Path) -> None:
    summary = here.run(card, existing="append")
    assert (summary.new, summary.changed, summary.unchanged, summary.ok) == (8, 0, 0, 8)


def test_append_finishes_what_was_not_done(here: Place, card: Path) -> None:
    here.run(card)
    before = here.rows()
    (Path(here.output) / "part-00001.parquet").unlink()
    here.put("5.png", png(105))  # its part is missing, too
    here.put("8.png", png(8))
    here.delete("0.png")
    summary = here.run(card, existing="append")
    assert (summary.new, summary.changed, summary.unchanged) == (1, 1, 6)
    assert (summary.planned, summary.ok) == (9, 9)
    after = here.rows()
    assert after["5.png"]["top"][0]["index"] == top_of(card, png(105))
    assert after["0.png"] == before["0.png"]
    here.assert_verified()


def test_append_again_and_again(here: Place, card: Path) -> None:
    here.run(card)
    for number in (8, 9):
        here.put(f"{number}.png", png(number))
        assert here.run(card, existing="append").new == 1
    (Path(here.output) / "part-00002.parquet").unlink()
    (Path(here.output) / "part-00000.parquet").unlink()
    assert here.run(card).ok == 10
    assert list(here.rows()) == [f"{number}.png" for number in range(10)]
    here.assert_verified()


def test_a_manifest_may_grow(here: Place, card: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "keys.txt"

    def run(numbers: range, **arguments: Any) -> infermill.Summary:
        manifest.write_text("".join(f"{here.source}/{number}.png\n" for number in numbers))
        return infermill.run(manifest, card, here.output, here.options, **arguments)

    run(range(3))
    assert run(range(5), existing="append").new == 2
    # What was appended is the job's, as is what it was started with.
    assert run(range(5)).model_loads == run(range(3)).model_loads == 0
    with pytest.raises(JobMismatchError, match="source: manifest sha256:"):
        run(range(6))
    with pytest.raises(JobMismatchError, match=r"source: manifest sha256:\S+ in .* -> .*photos"):
        here.run(card, existing="append")


def test_append_and_limit_do_not_go_together(here: Place, card: Path) -> None:
    limited = replace(here, options=replace(here.options, limit=3))
    with pytest.raises(UsageError, match="--limit and --append do not go together"):
        limited.run(card, existing="append")
    limited.run(card)
    with pytest.raises(JobMismatchError, match="limit: 3 -> None"):
        here.run(card, existing="append")


def test_two_appends_at_once(place: Place, card: Path) -> None:
    place.run(card)
    for number in range(8, 14):
        place.put(f"{number}.png", png(number))
    place.put("0.png", png(100))
    summaries = at_once(lambda: place.run(card, existing="append"), lambda: place.run(card, existing="append"))
    assert [(summary.planned, summary.ok) for summary in summaries] == [(14, 14)] * 2
    assert len(place.rows()) == 14
    assert place.rows()["0.png"]["top"][0]["index"] == top_of(card, png(100))
    place.assert_verified()


Answer = TypeVar("Answer")


def at_once(*calls: Callable[[], Answer]) -> list[Answer]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [answer.result() for answer in [pool.submit(call) for call in calls]]


def test_an_append_that_breaks_off_is_done_by_the_next_one(here: Place, card: Path) -> None:
    here.run(card)
    here.put("8.png", png(8))
    obstacle = Path(here.output) / "_infermill/append-00001.json"
    obstacle.mkdir()
    with pytest.raises(StoreError):
        here.run(card, existing="append")
    assert not (Path(here.output) / "_SUCCESS").exists()
    obstacle.rmdir()
    assert here.run(card).ok == 8
    here.assert_verified()
    assert here.run(card, existing="append").new == 1
    here.assert_verified()


def test_a_gap_in_the_records_is_told(here: Place, card: Path) -> None:
    here.run(card)
    for number in (8, 9):
        here.put(f"{number}.png", png(number))
        here.run(card, existing="append")
    (Path(here.output) / "_infermill/append-00001.json").unlink()
    with pytest.raises(JobMismatchError, match=r"append-\*\.json is damaged"):
        here.run(card)


def test_retry_predicts_only_what_failed_for_a_passing_reason(place: Place, card: Path) -> None:
    place.put("9.jpg", b"no image")
    place.run(card)
    etags = {name: row["etag"] for name, row in place.rows().items()}
    Output(place.output, place.options).remove(["part-00000.parquet", "part-00001.parquet"])
    for gone in ("2.png", "3.png"):
        place.delete(gone)
    place.put("5.png", png(105))
    assert place.run(card).failures_by_code == {"missing": 2, "changed": 1, "unsupported": 1}
    files = place.contents()
    place.put("2.png", png(102))
    summary = infermill.retry(place.output, options=place.options)
    assert (summary.retried, summary.planned, summary.ok, summary.model_loads) == (2, 9, 6, 1)
    assert summary.failures_by_code == {"missing": 1, "changed": 1, "unsupported": 1}
    rows = place.rows()
    assert rows["2.png"]["top"][0]["index"] == top_of(card, png(102))
    assert rows["2.png"]["etag"] not in {None, etags["2.png"]}
    assert rows["2.png"]["size"] == len(png(102))
    assert (rows["3.png"]["error"]["code"], rows["3.png"]["etag"]) == ("missing", etags["3.png"])
    now = place.contents()
    assert {name for name in now if now[name] != files[name]} == {"part-00000.parquet", "_SUCCESS"}
    place.assert_verified()
    summary = infermill.retry(place.output, codes=["changed"], options=place.options)
    assert (summary.retried, summary.failures_by_code) == (1, {"missing": 1, "unsupported": 1})
    assert place.rows()["5.png"]["top"][0]["index"] == top_of(card, png(105))
    assert json.loads(place.contents()["_SUCCESS"])["parts"] == [[0, 3, 1], [1, 4, 0], [2, 0, 1]]
    assert Output(place.output, place.options).names("_infermill/revisions") == []
    place.assert_verified()


def test_nothing_to_retry_changes_nothing(here: Place, card: Path) -> None:
    here.run(card)
    files = here.contents()
    summary = infermill.retry(here.output)
    assert (summary.retried, summary.ok, summary.model_loads) == (0, 8, 0)
    assert here.contents() == files


def test_retry_leaves_an_unfinished_job_unfinished(here: Place, card: Path) -> None:
    here.run(card)
    for name in ("part-00000.parquet", "part-00001.parquet"):
        (Path(here.output) / name).unlink()
    here.delete("0.png")
    here.run(card)
    here.put("0.png", png(0))
    (Path(here.output) / "part-00001.parquet").unlink()
    summary = infermill.retry(here.output)
    assert (summary.retried, summary.planned, summary.ok) == (1, 8, 4)
    assert not (Path(here.output) / "_SUCCESS").exists()
    assert here.run(card).ok == 8
    here.assert_verified()


def test_two_retries_at_once_lose_nothing(place: Place, card: Path) -> None:
    place.run(card)
    Output(place.output, place.options).remove([f"part-0000{number}.parquet" for number in range(2)])
    for number in (0, 5):
        place.delete(f"{number}.png")
    for number in (1, 6):
        place.put(f"{number}.png", png(200 + number))
    assert place.run(card).failures_by_code == {"missing": 2, "changed": 2}
    for number in (0, 5):
        place.put(f"{number}.png", png(number))
    at_once(
        lambda: infermill.retry(place.output, codes=["missing"], options=place.options),
        lambda: infermill.retry(place.output, codes=["changed"], options=place.options),
    )
    assert [row["error"] for row in place.rows().values()] == [None] * 8
    assert json.loads(place.contents()["_SUCCESS"])["ok"] == 8
    place.assert_verified()


def test_retry_knows_the_model_and_its_options(here: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    tiny_classifier(tmp_path / "work/tiny.onnx", classes=10, size=32)
    (tmp_path / "work/labels.txt").write_text("\n".join(f"label {i}" for i in range(10)))
    monkeypatch.chdir(tmp_path / "work")
    given = infermill.CardOptions(labels="labels.txt", exact=(32, 32), top_k=2)
    options = replace(here.options, decode="fast", suffix=(".PNG",))
    (Path(here.source) / "dangling.png").symlink_to(tmp_path / "later.png")
    assert infermill.run(here.source, "tiny.onnx", here.output, options, given).failures_by_code == {"missing": 1}
    (tmp_path / "later.png").write_bytes(png(3))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JobMismatchError, match="max_pixels: 178956970 -> 5"):
        infermill.retry(here.output, options=Options(max_pixels=5))
    assert infermill.retry(here.output).failures_by_code == {}
    assert here.rows()["dangling.png"]["top"][0]["label"].startswith("label ")
    (tmp_path / "work").rename(tmp_path / "moved")
    with pytest.raises(infermill.ModelError, match=r"tiny\.onnx does not exist"):
        infermill.retry(here.output)
    labels = replace(given, labels=str(tmp_path / "moved/labels.txt"))
    assert infermill.retry(here.output, "moved/tiny.onnx", card_options=labels).retried == 0
    with pytest.raises(JobMismatchError, match=r"(?s)model: sha256:.* -> sha256:.*output.top_k: 2 -> 3"):
        infermill.retry(here.output, "moved/tiny.onnx", card_options=replace(labels, top_k=3))


def test_retry_without_a_job_or_a_model_is_bad_usage(here: Place, card: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no job"):
        infermill.retry(here.output)
    loaded = infermill.parse_card(
        {"name": "tiny", "files": {"onnx": str(tmp_path / "tiny.onnx")}, "preprocess": {"resize": {"exact": [32, 32]}}}
    )
    infermill.run(here.source, loaded, here.output, here.options)
    with pytest.raises(UsageError, match="does not say where its model is"):
        infermill.retry(here.output)
    assert infermill.retry(here.output, loaded).retried == 0


def test_other_weights_or_labels_are_told_apart_from_another_card(here: Place, card: Path) -> None:
    here.run(card)
    tiny_classifier(card.parent / "tiny.onnx", classes=10, size=32, seed=1)
    with pytest.raises(JobMismatchError, match=r"(?s)model: sha256:.*the network's weights or the labels differ"):
        here.run(card)


def test_overwrite_moves_the_old_job_aside(place: Place, card: Path) -> None:
    place.run(card)
    place.put("8.png", png(8))
    place.run(card, existing="append")
    before = place.rows()
    place.delete("0.png")
    others = replace(place, options=replace(place.options, decode="fast"))
    with pytest.raises(JobMismatchError, match="decode: exact -> fast") as caught:
        others.run(card)
    assert "--overwrite" in caught.value.hint
    summary = others.run(card, existing="overwrite")
    assert (summary.planned, summary.ok, summary.model_loads) == (8, 8, 1)
    assert list(place.rows()) == [f"{number}.png" for number in range(1, 9)]
    place.assert_verified()
    old = replace(place, output=aside(place, "append-00001.json"))
    assert old.rows() == before
    old.assert_verified()
    # With the same settings, too.
    assert others.run(card, existing="overwrite").model_loads == 1
    place.assert_verified()


def aside(place: Place, holding: str) -> str:
    """The folder of the only job that was moved aside; on S3, names of folders are not listed."""
    if "://" not in place.output:
        (folder,) = Path(place.output, "_infermill").glob("replaced-*")
        assert (folder / "_infermill" / holding).exists()
        return str(folder)
    import obstore

    from infermill.stores import locate, open_store

    location = locate(place.output)
    store = open_store(location, place.options)
    paths = [entry["path"] for batch in obstore.list(store, f"{location.path}/_infermill") for entry in batch]
    (path,) = [path for path in paths if path.endswith(holding)]
    return f"{location.container}/{path.partition('/_infermill/' + holding)[0]}"


def test_a_source_that_is_wrong_leaves_the_old_job(here: Place, card: Path, tmp_path: Path) -> None:
    here.run(card)
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(SourceError):
            infermill.run(source, card, here.output, here.options, existing="overwrite")
    assert here.run(card).model_loads == 0
    assert len(list(Path(here.output, "_infermill/plan").iterdir())) == 1
    here.assert_verified()


def test_overwrite_of_nothing_and_of_a_damaged_job(here: Place, card: Path) -> None:
    assert here.run(card, existing="overwrite").ok == 8
    (Path(here.output) / "_infermill/job.json").write_text("{")
    assert here.run(card, existing="overwrite").ok == 8
    here.assert_verified()


@pytest.mark.parametrize("existing", ["resume", "overwrite"])
def test_an_overwrite_that_breaks_off_leaves_the_old_job_or_none(here: Place, card: Path, existing: Existing) -> None:
    """What each step leaves is finished, or started anew; and an overwrite goes on where the last one stopped."""
    here.run(card)
    here.put("8.png", png(8))
    here.run(card, existing="append")
    whole = Path(here.output).with_name("whole")
    Path(here.output).rename(whole)
    files = ["_SUCCESS", "part-00001.parquet", "part-00000.parquet", "part-00002.parquet"]
    files += ["_infermill/append-00001.json", "_infermill/job.json"]
    for moved, planned in ((2, 9), (5, 8), (6, 9)) if existing == "resume" else ((5, 9),):
        place = replace(here, output=f"{here.output}-{moved}")
        out = Path(shutil.copytree(whole, place.output))
        (out / "_infermill/replaced-before/_infermill").mkdir(parents=True)
        for name in files[:moved]:
            (out / name).rename(out / "_infermill/replaced-before" / name)
        assert place.run(card, existing=existing).ok == planned
        place.assert_verified()


def test_a_job_that_cannot_be_moved_stays(
    shared_path: Path, card: Path, unprivileged: Callable[[], AbstractContextManager[None]]
) -> None:
    place = filled(folder_place(shared_path))
    place.run(card)
    with unprivileged(), pytest.raises(StoreError, match="denied"):
        move_aside(Output(place.output, place.options))
    assert place.run(card).model_loads == 0
    place.assert_verified()


NOTES = {"digest": "sha256:abc"}


@pytest.fixture(params=["files", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Output:
    if request.param == "files":
        return Output(str(tmp_path / "out"), StoreOptions())
    bucket: Bucket = request.getfixturevalue("bucket")
    return Output(f"{bucket.uri}/out", bucket.options)


def part(keys: list[str], failed: dict[int, str] | None = None) -> pa.Table:
    failures = {row: Failure("fetch", "missing", message) for row, message in (failed or {}).items()}
    top = pa.array([None if row in failures else [] for row in range(len(keys))], pa.list_(pa.int32()))
    return rows_table([ObjectRef(key, len(key), f"etag of {key}") for key in keys], {"top": top}, failures)


def test_rows_that_are_superseded_at_once_are_all_there(output: Output) -> None:
    keys = [f"{number}.jpg" for number in range(16)]
    missing = dict.fromkeys(range(16), "gone")
    report = PartitionReport(0, 0, "openvino", "fp32", {"missing": 16}, {"missing": "0.jpg"})
    output.create_part(0, part(keys, missing), report, NOTES)

    def revise(row: int) -> PartitionReport:
        return output.revise_part(0, [row], part([keys[row]]), PartitionReport(0, 1, "onnxruntime", "fp32"), NOTES)

    told = at_once(*[partial(revise, row) for row in range(8)])
    assert sorted(report.ok for report in told) == list(range(1, 9))
    (table,) = tables(output)
    assert table["key"].to_pylist() == keys
    assert table["error"].null_count == 8
    assert output.reports(NOTES) == {
        0: PartitionReport(0, 8, "onnxruntime, openvino", "fp32", {"missing": 8}, {"missing": "8.jpg"})
    }


def test_a_part_that_is_gone_or_of_another_job_is_not_superseded(output: Output) -> None:
    report = PartitionReport(0, 1, "openvino", "fp32")
    with pytest.raises(StoreError, match=r"part-00000\.parquet is gone"):
        output.revise_part(0, [0], part(["a"]), report, NOTES)
    output.create_part(0, part(["a"]), report, NOTES)
    with pytest.raises(JobMismatchError, match="belongs to another job"):
        output.revise_part(0, [0], part(["a"]), report, {"digest": "sha256:def"})


def test_a_large_part_is_replaced_whole(output: Output) -> None:
    content = bytes(6 << 20)
    output.create("part", content)
    output.update("part", lambda found: found and found + b"more")
    assert output.read("part") == content + b"more"
    output.probe_update()
    assert output.names("_infermill") in ([], ["lock"])


def test_a_store_that_replaces_whatever_is_there_is_refused(careless_store: ScriptedStore) -> None:
    with pytest.raises(StoreError, match=r"does not honour conditional replacement \(If-Match\)"):
        Output("s3://jobs/out", careless_store.options).probe_update()
    assert careless_store.objects == {}


KEYS = st.sampled_from([f"k{number}" for number in range(9)])
ETAGS = st.sampled_from([None, "a", "b", '"a"'])
REFS = st.lists(st.builds(ObjectRef, KEYS, st.sampled_from([-1, 1, 2]), ETAGS), max_size=12)


def has_changed(ref: ObjectRef, known: ObjectRef) -> bool:
    if ref.etag is not None and known.etag is not None:
        return ref.etag.strip('"') != known.etag.strip('"')
    return ref.size >= 0 and known.size >= 0 and ref.size != known.size


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(REFS, max_size=4), listing=REFS, batch=st.integers(1, 4))
def test_changes_are_those_of_a_plain_comparison(
    parts: list[list[ObjectRef]], listing: list[ObjectRef], batch: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    output = Output(str(tmp_path_factory.mktemp("out")), StoreOptions())
    for number, refs in enumerate(parts):
        table = rows_table(refs, {"top": pa.nulls(len(refs), pa.int32())}, {})
        output.create_part(2 * number, table, PartitionReport(2 * number, len(refs), "openvino", "fp32"), NOTES)
    found = Changes(output, output.parts())
    rows = [{"key": ref.key, "size": ref.size, "etag": ref.etag} for ref in listing]
    batches = [pa.RecordBatch.from_pylist(rows[at : at + batch], LISTING_SCHEMA) for at in range(0, len(rows), batch)]
    new = [row for one in found.new_ones(batches) for row in one.to_pylist()]
    first: dict[str, ObjectRef] = {}
    for refs in parts:
        for ref in refs:
            first.setdefault(ref.key, ref)
    assert new == [row for row in rows if row["key"] not in first]
    changed = [ref for ref in listing if ref.key in first and has_changed(ref, first[ref.key])]
    assert (found.new, found.changed) == (len(new), len(changed))
    assert found.unchanged == len(listing) - len(new) - len(changed)
    latest: dict[str, ObjectRef] = {}
    for ref in changed:
        latest.setdefault(ref.key, ref)
    expected = {
        2 * number: [(row, latest[ref.key]) for row, ref in enumerate(refs) if stale(ref, latest)]
        for number, refs in enumerate(parts)
    }
    revised = {
        number: [(row["row"], ObjectRef(row["key"], row["size"], row["etag"])) for row in table.to_pylist()]
        for number, table in found.revised()
    }
    assert revised == {number: rows for number, rows in expected.items() if rows}


def stale(known: ObjectRef, latest: dict[str, ObjectRef]) -> bool:
    return known.key in latest and has_changed(latest[known.key], known)


def test_a_key_that_a_manifest_names_twice_is_redone_twice(here: Place, card: Path, tmp_path: Path) -> None:
    def manifest(etag: str) -> Path:
        keys = ["0.png", "1.png", "0.png"]
        rows = [{"uri": f"{here.source}/{key}", "etag": etag if key == "0.png" else None} for key in keys]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "keys.parquet")
        return tmp_path / "keys.parquet"

    infermill.run(manifest("old"), card, here.output, here.options)
    summary = infermill.run(manifest("new"), card, here.output, here.options, existing="append")
    assert (summary.new, summary.changed, summary.unchanged) == (0, 2, 1)
    assert infermill.read(here.output)["etag"].to_pylist() == ["new", None, "new"]
