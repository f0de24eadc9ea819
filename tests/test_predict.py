"""`load_model(card) -> predict`, in memory."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import infermill
from tests.networks import tiny_classifier


@pytest.fixture
def card(tmp_path: Path) -> infermill.ModelCard:
    tiny_classifier(tmp_path / "tiny.onnx", classes=10, size=32)
    return infermill.ModelCard.model_validate(
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
    predictions = infermill.load_model(card)([good, b"", tmp_path / "missing.jpg", b"<html>", good])
    assert [one.error and one.error.code for one in predictions] == [None, "empty", "missing", "unsupported", None]
    assert [one.top is None for one in predictions] == [False, True, True, True, False]


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
