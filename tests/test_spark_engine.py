"""The Spark engine on a real cluster: what dies, is slow or is poison costs time, and no row."""

import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

import infermill
from infermill import Options, Summary
from infermill.engines.spark import on, shape_of
from infermill.job import Display
from infermill.progress import show_progress
from infermill.session import spark_session
from tests.clusters import SlowDecoder, StandaloneCluster, part_files, wait_until, write_photos
from tests.fault_proxy import FaultProxy, Reply
from tests.images import jpeg_bytes, photo
from tests.networks import tiny_classifier
from tests.servers import Bucket

pytestmark = pytest.mark.slow
CARD = "name: tiny\nfiles: {onnx: tiny.onnx}\npreprocess: {resize: {exact: [32, 32]}}\noutput: {top_k: 2}\n"
SETTINGS = {
    "spark.speculation": "true",
    "spark.speculation.interval": "200ms",
    "spark.speculation.quantile": "0.5",
    "spark.speculation.minTaskRuntime": "6s",
    "spark.speculation.multiplier": "1000",
    # Each attempt of what fails for good starts a Python of its own.
    "spark.task.maxFailures": "2",
}


@dataclass(frozen=True)
class Jobs:
    """Jobs on the cluster, whose executors have a slow decoder; all of them through one session."""

    session: SparkSession
    cluster: StandaloneCluster
    decoder: SlowDecoder
    card: Path

    def run(self, source: Path, output: Path, display: Display = nullcontext, **settings: Any) -> Summary:
        # Spark knows of those that the test before has killed, and that are back; and of the driver.
        status = self.session.sparkContext._jsc.sc().getExecutorMemoryStatus
        wait_until(lambda: status().size() == 3)
        self.decoder.forget()
        options = replace(Options(partition_objects=4), **settings)
        return infermill.run(source, self.card, output, options, display=display, engine=self.session)

    @contextmanager
    def twins(self) -> Iterator[None]:
        """Let slow tasks get twins; in other tests, those whose Python starts slowly would have them."""
        conf = self.session.sparkContext._jsc.sc().conf()  # which each set of tasks reads at its start
        conf.set("spark.speculation.multiplier", "2")
        try:
            yield
        finally:
            conf.set("spark.speculation.multiplier", SETTINGS["spark.speculation.multiplier"])

    def forget_networks(self) -> None:
        """Let the executors start their Python anew."""
        for pid in self.cluster.python_workers():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self.cluster.infermill_workers())


@pytest.fixture(scope="module")
def jobs(standalone: StandaloneCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    folder = tmp_path_factory.mktemp("spark")
    tiny_classifier(folder / "tiny.onnx", classes=10, size=32)
    (folder / "model.yaml").write_text(CARD)
    decoder = SlowDecoder(folder)
    settings = SETTINGS | {f"spark.executorEnv.{name}": value for name, value in decoder.environment.items()}
    options = standalone.options
    conf = (*options.conf, *(f"{key}={value}" for key, value in settings.items()))
    with spark_session(replace(options, conf=conf)) as session:
        yield Jobs(session, standalone, decoder, folder / "model.yaml")


@pytest.fixture(scope="module")
def slow_photos(jobs: Jobs) -> Path:
    """Photos that keep two executors busy for two seconds."""
    return write_photos(jobs.card.with_name("slow"), 40)


@pytest.fixture(scope="module")
def expected(jobs: Jobs, slow_photos: Path) -> pa.Table:
    """The rows of an undisturbed job on one machine."""
    infermill.run(slow_photos, jobs.card, jobs.card.with_name("calm"), Options(partition_objects=4))
    return infermill.read(jobs.card.with_name("calm"))


def check(output: Path, summary: Summary, expected: pa.Table) -> None:
    assert (summary.planned, summary.ok, summary.failed) == (expected.num_rows, expected.num_rows, 0)
    verification = infermill.verify(output)
    assert verification.problem_count == 0, verification.problems
    assert infermill.read(output).equals(expected)


@contextmanager
def in_the_middle_of(output: Path, act: Callable[[], object]) -> Iterator[None]:
    """Do something when the first part is there, while the job runs on."""

    def wait_and_act() -> None:
        wait_until(lambda: bool(part_files(output)))
        act()
        assert len(part_files(output)) < 10

    with ThreadPoolExecutor(1) as pool:
        acting = pool.submit(wait_and_act)
        yield
        acting.result()


@pytest.mark.parametrize(
    "victims",
    [StandaloneCluster.executors, StandaloneCluster.infermill_workers],
    ids=["executor", "infermill's worker"],
)
def test_what_is_killed_is_replaced(
    jobs: Jobs,
    slow_photos: Path,
    expected: pa.Table,
    tmp_path: Path,
    victims: Callable[[StandaloneCluster], list[int]],
) -> None:
    def kill() -> None:
        os.kill(victims(jobs.cluster)[0], signal.SIGKILL)

    with in_the_middle_of(tmp_path / "out", kill):
        summary = jobs.run(slow_photos, tmp_path / "out")
    check(tmp_path / "out", summary, expected)
    again = jobs.decoder.decoded()
    assert len(again) == 40
    # What was under way is done again: no more than the task that was hit. That has 2 partitions of 4 photos, or 4 of
    # them where the job began before the executor that the test before has killed was back.
    assert again.total() <= 40 + 16 + 4


def test_a_task_that_is_tried_again_keeps_the_parts_that_are_there(
    jobs: Jobs, slow_photos: Path, expected: pa.Table, tmp_path: Path
) -> None:
    kept: list[str] = []

    def kill() -> None:
        kept.extend(part_files(tmp_path / "out"))
        for pid in jobs.cluster.python_workers():
            os.kill(pid, signal.SIGKILL)

    jobs.decoder.forget()
    with in_the_middle_of(tmp_path / "out", kill):
        summary = infermill.run(
            slow_photos, jobs.card, tmp_path / "out", Options(partition_objects=4), engine=on(jobs.session, 10)
        )
    check(tmp_path / "out", summary, expected)
    again = jobs.decoder.decoded()
    assert len(again) == 40
    for part in kept:
        first = 4 * int(part[5:10])
        assert [again[f"{number:03d}"] for number in range(first, first + 4)] == [1] * 4


def test_a_task_that_hangs_gets_a_twin(
    jobs: Jobs,
    slow_photos: Path,
    expected: pa.Table,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("infermill.progress.LOG_SECONDS", 0.5)
    stopped: list[int] = []

    def stop() -> None:
        stopped.append(jobs.cluster.infermill_workers()[0])
        os.kill(stopped[0], signal.SIGSTOP)

    with jobs.twins(), in_the_middle_of(tmp_path / "out", stop):
        summary = jobs.run(slow_photos, tmp_path / "out", show_progress)
    check(tmp_path / "out", summary, expected)
    wait_until(lambda: not psutil.pid_exists(stopped[0]))  # it ends with its attempt, which comes second
    line = r"^ +\d+ s  \d+/40 · [\d.]+/s · ETA \d+ s · 0 failed · \d/10 partitions, last: [\d, ]+ on {}$"
    said = capsys.readouterr().err
    assert re.search(line.format(re.escape(socket.gethostname())), said, re.MULTILINE), said


def test_poison_costs_one_row(jobs: Jobs, tmp_path: Path) -> None:
    poison = (13, 30)
    photos = write_photos(tmp_path / "photos", 40, lambda number: b"CRASH" if number in poison else b"")
    summary = jobs.run(photos, tmp_path / "out")
    assert (summary.ok, summary.failures_by_code) == (38, {"native_crash": 2})
    assert infermill.verify(tmp_path / "out").problem_count == 0
    infermill.run(write_photos(tmp_path / "clean", 40, lambda _: b""), jobs.card, tmp_path / "calm")
    rows, calm = (infermill.read(tmp_path / name).to_pylist() for name in ("out", "calm"))
    for number, (row, undisturbed) in enumerate(zip(rows, calm, strict=True)):
        if number in poison:
            assert row["error"]["message"] == "the worker died (SIGSEGV) while it was decoded"
        else:
            assert (row["error"], row["top"]) == (None, undisturbed["top"])


def test_a_network_is_loaded_once_per_executor(jobs: Jobs, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", 40, lambda _: b"")
    jobs.forget_networks()
    first = jobs.run(photos, tmp_path / "first")
    assert len(part_files(tmp_path / "first")) == 10
    # Five tasks; seldom, on a busy machine, Spark forks another Python before it has taken back the last one.
    assert 2 <= first.workers == first.model_loads < 5
    assert not list((tmp_path / "first/_infermill/running").iterdir())
    second = jobs.run(photos, tmp_path / "second")
    assert second.model_loads == 0


def test_rows_are_retried_and_objects_appended(jobs: Jobs, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", 12, lambda _: b"")
    manifest = tmp_path / "keys.txt"
    manifest.write_text("".join(f"{photos}/{number:03d}.jpg\n" for number in range(16)))
    first = jobs.run(manifest, tmp_path / "retried")
    assert first.failures_by_code == {"missing": 4}
    for number in range(12, 16):
        (photos / f"{number:03d}.jpg").write_bytes(jpeg_bytes(photo(number, (40, 30))))
    jobs.forget_networks()
    retried = infermill.retry(tmp_path / "retried", engine=jobs.session)
    assert (retried.ok, retried.failed, retried.retried) == (16, 0, 4)
    assert (retried.workers, retried.model_loads) == (1, 1)

    jobs.run(photos, tmp_path / "appended")
    for number in (3, 16, 17):
        (photos / f"{number:03d}.jpg").write_bytes(jpeg_bytes(photo(90 + number, (40, 30))))
    jobs.forget_networks()
    appended = infermill.run(
        photos, jobs.card, tmp_path / "appended", Options(partition_objects=4), existing="append", engine=jobs.session
    )
    assert (appended.ok, appended.new, appended.changed, appended.unchanged) == (18, 2, 1, 15)
    assert 1 <= appended.workers == appended.model_loads <= 2
    predict = infermill.load_model(jobs.card)
    for name in ("retried", "appended"):
        assert infermill.verify(tmp_path / name).problem_count == 0
    for row in infermill.read(tmp_path / "appended").to_pylist():
        (prediction,) = predict([(photos / row["key"]).read_bytes()])
        assert prediction.top is not None
        assert row["top"][0]["index"] == prediction.top[0].index


def test_a_job_over_its_budget_is_cancelled(jobs: Jobs, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", 400)
    for number in range(200):
        (photos / f"{number:03d}.jpg").write_bytes(b"<html>")
    with pytest.raises(infermill.BudgetError, match="objects fail, and 400 may have no more than --max-failures 10"):
        jobs.run(photos, tmp_path / "out", partition_objects=50, max_failures=10)
    # Each of the two tasks that are left would take ten seconds.
    wait_until(lambda: not jobs.cluster.infermill_workers(), 8)
    assert len(part_files(tmp_path / "out")) < 8
    summary = infermill.run(photos, jobs.card, tmp_path / "out", Options(partition_objects=50))
    assert (summary.planned, summary.ok, summary.failed) == (400, 200, 200)


def test_a_store_that_breaks_stops_the_job(jobs: Jobs, bucket: Bucket, tmp_path: Path) -> None:
    for number in range(24):
        bucket.put(f"photos/{number:02d}.jpg", jpeg_bytes(photo(number, (40, 30))))
    with FaultProxy(bucket.endpoint) as proxy:
        options = Options(endpoint_url=proxy.url, partition_objects=4, store_deadline=1.0)
        proxy.inject(Reply(503, "SlowDown"), "GET", r"photos/\d+", first=8, times=1 << 30)
        with pytest.raises(infermill.StoreError, match=r"photos/.*SlowDown") as caught:
            infermill.run(f"{bucket.uri}/photos/", jobs.card, tmp_path / "out", options, engine=jobs.session)
        assert caught.value.hint.startswith("check the network and --endpoint-url, then run the same command again; it")
        proxy.clear()
        summary = infermill.run(f"{bucket.uri}/photos/", jobs.card, tmp_path / "out", options)
    assert (summary.ok, summary.failed) == (24, 0)
    assert infermill.verify(tmp_path / "out").problem_count == 0


def test_a_folder_that_executors_do_not_see_is_not_taken_for_an_empty_one(jobs: Jobs, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 8)
    with pytest.raises(infermill.StoreError, match="accounts for 0 of 8"):  # it is planned, and no more
        infermill.run(tmp_path / "photos", jobs.card, tmp_path / "out", engine=lambda *_: iter(()))
    (tmp_path / "photos").rename(tmp_path / "elsewhere")
    with pytest.raises(infermill.StoreError, match="photos is there on the driver, and not on"):
        infermill.run(tmp_path / "photos", jobs.card, tmp_path / "out", engine=jobs.session)
    (tmp_path / "elsewhere").rename(tmp_path / "photos")
    assert infermill.run(tmp_path / "photos", jobs.card, tmp_path / "out").ok == 8


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("kind", ["folder", "manifest"])
def test_a_mount_point_without_its_mount_is_not_taken_for_an_empty_folder(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    here = Path("/proc/self/cwd")  # which is there on every machine, and is another folder for each process
    monkeypatch.chdir(write_photos(tmp_path / "photos", 8))
    source = here
    if kind == "manifest":
        source = tmp_path / "keys.txt"
        source.write_text("".join(f"{here}/{name}.jpg\n" for name in ("nowhere", *(f"{n:03d}" for n in range(8)))))
    with pytest.raises(infermill.StoreError, match=r"000\.jpg is there on the driver, and not on") as caught:
        jobs.run(source, tmp_path / "out")
    assert caught.value.hint == "mount source and output at the same path on every node, or use a store"
    assert part_files(tmp_path / "out") == []
    assert infermill.run(source, jobs.card, tmp_path / "out", Options(partition_objects=4)).ok == 8


def test_objects_that_were_deleted_are_rows(jobs: Jobs, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", 12, lambda _: b"")
    options = Options(partition_objects=4)
    with pytest.raises(infermill.StoreError, match="accounts for 0 of 12"):
        infermill.run(photos, jobs.card, tmp_path / "out", options, engine=lambda *_: iter(()))
    for number in (0, 1, 2, 3, 5):  # all that the first task would do, and one more
        (photos / f"{number:03d}.jpg").unlink()
    summary = jobs.run(photos, tmp_path / "out")
    assert (summary.ok, summary.failures_by_code) == (7, {"missing": 5})


@pytest.mark.parametrize(
    ("settings", "cores", "slots", "cpus", "gpus"),
    [
        ({}, 4, 2, 4, None),
        ({"spark.task.resource.gpu.amount": "0.5"}, 4, 2, 4, 0.5),
        ({}, 1, 8, None, None),
        ({"spark.task.cpus": "2"}, 4, 4, None, None),
        ({"spark.task.cpus": "16"}, 16, 1, None, None),
        ({"spark.dynamicAllocation.enabled": "true"}, 4, 8, None, None),
        ({"spark.dynamicAllocation.enabled": "true", "spark.task.cpus": "4"}, 4, 2, None, None),
    ],
)
def test_a_task_asks_for_a_whole_executor_where_settings_leave_it_to_a_profile(
    settings: dict[str, str], cores: int, slots: int, cpus: int | None, gpus: float | None
) -> None:
    shape = shape_of(settings.get, 8, cores)
    assert shape.slots == slots
    asked = {} if shape.profile is None else shape.profile.taskResources
    assert {name: request.amount for name, request in asked.items()} == {
        name: amount for name, amount in (("cpus", cpus), ("gpu", gpus)) if amount is not None
    }
