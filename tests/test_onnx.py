"""ONNX files, read without running them: what they hold, what is guessed, and what does not fit a card."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from infermill.errors import ModelError
from infermill.models.card import ModelCard, parse_card
from infermill.models.guess import guess_card
from infermill.models.onnx import (
    NetworkInfo,
    TensorInfo,
    check_network,
    external_files,
    external_names,
    inspect_network,
    read_network,
)
from infermill.types import CardOptions
from tests.networks import Network, tiny_classifier, tiny_embedding, tiny_raw


def edited_location(path: Path, location: str, **entries: str) -> Path:
    """The network at `path`, with its first weight said to lie elsewhere."""
    model = onnx.load_model(path, load_external_data=False)
    tensor = model.graph.initializer[0]
    kept = {entry.key: entry.value for entry in tensor.external_data} | {"location": location} | entries
    del tensor.external_data[:]
    for key, value in kept.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def external(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tiny_classifier(tmp_path / "model" / "tiny.onnx", external_data=True)


# --- reading


def test_a_network_is_inspected(tmp_path: Path) -> None:
    path = tiny_classifier(tmp_path / "tiny.onnx", classes=7, size=32, softmax=True)
    assert inspect_network(path) == NetworkInfo(
        inputs=(TensorInfo("images", "float32", ("N", 3, 32, 32), "Conv"),),
        outputs=(TensorInfo("probabilities", "float32", ("N", 7), "Softmax"),),
        opset=17,
        producer="tests",
        ir_version=8,
        nodes=6,
        file_bytes=path.stat().st_size,
    )


def test_weights_are_no_inputs(tmp_path: Path) -> None:
    info = inspect_network(tiny_classifier(tmp_path / "old.onnx", opset=7, ir_version=3))
    assert [image.name for image in info.inputs] == ["images"]


@pytest.mark.parametrize("shape", [None, ["N", "unknown"]])
def test_shapes_that_are_not_declared_are_inferred(tmp_path: Path, shape: Sequence[str] | None) -> None:
    path = tiny_classifier(tmp_path / "tiny.onnx", classes=7, batch=2)
    model = onnx.load_model(path)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape))
    onnx.save_model(model, path)
    shape_found = inspect_network(path).outputs[0].shape
    assert shape_found is not None
    assert shape_found[1] == 7


@pytest.mark.parametrize("content", [b"", b"\x08\x08", b"hello", b"<html>404 not found</html>", bytes(9)])
def test_a_file_that_is_not_onnx_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"bad\.onnx is not an ONNX network, or it is damaged") as caught:
        inspect_network(path)
    assert caught.value.hint


def test_a_git_lfs_pointer_is_told_as_such(tmp_path: Path) -> None:
    path = tmp_path / "pointer.onnx"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(ModelError, match="Git LFS pointer") as caught:
        inspect_network(path)
    assert caught.value.hint == "run: git lfs pull"


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.onnx"):
        with pytest.raises(ModelError, match="cannot read"):
            inspect_network(path)


def test_a_file_above_2_gib_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.onnx"
    with path.open("wb") as file:
        file.truncate(1 << 31)
    with pytest.raises(ModelError, match="larger than 2 GiB") as caught:
        inspect_network(path)
    assert "save_as_external_data=True" in caught.value.hint


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_is_refused_in_one_line_or_read(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "damaged.onnx"
    content = bytearray(tiny_classifier(path, classes=2, size=8, external_data=True).read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        info = inspect_network(path)
        card, _ = guess_card(path, info, CardOptions())
        check_network(card, None, info)
    except ModelError as error:
        assert "\n" not in error.message


# --- external data


def files_beside(path: Path) -> dict[str, Path]:
    return external_files(read_network(path), path)


def test_external_files_are_found_beside_the_network(external: Path) -> None:
    data = external.with_name("tiny.onnx.data")
    assert files_beside(external) == {"tiny.onnx.data": data}
    assert external_names(external) == ("tiny.onnx.data",)
    assert inspect_network(external).file_bytes == external.stat().st_size + data.stat().st_size


def test_weights_of_constants_and_subgraphs_are_external_too(tmp_path: Path) -> None:
    def kept_in(location: str) -> onnx.TensorProto:
        tensor = TensorProto(name=location, data_type=TensorProto.FLOAT, dims=[1])
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        (tmp_path / location).parent.mkdir(exist_ok=True)
        (tmp_path / location).write_bytes(bytes(4))
        return tensor

    inner = helper.make_node("Constant", [], ["y"], value=kept_in("inner.bin"))
    branch = helper.make_graph(
        [inner], "branch", [], [helper.make_tensor_value_info("y", 1, [1])], [kept_in("deep/w.bin")]
    )
    net = Network()
    net.node("If", "flag", name="out", then_branch=branch, else_branch=branch)
    net.nodes.append(helper.make_node("Constant", [], ["c"], value=kept_in("outer.bin")))
    output = helper.make_tensor_value_info("out", 1, [1])
    path = net.save(tmp_path / "net.onnx", [helper.make_tensor_value_info("flag", 9, [])], [output])
    assert set(files_beside(path)) == {"inner.bin", "outer.bin", "deep/w.bin"}


@pytest.mark.parametrize("location", ["/etc/passwd", "../secret.bin", "sub/../../secret.bin", "sub/../tiny.onnx.data"])
def test_external_data_outside_the_folder_is_refused(external: Path, location: str) -> None:
    (external.parents[1] / "secret.bin").write_bytes(bytes(10_000))
    edited_location(external, location)
    for read in (files_beside, external_names, inspect_network):
        with pytest.raises(ModelError, match="are outside the model's folder") as caught:
            read(external)
        assert "`weight0`" in caught.value.message
        assert repr(location) in caught.value.message


def test_a_link_that_leads_out_of_the_folder_is_refused(external: Path) -> None:
    secret = external.parents[1] / "secret.bin"
    external.with_name("tiny.onnx.data").rename(secret)
    external.with_name("tiny.onnx.data").symlink_to(secret)
    with pytest.raises(ModelError, match=r"`weight0` at 'tiny\.onnx\.data' are outside"):
        inspect_network(external)
    linked = external.parents[1] / "linked"
    linked.mkdir()
    linked.joinpath("tiny.onnx").write_bytes(external.read_bytes())
    linked.joinpath("tiny.onnx.data").symlink_to("inside.bin")
    linked.joinpath("inside.bin").write_bytes(secret.read_bytes())
    assert files_beside(linked / "tiny.onnx") == {"tiny.onnx.data": linked / "inside.bin"}


@pytest.mark.parametrize(
    ("location", "entries", "message"),
    [
        ("missing.bin", {}, "at 'missing.bin' are missing"),
        ("", {}, "are missing"),
        ("tiny.onnx.data", {"offset": "-4"}, "are incomplete"),
        ("tiny.onnx.data", {"length": "999999999"}, "are incomplete: the file has"),
        ("tiny.onnx.data", {"offset": "four"}, "cannot be read"),
        ("a\0b", {}, "cannot be read"),
        ("x" * 5000, {}, "cannot be read"),
    ],
)
def test_external_data_that_is_not_there_is_refused(
    external: Path, location: str, entries: dict[str, str], message: str
) -> None:
    edited_location(external, location, **entries)
    with pytest.raises(ModelError, match=message):
        inspect_network(external)


def test_a_device_is_no_external_data(external: Path) -> None:
    os.mkfifo(external.with_name("pipe"))
    with pytest.raises(ModelError, match="at 'pipe' are missing"):
        inspect_network(edited_location(external, "pipe"))


# --- guessing a card


def guessed(path: Path) -> tuple[ModelCard, str]:
    info = inspect_network(path)
    card, notes = guess_card(path, info, CardOptions())
    check_network(card, None, info)
    return card, "\n".join(notes)


def test_a_small_classifier_is_guessed(tmp_path: Path) -> None:
    card, notes = guessed(tiny_classifier(tmp_path / "tiny.onnx", size=32))
    assert (card.name, card.files.onnx, card.task, card.labels) == ("tiny", "tiny.onnx", "classification", None)
    assert (card.input.name, card.input.layout, card.input.dtype) == ("images", "NCHW", "float32")
    assert card.output.activation == "softmax"
    assert card.preprocess.resize is not None
    assert card.preprocess.resize.exact == (32, 32)
    assert card.preprocess.scale == 1 / 255
    assert card.preprocess.mean == (0.0, 0.0, 0.0)
    assert "task is classification: the output is `logits` (float32 [N, 10])" in notes
    assert "labels are unknown" in notes


@pytest.mark.parametrize("size", [96, 224, 299])
def test_a_large_classifier_is_guessed_to_be_of_imagenet(tmp_path: Path, size: int) -> None:
    card, notes = guessed(tiny_classifier(tmp_path / "large.onnx", size=size))
    assert card.preprocess.resize is not None
    assert card.preprocess.resize.shorter == round(size / 0.875)
    assert card.preprocess.height_width == (size, size)
    assert card.preprocess.mean == (0.485, 0.456, 0.406)
    assert card.preprocess.std == (0.229, 0.224, 0.225)
    assert "those of ImageNet training" in notes


def test_a_network_of_any_size_is_guessed_to_take_224(tmp_path: Path) -> None:
    card, notes = guessed(tiny_classifier(tmp_path / "any.onnx", size=None))
    assert card.preprocess.height_width == (224, 224)
    assert "images are made 224x224" in notes


def test_probabilities_need_no_softmax(tmp_path: Path) -> None:
    card, notes = guessed(tiny_classifier(tmp_path / "tiny.onnx", softmax=True, output_shape=["N", 10, 1, 1]))
    assert (card.task, card.output.activation) == ("classification", "none")
    assert "the network ends in Softmax" in notes


@pytest.mark.parametrize(("op", "activation"), [("Gemm", "sigmoid"), ("Sigmoid", "none")])
@pytest.mark.parametrize("shape", [("N", 1), ("N", 1, 1, 1)])
def test_a_classifier_of_one_class_ends_in_a_sigmoid(shape: tuple[str | int, ...], op: str, activation: str) -> None:
    card, _ = guess_card(Path("one.onnx"), network(output=shape, op=op), CardOptions())
    assert (card.task, card.output.activation) == ("classification", activation)


@pytest.mark.parametrize(
    ("given", "dropped"),
    [
        (CardOptions(task="embedding"), ["task is", "output.activation", "labels are"]),
        (CardOptions(labels="labels.txt"), ["labels are"]),
        (CardOptions(exact=(224, 224)), ["preprocess.resize"]),
        (CardOptions(shorter=256), ["preprocess.resize"]),
        (CardOptions(crop=(224, 224)), ["preprocess.crop", "images are made"]),
        (CardOptions(color="BGR"), ["preprocess.color"]),
        (CardOptions(scale=1.0), ["preprocess.scale"]),
        (CardOptions(mean=(0, 0, 0)), ["preprocess.mean"]),
        (CardOptions(std=(1, 1, 1)), ["preprocess.std"]),
        (CardOptions(layout="NCHW"), ["input.layout"]),
        (CardOptions(activation="none"), ["output.activation"]),
    ],
)
def test_what_is_given_is_not_among_the_assumptions(given: CardOptions, dropped: list[str]) -> None:
    info = network(image=("N", None, None, None))
    everything = "\n".join(guess_card(Path("a.onnx"), info, CardOptions())[1])
    rest = "\n".join(guess_card(Path("a.onnx"), info, given)[1])
    named = ["task is", "output.activation", "labels are", "preprocess.resize", "preprocess.crop", "images are made",
             "preprocess.color", "preprocess.scale", "preprocess.mean", "preprocess.std", "input.layout"]  # fmt: skip
    assert [one for one in named if one not in everything] == []
    assert [one for one in named if one not in rest] == [one for one in named if one in dropped]


def test_the_guess_goes_with_what_is_given() -> None:
    card, _ = guess_card(Path("a.onnx"), network(op="GlobalAveragePool"), CardOptions(task="classification"))
    assert card.output.activation == "softmax"
    card, _ = guess_card(Path("a.onnx"), network(image=("N", None, None, None)), CardOptions(layout="NHWC"))
    assert card.input.layout == "NHWC"


def test_bytes_are_not_normalised(tmp_path: Path) -> None:
    card, notes = guessed(tiny_classifier(tmp_path / "tiny.onnx", size=96, dtype="uint8", layout="NHWC"))
    assert (card.input.dtype, card.input.layout, card.preprocess.scale) == ("uint8", "NHWC", 1)
    assert "the network takes bytes" in notes


@pytest.mark.parametrize("op", ["Sub", "Mul", "Div", "BatchNormalization"])
def test_a_network_that_normalises_is_given_pixels(tmp_path: Path, op: str) -> None:
    path = tiny_classifier(tmp_path / "tiny.onnx", size=96)
    model = onnx.load_model(path)
    model.graph.node[0].input[0] = "normalised"
    cast = helper.make_node("Cast", ["images"], ["cast"], to=TensorProto.FLOAT)
    nodes = [cast, helper.make_node(op, ["cast", "w"], ["normalised"]), *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    path.write_bytes(model.SerializeToString())
    card, notes = guessed(path)
    assert (card.preprocess.scale, card.preprocess.mean) == (1, (0.0, 0.0, 0.0))
    assert f"the network begins with its own ({op})" in notes


def test_grey_and_float16_networks_are_guessed(tmp_path: Path) -> None:
    grey, notes = guessed(tiny_classifier(tmp_path / "grey.onnx", size=96, channels=1, layout="NHWC"))
    assert (grey.input.layout, grey.preprocess.scale, grey.preprocess.mean) == ("NHWC", 1 / 255, (0.0, 0.0, 0.0))
    assert "color" not in notes
    half, _ = guessed(tiny_classifier(tmp_path / "half.onnx", dtype="float16"))
    assert half.input.dtype == "float16"


def test_embeddings_and_other_outputs_are_guessed(tmp_path: Path) -> None:
    assert guessed(tiny_embedding(tmp_path / "a.onnx"))[0].task == "embedding"
    assert guessed(tiny_raw(tmp_path / "b.onnx"))[0].task == "raw"


def test_an_image_that_is_not_square_is_stretched(tmp_path: Path) -> None:
    info = network(image=("N", 3, 128, 64))
    card, notes = guess_card(Path("tall.onnx"), info, CardOptions())
    assert card.preprocess.height_width == (128, 64)
    assert "stretches images to 128x64" in notes[0]


def test_an_undecided_layout_is_noted() -> None:
    card, notes = guess_card(Path("open.onnx"), network(image=("N", None, None, None)), CardOptions())
    assert card.input.layout == "NCHW"
    assert any("input.layout is NCHW" in note for note in notes)


# --- checking a card


def network(
    image: tuple[int | str | None, ...] | None = ("N", 3, 32, 32),
    dtype: str = "float32",
    output: tuple[int | str | None, ...] | None = ("N", 10),
    opset: int = 17,
    op: str = "Gemm",
    output_dtype: str = "float32",
) -> NetworkInfo:
    logits = TensorInfo("logits", output_dtype, output, op)
    features = TensorInfo("features", "float32", ("N", 512), "Flatten")
    inputs = (TensorInfo("images", dtype, image, "Conv"),)
    return NetworkInfo(inputs, (logits, features), opset, "tests", 8, 5, 1000)


def card_of(**fields: Any) -> ModelCard:
    preprocess = {"resize": {"exact": [32, 32]}} | fields.pop("preprocess", {})
    return parse_card({"name": "t", "files": {"onnx": "t.onnx"}, "preprocess": preprocess, **fields}, "test")


@pytest.mark.parametrize(
    ("info", "fields"),
    [
        (network(), {}),
        (network(image=None, output=None), {}),
        (network(image=("N", 3, None, "W")), {"preprocess": {"resize": {"exact": [7, 9]}}}),
        (network(image=("N", 32, 32, 3)), {"input": {"name": "images", "layout": "NHWC"}}),
        (network(image=(4, 1, 32, 32)), {"preprocess": {"mean": [0.5, 0.5, 0.5]}}),
        (network(dtype="uint8"), {"input": {"dtype": "uint8"}}),
        (network(output=("N", 10, 1, 1)), {"classes": 10}),
        (network(), {"output": {"top_k": 1000}}),
        (network(op="Softmax"), {}),
        (network(), {"output": {"name": "features"}, "classes": 512}),
        (network(output=("N", 5, 4)), {"task": "raw"}),
        (network(output=("N", 5, 4)), {"task": "embedding"}),
        (network(dtype="float32", output=("N", 5)), {"preprocess": {"crop": {"center": [32, 32]}}}),
    ],
)
def test_a_card_that_fits_is_accepted(info: NetworkInfo, fields: dict[str, Any]) -> None:
    check_network(card_of(**fields), None, info)


NORMALISED = {"scale": 0.5, "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}


@pytest.mark.parametrize(
    ("info", "fields", "message", "hint"),
    [
        (network(), {"input": {"name": "image"}}, "t.onnx has no input `image`", "did you mean `input.name: images`?"),
        (network(), {"input": {"name": "data"}}, "t.onnx has no input `data`", "set `input.name` to one of: images"),
        (network(image=("N", 784)), {}, "`images` (float32 [N, 784]) of t.onnx is no image", "4 dims"),
        (network(dtype="int64"), {}, "`images` (int64 [N, 3, 32, 32]) of t.onnx is no image", "float32, float16"),
        (network(dtype="float16"), {}, "is not float32, as the card says", "set `input.dtype: float16`"),
        (network(image=("N", 32, 32, 3)), {}, "has 32 channels in layout NCHW", "set `input.layout: NHWC`"),
        (network(), {"input": {"layout": "NHWC"}}, "has 32 channels in layout NHWC", "set `input.layout: NCHW`"),
        (network(image=("N", 4, 32, 32)), {}, "has 4 channels", "images have 3 channels, or 1"),
        (network(), {"preprocess": {"resize": None}}, "no fixed size", "add `preprocess.resize.exact: [32, 32]`"),
        (network(), {"preprocess": {"resize": {"shorter": 32}}}, "no fixed size", "preprocess.crop.center: [32, 32]"),
        (network(image=("N", 3, 64, 48)), {}, "makes images of [32, 32]", "set `preprocess.resize.exact: [64, 48]`"),
        (
            network(),
            {"preprocess": {"crop": {"center": [24, 32]}}},
            "makes images of [24, 32], and `images` (float32 [N, 3, 32, 32]) takes [32, 32]",
            "set `preprocess.crop.center: [32, 32]`",
        ),
        (
            network(dtype="uint8"),
            {"input": {"dtype": "uint8"}, "preprocess": {"scale": 0.5}},
            "takes bytes, which cannot be normalised",
            "remove `preprocess.scale`",
        ),
        (network(image=("N", 1, 32, 32)), {"preprocess": NORMALISED}, "takes grey images", "same number three times"),
        (network(image=("N", 1, 32, 32)), {"preprocess": {"color": "BGR"}}, "takes grey images", "preprocess.color"),
        (network(), {"output": {"name": "logit"}}, "no output `logit`", "did you mean `output.name: logits`?"),
        (network(), {"classes": 9}, "`classes` says 9, and the output `logits` (float32 [N, 10]) has 10", "labels"),
        (network(), {"labels": ["a", "b"]}, "`labels` has 2, and the output `logits`", "10 classes"),
        (network(output=None), {"labels": ["a"], "classes": 2}, "`classes` says 2, and `labels` has 1", "classes"),
        (network(output=("N", 5, 4)), {}, "`logits` (float32 [N, 5, 4]) is no classification", "task: raw"),
        (network(output=("N", 10, 7, 7)), {}, "is no classification", "task: raw"),
        (network(output=("N",)), {"task": "embedding"}, "is no embedding", "task: raw"),
        (network(output_dtype="int64"), {}, "holds no floating-point numbers", "task: raw"),
        (network(op="Softmax"), {"output": {"activation": "softmax"}}, "out of a Softmax already", "activation: none"),
        (network(opset=6), {}, "opset 6", "convert_version(model, 17)"),
    ],
)
def test_a_card_that_does_not_fit_is_told_where(
    info: NetworkInfo, fields: dict[str, Any], message: str, hint: str
) -> None:
    card = card_of(**fields)
    labels = card.labels if isinstance(card.labels, tuple) else None
    with pytest.raises(ModelError) as caught:
        check_network(card, labels, info)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert "\n" not in str(caught.value.message)


def test_a_network_with_two_inputs_is_refused() -> None:
    info = network()
    two = NetworkInfo((*info.inputs, TensorInfo("mask", "bool", ("N",), "And")), info.outputs, 17, "", 8, 1, 1)
    for name in (None, "images"):
        with pytest.raises(ModelError, match=r"has 2 inputs: `images`.*`mask`"):
            check_network(card_of(input={"name": name}), None, two)
