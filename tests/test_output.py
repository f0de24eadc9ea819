import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infermill import read, read_batches
from infermill.errors import JobMismatchError, StoreError, UsageError
from infermill.output import Output
from infermill.parts import part_name, rows_table
from infermill.rows import tables
from infermill.types import Failure, ObjectRef, PartitionReport, StoreOptions
from tests.servers import Answer, Bucket, ScriptedStore, free_port

NOTES = {"digest": "sha256:abc", "runtime": "openvino"}
REPORT = PartitionReport(0, 1, "openvino", "fp32", {"missing": 1}, {"missing": "b.jpg"})


@pytest.fixture(params=["folder", "bucket"])
def output(request: pytest.FixtureRequest) -> Output:
    """An output that is not there yet, on a file system and on S3."""
    if request.param == "folder":
        tmp_path: Path = request.getfixturevalue("tmp_path")
        return Output(str(tmp_path / "my jobs" / "out"), StoreOptions())
    bucket: Bucket = request.getfixturevalue("bucket")
    return Output(f"{bucket.uri}/my jobs/out/", bucket.options)


def rows(label: str = "cat") -> pa.Table:
    refs = [ObjectRef("a.jpg", 3, "x"), ObjectRef("b.jpg")]
    top = pa.array([[{"index": 0, "label": label, "score": 0.5}], None])
    return rows_table(refs, {"top": top}, {1: Failure("fetch", "missing", "gone")})


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_file_is_created_once_and_stays_as_it_was(output: Output) -> None:
    assert output.read("_infermill/job.json") is None
    assert output.create("_infermill/job.json", b"first") is True
    assert output.create("_infermill/job.json", b"second") is False
    assert output.read("_infermill/job.json") == b"first"
    assert output.read_existing("_infermill/job.json") == b"first"
    with pytest.raises(StoreError, match="_SUCCESS is gone"):
        output.read_existing("_SUCCESS")
    assert output.create("empty", b"") is True
    assert output.read("empty") == b""


def test_names_and_parts_are_those_of_files_directly_below(output: Output) -> None:
    assert output.names() == []
    assert output.parts() == {}
    for name in ("_SUCCESS", "part-00007.parquet", "part-123456.parquet", "part-8.parquet", "part-00009.parquet.tmp"):
        output.create(name, b"x")
    output.create("_infermill/plan/x-00000.parquet", b"x")
    output.create("sub/part-00001.parquet", b"x")
    output.create("part-00002.parquet/_temporary", b"x")
    assert output.parts() == {7: "part-00007.parquet", 123456: "part-123456.parquet"}
    assert output.names("_infermill/plan") == ["x-00000.parquet"]
    output.delete(["part-00007.parquet", "never-there", "_infermill/plan/x-00000.parquet"])
    assert list(output.parts()) == [123456]
    assert output.names("_infermill/plan") == []


def test_one_of_sixteen_threads_creates_a_file(output: Output) -> None:
    for turn in range(8):
        start = threading.Barrier(16)

        def create(number: int) -> bool:
            start.wait()  # noqa: B023
            return output.create(f"file-{turn}", bytes([number]) * 100_000)  # noqa: B023

        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(create, range(16)))
        assert won.count(True) == 1
        assert output.read(f"file-{turn}") == bytes([won.index(True)]) * 100_000


def test_one_of_four_processes_creates_a_file(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from infermill.output import Output\n"
        "from infermill.types import StoreOptions\n"
        f"output = Output({str(tmp_path / 'out')!r}, StoreOptions())\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "mine = sys.argv[1].encode() * 50_000\n"
        "print(sum(output.create(f'file-{number}', mine) for number in range(40)))\n"
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", program, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for name in "abcd"
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"ready\n"
    created = 0
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(b"\n")
        worker.stdin.flush()
    for worker in workers:
        created += int(worker.communicate()[0])
        assert worker.returncode == 0
    assert created == 40
    assert files_in(tmp_path / "out") == sorted(f"file-{number}" for number in range(40))
    for path in (tmp_path / "out").iterdir():
        content = path.read_bytes()
        assert len(content) == 50_000
        assert len(set(content)) == 1


def test_nothing_else_is_left_in_the_folder(tmp_path: Path) -> None:
    output = Output(str(tmp_path), StoreOptions())
    output.create("part-00000.parquet", b"first")
    output.create("part-00000.parquet", b"second")
    output.probe()
    assert files_in(tmp_path) == ["part-00000.parquet"]


@pytest.mark.parametrize("nameless", [True, False])
def test_a_killed_writer_leaves_no_half_file_that_a_reader_would_see(tmp_path: Path, nameless: bool) -> None:
    program = (
        "from infermill.output import Output, part_name\n"
        "from infermill.types import StoreOptions\n"
        "import hashlib, os\n"
        f"{'' if nameless else 'del os.O_TMPFILE'}\n"
        f"output = Output({str(tmp_path)!r}, StoreOptions())\n"
        "for number in range(1_000):\n"
        "    body = number.to_bytes(4, 'big') * 1_000_000\n"
        "    output.create(part_name(number), hashlib.sha256(body).digest() + body)\n"
    )
    worker = subprocess.Popen([sys.executable, "-c", program])
    try:
        deadline = time.monotonic() + 60
        while not (list(tmp_path.glob("part-00001.*")) and (nameless or list(tmp_path.glob(".*")))):
            assert time.monotonic() < deadline
    finally:
        worker.send_signal(signal.SIGKILL)
        assert worker.wait() == -signal.SIGKILL
    parts = sorted(tmp_path.glob("*.parquet"))
    for part in parts:
        content = part.read_bytes()
        assert content[:32] == hashlib.sha256(content[32:]).digest()
    hidden = [name for name in os.listdir(tmp_path) if name.startswith(".")]  # noqa: PTH208
    assert len(hidden) <= (0 if nameless else 1)
    assert len(os.listdir(tmp_path)) == len(parts) + len(hidden)  # noqa: PTH208
    # The next worker goes on as if nothing had been there.
    output = Output(str(tmp_path), StoreOptions())
    assert sorted(output.parts()) == list(range(len(parts)))
    assert output.create(part_name(len(parts)), b"whole") is True


def test_a_part_holds_the_rows_and_the_report(output: Output) -> None:
    assert output.create_part(0, rows(), REPORT, NOTES) == REPORT
    assert output.parts() == {0: "part-00000.parquet"}
    assert output.reports(NOTES) == {0: REPORT}
    table = pq.read_table(pa.BufferReader(output.read_existing("part-00000.parquet")))
    assert table.schema.metadata[b"infermill.digest"] == b"sha256:abc"
    assert len(table.schema.metadata[b"infermill.write_id"]) == 32
    assert table.to_pylist() == [
        {
            "key": "a.jpg",
            "etag": "x",
            "size": 3,
            "top": [{"index": 0, "label": "cat", "score": 0.5}],
            "error": None,
        },
        {
            "key": "b.jpg",
            "etag": None,
            "size": None,
            "top": None,
            "error": {"stage": "fetch", "code": "missing", "message": "gone"},
        },
    ]


def test_the_second_writer_of_a_part_adopts_the_first_ones(output: Output) -> None:
    output.create_part(3, rows("cat"), REPORT, NOTES)
    adopted = output.create_part(3, rows("dog"), PartitionReport(3, 2, "openvino", "fp32"), NOTES)
    assert adopted == REPORT
    (table,) = tables(output)
    assert table["top"][0][0]["label"].as_py() == "cat"


def test_a_part_from_before_choices_were_told_is_read(output: Output) -> None:
    report = {"partition": 0, "ok": 2, "runtime": "openvino", "precision": "fp32"}
    notes = {f"infermill.{note}": value for note, value in NOTES.items()}
    output.create(part_name(0), parquet(notes | {"infermill.report": json.dumps(report)}))
    (found,) = output.reports(NOTES).values()
    assert (found.ok, found.choice) == (2, {})


def test_sixteen_twins_write_one_part_and_report_the_same(output: Output) -> None:
    start = threading.Barrier(16)

    def write(number: int) -> PartitionReport:
        start.wait()
        return output.create_part(0, rows(str(number)), PartitionReport(0, number, "openvino", "fp32"), NOTES)

    with ThreadPoolExecutor(16) as pool:
        reports = set(pool.map(lambda number: write(number).ok, range(16)))
    (table,) = tables(output)
    assert reports == {int(table["top"][0][0]["label"].as_py())}


def test_a_writer_whose_reply_was_lost_finds_its_own_part(scripted_store: ScriptedStore) -> None:
    scripted_store.lost_replies = 1
    output = Output("s3://jobs/out", scripted_store.options)
    assert output.create_part(0, rows(), REPORT, NOTES) == REPORT
    assert list(scripted_store.objects) == ["/jobs/out/part-00000.parquet"]


def test_a_conflict_with_a_put_that_fails_is_tried_again(scripted_store: ScriptedStore) -> None:
    scripted_store.conflicts = 1
    output = Output("s3://jobs/out", scripted_store.options)
    assert output.create_part(0, rows(), REPORT, NOTES) == REPORT
    assert list(scripted_store.objects) == ["/jobs/out/part-00000.parquet"]


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_part_whose_store_breaks_down_is_told(method: str, scripted_store: ScriptedStore) -> None:
    output = Output("s3://jobs/out", scripted_store.options)
    output.create_part(0, rows(), REPORT, NOTES)
    scripted_store.answer("jobs/out/part-00000.parquet", Answer(403, "InvalidAccessKeyId"), method=method)
    with pytest.raises(StoreError, match=r"part-00000\.parquet is denied"):
        output.create_part(0, rows(), REPORT, NOTES)
    with pytest.raises(StoreError, match=r"part-00000\.parquet is denied"):
        output.reports(NOTES)


def test_the_probe_passes_and_leaves_nothing(output: Output) -> None:
    output.probe()
    assert output.names("_infermill") == []
    output.probe()


def test_a_part_of_another_job_is_not_adopted(output: Output) -> None:
    output.create_part(0, rows(), REPORT, NOTES)
    others = NOTES | {"digest": "sha256:other"}
    with pytest.raises(JobMismatchError, match=r"part-00000\.parquet belongs to another job"):
        output.create_part(0, rows(), REPORT, others)
    with pytest.raises(JobMismatchError, match=r"part-00000\.parquet belongs to another job"):
        output.reports(others)


def test_the_probe_passes_when_a_reply_is_lost(scripted_store: ScriptedStore) -> None:
    scripted_store.lost_replies = 1
    Output("s3://jobs/out", scripted_store.options).probe()
    assert not scripted_store.objects


def test_a_file_system_without_hard_links_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")  # what vfat answers

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(StoreError, match="does not support hard links"):
        Output(str(tmp_path), StoreOptions()).probe()


def test_the_probe_refuses_a_store_that_ignores_conditions(careless_store: ScriptedStore) -> None:
    output = Output("s3://jobs/out", careless_store.options)
    with pytest.raises(StoreError, match="does not honour create-if-absent") as caught:
        output.probe()
    assert "a local folder" in caught.value.hint
    assert careless_store.objects == {}


def test_the_probe_refuses_a_folder_that_must_not_be_written(
    shared_path: Path, unprivileged: Callable[[], AbstractContextManager[None]]
) -> None:
    output = Output(f"{shared_path}/out", StoreOptions())
    shared_path.chmod(0o555)
    with unprivileged(), pytest.raises(StoreError, match=r"access to .* is denied"):
        output.probe()


def test_an_output_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"mine")
    output = Output(f"{tmp_path}/out", StoreOptions())
    for action in (
        output.probe,
        output.names,
        output.parts,
        lambda: output.read("_infermill/job.json"),
        lambda: output.create("file", b""),
        lambda: output.create("folder/file", b""),
    ):
        with pytest.raises(StoreError, match="Not a directory"):
            action()
    assert (tmp_path / "out").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["../out", "new\nline", "%2F#?*[1]", "é", os.fsdecode(b"\xff")])
def test_an_output_may_have_any_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    output = Output(name, StoreOptions())
    output.probe()
    assert output.create_part(0, rows(), REPORT, NOTES) == REPORT
    assert output.reports(NOTES) == {0: REPORT}
    assert (tmp_path / "here" / name / "part-00000.parquet").exists()
    assert read(name).num_rows == 2


@pytest.mark.parametrize("prefix", ["a//b", "a/../b", "new\nline", "/a"])
def test_a_prefix_that_cannot_be_named_is_bad_usage(prefix: str, aws_environment: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="choose another prefix"):
        Output(f"s3://jobs/{prefix}", StoreOptions())


def test_a_whole_bucket_can_be_the_output(bucket: Bucket) -> None:
    output = Output(bucket.uri, bucket.options)
    assert output.uri == bucket.uri
    output.create_part(0, rows(), REPORT, NOTES)
    assert bucket.keys() == ["part-00000.parquet"]
    assert list(output.parts()) == [0]


def parquet(metadata: dict[str, str] | None) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": [1]}).replace_schema_metadata(metadata), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


@pytest.mark.parametrize(
    "content",
    [
        parquet(None),
        parquet({"infermill.report": "no json"}),
        parquet({"infermill.report": '{"other": 1}'}),
        parquet({"infermill.report": "[]"}),
        b"not Parquet",
        b"",
        parquet(None)[:-28] + b"\x0f" * 20 + parquet(None)[-8:],
    ],
)
def test_a_part_that_somebody_else_wrote_is_told(content: bytes, output: Output) -> None:
    output.create("part-00000.parquet", content)
    with pytest.raises(StoreError, match=r"part-00000\.parquet is damaged, or infermill did not write it") as caught:
        output.create_part(0, rows(), REPORT, NOTES)
    assert caught.value.hint.startswith("move it out of the way")
    assert "\n" not in caught.value.message
    with pytest.raises(StoreError, match="infermill did not write"):
        output.reports(NOTES)


def test_a_damaged_part_is_named_where_rows_are_read(tmp_path: Path) -> None:
    (tmp_path / "part-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(StoreError, match=r"part-00000\.parquet is damaged") as caught:
        read(tmp_path)
    assert "infermill verify" in caught.value.hint


def test_a_dead_store_is_told_once(aws_environment: pytest.MonkeyPatch) -> None:
    options = StoreOptions(endpoint_url=f"http://127.0.0.1:{free_port()}", region="us-east-1")
    with pytest.raises(StoreError, match="does not answer"):
        Output("s3://jobs/out", options).probe()


@pytest.fixture
def written(output: Output) -> Output:
    for number, label in ((2, "c"), (0, "a"), (10, "d"), (1, "b")):
        output.create_part(number, rows(label), REPORT, NOTES)
    output.create("_SUCCESS", json.dumps({}).encode())
    return output


def options_of(request: pytest.FixtureRequest, output: Output) -> StoreOptions | None:
    if not output.uri.startswith("s3://"):
        return None
    bucket: Bucket = request.getfixturevalue("bucket")
    return bucket.options


def labels(tables: Iterator[pa.RecordBatch] | list[pa.RecordBatch]) -> list[str]:
    return [row["top"][0]["label"] for table in tables for row in table.to_pylist() if row["top"]]


def test_all_rows_are_read_in_the_order_of_the_plan(request: pytest.FixtureRequest, written: Output) -> None:
    options = options_of(request, written)
    table = read(written.uri, options)
    assert table.column_names == ["key", "etag", "size", "top", "error"]
    assert table.schema.metadata is None
    assert labels(table.to_batches()) == ["a", "b", "c", "d"]
    assert labels(read_batches(written.uri, options)) == ["a", "b", "c", "d"]
    assert table.schema.field("error").type == pa.struct([(name, pa.string()) for name in ("stage", "code", "message")])


def test_an_output_without_parts_is_bad_usage(output: Output, request: pytest.FixtureRequest) -> None:
    options = options_of(request, output)
    for action in (lambda: read(output.uri, options), lambda: list(read_batches(output.uri, options))):
        with pytest.raises(UsageError, match="holds no part"):
            action()
