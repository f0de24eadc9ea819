"""The same assertions for every engine, and for every place that a job reads from and writes to."""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyspark.sql import SparkSession

import infermill
from infermill import Options, Summary
from infermill.output import Output
from infermill.session import spark_session
from tests.clusters import open_remote
from tests.networks import tiny_classifier
from tests.servers import Bucket
from tests.shards import tar_of

CARD = "name: tiny\nfiles: {onnx: tiny.onnx}\npreprocess: {resize: {exact: [32, 32]}}\noutput: {top_k: 2}\n"
ODD_KEYS = (
    "a b.png", "p%2Fq.png", "ünï/日本.png", "new\nline.png", "../up.png", "a/../b.png", "a//b.png", "x" * 1020 + ".png"
)  # fmt: skip


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class Where:
    """An engine, and whether it reads from and writes to files or a store."""

    engine: SparkSession | None
    store: Literal["files", "s3"]


@dataclass(frozen=True)
class Place:
    """Somewhere to read from and to write to, and the engine that does it."""

    source: str
    output: str
    options: Options
    put: Callable[[str, bytes], object]
    parts: Callable[[], list[str]]
    engine: SparkSession | None

    def run(self, card: Path | str, source: Path | str = "", **options: Any) -> Summary:
        return infermill.run(
            source or self.source, card, self.output, replace(self.options, **options), engine=self.engine
        )


@pytest.fixture(
    scope="module",
    params=[
        ("local", "files"),
        ("local", "s3"),
        ("spark", "files"),
        pytest.param(("standalone", "s3"), marks=pytest.mark.slow),
        pytest.param(("connect", "files"), marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def where(request: pytest.FixtureRequest) -> Iterator[Where]:
    engine, store = request.param
    if engine == "local":
        yield Where(None, store)
    elif engine == "spark":
        with spark_session(Options(master="local[2]")) as session:
            yield Where(session, store)
    elif engine == "standalone":
        conf = request.getfixturevalue("standalone").options
        with spark_session(conf) as session:
            yield Where(session, store)
    else:
        with open_remote(request.getfixturevalue("connect_server")) as session:
            yield Where(session, store)


@pytest.fixture
def place(request: pytest.FixtureRequest, where: Where, tmp_path: Path) -> Place:
    if where.store == "files":
        folder = tmp_path / "photos"
        folder.mkdir()

        def parts() -> list[str]:
            return sorted(path.name for path in (tmp_path / "out").glob("*.parquet"))

        return Place(
            str(folder),
            str(tmp_path / "out"),
            Options(partition_objects=8),
            lambda key, data: (folder / key).write_bytes(data),
            parts,
            where.engine,
        )
    bucket: Bucket = request.getfixturevalue("bucket")
    options = Options(partition_objects=8, endpoint_url=bucket.endpoint)

    def remote_parts() -> list[str]:
        names = Output(f"{bucket.uri}/out", options).names()
        return sorted(name for name in names if name.endswith(".parquet"))

    return Place(
        f"{bucket.uri}/photos/",
        f"{bucket.uri}/out",
        options,
        lambda key, data: bucket.put(f"photos/{key}", data),
        remote_parts,
        where.engine,
    )


@pytest.fixture
def card(tmp_path: Path) -> Path:
    tiny_classifier(tmp_path / "tiny.onnx", classes=10, size=32)
    (tmp_path / "model.yaml").write_text(CARD)
    return tmp_path / "model.yaml"


def name_of(row: dict[str, str]) -> str:
    return row["key"].rpartition("/")[2]


def test_a_job_ends_with_a_row_for_each_object(place: Place, card: Path, tmp_path: Path) -> None:
    for number in range(20):
        place.put(f"{number:02d}.png", png(number))
    place.put("20.jpg", b"<html>not found</html>")
    place.put("21.jpg", b"")
    place.put("notes.txt", b"no image")
    summary = place.run(card)
    assert (summary.planned, summary.ok, summary.failures_by_code) == (22, 20, {"unsupported": 1, "empty": 1})
    assert place.parts() == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    rows = infermill.read(place.output, place.options).to_pylist()
    assert [name_of(row) for row in rows] == [f"{n:02d}.png" for n in range(20)] + ["20.jpg", "21.jpg"]
    predict = infermill.load_model(card)
    for number, prediction in enumerate(predict([png(number) for number in range(20)])):
        assert prediction.top is not None
        assert [one["index"] for one in rows[number]["top"]] == [one.index for one in prediction.top]
        np.testing.assert_allclose(
            [one["score"] for one in rows[number]["top"]], [one.score for one in prediction.top], atol=1e-5
        )
    assert all(row["etag"] and row["size"] is not None for row in rows)
    if place.engine is not None:
        infermill.run(place.source, card, tmp_path / "here", place.options)
        assert infermill.read(tmp_path / "here").equals(infermill.read(place.output, place.options))


def test_members_of_shards_are_predicted_with_their_labels(place: Place, card: Path) -> None:
    for shard in range(2):
        names = [f"{shard}-{number}" for number in range(6)]
        files = {f"{name}.png": png(int(name[2:])) for name in names} | {f"{name}.cls": name.encode() for name in names}
        place.put(f"{shard}.tar", tar_of(dict(sorted(files.items()))))
    place.put("2.tar", b"no tar")
    summary = place.run(card, f"tar:{place.source}")
    assert (summary.planned, summary.ok, summary.failures_by_code) == (13, 12, {"corrupt": 1})
    rows = infermill.read(place.output, place.options).to_pylist()
    labels = [f"{shard}-{number}" for shard in range(2) for number in range(6)]
    assert [name_of(row) for row in rows] == [f"{label[0]}.tar#{label}.png" for label in labels] + ["2.tar#@0"]
    assert [row["label"] for row in rows] == [*labels, None]
    expected = infermill.load_model(card)([png(number) for number in range(6)] * 2)
    assert [row["top"][0]["index"] for row in rows[:-1]] == [one.top[0].index for one in expected if one.top]


def test_a_job_that_runs_again_predicts_nothing(place: Place, card: Path) -> None:
    for number in range(10):
        place.put(f"{number}.png", png(number))
    first = place.run(card)
    rows = infermill.read(place.output, place.options)
    again = place.run(card)
    assert first.workers > 0
    assert (again.workers, again.model_loads) == (0, 0)
    assert again.ok == first.ok == 10
    assert infermill.read(place.output, place.options).equals(rows)


def test_another_job_is_refused(place: Place, card: Path) -> None:
    place.put("1.png", png(1))
    place.run(card)
    with pytest.raises(infermill.JobMismatchError, match="limit: None -> 1"):
        place.run(card, limit=1)


def test_success_accounts_for_every_part(place: Place, card: Path) -> None:
    for number in range(10):
        place.put(f"{number}.png", png(number))
    place.put("bad.png", b"\x89PNG\r\n\x1a\n")
    place.run(card)
    content = Output(place.output, place.options).read_existing("_SUCCESS")
    success = json.loads(content)
    assert success["parts"] == [[0, 8, 0], [1, 2, 1]]
    assert success["planned"] == success["ok"] + success["failed"] == 11


def test_odd_keys_come_back_exactly(place: Place, card: Path, tmp_path: Path) -> None:
    keys = ODD_KEYS if place.source.startswith("s3://") else [key for key in ODD_KEYS[:4] if "/" not in key]
    for number, key in enumerate(keys):
        place.put(key, png(number))
    summary = place.run(card)
    assert summary.failures_by_code == {}
    rows = infermill.read(place.output, place.options)
    prefix = "photos/" if place.source.startswith("s3://") else ""
    assert sorted(rows["key"].to_pylist()) == sorted(prefix + key for key in keys)
    predict = infermill.load_model(card)
    by_key = dict(zip(rows["key"].to_pylist(), rows["top"].to_pylist(), strict=True))
    for number, key in enumerate(keys):
        (prediction,) = predict([png(number)])
        assert prediction.top is not None
        assert by_key[prefix + key][0]["index"] == prediction.top[0].index


def test_objects_that_change_or_go_after_listing_are_rows(place: Place, card: Path, tmp_path: Path) -> None:
    """The plan of a job that never ran is the listing; what happens then, happens after it."""
    manifest = [
        {"uri": f"{place.source.rstrip('/')}/{n}.png", "etag": '"an-older-one"' if n == 1 else None} for n in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(manifest), tmp_path / "keys.parquet")
    place.put("0.png", png(0))
    place.put("1.png", png(1))
    summary = place.run(card, tmp_path / "keys.parquet")
    assert summary.failures_by_code == {"changed": 1, "missing": 1}
    rows = infermill.read(place.output, place.options).to_pylist()
    assert [row["error"] and row["error"]["code"] for row in rows] == [None, "changed", "missing"]
    assert rows[0]["key"] == manifest[0]["uri"]


def test_the_model_may_lie_in_the_store_too(where: Where, bucket: Bucket, card: Path, tmp_path: Path) -> None:
    options = Options(endpoint_url=bucket.endpoint, region="us-east-1", anonymous=True)
    bucket.put("model/tiny.onnx", (tmp_path / "tiny.onnx").read_bytes())
    bucket.put("model/model.yaml", CARD.encode())
    bucket.put("photos/1.png", png(1))
    source, model = f"{bucket.uri}/photos/", f"{bucket.uri}/model/model.yaml"
    remote = infermill.run(source, model, tmp_path / "remote", options, engine=where.engine)
    local = infermill.run(source, card, tmp_path / "local", options)
    assert (remote.digest, remote.ok) == (local.digest, 1)
    with pytest.raises(infermill.ModelError, match=r"missing\.yaml does not exist"):
        infermill.run(source, f"{bucket.uri}/missing.yaml", tmp_path / "none", options)
