"""Jobs on the file system, end to end, through the Python API."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import infermill
from infermill import CardOptions, Options, estimation
from infermill.errors import JobMismatchError, ModelError, SourceError, UsageError
from infermill.meter import Meter
from infermill.models.model import Model
from infermill.models.opening import open_model
from infermill.output import Output
from infermill.record import check_same_job, discard_record, fingerprint, read_record
from infermill.runtimes.openvino import precisions
from infermill.tuning import Work
from infermill.worker import load_predictor
from tests.networks import tiny_classifier
from tests.servers import Answer, ScriptedStore

CLASSES = 10


@pytest.fixture
def card(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    tiny_classifier(folder / "tiny.onnx", classes=CLASSES, size=32)
    (folder / "labels.txt").write_text("\n".join(f"class {i}" for i in range(CLASSES)))
    path = folder / "model.yaml"
    path.write_text(
        "name: tiny\nfiles: {onnx: tiny.onnx}\nlabels: labels.txt\n"
        "preprocess: {resize: {exact: [32, 32]}, scale: 0.00392156862745098}\n"
        "output: {activation: softmax, top_k: 3}\n"
    )
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    write_photos(folder, 20)
    return folder


def write_photos(folder: Path, count: int, first: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(first, first + count):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((48, 40)).save(folder / f"photo-{number:03d}.png")


SMALL = Options(partition_objects=6)


def test_each_object_has_one_row_with_its_prediction(card: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "bad.jpg").write_bytes(b"<html>404</html>")
    (photos / "empty.png").touch()
    summary = infermill.run(photos, card, tmp_path / "out", SMALL)
    assert (summary.planned, summary.ok, summary.failed) == (22, 20, 2)
    assert summary.failures_by_code == {"unsupported": 1, "empty": 1}
    assert summary.example_keys == {"unsupported": "bad.jpg", "empty": "empty.png"}
    assert summary.model_loads == 1
    rows = infermill.read(tmp_path / "out")
    assert rows.column_names == ["key", "etag", "size", "top", "error"]
    assert rows["key"].to_pylist() == sorted(path.name for path in photos.iterdir())
    assert rows["size"].to_pylist() == [path.stat().st_size for path in sorted(photos.iterdir())]
    predict = infermill.load_model(card)
    for row in rows.to_pylist():
        expected = predict([photos / row["key"]])[0]
        if row["error"]:
            assert row["top"] is None
            assert expected.error is not None
            assert row["error"]["code"] == expected.error.code
        else:
            assert expected.top is not None
            assert [one["index"] for one in row["top"]] == [one.index for one in expected.top]
            assert [one["label"] for one in row["top"]] == [f"class {one.index}" for one in expected.top]
            np.testing.assert_allclose(
                [one["score"] for one in row["top"]], [one.score for one in expected.top], atol=1e-6
            )


def test_predictions_differ_between_photos(card: Path, photos: Path, tmp_path: Path) -> None:
    infermill.run(photos, card, tmp_path / "out")
    scores = {row[0]["score"] for row in infermill.read(tmp_path / "out")["top"].to_pylist()}
    assert len(scores) > 15


def test_the_output_is_as_the_protocol_says(card: Path, photos: Path, tmp_path: Path) -> None:
    summary = infermill.run(photos, card, tmp_path / "out", SMALL)
    out = tmp_path / "out"
    parts = sorted(path.name for path in out.glob("*.parquet"))
    assert parts == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet", "part-00003.parquet"]
    assert sorted(path.name for path in out.iterdir()) == ["_SUCCESS", "_infermill", *parts]
    success = json.loads((out / "_SUCCESS").read_text())
    assert success["parts"] == [[0, 6, 0], [1, 6, 0], [2, 6, 0], [3, 2, 0]]
    assert success["planned"] == success["ok"] + success["failed"] == 20
    assert success["digest"] == summary.digest
    metadata = pq.read_metadata(out / parts[0]).metadata
    assert len(metadata[b"infermill.write_id"]) == 32
    assert metadata[b"infermill.digest"].decode() == summary.digest
    schema = pq.read_schema(out / parts[0])
    assert schema.field("top").type.value_type.field("score").type == pa.float32()
    assert {pq.read_schema(out / part).remove_metadata() for part in parts} == {schema.remove_metadata()}


def test_the_plan_holds_every_key_with_size_and_etag(card: Path, photos: Path, tmp_path: Path) -> None:
    infermill.run(photos, card, tmp_path / "out", SMALL)
    (plan,) = (tmp_path / "out/_infermill/plan").iterdir()
    rows = pq.read_table(plan)
    assert rows["key"].to_pylist() == [path.name for path in sorted(photos.iterdir())]
    assert None not in rows["etag"].to_pylist()


def test_a_finished_job_is_not_repeated(card: Path, photos: Path, tmp_path: Path) -> None:
    first = infermill.run(photos, card, tmp_path / "out", SMALL)
    again = infermill.run(photos, card, tmp_path / "out", SMALL)
    assert again.model_loads == 0
    assert (again.planned, again.ok, again.digest) == (first.planned, first.ok, first.digest)


def test_only_missing_partitions_are_predicted(card: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "bad.jpg").write_bytes(b"nothing")
    undisturbed = infermill.run(photos, card, tmp_path / "out", SMALL)
    expected = infermill.read(tmp_path / "out")
    kept = (tmp_path / "out/part-00000.parquet").stat().st_ino
    for name in ("part-00001.parquet", "part-00003.parquet", "_SUCCESS"):
        (tmp_path / "out" / name).unlink()
    meters: list[Meter] = []
    summary = infermill.run(photos, card, tmp_path / "out", SMALL, display=_into(meters))
    assert [(meter.todo, meter.objects) for meter in meters] == [(6 + 3, 6 + 3)]
    assert (summary.planned, summary.ok, summary.failures_by_code) == (21, 20, undisturbed.failures_by_code)
    assert (tmp_path / "out/part-00000.parquet").stat().st_ino == kept
    _assert_same_rows(infermill.read(tmp_path / "out"), expected)
    assert (tmp_path / "out/_SUCCESS").exists()


def _into(meters: list[Meter]) -> Callable[[Meter], AbstractContextManager[None]]:
    def display(meter: Meter) -> AbstractContextManager[None]:
        meters.append(meter)
        return nullcontext()

    return display


def _assert_same_rows(rows: pa.Table, expected: pa.Table) -> None:
    plain = ["key", "etag", "size", "error"]
    assert rows.select(plain).equals(expected.select(plain))
    for row, other in zip(rows["top"].to_pylist(), expected["top"].to_pylist(), strict=True):
        assert (row is None) == (other is None)
        if row is not None:
            assert [one["index"] for one in row] == [one["index"] for one in other]
            np.testing.assert_allclose([one["score"] for one in row], [one["score"] for one in other], atol=1e-6)


def test_a_resumed_job_keeps_its_plan(card: Path, photos: Path, tmp_path: Path) -> None:
    infermill.run(photos, card, tmp_path / "out", SMALL)
    write_photos(photos, 3, first=100)
    assert infermill.run(photos, card, tmp_path / "out", SMALL).planned == 20


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"limit": 5}, "limit: None -> 5"),
        ({"suffix": (".png",)}, "suffix: None -> ['.png']"),
        ({"decode": "fast"}, "decode: exact -> fast"),
        ({"max_pixels": 1_000_000}, "max_pixels: 178956970 -> 1000000"),
    ],
)
def test_another_configuration_is_refused(
    card: Path, photos: Path, tmp_path: Path, change: dict[str, object], named: str
) -> None:
    infermill.run(photos, card, tmp_path / "out", SMALL)
    with pytest.raises(JobMismatchError) as caught:
        infermill.run(photos, card, tmp_path / "out", replace(SMALL, **change))  # type: ignore[arg-type]
    assert named in caught.value.message
    assert caught.value.exit_code == 2


def test_another_precision_is_refused(card: Path, photos: Path, tmp_path: Path) -> None:
    infermill.run(photos, card, tmp_path / "out", SMALL)
    lower = CardOptions(precision="bf16")
    if "bf16" in precisions():
        with pytest.raises(JobMismatchError, match=r"(?s)model: sha256:.*precision: fp32 -> bf16\n") as caught:
            infermill.run(photos, card, tmp_path / "out", SMALL, lower)
        assert "the card says the same" not in caught.value.message
        assert infermill.run(photos, card, tmp_path / "lower", SMALL, lower).precision == "bf16"
        with pytest.raises(JobMismatchError, match=r"(?s)model: sha256:.*precision: bf16 -> fp32\n"):
            infermill.run(photos, card, tmp_path / "lower", SMALL)
    else:
        with pytest.raises(UsageError, match="has no bf16"):
            infermill.run(photos, card, tmp_path / "new", SMALL, lower)
        assert not (tmp_path / "new").exists()


def test_a_precision_that_differs_is_named(card: Path, photos: Path, tmp_path: Path) -> None:
    infermill.run(photos, card, tmp_path / "out", SMALL)
    place = Output(str(tmp_path / "out"), SMALL)
    record = read_record(place)
    assert record is not None
    lower = open_model(card, SMALL, CardOptions(precision="fp16"))
    with pytest.raises(JobMismatchError, match=r"model: sha256:.*\n  precision: fp32 -> fp16\n"):
        check_same_job(record, fingerprint(str(photos), lower, SMALL), place.uri)


def test_a_job_that_says_no_precision_was_in_fp32(card: Path, photos: Path, tmp_path: Path) -> None:
    infermill.run(photos, card, tmp_path / "out", SMALL)
    job = tmp_path / "out/_infermill/job.json"
    record = json.loads(job.read_text())
    del record["fingerprint"]["precision"]
    job.write_text(json.dumps(record))
    assert infermill.run(photos, card, tmp_path / "out", SMALL).precision == "fp32"


def test_the_precision_of_a_job_is_kept_for_retry(card: Path, photos: Path, tmp_path: Path) -> None:
    if "bf16" not in precisions():
        pytest.skip("this processor has no bf16")
    infermill.run(photos, card, tmp_path / "out", SMALL, CardOptions(precision="bf16"))
    assert infermill.retry(tmp_path / "out").precision == "bf16"


def test_another_model_or_source_is_refused(card: Path, photos: Path, tmp_path: Path) -> None:
    infermill.run(photos, card, tmp_path / "out", SMALL)
    shutil.copytree(photos, tmp_path / "others")
    with pytest.raises(JobMismatchError, match=r"source: .*photos -> .*others"):
        infermill.run(tmp_path / "others", card, tmp_path / "out", SMALL)
    card.write_text(card.read_text().replace("exact: [32, 32]", "exact: [32, 32], filter: bicubic"))
    with pytest.raises(JobMismatchError, match=r"(?s)model: sha256.*preprocess.resize: .*bilinear.*bicubic"):
        infermill.run(photos, card, tmp_path / "out", SMALL)


def test_a_source_is_the_same_however_it_is_written(
    card: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    infermill.run(photos, card, tmp_path / "out", SMALL)
    monkeypatch.chdir(tmp_path)
    for source in ("photos", "photos/", "./photos", f"file://{photos}"):
        assert infermill.run(source, card, "out", SMALL).model_loads == 0


def test_limit_takes_the_first_objects(card: Path, photos: Path, tmp_path: Path) -> None:
    infermill.run(photos, card, tmp_path / "out", Options(limit=7))
    assert infermill.read(tmp_path / "out")["key"].to_pylist() == [f"photo-{i:03d}.png" for i in range(7)]


def test_a_lost_reply_to_the_job_file_costs_nothing(card: Path, photos: Path, scripted_store: ScriptedStore) -> None:
    options = replace(SMALL, endpoint_url=scripted_store.options.endpoint_url, region=scripted_store.options.region)
    scripted_store.lost_replies = 20
    assert infermill.run(photos, card, "s3://jobs/out", options).ok == 20
    assert infermill.run(photos, card, "s3://jobs/out", options).model_loads == 0


def test_a_job_file_that_cannot_be_read_back_keeps_its_plan(
    card: Path, photos: Path, scripted_store: ScriptedStore
) -> None:
    options = replace(SMALL, endpoint_url=scripted_store.options.endpoint_url, region=scripted_store.options.region)
    scripted_store.answer("jobs/out/_infermill/job.json", Answer(404, "NoSuchKey"), times=2, method="GET")
    with pytest.raises(infermill.StoreError, match="can neither be created nor read"):
        infermill.run(photos, card, "s3://jobs/out", options)
    assert infermill.run(photos, card, "s3://jobs/out", options).ok == 20


def test_two_drivers_at_once_end_well(card: Path, photos: Path, tmp_path: Path) -> None:
    summaries: list[infermill.Summary] = []
    drivers = [
        threading.Thread(target=lambda: summaries.append(infermill.run(photos, card, tmp_path / "out", SMALL)))
        for _ in range(2)
    ]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert [(summary.planned, summary.ok) for summary in summaries] == [(20, 20)] * 2
    assert infermill.read(tmp_path / "out").num_rows == 20
    assert len(list((tmp_path / "out/_infermill/plan").iterdir())) == 1


def test_parts_of_another_job_are_not_taken_for_ours(card: Path, photos: Path, tmp_path: Path) -> None:
    infermill.run(photos, card, tmp_path / "out", SMALL)
    shutil.rmtree(tmp_path / "out/_infermill")
    (tmp_path / "out/_SUCCESS").unlink()
    with pytest.raises(JobMismatchError, match=r"part-0000\d\.parquet belongs to another job"):
        infermill.run(photos, card, tmp_path / "out", SMALL)


def test_a_stray_part_is_named(card: Path, photos: Path, tmp_path: Path) -> None:
    infermill.run(photos, card, tmp_path / "out", SMALL)
    infermill.run(photos, card, tmp_path / "other", SMALL)
    shutil.copy(tmp_path / "other/part-00000.parquet", tmp_path / "out/part-00007.parquet")
    with pytest.raises(JobMismatchError, match=r"part-00007\.parquet belongs to another job"):
        infermill.run(photos, card, tmp_path / "out", SMALL)


def test_a_part_under_the_name_of_another_is_told(card: Path, photos: Path, tmp_path: Path) -> None:
    infermill.run(photos, card, tmp_path / "out", SMALL)
    (tmp_path / "out/part-00001.parquet").rename(tmp_path / "out/part-00007.parquet")
    with pytest.raises(infermill.StoreError, match=r"part-00007\.parquet holds partition 1"):
        infermill.run(photos, card, tmp_path / "out", SMALL)
    (tmp_path / "out/part-00007.parquet").rename(tmp_path / "out/part-00001.parquet")
    shutil.copy(tmp_path / "out/part-00000.parquet", tmp_path / "out/part-00001.parquet")
    with pytest.raises(infermill.StoreError, match=r"part-00001\.parquet holds partition 0"):
        infermill.run(photos, card, tmp_path / "out", SMALL)


def test_a_manifest_with_other_content_is_another_job(
    card: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    keys = tmp_path / "keys.txt"
    keys.write_text("photos/photo-000.png\nphotos/photo-001.png\n")
    assert infermill.run("keys.txt", card, "out").planned == 2
    assert infermill.run(keys.rename(tmp_path / "moved.txt"), card, "out").model_loads == 0
    keys.write_text("photos/photo-002.png\n")
    with pytest.raises(JobMismatchError, match="source: manifest sha256:"):
        infermill.run("keys.txt", card, "out")


def test_a_damaged_job_file_is_told(card: Path, photos: Path, tmp_path: Path) -> None:
    infermill.run(photos, card, tmp_path / "out", SMALL)
    for content in ("{", "[]", '{"format": 1}', '{"format": 99, "plan": {}}'):
        (tmp_path / "out/_infermill/job.json").write_text(content)
        with pytest.raises(JobMismatchError, match=r"job\.json is damaged, or not of format 2"):
            infermill.run(photos, card, tmp_path / "out", SMALL)


def test_a_damaged_plan_is_told(card: Path, photos: Path, tmp_path: Path) -> None:
    infermill.run(photos, card, tmp_path / "out", SMALL)
    (plan,) = (tmp_path / "out/_infermill/plan").iterdir()
    plan.write_bytes(plan.read_bytes()[:100])
    (tmp_path / "out/part-00001.parquet").unlink()
    with pytest.raises(infermill.StoreError, match=r"plan file .* is damaged"):
        infermill.run(photos, card, tmp_path / "out", SMALL)


def test_names_that_are_not_utf8(card: Path, photos: Path, tmp_path: Path) -> None:
    source, output = (tmp_path / os.fsdecode(name) for name in (b"ph\xff", b"out\xff"))
    photos.rename(source)
    assert infermill.run(source, card, output, SMALL).ok == 20
    assert infermill.run(source, card, output, SMALL).model_loads == 0


def test_a_write_error_stops_the_job_and_not_only_the_caller(card: Path, photos: Path, tmp_path: Path) -> None:
    meters: list[Meter] = []
    keys = [str(photos / f"photo-{i % 20:03d}.png") for i in range(20_000)]
    (tmp_path / "keys.txt").write_text("\n".join(keys))
    (tmp_path / "out/part-00001.parquet").mkdir(parents=True)
    with pytest.raises(infermill.StoreError):
        infermill.run(tmp_path / "keys.txt", card, tmp_path / "out", SMALL, display=_into(meters))
    settled = meters[0].objects
    assert settled < 20_000
    time.sleep(0.3)
    assert meters[0].objects <= settled + 16


def test_what_changes_after_listing_is_a_row(card: Path, photos: Path, tmp_path: Path) -> None:
    infermill.run(photos, card, tmp_path / "out", SMALL)
    for path in (tmp_path / "out").glob("part-*"):
        path.unlink()
    (tmp_path / "out/_SUCCESS").unlink()
    (photos / "photo-004.png").unlink()
    (photos / "photo-005.png").write_bytes((photos / "photo-006.png").read_bytes())
    summary = infermill.run(photos, card, tmp_path / "out", SMALL)
    assert summary.failures_by_code == {"missing": 1, "changed": 1}
    assert summary.example_keys == {"missing": "photo-004.png", "changed": "photo-005.png"}


def test_nan_is_a_row_and_its_neighbours_are_predicted(card: Path, photos: Path, tmp_path: Path) -> None:
    tiny_classifier(card.parent / "tiny.onnx", classes=CLASSES, size=32, nan_on_black=True)
    Image.new("RGB", (40, 40)).save(photos / "black.png")
    summary = infermill.run(photos, card, tmp_path / "out")
    assert summary.failures_by_code == {"nonfinite": 1}
    assert summary.ok == 20
    row = infermill.read(tmp_path / "out").to_pylist()[0]
    assert (row["key"], row["top"], row["error"]["stage"]) == ("black.png", None, "predict")


def test_every_problem_of_the_model_comes_before_the_source_is_looked_at(card: Path, tmp_path: Path) -> None:
    (card.parent / "labels.txt").write_text("only\nthree\nlabels\n")
    with pytest.raises(ModelError, match=r"`labels` has 3, and .* has 10 classes"):
        infermill.run(tmp_path / "no-such-folder", card, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_misfit_that_only_the_loaded_network_tells_leaves_no_job(
    overwrite: bool, card: Path, photos: Path, tmp_path: Path
) -> None:
    tiny_classifier(card.parent / "tiny.onnx", CLASSES, classes_hidden=True)
    labels = (card.parent / "labels.txt").read_text()
    (card.parent / "labels.txt").write_text("only\nthree\nlabels\n")
    existing: Literal["overwrite", "resume"] = "overwrite" if overwrite else "resume"
    with pytest.raises(ModelError, match="answers 10 numbers per input in `shown`, and the card has 3 classes"):
        infermill.run(photos, card, tmp_path / "out", existing=existing)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    (card.parent / "labels.txt").write_text(labels)
    assert infermill.run(photos, card, tmp_path / "out").ok == 20
    assert infermill.verify(tmp_path / "out").problem_count == 0


def test_another_runs_job_is_not_taken_back(card: Path, photos: Path, tmp_path: Path) -> None:
    tiny_classifier(card.parent / "tiny.onnx", CLASSES, classes_hidden=True)
    out = Output(str(tmp_path / "out"), Options())
    infermill.run(photos, card, tmp_path / "out", Options(partition_objects=10))
    mine = read_record(out)
    assert mine is not None
    discard_record(out, mine)  # it has parts
    assert read_record(out) == mine
    infermill.run(photos, card, tmp_path / "out", existing="overwrite")
    for part in (tmp_path / "out").glob("part-*"):
        part.unlink()
    other = read_record(out)
    discard_record(out, mine)
    assert read_record(out) == other


def test_an_empty_source_is_an_error_and_leaves_no_job(card: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing/readme.txt").touch()
    with pytest.raises(SourceError, match="holds no objects"):
        infermill.run(tmp_path / "nothing", card, tmp_path / "out")
    assert not (tmp_path / "out/_infermill/job.json").exists()


def test_a_missing_source_is_an_error(card: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        infermill.run(tmp_path / "missing", card, tmp_path / "out")


def test_the_limit_of_pixels_is_that_of_the_options(card: Path, photos: Path, tmp_path: Path) -> None:
    Image.new("RGB", (48, 41), "teal").save(photos / "larger.png")
    summary = infermill.run(photos, card, tmp_path / "out", Options(max_pixels=48 * 40))
    assert (summary.ok, summary.failures_by_code, summary.example_keys) == (
        20,
        {"too_large": 1},
        {"too_large": "larger.png"},
    )


def test_the_decode_profile_is_that_of_the_options(card: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "photos/noise.jpg", quality=90)
    scores = []
    for options in (Options(decode="exact"), Options(decode="fast")):
        infermill.run(tmp_path / "photos", card, tmp_path / options.decode, options)
        (row,) = infermill.read(tmp_path / options.decode).to_pylist()
        (expected,) = infermill.load_model(card, options)([tmp_path / "photos/noise.jpg"])
        assert expected.top is not None
        scores.append(row["top"][0]["score"])
        assert scores[-1] == pytest.approx(expected.top[0].score, abs=1e-5)
    assert abs(scores[0] - scores[1]) > 1e-4


def test_an_estimate_writes_nothing_and_foresees_failures(card: Path, photos: Path, tmp_path: Path) -> None:
    for number in range(20):
        (photos / f"bad-{number}.jpg").write_bytes(b"nothing")
    before = sorted(tmp_path.rglob("*"))
    estimate = infermill.estimate(photos, card, SMALL)
    assert sorted(tmp_path.rglob("*")) == before
    assert (estimate.objects, estimate.probed, estimate.expected_failures) == (40, 40, 20)
    assert estimate.probe_failures == {"unsupported": 20}
    assert estimate.size_bytes == sum(path.stat().st_size for path in photos.iterdir())
    assert estimate.partitions == 7
    assert estimate.seconds == pytest.approx(40 / estimate.objects_per_second)


def test_an_estimate_takes_the_cores_of_all_workers(card: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Options] = []
    rows: list[int] = []

    def load(model: Model, options: Options, meter: Meter, work: Work) -> Any:
        taken.append(options)
        rows.append(work.rows)
        return load_predictor(model, options, meter, work)

    monkeypatch.setattr(estimation, "load_predictor", load)
    for threads in (None, 2):
        infermill.estimate(photos, card, replace(SMALL, workers=3, threads=threads))
    assert [(one.workers, one.threads) for one in taken] == [(1, None), (1, 6)]
    assert rows == [20, 20]


def test_an_estimate_probes_a_sample_of_a_large_source(card: Path, photos: Path) -> None:
    write_photos(photos, 180, first=20)
    estimate = infermill.estimate(photos, card)
    assert (estimate.objects, estimate.probed) == (200, 64)


def test_an_embedding_has_one_vector_a_row(photos: Path, tmp_path: Path) -> None:
    tiny_classifier(tmp_path / "tiny.onnx", classes=16, size=32)
    options = infermill.CardOptions(task="embedding", exact=(32, 32))
    (photos / "bad.jpg").touch()
    infermill.run(photos, tmp_path / "tiny.onnx", tmp_path / "out", SMALL, options)
    rows = infermill.read(tmp_path / "out")
    assert rows.schema.field("embedding").type == pa.list_(pa.float32(), 16)
    vectors = rows["embedding"].to_pylist()
    assert vectors[0] is None
    (expected,) = infermill.load_model(tmp_path / "tiny.onnx", card_options=options)([photos / "photo-000.png"])
    assert expected.embedding is not None
    np.testing.assert_allclose(vectors[1], expected.embedding, atol=1e-6)


def test_raw_outputs_keep_name_type_and_shape(photos: Path, tmp_path: Path) -> None:
    tiny_classifier(tmp_path / "tiny.onnx", classes=4, size=32)
    (photos / "bad.jpg").touch()
    options = infermill.CardOptions(task="raw", exact=(32, 32))
    infermill.run(photos, tmp_path / "tiny.onnx", tmp_path / "out", SMALL, options)
    rows = infermill.read(tmp_path / "out")
    (field,) = rows.schema.field("outputs").type
    assert field.type == pa.list_(pa.float32(), 4)
    assert rows["outputs"][0].as_py() is None
    (expected,) = infermill.load_model(tmp_path / "tiny.onnx", card_options=options)([photos / "photo-000.png"])
    assert expected.outputs is not None
    values = np.asarray(expected.outputs[field.name], np.float32)
    np.testing.assert_allclose(rows["outputs"][1].as_py()[field.name], values, atol=1e-6)


def test_a_partition_without_any_prediction_has_the_same_schema(card: Path, photos: Path, tmp_path: Path) -> None:
    for number in range(6):
        (photos / f"bad-{number}.jpg").touch()
    infermill.run(photos, card, tmp_path / "out", SMALL)
    schemas = {pq.read_schema(path).remove_metadata() for path in (tmp_path / "out").glob("*.parquet")}
    assert len(schemas) == 1
    assert infermill.read(tmp_path / "out")["top"].null_count == 6


def test_batches_are_the_rows(card: Path, photos: Path, tmp_path: Path) -> None:
    infermill.run(photos, card, tmp_path / "out", SMALL)
    batches = list(infermill.read_batches(tmp_path / "out"))
    assert len(batches) == 4
    assert pa.Table.from_batches(batches).equals(infermill.read(tmp_path / "out"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_that_cannot_be_written_is_an_error(card: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(infermill.StoreError, match="denied"):
        infermill.run(photos, card, tmp_path / "locked/out")
