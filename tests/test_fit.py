"""A card against a network that is not run: what is guessed, and what does not fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from infermill.errors import ModelError
from infermill.models.card import ModelCard
from infermill.models.card_file import parse_card
from infermill.models.fit import check_network
from infermill.models.guess import guess_card
from infermill.models.onnx import NetworkInfo, TensorInfo, inspect_network
from infermill.models.opening import open_model
from infermill.types import CardOptions, StoreOptions
from tests.networks import preprocess_of, tiny_classifier, tiny_embedding, tiny_raw, tiny_tabular

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
    resize = preprocess_of(card).resize
    assert resize is not None
    assert resize.exact == (32, 32)
    assert preprocess_of(card).scale == 1 / 255
    assert preprocess_of(card).mean == (0.0, 0.0, 0.0)
    assert "task is classification: the output is `logits` (float32 [N, 10])" in notes
    assert "labels are unknown" in notes


@pytest.mark.parametrize("size", [96, 224, 299])
def test_a_large_classifier_is_guessed_to_be_of_imagenet(tmp_path: Path, size: int) -> None:
    card, notes = guessed(tiny_classifier(tmp_path / "large.onnx", size=size))
    resize = preprocess_of(card).resize
    assert resize is not None
    assert resize.shorter == round(size / 0.875)
    assert preprocess_of(card).height_width == (size, size)
    assert preprocess_of(card).mean == (0.485, 0.456, 0.406)
    assert preprocess_of(card).std == (0.229, 0.224, 0.225)
    assert "those of ImageNet training" in notes


def test_images_that_are_stretched_to_the_size_of_the_network_are_not_cropped(tmp_path: Path) -> None:
    path = tiny_classifier(tmp_path / "large.onnx", size=224)
    card, notes = guess_card(path, inspect_network(path), CardOptions(exact=(224, 224)))
    assert card.preprocess is not None
    assert card.preprocess.crop is None
    assert "crop" not in "".join(notes)


def test_a_network_of_any_size_is_guessed_to_take_224(tmp_path: Path) -> None:
    card, notes = guessed(tiny_classifier(tmp_path / "any.onnx", size=None))
    assert preprocess_of(card).height_width == (224, 224)
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
        (CardOptions(exact=(224, 224)), ["preprocess.resize", "preprocess.crop"]),
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
    assert (card.input.dtype, card.input.layout, preprocess_of(card).scale) == ("uint8", "NHWC", 1)
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
    assert (preprocess_of(card).scale, preprocess_of(card).mean) == (1, (0.0, 0.0, 0.0))
    assert f"the network begins with its own ({op})" in notes


def test_grey_and_float16_networks_are_guessed(tmp_path: Path) -> None:
    grey, notes = guessed(tiny_classifier(tmp_path / "grey.onnx", size=96, channels=1, layout="NHWC"))
    assert (grey.input.layout, preprocess_of(grey).scale, preprocess_of(grey).mean) == (
        "NHWC",
        1 / 255,
        (0.0, 0.0, 0.0),
    )
    assert "color" not in notes
    half, _ = guessed(tiny_classifier(tmp_path / "half.onnx", dtype="float16"))
    assert half.input.dtype == "float16"


def test_embeddings_and_other_outputs_are_guessed(tmp_path: Path) -> None:
    assert guessed(tiny_embedding(tmp_path / "a.onnx"))[0].task == "embedding"
    assert guessed(tiny_raw(tmp_path / "b.onnx"))[0].task == "raw"


def test_an_image_that_is_not_square_is_stretched(tmp_path: Path) -> None:
    info = network(image=("N", 3, 128, 64))
    card, notes = guess_card(Path("tall.onnx"), info, CardOptions())
    assert preprocess_of(card).height_width == (128, 64)
    assert "stretches images to 128x64" in notes[0]


def test_an_undecided_layout_is_noted() -> None:
    card, notes = guess_card(Path("open.onnx"), network(image=("N", None, None, None)), CardOptions())
    assert card.input.layout == "NCHW"
    assert any("input.layout is NCHW" in note for note in notes)


@pytest.mark.parametrize(
    ("shape", "dtype", "shown"),
    [
        ((6,), "float32", "`rows` (float32 [N, 6])"),
        ((3, 32, 32), "int64", "`rows` (int64 [N, 3, 32, 32])"),
        ((4, 32, 32), "float32", "`rows` (float32 [N, 4, 32, 32])"),
        ((2, 2, 3, 3), "float16", "`rows` (float16 [N, 2, 2, 3, 3])"),
        ((), "bool", "`rows` (bool [N])"),
    ],
)
def test_what_is_no_image_is_guessed_to_be_a_tensor(
    tmp_path: Path, shape: tuple[int, ...], dtype: str, shown: str
) -> None:
    card, notes = guessed(tiny_tabular(tmp_path / "tabular.onnx", shape, dtype=dtype))
    assert (card.preprocess, card.input.name, card.input.dtype) == (None, "rows", dtype)
    assert f"preprocess is null: {shown} is no image" in notes
    assert (card.task, card.output.activation) == ("classification", "softmax")


def test_one_number_for_a_tensor_is_guessed_to_be_a_regression(tmp_path: Path) -> None:
    assert guessed(tiny_tabular(tmp_path / "price.onnx", classes=1))[0].task == "raw"
    info = inspect_network(tmp_path / "price.onnx")
    card, _ = guess_card(tmp_path / "price.onnx", info, CardOptions(task="classification"))
    assert card.output.activation == "sigmoid"


def test_options_for_images_need_an_image(tmp_path: Path) -> None:
    path = tiny_tabular(tmp_path / "tabular.onnx")
    with pytest.raises(ModelError, match=r"`rows` \(float32 \[N, 6\]\) of tabular.onnx is no image") as caught:
        open_model(path, StoreOptions(), CardOptions(scale=0.5))
    assert "`preprocess: null`" in caught.value.hint
    (tmp_path / "model.yaml").write_text("name: t\nfiles: {onnx: tabular.onnx}\npreprocess: null\n")
    with pytest.raises(ModelError, match="has `preprocess: null`, and --crop, --mean would preprocess images"):
        open_model(tmp_path / "model.yaml", StoreOptions(), CardOptions(crop=(6, 6), mean=(1, 1, 1)))
    given = CardOptions(task="raw", top_k=3, labels=None)
    assert open_model(tmp_path / "model.yaml", StoreOptions(), given).card.task == "raw"


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
        (
            network(output=("N", 1)),
            {"output": {"activation": "softmax"}},
            "one number of `logits`",
            "activation: sigmoid",
        ),
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


@pytest.mark.parametrize(
    ("info", "fields", "message", "hint"),
    [
        (("N", 6), {"input": {"dtype": "int32"}}, "is not int32, as the card says", "set `input.dtype: float32`"),
        (
            ("N", "tokens"),
            {},
            "dim 1, `tokens`, of the input `images` (float32 [N, tokens]) has no fixed",
            "--dim_param tokens ",
        ),
        (
            ("N", 4, None),
            {},
            "dim 2 of the input `images` (float32 [N, 4, ?]) has no fixed length",
            "--dim_param NAME ",
        ),
        ((), {}, "has no dims, and rows need one for the batch", "fixed shape"),
        (None, {}, "has no dims, and rows need one for the batch", "fixed shape"),
        (("N", 6), {"input": {"name": "image"}}, "has no input `image`", "did you mean `input.name: images`?"),
        (("N", 6), {"classes": 9}, "`classes` says 9", "10 classes"),
    ],
)
def test_a_card_of_a_tensor_that_does_not_fit_is_told_where(
    info: tuple[int | str | None, ...] | None, fields: dict[str, Any], message: str, hint: str
) -> None:
    card = parse_card({"name": "t", "files": {"onnx": "t.onnx"}, "preprocess": None, **fields}, "test")
    with pytest.raises(ModelError) as caught:
        check_network(card, None, network(image=info))
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("dtype", ["string", "bfloat16", "complex64", "sequence"])
@pytest.mark.parametrize("image", [("N", 6), ("N", 3, 8, 8)])
def test_an_input_of_no_numbers_is_refused(dtype: str, image: tuple[int | str, ...]) -> None:
    with pytest.raises(ModelError, match=f"{dtype} .* cannot be given") as caught:
        guess_card(Path("a.onnx"), network(image=image, dtype=dtype), CardOptions())
    assert "float32, float16, uint8, float64" in caught.value.hint


@pytest.mark.parametrize("task", ["raw", "classification"])
def test_outputs_that_are_no_tensors_of_numbers_are_refused(tmp_path: Path, task: str) -> None:
    path = tiny_tabular(tmp_path / "trees.onnx")
    model = onnx.load_model(path)
    number = helper.make_tensor_type_proto(TensorProto.FLOAT, [])
    scores = helper.make_sequence_type_proto(helper.make_map_type_proto(TensorProto.INT64, number))
    model.graph.output[0].type.CopyFrom(scores)
    path.write_bytes(model.SerializeToString())
    for output in (inspect_network(path).outputs[0], TensorInfo("names", "string", ("N",), "ArrayFeatureExtractor")):
        info = replace(inspect_network(path), outputs=(output,))
        with pytest.raises(ModelError, match=rf"`{output.name}` \({output.dtype} .*holds no ") as caught:
            check_network(
                parse_card({"name": "t", "files": {"onnx": "t"}, "task": task, "preprocess": None}, ""), None, info
            )
        assert "zipmap" in caught.value.hint


def test_a_network_with_two_inputs_is_refused() -> None:
    info = network()
    two = NetworkInfo((*info.inputs, TensorInfo("mask", "bool", ("N",), "And")), info.outputs, 17, "", 8, 1, 1)
    for name in (None, "images"):
        with pytest.raises(ModelError, match=r"has 2 inputs: `images`.*`mask`"):
            check_network(card_of(input={"name": name}), None, two)
    with pytest.raises(ModelError, match="has 2 inputs"):
        guess_card(Path("t.onnx"), two, CardOptions())
