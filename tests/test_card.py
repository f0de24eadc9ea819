"""The model card: what it accepts, what it says when it does not, and what its digest covers."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from infermill.errors import ModelError
from infermill.models.card import ModelCard, digest_of
from infermill.models.card_file import card_schema, parse_card, read_card, write_card
from tests.networks import preprocess_of

SCHEMA_FILE = Path(__file__).parents[1] / "docs" / "model-card.schema.json"
VALIDATOR = jsonschema.Draft202012Validator(card_schema())
EXAMPLE = """
name: resnet18
files: {onnx: resnet18.onnx}
task: classification
input: {name: data, layout: NCHW, dtype: float32}
preprocess:
  color: RGB
  resize: {shorter: 256, filter: bilinear}
  crop: {center: [224, 224]}
  scale: 0.00392156862745098
  mean: [0.485, 0.456, 0.406]
  std: [0.229, 0.224, 0.225]
output: {activation: softmax, top_k: 5}
labels: synset.txt
"""


def card(**fields: Any) -> ModelCard:
    return parse_card({"name": "tiny", "files": {"onnx": "tiny.onnx"}, **fields}, "model.yaml")


def test_the_example_of_the_documentation_is_a_card() -> None:
    example = parse_card(yaml.safe_load(EXAMPLE), "model.yaml")
    assert preprocess_of(example).height_width == (224, 224)
    assert example.output.top_k == 5
    assert example.labels == "synset.txt"


@pytest.mark.parametrize(
    ("fields", "message", "hint"),
    [
        ({"lables": "x"}, "unknown field `lables`", "did you mean `labels`?"),
        ({"mean": [0, 0, 0]}, "unknown field `mean`", "did you mean `preprocess.mean`?"),
        ({"topk": 1}, "unknown field `topk`", "did you mean `output.top_k`?"),
        ({"preprocess": {"main": 1}}, "unknown field `preprocess.main`", "did you mean `preprocess.mean`?"),
        ({"task": "clasification"}, "not 'clasification'", "did you mean `classification`?"),
        ({"preprocess": {"resize": {"shorter": 9, "filter": "bilinaer"}}}, "`preprocess.resize.filter`", "`bilinear`?"),
        ({"preprocess": {"activation": "none"}}, "`preprocess.activation`", "did you mean `output.activation`?"),
        ({"preprocess": {"crop": {"centre": [2, 2]}}}, "`preprocess.crop.centre`", "`preprocess.crop.center`?"),
        ({"nam": "x", "name": None}, "unknown field `nam`", "did you mean `name`?"),
        ({"zzz": 1}, "unknown field `zzz`", "known fields here: classes, evidence, files, input, labels, name"),
        ({"files": {"onnx": "a", "w": "b"}}, "unknown field `files.w`", "known fields here: archive, onnx, params"),
    ],
)
def test_an_unknown_field_or_word_names_the_nearest(fields: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(ModelError) as caught:
        card(**fields)
    assert message in caught.value.message
    assert caught.value.message.startswith("model.yaml: ")
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preprocess": {"resize": {"shorter": 3, "exact": [1, 2]}}}, "`preprocess.resize`: give one of `shorter`,"),
        ({"preprocess": {"resize": {}}}, "`preprocess.resize`: give one of `shorter`, `exact` and"),
        (
            {"preprocess": {"resize": {"letterbox": [4, 4]}, "crop": {"center": [2, 2]}}},
            "`preprocess`: `resize.letterb",
        ),
        ({"preprocess": {"resize": {"letterbox": [4, 4], "fill": 256}}}, "`preprocess.resize.fill`: Input should be"),
        ({"output": {"format": "yolo"}}, "`output.format`: Input should be 'mxnet-ssd', 'yolov5'"),
        ({"output": {"score_threshold": 1}}, "`output.score_threshold`: Input should be less than 1"),
        ({"output": {"max_detections": 1001}}, "`output.max_detections`: Input should be less than or equal to 1000"),
        ({"preprocess": {"resize": 256}}, "`preprocess.resize`: Input should have fields"),
        ({"preprocess": {"crop": {"center": [0, 5]}}}, "`preprocess.crop.center.0`: Input should be greater"),
        ({"preprocess": {"mean": [1, 2]}}, "`preprocess.mean.2`: Field required"),
        ({"preprocess": {"std": [1, 0, 1]}}, "`preprocess`: `std` must not be 0"),
        ({"preprocess": {"scale": "1/255"}}, "`preprocess.scale`: Input should be a valid number"),
        ({"preprocess": {"scale": float("nan")}}, "`preprocess.scale`: Input should be a finite number"),
        ({"task": "segmentation"}, "`task`: Input should be 'classification', 'embedding', 'raw' or 'detection'"),
        ({"output": {"top_k": 0}}, "`output.top_k`: Input should be greater than or equal to 1"),
        ({"input": {"layout": "CHW"}}, "`input.layout`: Input should be 'NCHW' or 'NHWC'"),
        ({"labels": 5}, "`labels`: Input should be a valid string"),
        ({"classes": 0}, "`classes`: Input should be greater than or equal to 1"),
        ({"name": 5}, "`name`: Input should be a valid string"),
        ({"files": {}}, "`files`: give `onnx`, or `symbol` and `params`, or `archive`"),
        ({"files": {"symbol": "a.json"}}, "`files`: give `onnx`, or `symbol` and `params`, or `archive`"),
        ({"files": {"onnx": "a", "symbol": "b", "params": "c"}}, "`files`: give `onnx`, or"),
    ],
)
def test_a_wrong_value_names_its_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        card(**fields)
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- list\n", "is not a model card"),
        (b"", "is not a model card"),
        (b"name: [", "is not YAML"),
        (b"[" * 20_000, "is not YAML"),
        (b"name: 2024-99-99", "is not YAML"),
        (b"name: " + b"1" * 5000, "is not YAML"),
        (b"name: !!timestamp noon", "is not YAML"),
        (b"name: !!bool perhaps", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"x" * (1 << 20) + b"x", "is larger than 1 MiB"),
    ],
)
def test_a_file_that_is_no_card_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.yaml"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        read_card(path)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["", "missing.yaml", "x" * 300])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=r"the model card .* cannot be read"):
        read_card(tmp_path / name)


# --- digest


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "tiny.onnx").write_bytes(b"graph")
    (tmp_path / "tiny.bin").write_bytes(b"weights")
    return {"onnx": tmp_path / "tiny.onnx", "tiny.bin": tmp_path / "tiny.bin"}


@pytest.mark.parametrize(
    "fields",
    [
        {"task": "raw"},
        {"task": "detection"},
        {"input": {"name": "data"}},
        {"input": {"layout": "NHWC"}},
        {"input": {"dtype": "float16"}},
        {"preprocess": {"color": "BGR"}},
        {"preprocess": {"resize": {"shorter": 256}}},
        {"preprocess": {"resize": {"exact": [256, 256]}}},
        {"preprocess": {"resize": {"shorter": 256, "filter": "bicubic"}}},
        {"preprocess": {"resize": {"letterbox": [256, 256]}}},
        {"preprocess": {"crop": {"center": [224, 224]}}},
        {"preprocess": {"scale": 0.5}},
        {"preprocess": {"mean": [0, 0, 1]}},
        {"preprocess": {"std": [1, 1, 2]}},
        {"preprocess": None},
        {"output": {"name": "logits"}},
        {"output": {"activation": "softmax"}},
        {"output": {"top_k": 4}},
        {"precision": "bf16"},
        {"precision": "fp16"},
    ],
)
def test_the_digest_covers_each_field_that_predictions_depend_on(
    fields: dict[str, Any], weights: dict[str, Path]
) -> None:
    assert digest_of(card(**fields), None, weights) != digest_of(card(), None, weights)


@pytest.mark.parametrize(
    ("fields", "hexdigest"),
    [
        ({}, "40ab3674a69adb48af305ca4975e35551736de69e987b3c344f7e15cbe1089dc"),
        ({"precision": "fp32"}, "40ab3674a69adb48af305ca4975e35551736de69e987b3c344f7e15cbe1089dc"),
        (
            {"task": "detection", "output": {"format": "yolov8"}},
            "9f08fa0f805baacf90368f1ce81c34c02f362fd78961142a5dee08dd50034a99",
        ),
        (
            {**yaml.safe_load(EXAMPLE), "labels": ["a", "b"]},
            "81fdb95f362a932f05e8ec0ec19360916330fb83616bd4b615fc08f83fef677c",
        ),
    ],
)
def test_the_digest_of_a_card_stays_what_it_was(
    fields: dict[str, Any], hexdigest: str, weights: dict[str, Path]
) -> None:
    labels = tuple(fields["labels"]) if "labels" in fields else None
    assert digest_of(card(**fields), labels, weights) == f"sha256:{hexdigest}"


@pytest.mark.parametrize(
    "output",
    [
        {"format": "yolov8"},
        {"names": {"boxes": "b"}},
        {"coordinates": "pixels"},
        {"corners": "yxyx"},
        {"background": 0},
        {"score_threshold": 0.5},
        {"iou_threshold": 0.5},
        {"max_detections": 5},
    ],
)
def test_the_digest_of_a_detection_covers_its_fields(output: dict[str, Any], weights: dict[str, Path]) -> None:
    letterbox = {"resize": {"letterbox": [64, 64]}}
    plain = digest_of(card(task="detection", preprocess=letterbox), None, weights)
    assert digest_of(card(task="detection", preprocess=letterbox, output=output), None, weights) != plain
    filled = {"resize": {"letterbox": [64, 64], "fill": 0}}
    assert digest_of(card(task="detection", preprocess=filled), None, weights) != plain
    assert digest_of(card(output=output), None, weights) == digest_of(card(), None, weights)


def test_the_digest_covers_labels_and_the_bytes_of_every_file(weights: dict[str, Path]) -> None:
    digests = {digest_of(card(), None, weights), digest_of(card(), ("a", "b"), weights)}
    digests |= {digest_of(card(), ("ab",), weights), digest_of(card(), ("b", "a"), weights)}
    digests |= {digest_of(card(), None, {"onnx": weights["onnx"]})}
    digests |= {digest_of(card(), None, {"onnx": weights["tiny.bin"], "tiny.bin": weights["onnx"]})}
    for path in weights.values():
        path.write_bytes(path.read_bytes() + b"!")
        digests.add(digest_of(card(), None, weights))
    assert len(digests) == 8
    assert all(digest.startswith("sha256:") and len(digest) == 71 for digest in digests)


def test_a_file_that_cannot_be_read_has_no_digest(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot read"):
        digest_of(card(), None, {"onnx": tmp_path})


def test_the_digest_does_not_depend_on_names_and_paths(weights: dict[str, Path], tmp_path: Path) -> None:
    moved = weights["onnx"].rename(tmp_path / "moved.onnx")
    before = digest_of(card(labels="a.txt"), ("a",), {**weights, "onnx": moved})
    renamed = card(name="other", files={"onnx": "moved.onnx"}, labels=["a"], classes=1)
    assert digest_of(renamed, ("a",), {"tiny.bin": weights["tiny.bin"], "onnx": moved}) == before


# --- JSON Schema


def test_the_published_schema_is_current() -> None:
    assert json.loads(SCHEMA_FILE.read_text(encoding="utf-8")) == card_schema(), "write card_schema() there"


def test_what_hints_point_to_and_the_schema_are_in_the_wheel() -> None:
    root = SCHEMA_FILE.parents[1]
    sources = [path.read_text(encoding="utf-8") for path in (root / "src/infermill").rglob("*.py")]
    named = {name for text in sources for name in re.findall(r"""(?<!>>> )guide\(["']([^"']+)["']\)""", text)}
    build = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    shipped = {f"docs/{name}": f"infermill/docs/{name}" for name in (*named, SCHEMA_FILE.name)}
    assert named == {"model-card.md", "detection.md"}
    assert build["wheel"]["force-include"] == shipped
    assert all((root / name).is_file() for name in shipped)


def test_the_schema_accepts_the_example_and_refuses_unknown_fields() -> None:
    VALIDATOR.check_schema(card_schema())
    example = yaml.safe_load(EXAMPLE)
    VALIDATOR.validate(example)
    for broken in (
        {**example, "lables": "x"},
        {**example, "preprocess": {**example["preprocess"], "main": 1}},
        {**example, "output": {"activation": "relu"}},
        {"name": "no files"},
    ):
        assert not VALIDATOR.is_valid(broken)


# --- YAML

pixels = st.integers(1, 65_535)
numbers = st.floats(-1e6, 1e6)
texts = st.text(max_size=30)
channels = st.tuples(numbers, numbers, numbers)
filters = st.sampled_from(["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"])
resizes = st.one_of(
    st.fixed_dictionaries({"shorter": pixels, "filter": filters}),
    st.fixed_dictionaries({"exact": st.tuples(pixels, pixels)}),
    st.fixed_dictionaries({"letterbox": st.tuples(pixels, pixels), "fill": st.integers(0, 255)}),
)


def _is_allowed(fields: Any) -> bool:
    """A letterbox leaves nothing to crop."""
    return not ("crop" in fields and "letterbox" in fields.get("resize", {}))


preprocesses = st.none() | st.fixed_dictionaries(
    {},
    optional={
        "color": st.sampled_from(["RGB", "BGR"]),
        "resize": resizes,
        "crop": st.fixed_dictionaries({"center": st.tuples(pixels, pixels)}),
        "scale": numbers,
        "mean": channels,
        "std": channels.filter(all),
    },
).filter(_is_allowed)
cards = st.fixed_dictionaries(
    {"name": texts, "files": st.fixed_dictionaries({"onnx": texts})},
    optional={
        "task": st.sampled_from(["classification", "embedding", "raw", "detection"]),
        "input": st.fixed_dictionaries({}, optional={"name": texts, "layout": st.sampled_from(["NCHW", "NHWC"])}),
        "preprocess": preprocesses,
        "output": st.fixed_dictionaries(
            {}, optional={"name": texts, "top_k": st.integers(1, 1000), "names": st.just({"boxes": "b"})}
        ),
        "labels": st.one_of(texts, st.lists(texts, max_size=5)),
        "classes": pixels,
    },
)


@settings(max_examples=60)
@example({"name": "line\x85break", "files": {"onnx": "\u2028é"}})
@given(cards)
def test_a_written_card_reads_back_the_same(data: dict[str, Any]) -> None:
    original = parse_card(data, "test")
    text = write_card(original)
    assert parse_card(yaml.safe_load(text), "test") == original
    VALIDATOR.validate(yaml.safe_load(text))


@pytest.mark.parametrize("text", ["preprocess: null", "preprocess: ~", "preprocess:"])
def test_a_card_without_preprocessing_says_so(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(f"name: t\nfiles: {{onnx: t.onnx}}\ninput: {{dtype: int64}}\n{text}\n")
    tabular = read_card(path)
    assert (tabular.preprocess, tabular.input.dtype) == (None, "int64")
    assert "\npreprocess: null\n" in write_card(tabular)
    assert card().preprocess is not None


def test_a_written_card_leaves_out_what_is_default() -> None:
    assert write_card(card(output={"top_k": 5}, labels=["a", "b"])) == (
        "name: tiny\nfiles: {onnx: tiny.onnx}\nlabels: [a, b]\n"
    )
