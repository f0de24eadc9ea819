"""How infermill reaches a Python worker, and how its errors come back; see test_spark.py, too."""

import json
import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pyspark
import pytest
from pyspark import cloudpickle
from pyspark.errors import PythonException
from pyspark.sql import SparkSession

from infermill import Options, errors, load_model, run
from infermill.errors import InfermillError, ModelError, StoreError, UsageError
from infermill.java import find_java
from infermill.models.card_file import parse_card
from infermill.models.opening import open_model
from infermill.shipping import ShippedModel, errors_told, ship_model, task, translated
from infermill.spark import predict, register
from infermill.types import StoreOptions
from tests.clusters import StandaloneCluster
from tests.images import jpeg_bytes, photo
from tests.networks import tiny_classifier
from tests.servers import Bucket

RUN_TASK = "import pickle, sys; print(pickle.load(sys.stdin.buffer)('input'))"


class Session:
    """Takes artifacts as a session of Spark on a cluster does."""

    def addArtifacts(self, path: str, **_: bool) -> None:  # noqa: N802 - as Spark's
        self.path = path


def greet(greeting: str, name: str) -> str:
    return f"{greeting}, {name}"


def run_elsewhere(modules: dict[str, str], folder: Path) -> subprocess.CompletedProcess[bytes]:
    """Run a task in a Python that finds these modules first."""
    for name, source in modules.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(source)
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{folder}:{root}"}
    pickled = cloudpickle.dumps(task(greet, "hello"))
    return subprocess.run(
        [sys.executable, "-c", RUN_TASK], input=pickled, env=environment, capture_output=True, check=False
    )


def test_a_task_runs_where_infermill_is(tmp_path: Path) -> None:
    assert run_elsewhere({}, tmp_path).stdout == b"hello, input\n"


@pytest.mark.parametrize(
    ("modules", "problem"),
    [
        ({"infermill.py": "raise ImportError('there is no infermill')"}, "there is no infermill"),
        ({"infermill.py": "__version__ = '0.0.7'"}, "has infermill 0.0.7, and the driver has"),
        ({"obstore.py": "raise ImportError('no obstore here')"}, "no obstore here"),
    ],
)
def test_one_line_tells_why_a_task_cannot_run(modules: dict[str, str], problem: str, tmp_path: Path) -> None:
    text = run_elsewhere(modules, tmp_path).stderr.decode()
    error = translated(RuntimeError(text))
    assert error is not None, text
    assert problem in error.message
    assert sys.executable in error.message
    assert "PYSPARK_PYTHON" in error.hint
    assert [line for line in text.splitlines() if line.startswith("RuntimeError")] == [text.splitlines()[-1]]


def test_errors_come_back_as_they_were() -> None:
    told = ModelError('it is "wrong"\nin Zürich', "write\tit again")
    with pytest.raises(RuntimeError) as caught, errors_told():
        raise told
    java = f"org.apache.spark.SparkException: Job aborted: Traceback\nRuntimeError: {caught.value}\n\tat Main.java:1)\n"
    error = translated(ValueError(java))
    assert type(error) is ModelError
    assert (error.message, error.hint) == (told.message, told.hint)


def test_what_a_store_refuses_an_executor_says_where_it_was() -> None:
    host = socket.gethostname()
    with pytest.raises(RuntimeError) as caught, errors_told():
        raise StoreError("access to s3://bucket/out is denied", "check the credentials")
    error = translated(caught.value)
    assert error is not None
    assert error.hint.startswith(f"check the credentials; it was the executor on {host} that asked: ")
    assert "spark.executorEnv.AWS_ACCESS_KEY_ID" in error.hint
    with pytest.raises(RuntimeError) as caught, errors_told():
        raise StoreError(f"/photos is there on the driver, and not on {host}", "mount it")
    error = translated(caught.value)
    assert error is not None
    assert error.hint == "mount it"


def test_every_error_of_ours_comes_back() -> None:
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, InfermillError):
            with pytest.raises(RuntimeError) as caught, errors_told():
                raise kind("message", "hint")
            assert type(translated(caught.value)) is kind


@pytest.mark.parametrize(
    "text",
    ["", "infermill-error: ", 'infermill-error: {"error": "ModelErr', 'infermill-error: {"error": "os"}', "no match"],
)
def test_other_errors_are_not_taken_for_ours(text: str) -> None:
    assert translated(RuntimeError(text)) is None


def test_other_errors_pass_through() -> None:
    with pytest.raises(ZeroDivisionError), errors_told():
        _ = 1 / 0


def test_shipped_models_are_equal_by_digest(tmp_path: Path) -> None:
    tiny_classifier(tmp_path / "a.onnx")
    tiny_classifier(tmp_path / "b.onnx", seed=1)
    first, second = (open_model(tmp_path / name, StoreOptions()) for name in ("a.onnx", "b.onnx"))
    assert ShippedModel(first.digest, first) == ShippedModel(first.digest, second)
    assert ShippedModel(first.digest, first) != ShippedModel(second.digest, first)


@pytest.mark.parametrize("damage", [lambda content: content[:-1] + b"?", lambda content: b"?" * len(content)])
def test_a_model_of_a_store_that_is_damaged_in_the_cache_is_fetched_again(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny_classifier(tmp_path / "tiny.onnx", external_data=True)
    card = b"name: tiny\nfiles: {onnx: tiny.onnx}\npreprocess: {resize: {exact: [32, 32]}}\nlabels: labels.txt\n"
    labels = "\n".join(f"class {number}" for number in range(10)).encode()
    for path in tmp_path.glob("tiny.onnx*"):
        bucket.put(path.name, path.read_bytes())
    bucket.put("model.yaml", card)
    bucket.put("labels.txt", labels)
    store = StoreOptions(endpoint_url=bucket.endpoint)
    model = open_model(f"{bucket.uri}/model.yaml", store)
    shipped = ship_model(Session(), model, store)
    for path in (tmp_path / "cache").rglob("*"):
        if path.is_file() and path.suffix != ".lock":
            path.write_bytes(damage(path.read_bytes()))
            assert shipped.open() == model
    bucket.put("labels.txt", labels.replace(b"9", b"8"))
    with pytest.raises(ModelError, match="has changed"):
        shipped.open()


def test_a_model_is_packed_anew_for_another_card_of_the_same_digest(tmp_path: Path) -> None:
    """As two versions of infermill write them, which share a cache."""
    network, cards = tiny_classifier(tmp_path / "tiny.onnx"), []
    for name in ("one", "other"):
        card = parse_card(
            {"name": name, "files": {"onnx": str(network)}, "preprocess": {"resize": {"exact": [32, 32]}}}
        )
        session = Session()
        shipped = ship_model(session, open_model(card, StoreOptions()), StoreOptions())
        with zipfile.ZipFile(session.path) as packed:
            cards.append((shipped.digest, json.loads(packed.read("model.json"))["card"]["name"]))
    assert cards[0][0] == cards[1][0]
    assert [name for _, name in cards] == ["one", "other"]


def python_without_openvino(folder: Path) -> Path:
    """Another Python with the packages of this one, but for OpenVINO and infermill; its Pillow says that it is old."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    for path in Path(pyspark.__file__).parents[1].iterdir():
        if not path.name.startswith(("openvino", "pillow-", "infermill")) and path.suffix != ".pth":
            (site / path.name).symlink_to(path)
    (site / "pillow-1.0.dist-info").mkdir()
    (site / "pillow-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: pillow\nVersion: 1.0\n")
    (folder / "infermill.py").write_text("raise ImportError('this Python has no infermill')")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}:$PYTHONPATH" exec "{folder}/venv/bin/python" "$@"\n')
    python.chmod(0o755)
    return python


def test_executors_get_infermill_and_a_local_model(
    standalone: StandaloneCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PYSPARK_PYTHON", str(python_without_openvino(tmp_path)))
    monkeypatch.setenv("JAVA_HOME", str(find_java().home))
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    card = parse_card(
        {
            "name": "tiny",
            "files": {"onnx": str(tiny_classifier(tmp_path / "tiny.onnx", external_data=True))},
            "preprocess": {"resize": {"exact": [32, 32]}},
        }
    )
    images = [jpeg_bytes(photo(number, (60, 50))) for number in range(20)]
    (tmp_path / "photos").mkdir()
    for number, image in enumerate(images):
        (tmp_path / f"photos/{number:02d}.jpg").write_bytes(image)
    options = Options(runtime="onnxruntime")
    builder = SparkSession.builder.master(standalone.master)
    settings = {"spark.task.cpus": "1", "spark.default.parallelism": "1", "spark.task.maxFailures": "1"}
    for name, value in (standalone.conf | settings).items():
        builder = builder.config(name, value)
    session = builder.getOrCreate()
    try:
        frame = session.createDataFrame([(image,) for image in images], "content binary").repartition(4)
        rows = predict(frame, card, options=options).collect()
        register(session, "classify", card, options)
        with pytest.raises(PythonException) as refused:
            session.sql("SELECT classify(array(1.0))").collect()
        with pytest.raises(PythonException) as lacking:
            predict(frame.coalesce(1), card).collect()
        with pytest.raises(InfermillError) as stopped:
            run(tmp_path / "photos", card, tmp_path / "out", engine=session)
        assert not caplog.records
        options = replace(options, partition_objects=2)
        summary = run(tmp_path / "photos", card, tmp_path / "other", options, engine=session)
        tracker = session.sparkContext.statusTracker()
        job = tracker.getJobInfo(max(tracker.getJobIdsForGroup()))
        tasks = tracker.getStageInfo(job.stageIds[0]).numTasks
    finally:
        session.stop()
    error = translated(refused.value)
    assert isinstance(error, UsageError)
    assert "takes images" in error.message
    told = {bytes(row.content): [tuple(one) for one in row.prediction.top] for row in rows}
    for image, one in zip(images, load_model(card, options)(images), strict=True):
        assert one.top is not None
        assert told[image] == [(label.index, label.label, label.score) for label in one.top]
    host, bare = socket.gethostname(), f"{tmp_path}/venv/bin/python"
    lacks = f"openvino cannot be imported by the Python on {host} ({bare}): "
    found = translated(lacking.value)
    assert found is not None
    assert found.message == f"{lacks}No module named 'openvino'"
    assert stopped.value.message == f"{lacks}it is not installed"
    assert stopped.value.hint == "install openvino for this Python, or choose with --runtime what it has"
    # Of 10 partitions, on 2 executors with 2 cores each, of which a task has one.
    assert (summary.ok, summary.choice["threads"], tasks) == (20, 1, 10)
    differs = f"predictions may differ a little: {host} has pillow 1.0, and the driver has {version('pillow')}"
    assert [record.message for record in caplog.records] == [differs]
