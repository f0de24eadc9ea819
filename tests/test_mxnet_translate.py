"""The translation of MXNet's graphs: the numbers and the names are those of MXNet 1.9.1 itself."""

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from infermill.errors import ModelError
from infermill.models.mxnet.families import family_of, input_shapes
from infermill.models.mxnet.operators import OPERATORS
from infermill.models.mxnet.params import Params, read_params
from infermill.models.mxnet.symbol import Node, Symbol, read_symbol
from infermill.models.mxnet.translate import translate
from infermill.runtimes.openvino import core
from tests.checkpoints import classifier_arrays, classifier_symbol, write_params

# max |Δ| / max |MXNet's|, in fp32.
TOLERANCE = 1e-4
HALF_TOLERANCE = 2e-3
ZOO = Path(__file__).with_name("mxnet_zoo.py")
FAMILIES = (
    *("resnet-18", "resnet-50", "resnet-50-v1", "alexnet", "vgg-11", "inception-bn", "mobilenet", "mobilenetv2"),
    *("squeezenet", "gluon-resnet18_v1", "gluon-resnet18_v2", "gluon-squeezenet1.0", "gluon-mobilenet1.0"),
    *("gluon-mobilenetv2_1.0", "gluon-densenet121", "gluon-vgg11_bn"),
)
HEAVY = (
    *("resnet-152", "inception-v3", "vgg-16-bn", "densenet-121", "gluon-resnet34_v1", "gluon-resnet50_v1"),
    *("gluon-resnet34_v2", "gluon-resnet50_v2", "gluon-resnet101_v2", "gluon-alexnet", "gluon-inceptionv3"),
    *("gluon-squeezenet1.1", "gluon-densenet169", "gluon-vgg11", "gluon-vgg13", "gluon-vgg16", "gluon-vgg16_bn"),
    *("gluon-vgg19", "gluon-mobilenet0.25", "gluon-mobilenet0.5", "gluon-mobilenetv2_0.5", "gluon-mobilenetv2_0.75"),
    *("gluon-resnet101_v1", "gluon-resnet152_v1", "gluon-resnet152_v2", "gluon-densenet161", "gluon-densenet201"),
    *("gluon-vgg13_bn", "gluon-vgg19_bn", "gluon-mobilenet0.75", "gluon-mobilenetv2_0.25"),
)
Answers = dict[str, NDArray[Any]]
Execute = Callable[[NDArray[Any]], list[NDArray[Any]]]


def onnxruntime_of(network: onnx.ModelProto) -> Execute:
    session = ort.InferenceSession(network.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda data: list(session.run(None, {network.graph.input[0].name: data}))


def openvino_of(network: onnx.ModelProto) -> Execute:
    model = core().read_model(network.SerializeToString(), b"")
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda data: list(compiled(data).values())


RUNTIMES: dict[str, Callable[[onnx.ModelProto], Execute]] = {"onnxruntime": onnxruntime_of, "openvino": openvino_of}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that is gone after the test, and not kept like `tmp_path`: networks are large."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


Ask = Callable[[Path, str], list[str]]


@contextmanager
def mxnet_asked(python: Path, **environment: str) -> Iterator[Ask]:
    """MXNet in a process that stays, since importing it takes seconds: writes networks, and answers their names."""
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"} | environment
    with subprocess.Popen(
        [python, ZOO], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        questions, answers = process.stdin, process.stdout
        assert questions is not None and answers is not None

        def ask(folder: Path, name: str) -> list[str]:
            print(json.dumps([str(folder), name]), file=questions, flush=True)
            assert answers.readline() == f"{name}\n", "see its standard error"
            return sorted(file.stem for file in folder.glob("*.npz"))

        yield ask
        questions.close()


@pytest.fixture(scope="module")
def ask_mxnet(mxnet_python: Path) -> Iterator[Ask]:
    with mxnet_asked(mxnet_python) as ask:
        yield ask


def translated(folder: Path, name: str) -> tuple[onnx.ModelProto, Symbol, Answers]:
    """A network of the zoo, and MXNet's answers."""
    symbol = read_symbol(folder / f"{name}-symbol.json")
    with np.load(folder / f"{name}.npz") as file:
        answers = dict(file)
    network = translate(symbol, read_params(folder / f"{name}-0000.params"), answers["data"].shape[1:], name)
    onnx.checker.check_model(network)
    return network, symbol, answers


def deviations(
    network: onnx.ModelProto, answers: Answers, distance: Callable[..., float]
) -> Iterator[tuple[str, float]]:
    """max |Δ| / max |MXNet's|, of both runtimes and both batches."""
    for runtime, load in RUNTIMES.items():
        execute = load(network)
        for what, data in (("outputs", answers["data"]), ("single", answers["data"][:1])):
            for index, output in enumerate(execute(data)):
                wanted = answers[f"{what}{index}"]
                assert output.shape == wanted.shape, (network.graph.name, runtime, what)
                yield f"{runtime} {what}{index}", distance(output, wanted) / max(float(np.abs(wanted).max()), 1e-30)


def largest(output: NDArray[Any], wanted: NDArray[Any]) -> float:
    return float(np.abs(output.astype(np.float64) - wanted).max())


def largest_of_rows(output: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Of sets of rows: softmax differs by a rounding between libraries, and so does the order of equal scores."""
    apart = np.abs(output[:, :, None] - wanted[:, None]).max(-1)
    return float(max(apart.min(1).max(), apart.min(2).max()))


def names_are_mxnets(network: onnx.ModelProto, symbol: Symbol, answers: Answers) -> None:
    made = {name for node in network.graph.node for name in node.output}
    variables = {node.name for node in symbol.nodes if node.op == "null"}
    hidden = {name for name in answers["names"] if name.endswith("_mask")}
    assert set(answers["names"]) - variables - hidden <= made


@pytest.mark.slow
def test_every_way_to_use_an_operator_gives_what_mxnet_gives(mxnet_python: Path, folder: Path) -> None:
    wrong: dict[str, float] = {}
    used = set()
    # oneDNN, with which MXNet computes on a CPU, refuses some transposed convolutions; its own code does not.
    with mxnet_asked(mxnet_python, MXNET_MKLDNN_ENABLED="0") as ask:
        names = ask(folder, "operators")
    for name in names:
        network, symbol, answers = translated(folder, name)
        names_are_mxnets(network, symbol, answers)
        used |= {node.op for node in symbol.nodes}
        half = any(node.attrs.get("dtype") == "float16" for node in symbol.nodes)
        for what, deviation in deviations(network, answers, largest):
            if not deviation < (HALF_TOLERANCE if half else TOLERANCE):
                wrong[f"{name} {what}"] = deviation
    assert not wrong
    # What is left out are other names of what is used, and what `test_other_names` and the networks have.
    assert len(used & set(OPERATORS)) > 110


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in HEAVY)])
def test_networks_give_what_mxnet_gives(name: str, ask_mxnet: Ask, folder: Path) -> None:
    assert ask_mxnet(folder, name) == [name]
    network, symbol, answers = translated(folder, name)
    names_are_mxnets(network, symbol, answers)
    assert answers["outputs0"].std(axis=0).max() > 1e-3 * np.abs(answers["outputs0"]).max()
    found = dict(deviations(network, answers, largest))
    assert max(found.values()) < TOLERANCE, found


def test_ssd_gives_what_mxnet_gives(ask_mxnet: Ask, folder: Path) -> None:
    (name,) = ask_mxnet(folder, "ssd-vgg16")
    network, symbol, answers = translated(folder, name)
    names_are_mxnets(network, symbol, answers)
    kept = answers["outputs0"][:, :, 0] >= 0
    assert kept.sum(1).min() > 100 and not kept.all()
    found = dict(deviations(network, answers, largest_of_rows))
    assert max(found.values()) < TOLERANCE, found


def chain(*operators: tuple[str, Mapping[str, str], tuple[str, ...]]) -> Symbol:
    """Operators one after the other, called after themselves, each with variables as its further inputs."""
    nodes, head = [Node("null", "data", {}, ())], 0
    for op, attrs, variables in operators:
        first = len(nodes)
        nodes += [Node("null", f"{op.lower()}_{variable}", {}, ()) for variable in variables]
        inputs = ((head, 0), *((first + index, 0) for index in range(len(variables))))
        head = len(nodes)
        nodes.append(Node(op, op.lower(), attrs, inputs))
    return Symbol(tuple(nodes), ((head, 0),), (1, 9, 1))


def parameters(**arrays: Any) -> Params:
    return Params({name: np.asarray(value, np.float32) for name, value in arrays.items()}, {})


def answer(symbol: Symbol, data: NDArray[Any], params: Params | None = None) -> NDArray[Any]:
    network = translate(symbol, params or parameters(), data.shape[1:], "network")
    onnx.checker.check_model(network)
    return onnxruntime_of(network)(data)[0]


def picture(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)


BATCH_NORM = ("BatchNorm", {"eps": "0"}, ("gamma", "beta", "moving_mean", "moving_var"))
STATISTICS = {"batchnorm_beta": [1], "batchnorm_moving_mean": [2], "batchnorm_moving_var": [4]}


def test_gamma_is_one_unless_the_symbol_says_otherwise() -> None:
    params = parameters(batchnorm_gamma=[10], **STATISTICS)
    data = np.array([[6]], np.float32)
    assert answer(chain(BATCH_NORM), data, params) == pytest.approx(3)
    free = ("BatchNorm", {"eps": "0", "fix_gamma": "False"}, BATCH_NORM[2])
    assert answer(chain(free), data, params) == pytest.approx(21)


@pytest.mark.parametrize(
    ("alias", "name"),
    [("_Plus", "elemwise_add"), ("_Minus", "elemwise_sub"), ("_mul", "elemwise_mul"), ("_div", "elemwise_div")],
)
def test_other_names_of_operators_with_two_inputs(alias: str, name: str) -> None:
    data = picture(2, 3)
    first, second = (
        answer(chain((op, {}, ("other",))), data, parameters(**{f"{op.lower()}_other": np.arange(1, 4)}))
        for op in (alias, name)
    )
    assert np.array_equal(first, second)


@pytest.mark.parametrize(("alias", "name"), [("_PlusScalar", "_plus_scalar"), ("_RMinusScalar", "_rminus_scalar")])
def test_other_names_of_operators_with_a_number(alias: str, name: str) -> None:
    data = picture(2, 3)
    first, second = (answer(chain((op, {"scalar": "1.5"}, ())), data) for op in (alias, name))
    assert np.array_equal(first, second)


def test_channels_may_be_last() -> None:
    data, weight, bias = picture(2, 9, 8, 4), picture(6, 3, 3, 2), picture(6)
    attrs = {"kernel": "(3, 3)", "num_filter": "6", "num_group": "2", "pad": "(1, 0)", "stride": "(2, 1)"}
    first = ("Convolution", attrs, ("weight", "bias"))
    last = ("Convolution", attrs | {"layout": "NHWC"}, ("weight", "bias"))
    pool = {"kernel": "(2, 2)", "pool_type": "avg", "pad": "(1, 1)"}
    turned = parameters(convolution_weight=weight.transpose(0, 3, 1, 2), convolution_bias=bias)
    expected = answer(chain(first, ("Pooling", pool, ())), data.transpose(0, 3, 1, 2), turned)
    given = parameters(convolution_weight=weight, convolution_bias=bias)
    result = answer(chain(last, ("Pooling", pool | {"layout": "NHWC"}, ())), data, given)
    assert result.transpose(0, 3, 1, 2) == pytest.approx(expected, abs=1e-5)


def test_a_network_that_casts_to_float16_has_its_weights_in_float16() -> None:
    layers = [("FullyConnected", {"num_hidden": "3"}, ("weight", "bias")), BATCH_NORM]
    weights = {"fullyconnected_weight": picture(3, 4), "fullyconnected_bias": picture(3)}
    params = parameters(**weights, **{f"batchnorm_{name}": [1, 1, 1] for name in BATCH_NORM[2]})
    halves = Params({name: array.astype(np.float16) for name, array in params.arg.items()}, {})
    half = chain(("Cast", {"dtype": "float16"}, ()), *layers)
    network = translate(half, halves, (4,), "half")
    types = {tensor.name: tensor.data_type for tensor in network.graph.initializer}
    assert types["fullyconnected_weight/float16"] == onnx.TensorProto.FLOAT16
    full = answer(chain(*layers), picture(5, 4), halves)
    assert full.dtype == np.float32
    for load in RUNTIMES.values():
        assert load(network)(picture(5, 4))[0] == pytest.approx(full, abs=0.02)


def test_boxes_that_overlap_exactly_as_much_as_is_allowed_are_kept() -> None:
    """OpenVINO suppresses at the threshold, and MXNet's box_nms only above it."""
    boxes = np.array([[[0.9, 0, 0, 2, 1], [0.8, 1, 0, 2, 1], [0.7, 5, 5, 6, 6], [0.6, 6, 5, 7, 6]]], np.float32)
    for threshold, kept in (("0.5", 4), ("0", 3), ("1", 4)):
        attrs = {"coord_start": "1", "score_index": "0", "overlap_thresh": threshold}
        network = translate(chain(("_contrib_box_nms", attrs, ())), parameters(), (4, 5), "network")
        for load in RUNTIMES.values():
            assert (load(network)(boxes)[0][0, :, 0] > 0).sum() == kept


def test_boxes_of_class_minus_one_are_no_boxes() -> None:
    """They are background unless the symbol names another class."""
    boxes = np.array([[[-1, 0.9, 0, 0, 1, 1], [0, 0.8, 0, 0, 1, 1]]], np.float32)
    assert answer(chain(("_contrib_box_nms", {"id_index": "0"}, ())), boxes)[0, :, 0].tolist() == [0, -1]
    named = {"id_index": "0", "background_id": "0"}
    assert answer(chain(("_contrib_box_nms", named, ())), boxes)[0, :, 1].tolist() == pytest.approx([0.9, -1])


def test_all_sizes_of_anchors_have_the_first_ratio() -> None:
    symbol = chain(("_contrib_MultiBoxPrior", {"sizes": "(0.5, 0.2)", "ratios": "(4, 1)"}, ()))
    boxes = translate(symbol, parameters(), (1, 1, 1), "network").graph.initializer[0]
    left, top, right, bottom = onnx.numpy_helper.to_array(boxes)[0].T
    assert right - left == pytest.approx([1, 0.4, 0.5], abs=1e-6)
    assert bottom - top == pytest.approx([0.25, 0.1, 0.5], abs=1e-6)


def test_the_first_pooling_pads_with_zeros() -> None:
    attrs = {"kernel": "(2, 2)", "pad": "(1, 1)", "stride": "(2, 2)"}
    data = np.full((1, 1, 2, 2), -3, np.float32)
    assert answer(chain(("Pooling", attrs, ())), data).tolist() == [[[[-3, -3], [-3, -3]]]]
    assert answer(chain(("Pooling_v1", attrs, ())), data).tolist() == [[[[0, 0], [0, 0]]]]


def test_a_batch_that_was_reshaped_is_known_again() -> None:
    reshapes = [("Reshape", {"shape": shape}, ()) for shape in ("(-1, 12)", "(0, 3, 4)", "(-3, 4)", "(0, -1, 2)")]
    network = translate(chain(*reshapes[:2]), parameters(), (3, 2, 2), "network")
    assert network.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    joined = translate(chain(*reshapes), parameters(), (3, 2, 2), "network")
    assert onnxruntime_of(joined)(picture(5, 3, 2, 2))[0].shape == (15, 2, 2)


def test_labels_and_spare_parameters_are_left_out() -> None:
    symbol = chain(("SoftmaxOutput", {"grad_scale": "1"}, ("label",)))
    network = translate(symbol, parameters(spare=[1]), (4,), "network")
    assert [value.name for value in network.graph.input] == ["data"]
    assert not network.graph.initializer
    assert [value.name for value in network.graph.output] == ["softmaxoutput_output"]


def test_two_operators_may_have_the_same_name() -> None:
    data = Node("null", "data", {}, ())
    nodes = (data, Node("exp", "same", {}, ((0, 0),)), Node("negative", "same", {}, ((1, 0),)))
    result = answer(Symbol(nodes, ((2, 0),), (1, 9, 1)), picture(2, 3))
    assert result == pytest.approx(-np.exp(picture(2, 3)))


def test_integers_of_python_2_are_read() -> None:
    symbol = chain(("Pooling", {"kernel": "(2L, 2L)", "stride": "[2L, 2L]", "pad": "()", "global_pool": "0"}, ()))
    assert answer(symbol, picture(1, 1, 4, 4)).shape == (1, 1, 2, 2)


CONVOLUTION = {"kernel": "(3, 3)", "num_filter": "2", "no_bias": "True"}


@pytest.mark.parametrize(
    ("symbol", "message"),
    [
        (chain(("Custom", {}, ())), "node `custom` (Custom): this operator has no translation to ONNX"),
        (chain(("clip", {"a_min": "0"}, ())), "node `clip` (clip) lacks the attribute `a_max`"),
        (chain(("clip", {"a_min": "0", "a_max": "nan"}, ())), "its attribute `a_max` is 'nan', and not a number"),
        (
            chain(("Flatten", {}, ()), ("Pooling", {"kernel": "2x2"}, ())),
            "`kernel` is '2x2', and not a tuple of integers",
        ),
        (chain(("Activation", {"act_type": "swish"}, ())), "is 'swish', and not one of relu, sigmoid"),
        (chain(("Dropout", {"mode": "always"}, ())), "its mode is `always`, whose answers are random"),
        (
            chain(("Pooling", {"kernel": "(2, 2)", "pooling_convention": "same"}, ())),
            "its pooling_convention is `same`",
        ),
        (chain(("_contrib_BilinearResize2D", {"mode": "odd_scale"}, ())), "its mode is `odd_scale`"),
        (chain(("argmax", {}, ())), "it has no axis, and would mix the inputs of a batch"),
        (chain(("topk", {"axis": "None"}, ())), "it has no axis, and would mix the inputs of a batch"),
        (chain(("topk", {"axis": "1", "k": "9"}, ())), "its k is 9, of 3"),
        (
            chain(("squeeze", {}, ()), ("mean", {}, ()), ("squeeze", {}, ()), ("Pooling", {"global_pool": "1"}, ())),
            "told",
        ),
        (chain(("Reshape", {"shape": f"({'1,' * 2000}-1)"}, ())), "and not a tuple of integers"),
        (chain(*[("one_hot", {"depth": "9000000"}, ())] * 2), "would enumerate 9000000 numbers"),
        (chain(("SliceChannel", {"axis": "3", "num_outputs": "400000"}, ())), "would enumerate 25600000 numbers"),
        (chain(("Reshape", {"shape": "(2, 48)"}, ())), "fixes the length of the batch"),
        (chain(("Reshape", {"shape": "(0, 7)"}, ())), "node `reshape` (Reshape)"),
        (chain(("SoftmaxOutput", {}, ())), "it has neither multi_output nor preserve_shape"),
        (chain(("softmax", {"axis": "4"}, ())), "there is no axis 4 in 4 dimensions"),
        (chain(("Pooling", {"kernel": "(1, 1)", "stride": "(2, 2)", "pooling_convention": "full"}, ())), "outside"),
        (
            chain(("Convolution", CONVOLUTION, ())),
            "node `convolution` (Convolution) has 1 inputs, where input 2 is needed",
        ),
        *(
            (chain((op, CONVOLUTION | {name: text}, ("filter",))), f"its `{name}` is {text}")
            for op in ("Convolution", "Deconvolution")
            for name, text in (("stride", "(0, 1)"), ("dilate", "(1, 0)"), ("pad", "(-1, 0)"))
        ),
        (chain(("Convolution", CONVOLUTION, ("weight",))), "no array `convolution_weight`, which the symbol needs"),
        (chain(("broadcast_add", {}, ("other",))), "does not fit its inputs"),
        (chain(("slice", {"begin": "(0)", "end": "(1, 2)"}, ())), "1 beginnings, 2 ends and 1 steps"),
        (chain(("broadcast_axis", {"axis": "1", "size": "()"}, ())), "attributes of node `broadcast_axis`"),
        (chain(("repeat", {"axis": "1", "repeats": "99999999999"}, ())), "would enumerate 299999999997 numbers"),
        (chain(("_contrib_MultiBoxPrior", {"ratios": "(1, -2)"}, ())), "ratios (1.0, -2.0)"),
    ],
)
def test_what_cannot_be_translated_is_told(symbol: Symbol, message: str) -> None:
    params = parameters(
        broadcast_add_other=np.zeros((1, 5, 4, 4)),
        convolution_filter=np.zeros((2, 3, 3, 3)),
        deconvolution_filter=np.zeros((3, 2, 3, 3)),
    )
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        translate(symbol, params, (3, 4, 4), "network")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("symbol", "message"),
    [
        (chain(("Custom", {}, ())), "node `custom` (Custom): this operator has no translation to ONNX"),
        (chain(("argmax", {}, ())), "node `argmax` (argmax) cannot be translated to ONNX: it has no axis"),
        (
            replace(chain(("Flatten", {}, ())), heads=((1, 3),)),
            "output 3 of node `flatten` (Flatten) has no translation",
        ),
    ],
)
def test_what_has_no_translation_may_be_asked_for(symbol: Symbol, message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        translate(symbol, parameters(), (3, 4, 4), "network")
    assert caught.value.hint.startswith("save the network from MXNet without it, or ask for it where infermill is from")


WORDS = [
    "0", "-1", "2", "(0, 0)", "(2, 2)", "(-1, -1)", "()", "(1, 99999999999)", "None", "True", "inf", "x", "{[]: 0}",
]  # fmt: skip
ATTRIBUTES = [
    "kernel", "stride", "pad", "dilate", "num_filter", "num_group", "num_hidden", "axis", "shape", "pool_type", "k",
    "global_pool", "begin", "end", "__shape__", "sizes", "ratios", "depth", "scale", "layout", "act_type",
]  # fmt: skip
DAMAGE = st.one_of(
    st.tuples(st.just("op"), st.sampled_from(sorted(OPERATORS)) | st.text(max_size=3)),
    st.tuples(st.just("name"), st.sampled_from(["data", "conv0", "", "\ud800", "\0"]) | st.text(max_size=3)),
    st.tuples(st.just("inputs"), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2), st.just(0)), max_size=4)),
    st.tuples(
        st.just("attrs"),
        st.dictionaries(
            st.sampled_from(ATTRIBUTES),
            st.sampled_from(WORDS) | st.text(max_size=4),
            max_size=4,
        ),
    ),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 9), DAMAGE), min_size=1, max_size=3))
@example([(0, ("attrs", {"__shape__": "{[]: 0}"}))])
@example([(2, ("name", "\ud800"))])
def test_a_damaged_symbol_is_translated_or_refused(tmp_path: Path, damages: list[tuple[int, tuple[str, Any]]]) -> None:
    data = classifier_symbol()
    for at, (field, value) in damages:
        data["nodes"][at][field] = data["nodes"][at]["attrs"] | value if field == "attrs" else value
    (tmp_path / "x-symbol.json").write_text(json.dumps(data))
    params = read_params(write_params(tmp_path / "x-0000.params", classifier_arrays()))
    with suppress(ModelError):
        symbol = read_symbol(tmp_path / "x-symbol.json")
        for shape in input_shapes(symbol, params, family_of(symbol), None)[:2]:
            translate(symbol, params, shape, "network").SerializeToString()


def test_a_network_that_no_onnx_file_can_hold_is_told() -> None:
    symbol = chain(("FullyConnected", {"num_hidden": "1", "no_bias": "True"}, ("weight",)))
    huge = np.broadcast_to(np.float32(0), (1, 1 << 29))
    with pytest.raises(ModelError, match="network has more than 2 GiB of parameters") as caught:
        translate(symbol, Params({"fullyconnected_weight": huge}, {}), (1 << 29,), "network")
    assert "take a smaller one" in caught.value.hint


def test_weights_of_another_shape_are_told() -> None:
    symbol = chain(("FullyConnected", {"num_hidden": "2"}, ("weight", "bias")))
    params = parameters(fullyconnected_weight=np.zeros((2, 12)), fullyconnected_bias=np.zeros(2))
    with pytest.raises(ModelError, match=re.escape("needs `fullyconnected_weight` as (2, 48), and it is (2, 12)")):
        translate(symbol, params, (3, 4, 4), "network")


def test_a_network_has_one_input() -> None:
    nodes = (
        Node("null", "left", {}, ()),
        Node("null", "right", {}, ()),
        Node("elemwise_add", "sum", {}, ((0, 0), (1, 0))),
    )
    symbol = Symbol(nodes, ((2, 0),), (1, 9, 1))
    with pytest.raises(ModelError, match="2 variables without parameters: `left`, `right`"):
        translate(symbol, parameters(), (3,), "network")
    with pytest.raises(ModelError, match="no input"):
        translate(symbol, parameters(left=[1], right=[1]), (3,), "network")
    other = translate(symbol, parameters(right=[1, 2, 3]), (3,), "network")
    assert other.graph.input[0].name == "left"
