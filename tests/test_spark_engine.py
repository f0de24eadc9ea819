"""The Spark engine on a real cluster: what dies, is slow or is poison costs time, and no row.

Executors run the modules of these tests at their start: an image that ends with `SLOW`, behind the end of its JPEG,
takes a while to decode, and leaves its name in a file, so that a test can tell what was decoded how often.
"""

import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

import infermill
from infermill import Options, Summary
from infermill.meter import Meter
from infermill.session import spark_session
from tests.clusters import StandaloneCluster, wait_until
from tests.fault_proxy import FaultProxy, Reply
from tests.images import jpeg_bytes, photo
from tests.networks import tiny_classifier
from tests.servers import Bucket

pytestmark = pytest.mark.slow
CARD = "name: tiny\nfiles: {onnx: tiny.onnx}\npreprocess: {resize: {exact: [32, 32]}}\noutput: {top_k: 2}\n"
# In place of a decoder with a bug, and of photos that take long.
SITE = """
import ctypes, os, time
import simplejpeg

real = simplejpeg.decode_jpeg

def decode_jpeg(data, *args, **kwargs):
    if data.endswith(b"CRASH"):
        ctypes.string_at(0)
    if data.endswith(b"SLOW"):
        with open(os.environ["DECODED"], "a") as file:
            file.write(data[-7:-4].decode() + "\\n")
        time.sleep(0.1)
    return real(data, *args, **kwargs)

simplejpeg.decode_jpeg = decode_jpeg
"""
SPECULATION = {
    "spark.speculation": "true",
    "spark.speculation.interval": "200ms",
    "spark.speculation.quantile": "0.5",
    # No other task of these tests takes so long.
    "spark.speculation.minTaskRuntime": "4s",
}


@dataclass(frozen=True)
class Jobs:
    """Jobs on the cluster, with everything in one folder; the executors are reached through one session."""

    session: SparkSession
    cluster: StandaloneCluster
    folder: Path

    @property
    def card(self) -> Path:
        return self.folder / "model.yaml"

    def run(self, source: Path, output: Path, **options: object) -> Summary:
        (self.folder / "decoded").unlink(missing_ok=True)
        return infermill.run(
            source, self.card, output, replace(Options(partition_objects=4), **options), engine=self.session
        )

    def decoded(self) -> Counter[str]:
        """How often each photo was decoded by the last job."""
        return Counter((self.folder / "decoded").read_text().split())


@pytest.fixture(scope="module")
def jobs(standalone: StandaloneCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    folder = tmp_path_factory.mktemp("spark")
    tiny_classifier(folder / "tiny.onnx", classes=10, size=32)
    (folder / "model.yaml").write_text(CARD)
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text(SITE)
    settings = SPECULATION | {
        "spark.executorEnv.PYTHONPATH": str(folder / "site"),
        "spark.executorEnv.DECODED": str(folder / "decoded"),
    }
    options = standalone.options
    conf = (*options.conf, *(f"{key}={value}" for key, value in settings.items()))
    with spark_session(replace(options, conf=conf)) as session:
        yield Jobs(session, standalone, folder)


def write_photos(folder: Path, count: int, ends: Callable[[int], bytes] = lambda number: b"%03dSLOW" % number) -> Path:
    folder.mkdir()
    plain = [jpeg_bytes(photo(seed, (40, 30))) for seed in range(8)]
    for number in range(count):
        (folder / f"{number:03d}.jpg").write_bytes(plain[number % 8] + ends(number))
    return folder


@pytest.fixture(scope="module")
def slow_photos(jobs: Jobs) -> Path:
    """Photos that keep two executors busy for two seconds."""
    return write_photos(jobs.folder / "slow", 40)


@pytest.fixture(scope="module")
def expected(jobs: Jobs, slow_photos: Path) -> pa.Table:
    """The rows of an undisturbed job on one machine."""
    infermill.run(slow_photos, jobs.card, jobs.folder / "calm", Options(partition_objects=4))
    return infermill.read(jobs.folder / "calm")


def check(output: Path, summary: Summary, expected: pa.Table) -> None:
    assert (summary.planned, summary.ok, summary.failed) == (expected.num_rows, expected.num_rows, 0)
    verification = infermill.verify(output)
    assert verification.problem_count == 0, verification.problems
    assert infermill.read(output).equals(expected)


def parts(output: Path) -> list[str]:
    return sorted(path.name for path in output.glob("part-*.parquet"))


@contextmanager
def in_the_middle_of(output: Path, act: Callable[[], object]) -> Iterator[None]:
    """Do something when the first part is there, while the job runs on."""

    def wait_and_act() -> None:
        wait_until(lambda: bool(parts(output)))
        act()
        assert len(parts(output)) < 10

    with ThreadPoolExecutor(1) as pool:
        acting = pool.submit(wait_and_act)
        yield
        acting.result()


@pytest.mark.parametrize("victim", ["executors", "python_workers", "infermill_workers"])
def test_what_is_killed_is_replaced(
    jobs: Jobs, slow_photos: Path, expected: pa.Table, tmp_path: Path, victim: str
) -> None:
    def kill() -> None:
        pids = getattr(jobs.cluster, victim)()
        assert len(pids) == 2
        os.kill(pids[0], signal.SIGKILL)

    with in_the_middle_of(tmp_path / "out", kill):
        summary = jobs.run(slow_photos, tmp_path / "out")
    check(tmp_path / "out", summary, expected)
    again = jobs.decoded()
    assert len(again) == 40
    # What was under way is done again: no more than the partitions of the task that was hit.
    assert again.total() <= 40 + 8 + 4


def test_a_task_that_hangs_gets_a_twin(jobs: Jobs, slow_photos: Path, expected: pa.Table, tmp_path: Path) -> None:
    stopped: list[int] = []

    def stop() -> None:
        stopped.append(jobs.cluster.infermill_workers()[0])
        os.kill(stopped[0], signal.SIGSTOP)

    with in_the_middle_of(tmp_path / "out", stop):
        summary = jobs.run(slow_photos, tmp_path / "out")
    check(tmp_path / "out", summary, expected)
    wait_until(lambda: not psutil.pid_exists(stopped[0]))  # with the attempt that came second
    assert max(jobs.decoded().values()) == 2


def test_poison_costs_one_row(jobs: Jobs, tmp_path: Path) -> None:
    ends = {13: b"CRASH", 30: b"CRASH"}
    photos = write_photos(tmp_path / "photos", 40, lambda number: ends.get(number, b""))
    summary = jobs.run(photos, tmp_path / "out")
    assert (summary.ok, summary.failures_by_code) == (38, {"native_crash": 2})
    assert infermill.verify(tmp_path / "out").problem_count == 0
    infermill.run(write_photos(tmp_path / "clean", 40, lambda _: b""), jobs.card, tmp_path / "calm")
    rows, calm = (infermill.read(tmp_path / name).to_pylist() for name in ("out", "calm"))
    for number, (row, undisturbed) in enumerate(zip(rows, calm, strict=True)):
        if number in ends:
            assert row["error"]["message"] == "the worker died (SIGSEGV) while it was decoded"
        else:
            assert (row["error"], row["top"]) == (None, undisturbed["top"])


def test_a_network_is_loaded_once_per_executor(jobs: Jobs, slow_photos: Path, tmp_path: Path) -> None:
    for pid in jobs.cluster.python_workers():
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not jobs.cluster.infermill_workers())
    first = jobs.run(slow_photos, tmp_path / "first")
    assert len(parts(tmp_path / "first")) == 10
    assert (first.workers, first.model_loads) == (2, 2)
    second = jobs.run(slow_photos, tmp_path / "second")
    assert (second.workers, second.model_loads) == (2, 0)


def test_rows_are_retried_and_objects_appended(jobs: Jobs, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", 12, lambda _: b"")
    manifest = tmp_path / "keys.txt"
    manifest.write_text("".join(f"{photos}/{number:03d}.jpg\n" for number in range(16)))
    first = jobs.run(manifest, tmp_path / "retried")
    assert first.failures_by_code == {"missing": 4}
    for number in range(12, 16):
        (photos / f"{number:03d}.jpg").write_bytes(jpeg_bytes(photo(number, (40, 30))))
    retried = infermill.retry(tmp_path / "retried", engine=jobs.session)
    assert (retried.ok, retried.failed, retried.retried, retried.workers) == (16, 0, 4, 1)

    jobs.run(photos, tmp_path / "appended")
    for number in (3, 16, 17):
        (photos / f"{number:03d}.jpg").write_bytes(jpeg_bytes(photo(90 + number, (40, 30))))
    appended = infermill.run(
        photos, jobs.card, tmp_path / "appended", Options(partition_objects=4), existing="append", engine=jobs.session
    )
    assert (appended.ok, appended.new, appended.changed, appended.unchanged) == (18, 2, 1, 15)
    predict = infermill.load_model(jobs.card)
    for name in ("retried", "appended"):
        assert infermill.verify(tmp_path / name).problem_count == 0
    for row in infermill.read(tmp_path / "appended").to_pylist():
        (prediction,) = predict([(photos / row["key"]).read_bytes()])
        assert prediction.top is not None
        assert row["top"][0]["index"] == prediction.top[0].index


def test_a_job_over_its_budget_is_cancelled(jobs: Jobs, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", 400, lambda number: b"%03dSLOW" % number)
    for number in range(200):
        (photos / f"{number:03d}.jpg").write_bytes(b"<html>")
    with pytest.raises(infermill.BudgetError, match="objects fail, and 400 may have no more than --max-failures 10"):
        jobs.run(photos, tmp_path / "out", partition_objects=10, max_failures=10)
    wait_until(lambda: not jobs.session.sparkContext.statusTracker().getActiveStageIds())
    wait_until(lambda: not jobs.cluster.infermill_workers(), 10)
    assert len(parts(tmp_path / "out")) < 40
    assert not list((tmp_path / "out/_infermill/running").glob("*"))
    summary = jobs.run(photos, tmp_path / "out", partition_objects=10, threads=4)
    assert (summary.planned, summary.ok, summary.failed) == (400, 200, 200)


def test_a_store_that_breaks_stops_the_job(jobs: Jobs, bucket: Bucket, tmp_path: Path) -> None:
    for number in range(24):
        bucket.put(f"photos/{number:02d}.jpg", jpeg_bytes(photo(number, (40, 30))))
    with FaultProxy(bucket.endpoint) as proxy:
        options = Options(endpoint_url=proxy.url, partition_objects=4, store_deadline=1.0)
        proxy.inject(Reply(503, "SlowDown"), "GET", r"photos/\d+", first=8, times=1 << 30)
        with pytest.raises(infermill.StoreError, match=r"photos/.*SlowDown") as caught:
            infermill.run(f"{bucket.uri}/photos/", jobs.card, tmp_path / "out", options, engine=jobs.session)
        assert "resume" in caught.value.hint
        assert "Traceback" not in str(caught.value)
        proxy.clear()
        summary = infermill.run(f"{bucket.uri}/photos/", jobs.card, tmp_path / "out", options, engine=jobs.session)
    assert (summary.ok, summary.failed) == (24, 0)
    assert infermill.verify(tmp_path / "out").problem_count == 0


def test_progress_tells_what_is_last_and_where(jobs: Jobs, slow_photos: Path, tmp_path: Path) -> None:
    said: list[str] = []
    ended = threading.Event()

    @contextmanager
    def display(meter: Meter) -> Iterator[None]:
        def look() -> None:
            while not ended.wait(0.1):
                said.append(meter.detail)

        looking = threading.Thread(target=look)
        looking.start()
        try:
            yield
        finally:
            ended.set()
            looking.join()

    infermill.run(
        slow_photos,
        jobs.card,
        tmp_path / "out",
        Options(partition_objects=4),
        display=display,
        engine=jobs.session,
    )
    assert any(socket.gethostname() in line for line in said), said
