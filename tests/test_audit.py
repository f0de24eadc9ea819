"""Status and verify, against jobs that are damaged in every way that a part, a plan or a folder can be."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import infermill
from infermill import JobStatus, Options, Verification
from infermill.audit import MAX_PROBLEMS, PartitionStatus
from infermill.errors import JobMismatchError, StoreError, UsageError
from infermill.job import Existing
from infermill.output import Output
from tests.networks import tiny_classifier
from tests.servers import Bucket
from tests.test_engines import CARD, png


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten photos and an empty file, in partitions of four, the last of which was appended."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "photos").mkdir()
    tiny_classifier(folder / "tiny.onnx", classes=10, size=32)
    (folder / "model.yaml").write_text(CARD)
    for number in range(8):
        (folder / f"photos/{number}.png").write_bytes(png(number))
    run(folder)
    (folder / "photos/8.png").write_bytes(png(8))
    (folder / "photos/9.png").touch()
    run(folder, "append")
    return folder


def run(folder: Path, existing: Existing = "resume") -> infermill.Summary:
    options = Options(partition_objects=4)
    return infermill.run(folder / "photos", folder / "model.yaml", folder / "out", options, existing=existing)


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of its output, to be damaged."""
    return Path(shutil.copytree(finished / "out", tmp_path / "out"))


def test_a_finished_job(out: Path) -> None:
    assert infermill.status(out) == JobStatus(
        output=str(out),
        planned=10,
        done=10,
        ok=9,
        failed=1,
        left=0,
        partitions=3,
        partitions_done=3,
        partitions_left=0,
        failures_by_code={"empty": 1},
        example_keys={"empty": "9.png"},
        success=True,
        appended=1,
        by_partition=(PartitionStatus(0, 4, 4, 0), PartitionStatus(1, 4, 4, 0), PartitionStatus(2, 2, 1, 1)),
    )
    assert infermill.verify(out) == Verification(
        output=str(out), partitions=3, objects=10, ok=9, failed=1, problems=(), problem_count=0
    )


def test_an_unfinished_job(out: Path) -> None:
    (out / "part-00001.parquet").unlink()
    (out / "_SUCCESS").unlink()
    status = infermill.status(out)
    assert (status.planned, status.done, status.left, status.success) == (10, 6, 4, False)
    assert (status.partitions_done, status.partitions_left) == (2, 1)
    assert status.by_partition[1] == PartitionStatus(1, 4, None, None)
    found = infermill.verify(out)
    assert found.problems == ("part-00001.parquet is missing", "there is no _SUCCESS: the job is not finished")
    assert (found.objects, found.ok, found.failed) == (10, 5, 1)


def edited(part: Path, edit: Callable[[pa.Table], pa.Table]) -> None:
    """Rewrite a part as a well-meant script would: same schema, same metadata."""
    table = pq.read_table(part)
    metadata = pq.read_metadata(part).metadata
    pq.write_table(edit(table).replace_schema_metadata(metadata), part)


def with_column(name: str, values: list[object]) -> Callable[[pa.Table], pa.Table]:
    def edit(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index(name)
        return table.set_column(place, table.field(place), pa.array(values, table.field(place).type))

    return edit


ERROR = {"stage": "fetch", "code": "missing", "message": "gone"}
EDITS = {
    "a key": (with_column("key", ["0.png", "1.png", "2.png", "x.png"]), "does not hold the keys of its partition"),
    "keys in another order": (lambda t: t.take([1, 0, 2, 3]), "does not hold the keys of its partition"),
    "a row twice": (lambda t: t.take([0, 1, 2, 2]), "does not hold the keys of its partition"),
    "a row less": (lambda t: t.slice(1), "does not hold the keys of its partition"),
    "a prediction": (lambda t: t.set_column(3, t.field(3), t["top"].take([0, 0, 2, 3])), "its sha256 differs"),
    "an error beside a prediction": (
        with_column("error", [None, ERROR, None, None]),
        "1 rows with neither or both of a prediction and an error",
    ),
    "no prediction and no error": (with_column("top", [None, None, [], []]), "2 rows with neither or both"),
    "an error instead of a prediction": (
        lambda t: with_column("top", [None, [], [], []])(with_column("error", [ERROR, None, None, None])(t)),
        "says 4 predicted and 0 failed of itself, and holds other rows",
    ),
    "a column less": (lambda t: t.drop_columns(["size"]), "does not have the columns of a part"),
    "another type": (
        lambda t: t.set_column(2, "size", t["size"].cast(pa.int32())),
        "does not have the columns of a part",
    ),
    "another prediction": (
        lambda t: t.set_column(3, "top", pa.array([[1]] * 4, pa.list_(pa.int64()))),
        "has another schema than the parts before it",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_part_is_found(out: Path, name: str) -> None:
    edit, told = EDITS[name]
    edited(out / "part-00000.parquet", edit)
    found = infermill.verify(out)
    assert any(told in problem for problem in found.problems), found.problems
    assert "part-00000.parquet is not as it was written: its sha256 differs" in found.problems


def test_each_flipped_byte_of_a_part_is_found(out: Path) -> None:
    part = out / "part-00000.parquet"
    content = part.read_bytes()
    for place in range(0, len(content), 97):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        part.write_bytes(damaged)
        problems = infermill.verify(out).problems
        # In the footer, what nobody reads may say anything: the statistics, who wrote the file.
        footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
        assert problems or place >= footer, place


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not Parquet at all"])
def test_a_part_that_is_no_part_is_found(out: Path, content: bytes) -> None:
    (out / "part-00001.parquet").write_bytes(content)
    (problem, *_) = infermill.verify(out).problems
    assert problem.startswith("part-00001.parquet is damaged, or infermill did not write it: ")
    with pytest.raises(StoreError, match="infermill did not write"):
        infermill.status(out)


def test_what_a_reader_would_take_for_a_part_is_found(out: Path) -> None:
    for name in ("part-00003.parquet", "part-00001-copy.parquet", "mine.parquet"):
        shutil.copy(out / "part-00001.parquet", out / name)
    assert infermill.verify(out).problems == tuple(
        f"{name} is no part of this job, and its rows are read with the others"
        for name in ("mine.parquet", "part-00001-copy.parquet", "part-00003.parquet")
    )


def test_a_part_in_the_place_of_another_is_found(out: Path) -> None:
    shutil.copy(out / "part-00000.parquet", out / "part-00001.parquet")
    problems = infermill.verify(out).problems
    assert "part-00001.parquet does not hold the keys of its partition" in problems


def test_a_part_of_another_job_is_found(finished: Path, out: Path, tmp_path: Path) -> None:
    options = Options(partition_objects=4)
    infermill.run(finished / "photos", finished / "model.yaml", tmp_path / "other", options)
    shutil.copy(tmp_path / "other/part-00000.parquet", out / "part-00000.parquet")
    assert infermill.verify(out).problems[0] == "part-00000.parquet belongs to another job"
    with pytest.raises(JobMismatchError, match="belongs to another job"):
        infermill.status(out)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("planned", 11),
        ("ok", 10),
        ("failed", 0),
        ("failures_by_code", {"missing": 1}),
        ("parts", [[0, 4, 0], [1, 4, 0]]),
    ],
)
def test_a_success_that_says_otherwise_is_found(out: Path, field: str, value: object) -> None:
    success = json.loads((out / "_SUCCESS").read_text()) | {field: value}
    (out / "_SUCCESS").write_text(json.dumps(success))
    assert infermill.verify(out).problems == (f"_SUCCESS has other {field} than the parts",)


def test_a_success_that_cannot_be_read_is_found(out: Path) -> None:
    (out / "_SUCCESS").write_text("[]")
    assert infermill.verify(out).problem_count == 5


def test_the_next_run_corrects_success(finished: Path) -> None:
    success = finished / "out/_SUCCESS"
    kept = success.read_bytes()
    success.write_text(json.dumps(json.loads(kept) | {"ok": 1}))
    assert run(finished).model_loads == 0
    assert infermill.verify(finished / "out").problems == ()
    corrected = success.read_bytes()
    assert run(finished).model_loads == 0
    assert success.read_bytes() == corrected


def test_a_damaged_plan_is_found(out: Path) -> None:
    first, second = sorted((out / "_infermill/plan").iterdir(), key=lambda path: -path.stat().st_size)
    content = bytearray(first.read_bytes())
    content[10] ^= 1  # in the first key
    first.write_bytes(content)
    (problem,) = [one for one in infermill.verify(out).problems if "sha256" in one]
    assert problem == f"the plan {first.name.partition('-')[0]} is not as it was written: its sha256 differs"
    second.unlink()
    found = infermill.verify(out)
    assert f"the plan file {second.name} is missing or damaged" in found.problems
    assert found.ok + found.failed == 10
    with pytest.raises(StoreError, match=f"{second.name} does not exist"):
        infermill.status(out)


def test_many_problems_are_shortened(out: Path, tmp_path: Path) -> None:
    for number in range(100):
        (out / f"stray-{number:03d}.parquet").touch()
    found = infermill.verify(out)
    assert (len(found.problems), found.problem_count) == (MAX_PROBLEMS, 100)


def test_nothing_to_look_at_is_bad_usage(tmp_path: Path) -> None:
    for look in (infermill.status, infermill.verify):
        with pytest.raises(UsageError, match="holds no job"):
            look(tmp_path)


def test_on_s3(finished: Path, bucket: Bucket) -> None:
    place = Output(f"{bucket.uri}/copy", bucket.options)
    for path in (finished / "out").rglob("*"):
        if path.is_file():
            place.create(str(path.relative_to(finished / "out")), path.read_bytes())
    assert infermill.status(place.uri, bucket.options).left == 0
    assert infermill.verify(place.uri, bucket.options).problems == ()
    place.remove(["part-00002.parquet"])
    assert infermill.status(place.uri, bucket.options).left == 2
    assert infermill.verify(place.uri, bucket.options).problem_count == 2
