"""Predictions inside DataFrames and SQL: every test runs on classic Spark and on Spark Connect."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.functions import predict_batch_udf
from pyspark.sql import SparkSession
from pyspark.sql.types import ArrayType, FloatType, IntegerType, LongType, StructField, StructType

import infermill
from infermill.errors import ModelError, StoreError, UsageError
from infermill.java import find_java
from infermill.shipping import translated
from infermill.spark import InfermillTransformer, make_predict_fn, predict, register
from infermill.types import CardOptions, Options
from tests.clusters import LEAN_JVM, LEAST_HEAP, open_remote
from tests.images import jpeg_bytes, photo
from tests.networks import tiny_classifier, tiny_detector, tiny_embedding, tiny_raw, tiny_tabular
from tests.servers import Bucket, free_port

LABELS = [f"class {number}" for number in range(10)]
CARD = (
    "name: tiny\nfiles: {{onnx: {network}}}\ntask: {task}\npreprocess: {{resize: {{exact: [32, 32]}}, scale: 0.004}}\n"
)
OUTPUT = "output: {{activation: softmax, top_k: 3}}\nlabels: [{labels}]\n"


@pytest.fixture(scope="module", autouse=True)
def spark_environment() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAVA_HOME", str(find_java().home))
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        patch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        yield patch


@pytest.fixture(scope="module", params=["classic", "connect"])
def spark(request: pytest.FixtureRequest, spark_environment: pytest.MonkeyPatch) -> Iterator[Any]:
    if request.param == "connect":
        with open_remote(request.getfixturevalue("connect_server")) as session:
            yield session
    else:
        builder = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
        builder = builder.config("spark.driver.extraJavaOptions", LEAN_JVM).config("spark.driver.memory", LEAST_HEAP)
        session = builder.getOrCreate()
        yield session
        session.stop()


@pytest.fixture
def card(tmp_path: Path) -> Path:
    tiny_classifier(tmp_path / "tiny.onnx", classes=10, size=32)
    (tmp_path / "model.yaml").write_text(
        (CARD + OUTPUT).format(network="tiny.onnx", task="classification", labels=", ".join(LABELS))
    )
    return tmp_path / "model.yaml"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Forty photos, one of which is cut off."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.jpg").write_bytes(jpeg_bytes(photo(number, (60, 50))))
    (folder / "07.jpg").write_bytes((folder / "07.jpg").read_bytes()[:700])
    return folder


def plain(value: Any) -> Any:
    """A row, or what is in one, as dicts and lists."""
    return value.asDict(recursive=True)


def expected(card: Path, content: list[bytes], **options: Any) -> list[dict[str, Any]]:
    """What `load_model` predicts, in the form of a Spark row."""
    return [
        {
            "top": None if one.top is None else [asdict(label) for label in one.top],
            "error": None if one.error is None else asdict(one.error),
        }
        for one in infermill.load_model(card, Options(**options))(content)
    ]


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_images_of_binary_files(spark: Any, card: Path, photos: Path, runtime: infermill.types.RuntimeName) -> None:
    files = spark.read.format("binaryFile").load(str(photos))
    frame = predict(files, card, options=Options(runtime=runtime))
    assert frame.columns == [*files.columns, "prediction"]
    rows = frame.orderBy("path").collect()
    content = [(photos / f"{number:02d}.jpg").read_bytes() for number in range(40)]
    assert [bytes(row.content) for row in rows] == content
    assert [plain(row.prediction) for row in rows] == expected(card, content, runtime=runtime)
    assert [row.prediction.error.code for row in rows if row.prediction.error] == ["truncated"]
    assert rows[0].prediction.top[0].label in LABELS


def test_detections_are_in_pixels_of_each_image(spark: Any, tmp_path: Path) -> None:
    tiny_detector(tmp_path / "tiny.onnx", "yolov8")
    options = CardOptions(format="yolov8", letterbox=(64, 64), max_detections=2)
    (tmp_path / "photos").mkdir()
    for name, size in (("a", (128, 64)), ("b", (64, 256))):
        image = Image.new("RGB", size)
        image.paste((250, 0, 0), (16, 8, 48, 56))
        image.save(tmp_path / "photos" / f"{name}.png")
    files = spark.read.format("binaryFile").load(str(tmp_path / "photos"))
    rows = predict(files, tmp_path / "tiny.onnx", card_options=options).orderBy("path").select("prediction").collect()
    told = [[plain(one) for one in row.prediction.detections] for row in rows]
    assert [[tuple(one["box"].values()) for one in found] for found in told] == [[(16, 8, 48, 56)]] * 2
    assert (told[0][0]["index"], told[0][0]["label"]) == (0, None)


def test_order_nulls_and_more_rows_than_a_batch(spark: Any, card: Path, photos: Path) -> None:
    images = [path.read_bytes() for path in sorted(photos.iterdir())][:6]
    inputs = [None if number % 50 == 49 else images[number % 6] for number in range(1200)]
    frame = spark.createDataFrame(list(enumerate(inputs)), "number int, photo binary").coalesce(1)
    rows = predict(frame, card, "photo", "told").select("number", "told").collect()
    assert [row.number for row in rows] == list(range(1200))
    answers = expected(card, images)
    null = {"top": None, "error": {"stage": "fetch", "code": "empty", "message": "it is null"}}
    assert [plain(row.told) for row in rows] == [
        null if content is None else answers[number % 6] for number, content in enumerate(inputs)
    ]


def test_it_is_lazy_runs_once_below_a_filter_and_takes_an_empty_table(
    spark: Any, card: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = spark.read.format("binaryFile").load(str(photos))
    failed = predict(files, card).where("prediction.error is not null").select("path", "prediction.error.code")
    failed.explain()
    assert capsys.readouterr().out.count("ArrowEvalPython") == 1
    assert [row.code for row in failed.collect()] == ["truncated"]
    assert predict(files.where("length < 0"), card).collect() == []
    assert len(predict(files, card).limit(3).collect()) == 3


def test_paths_and_uris_are_fetched_by_the_executors(spark: Any, card: Path, photos: Path, bucket: Bucket) -> None:
    for path in photos.iterdir():
        bucket.put(f"a b/{path.name}", path.read_bytes())
    names = ["00.jpg", "01.jpg", "07.jpg", "missing.jpg"]
    uris = [f"{bucket.uri}/a b/{name}" for name in names] + [f"file:{photos}/00.jpg", str(photos / "01.jpg")]
    uris += ["hdfs://namenode/photo.jpg", None, ""]  # type: ignore[list-item]
    frame = spark.createDataFrame(list(enumerate(uris)), "number int, uri string")
    options = Options(endpoint_url=bucket.endpoint, region="us-east-1", anonymous=True)
    rows = predict(frame, card, "uri", options=options).orderBy("number").collect()
    codes = [row.prediction.error and row.prediction.error.code for row in rows]
    assert codes == [None, None, "truncated", "missing", None, None, "unreadable", "empty", "unreadable"]
    answers = expected(card, [(photos / name).read_bytes() for name in names[:3]])
    assert [plain(row.prediction) for row in rows[:3]] == answers
    assert [plain(row.prediction) for row in rows[4:6]] == answers[:2]


def test_a_model_in_a_store(spark: Any, card: Path, photos: Path, bucket: Bucket) -> None:
    for path in (card, card.with_name("tiny.onnx")):
        bucket.put(f"models/{path.name}", path.read_bytes())
    options = Options(endpoint_url=bucket.endpoint, region="us-east-1", anonymous=True)
    files = spark.read.format("binaryFile").load(str(photos)).orderBy("path").limit(2)
    frame = predict(files, f"{bucket.uri}/models/model.yaml", options=options)
    answers = expected(card, [(photos / name).read_bytes() for name in ("00.jpg", "01.jpg")])
    assert [plain(row.prediction) for row in frame.orderBy("path").collect()] == answers


def test_a_model_that_changes_before_it_is_read_ends_the_job(
    spark: Any, card: Path, photos: Path, bucket: Bucket
) -> None:
    network = tiny_classifier(card.with_name("tiny.onnx"), classes=10, size=32, seed=7)
    for path in (card, network):
        bucket.put(path.name, path.read_bytes())
    options = Options(endpoint_url=bucket.endpoint, region="us-east-1", anonymous=True)
    files = spark.read.format("binaryFile").load(str(photos))
    # Workers on this machine read the very files; of a local model, others got a copy that cannot change.
    shared = card if isinstance(spark, SparkSession) else f"{bucket.uri}/model.yaml"
    frame = predict(files, shared, options=options)
    tiny_classifier(network, classes=10, size=32, seed=8)
    bucket.put(network.name, network.read_bytes())
    with pytest.raises(Exception, match="infermill-error") as caught:
        frame.collect()
    error = translated(caught.value)
    assert isinstance(error, ModelError)
    assert "has changed" in error.message


def test_a_store_that_does_not_answer_ends_the_job(spark: Any, card: Path) -> None:
    frame = spark.createDataFrame([("s3://photos/1.jpg",)] * 100, "uri string")
    endpoint = f"http://127.0.0.1:{free_port()}"
    options = Options(endpoint_url=endpoint, region="us-east-1", anonymous=True, store_deadline=1)
    with pytest.raises(Exception, match="infermill-error") as caught:
        predict(frame, card, "uri", options=options).collect()
    error = translated(caught.value)
    assert isinstance(error, StoreError)
    assert "s3://photos/1.jpg" in error.message


def test_embeddings_and_raw_outputs(spark: Any, photos: Path, tmp_path: Path) -> None:
    content = [(photos / f"{number:02d}.jpg").read_bytes() for number in range(3)]
    frame = spark.createDataFrame([(one,) for one in [*content, b"text"]], "content binary").coalesce(1)
    for task, make in (("embedding", tiny_embedding), ("raw", tiny_raw)):
        card = tmp_path / f"{task}.yaml"
        card.write_text(CARD.format(network=make(tmp_path / f"{task}.onnx").name, task=task))
        rows = predict(frame, card).collect()
        assert rows[3].prediction[0] is None
        assert rows[3].prediction.error.code == "unsupported"
        for row, one in zip(rows, infermill.load_model(card)(content), strict=False):
            if one.embedding is not None:
                assert row.prediction.embedding == one.embedding.tolist()
            elif one.outputs is not None:
                assert row.prediction.outputs.boxes == one.outputs["boxes"].ravel().tolist()
                assert row.prediction.outputs.kind == one.outputs["kind"].ravel().tolist()


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        ("array<float>", "array(a, b)"),
        ("array<double>", "array(cast(a as double), cast(b as double))"),
        ("array<array<float>>", "array(array(a, b))"),
        ("struct", "struct(a, b)"),
    ],
)
def test_numbers(spark: Any, tmp_path: Path, kind: str, columns: str) -> None:
    shape = (1, 2) if kind == "array<array<float>>" else (2,)
    network = tiny_tabular(tmp_path / "tabular.onnx", shape)
    table = [(float(number), number / 7) for number in range(1000)] + [(None, 1.0)]
    frame = spark.createDataFrame(table, "a float, b float").selectExpr("a", f"{columns} as features").coalesce(1)
    card_options = CardOptions(task="raw")
    rows = predict(frame, network, "features", card_options=card_options).collect()
    values = [np.array(row, np.float32).reshape(shape) for row in table[:1000]]
    told = [one.outputs for one in infermill.load_model(network, card_options=card_options)(values)]
    for row, outputs in zip(rows, told, strict=False):
        assert outputs is not None
        np.testing.assert_array_equal(row.prediction.outputs.logits, outputs["logits"])
    assert rows[-1].prediction.error.code == "unsupported"


def test_what_cannot_be_predicted_on_is_told_at_once(spark: Any, card: Path, tmp_path: Path) -> None:
    frame = spark.createDataFrame([(1, b"", [1.0])], "number int, content binary, features array<float>")
    with pytest.raises(UsageError, match="no column 'photo'") as caught:
        predict(frame, card, "photo")
    assert "number, content, features" in caught.value.hint
    with pytest.raises(UsageError, match="'number' is int"):
        predict(frame, card, "number")
    with pytest.raises(UsageError, match="the model tiny takes images"):
        predict(frame, card, "features")
    with pytest.raises(ModelError, match="does not exist"):
        predict(frame, tmp_path / "nowhere.yaml")
    with pytest.raises(UsageError, match="threads"):
        predict(frame, card, options=Options(threads=0))


def test_a_column_with_an_odd_name_takes_its_own_place(spark: Any, card: Path, photos: Path) -> None:
    content = (photos / "00.jpg").read_bytes()
    frame = spark.createDataFrame([(content, 1)], ["a `photo`.jpg", "number"])
    (row,) = predict(frame, card, "a `photo`.jpg", "a `photo`.jpg").collect()
    assert [plain(row[0]), row.number] == [*expected(card, [content]), 1]


def test_a_function_of_sql(spark: Any, card: Path, photos: Path) -> None:
    spark.read.format("binaryFile").load(str(photos)).createOrReplaceTempView("photos")
    classify = register(spark, "classify", card)
    told = spark.sql("SELECT path, classify(content).top[0].label AS label FROM photos ORDER BY path").collect()
    answers = expected(card, [path.read_bytes() for path in sorted(photos.iterdir())])
    assert [row.label for row in told] == [one["top"] and one["top"][0]["label"] for one in answers]
    column = spark.table("photos").orderBy("path").select(classify("content").top[0].label.alias("label"))
    assert [row.label for row in column.collect()] == [row.label for row in told]
    features = "SELECT classify(array(1.0)) AS one"
    with pytest.raises(Exception, match="infermill-error") as caught:
        spark.sql(features).collect()
    assert isinstance(translated(caught.value), UsageError)


def test_a_stage_of_a_pipeline_is_saved_and_loaded(
    spark: Any, card: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = spark.read.format("binaryFile").load(str(photos))
    monkeypatch.chdir(tmp_path)
    options = Options(runtime="onnxruntime", allow_host=("example.org",))
    (tmp_path / "other.txt").write_text("\n".join(reversed(LABELS)))
    card_options = CardOptions(top_k=2, labels="other.txt")
    stage = InfermillTransformer(model="model.yaml", outputCol="told", options=options, cardOptions=card_options)
    Pipeline(stages=[stage]).fit(files).write().overwrite().save(str(tmp_path / "saved"))
    monkeypatch.chdir("/")
    another = spark.newSession()
    loaded = PipelineModel.read().session(another).load(str(tmp_path / "saved"))
    rows = loaded.transform(another.read.format("binaryFile").load(str(photos))).orderBy("path").collect()
    assert [len(row.told.top) for row in rows if row.told.top] == [2] * 39
    assert rows[0].told.top[0].label == LABELS[9 - rows[0].told.top[0]["index"]]
    assert [plain(row.told) for row in stage.transform(files).orderBy("path").collect()] == [
        plain(row.told) for row in rows
    ]
    stage.save(str(tmp_path / "alone"))
    alone = InfermillTransformer.load(str(tmp_path / "alone"))
    assert [plain(row.told) for row in alone.transform(files).orderBy("path").collect()] == [
        plain(row.told) for row in rows
    ]
    assert not [path for path in (tmp_path / "alone").rglob("*") if path.stat().st_size > 2048 and path.is_file()]
    (metadata,) = (tmp_path / "alone/metadata").glob("part-*")
    kept = {"model", "digest", "options", "cardOptions", "inputCol", "outputCol"}
    assert json.loads(metadata.read_text())["paramMap"].keys() == kept
    tiny_classifier(tmp_path / "tiny.onnx", classes=10, size=32, seed=1)
    with pytest.raises(ModelError, match="has changed"):
        loaded.transform(files)


def test_without_pyspark_the_error_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "pyspark.py").write_text("raise ImportError('no pyspark')")
    command = [sys.executable, "-c", "import infermill.cli, infermill.spark"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "hint: pip install 'infermill[spark]'"
    assert "infermill.spark needs PySpark 4.1 or later: no pyspark" in done.stderr


def test_a_stage_without_a_model_or_with_a_card() -> None:
    with pytest.raises(UsageError, match="no model"):
        InfermillTransformer().transform(None)
    card = infermill.parse_card({"name": "tiny", "files": {"onnx": "tiny.onnx"}})
    with pytest.raises(UsageError, match="not the card"):
        InfermillTransformer(model=card)  # type: ignore[arg-type]


TOP = StructType([StructField("index", ArrayType(IntegerType())), StructField("score", ArrayType(FloatType()))])


def test_predict_batch_udf(spark: Any, card: Path, photos: Path, tmp_path: Path) -> None:
    files = spark.read.format("binaryFile").load(str(photos))
    classify = predict_batch_udf(make_predict_fn(card), return_type=TOP, batch_size=8)
    rows = files.withColumn("told", classify("content")).orderBy("path").collect()
    answers = expected(card, [path.read_bytes() for path in sorted(photos.iterdir())])
    for row, answer in zip(rows, answers, strict=True):
        if answer["top"] is None:
            assert row.told["index"] == [-1] * 3
            assert np.isnan(row.told.score).all()
        else:
            assert row.told["index"] == [one["index"] for one in answer["top"]]
            assert row.told.score == [one["score"] for one in answer["top"]]


def test_predict_batch_udf_with_pixels_and_with_numbers(spark: Any, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 40, 30, 3), np.uint8)
    card = tmp_path / "raw.yaml"
    tiny_raw(tmp_path / "raw.onnx")
    card.write_text(CARD.format(network="raw.onnx", task="raw"))
    outputs = StructType([StructField("boxes", ArrayType(FloatType())), StructField("kind", LongType())])
    function = predict_batch_udf(
        make_predict_fn(card, spark=spark), return_type=outputs, batch_size=2, input_tensor_shapes=[[40, 30, 3]]
    )
    frame = spark.createDataFrame([(one.ravel().tolist(),) for one in pixels], "pixels array<int>").coalesce(1)
    rows = frame.select(function("pixels").alias("told")).collect()
    for row, one in zip(rows, infermill.load_model(card)(list(pixels)), strict=True):
        assert one.outputs is not None
        assert row.told.boxes == one.outputs["boxes"].ravel().tolist()
        assert row.told.kind == one.outputs["kind"]

    network = tiny_tabular(tmp_path / "tabular.onnx", (3,))
    function = predict_batch_udf(
        make_predict_fn(network, spark=spark), return_type=TOP, batch_size=4, input_tensor_shapes=[[3]]
    )
    features = spark.createDataFrame([([float(number), 1.0, 2.0],) for number in range(9)], "features array<double>")
    told = [row.told["index"][0] for row in features.coalesce(1).select(function("features").alias("told")).collect()]
    alone = infermill.load_model(network)([[number, 1.0, 2.0] for number in range(9)])
    assert told == [one.top[0].index for one in alone if one.top]
