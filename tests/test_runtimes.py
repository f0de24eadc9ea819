"""The runtimes for ONNX answer as plain NumPy preprocessing and the original network in ONNX Runtime do."""

import itertools
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import openvino as ov
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper
from PIL import Image

from infermill.errors import InfermillError, ModelError, UsageError
from infermill.models.card import TENSOR_DTYPES, Preprocess
from infermill.models.card_file import parse_card
from infermill.models.executable import executable, folded
from infermill.models.model import Model
from infermill.models.onnx import inspect_network
from infermill.runtimes import MODULES, Predictor, check_runtime, load
from infermill.runtimes.openvino import precisions
from infermill.types import RuntimeName
from tests.networks import (
    Network,
    pictures,
    preprocess_of,
    tiny_classifier,
    tiny_embedding,
    tiny_quantised,
    tiny_raw,
    tiny_tabular,
)

# MXNet executes none but its own networks: see test_runtime_mxnet.
RUNTIMES: tuple[RuntimeName, ...] = ("openvino", "onnxruntime")
RESNET18 = Path(__file__).parents[1] / "benchmarks" / "resnet18.py"
TOLERANCE = 1e-4
ZERO_TO_ONE = {"scale": 1 / 255}
IMAGENET = {"scale": 1 / 255, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
runtimes = pytest.mark.parametrize("runtime", RUNTIMES)


def model_of(path: Path, *, size: int = 32, labels: tuple[str, ...] | None = None, **fields: Any) -> Model:
    fields["preprocess"] = {"resize": {"exact": [size, size]}, **fields.pop("preprocess", ZERO_TO_ONE)}
    card = parse_card({"name": path.stem, "files": {"onnx": path.name}, **fields}, "test")
    return Model(card, path, labels, "sha256:0")


def original(model: Model, batch: NDArray[np.uint8]) -> list[NDArray[Any]]:
    """The outputs of the network as it was made, image by image, after preprocessing in plain NumPy."""
    session = ort.InferenceSession(str(model.network), providers=["CPUExecutionProvider"])
    image, preprocess = session.get_inputs()[0], preprocess_of(model.card)
    channels_first = model.card.input.layout == "NCHW"
    values = batch[..., ::-1] if preprocess.color == "BGR" else batch
    mean, std = np.array(preprocess.mean), np.array(preprocess.std)
    if image.shape[1 if channels_first else 3] == 1:
        values = np.stack([np.asarray(Image.fromarray(one).convert("L"))[..., None] for one in batch])
        mean, std = mean[:1], std[:1]
    if model.card.input.dtype != "uint8":
        values = ((values * preprocess.scale - mean) / std).astype(model.card.input.dtype)
    if channels_first:
        values = values.transpose(0, 3, 1, 2)
    length = image.shape[0] if isinstance(image.shape[0], int) else 1
    answers = [session.run(None, {image.name: np.stack([one] * length)}) for one in values]
    return [np.stack([array[0] for array in arrays]) for arrays in zip(*answers, strict=True)]


def answer(predictor: Predictor, batch: NDArray[Any]) -> NDArray[Any]:
    """What a network with one output answers."""
    (array,) = predictor(batch)
    return array


def probabilities(logits: NDArray[Any]) -> NDArray[np.float64]:
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def assert_as_original(model: Model, runtime: RuntimeName, tolerance: float = TOLERANCE, count: int = 5) -> None:
    height, _ = preprocess_of(model.card).height_width or (32, 32)
    batch = pictures(count, height)
    (expected,) = original(model, batch)
    found = answer(load(model, runtime, threads=2), batch)
    assert found.shape == expected.shape
    if model.card.output.activation == "softmax":
        found, expected = probabilities(found), probabilities(expected)
    assert np.abs(found - expected).max() <= tolerance
    assert np.abs(expected[0] - expected[1]).max() > 100 * tolerance, "different pictures, different answers"


# --- the same answers


@runtimes
@pytest.mark.parametrize(
    ("network", "card"),
    [
        ({}, {}),
        ({}, {"preprocess": IMAGENET}),
        ({}, {"preprocess": {**IMAGENET, "color": "BGR"}}),
        ({"layout": "NHWC"}, {"input": {"layout": "NHWC"}}),
        ({"layout": "NHWC"}, {"input": {"layout": "NHWC"}, "preprocess": {**IMAGENET, "color": "BGR"}}),
        ({"dtype": "uint8"}, {"input": {"dtype": "uint8"}, "preprocess": {}}),
        ({"dtype": "uint8"}, {"input": {"dtype": "uint8"}, "preprocess": {"color": "BGR"}}),
        ({"dtype": "uint8", "layout": "NHWC"}, {"input": {"dtype": "uint8", "layout": "NHWC"}, "preprocess": {}}),
        ({"channels": 1}, {"preprocess": {"scale": 1 / 255, "mean": [0.1307] * 3, "std": [0.3081] * 3}}),
        ({"channels": 1, "layout": "NHWC"}, {"input": {"layout": "NHWC"}}),
        ({"channels": 1, "dtype": "uint8"}, {"input": {"dtype": "uint8"}, "preprocess": {}}),
        ({"size": None}, {"size": 48}),
        ({"batch": 3}, {}),
        ({"batch": 1, "dtype": "uint8"}, {"input": {"dtype": "uint8"}, "preprocess": {}}),
        ({"opset": 7, "ir_version": 3}, {"preprocess": IMAGENET}),
        ({"external_data": True}, {}),
        ({"softmax": True, "output_shape": ["N", 10, 1, 1]}, {"output": {"activation": "none"}}),
    ],
)
def test_answers_are_those_of_the_original(
    tmp_path: Path, runtime: RuntimeName, network: dict[str, Any], card: dict[str, Any]
) -> None:
    path = tiny_classifier(tmp_path / "tiny.onnx", **network)
    assert_as_original(model_of(path, **{"output": {"activation": "softmax"}} | card), runtime)


@runtimes
@pytest.mark.parametrize("preprocess", [ZERO_TO_ONE, {**IMAGENET, "color": "BGR"}])
def test_float16_answers_are_close_to_those_of_the_original(
    tmp_path: Path, runtime: RuntimeName, preprocess: dict[str, Any]
) -> None:
    path = tiny_classifier(tmp_path / "half.onnx", dtype="float16")
    model = model_of(path, input={"dtype": "float16"}, output={"activation": "softmax"}, preprocess=preprocess)
    assert_as_original(model, runtime, tolerance=1e-3)


@runtimes
def test_embeddings_are_those_of_the_original(tmp_path: Path, runtime: RuntimeName) -> None:
    assert_as_original(model_of(tiny_embedding(tmp_path / "tiny.onnx"), task="embedding"), runtime)


@runtimes
def test_resnet18_is_as_the_original(tmp_path_factory: pytest.TempPathFactory, runtime: RuntimeName) -> None:
    path = tmp_path_factory.getbasetemp() / "resnet18.onnx"
    if not path.exists():
        subprocess.run([sys.executable, RESNET18, path], check=True)
    model = model_of(path, size=224, preprocess=IMAGENET, output={"activation": "softmax"})
    assert_as_original(model, runtime, count=2)


@runtimes
def test_every_output_of_a_raw_network_is_given(tmp_path: Path, runtime: RuntimeName) -> None:
    model = model_of(tiny_raw(tmp_path / "raw.onnx"), task="raw")
    predictor = load(model, runtime, threads=1)
    assert predictor.output_names == ("boxes", "kind")
    batch = pictures(19)
    for found, expected in zip(predictor(batch), original(model, batch), strict=True):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=TOLERANCE)
    named = load(model_of(model.network, task="raw", output={"name": "kind"}), runtime, threads=1)
    assert named.output_names == ("kind",)
    np.testing.assert_array_equal(named(batch)[0], predictor(batch)[1])


@runtimes
def test_the_named_output_is_given(tmp_path: Path, runtime: RuntimeName) -> None:
    path = tiny_classifier(tmp_path / "two.onnx")
    network = onnx.load_model(path)
    network.graph.output.append(helper.make_tensor_value_info("flatten3", TensorProto.FLOAT, ["N", 128]))
    onnx.save_model(network, path)
    predictor = load(model_of(path, task="embedding", output={"name": "flatten3"}), runtime, threads=1)
    assert predictor.output_names == ("flatten3",)
    assert [array.shape for array in predictor(pictures(2))] == [(2, 128)]


@runtimes
def test_black_images_of_a_network_that_cannot_take_them_are_nan(tmp_path: Path, runtime: RuntimeName) -> None:
    predictor = load(model_of(tiny_classifier(tmp_path / "nan.onnx", nan_on_black=True)), runtime, threads=1)
    batch = pictures(3)
    batch[1] = 0
    finite = np.isfinite(answer(predictor, batch)).all(axis=1)
    assert finite.tolist() == [True, False, True]


# --- tensors as they are


def tensor_model(path: Path, **fields: Any) -> Model:
    dtype = inspect_network(path).inputs[0].dtype
    card = {"name": path.stem, "files": {"onnx": path.name}, "input": {"dtype": dtype}, "preprocess": None, **fields}
    return Model(parse_card(card, "test"), path, None, "sha256:0")


def rows_of(shape: tuple[int, ...], dtype: str, count: int) -> NDArray[Any]:
    """Seeded numbers that the type has exactly."""
    lowest, highest = (0, 2) if dtype == "bool" else (0, 100) if dtype == "uint8" else (-100, 100)
    return np.random.default_rng(0).integers(lowest, highest, (count, *shape)).astype(dtype)


def linear(path: Path, rows: NDArray[Any]) -> NDArray[np.float64]:
    """What `tiny_tabular` computes, by NumPy."""
    weight, bias = (onnx.numpy_helper.to_array(one) for one in onnx.load_model(path).graph.initializer[-2:])
    return np.asarray(rows.reshape(len(rows), -1).astype(np.float64) @ weight.astype(np.float64) + bias)


@runtimes
@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("dtype", TENSOR_DTYPES)
def test_tensors_of_every_type_are_answered(
    tmp_path: Path, runtime: RuntimeName, dtype: str, batch: int | None
) -> None:
    path = tiny_tabular(tmp_path / "tabular.onnx", (6,), dtype=dtype, batch=batch)
    predictor = load(tensor_model(path), runtime, threads=1)
    assert (predictor.input_shape, predictor.input_dtype, predictor.is_fixed) == ((6,), dtype, batch is not None)
    rows = rows_of((6,), dtype, 7)
    found = answer(predictor, rows)
    np.testing.assert_allclose(found, linear(path, rows), rtol=2e-3, atol=0.5 if dtype == "float16" else 1e-3)
    np.testing.assert_allclose(found, np.concatenate([answer(predictor, rows[i : i + 1]) for i in range(7)]), rtol=1e-6)


@runtimes
@pytest.mark.parametrize("batch", [None, 4])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (3, 8, 8), (2, 2, 2, 2)])
def test_tensors_of_every_rank_are_answered(
    tmp_path: Path, runtime: RuntimeName, shape: tuple[int, ...], batch: int | None
) -> None:
    path = tiny_tabular(tmp_path / "tabular.onnx", shape, batch=batch)
    predictor = load(tensor_model(path), runtime, threads=2)
    assert predictor.input_shape == shape
    rows = rows_of(shape, "float32", 9)
    np.testing.assert_allclose(answer(predictor, rows), linear(path, rows), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("count", "batch_size"), [(10, 64), (127, 64), (128, 8), (50_000, 8)])
def test_small_rows_come_in_longer_batches(tmp_path: Path, count: int, batch_size: int) -> None:
    path = tiny_tabular(tmp_path / "tabular.onnx", (count,))
    assert load(tensor_model(path), "openvino", threads=1).batch_size == batch_size


def test_integers_that_openvino_would_cut_off_stop_it(tmp_path: Path) -> None:
    path = tiny_tabular(tmp_path / "tabular.onnx", (2,), dtype="int64")
    beyond = np.array([[1, 2], [-(2**31) - 1, 3]])
    np.testing.assert_allclose(
        answer(load(tensor_model(path), "onnxruntime", threads=1), beyond), linear(path, beyond), rtol=1e-5
    )
    predictor = load(tensor_model(path), "openvino", threads=1)
    with pytest.raises(ModelError, match="beyond 32 bits, which OpenVINO would cut off") as caught:
        predictor(beyond)
    assert "--runtime onnxruntime" in caught.value.hint
    largest = np.array([[2**31 - 1, -(2**31)]])
    np.testing.assert_allclose(answer(predictor, largest), linear(path, largest), rtol=1e-5)


@runtimes
def test_a_network_for_images_takes_tensors_where_the_card_says_so(tmp_path: Path, runtime: RuntimeName) -> None:
    path = tiny_classifier(tmp_path / "tiny.onnx", opset=7, ir_version=3)
    predictor = load(tensor_model(path), runtime, threads=1)
    assert (predictor.input_shape, predictor.input_dtype) == ((3, 32, 32), "float32")
    rows = (pictures(3).transpose(0, 3, 1, 2) / 255).astype(np.float32)
    np.testing.assert_allclose(
        answer(predictor, rows), answer(load(model_of(path), runtime, threads=1), pictures(3)), atol=TOLERANCE
    )


channel_values = st.tuples(*[st.floats(-300, 300)] * 3)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    scale=st.floats(-2, 2),
    mean=channel_values,
    std=st.tuples(*[st.floats(0.01, 300)] * 3),
    color=st.sampled_from(["RGB", "BGR"]),
)
def test_folding_scale_mean_and_std_keeps_the_values(
    tmp_path: Path, scale: float, mean: tuple[float, ...], std: tuple[float, ...], color: str
) -> None:
    preprocess = {"scale": scale, "mean": mean, "std": std, "color": color}
    model = model_of(identity(tmp_path / "identity.onnx"), size=16, task="raw", preprocess=preprocess)
    batch = np.arange(3 * 256, dtype=np.uint16).reshape(1, 16, 16, 3).astype(np.uint8)
    ordered = batch[..., ::-1] if color == "BGR" else batch
    expected = ((ordered * scale - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2)
    largest = np.abs(255 * scale / np.array(std)).max() + np.abs(np.array(mean) / np.array(std)).max()
    with executable(model) as graph:
        session = ort.InferenceSession(graph.network, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: batch})
    assert np.abs(found - expected).max() <= 1e-5 * max(1.0, largest)


def identity(path: Path) -> Path:
    net = Network()
    net.node("Identity", "images", name="same")
    image, same = (helper.make_tensor_value_info(name, 1, ["N", 3, 16, 16]) for name in ("images", "same"))
    return net.save(path, [image], [same])


def test_nothing_is_folded_into_a_plain_card() -> None:
    factor, offset = folded(Preprocess())
    assert factor.tolist() == [1, 1, 1]
    assert offset.tolist() == [0, 0, 0]


@runtimes
def test_grey_is_exactly_the_luminance_of_pillow(tmp_path: Path, runtime: RuntimeName) -> None:
    net = Network()
    net.node("Identity", "images", name="same")
    image, same = (helper.make_tensor_value_info(name, 1, ["N", 1, 64, 64]) for name in ("images", "same"))
    path = net.save(tmp_path / "grey.onnx", [image], [same])
    batch = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
    (found,) = load(model_of(path, size=64, task="raw", preprocess={}), runtime, threads=1)(batch)
    expected = np.stack([np.asarray(Image.fromarray(one).convert("L")) for one in batch])
    np.testing.assert_array_equal(found[:, 0], expected)


# --- batches, threads and memory


@runtimes
@pytest.mark.parametrize("batch", [None, 1, 4])
def test_a_batch_of_any_length_is_answered_row_by_row(tmp_path: Path, runtime: RuntimeName, batch: int | None) -> None:
    predictor = load(model_of(tiny_classifier(tmp_path / "tiny.onnx", batch=batch)), runtime, threads=1)
    assert predictor.batch_size == (batch or 8)
    images = pictures(21)
    singles = np.concatenate([answer(predictor, images[i : i + 1]) for i in range(21)])
    for count in (1, 2, 3, 4, 5, 8, 9, 16, 21):
        found = answer(predictor, images[:count])
        assert found.shape == (count, 10)
        np.testing.assert_allclose(found, singles[:count], atol=1e-5)


@runtimes
def test_a_batch_that_is_not_contiguous_is_answered(tmp_path: Path, runtime: RuntimeName) -> None:
    predictor = load(model_of(tiny_classifier(tmp_path / "tiny.onnx")), runtime, threads=1)
    images = pictures(12)
    np.testing.assert_array_equal(predictor(images[::2])[0], predictor(images[::2].copy())[0])
    images.flags.writeable = False
    assert predictor(images)[0].shape == (12, 10)


@runtimes
@pytest.mark.parametrize("batch", [None, 4])
def test_calls_of_many_threads_are_answered_as_in_a_row(
    tmp_path: Path, runtime: RuntimeName, batch: int | None
) -> None:
    predictor = load(model_of(tiny_classifier(tmp_path / "tiny.onnx", batch=batch)), runtime, threads=2)
    images = pictures(200)
    batches = [images[i : i + 1 + i % 11] for i in range(0, 180, 3)] * 5
    serial = [answer(predictor, one) for one in batches]
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(lambda one: answer(predictor, one), batches))
    for found, expected in zip(parallel, serial, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


@runtimes
def test_answers_stay_valid_after_the_next_call(tmp_path: Path, runtime: RuntimeName) -> None:
    predictor = load(model_of(tiny_classifier(tmp_path / "tiny.onnx")), runtime, threads=1)
    images = pictures(16)
    first = predictor(images[:8])[0]
    kept = first.copy()
    predictor(images[8:])
    np.testing.assert_array_equal(first, kept)


@runtimes
def test_a_predictor_tells_what_it_is(tmp_path: Path, runtime: RuntimeName) -> None:
    path = tiny_classifier(tmp_path / "tiny.onnx")
    for threads, streams in ((1, 1), (2, 2), (9, 8)):
        predictor = load(model_of(path), runtime, threads)
        assert (predictor.runtime, predictor.precision) == (runtime, "fp32")
        assert (predictor.input_shape, predictor.input_dtype) == ((32, 32, 3), "uint8")
        if predictor.device == "cpu":
            assert (predictor.streams, predictor.batch_size) == (streams, 8)
        assert predictor(pictures(3))[0].shape == (3, 10)


# --- precisions


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_lower_precision_is_computed_where_the_processor_has_it(tmp_path: Path, precision: str) -> None:
    if precision not in precisions():
        pytest.skip(f"this processor has no {precision}")
    path = tiny_classifier(tmp_path / "tiny.onnx")
    predictor = load(model_of(path, precision=precision), "openvino", threads=1)
    assert predictor.precision == precision
    expected = answer(load(model_of(path), "openvino", threads=1), pictures(16))
    found = answer(predictor, pictures(16))
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())
    assert not np.array_equal(found, expected), "it was computed in fp32"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_precision_that_the_processor_lacks_is_refused(tmp_path: Path, precision: str) -> None:
    if precision in precisions():
        pytest.skip(f"this processor has {precision}")
    model = model_of(tiny_classifier(tmp_path / "tiny.onnx"), precision=precision)
    for refuse in (
        lambda: load(model, "openvino", threads=1),
        lambda: check_runtime(model, "openvino", None, is_here=True),
    ):
        with pytest.raises(UsageError, match=f"has no {precision}, and OpenVINO would compute in fp32") as caught:
            refuse()
        assert "infermill doctor" in caught.value.hint
    check_runtime(model, "openvino", None, is_here=False)  # another machine may have it


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(("runtime", "words"), [("onnxruntime", "has no"), ("mxnet", "computes a checkpoint in fp32")])
def test_other_runtimes_refuse_a_lower_precision_everywhere(
    tmp_path: Path, precision: str, runtime: RuntimeName, words: str
) -> None:
    model = model_of(tiny_classifier(tmp_path / "tiny.onnx"), precision=precision)
    with pytest.raises(UsageError, match=words) as caught:
        check_runtime(model, runtime, None, is_here=False)
    assert "--runtime openvino" in caught.value.hint


@runtimes
def test_a_quantised_network_is_int8_and_close_to_the_one_in_fp32(tmp_path: Path, runtime: RuntimeName) -> None:
    predictor = load(model_of(tiny_quantised(tmp_path / "int8.onnx")), runtime, threads=1)
    assert predictor.precision == "int8"
    expected = answer(load(model_of(tmp_path / "float.onnx"), runtime, threads=1), pictures(16))
    np.testing.assert_allclose(answer(predictor, pictures(16)), expected, atol=0.05 * np.abs(expected).max())


def test_openvino_computes_a_quantised_network_in_8_bits(tmp_path: Path) -> None:
    with executable(model_of(tiny_quantised(tmp_path / "int8.onnx"))) as graph:
        core = ov.Core()
        compiled = core.compile_model(core.read_model(graph.network), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    told: dict[str, str] = {}
    for operation in compiled.get_runtime_model().get_ordered_ops():
        info = operation.get_rt_info()
        told.setdefault(info["layerType"].astype(str), info["runtimePrecision"].astype(str))
    assert (told["Convolution"], told["FullyConnected"]) == ("u8", "u8")


# --- one runtime


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_only_the_runtime_that_is_used_is_imported(tmp_path: Path, runtime: RuntimeName) -> None:
    path = tiny_classifier(tmp_path / "tiny.onnx")
    script = f"""
import sys
from pathlib import Path
from infermill.models.card_file import parse_card
from infermill.models.model import Model
from infermill.runtimes import load
libraries = {{"openvino", "onnxruntime"}}
assert not libraries & set(sys.modules)
card = parse_card({{"name": "t", "files": {{"onnx": "t"}}, "preprocess": {{"resize": {{"exact": [32, 32]}}}}}}, "")
load(Model(card, Path({str(path)!r}), None, ""), {runtime!r}, 1)
assert libraries & set(sys.modules) == {{{runtime!r}}}
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_library_that_is_not_there_is_told_in_one_line(
    tmp_path: Path, runtime: RuntimeName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, runtime, None)
    monkeypatch.delitem(sys.modules, MODULES[runtime], raising=False)
    with pytest.raises(InfermillError, match=f"^{runtime} cannot be imported by the Python on ") as caught:
        load(model_of(tiny_classifier(tmp_path / "tiny.onnx")), runtime, 1)
    assert f"{socket.gethostname()} ({sys.executable}): " in caught.value.message
    assert caught.value.hint == f"install {runtime} for this Python, or choose with --runtime what it has"


FORGOTTEN = """
import os, signal, threading, time
from pathlib import Path
from infermill.models.card_file import parse_card
from infermill.models.model import Model
from infermill.runtimes import load
card = parse_card({{"name": "t", "files": {{"onnx": "t"}}, "preprocess": {{"resize": {{"exact": [32, 32]}}}}}})
loaded = [load(Model(card, Path({path!r}), None, ""), {runtime!r}, 1)]
elsewhere = threading.Thread(target=loaded.clear)
elsewhere.start()
elsewhere.join()
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_ctrl_c_works_where_another_thread_has_let_go_of_a_network(tmp_path: Path, runtime: RuntimeName) -> None:
    script = FORGOTTEN.format(path=str(tiny_classifier(tmp_path / "tiny.onnx")), runtime=runtime)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "interrupted\n"


# --- large networks


@runtimes
@pytest.mark.parametrize("external_data", [True, False])
def test_a_network_above_the_limit_of_protobuf_is_loaded_from_files(
    tmp_path: Path, runtime: RuntimeName, external_data: bool
) -> None:
    model = model_of(tiny_classifier(tmp_path / "large.onnx", external_data=external_data))
    with executable(model) as graph:
        assert isinstance(graph.network, bytes)
    with executable(model, max_bytes=1000) as graph:
        assert isinstance(graph.network, Path)
        assert graph.network.with_name("large.onnx.data").exists() == external_data
        run = LOAD_FILE[runtime](graph.network)
        folder = graph.network.parent
    assert not folder.exists()
    np.testing.assert_allclose(run(pictures(3)), original(model, pictures(3))[0], atol=TOLERANCE)


def load_in_openvino(path: Path) -> Callable[[NDArray[np.uint8]], NDArray[Any]]:
    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda batch: np.asarray(compiled(batch)[0])


def load_in_onnxruntime(path: Path) -> Callable[[NDArray[np.uint8]], NDArray[Any]]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda batch: np.asarray(session.run(None, {session.get_inputs()[0].name: batch})[0])


LOAD_FILE = {"openvino": load_in_openvino, "onnxruntime": load_in_onnxruntime}


# --- networks that cannot be executed


def unknown_operator(path: Path, domain: str = "") -> Path:
    tiny_classifier(path)
    network = onnx.load_model(path)
    network.graph.node[1].op_type = "Frobnicate"
    network.graph.node[1].domain = domain
    if domain:
        network.opset_import.append(helper.make_operatorsetid(domain, 1))
    onnx.save_model(network, path)
    return path


@runtimes
@pytest.mark.parametrize("domain", ["", "com.example"])
def test_an_operator_that_is_unknown_is_named_in_one_line(tmp_path: Path, runtime: RuntimeName, domain: str) -> None:
    with pytest.raises(ModelError, match=rf"{runtime} cannot execute odd\.onnx: .*Frobnicate") as caught:
        load(model_of(unknown_operator(tmp_path / "odd.onnx", domain)), runtime, threads=1)
    assert "\n" not in caught.value.message
    assert "Exception from" not in caught.value.message
    other = next(name for name in MODULES if name != runtime)
    assert f"--runtime {other}" in caught.value.hint


@runtimes
def test_a_damaged_weight_is_refused_in_one_line(tmp_path: Path, runtime: RuntimeName) -> None:
    path = tiny_classifier(tmp_path / "odd.onnx")
    network = onnx.load_model(path)
    network.graph.initializer[0].raw_data = b"12345"
    path.write_bytes(network.SerializeToString())
    with pytest.raises(ModelError, match="cannot execute") as caught:
        load(model_of(path), runtime, threads=1)
    assert "\n" not in caught.value.message


@runtimes
def test_a_failure_after_the_warm_up_is_told_in_one_line(tmp_path: Path, runtime: RuntimeName) -> None:
    predictor = load(model_of(tiny_classifier(tmp_path / "odd.onnx")), runtime, threads=1)
    with pytest.raises(ModelError, match=rf"{runtime} cannot execute odd\.onnx: ") as caught:
        predictor(pictures(2, 64))
    assert "\n" not in caught.value.message
    assert predictor(pictures(2))[0].shape == (2, 10)


@runtimes
def test_a_network_with_a_hidden_fixed_batch_is_refused(tmp_path: Path, runtime: RuntimeName) -> None:
    net = Network()
    mean = net.node("ReduceMean", "images", axes=[0, 2, 3], keepdims=0)
    net.node("Reshape", mean, "shape", name="out")
    net.weights.append(onnx.numpy_helper.from_array(np.array([1, 3], np.int64), "shape"))
    image = helper.make_tensor_value_info("images", 1, ["N", 3, 8, 8])
    path = net.save(tmp_path / "hidden.onnx", [image], [helper.make_tensor_value_info("out", 1, None)])
    with pytest.raises(ModelError, match=r"answers a batch of 2 inputs with \[1, 3\] in `out`") as caught:
        load(model_of(path, size=8), runtime, threads=1)
    assert "dynamic batch" in caught.value.hint


def open_classifier(path: Path, classes: int) -> Path:
    """A network that does not declare how many classes it has."""
    net = Network()
    pooled = net.node("ReduceMean", "images", axes=[2], keepdims=0)
    ones = helper.make_tensor("ones", 1, [classes], [1.0] * classes)
    column = net.node("Squeeze", net.node("NonZero", net.node("Constant", value=ones)), name="indices")
    net.node("Gather", net.node("Flatten", pooled), column, axis=1, name="out")
    image = helper.make_tensor_value_info("images", 1, ["N", 3, 8, 8])
    return net.save(path, [image], [helper.make_tensor_value_info("out", 1, ["N", "C"])])


@runtimes
@pytest.mark.parametrize(("labels", "classes"), [(("a", "b"), None), (None, 2)])
def test_a_class_count_that_only_shows_in_the_answer_is_refused(
    tmp_path: Path, runtime: RuntimeName, labels: tuple[str, ...] | None, classes: int | None
) -> None:
    path = open_classifier(tmp_path / "open.onnx", 5)
    with pytest.raises(ModelError, match="answers 5 numbers per input in `out`, and the card has 2 classes"):
        load(model_of(path, size=8, labels=labels, classes=classes), runtime, threads=1)


def test_a_softmax_of_one_number_that_only_shows_in_the_answer_is_refused(tmp_path: Path) -> None:
    path = open_classifier(tmp_path / "open.onnx", 1)
    with pytest.raises(ModelError, match="a softmax of the one number of `out` is always 1"):
        load(model_of(path, size=8, output={"activation": "softmax"}), "openvino", threads=1)


def test_a_card_that_does_not_fit_is_refused_before_loading(tmp_path: Path) -> None:
    path = tiny_classifier(tmp_path / "tiny.onnx")
    wrong: list[dict[str, Any]] = [{"size": 64}, {"classes": 3}, {"labels": ("a",)}]
    for runtime, fields in itertools.product(RUNTIMES, wrong):
        with pytest.raises(ModelError):
            load(model_of(path, **fields), runtime, threads=1)


def test_names_in_the_network_do_not_collide_with_those_in_front(tmp_path: Path) -> None:
    path = tiny_classifier(tmp_path / "tiny.onnx")
    with executable(model_of(path)) as graph:
        assert isinstance(graph.network, bytes)
        again = tmp_path / "again.onnx"
        again.write_bytes(graph.network)
    model = model_of(again, preprocess={}, input={"dtype": "uint8", "layout": "NHWC"})
    for runtime in RUNTIMES:
        np.testing.assert_allclose(
            answer(load(model, runtime, threads=1), pictures(2)), original(model_of(path), pictures(2))[0], atol=1e-5
        )


# --- a GPU


def test_a_gpu_is_taken_where_onnx_runtime_finds_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime as if it were onnxruntime-gpu on a machine with a GPU; the processor computes in its place."""
    asked: list[Any] = []
    session = ort.InferenceSession

    def on_gpu(network: bytes, options: ort.SessionOptions, providers: list[Any]) -> ort.InferenceSession:
        asked.extend(providers)
        started = session(network, options, providers=["CPUExecutionProvider"])
        monkeypatch.setattr(started, "get_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
        return started

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", on_gpu)
    monkeypatch.setattr(ort, "preload_dlls", lambda: print("libcudart.so.12 was not found"))
    model = model_of(tiny_classifier(tmp_path / "tiny.onnx"))
    predictor = load(model, "onnxruntime", threads=4, streams=3)
    assert (predictor.device, predictor.streams, predictor.batch_size) == ("cuda", 2, 64)
    assert asked == [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]
    assert capfd.readouterr().out == ""
    monkeypatch.setattr(ort, "InferenceSession", session)
    batch = pictures(3)
    np.testing.assert_allclose(answer(predictor, batch), original(model, batch)[0], atol=TOLERANCE)
