"""Checkpoints of MXNet as models: however they are named, wherever they are, and what is assumed of them."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import PIL.Image
import pytest

import infermill
from infermill.errors import ModelError, UsageError
from infermill.models.bundle import current_digest, pack, unpack
from infermill.models.card import Files
from infermill.models.card_file import read_card
from infermill.models.conversion import convert_model
from infermill.models.inspection import inspect_model
from infermill.models.model import Model
from infermill.models.mxnet.families import family_of
from infermill.models.mxnet.symbol import read_symbol
from infermill.models.opening import open_model
from infermill.types import CardOptions, StoreOptions
from tests.checkpoints import (
    archive_files,
    classifier_symbol,
    node,
    symbol_of,
    write_archive,
    write_checkpoint,
    write_params,
)
from tests.networks import pictures, preprocess_of, tiny_classifier
from tests.servers import Bucket

NO_STORE = StoreOptions()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/infermill/models"


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "models")


def opened(path: Path | str, **given: Any) -> Model:
    return open_model(path, NO_STORE, CardOptions(**given))


def write_network(folder: Path, nodes: list[dict[str, Any]], shapes: dict[str, tuple[int, ...]]) -> Path:
    """A checkpoint of these nodes, with random parameters; what is returned is the symbol."""
    random = np.random.default_rng(0)
    arrays = {f"arg:{name}": random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    write_params(folder / "net-0000.params", arrays)
    path = folder / "net-symbol.json"
    path.write_text(json.dumps(symbol_of(*nodes)))
    return path


# --- the ways to name one


def test_every_way_to_name_a_checkpoint_is_one_model(prefix: Path, tmp_path: Path) -> None:
    card = tmp_path / "models/model.yaml"
    card.write_text("name: tiny\nfiles: {symbol: tiny-symbol.json, params: tiny-0000.params}\n")
    other_name = tmp_path / "models/graph.json"
    other_name.write_text(Path(f"{prefix}-symbol.json").read_text())
    (tmp_path / "models/graph.params").write_bytes(Path(f"{prefix}-0000.params").read_bytes())
    ways: list[Path | str] = [prefix, f"{prefix}-symbol.json", f"{prefix}-0000.params", other_name]
    models = [opened(way) for way in ways]
    assert len({model.digest for model in models}) == 1
    assert [model.card.name for model in models] == ["tiny", "tiny", "tiny", "graph"]
    assert models[0].checkpoint is not None
    assert models[0].checkpoint.symbol == Path(f"{prefix}-symbol.json")
    assert models[0].card.files == Files(symbol="tiny-symbol.json", params="tiny-0000.params")
    fields = "preprocess: {resize: {shorter: 256}, crop: {center: [224, 224]}, mean: [123.68, 116.779, 103.939]}\n"
    card.write_text(card.read_text() + "input: {name: data}\n" + fields)
    assert opened(card).digest == models[0].digest


def test_an_archive_is_the_same_model_as_its_files(tmp_path: Path, prefix: Path) -> None:
    model = opened(write_archive(tmp_path / "tiny.mar", archive_files()))
    assert model.labels == ("tabby, tabby cat", "Labrador retriever", "tench, Tinca tinca")
    assert preprocess_of(model.card).height_width == (96, 96)
    assert model.card.files == Files(archive="tiny.mar")
    assert "images are made 96x96, as signature.json in the archive says" in model.assumptions
    (tmp_path / "synset.txt").write_text("\n".join(model.labels))
    same = opened(prefix, crop=(96, 96), shorter=110, labels=str(tmp_path / "synset.txt"))
    assert same.digest == model.digest
    (tmp_path / "card.yaml").write_text(
        "name: tiny\nfiles: {archive: tiny.mar}\npreprocess: {resize: {exact: [9, 9]}}\n"
    )
    by_card = opened(tmp_path / "card.yaml")
    assert by_card.checkpoint == model.checkpoint


@pytest.mark.parametrize(("given", "epoch"), [(None, 12), (0, 0), (3, 3)])
def test_the_epoch_is_the_newest_or_the_one_that_is_asked_for(given: int | None, epoch: int, tmp_path: Path) -> None:
    prefix = write_checkpoint(tmp_path, epochs=(0, 3, 12))
    write_checkpoint(tmp_path, "tiny-er", epochs=(20,))
    model = opened(prefix, epoch=given)
    assert model.checkpoint is not None
    assert model.checkpoint.params.name == f"tiny-{epoch:04d}.params"
    told = "the epoch is 12, the newest of 3 (--epoch takes another)" in model.assumptions
    assert told == (given is None)


def test_a_checkpoint_in_a_bucket_is_as_the_one_on_disk(bucket: Bucket, tmp_path: Path) -> None:
    prefix = write_checkpoint(tmp_path, epochs=(0, 7))
    for path in tmp_path.glob("tiny-*"):
        bucket.put(f"m/{path.name}", path.read_bytes())
    bucket.put("m/tiny-1/other", b"")
    bucket.put("tiny.mar", write_archive(tmp_path / "tiny.mar", archive_files()).read_bytes())
    digest = opened(prefix).digest
    for name in ("tiny", "tiny-symbol.json", "tiny-0007.params"):
        remote = open_model(f"{bucket.uri}/m/{name}", bucket.options)
        assert remote.digest == digest
    assert remote.checkpoint is not None
    archive = open_model(f"{bucket.uri}/tiny.mar", bucket.options)
    assert archive.digest == opened(tmp_path / "tiny.mar").digest
    with pytest.raises(ModelError, match="neither a model card nor a network"):
        open_model(f"{bucket.uri}/m/tin", bucket.options)


@pytest.mark.parametrize(
    ("name", "given", "message", "hint"),
    [
        ("absent", {}, "neither a model card nor a network", "PREFIX-symbol.json"),
        ("tiny", {"epoch": 5}, "has no epoch 5", "its epochs: 0"),
        ("tiny-0000.params", {"epoch": 5}, "is not epoch 5", "one of the two"),
        ("alone-0000.params", {}, "there is no alone-symbol.json", "net.export(PREFIX)"),
        ("bare-symbol.json", {}, "there is no bare-0000.params", "beside the symbol"),
        ("tiny.mar", {"epoch": 0}, "is an archive", "leave --epoch out"),
        ("tiny.yaml", {"epoch": 0}, "--epoch is given, and the card 'tiny' says itself", "leave --epoch out"),
        ("tiny.onnx", {"epoch": 0}, "--epoch is given, and tiny.onnx says itself", "leave --epoch out"),
        ("gone.mar", {}, "gone.mar does not exist", "relative"),
        ("broken-symbol.json", {}, "is no symbol of MXNet|no symbol of MXNet", "PREFIX-symbol.json"),
    ],
)
def test_what_is_missing_is_told(
    name: str, given: dict[str, Any], message: str, hint: str, prefix: Path, tmp_path: Path
) -> None:
    folder = prefix.parent
    write_archive(folder / "tiny.mar", archive_files())
    convert_model(str(prefix), folder / "tiny.onnx", NO_STORE, CardOptions())
    (folder / "alone-0000.params").touch()
    (folder / "bare-symbol.json").write_text(json.dumps(classifier_symbol()))
    (folder / "broken-symbol.json").write_text('{"nodes": 1, "heads": 2}')
    (folder / "broken-0000.params").touch()
    with pytest.raises(ModelError, match=message) as caught:
        opened(folder / name, **given)
    assert hint in caught.value.hint


def test_an_operator_that_is_not_known_is_told_once(tmp_path: Path) -> None:
    nodes = [node("null", "data", __shape__="(0, 3)"), node("Mystery", "what", [0])]
    path = write_network(tmp_path, nodes, {})
    message = r"net-symbol\.json: node `what` \(Mystery\): this operator has no translation"
    with pytest.raises(ModelError, match=message) as caught:
        opened(path)
    assert "ask for it where infermill is from, with the symbol file" in caught.value.hint


# --- the translation


def test_a_network_is_translated_once(prefix: Path, cache: Path) -> None:
    first = opened(prefix)
    kept = {path: path.stat().st_mtime_ns for path in cache.rglob("*.onnx")}
    assert opened(prefix) == first
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.onnx")} == kept
    assert list(kept) == [first.network]
    assert opened(prefix, exact=(64, 64)).network != first.network


@pytest.mark.parametrize("suffix", [".onnx", ".weights"])
@pytest.mark.parametrize("left_bytes", [None, 0, 100])
def test_a_translation_that_was_damaged_is_made_again(suffix: str, left_bytes: int | None, tmp_path: Path) -> None:
    nodes = [node("null", "data"), node("null", "fc_weight"), node("FullyConnected", "fc", [0, 1], num_hidden="50")]
    nodes[-1]["attrs"]["no_bias"] = "True"
    path = write_network(tmp_path, nodes, {"fc_weight": (50, 60)})
    before = infermill.load_model(path, card_options=CardOptions(task="raw"))([np.ones(60, np.float32)])
    damaged = opened(path).network.with_suffix(suffix)
    kept = damaged.read_bytes()
    damaged.unlink()
    if left_bytes is not None:
        damaged.write_bytes(kept[:left_bytes])
    (after,) = infermill.load_model(path, card_options=CardOptions(task="raw"))([np.ones(60, np.float32)])
    assert before[0].outputs is not None
    assert after.outputs is not None
    np.testing.assert_array_equal(after.outputs["fc_output"], before[0].outputs["fc_output"])
    assert damaged.read_bytes() == kept


def test_weights_are_not_read_where_only_the_graph_is_wanted(tmp_path: Path) -> None:
    nodes = [node("null", "data"), node("null", "w"), node("null", "b")]
    nodes.append(node("FullyConnected", "fc", [0, 1, 2], num_hidden="50"))
    network = opened(write_network(tmp_path, nodes, {"w": (50, 1000), "b": (50,)})).network
    assert network.stat().st_size < 4096
    assert network.with_suffix(".weights").stat().st_size == 50 * 1000 * 4
    convert_model(str(tmp_path / "net"), tmp_path / "alone.onnx", NO_STORE, CardOptions(task="raw"))
    assert (tmp_path / "alone.onnx").stat().st_size > 50 * 1000 * 4


def test_a_plain_network_is_opened_without_the_reader_of_checkpoints(tmp_path: Path) -> None:
    program = "import sys, infermill.job\nfrom infermill.models.opening import open_model\n"
    program += "from infermill.types import StoreOptions\n"
    program += f"open_model({str(tiny_classifier(tmp_path / 'tiny.onnx'))!r}, StoreOptions())\n"
    program += "print([name for name in sys.modules if name.startswith('infermill.models.mxnet')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_other_parameters_are_another_model(prefix: Path) -> None:
    before = opened(prefix)
    write_checkpoint(prefix.parent, epochs=(1,))
    after = opened(prefix)
    assert (after.digest != before.digest, after.network != before.network) == (True, True)


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_pictures_are_predicted(runtime: Any, prefix: Path) -> None:
    given = CardOptions(exact=(64, 64), top_k=3)
    predict = infermill.load_model(prefix, infermill.Options(runtime=runtime), given)
    for row in predict(list(pictures(4, 64))):
        assert row.top is not None
        assert sum(one.score for one in row.top) == pytest.approx(1), "the network ends in its own softmax"


def write_ssd(folder: Path) -> Path:
    """An SSD of 8x8 anchors that do not overlap: class 0 is where it is red, and class 1 where it is green."""
    nodes = [
        node("null", "data"),
        node("null", "conv_weight"),
        node("Convolution", "conv", [0, 1], kernel="(64, 64)", stride="(64, 64)", num_filter="2", no_bias="True"),
        node("null", "cls_weight"),
        node("Convolution", "cls", [2, 3], kernel="(1, 1)", num_filter="3", no_bias="True"),
        node("Reshape", "cls_reshape", [4], shape="(0, 0, -1)"),
        node("SoftmaxActivation", "cls_prob", [5], mode="channel"),
        node("null", "loc_weight"),
        node("Convolution", "loc", [2, 7], kernel="(1, 1)", num_filter="4", no_bias="True"),
        node("Flatten", "loc_pred", [8]),
        node("_contrib_MultiBoxPrior", "anchors", [2], sizes="(0.125,)", ratios="(1,)"),
        node("_contrib_MultiBoxDetection", "detection", [6, 9, 10], nms_threshold="0.45", nms_topk="400"),
    ]
    means = np.zeros((2, 3, 64, 64), np.float32)
    means[0, 0] = means[1, 1] = 1 / 64**2
    weights = {"conv": means, "cls": [[0, 0], [1, 0], [0, 1]], "loc": np.zeros((4, 2))}
    shapes = {"conv": (2, 3, 64, 64), "cls": (3, 2, 1, 1), "loc": (4, 2, 1, 1)}
    write_params(
        folder / "ssd-0000.params",
        {f"arg:{name}_weight": np.asarray(weights[name], np.float32).reshape(shapes[name]) for name in shapes},
    )
    (folder / "ssd-symbol.json").write_text(json.dumps(symbol_of(*nodes)))
    return folder / "ssd"


def test_an_ssd_is_a_detector(tmp_path: Path) -> None:
    prefix = write_ssd(tmp_path)
    model = opened(prefix)
    assert (model.card.task, model.card.output.format) == ("detection", "mxnet-ssd")
    preprocess = preprocess_of(model.card)
    assert (preprocess.height_width, preprocess.mean, preprocess.scale) == ((512, 512), (123, 117, 104), 1)
    picture = np.zeros((512, 1024, 3), np.uint8)
    picture[64:128, 256:384, 0] = 255
    picture[448:, 896:, 1] = 250
    nothing, found = infermill.load_model(prefix)([np.zeros((300, 300, 3), np.uint8), picture])
    assert nothing.detections == ()
    assert found.detections is not None
    told = [(one.index, one.box.xmin, one.box.ymin, one.box.xmax, one.box.ymax) for one in found.detections]
    assert sorted(told) == [(0, 256, 64, 384, 128), (1, 896, 448, 1024, 512)]
    assert all(one.score > 0.99 for one in found.detections)


def test_an_archive_is_planned_and_run(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "tiny.mar", archive_files())
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, picture in enumerate(pictures(3, 40)):
        PIL.Image.fromarray(picture).save(photos / f"{number}.png")
    assert infermill.estimate(photos, archive).objects == 3
    summary = infermill.run(photos, archive, tmp_path / "out")
    assert (summary.planned, summary.ok) == (3, 3)
    labels = {one["label"] for row in infermill.read(tmp_path / "out")["top"].to_pylist() for one in row}
    assert labels == {"tabby, tabby cat", "Labrador retriever", "tench, Tinca tinca"}


def test_a_model_travels_as_its_checkpoint(prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(prefix, exact=(64, 64))
    pack(model, tmp_path / "packed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    again = unpack(tmp_path / "packed", model.digest)
    assert (again.card, again.digest, current_digest(again)) == (model.card, model.digest, model.digest)
    assert again.checkpoint is not None
    assert all(
        path.is_file() and path.is_relative_to(tmp_path / "elsewhere") for path in again.checkpoint.files.values()
    )
    assert again.network.read_bytes() == model.network.read_bytes()
    assert unpack(tmp_path / "packed", model.digest) == again


def test_files_of_the_same_name_travel_together(prefix: Path, tmp_path: Path) -> None:
    for folder, suffix in (("symbols", "-symbol.json"), ("params", "-0000.params")):
        (tmp_path / folder).mkdir()
        Path(f"{prefix}{suffix}").rename(tmp_path / folder / "tiny")
    files = {"symbol": "symbols/tiny", "params": "params/tiny"}
    card = {"name": "t", "files": files, "preprocess": {"resize": {"exact": [64, 64]}}}
    (tmp_path / "t.json").write_text(json.dumps(card))
    model = opened(tmp_path / "t.json")
    pack(model, tmp_path / "packed")
    again = unpack(tmp_path / "packed", model.digest).checkpoint
    assert again is not None
    assert model.checkpoint is not None
    for role, path in again.files.items():
        assert path.read_bytes() == model.checkpoint.files[role].read_bytes()


# --- what is assumed


CONVOLUTION = node("Convolution", "conv", [0, 1], kernel="(5, 5)", num_filter="2", no_bias="True")
FLAT = node("FullyConnected", "fc", [2, 3], num_hidden="4", no_bias="True")


@pytest.mark.parametrize(
    ("nodes", "shapes", "expected"),
    [
        (
            [
                node("null", "data"),
                node("null", "w"),
                node("FullyConnected", "fc", [0, 1], num_hidden="4", no_bias="1"),
            ],
            {"w": (4, 6)},
            ("batch", 6),
        ),
        (
            [
                node("null", "data"),
                node("Flatten", "flat", [0]),
                node("null", "w"),
                node("FullyConnected", "fc", [1, 2], num_hidden="4", no_bias="True"),
            ],
            {"w": (4, 784)},
            ("batch", 1, 28, 28),
        ),
        (
            [node("null", "data"), node("null", "w"), CONVOLUTION, node("null", "v"), FLAT],
            {"w": (2, 3, 5, 5), "v": (4, 2 * 28 * 28)},
            ("batch", 3, 32, 32),
        ),
        (
            [node("null", "data", __shape__="(0, 3, 48, 64)"), node("Activation", "relu", [0], act_type="relu")],
            {},
            ("batch", 3, 48, 64),
        ),
    ],
)
def test_the_shape_of_the_input_is_told_by_the_weights(
    nodes: list[dict[str, Any]], shapes: dict[str, tuple[int, ...]], expected: tuple[Any, ...], tmp_path: Path
) -> None:
    inspection = inspect_model(str(write_network(tmp_path, nodes, shapes)), NO_STORE, CardOptions(), None)
    assert inspection.network.inputs[0].shape == expected


def test_a_shape_that_nothing_tells_is_an_error(tmp_path: Path) -> None:
    path = write_network(tmp_path, [node("null", "data"), node("Activation", "relu", [0], act_type="relu")], {})
    with pytest.raises(ModelError, match="does not tell the shape of its input") as caught:
        opened(path)
    assert "shape=(0, 3, 224, 224)" in caught.value.hint


@pytest.mark.parametrize("text", ["{[]: 0}", "(0, 3", "[" * 5000, "(0, 3.5)", "(0, -1)", "x", "\0"])
def test_a_shape_that_is_none_tells_nothing(text: str, tmp_path: Path) -> None:
    nodes = [node("null", "data", __shape__=text), node("null", "w"), CONVOLUTION]
    inspection = inspect_model(
        str(write_network(tmp_path, nodes, {"w": (2, 3, 5, 5)})), NO_STORE, CardOptions(task="raw"), None
    )
    assert inspection.network.inputs[0].shape == ("batch", 3, 224, 224)


RESNET = symbol_of(node("null", "data"), node("BatchNorm", "bn_data", [0]))
GLUON = symbol_of(node("null", "data"), node("Activation", "resnetv10_relu0_fwd", [0]))
GLUON_INCEPTION = symbol_of(node("null", "data"), node("Activation", "inception30_relu0_fwd", [0]))
INCEPTION = symbol_of(node("null", "data"), node("Concat", "mixed_10_chconcat", [0]))
# No layer `bn_data`: that came with the second version.
RESNET_V1 = symbol_of(node("null", "data"), node("Convolution", "conv0", [0]), node("BatchNorm", "bn0", [1]))
SSD = symbol_of(node("null", "data"), node("_contrib_MultiBoxDetection", "detection", [0]))
VGG = [node("null", "data"), node("Activation", "relu4_3", [0])]
SSD_300, SSD_VGG_512 = (
    symbol_of(
        *VGG,
        *(node("_contrib_MultiBoxPrior", f"anchors{number}", [1]) for number in range(priors)),
        node("_contrib_MultiBoxDetection", "detection", [2]),
    )
    for priors in (6, 7)
)


@pytest.mark.parametrize(
    ("data", "side", "scale", "mean"),
    [
        (RESNET, 224, 1, (0, 0, 0)),
        (GLUON, 224, 1 / 255, (0.485, 0.456, 0.406)),
        (GLUON_INCEPTION, 299, 1 / 255, (0.485, 0.456, 0.406)),
        (INCEPTION, 299, 1, (123.68, 116.779, 103.939)),
        (SSD, 512, 1, (123, 117, 104)),
        (SSD_300, 300, 1, (123, 117, 104)),
        (SSD_VGG_512, 512, 1, (123, 117, 104)),
        (RESNET_V1, 224, 1, (123.68, 116.779, 103.939)),
        (classifier_symbol(), 224, 1, (123.68, 116.779, 103.939)),
    ],
)
def test_the_family_says_how_pixels_become_numbers(
    data: dict[str, Any], side: int, scale: float, mean: tuple[float, ...], tmp_path: Path
) -> None:
    (tmp_path / "x.json").write_text(json.dumps(data))
    family = family_of(read_symbol(tmp_path / "x.json"))
    assert (family.side, family.scale, family.mean) == (side, scale, mean)


def test_an_option_is_no_assumption(prefix: Path) -> None:
    guessed = "\n".join(opened(prefix).assumptions)
    given = opened(prefix, crop=(96, 96), scale=0.5, mean=(0, 0, 0), std=(1, 1, 1), epoch=0)
    assert "the size of images is 224x224, the first usual one that the network takes" in guessed
    assert "those of MXNet's example/image-classification" in guessed
    assert "the size of images" not in "\n".join(given.assumptions)
    assert "those of" not in "\n".join(given.assumptions)
    assert preprocess_of(given.card).scale == 0.5


# --- inspect and convert


def test_inspect_writes_a_card_that_names_the_files(prefix: Path, tmp_path: Path) -> None:
    inspect_model(str(prefix), NO_STORE, CardOptions(), tmp_path / "model.yaml")
    card = read_card(tmp_path / "model.yaml")
    assert card.files == Files(symbol="models/tiny-symbol.json", params="models/tiny-0000.params")
    assert opened(tmp_path / "model.yaml").digest == opened(prefix).digest


def test_convert_writes_the_network_and_its_card(prefix: Path, tmp_path: Path) -> None:
    (tmp_path / "synset.txt").write_text("cat\ndog\nowl\n")
    given = CardOptions(labels=str(tmp_path / "synset.txt"), top_k=2)
    done = convert_model(str(prefix), tmp_path / "out.onnx", NO_STORE, given)
    assert (done.network, done.card) == (tmp_path / "out.onnx", tmp_path / "out.yaml")
    onnx.checker.check_model(tmp_path / "out.onnx")
    model = opened(tmp_path / "out.yaml")
    assert (model.card.files, model.card.labels, model.labels) == (
        Files(onnx="out.onnx"),
        "synset.txt",
        ("cat", "dog", "owl"),
    )
    picture = list(pictures(2, 224))
    converted = infermill.load_model(tmp_path / "out.yaml")(picture)
    direct = infermill.load_model(prefix, card_options=given)(picture)
    assert converted == direct


def is_there(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).touch()


@pytest.mark.parametrize(
    ("before", "output", "message"),
    [
        (is_there("out.onnx"), "out.onnx", "out.onnx is there already"),
        (is_there("out.yaml"), "out.onnx", "out.yaml is there already"),
        (is_there("x"), "out", "does not end in .onnx"),
        (is_there("x"), "no/folder/out.onnx", "there is no folder"),
    ],
)
def test_convert_overwrites_nothing(
    before: Callable[[Path], None], output: str, message: str, prefix: Path, tmp_path: Path
) -> None:
    before(tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.*")}
    with pytest.raises(UsageError, match=message):
        convert_model(str(prefix), tmp_path / output, NO_STORE, CardOptions())
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_onnx_is_not_converted_again(tmp_path: Path) -> None:
    network = tiny_classifier(tmp_path / "tiny.onnx")
    with pytest.raises(UsageError, match="is ONNX already"):
        convert_model(str(network), tmp_path / "out.onnx", NO_STORE, CardOptions())


def test_the_commands(prefix: Path, tmp_path: Path) -> None:
    def infermill_command(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        command = ["infermill", *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = infermill_command("convert", "models/tiny", "--epoch", "0", "-o", "tiny.onnx")
    assert done.stdout.splitlines()[-2:] == ["tiny.onnx", "tiny.yaml"]
    assert "assumed: " in done.stdout
    inspected = infermill_command("inspect", "models/tiny-symbol.json", "--json")
    assert json.loads(inspected.stdout)["network"]["inputs"][0]["shape"] == ["batch", 3, 224, 224]
    again = infermill_command("convert", "models/tiny", "-o", "tiny.onnx")
    assert (again.returncode, again.stdout) == (2, "")
    assert "tiny.onnx is there already" in again.stderr
