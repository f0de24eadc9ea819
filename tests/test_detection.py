"""Detection: from images, through every format of a network's boxes, to boxes in pixels of the original image."""

import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw

import infermill
from infermill.column import ColumnJob, load_batch_predict, predict_column
from infermill.detection import Detector, suppress
from infermill.errors import ModelError
from infermill.models.boxes import FORMATS, guess_boxes
from infermill.models.card import Input, Output, Preprocess, Resize, plain_fields
from infermill.models.card_file import parse_card
from infermill.models.fit import check_network
from infermill.models.geometry import in_image
from infermill.models.guess import guess_card
from infermill.models.onnx import NetworkInfo, TensorInfo, inspect_network
from infermill.models.opening import open_model
from infermill.parts import ERROR_TYPE
from infermill.predictions import DETECTIONS_TYPE
from infermill.shipping import ShippedModel
from infermill.types import CardOptions, DetectionFormat, Options, RuntimeName, StoreOptions
from tests.images import TO_STORED, encoded, exif_bytes, jpeg_bytes
from tests.networks import preprocess_of, tiny_detector
from tests.test_cli import infermill as infermill_command

Sides = tuple[float, float, float, float]
LETTERBOX = {"resize": {"letterbox": [64, 64]}}
STRETCHED = {"resize": {"exact": [64, 64]}}
CROPPED = {"resize": {"shorter": 80}, "crop": {"center": [64, 64]}}
AS_STORED = {"crop": {"center": [64, 64]}}
IN_THE_NETWORK = ("mxnet-ssd", "yolov10", "boxes-labels-scores")


def scene(size: tuple[int, int], red: Sides | None = None, green: Sides | None = None) -> Image.Image:
    """A dark picture with a bright red and a less bright green rectangle, by (xmin, ymin, xmax, ymax)."""
    image = Image.new("RGB", size, (10, 10, 90))
    for colour, sides in (((0, 210, 0), green), ((250, 0, 0), red)):
        if sides is not None:
            xmin, ymin, xmax, ymax = sides
            ImageDraw.Draw(image).rectangle((xmin, ymin, xmax - 1, ymax - 1), fill=colour)
    return image


def card_of(
    folder: Path,
    box_format: DetectionFormat,
    preprocess: dict[str, Any] | None = None,
    output: dict[str, Any] | None = None,
    **network: Any,
) -> infermill.ModelCard:
    path = tiny_detector(folder / "tiny.onnx", box_format, **network)
    return infermill.parse_card(
        {
            "name": "tiny",
            "files": {"onnx": str(path)},
            "task": "detection",
            "preprocess": (preprocess or LETTERBOX) | {"scale": 1 / 255},
            "output": {"format": box_format} | (output or {}),
            "labels": ["red", "green"],
        }
    )


def found(prediction: infermill.Prediction) -> list[tuple[str | None, Sides]]:
    assert prediction.detections is not None, prediction.error
    return [(one.label, tuple(asdict(one.box).values())) for one in prediction.detections]


def firsts(prediction: infermill.Prediction) -> dict[str | None, Sides]:
    """The best box of each label."""
    return dict(reversed(found(prediction)))


# --- formats


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("box_format", FORMATS)
def test_every_format_gives_the_same_boxes(tmp_path: Path, box_format: DetectionFormat, runtime: RuntimeName) -> None:
    predict = infermill.load_model(card_of(tmp_path, box_format), Options(runtime=runtime))
    red, green = (100, 40, 300, 120), (0, 200, 40, 240)
    pictures = [scene((320, 240), red, green), scene((320, 240)), scene((320, 240), red)]
    both, nothing, one = predict(pictures)
    # The network finds all twice, 5 pixels apart; suppressing that is for infermill, but where the network does it.
    twice = box_format in IN_THE_NETWORK
    expected = [("red", red), ("red", (105, 40, 305, 120)), ("green", green), ("green", (5, 200, 45, 240))]
    assert found(both) == (expected if twice else expected[::2])
    assert both.detections is not None
    scores = [round(detection.score * 255 / (250 if detection.index == 0 else 210), 5) for detection in both.detections]
    assert scores == ([1, 0.9, 1, 0.9] if twice else [1, 1])
    assert nothing == infermill.Prediction(detections=())
    assert found(one) == (expected[:2] if twice else expected[:1])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_outputs_apart_may_be_as_tensorflow_has_them(tmp_path: Path, dtype: Literal["float32", "float16"]) -> None:
    names = {"boxes": "detection_boxes", "count": "num_detections"}
    output = {"names": names, "coordinates": "normalized", "corners": "yxyx"}
    settings_of_network: dict[str, Any] = {"normalized_yxyx": True, "count": True, "dtype": dtype}
    card = card_of(tmp_path, "boxes-labels-scores", STRETCHED, output, **settings_of_network)
    card = replace(card, input=Input(dtype=dtype))
    red = (16, 40, 48, 80)
    (one,) = infermill.load_model(card)([scene((64, 128), red)])
    # Two of four are brighter than 0, and the first two of four are both red and green.
    assert found(one) == [("red", red)]


def test_thresholds_and_the_number_of_detections(tmp_path: Path) -> None:
    picture = scene((64, 64), (8, 8, 40, 40), (30, 30, 60, 60))

    def count(**output: Any) -> int:
        return len(found(infermill.load_model(card_of(tmp_path, "yolov8", output=output))([picture])[0]))

    assert count() == 2
    assert count(score_threshold=0.9) == 1
    assert count(score_threshold=0.99) == 0
    assert count(iou_threshold=0.99) == 4
    assert count(iou_threshold=0.99, max_detections=3) == 3
    assert count(max_detections=1) == 1


def test_labels_may_be_unknown_or_too_few(tmp_path: Path) -> None:
    card = card_of(tmp_path, "yolov10")
    picture = scene((64, 64), (8, 8, 40, 40), (30, 30, 60, 60))
    for labels, told in ((None, [None, None]), (("red",), ["red", None])):
        known = replace(card, labels=labels)
        assert list(firsts(infermill.load_model(known)([picture])[0])) == told[:1] if labels is None else told


# --- geometry


@pytest.mark.parametrize("preprocess", [LETTERBOX, STRETCHED, CROPPED])
@pytest.mark.parametrize("profile", ["exact", "fast"])
@pytest.mark.parametrize("size", [(640, 480), (480, 640), (200, 200), (30, 50), (51, 37), (800, 90)])
def test_boxes_are_in_pixels_of_the_original(
    tmp_path: Path, size: tuple[int, int], preprocess: dict[str, Any], profile: infermill.types.DecodeProfile
) -> None:
    width, height = size
    red = (round(width * 0.42), round(height * 0.35), round(width * 0.55), round(height * 0.6))
    (one,) = infermill.load_model(card_of(tmp_path, "yolov8", preprocess), Options(decode=profile))([scene(size, red)])
    box = firsts(one)["red"]
    # A pixel of the network, in pixels of the image.
    step = max(size) / 64 if preprocess is LETTERBOX else min(size) / 80
    steps = [width / 64, height / 64] * 2 if preprocess is STRETCHED else [step] * 4
    reach = 0.4 * min(size) if preprocess is CROPPED else max(size)
    limits = [(length / 2 - reach, length / 2 + reach) for length in size] * 2
    for side, expected, pixel, limit in zip(box, red, steps, limits, strict=True):
        assert abs(side - np.clip(expected, *limit)) <= max(pixel, 1), (box, red)


@pytest.mark.parametrize("orientation", TO_STORED)
def test_boxes_are_in_the_upright_image(tmp_path: Path, orientation: int) -> None:
    predict = infermill.load_model(card_of(tmp_path, "yolov5"))
    upright = scene((64, 48), (40, 4, 60, 12))
    stored, exif = upright.transpose(TO_STORED[orientation]), exif_bytes(orientation)
    files = [encoded(stored, "PNG", exif=exif), jpeg_bytes(stored, exif=exif)]
    turned = Image.open(io.BytesIO(files[0]))
    for prediction in predict([*files, turned, np.asarray(upright)]):
        np.testing.assert_allclose(firsts(prediction)["red"], (40, 4, 60, 12), atol=1)


def test_an_image_smaller_than_the_crop_has_a_border_that_is_no_part_of_it(tmp_path: Path) -> None:
    predict = infermill.load_model(card_of(tmp_path, "yolov10", AS_STORED))
    (one,) = predict([scene((30, 21), (3, 5, 30, 21))])
    # The one that is a pixel farther to the right is cut off.
    assert found(one) == [("red", (3, 5, 30, 21)), ("red", (4, 5, 30, 21))]


def test_what_lies_in_the_border_is_nothing(tmp_path: Path) -> None:
    """A letterbox that is filled with white is a thing to this network."""
    card = card_of(tmp_path, "yolov10", {"resize": {"letterbox": [64, 64], "fill": 255}})
    (wide,) = infermill.load_model(card)([scene((64, 32), (60, 0, 64, 32))])
    assert {sides for _, sides in found(wide)} == {(0, 0, 64, 32), (1, 0, 64, 32)}


axis = st.integers(1, 3000)
preprocesses = st.one_of(
    st.builds(lambda size: {"resize": {"letterbox": size}}, st.tuples(axis, axis)),
    st.builds(lambda size: {"resize": {"exact": size}}, st.tuples(axis, axis)),
    st.builds(
        lambda shorter, size: {"resize": {"shorter": shorter}, "crop": {"center": size}}, axis, st.tuples(axis, axis)
    ),
)


@given(axis, axis, preprocesses)
@example(1, 1, {"crop": {"center": (64, 64)}})
def test_the_whole_input_covers_what_is_left_of_the_image(width: int, height: int, fields: dict[str, Any]) -> None:
    preprocess = preprocess_of(parse_card({"name": "t", "files": {"onnx": "t.onnx"}, "preprocess": fields}))
    made = preprocess.height_width
    assert made is not None
    (box,) = in_image(np.array([[0, 0, made[1], made[0]]], np.float32), width, height, preprocess)
    assert (box >= 0).all()
    assert box[0] < box[2] <= width
    assert box[1] < box[3] <= height
    if preprocess.crop is None:
        np.testing.assert_allclose(box, [0, 0, width, height], rtol=1e-6)


def test_a_letterbox_is_that_of_ultralytics() -> None:
    """Numbers of its LetterBox and scale_boxes for an image of 1280 x 720, and a bus.jpg of 810 x 1080."""
    letterbox = Preprocess(resize=Resize(letterbox=(640, 640)))
    boxes = np.array([[0, 140, 640, 500], [320, 320, 330, 330]], np.float32)
    assert in_image(boxes, 1280, 720, letterbox).tolist() == [[0, 0, 1280, 720], [640, 360, 660, 380]]
    assert in_image(boxes[1:], 810, 1080, letterbox).tolist() == [[405, 540, 421.875, 556.875]]


# --- suppression


def _nms_by_onnx(boxes: NDArray[np.float32], scores: NDArray[np.float32], threshold: float) -> list[int]:
    limits = [
        numpy_helper.from_array(np.array([len(boxes)], np.int64), "count"),
        numpy_helper.from_array(np.array([threshold], np.float32), "iou"),
    ]
    node = helper.make_node("NonMaxSuppression", ["boxes", "scores", "count", "iou"], ["chosen"])
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("boxes", "scores")]
    outputs = [helper.make_tensor_value_info("chosen", TensorProto.INT64, None)]
    graph = helper.make_graph([node], "nms", inputs, outputs, limits)
    model = helper.make_model(graph, opset_imports=[helper.make_operatorsetid("", 17)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (chosen,) = session.run(None, {"boxes": boxes[None], "scores": scores[None]})
    return [int(index) for _, _, index in chosen]


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(1, 3), st.sampled_from([0.1, 0.45, 0.5, 0.9, 1.0]))
def test_suppression_is_that_of_the_onnx_operator(seed: int, count: int, classes: int, threshold: float) -> None:
    random = np.random.default_rng(seed)
    # On a coarse grid, so that overlaps of exactly a threshold, equal boxes and boxes without an area come up.
    corners = random.integers(0, 10, (count, 2, 2)).astype(np.float32)
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    kinds = random.integers(0, classes, count).astype(np.int32)
    scores = np.sort(random.permutation(count).astype(np.float32) + 1)[::-1].copy()
    by_class = np.where(kinds == np.arange(classes)[:, None], scores, 0).astype(np.float32)
    expected = set()
    for one in range(classes):
        members = np.flatnonzero(kinds == one)
        if len(members):
            expected |= {int(members[i]) for i in _nms_by_onnx(boxes[members], by_class[[one]][:, members], threshold)}
    assert suppress(boxes, kinds, threshold, count) == sorted(expected)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(2, 4), st.sampled_from([0.1, 0.45, 0.9]))
def test_boxes_and_scores_of_ssd_are_suppressed_as_by_the_onnx_operator(
    seed: int, count: int, classes: int, threshold: float
) -> None:
    random = np.random.default_rng(seed)
    corners = random.integers(0, 9, (count, 2, 2)) / 8  # exact, and so overlaps of exactly a threshold are, too
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).astype(np.float32)
    scores = random.permutation(count * classes).reshape(count, classes).astype(np.float32) / (count * classes)
    output = Output(
        format="boxes-scores", coordinates="normalized", corners="yxyx", background=1,
        score_threshold=0.3, iou_threshold=threshold,
    )  # fmt: skip
    detector = Detector(output, ("scores", "boxes"), (50, 200))
    candidates = detector.candidates([scores, boxes[:, [1, 0, 3, 2]]])
    assert candidates is not None
    found = candidates.only(detector.best(candidates))
    things = np.where(np.arange(classes) == 1, 0, scores)
    kinds, best = things.argmax(axis=1), things.max(axis=1)
    expected = []
    for kind in {*range(classes)} - {1}:
        members = np.flatnonzero((kinds == kind) & (best > 0.3))
        kept = _nms_by_onnx(boxes[members], best[None, members], threshold) if len(members) else []
        expected += [(best[i], kind, *(boxes[i] * np.array([200, 50, 200, 50], np.float32))) for i in members[kept]]
    told = [(score, kind, *box) for box, score, kind in zip(*found, strict=True)]
    assert told == sorted(expected, key=lambda one: -one[0])


def test_equal_scores_keep_the_order_of_the_network(tmp_path: Path) -> None:
    picture = scene((64, 64), (8, 8, 16, 16), None)
    ImageDraw.Draw(picture).rectangle((40, 40, 49, 49), fill=(0, 250, 0))
    (one,) = infermill.load_model(card_of(tmp_path, "yolov8"))([picture])
    assert [label for label, _ in found(one)] == ["red", "green"]


# --- jobs


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A card, and a folder with things, nothing, a black picture, on which the network answers NaN, and a wreck."""
    card = card_of(tmp_path, "yolov8", nan_on_black=True)
    fields = plain_fields(card) | {"files": {"onnx": "tiny.onnx"}}
    (tmp_path / "model.yaml").write_text(json.dumps(fields))
    folder = tmp_path / "photos"
    folder.mkdir()
    scene((320, 240), (100, 40, 300, 120), (0, 200, 40, 240)).save(folder / "a-both.png")
    scene((50, 30)).save(folder / "b-nothing.png")
    Image.new("RGB", (64, 64)).save(folder / "c-black.png")
    (folder / "d-wreck.png").write_bytes((folder / "a-both.png").read_bytes()[:99])
    scene((240, 320), (40, 100, 120, 300)).save(folder / "e-red.png")
    return tmp_path


EXPECTED = [
    [("red", 0, (100, 40, 300, 120)), ("green", 1, (0, 200, 40, 240))],
    [],
    None,
    None,
    [("red", 0, (40, 100, 120, 300))],
]


def _told(rows: list[dict[str, Any]]) -> list[Any]:
    return [
        row["detections"] and [(one["label"], one["index"], tuple(one["box"].values())) for one in row["detections"]]
        for row in rows
    ]


def test_a_job_has_a_column_of_detections(work: Path) -> None:
    summary = infermill.run(work / "photos", work / "model.yaml", work / "out", Options(partition_objects=2))
    assert (summary.planned, summary.ok, summary.failures_by_code) == (5, 3, {"nonfinite": 1, "truncated": 1})
    table = infermill.read(work / "out")
    assert table.schema.field("detections").type == DETECTIONS_TYPE
    assert _told(table.to_pylist()) == EXPECTED
    assert infermill.verify(work / "out").problems == ()


def test_a_partition_without_any_prediction_has_the_same_type(work: Path) -> None:
    infermill.run(work / "photos", work / "model.yaml", work / "out", Options(partition_objects=1))
    assert _told(infermill.read(work / "out").to_pylist()) == EXPECTED
    assert infermill.verify(work / "out").problems == ()


def test_the_command_line_detects(work: Path) -> None:
    flags = ["--task", "detection", "--format", "yolov8", "--letterbox", "64", "64", "--max-detections", "1"]
    done = infermill_command("run", "photos", "-m", "tiny.onnx", *flags, "-o", "out", "--json", cwd=work)
    assert (done.returncode, json.loads(done.stdout)["ok"]) == (0, 3), done.stderr
    boxes = [row and [(index, box) for _, index, box in row] for row in _told(infermill.read(work / "out").to_pylist())]
    assert boxes == [[(0, (100, 40, 300, 120))], [], None, None, [(0, (40, 100, 120, 300))]]


# --- Spark's Python workers


def _column_job(work: Path) -> tuple[ColumnJob, list[bytes]]:
    model = open_model(work / "model.yaml", StoreOptions(), CardOptions(max_detections=3))
    kind = pa.struct([("detections", DETECTIONS_TYPE), ("error", ERROR_TYPE)])
    files = [path.read_bytes() for path in sorted((work / "photos").iterdir())]
    return ColumnJob(ShippedModel(model.digest, model), Options(threads=1), kind), files


def test_a_column_of_spark(work: Path) -> None:
    job, files = _column_job(work)
    rows = [row for batch in predict_column(job, iter([pa.array(files)])) for row in batch.to_pylist()]
    assert _told(rows) == EXPECTED
    assert [row["error"] and row["error"]["code"] for row in rows] == [None, None, "nonfinite", "truncated", None]


def test_arrays_for_predict_batch_udf(work: Path) -> None:
    job, files = _column_job(work)
    predict = load_batch_predict(job)
    told = predict(np.array(files, object))
    assert told["count"].tolist() == [2, 0, -1, -1, 1]
    assert told["index"].tolist() == [[0, 1, -1], [-1] * 3, [-1] * 3, [-1] * 3, [0, -1, -1]]
    assert told["score"].shape == (5, 3)
    assert told["box"].shape == (5, 12)
    assert told["box"][4, :4].tolist() == [40, 100, 120, 300]
    pixels = predict(np.stack([np.asarray(scene((64, 64), (8, 8, 40, 40)))] * 2))
    assert pixels["box"][1, :4].tolist() == [8, 8, 40, 40]


# --- cards that do not fit, and guessed ones


def network(*outputs: tuple[str, tuple[Any, ...] | None] | tuple[str, tuple[Any, ...] | None, str], **more: Any) -> Any:
    tensors = tuple(TensorInfo(one[0], (*one, "float32")[2], one[1], "Concat") for one in outputs)
    image = TensorInfo("images", more.get("dtype", "float32"), more.get("image", ("N", 3, 640, 640)), "Conv")
    return NetworkInfo((image,), tensors, 17, more.get("producer", "tests"), 8, 5, 1000)


PARTS = (("boxes", ("N", 100, 4)), ("labels", ("N", 100), "int64"), ("scores", ("N", 100)))

SCORED = (("boxes", ("N", 8732, 4)), ("scores", ("N", 8732, 21)))


@pytest.mark.parametrize(
    ("info", "output", "message", "hint"),
    [
        (network(("y", ("N", 84, 8400))), {}, "needs `output.format`", "set it to yolov8"),
        (network(("y", ("N", 7, 6))), {}, "needs `output.format`", "docs/detection.md"),
        (network(("y", ("N", 84, 8400))), {"format": "yolov5"}, "not of the format yolov5", "`output.format: yolov8`"),
        (network(("y", ("N", 25200, 85))), {"format": "yolov8"}, "not of the format yolov8", "format: yolov5"),
        (network(("y", ("N", 25200, 5))), {"format": "yolov5"}, "[N, boxes, 5 + classes]", "another format"),
        (network(("y", ("N", 100, 7))), {"format": "mxnet-ssd"}, "that is [N, boxes, 6]", "`output.name`"),
        (network(("y", ("N", 100, 6), "int64")), {"format": "yolov10"}, "not of the format yolov10", "`output.name`"),
        (network(("y", ("N", 6))), {"format": "yolov10"}, "not of the format yolov10", "`output.name`"),
        (
            network(("y", ("N", 84, 8400))),
            {"format": "yolov8", "activation": "sigmoid"},
            "`output.activation: sigmoid` is nothing for detection",
            "remove",
        ),
        (network(*PARTS[:2]), {"format": "boxes-labels-scores"}, "no output `scores`", "output.names.scores` to one"),
        (
            network(("boxes", (100, 4)), *PARTS[1:]),
            {"format": "boxes-labels-scores"},
            "`boxes` (float32 [100, 4]) holds no boxes",
            "each image",
        ),
        (
            network(PARTS[0], PARTS[2]),
            {"format": "boxes-scores"},
            "`scores` (float32 [N, 100]) holds no scores of classes: that is [N, boxes, classes]",
            "output.names.scores",
        ),
        (
            network(*SCORED),
            {"format": "boxes-scores", "background": 21},
            "`output.background` is 21, and the output `scores` (float32 [N, 8732, 21]) has 21 classes",
            "remove it",
        ),
        (
            network(*PARTS[:3]),
            {"format": "boxes-labels-scores", "background": 0},
            "`output.background` is nothing for the format boxes-labels-scores",
            "remove",
        ),
        (network(SCORED[0]), {"format": "boxes-scores"}, "no output `scores`", "output.names.scores` to one"),
        (
            network(*PARTS[:2], ("scores", ("N", 100), "int64")),
            {"format": "boxes-labels-scores"},
            "`scores` (int64 [N, 100]) holds no scores",
            "output.names.scores",
        ),
    ],
)
def test_a_card_that_does_not_fit_is_told_where(
    info: NetworkInfo, output: dict[str, Any], message: str, hint: str
) -> None:
    preprocess = {"resize": {"letterbox": [640, 640]}}
    card = parse_card(
        {"name": "d", "files": {"onnx": "d.onnx"}, "task": "detection", "preprocess": preprocess, "output": output},
        "test",
    )
    with pytest.raises(ModelError) as caught:
        check_network(card, None, info)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_labels_must_be_those_of_the_network_and_images_must_be_there() -> None:
    fields = {"name": "d", "files": {"onnx": "d.onnx"}, "task": "detection", "output": {"format": "yolov8"}}
    letterboxed = fields | {"preprocess": {"resize": {"letterbox": [640, 640]}}}
    card = parse_card(letterboxed, "test")
    with pytest.raises(ModelError, match=r"`labels` has 2, and the output `y` .* has 80 classes"):
        check_network(card, ("a", "b"), network(("y", ("N", 84, 8400))))
    scored = parse_card(letterboxed | {"output": {"format": "boxes-scores"}}, "test")
    with pytest.raises(ModelError, match=r"`labels` has 2, and the output `scores` .* has 21 classes"):
        check_network(scored, ("a", "b"), network(*SCORED))
    with pytest.raises(ModelError, match="has `preprocess: null`, and detection finds boxes in images"):
        check_network(parse_card(fields | {"preprocess": None}, "test"), None, network(("y", ("N", 84, 8400))))


@pytest.mark.parametrize(
    ("box_format", "shapes", "message"),
    [
        ("yolov10", [(1, 6, 4)], r"answers \[1, 6, 4\] in `boxes`, and the format yolov10 is \[N, boxes, 6\]"),
        ("yolov5", [(1, 6, 5)], r"the format yolov5 is \[N, boxes, 5 \+ classes\]"),
        ("boxes-labels-scores", [(1, 6, 5), (1, 6), (1, 6)], r"answers boxes \[1, 6, 5\], labels \[1, 6\], scores"),
        ("boxes-labels-scores", [(1, 6, 4), (1, 6), (1, 6, 80)], r"\[1, 6, 80\], where .* and \[N, boxes\] are wanted"),
        ("boxes-scores", [(1, 6, 4), (1, 6)], r"answers boxes \[1, 6, 4\], scores \[1, 6\], where \[N, boxes, 4\] and"),
        ("boxes-scores", [(1, 6, 4), (1, 7, 2)], r"scores \[1, 7, 2\]"),
        ("boxes-scores", [(1, 6, 5), (1, 6, 2)], r"boxes \[1, 6, 5\]"),
        ("boxes-scores", [(1, 6, 4), (1, 6, 0)], r"scores \[1, 6, 0\]"),
    ],
)
def test_a_shape_that_shows_when_the_network_runs_is_checked_then(
    box_format: DetectionFormat, shapes: list[tuple[int, ...]], message: str
) -> None:
    names = ("boxes", "scores") if box_format == "boxes-scores" else ("boxes", "labels", "scores")[: len(shapes)]
    detector = Detector(Output(format=box_format), names, (64, 64))
    with pytest.raises(ModelError, match=message):
        detector.check([np.zeros(shape, np.float32) for shape in shapes])


@pytest.mark.parametrize("box_format", FORMATS)
def test_numbers_of_any_size_are_no_error(box_format: DetectionFormat) -> None:
    """Whatever a network that is damaged answers, but for NaN and infinity, is boxes within the image."""
    random = np.random.default_rng(1)
    huge = (random.normal(size=(1, 40, 6)) * 10.0 ** random.integers(-38, 38, (1, 40, 6))).astype(np.float32)
    apart = {
        "boxes-labels-scores": [huge[..., :4], huge[..., 4], huge[..., 5]],
        "boxes-scores": [huge[..., :4], huge[..., 4:]],
    }
    arrays = apart.get(box_format, [huge])
    arrays = [huge.swapaxes(1, 2)] if box_format == "yolov8" else arrays
    names = ("boxes", "scores") if box_format == "boxes-scores" else ("boxes", "labels", "scores")[: len(arrays)]
    detector = Detector(Output(format=box_format, score_threshold=0), names, (64, 64))
    candidates = detector.candidates([array[0] for array in arrays])
    assert candidates is not None
    assert len(detector.best(candidates)) <= len(candidates.scores)
    placed = in_image(candidates.boxes, 30, 20, Preprocess(resize=Resize(letterbox=(64, 64))))
    assert ((placed >= 0) & (placed <= [30, 20, 30, 20])).all()


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        (network(("output0", (1, 84, 8400))), {"format": "yolov8"}),
        (network(("output0", ("N", 84, "anchors"))), {"format": "yolov8"}),
        (network(("output0", (1, 25200, 85))), {"format": "yolov5"}),
        (network(("output0", (1, 25200, 6))), {"format": "yolov5"}),
        (network(("output0", (1, 300, 6)), producer="pytorch 2.5"), {"format": "yolov10"}),
        (network(("det_output", ("N", 8732, 6))), {"format": "mxnet-ssd"}),
        (
            network(*PARTS),
            {"format": "boxes-labels-scores", "names": {"boxes": "boxes", "labels": "labels", "scores": "scores"}},
        ),
        (
            network(
                ("detection_anchor_indices:0", ("N", 100)),
                ("detection_boxes:0", ("N", 100, 4)),
                ("detection_classes:0", ("N", 100)),
                ("detection_multiclass_scores:0", ("N", 100, 91)),
                ("detection_scores:0", ("N", 100)),
                ("num_detections:0", ("N",)),
                ("raw_detection_boxes:0", ("N", 1917, 4)),
            ),
            {
                "format": "boxes-labels-scores",
                "names": {
                    "boxes": "detection_boxes:0",
                    "labels": "detection_classes:0",
                    "scores": "detection_scores:0",
                    "count": "num_detections:0",
                },
                "coordinates": "normalized",
                "corners": "yxyx",
            },
        ),
        (
            network(*reversed(SCORED)),
            {
                "format": "boxes-scores",
                "names": {"boxes": "boxes", "scores": "scores"},
                "coordinates": "normalized",
                "background": 0,
            },
        ),
        (network(SCORED[0], ("scores", ("N", 100, 21))), None),
        (network(SCORED[0], ("scores", ("N", 8732))), None),
        (network(("logits", ("N", 100, 92)), ("pred_boxes", ("N", 100, 4))), None),
        (network(("hidden", ("N", 197, 768))), None),
        (network(("hidden", ("N", 768, 400))), None),
        (network(("boxes", ("N", 5, 4)), ("kind", ("N",), "int64")), None),
        (network(("logits", ("N", 10))), None),
    ],
)
def test_a_format_is_told_by_its_outputs(info: NetworkInfo, expected: dict[str, Any] | None) -> None:
    assert guess_boxes(info, (640, 640)) == expected


@pytest.mark.parametrize(
    ("box_format", "producer", "resize", "values"),
    [
        ("mxnet-ssd", "tests", Resize(exact=(64, 64)), (1, (123, 117, 104))),
        ("yolov10", "pytorch", Resize(letterbox=(64, 64)), (1 / 255, (0, 0, 0))),
        ("boxes-labels-scores", "tests", Resize(exact=(64, 64)), (1 / 255, (0, 0, 0))),
        ("boxes-scores", "tests", Resize(exact=(64, 64)), (1 / 255, (0, 0, 0))),
    ],
)
def test_a_bare_network_gets_a_card(
    tmp_path: Path, box_format: DetectionFormat, producer: str, resize: Resize, values: tuple[float, tuple[float, ...]]
) -> None:
    path = tiny_detector(tmp_path / "tiny.onnx", box_format, producer=producer)
    info = inspect_network(path)
    card, notes = guess_card(path, info, CardOptions())
    check_network(card, None, info)
    assert (card.task, card.output.format) == ("detection", box_format)
    assert card.preprocess is not None
    assert card.preprocess.resize == resize
    assert (card.preprocess.scale, card.preprocess.mean) == values
    told = "\n".join(notes)
    for words in (
        "task is detection",
        f"output is format: {box_format}",
        f"preprocess.resize.{next(iter(resize.given))}",
        "labels are",
    ):
        assert words in told


def test_a_format_that_nothing_tells_must_be_said(tmp_path: Path) -> None:
    path = tiny_detector(tmp_path / "tiny.onnx", "yolov8")
    assert open_model(path, StoreOptions()).card.task == "raw"
    with pytest.raises(ModelError, match=r"writes boxes in no format that its outputs tell: `output0`") as caught:
        open_model(path, StoreOptions(), CardOptions(task="detection"))
    assert "--format: mxnet-ssd, yolov5" in caught.value.hint
    card = open_model(path, StoreOptions(), CardOptions(format="yolov8")).card
    assert (card.task, card.output.format) == ("detection", "yolov8")
