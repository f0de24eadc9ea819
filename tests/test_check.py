"""Two runtimes are compared, and where they differ, the layer that is to blame is found."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from onnx import helper
from PIL import Image

from infermill.check import Comparison, OutputDifference, check, compare
from infermill.errors import ModelError, SourceError, UsageError
from infermill.evidence import Evidence, Proportion, Worst
from infermill.layers import Deviation, deviation, first_difference
from infermill.models.model import Model
from infermill.models.opening import open_model
from infermill.predict import load_model
from infermill.report import comparison_text
from infermill.runtimes import Predictor, load
from infermill.runtimes.openvino import precisions
from infermill.types import CardOptions, Options, RuntimeName, StoreOptions
from tests.mxnet_checkpoints import checkpoint_model
from tests.networks import (
    Network,
    pictures,
    tiny_classifier,
    tiny_detector,
    tiny_quantised,
    tiny_raw,
    tiny_tabular,
    tiny_unanswered,
)
from tests.shards import packed, png, write_records

COMMAND = [str(Path(sys.executable).with_name("infermill")), "check"]
QUIET = Options(threads=2)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten pictures, and a file that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, picture in enumerate(pictures(10)):
        Image.fromarray(picture).save(folder / f"{number}.png")
    (folder / "bad.png").write_bytes(b"<html>")
    return folder


@pytest.fixture
def with_mxnet(mxnet_python: Path) -> Options:
    """Options that name MXNet's Python."""
    return Options(runtime_python=str(mxnet_python), threads=2)


# --- how far apart


@pytest.mark.parametrize(
    ("found", "expected", "absolute", "relative"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0, 0.0),
        ([1.0, 2.5], [1.0, -2.0], 4.5, 2.25),
        ([0.5, 0.0], [0.0, 0.0], 0.5, 0.5),
        ([np.nan, np.inf], [np.nan, np.inf], 0.0, 0.0),
        ([np.nan, 1.0], [2.0, 1.0], np.inf, np.inf),
        ([np.inf, 1.0], [-np.inf, 1.0], np.inf, np.inf),
        ([], [], 0.0, 0.0),
        ([1.0], [1.0, 2.0], np.inf, np.inf),
        ([3], [5], 2.0, 0.4),
    ],
)
def test_deviations(found: list[float], expected: list[float], absolute: float, relative: float) -> None:
    apart = deviation(np.array(found), np.array(expected))
    assert (apart.absolute, apart.relative) == (absolute, relative)


def test_small_integers_do_not_wrap_around() -> None:
    assert deviation(np.array([250], np.uint8), np.array([5], np.uint8)) == Deviation(245.0, 5.0)


# --- networks that agree


def test_the_runtimes_agree_on_random_inputs(tmp_path: Path) -> None:
    found = check(tiny_classifier(tmp_path / "tiny.onnx"), "onnxruntime", options=QUIET)
    assert found.agrees
    assert (found.inputs, found.skipped, found.layer) == (64, 0, None)
    (output,) = found.outputs
    assert (output.name, output.top1) == ("logits", 1.0)
    assert output.relative < 1e-5
    again = check(tiny_classifier(tmp_path / "tiny.onnx"), "openvino", options=replace(QUIET, runtime="onnxruntime"))
    assert again.outputs[0].absolute == output.absolute, "the same inputs at every call"


@pytest.mark.parametrize("dtype", ["float32", "int64", "bool", "uint8"])
def test_tensors_agree(tmp_path: Path, dtype: str) -> None:
    path = tiny_tabular(tmp_path / "tabular.onnx", (6,), dtype=dtype)
    assert check(path, "onnxruntime", options=QUIET).agrees


def test_each_output_has_a_line(tmp_path: Path) -> None:
    found = check(tiny_raw(tmp_path / "raw.onnx"), "onnxruntime", None, QUIET, CardOptions(task="raw"))
    assert [(one.name, one.top1) for one in found.outputs] == [("boxes", None), ("kind", None)]
    assert found.agrees


def test_a_source_is_sampled_and_what_cannot_be_decoded_is_counted(tmp_path: Path, photos: Path) -> None:
    path = tiny_classifier(tmp_path / "tiny.onnx")
    found = check(path, "onnxruntime", photos, QUIET)
    assert (found.inputs, found.skipped, found.agrees) == (10, 1, True)
    assert check(path, "onnxruntime", photos, replace(QUIET, limit=3)).inputs == 3
    with pytest.raises(SourceError, match=r"no object of .*bad\.png can be decoded"):
        check(path, "onnxruntime", photos / "bad.png", QUIET)
    with pytest.raises(SourceError, match="does not exist"):
        check(path, "onnxruntime", photos / "nowhere", QUIET)


def test_inputs_that_fp32_does_not_answer_say_nothing(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="onnxruntime in fp32 answers none of 64 inputs with numbers"):
        check(tiny_unanswered(tmp_path / "log.onnx"), "onnxruntime", options=QUIET)
    dark = tmp_path / "dark"
    dark.mkdir()
    for number, picture in enumerate(pictures(4)):
        Image.fromarray(picture * np.uint8(number > 0)).save(dark / f"{number}.png")
    path = tiny_classifier(tmp_path / "tiny.onnx", nan_on_black=True)
    found = check(path, "onnxruntime", dark, QUIET)
    assert (found.inputs, found.evidence.objects, found.agrees) == (4, 3, True)
    assert "4 inputs, 1 not answered with numbers by onnxruntime" in comparison_text(found)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    path = tiny_classifier(tmp_path / "tiny.onnx")
    with pytest.raises(UsageError, match="openvino is compared with itself"):
        check(path, "openvino")
    with pytest.raises(UsageError, match="--tolerance"):
        check(path, "onnxruntime", tolerance=-1)
    with pytest.raises(ModelError, match="no MXNet checkpoint"):
        check(path, "mxnet")


# --- networks that do not


def perturbed(model: Model, path: Path, node: str, change: Callable[[NDArray[Any]], None]) -> Model:
    """The model with another ONNX: the first weight of a node is changed."""
    network = onnx.load_model(model.network)
    weights = {tensor.name: tensor for tensor in network.graph.initializer}
    (found,) = [one for one in network.graph.node if node in one.output]
    name = next(name for name in found.input if name in weights)
    values = onnx.numpy_helper.to_array(weights[name]).copy()
    change(values)
    weights[name].CopyFrom(onnx.numpy_helper.from_array(values, name))
    onnx.save_model(network, path)
    return replace(model, network=path)


def spoil(values: NDArray[Any]) -> None:
    values.flat[1] += 1


@pytest.mark.parametrize(
    ("node", "operator"),
    [("conv0", "Convolution"), ("bn0", "BatchNorm"), ("conv1", "Convolution"), ("fc0", "FullyConnected")],
)
def test_the_layer_that_was_translated_wrongly_is_found(
    small_checkpoints: Path, with_mxnet: Options, tmp_path: Path, node: str, operator: str
) -> None:
    model = checkpoint_model(small_checkpoints / "residual")
    wrong = perturbed(model, tmp_path / "wrong.onnx", f"{node}_output", spoil)
    found = compare(wrong, "mxnet", None, replace(with_mxnet, limit=8), 1e-4)
    assert not found.agrees
    assert found.layer is not None
    assert (found.layer.node, found.layer.operator) == (node, operator)
    assert found.layer.inside < 1e-4
    assert found.layer.outside > 0.01


def test_every_network_agrees_with_mxnet(small_checkpoints: Path, with_mxnet: Options) -> None:
    for name in ("residual", "grey", "rows"):
        found = compare(checkpoint_model(small_checkpoints / name), "mxnet", None, with_mxnet, 1e-4)
        assert found.agrees, found


def test_preprocessing_that_differs_is_found(small_checkpoints: Path, with_mxnet: Options, tmp_path: Path) -> None:
    model = checkpoint_model(small_checkpoints / "residual")
    network = onnx.load_model(model.network)
    half = onnx.helper.make_tensor("half", onnx.TensorProto.FLOAT, [], [0.5])
    network.graph.initializer.append(half)
    first = network.graph.node[0]
    first.input[0] = "halved"
    network.graph.node.insert(0, onnx.helper.make_node("Mul", ["data", "half"], ["halved"], "halve"))
    onnx.save_model(network, tmp_path / "halved.onnx")
    found = compare(replace(model, network=tmp_path / "halved.onnx"), "mxnet", None, with_mxnet, 1e-4)
    assert found.layer is not None
    assert found.layer.node == "conv0", "what MXNet does not have is part of the layer behind it"


def breaking(weight: str) -> Callable[[Model], Predictor]:
    """A runtime that is wrong: it changes a weight of each network that it loads."""

    def load_wrongly(model: Model) -> Predictor:
        network = onnx.load_model(model.network)
        for tensor in network.graph.initializer:
            if tensor.name == weight:
                values = onnx.numpy_helper.to_array(tensor).copy()
                spoil(values)
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, weight))
        path = model.network.with_name("wrong.onnx")
        onnx.save_model(network, path)
        return load(replace(model, network=path), "onnxruntime", 1)

    return load_wrongly


@pytest.mark.parametrize(("size", "nodes", "wrong"), [(8, 150, 130), (1024, 6, 4), (8, 3, 0)])
@pytest.mark.parametrize("external_data", [False, True])
def test_the_layer_is_found_in_each_group(
    tmp_path: Path, size: int, nodes: int, wrong: int, external_data: bool
) -> None:
    net = Network()
    tip = "images"
    for number in range(nodes):
        tip = net.node("Add", tip, net.weight(np.full((1, 3, 1, 1), 0.5)), name=f"add{number}")
    image, last = (helper.make_tensor_value_info(name, 1, ["N", 3, size, size]) for name in ("images", tip))
    path = net.save(tmp_path / "tall.onnx", [image], [last], external_data=external_data)
    model = open_model(path, StoreOptions(), CardOptions(task="raw"))
    rows = pictures(1, size)
    layer = first_difference(
        model, (breaking(f"weight{wrong}"), lambda probe: load(probe, "onnxruntime", 1)), rows, 1e-4
    )
    assert layer is not None
    assert (layer.node, layer.operator, layer.inside) == (f"add{wrong}", "Add", 0.0)
    assert layer.outside == pytest.approx(1.0, rel=1e-3)


def test_nothing_is_found_where_both_are_alike(tmp_path: Path) -> None:
    model = open_model(tiny_classifier(tmp_path / "tiny.onnx"), StoreOptions())
    alike = breaking("weight0")
    assert first_difference(model, (alike, alike), pictures(1), 1e-4) is None


def test_a_difference_that_no_layer_has_is_told() -> None:
    outputs = (OutputDifference("logits", 0.5, 0.25, 0.75),)
    found = comparison_text(
        Comparison("openvino", "onnxruntime", "fp32", "fp32", 4, 0, 1e-4, outputs, None, evidence(3, 4))
    )
    assert "75.0%" in found
    assert "differ by more than 0.0001 of the largest value, and no layer does by itself" in found
    assert "Runtimes join layers" in found


# --- precisions


def evidence(same: int, objects: int, nonfinite: int = 0) -> Evidence:
    share = Proportion(same, objects)
    return Evidence("top-1", objects, share.share, share.interval, 0.03, 0.002, nonfinite, None, ())


@pytest.mark.parametrize(
    ("same", "tolerance", "agrees"),
    [(64, 0.01, True), (62, 0.01, True), (61, 0.01, False), (61, 0.05, True), (64, 0.0, True), (63, 0.0, False)],
)
def test_a_lower_precision_agrees_where_the_interval_reaches_99_percent(
    same: int, tolerance: float, agrees: bool
) -> None:
    apart = (OutputDifference("logits", 0.5, 0.25, same / 64),)
    found = Comparison("openvino", "openvino", "bf16", "fp32", 64, 0, tolerance, apart, None, evidence(same, 64))
    assert found.agrees == agrees
    text = comparison_text(found)
    assert "openvino in bf16 against openvino in fp32: 64 inputs" in text
    assert re.search(rf"the same best class +{same / 64:.2%} \(95 %: .*%\)", text)
    assert re.search(r"\|Δ score\| +max 0\.03, mean 0\.002", text)
    wanted = f"{100 - 100 * tolerance:.4g}%"
    verdict = "agree: the interval reaches" if agrees else "differ: the interval does not reach"
    assert text.endswith(f"{verdict} {wanted}")


def test_numbers_that_are_none_any_more_are_told() -> None:
    apart = (OutputDifference("logits", np.inf, np.inf, 0.5),)
    found = Comparison("openvino", "openvino", "fp16", "fp32", 4, 0, 0.01, apart, None, evidence(2, 4, 2))
    assert re.search(r"NaN or infinity +2 objects", comparison_text(found))
    assert found.as_json()["outputs"][0]["absolute"] is None


def test_a_quantised_network_is_judged_by_the_agreement(tmp_path: Path) -> None:
    path = tiny_quantised(tmp_path / "int8.onnx")
    found = check(path, "onnxruntime", options=QUIET)
    assert (found.precision, found.against_precision, found.tolerance) == ("int8", "int8", 0.01)
    assert found.outputs[0].relative > 1e-4
    assert found.agrees
    assert found.evidence.interval is not None
    assert found.as_json()["evidence"]["interval"] == list(found.evidence.interval)


def test_the_worst_inputs_have_keys_and_accuracy_is_measured(tmp_path: Path, photos: Path) -> None:
    path = tiny_quantised(tmp_path / "int8.onnx")
    keys = [f"{number}.png" for number in range(10)]
    predict, other = load_model(path, QUIET), load_model(path, replace(QUIET, runtime="onnxruntime"))
    best, right = (
        [one.top[0].index for one in of([photos / key for key in keys]) if one.top] for of in (predict, other)
    )
    pq.write_table(pa.table({"key": keys[:8], "label": [best[0] + 1, *best[1:8]]}), tmp_path / "truth.parquet")
    found = check(path, "onnxruntime", photos, QUIET, truth=str(tmp_path / "truth.parquet"))
    told = found.as_json()
    assert {one["key"] for one in told["worst"]} == {f"{number}.png" for number in range(10)}
    assert told["worst"][0]["expected"] == str(right[int(found.worst[0].key[0])])
    assert "worst" not in told["evidence"]
    assert found.evidence.accuracy is not None
    assert found.evidence.accuracy[1] == Proportion(7, 8)
    assert re.search(r"accuracy on openvino in int8 +87.50% .* of 8 with a label", comparison_text(found))
    with pytest.raises(UsageError, match="without SOURCE inputs are random"):
        check(path, "onnxruntime", options=QUIET, truth=str(tmp_path / "truth.parquet"))


def test_the_worst_inputs_are_listed_where_the_answers_differ() -> None:
    apart, worst = (OutputDifference("logits", 0.5, 0.25, 0.5),), (Worst("a.png", "cat", "dog", 0.25),)
    found = Comparison("openvino", "openvino", "bf16", "fp32", 64, 0, 0.01, apart, None, evidence(32, 64), worst)
    assert re.search(r"worst inputs .*\n *a\.png +cat +dog +0\.250\n", comparison_text(found))


def test_labels_of_shards_count(tmp_path: Path) -> None:
    write_records(tmp_path / "p.rec", [packed(png(seed), [float(seed)], seed) for seed in range(10)])
    found = check(tiny_classifier(tmp_path / "tiny.onnx"), "onnxruntime", tmp_path / "p.rec", QUIET)
    assert found.evidence.accuracy is not None
    assert found.evidence.accuracy[0].of == 10
    assert "accuracy on openvino" in comparison_text(found)


@pytest.mark.parametrize("task", ["embedding", "raw"])
def test_other_tasks_have_a_measure_of_their_own(tmp_path: Path, task: Literal["embedding", "raw"]) -> None:
    path = tiny_quantised(tmp_path / "int8.onnx")
    found = check(path, "onnxruntime", None, QUIET, CardOptions(task=task))
    assert found.agrees
    assert found.evidence.measure == {"embedding": "cosine", "raw": "relative error"}[task]
    name = {"embedding": "mean cosine similarity", "raw": "1 - relative error"}[task]
    text = comparison_text(found)
    assert re.search(rf"{name} +\d+\.\d\d%\n", text)
    assert text.endswith("agree: the agreement reaches 99%")


def test_a_detection_is_compared_by_its_raw_outputs(tmp_path: Path) -> None:
    found = check(tiny_detector(tmp_path / "boxes.onnx", "yolov8"), "onnxruntime", options=QUIET)
    assert (found.agrees, found.evidence.measure) == (True, "relative error")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_precision_is_compared_with_fp32_in_the_same_runtime(
    tmp_path: Path, precision: Literal["bf16", "fp16"]
) -> None:
    path, lower = tiny_classifier(tmp_path / "tiny.onnx"), CardOptions(precision=precision)
    if precision not in precisions():
        with pytest.raises(UsageError, match=f"has no {precision}"):
            check(path, "openvino", None, QUIET, lower)
        pytest.skip(f"this processor has no {precision}")
    both: tuple[RuntimeName, ...] = ("openvino", "onnxruntime")
    for against in both:
        found = check(path, against, None, QUIET, lower)
        assert (found.precision, found.against_precision) == (precision, "fp32")
        assert found.agrees
        assert 0 < found.evidence.mean_delta <= found.evidence.max_delta < 0.1


# --- the command


def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_the_command_says_that_they_agree(tmp_path: Path, photos: Path) -> None:
    path = tiny_classifier(tmp_path / "tiny.onnx")
    done = run(photos, "-m", path, "--against", "onnxruntime")
    assert done.returncode == 0, done.stderr
    assert "openvino against onnxruntime: 10 inputs, 1 cannot be decoded" in done.stdout
    assert "agree: no output differs by more than 0.0001" in done.stdout
    done = run("-m", path, "--against", "openvino", "--runtime", "onnxruntime", "--json", "--limit", 5)
    told = json.loads(done.stdout)
    assert (done.returncode, told["agrees"], told["inputs"], told["layer"]) == (0, True, 5, None)


def test_the_command_names_the_layer(tmp_path: Path) -> None:
    path = tiny_classifier(tmp_path / "tiny.onnx")
    done = run("-m", path, "--against", "onnxruntime", "--tolerance", "0", "--limit", 4)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "differ by more than 0 of the largest value, first at " in done.stdout
    told = json.loads(run("-m", path, "--against", "onnxruntime", "--tolerance", "0", "--limit", 4, "--json").stdout)
    assert told["layer"]["outside"] > 0
    assert run("-m", path, "--against", "openvino").returncode == 2
