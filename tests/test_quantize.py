"""`infermill quantize`: a card with evidence, a gate, labels, tasks, and what is refused."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infermill.errors import ModelError, SourceError, UsageError
from infermill.job import run
from infermill.models.card_file import read_card
from infermill.models.opening import open_model
from infermill.predict import load_model
from infermill.quantize import quantize
from infermill.report import quantization_text
from infermill.rows import read
from infermill.types import CardOptions, Options, StoreOptions
from tests.checkpoints import write_checkpoint
from tests.networks import (
    Network,
    pictures,
    tiny_classifier,
    tiny_detector,
    tiny_embedding,
    tiny_raw,
    tiny_tabular,
    tiny_unanswered,
)
from tests.shards import packed, png, write_records

COMMAND = [str(Path(sys.executable).with_name("infermill")), "quantize"]
QUIET = Options(threads=2)
COUNT = 96


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, and a file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    for number, picture in enumerate(pictures(COUNT)):
        Image.fromarray(picture).save(folder / f"{number}.png")
    (folder / "bad.png").write_bytes(b"<html>")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A card of a small classifier, with labels beside it."""
    tiny_classifier(tmp_path / "tiny.onnx")
    (tmp_path / "synset.txt").write_text("".join(f"kind {number}\n" for number in range(10)))
    return write_card(tmp_path / "model.yaml", files={"onnx": "tiny.onnx"}, labels="synset.txt")


def write_card(path: Path, **fields: Any) -> Path:
    preprocess = {"resize": {"exact": [32, 32]}, "scale": 1 / 255}
    card = {"name": "tiny", "preprocess": preprocess, "output": {"activation": "softmax"}} | fields
    path.write_text(json.dumps(card))
    return path


def operators(network: Path) -> set[str]:
    return {node.op_type for node in onnx.load(network).graph.node}


# --- what is written


def test_a_card_carries_its_evidence_and_runs(tmp_path: Path, model: Path, photos: Path) -> None:
    found = quantize(model, photos, tmp_path / "int8.yaml", QUIET)
    assert (found.card, found.network) == (tmp_path / "int8.yaml", tmp_path / "int8.onnx")
    assert found.skipped == 1
    assert found.calibrated + found.selected + found.evidence.objects == COUNT, "three parts that share nothing"
    assert "QuantizeLinear" in operators(tmp_path / "int8.onnx")
    card, before = read_card(tmp_path / "int8.yaml"), open_model(model, StoreOptions())
    assert (card.name, card.labels, card.preprocess) == ("int8", "synset.txt", before.card.preprocess)
    evidence = card.evidence
    assert evidence is not None
    assert (evidence.of, evidence.source, evidence.runtime) == (before.digest, str(photos), "openvino")
    assert (evidence.agreement, evidence.interval) == (found.evidence.agreement, found.evidence.interval)
    assert (evidence.objects, evidence.accuracy) == (found.evidence.objects, None)
    assert evidence.agreement > 0.9
    assert evidence.int8_share is not None and evidence.int8_share >= 0.5
    summary = run(photos, tmp_path / "int8.yaml", tmp_path / "out", QUIET)
    assert (summary.ok, summary.failed) == (COUNT, 1)
    assert summary.digest != before.digest
    run(photos, model, tmp_path / "fp32", QUIET)
    tables = [read(tmp_path / name).to_pylist() for name in ("out", "fp32")]
    best, expected = ({row["key"]: row["top"][0]["label"] for row in rows if row["top"]} for rows in tables)
    same = sum(best[key] == expected[key] for key in best)
    assert COUNT - same <= evidence.objects * (1 - evidence.agreement) + 0.1 * COUNT, "a job finds what was measured"


def test_evidence_is_no_part_of_the_digest(tmp_path: Path, model: Path, photos: Path) -> None:
    quantize(model, photos, tmp_path / "int8.yaml", QUIET)
    card = tmp_path / "int8.yaml"
    digest = open_model(card, StoreOptions()).digest
    card.write_text(card.read_text().partition("evidence:")[0])
    assert read_card(card).evidence is None
    assert open_model(card, StoreOptions()).digest == digest


def test_the_same_call_finds_the_same(tmp_path: Path, model: Path, photos: Path) -> None:
    found = [quantize(model, photos, tmp_path / f"{name}.yaml", QUIET) for name in ("one", "two")]
    assert found[0].evidence == found[1].evidence
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


def test_both_runtimes_execute_what_is_written(tmp_path: Path, model: Path, photos: Path) -> None:
    found = quantize(model, photos, tmp_path / "int8.yaml", replace(QUIET, runtime="onnxruntime"))
    assert found.runtime == "onnxruntime"
    scores = [
        load_model(tmp_path / "int8.yaml", Options(runtime=name, threads=2))(list(pictures(8)))
        for name in ("onnxruntime", "openvino")
    ]
    for one, other in zip(*scores, strict=True):
        assert one.top is not None and other.top is not None
        assert one.top[0].score == pytest.approx(other.top[0].score, abs=0.02)


# --- the gate


def bad_network(path: Path, width: int) -> Path:
    """A network that int8 harms: what decides is small beside a channel that says nothing; `width` is how much is
    computed with that.
    """
    net = Network()
    kernel = net.random.normal(0, 1e-3, (4, 3, 8, 8))
    kernel[3] = 100.0
    tip = net.node("Flatten", net.node("Conv", "images", net.weight(kernel), strides=[8, 8]))
    weights = net.random.normal(0, 100, (64, width))
    weights[48:] = 0  # of the loud channel nothing is used
    tip = net.node("Relu", net.node("Gemm", tip, net.weight(weights)))
    tip = net.gemm(tip, width, 4, name="logits")
    image = onnx.helper.make_tensor_value_info("images", 1, ["N", 3, 32, 32])
    return net.save(path, [image], [onnx.helper.make_tensor_value_info(tip, 1, ["N", 4])])


def test_what_int8_harms_is_found_and_kept_in_float(tmp_path: Path, photos: Path) -> None:
    bad_network(tmp_path / "bad.onnx", 16)
    card = write_card(tmp_path / "bad.yaml", files={"onnx": "bad.onnx"})
    found = quantize(card, photos, tmp_path / "int8.yaml", QUIET)
    assert "gemm2" in found.kept_in_float and "conv0" not in found.kept_in_float
    assert set(found.kept_in_float) | {"conv0", "logits"} == {"conv0", "gemm2", "logits"}
    assert found.evidence.agreement > 0.9
    assert found.int8_share is not None and 0.9 < found.int8_share < 1


def test_below_the_gate_nothing_is_written(tmp_path: Path, photos: Path) -> None:
    bad_network(tmp_path / "bad.onnx", 1000)
    card = write_card(tmp_path / "bad.yaml", files={"onnx": "bad.onnx"}, labels=["a", "b", "c", "d"])
    before = sorted(tmp_path.iterdir())
    output = str(tmp_path / "int8.yaml")
    arguments = [str(card), "--calibrate", str(photos), "-o", output, "--min-agreement", "0.99"]
    done = subprocess.run([*COMMAND, *arguments, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "less than --min-agreement 0.99" in done.stderr
    assert sorted(tmp_path.iterdir()) == before
    found = json.loads(done.stdout)
    assert (found["passed"], found["card"]) == (False, None)
    assert found["evidence"]["agreement"] < 0.99
    assert all(one["expected"] != one["found"] for one in found["worst"][:2])
    assert {one["key"] for one in found["worst"]} <= {f"{number}.png" for number in range(COUNT)}
    result = quantize(card, photos, tmp_path / "int8.yaml", QUIET, min_agreement=0.99)
    text = quantization_text(result)
    assert result.worst[0].key in text and "worst objects" in text and not result.passed
    written = quantize(card, photos, tmp_path / "int8.yaml", QUIET)
    assert written.card is not None, "without the gate the card says it"
    assert written.evidence.agreement < 0.99


def test_a_gate_that_is_met(tmp_path: Path, model: Path, photos: Path) -> None:
    output = str(tmp_path / "int8.yaml")
    arguments = [str(model), "--calibrate", str(photos), "-o", output, "--min-agreement", "0.5"]
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=True)
    assert "the same best class" in done.stdout
    assert done.stdout.endswith(f"{tmp_path}/int8.onnx\n{tmp_path}/int8.yaml\n")


# --- labels


def test_accuracy_by_a_file_of_labels(tmp_path: Path, model: Path, photos: Path) -> None:
    predict = load_model(model, QUIET)
    keys = [f"{number}.png" for number in range(COUNT)]
    names = [one.top[0].label for one in predict([photos / key for key in keys]) if one.top]
    pq.write_table(pa.table({"key": keys, "label": names}), tmp_path / "truth.parquet")
    found = quantize(model, photos, tmp_path / "int8.yaml", QUIET, truth=str(tmp_path / "truth.parquet"))
    assert found.evidence.accuracy is not None
    before, after = found.evidence.accuracy
    assert (before.share, before.of) == (1.0, found.evidence.objects)
    assert after.share == found.evidence.agreement
    card = read_card(tmp_path / "int8.yaml")
    assert card.evidence is not None and card.evidence.accuracy is not None
    assert (card.evidence.accuracy.this, card.evidence.accuracy.objects) == (after.share, before.of)
    assert "accuracy in int8" in quantization_text(found)
    assert f"of {found.evidence.objects} with a label" in quantization_text(found)
    pq.write_table(pa.table({"key": keys, "label": ["horse"] * COUNT}), tmp_path / "truth.parquet")
    with pytest.raises(SourceError, match="labels that are no class of the model, as 'horse'"):
        quantize(model, photos, tmp_path / "x.yaml", QUIET, truth=str(tmp_path / "truth.parquet"))
    with pytest.raises(SourceError, match="no labels that can be read"):
        quantize(model, photos, tmp_path / "x.yaml", QUIET, truth=str(photos / "bad.png"))


def test_one_number_has_two_classes(tmp_path: Path, photos: Path) -> None:
    tiny_classifier(tmp_path / "cat.onnx", classes=1)
    output = {"activation": "sigmoid"}
    card = write_card(tmp_path / "cat.yaml", files={"onnx": "cat.onnx"}, labels=["cat"], output=output)
    keys = [f"{number}.png" for number in range(COUNT)]
    scores = [one.top[0].score for one in load_model(card, QUIET)([photos / key for key in keys]) if one.top]
    names = ["cat" if score > 0.5 else "not cat" for score in scores]
    assert len(set(names)) == 2
    pq.write_table(pa.table({"key": keys, "label": names}), tmp_path / "truth.parquet")
    found = quantize(card, photos, tmp_path / "int8.yaml", QUIET, truth=str(tmp_path / "truth.parquet"))
    assert found.evidence.accuracy is not None
    assert [one.share for one in found.evidence.accuracy] == [1.0, found.evidence.agreement]
    assert found.evidence.accuracy[0].of == found.evidence.objects
    assert {one.expected for one in found.worst} | {one.found for one in found.worst} <= {"cat", "not cat"}


def test_accuracy_by_the_labels_of_shards(tmp_path: Path, model: Path) -> None:
    write_records(tmp_path / "p.rec", [packed(png(seed), [float(seed % 10)], seed) for seed in range(90)])
    found = quantize(model, tmp_path / "p.rec", tmp_path / "int8.yaml", QUIET)
    assert found.evidence.accuracy is not None
    assert found.evidence.accuracy[0].of == found.evidence.objects


# --- other tasks and inputs


def test_embeddings_raw_outputs_and_tensors(tmp_path: Path, photos: Path) -> None:
    tiny_embedding(tmp_path / "embedding.onnx")
    card = write_card(tmp_path / "e.yaml", files={"onnx": "embedding.onnx"}, task="embedding", output={})
    found = quantize(card, photos, tmp_path / "e8.yaml", QUIET)
    assert (found.evidence.measure, found.evidence.interval) == ("cosine", None)
    assert found.evidence.agreement > 0.99
    tiny_raw(tmp_path / "raw.onnx")
    card = write_card(tmp_path / "r.yaml", files={"onnx": "raw.onnx"}, task="raw", output={})
    found = quantize(card, photos, tmp_path / "r8.yaml", QUIET)
    assert found.evidence.measure == "relative error"
    assert found.worst[0].expected is None
    rows = tmp_path / "rows"
    rows.mkdir()
    for number, row in enumerate(np.random.default_rng(0).standard_normal((COUNT, 6)).astype(np.float32)):
        np.save(rows / f"{number}.npy", row)
    tiny_tabular(tmp_path / "tabular.onnx")
    card = write_card(tmp_path / "t.yaml", files={"onnx": "tabular.onnx"}, preprocess=None)
    found = quantize(card, rows, tmp_path / "t8.yaml", QUIET)
    assert found.evidence.agreement > 0.9
    assert "QuantizeLinear" in operators(tmp_path / "t8.onnx")


def test_a_network_with_a_fixed_batch(tmp_path: Path, photos: Path) -> None:
    tiny_classifier(tmp_path / "tiny.onnx", batch=4)
    card = write_card(tmp_path / "model.yaml", files={"onnx": "tiny.onnx"})
    assert quantize(card, photos, tmp_path / "int8.yaml", QUIET).evidence.agreement > 0.9


def test_a_checkpoint_of_mxnet(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prefix = write_checkpoint(tmp_path)
    found = quantize(str(prefix), photos, tmp_path / "int8.yaml", QUIET, CardOptions(exact=(32, 32), scale=1 / 255))
    assert found.evidence.objects > 50
    card = read_card(tmp_path / "int8.yaml")
    assert (card.files.onnx, card.files.symbol) == ("int8.onnx", None)
    assert load_model(tmp_path / "int8.yaml", QUIET)([photos / "1.png"])[0].top


# --- what is refused


def test_what_cannot_be_quantized_or_compared(tmp_path: Path, model: Path, photos: Path) -> None:
    quantize(model, photos, tmp_path / "int8.yaml", QUIET)
    with pytest.raises(ModelError, match=r"int8\.onnx is quantized already: it has QuantizeLinear"):
        quantize(tmp_path / "int8.yaml", photos, tmp_path / "twice.yaml", QUIET)
    tiny_classifier(tmp_path / "half.onnx", dtype="float16")
    card = write_card(tmp_path / "half.yaml", files={"onnx": "half.onnx"}, input={"dtype": "float16"})
    with pytest.raises(ModelError, match="weights in float16"):
        quantize(card, photos, tmp_path / "x.yaml", QUIET)
    tiny_detector(tmp_path / "yolo.onnx", "yolov8")
    with pytest.raises(ModelError, match="no measure"):
        quantize(
            tmp_path / "yolo.onnx", photos, tmp_path / "x.yaml", QUIET, CardOptions(task="detection", format="yolov8")
        )


@pytest.mark.parametrize(
    ("output", "arguments", "told"),
    [
        ("int8.onnx", {}, "does not end in .yaml"),
        ("nowhere/int8.yaml", {}, "there is no folder"),
        ("model.yaml", {}, "is there already"),
        ("tiny.yaml", {}, r"tiny\.onnx is there already"),
        ("x.yaml", {"min_agreement": 99}, "is no part of 1"),
        ("x.yaml", {"objects": 60}, "leaves 38 to measure"),
        ("x.yaml", {"options": Options(runtime="mxnet")}, "MXNet does not execute int8"),
    ],
)
def test_wrong_usage(
    tmp_path: Path, model: Path, photos: Path, output: str, arguments: dict[str, Any], told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        quantize(model, photos, tmp_path / output, **({"options": QUIET} | arguments))


def test_a_model_in_a_lower_precision_is_not_what_int8_is_compared_with(
    tmp_path: Path, model: Path, photos: Path
) -> None:
    with pytest.raises(UsageError, match="int8 is compared with fp32"):
        quantize(model, photos, tmp_path / "int8.yaml", QUIET, CardOptions(precision="bf16"))


def test_what_fp32_does_not_answer_is_no_evidence(tmp_path: Path, photos: Path) -> None:
    card = write_card(tmp_path / "model.yaml", files={"onnx": "log.onnx"}, output={})
    tiny_unanswered(tmp_path / "log.onnx")
    with pytest.raises(SourceError, match="has 0 objects to measure with that fp32 answers with numbers") as told:
        quantize(card, photos, tmp_path / "int8.yaml", QUIET)
    assert "infermill plan" in told.value.hint
    tiny_classifier(tmp_path / "log.onnx", nan_on_black=True)
    folder = tmp_path / "dark"
    folder.mkdir()
    for number, picture in enumerate(pictures(COUNT)):
        Image.fromarray(picture * np.uint8(number % 12 > 0)).save(folder / f"{number}.png")
    found = quantize(card, folder, tmp_path / "int8.yaml", QUIET)
    assert found.unanswered > 0
    assert found.evidence.objects + found.unanswered + found.selected + found.calibrated == COUNT
    assert f"{found.unanswered} not answered with numbers by fp32" in quantization_text(found)


def test_too_few_objects(tmp_path: Path, model: Path, photos: Path) -> None:
    with pytest.raises(SourceError, match="has 28 objects to measure with, and it takes 50"):
        quantize(model, photos, tmp_path / "x.yaml", replace(QUIET, limit=43))
    assert not (tmp_path / "x.yaml").exists()
