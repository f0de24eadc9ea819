"""`load_model(card) -> predict`, in memory."""

import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import infermill
from tests.networks import tiny_classifier, tiny_raw, tiny_tabular
from tests.servers import Bucket


@pytest.fixture
def card(tmp_path: Path) -> infermill.ModelCard:
    tiny_classifier(tmp_path / "tiny.onnx", classes=10, size=32)
    return infermill.parse_card(
        {
            "name": "tiny",
            "files": {"onnx": str(tmp_path / "tiny.onnx")},
            "preprocess": {"resize": {"shorter": 40}, "crop": {"center": [32, 32]}, "scale": 1 / 255},
            "output": {"activation": "softmax", "top_k": 10},
            "labels": [f"class {i}" for i in range(10)],
        }
    )


def test_one_picture_in_every_form_has_one_prediction(card: infermill.ModelCard, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "photo.png")
    path = tmp_path / "photo.png"
    predictions = infermill.load_model(card)([path, str(path), path.read_bytes(), image, pixels])
    assert all(one.error is None for one in predictions)
    assert {one.top for one in predictions} == {predictions[0].top}
    top = predictions[0].top
    assert top is not None
    assert sum(one.score for one in top) == pytest.approx(1, abs=1e-5)
    assert [one.score for one in top] == sorted((one.score for one in top), reverse=True)
    assert top[0].label == f"class {top[0].index}"


def test_bad_inputs_have_an_error_and_keep_their_place(card: infermill.ModelCard, tmp_path: Path) -> None:
    good = np.zeros((40, 40, 3), np.uint8)
    predictions = infermill.load_model(card)([good, b"", tmp_path / "missing.jpg", "a\0.jpg", b"<html>", good])
    codes = [None, "empty", "missing", "missing", "unsupported", None]
    assert [one.error and one.error.code for one in predictions] == codes
    assert [one.top is None for one in predictions] == [code is not None for code in codes]


def test_uris_are_fetched(card: infermill.ModelCard, bucket: Bucket, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "black.png")
    bucket.put("black.png", (tmp_path / "black.png").read_bytes())
    predict = infermill.load_model(card, infermill.Options(**asdict(bucket.options)))
    here = tmp_path / "black.png"
    uris = [
        f"{bucket.uri}/black.png",
        f"file://{here}",
        f"{bucket.uri}/gone.png",
        "https://x.org/a.png",
        "ftp://x/a.png",
    ]
    expected, *predictions = predict([here, *uris])
    assert [one.top for one in predictions[:2]] == [expected.top] * 2
    codes = [one.error.code for one in predictions[2:] if one.error]
    assert codes == ["missing", "unreadable", "unreadable"]


def test_more_pictures_than_a_batch_and_none(card: infermill.ModelCard) -> None:
    predict = infermill.load_model(card)
    pictures = [np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8) for i in range(37)]
    together = predict(pictures)
    for picture, prediction in zip(pictures[::9], together[::9], strict=True):
        (alone,) = predict([picture])
        assert alone.top is not None
        assert prediction.top is not None
        assert [one.index for one in alone.top] == [one.index for one in prediction.top]
        np.testing.assert_allclose([a.score for a in alone.top], [b.score for b in prediction.top], atol=1e-6)
    assert predict([]) == []


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_both_runtimes(card: infermill.ModelCard, runtime: infermill.types.RuntimeName) -> None:
    predict = infermill.load_model(card, infermill.Options(runtime=runtime))
    assert predict([np.zeros((40, 40, 3), np.uint8)])[0].error is None


def test_a_grey_array_and_a_wrong_one(card: infermill.ModelCard) -> None:
    predict = infermill.load_model(card)
    grey = np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)
    as_rgb = np.stack([grey] * 3, axis=2)
    first, second = predict([grey, as_rgb])
    assert first.top == second.top


def test_the_limit_of_pixels_is_that_of_the_options_in_every_form(card: infermill.ModelCard) -> None:
    pixels = np.zeros((80, 100, 3), np.uint8)  # more than what is left of it
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    forms: list[infermill.predict.Input] = [pixels, Image.fromarray(pixels), file.getvalue()]
    for max_pixels, code in ((80 * 100, None), (80 * 100 - 1, "too_large")):
        predict = infermill.load_model(card, infermill.Options(max_pixels=max_pixels))
        assert [one.error and one.error.code for one in predict(forms)] == [code] * 3


# --- tensors


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_one_tensor_in_every_form_has_one_prediction(tmp_path: Path, runtime: infermill.types.RuntimeName) -> None:
    network = tiny_tabular(tmp_path / "tabular.onnx", (2, 3))
    row = np.arange(6, dtype=np.float64).reshape(2, 3)
    path = tmp_path / "row.npy"
    np.save(path, row)
    forms: list[Any] = [
        row,
        row.tolist(),
        row.ravel().tolist(),
        tuple(row),
        row.astype(np.int8),
        path,
        str(path),
        path.read_bytes(),
    ]
    predict = infermill.load_model(network, infermill.Options(runtime=runtime))
    predictions = predict(forms)
    assert all(one.error is None for one in predictions)
    assert len({one.top for one in predictions}) == 1
    assert predict([]) == []


def test_bad_tensors_have_an_error_and_keep_their_place(tmp_path: Path) -> None:
    predict = infermill.load_model(tiny_tabular(tmp_path / "tabular.onnx", (2,)))
    bad: list[Any] = [
        [1.0],
        [1.0, None],
        ["a", "b"],
        [[1.0], [1.0, 2.0]],
        b"",
        tmp_path / "gone.npy",
        [np.nan, 1],
        [1e300, 1],
        5,
    ]
    predictions = predict([[1, 2], *bad, [1, 2]])
    codes = [one.error and one.error.code for one in predictions]
    unsupported = ["unsupported"] * 4
    assert codes == [None, *unsupported, "empty", "missing", "nonfinite", "unsupported", "unsupported", None]
    assert predictions[1].error is not None
    assert predictions[1].error.message == "a tensor float64 [1], where float32 [2] is wanted"


def test_embeddings_and_raw_outputs_of_tensors(tmp_path: Path) -> None:
    network = tiny_tabular(tmp_path / "tabular.onnx", (3,), classes=5, dtype="float16", output="features")
    (one,) = infermill.load_model(network)([[1, 2, 3]])
    assert one.embedding is not None
    assert one.embedding.shape == (5,)
    (other,) = infermill.load_model(network, card_options=infermill.CardOptions(task="raw"))([[1, 2, 3]])
    assert other.outputs is not None
    assert other.outputs["features"].dtype == np.float16
    np.testing.assert_array_equal(other.outputs["features"], one.embedding)
    card = {"name": "t", "files": {"onnx": str(tiny_raw(tmp_path / "raw.onnx"))}, "preprocess": None, "task": "raw"}
    predict = infermill.load_model(infermill.parse_card(card))
    (both,) = predict([np.zeros((3, 32, 32))])
    assert both.outputs is not None
    assert {name: array.shape for name, array in both.outputs.items()} == {"boxes": (5, 4), "kind": ()}
