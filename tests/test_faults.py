"""Jobs between which and their store requests are lost, cut off, stalled, refused and delayed."""

import io
import json
import random
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import infermill
from infermill import Options
from infermill.errors import BadInputError, StoreError
from infermill.fetch import DENIED_AT_FIRST, Fetch, fetcher
from infermill.output import Output
from infermill.rows import tables
from infermill.sources import list_source
from infermill.types import ObjectRef, PartitionReport, Source, StoreOptions
from tests.fault_proxy import (
    ALWAYS,
    Call,
    Delay,
    Fault,
    FaultProxy,
    LoseReply,
    Reply,
    Request,
    Reset,
    Stall,
    Trickle,
    Truncate,
)
from tests.networks import tiny_classifier
from tests.servers import REGION, Bucket, ScriptedStore, connect
from tests.test_engines import CARD, png
from tests.test_output import NOTES, REPORT, rows

PHOTOS, PER_PARTITION = 24, 4
TENTHS = [tenth / 10 for tenth in range(10)]
BUSY = Reply(503, "SlowDown")
PASSING: list[Fault] = [
    LoseReply(),
    LoseReply(reset=True),
    Reset(),
    Stall(),
    BUSY,
    Reply(429, "TooManyRequests"),
    Reply(400, "RequestTimeout"),
]
KEYS = ["photo.jpg", "a//odd.jpg"]


@dataclass(frozen=True)
class Job:
    """A job that has been run without faults, to be run again through the proxy into a new place."""

    source: str
    card: Path
    rows: pa.Table
    output: str
    options: Options

    def run(self) -> infermill.Summary:
        return infermill.run(self.source, self.card, self.output, self.options)

    def read(self) -> pa.Table:
        return infermill.read(self.output, self.options)

    def assert_finished(self, summary: infermill.Summary) -> None:
        assert (summary.planned, summary.ok, summary.failed) == (PHOTOS, PHOTOS, 0)
        assert self.read().equals(self.rows)
        success = json.loads(Output(self.output, self.options).read_existing("_SUCCESS"))
        assert success["parts"] == [[number, PER_PARTITION, 0] for number in range(PHOTOS // PER_PARTITION)]


@pytest.fixture(scope="module")
def undisturbed(s3_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    folder = tmp_path_factory.mktemp("faults")
    tiny_classifier(folder / "tiny.onnx", classes=10, size=32)
    (folder / "model.yaml").write_text(CARD)
    name = f"photos-{uuid.uuid4().hex}"
    client = connect(s3_server)
    client.create_bucket(Bucket=name)
    for number in range(PHOTOS):
        client.put_object(Bucket=name, Key=f"photos/{number:02d}.png", Body=png(number))
    client.close()
    options = Options(endpoint_url=s3_server, region=REGION, partition_objects=PER_PARTITION, store_deadline=30)
    job = Job(f"s3://{name}/photos/", folder / "model.yaml", pa.table({}), f"s3://{name}/undisturbed", options)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "testing")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        job.run()
        yield replace(job, rows=job.read())


@pytest.fixture
def job(undisturbed: Job, fault_proxy: FaultProxy, aws_environment: pytest.MonkeyPatch) -> Job:
    """The same job, through the proxy."""
    options = replace(undisturbed.options, endpoint_url=fault_proxy.url)
    return replace(undisturbed, output=f"{undisturbed.output}-{uuid.uuid4().hex}", options=options)


def through(proxy: FaultProxy, deadline_seconds: float = 2.4) -> StoreOptions:
    """The way through the proxy; a stall is noticed after a third of the deadline."""
    return StoreOptions(endpoint_url=proxy.url, region=REGION, store_deadline=deadline_seconds)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("fault", [*PASSING, Stall(0.5), Trickle(0.2)], ids=repr)
def test_an_object_is_fetched_through_a_fault(fault: Fault, key: str, bucket: Bucket, fault_proxy: FaultProxy) -> None:
    bucket.put(key, bytes(range(256)) * 400)
    rule = fault_proxy.inject(fault, path=r"\.jpg")
    fetch = fetcher(Source(bucket.uri), through(fault_proxy))
    reserved: list[int] = []
    assert bytes(fetch(ObjectRef(key), reserved.append)) == bytes(range(256)) * 400
    assert rule.hits == 1
    assert reserved == [102_400]


@pytest.mark.parametrize("key", KEYS)
def test_a_body_that_ends_at_any_tenth_is_never_taken_for_whole(
    key: str, bucket: Bucket, fault_proxy: FaultProxy
) -> None:
    bucket.put(key, bytes(range(256)) * 400)
    fetch = fetcher(Source(bucket.uri), through(fault_proxy))
    for fraction in TENTHS:
        rule = fault_proxy.inject(Truncate(fraction), path=r"\.jpg")
        assert bytes(fetch(ObjectRef(key))) == bytes(range(256)) * 400
        assert rule.hits == 1


def test_columns_of_a_part_that_is_replaced_meanwhile_are_all_old_or_all_new(
    bucket: Bucket, fault_proxy: FaultProxy
) -> None:
    """Pages of one and the footer of the other would be read as what neither held."""
    job = Output(f"{bucket.uri}/out", bucket.options)

    def content(prefix: str) -> bytes:
        buffer = io.BytesIO()
        keys = [prefix + str(number) + random.Random(number).randbytes(20).hex() for number in range(100_000)]
        pq.write_table(pa.table({"key": keys, "size": list(range(100_000))}), buffer)
        return buffer.getvalue()

    job.create("part-00000.parquet", content("a"))
    new = content("bbbb")
    rule = fault_proxy.inject(Call(before=lambda _: bucket.put("out/part-00000.parquet", new)), "GET", "part-", first=2)
    table = Output(job.uri, through(fault_proxy)).columns("part-00000.parquet", ["key"])
    assert rule.hits == 1
    assert {key[0] for key in table["key"].to_pylist()} == {"b"}


def test_an_object_that_was_replaced_between_two_tries_is_changed(bucket: Bucket, fault_proxy: FaultProxy) -> None:
    bucket.put("photo.jpg", b"first" * 1000)
    etag = bucket.client.head_object(Bucket=bucket.name, Key="photo.jpg")["ETag"]
    fault_proxy.inject(Truncate(0.5), path="photo.jpg")
    fault_proxy.inject(Call(before=lambda _: bucket.put("photo.jpg", b"other" * 1000)), path="photo.jpg", first=2)
    with pytest.raises(BadInputError) as caught:
        fetcher(Source(bucket.uri), through(fault_proxy))(ObjectRef("photo.jpg", 5000, etag))
    assert caught.value.failure.code == "changed"


@pytest.mark.parametrize(("fault", "key"), [(BUSY, KEYS[0]), (Stall(0.5), KEYS[0]), (BUSY, KEYS[1])], ids=repr)
def test_an_object_that_fails_alone_is_a_row(fault: Fault, key: str, bucket: Bucket, fault_proxy: FaultProxy) -> None:
    for name in ("good.jpg", key):
        bucket.put(name, b"x" * 1000)
    fetch = fetcher(Source(bucket.uri), through(fault_proxy, 0.5))
    fault_proxy.inject(fault, path=key, times=ALWAYS)
    with pytest.raises(StoreError, match="does not answer"):
        fetch(ObjectRef(key))
    fetch(ObjectRef("good.jpg"))
    with pytest.raises(BadInputError, match="though other objects are read") as caught:
        fetch(ObjectRef(key))
    assert (caught.value.failure.stage, caught.value.failure.code) == ("fetch", "store")


def fetched(fetch: Fetch, keys: list[str]) -> list[str]:
    """What becomes of each object: `ok`, or the code of its failure."""

    def one(key: str) -> str:
        try:
            fetch(ObjectRef(key))
        except BadInputError as error:
            return error.failure.code
        return "ok"

    return [one(key) for key in keys]


def test_a_store_that_denies_everything_is_no_bad_input(bucket: Bucket, fault_proxy: FaultProxy) -> None:
    for name in ("a.jpg", "b.jpg"):
        bucket.put(name, b"x")
    denied = Reply(403, "AccessDenied")
    fault_proxy.inject(denied, path=r"secret", times=ALWAYS)
    secrets = [f"secret-{number}" for number in range(DENIED_AT_FIRST)]
    fetch = fetcher(Source(bucket.uri), through(fault_proxy))
    assert fetched(fetch, ["secret", "a.jpg", *secrets]) == ["unreadable", "ok", *["unreadable"] * len(secrets)]
    revoked = fault_proxy.inject(denied, times=ALWAYS)
    for key in ("b.jpg", "secret"):
        with pytest.raises(StoreError, match="is denied"):
            fetch(ObjectRef(key))
    assert revoked.hits
    fetch = fetcher(Source(bucket.uri), through(fault_proxy))
    assert set(fetched(fetch, secrets[1:])) == {"unreadable"}
    with pytest.raises(StoreError, match="is denied"):
        fetch(ObjectRef("b.jpg"))


@pytest.mark.parametrize("fault", [*PASSING, Truncate(0.5), Stall(0.5)], ids=repr)
def test_a_source_is_listed_through_a_fault(fault: Fault, bucket: Bucket, fault_proxy: FaultProxy) -> None:
    bucket.put_many([f"photos/{number:04d}.jpg" for number in range(30)], b"x")
    rule = fault_proxy.inject(fault, path="list-type=2&prefix=photos")
    _, batches = list_source(f"{bucket.uri}/photos/", (".jpg",), through(fault_proxy))
    keys = [key for batch in batches for key in batch["key"].to_pylist()]
    assert keys == [f"photos/{number:04d}.jpg" for number in range(30)]
    assert rule.hits == 1


@pytest.mark.parametrize("prefix", ["photos", "a//photos"])
def test_a_long_listing_goes_on_where_it_broke_off(prefix: str, scripted_store: ScriptedStore) -> None:
    keys = [f"{prefix}/{number:05d}.jpg" for number in range(18_000)]
    scripted_store.objects = {f"/bucket/{key}": b"x" for key in keys}
    with FaultProxy(str(scripted_store.options.endpoint_url)) as proxy:
        rule = proxy.inject(Truncate(0.5), path="list-type=2", first=18)
        _, batches = list_source(f"s3://bucket/{prefix}/", (".jpg",), through(proxy, 30))
        assert [key for batch in batches for key in batch["key"].to_pylist()] == keys
    assert rule.hits == 1


@pytest.mark.parametrize("fault", [*PASSING, Reply(409, "ConditionalRequestConflict")], ids=repr)
def test_every_step_of_the_protocol_survives_a_fault(fault: Fault, bucket: Bucket, fault_proxy: FaultProxy) -> None:
    output = Output(f"{bucket.uri}/out", through(fault_proxy))
    rule = fault_proxy.inject(fault, path="/out/")
    output.probe()
    assert rule.hits == 1
    assert bucket.keys() == []
    for method, path in (("PUT", "part-00000"), ("GET", "part-00000"), ("GET", "list-type")):
        rule = fault_proxy.inject(fault, method, path)
        assert output.create_part(0, rows(), REPORT, NOTES) == REPORT
        assert output.create_part(0, rows("dog"), PartitionReport(0, 2, "openvino", "fp32"), NOTES) == REPORT
        assert output.parts() == {0: "part-00000.parquet"}
        assert output.reports(NOTES) == {0: REPORT}
        assert output.read_existing("part-00000.parquet")[:4] == b"PAR1"
        assert rule.hits == 1
    assert bucket.keys() == ["out/part-00000.parquet"]


def test_the_probe_refuses_a_careless_store_whose_reply_is_lost(careless_store: ScriptedStore) -> None:
    with FaultProxy(str(careless_store.options.endpoint_url)) as proxy:
        for turn in (1, 2):
            proxy.inject(LoseReply(reset=True), "PUT", first=turn)
            with pytest.raises(StoreError, match="does not honour create-if-absent"):
                Output("s3://jobs/out", through(proxy)).probe()
            proxy.clear()


def test_one_of_32_concurrent_writers_wins(bucket: Bucket, fault_proxy: FaultProxy) -> None:
    output = Output(f"{bucket.uri}/out", through(fault_proxy, 30))
    lost = [fault_proxy.inject(LoseReply(reset=True), "PUT", f"part-0000{n}", first=n, times=9) for n in range(1, 5)]
    for number in range(5):
        start = threading.Barrier(32)

        def write(writer: int) -> int:
            start.wait()  # noqa: B023
            report = PartitionReport(number, writer, "openvino", "fp32")  # noqa: B023
            return output.create_part(number, rows(str(writer)), report, NOTES).ok  # noqa: B023

        with ThreadPoolExecutor(32) as pool:
            (winner,) = set(pool.map(write, range(32)))
        report = output.reports(NOTES)[number]
        assert report.ok == winner
    assert [rule.hits for rule in lost] == [9] * 4
    assert [table["top"][0][0]["label"].as_py() for table in tables(output)]


def test_a_job_whose_every_reply_to_a_put_is_lost_ends_as_if_undisturbed(job: Job, fault_proxy: FaultProxy) -> None:
    names = ["probe-", "plan/", r"job\.json", "_SUCCESS", *(f"part-0000{number}" for number in range(6))]
    lost = [fault_proxy.inject(LoseReply(reset=number % 2 == 0), "PUT", name) for number, name in enumerate(names)]
    job.assert_finished(job.run())
    assert [rule.hits for rule in lost] == [1] * len(names)


def test_a_job_whose_every_body_is_cut_off_ends_as_if_undisturbed(job: Job, fault_proxy: FaultProxy) -> None:
    cut = [
        fault_proxy.inject(Truncate(TENTHS[number % 10]), "GET", f"photos/{number:02d}.png") for number in range(PHOTOS)
    ]
    job.assert_finished(job.run())
    assert [rule.hits for rule in cut] == [1] * PHOTOS


def test_a_job_in_a_storm_ends_as_if_undisturbed(job: Job, fault_proxy: FaultProxy) -> None:
    storm: list[Fault] = [*PASSING, Reply(500, "InternalError"), Truncate(0.3), Stall(0.7), Trickle(0.1), Delay(0.2)]
    rules = [fault_proxy.inject(storm[turn % len(storm)], first=1 + 3 * turn) for turn in range(24)]
    conflict = fault_proxy.inject(Reply(409, "ConditionalRequestConflict"), "PUT", "part-00003")
    job = replace(job, options=replace(job.options, store_deadline=3.6))
    job.assert_finished(job.run())
    assert sum(rule.hits for rule in rules) >= 15
    assert conflict.seen


def test_a_job_outlives_a_store_that_is_down_for_a_while(job: Job, fault_proxy: FaultProxy) -> None:
    def break_off(_: Request) -> None:
        rule = fault_proxy.inject(BUSY, times=ALWAYS)
        threading.Timer(2, lambda: setattr(rule, "times", 0)).start()

    fault_proxy.inject(Call(before=break_off), "GET", r"photos/\d\d\.png")  # the first one that is asked for
    job.assert_finished(job.run())
    assert sum("photos/" in request.path for request in fault_proxy.requests) > PHOTOS + PHOTOS // 2


@pytest.mark.parametrize(
    ("fault", "first", "problem"),
    [
        (Stall(), 30, "does not answer"),
        (Reply(400, "ExpiredToken"), 30, "have expired"),
        (Reply(403, "AccessDenied"), 30, "is denied"),
    ],
    ids=repr,
)
def test_a_job_whose_store_fails_for_good_stops_and_is_resumed(
    fault: Fault, first: int, problem: str, job: Job, fault_proxy: FaultProxy
) -> None:
    rule = fault_proxy.inject(fault, first=first, times=ALWAYS)
    started = time.monotonic()
    with pytest.raises(StoreError, match=problem) as caught:
        replace(job, options=replace(job.options, store_deadline=0.6)).run()
    assert time.monotonic() - started < 12
    assert caught.value.exit_code == 1
    assert caught.value.hint
    assert rule.hits
    fault_proxy.clear()
    assert "_SUCCESS" not in Output(job.output, job.options).names()
    job.assert_finished(job.run())


def test_an_object_on_which_the_store_fails_is_a_row_of_the_job(job: Job, fault_proxy: FaultProxy) -> None:
    fault_proxy.inject(BUSY, path=r"photos/07\.png", times=ALWAYS)
    summary = replace(job, options=replace(job.options, store_deadline=1.5)).run()
    assert summary.failures_by_code == {"store": 1}
    found = job.read().to_pylist()
    assert [row["error"] is None for row in found] == [number != 7 for number in range(PHOTOS)]
    assert (found[7]["error"]["stage"], found[7]["error"]["code"]) == ("fetch", "store")
    assert found[:7] + found[8:] == job.rows.to_pylist()[:7] + job.rows.to_pylist()[8:]


def test_two_drivers_at_once_end_well(job: Job, fault_proxy: FaultProxy) -> None:
    fault_proxy.inject(Delay(0.1), "PUT", times=ALWAYS)
    start = threading.Barrier(2)

    def drive(_: int) -> infermill.Summary:
        start.wait()
        return job.run()

    with ThreadPoolExecutor(2) as pool:
        for summary in pool.map(drive, range(2)):
            job.assert_finished(summary)
    assert len(Output(job.output, job.options).names("_infermill/plan")) == 1
