"""The network in int8: exact preprocessing, float outputs, nodes in float again, and multiplications counted."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from infermill.errors import ModelError
from infermill.models.card_file import parse_card
from infermill.models.executable import executable
from infermill.models.model import Model
from infermill.models.opening import open_model
from infermill.models.quantization import Quantized, check_quantizable, quantize_network
from infermill.runtimes import load
from infermill.types import RuntimeName, StoreOptions
from tests.networks import Network, pictures, tiny_classifier, tiny_tabular

ROWS = list(pictures(24))


def model_of(path: Path, **fields: Any) -> Model:
    preprocess = {"resize": {"exact": [32, 32]}, "scale": 1 / 255, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3]}
    card = {"name": "tiny", "files": {"onnx": str(path)}, "preprocess": preprocess} | fields
    return open_model(parse_card(card), StoreOptions())


def residual(path: Path) -> Path:
    """Convolutions with BatchNorm and a residual, nameless nodes, and a scaling behind the last one."""
    net = Network()
    tip = "images"
    for channels, inside in ((8, 3), (8, 8), (8, 8)):
        before = tip
        kernel = net.weight(net.random.normal(0, 0.3, (channels, inside, 3, 3)))
        tip = net.node("Conv", tip, kernel, pads=[1] * 4)
        factors = [net.weight(net.random.uniform(0.5, 1.5, channels)) for _ in range(4)]
        tip = net.node("Relu", net.node("BatchNormalization", tip, *factors))
        if inside == channels:
            tip = net.node("Add", tip, before)
    tip = net.gemm(net.node("Flatten", net.node("GlobalAveragePool", tip)), 8, 5)
    net.node("Mul", tip, net.weight(np.array(2.0)), name="logits")
    for node in net.nodes:
        node.name = ""
    image = onnx.helper.make_tensor_value_info("images", 1, ["N", 3, 32, 32])
    return net.save(path, [image], [onnx.helper.make_tensor_value_info("logits", 1, ["N", 5])])


def answers_of(model: Model, network: onnx.ModelProto, path: Path, runtime: RuntimeName) -> NDArray[np.float64]:
    path.write_bytes(network.SerializeToString())
    return load(replace(model, network=path), runtime, 2)(np.stack(ROWS))[0].astype(np.float64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return model_of(residual(tmp_path_factory.mktemp("residual") / "residual.onnx"))


@pytest.fixture(scope="module")
def quantized(model: Model) -> Quantized:
    return quantize_network(model, ROWS)


def producers(network: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in network.graph.node for name in node.output}


def test_batch_norms_are_folded_and_every_layer_is_in_int8(quantized: Quantized) -> None:
    operators = [node.op_type for node in quantized.floating.graph.node]
    assert "BatchNormalization" not in operators and operators.count("Conv") == 3
    made = producers(quantized.int8)
    weights = {tensor.name: tensor for tensor in quantized.int8.graph.initializer}
    for node in quantized.int8.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            data, weight = (made[name] for name in node.input[:2])
            assert (data.op_type, weight.op_type) == ("DequantizeLinear", "DequantizeLinear")
            values = onnx.numpy_helper.to_array(weights[weight.input[0]])
            assert values.dtype == np.int8
            assert np.abs(values.astype(int)).max() <= 64, "7 bits, which do not saturate without VNNI"
        if node.op_type == "Conv":
            scale = onnx.numpy_helper.to_array(weights[made[node.input[1]].input[1]])
            assert scale.shape == (8,), "a scale for each channel"


def test_nothing_is_rounded_in_front_of_the_first_layer_or_behind_the_last(quantized: Quantized) -> None:
    nodes = {name: node.op_type for node in quantized.floating.graph.node for name in [node.name]}
    assert sorted({nodes[name] for name in quantized.nodes}) == ["Add", "Conv", "Gemm", "GlobalAveragePool"]
    made = producers(quantized.int8)
    last = made["logits"]
    assert last.op_type == "Mul"
    assert made[last.input[0]].op_type == "Gemm"


def test_the_preprocessing_in_front_stays_as_it_is(model: Model, quantized: Quantized, tmp_path: Path) -> None:
    path = tmp_path / "int8.onnx"
    path.write_bytes(quantized.int8.SerializeToString())
    fronts = []
    for one in (model, replace(model, network=path)):
        with executable(one) as graph:
            assert isinstance(graph.network, bytes)
            nodes = onnx.ModelProto.FromString(graph.network).graph.node
        end = next(at for at, node in enumerate(nodes) if "images" in node.output)
        fronts.append([node.SerializeToString() for node in nodes[: end + 1]])
    assert fronts[0] == fronts[1]


def test_the_ranges_are_those_of_normalised_images(quantized: Quantized) -> None:
    first = next(node for node in quantized.int8.graph.node if node.op_type == "QuantizeLinear")
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in quantized.int8.graph.initializer}
    assert first.input[0] == "images"
    images = (np.stack(ROWS) / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.2, 0.3]
    assert weights[first.input[1]] == pytest.approx((images.max() - images.min()) / 255, rel=1e-3)


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_int8_is_near_and_all_in_float_is_the_same(
    model: Model, quantized: Quantized, tmp_path: Path, runtime: RuntimeName
) -> None:
    expected = load(model, runtime, 2)(np.stack(ROWS))[0].astype(np.float64)
    int8 = answers_of(model, quantized.int8, tmp_path / "int8.onnx", runtime)
    floating = answers_of(model, quantized.keeping(quantized.nodes), tmp_path / "float.onnx", runtime)
    largest = np.abs(expected).max()
    assert 0 < np.abs(int8 - expected).max() < 0.1 * largest
    assert np.abs(floating - expected).max() < 1e-5 * largest
    kept = [name for name in quantized.nodes if "Gemm" in name]
    some = answers_of(model, quantized.keeping(kept), tmp_path / "some.onnx", runtime)
    assert 0 < np.abs(some - expected).max() < 0.1 * largest


def test_a_node_in_float_has_its_own_weights_again(quantized: Quantized) -> None:
    (gemm,) = [name for name in quantized.nodes if "Gemm" in name]
    kept = quantized.keeping([gemm])
    onnx.checker.check_model(kept, full_check=True)
    made = producers(kept)
    node = next(node for node in kept.graph.node if node.name == gemm)
    before = next(node for node in quantized.floating.graph.node if node.name == gemm)
    assert node.input == before.input
    assert made[node.input[0]].op_type == "Flatten"
    assert made[made[node.input[0]].input[0]].op_type == "GlobalAveragePool", "no rounding on the way to it"
    everything = quantized.keeping(quantized.nodes)
    assert not {node.op_type for node in everything.graph.node} & {"QuantizeLinear", "DequantizeLinear"}
    assert len(everything.graph.initializer) == len(quantized.floating.graph.initializer)


def test_multiplications_are_counted(quantized: Quantized) -> None:
    expected = [32 * 32 * 8 * 3 * 9, 32 * 32 * 8 * 8 * 9, 32 * 32 * 8 * 8 * 9, 8 * 5]
    assert list(quantized.macs.values()) == expected
    assert quantized.int8_share(()) == 1.0
    first = quantized.nodes[0]
    assert quantized.int8_share([first]) == pytest.approx(1 - expected[0] / sum(expected))
    assert quantized.int8_share(quantized.nodes) == 0.0


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_layouts_and_fixed_batches(tmp_path: Path, layout: Any) -> None:
    path = tiny_classifier(tmp_path / "tiny.onnx", layout=layout, batch=5)
    found = quantize_network(model_of(path, input={"layout": layout}), ROWS)
    assert list(found.macs.values()) == [8 * 16 * 16 * 27, 128 * 10]


def test_bytes_grey_images_and_tensors(tmp_path: Path) -> None:
    plain = {"resize": {"exact": [32, 32]}}
    path = tiny_classifier(tmp_path / "bytes.onnx", dtype="uint8")
    found = quantize_network(model_of(path, input={"dtype": "uint8"}, preprocess=plain), ROWS)
    operators = [node.op_type for node in found.int8.graph.node if node.op_type != "DequantizeLinear"]
    assert operators[:3] == ["Cast", "Mul", "QuantizeLinear"], "the network's own preprocessing is exact, too"
    path = tiny_classifier(tmp_path / "grey.onnx", channels=1)
    assert quantize_network(model_of(path, preprocess=plain | {"scale": 1 / 255}), ROWS).nodes
    rows = list(np.random.default_rng(0).standard_normal((20, 6)).astype(np.float32))
    assert quantize_network(model_of(tiny_tabular(tmp_path / "t.onnx"), preprocess=None), rows).macs == {"logits": 24}


def not_computing(path: Path) -> Path:
    net = Network()
    net.node("Flatten", net.node("GlobalAveragePool", "images"), name="logits")
    image = onnx.helper.make_tensor_value_info("images", 1, ["N", 3, 32, 32])
    return net.save(path, [image], [onnx.helper.make_tensor_value_info("logits", 1, ["N", 3])])


@pytest.mark.parametrize(
    ("make", "fields", "told"),
    [
        (not_computing, {}, "has no Conv, ConvTranspose, Gemm or MatMul"),
        (lambda path: tiny_classifier(path, dtype="float16"), {"input": {"dtype": "float16"}}, "weights in float16"),
    ],
)
def test_what_is_refused(tmp_path: Path, make: Callable[[Path], Path], fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        check_quantizable(model_of(make(tmp_path / "tiny.onnx"), **fields))


def test_a_quantized_network_is_refused(model: Model, quantized: Quantized, tmp_path: Path) -> None:
    check_quantizable(model)
    path = tmp_path / "int8.onnx"
    path.write_bytes(quantized.int8.SerializeToString())
    with pytest.raises(ModelError, match="quantized already"):
        check_quantizable(replace(model, network=path))
