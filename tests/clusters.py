"""Spark clusters for the tests: a standalone one with two workers, and a Spark Connect server; real processes each.

A process holds one classic session at a time, and its JVM stays after `stop()`. A remote session leaves
SPARK_CONNECT_MODE_ENABLED behind, and with it `SparkSession.builder` makes no classic one any more: `open_remote`
takes it away again. Both at once in one process is refused (SESSION_ALREADY_EXIST).
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import psutil

from infermill import Options
from infermill.java import find_java
from tests.images import jpeg_bytes, photo
from tests.servers import START_SECONDS, free_port

WORKERS = 2
GPU = "3"
"The address of the GPU that each worker of a standalone cluster says it has."
# Spark refuses to start a driver or an executor with less than 450 MiB.
LEAST_HEAP = "512m"
LEAN_JVM = "-XX:+UseSerialGC -XX:TieredStopAtLevel=1"
# A program that takes the place of this one dies with the process that started it, even by SIGKILL.
DIE_WITH_PARENT = (
    "import ctypes, os, sys; sys.platform == 'linux' and "
    f"ctypes.CDLL(None).prctl(1, {int(signal.SIGKILL)}); os.execv(sys.argv[1], sys.argv[1:])"
)


# What a worker runs at its start: photos may end with a word, behind the end of their JPEG. SLOW takes a while, and
# leaves the three digits before it in a file, so that a test can tell what was decoded how often; CRASH is a decoder
# with a bug.
SLOW_DECODER = """
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


class SlowDecoder:
    """The decoder of `SLOW_DECODER` for processes that start with `environment`."""

    def __init__(self, folder: Path) -> None:
        (folder / "site").mkdir()
        (folder / "site/sitecustomize.py").write_text(SLOW_DECODER)
        self._decoded = folder / "decoded"
        self._decoded.touch()
        self.environment = {"PYTHONPATH": str(folder / "site"), "DECODED": str(self._decoded)}

    def forget(self) -> None:
        self._decoded.write_text("")

    def decoded(self) -> Counter[str]:
        """How often each photo was decoded."""
        return Counter(self._decoded.read_text().split())


def write_photos(
    folder: Path, count: int, ending: Callable[[int], bytes] = lambda number: b"%03dSLOW" % number
) -> Path:
    """Photos with something behind the end of their JPEG."""
    folder.mkdir()
    plain = [jpeg_bytes(photo(seed, (40, 30))) for seed in range(8)]
    for number in range(count):
        (folder / f"{number:03d}.jpg").write_bytes(plain[number % 8] + ending(number))
    return folder


def part_files(output: Path) -> list[str]:
    """The names of the parts that are there."""
    return sorted(path.name for path in output.glob("part-*.parquet"))


@dataclass(frozen=True)
class StandaloneCluster:
    """A master and two workers with two cores, a GiB and an alleged GPU each, all on the loopback interface."""

    master: str
    folder: Path
    worker_pids: tuple[int, ...]

    @property
    def conf(self) -> dict[str, str]:
        """What a driver sets to be reached by the executors, and to stay small beside other tests."""
        return {
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.driver.memory": LEAST_HEAP,
            "spark.driver.extraJavaOptions": LEAN_JVM,
            "spark.executor.memory": LEAST_HEAP,
            "spark.executor.extraJavaOptions": LEAN_JVM,
            "spark.ui.enabled": "false",
        }

    @property
    def options(self) -> Options:
        """What a job runs with; the executors have the credentials of the S3 server, as an instance has its role's."""
        credentials = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_REGION": "us-east-1"}
        conf = self.conf | {"spark.pyspark.python": sys.executable}
        conf |= {f"spark.executorEnv.{name}": value for name, value in credentials.items()}
        return Options(engine="spark", master=self.master, conf=tuple(f"{key}={conf[key]}" for key in conf))

    def executors(self) -> list[int]:
        """The pids of the executors that run now."""
        return [process.pid for process in self._below_workers() if _runs(process, "CoarseGrainedExecutorBackend")]

    def python_workers(self) -> list[int]:
        """The pids of the Python processes that run tasks or wait for them, not of the daemons that fork them."""
        forks = [process for process in self._below_workers() if _runs(process, "pyspark.daemon")]
        pids = [process.pid for process in forks]
        return [process.pid for process in forks if _parent(process) in pids]

    def infermill_workers(self) -> list[int]:
        """The pids of infermill's own processes, each with a network, below the Python processes that run tasks."""
        return [process.pid for process in self._below_workers() if _runs(process, "infermill.engines.child")]

    def _below_workers(self) -> list[psutil.Process]:
        return [process for pid in self.worker_pids for process in psutil.Process(pid).children(recursive=True)]


def wait_until(is_true: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for something that happens in another process or thread."""
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _runs(process: psutil.Process, program: str) -> bool:
    with suppress(psutil.Error):  # it has ended meanwhile
        return any(program in argument for argument in process.cmdline())
    return False


def _parent(process: psutil.Process) -> int | None:
    with suppress(psutil.Error):
        return process.ppid()
    return None


@contextmanager
def run_standalone(folder: Path) -> Iterator[StandaloneCluster]:
    """A Spark cluster; every daemon has a folder of its own below the given one, with its log and what it writes."""
    port, web_port = free_port(), free_port()
    url = f"spark://127.0.0.1:{port}"
    deploy, hosts = "org.apache.spark.deploy", [_host(number) for number in range(WORKERS)]
    ports = ["--port", str(port), "--webui-port", str(web_port)]
    share = ["--webui-port", "0", "--cores", "2", "--memory", "1G"]
    discovery = folder / "gpus.sh"
    discovery.write_text(f"""#!/bin/sh\necho '{{"name": "gpu", "addresses": ["{GPU}"]}}'\n""")
    discovery.chmod(0o755)
    gpu = "-Dspark.worker.resource.gpu.{}={}"
    gpus = {"SPARK_WORKER_OPTS": f"{gpu.format('amount', 1)} {gpu.format('discoveryScript', discovery)}"}
    with ExitStack() as daemons:
        command = ["spark-class", f"{deploy}.master.Master", "--host", "127.0.0.1", *ports]
        master = _Daemon(folder / "master", command, {})
        daemons.enter_context(master)
        master.wait_until(lambda: _accepts(port))
        command = ["spark-class", f"{deploy}.worker.Worker", *share]
        workers = [
            daemons.enter_context(
                _Daemon(folder / f"worker-{number}", [*command, "--host", host, url], gpus, host=host)
            )
            for number, host in enumerate(hosts)
        ]
        for worker in workers:
            worker.wait_until(lambda: _registered_workers(web_port) == WORKERS)
        yield StandaloneCluster(url, folder, tuple(worker.pid for worker in workers))


def _host(number: int) -> str:
    """Another one for each worker: Spark starts no speculative twin on the host of the first attempt."""
    return f"127.0.0.{number + 1}" if sys.platform == "linux" else "127.0.0.1"


@contextmanager
def run_connect_server(folder: Path, master: str = "local[2]") -> Iterator[str]:
    """A Spark Connect server in a process and a folder of its own, with or before a master; the value is its URL."""
    port = free_port()
    settings = {
        "spark.connect.grpc.binding.address": "127.0.0.1",
        "spark.connect.grpc.binding.port": str(port),
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.host": "127.0.0.1",
        "spark.executor.memory": "512m",
        "spark.ui.enabled": "false",
    }
    command = ["spark-submit", "--class", "org.apache.spark.sql.connect.service.SparkConnectServer"]
    command += ["--master", master]
    command += [argument for name, value in settings.items() for argument in ("--conf", f"{name}={value}")]
    with _Daemon(folder, [*command, "spark-internal"], {}, LEAST_HEAP) as server:
        server.wait_until(lambda: _accepts(port))
        yield f"sc://127.0.0.1:{port}"


@contextmanager
def open_remote(url: str) -> Iterator[Any]:
    """A session of a Connect server; after it, this process may have classic sessions again."""
    from pyspark.sql import SparkSession

    session = SparkSession.builder.remote(url).getOrCreate()
    try:
        yield session
    finally:
        session.stop()
        os.environ.pop("SPARK_CONNECT_MODE_ENABLED", None)


class _Daemon:
    """A program of Spark that runs in a folder of its own, and is killed with all that it started."""

    def __init__(
        self,
        folder: Path,
        command: Sequence[str],
        environment: Mapping[str, str],
        memory: str = "256m",
        host: str = "127.0.0.1",
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        pyspark = find_spec("pyspark")
        assert pyspark is not None
        assert pyspark.origin is not None
        home = Path(pyspark.origin).parent
        inherited = {name: value for name, value in os.environ.items() if "SPARK" not in name}
        settings = {
            "JAVA_HOME": str(find_java().home),
            "PYSPARK_PYTHON": sys.executable,
            "SPARK_DAEMON_JAVA_OPTS": LEAN_JVM,
            "SPARK_DAEMON_MEMORY": memory,
            "SPARK_HOME": str(home),
            "SPARK_LOCAL_DIRS": str(folder / "local"),
            "SPARK_LOCAL_IP": host,
            "SPARK_MASTER_OPTS": "-Dspark.master.rest.enabled=false",
            "SPARK_WORKER_DIR": str(folder / "work"),
        }
        program = [sys.executable, "-c", DIE_WITH_PARENT, str(home / "bin" / command[0]), *command[1:]]
        self._log = folder / "log"
        with self._log.open("wb") as sink:
            self._process = subprocess.Popen(
                program,
                cwd=folder,
                env=inherited | settings | dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until(self, is_ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                log = self._log.read_text(errors="replace")[-4000:]
                raise RuntimeError(f"{self._process.args!r} did not start:\n{log}")
            time.sleep(0.1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(psutil.NoSuchProcess):
            daemon = psutil.Process(self.pid)
            for process in [daemon, *daemon.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process.wait()


def _accepts(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 5):
        return True
    return False


def _registered_workers(web_port: int) -> int:
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{web_port}/json/", timeout=5) as page:
        return int(json.load(page)["aliveworkers"])
    return 0
