"""Graphs of MXNet: every form of the file, the upgrades of old ones, and what is no graph."""

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infermill.errors import ModelError
from infermill.models.mxnet.symbol import Symbol, is_symbol, read_symbol
from tests.checkpoints import classifier_symbol, node, symbol_of

# What MXNet itself makes of a file of 0.8: the names of its arguments and auxiliary states, as it says them.
LOAD_WITH_MXNET = """
import json, sys, mxnet as mx
symbol = mx.sym.load(sys.argv[1])
print(json.dumps([symbol.list_arguments(), symbol.list_auxiliary_states(), symbol.list_outputs()]))
"""


def written(folder: Path, data: Any) -> Path:
    path = folder / "x-symbol.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def old_symbol() -> dict[str, Any]:
    """As 0.8 wrote it: `param` and `attr`, pairs, no version, and no auxiliary inputs."""
    data = symbol_of(
        node("null", "data"),
        node("null", "conv0_weight"),
        node("Convolution", "conv0", [0, 1], kernel="(3, 3)", num_filter="4", no_bias="True"),
        node("null", "bn0_gamma"),
        node("null", "bn0_beta"),
        node("BatchNorm", "bn0", [2, 3, 4], fix_gamma="False"),
        node("BatchNorm", "bn1", [5], eps="0.001"),
        node("argmax", "best", [6], axis="-1"),
    )
    for one in data["nodes"]:
        one |= {"param": one.pop("attrs"), "backward_source_id": -1, "inputs": [pair[:2] for pair in one["inputs"]]}
    data["nodes"][2]["attr"] = {"ctx_group": "stage1", "lr_mult": "2", "weight_lr_mult": "3", "__mood__": "x"}
    data["heads"] = [[7, 0]]
    del data["attrs"]
    return data


def shape_of(symbol: Symbol) -> dict[str, list[str]]:
    return {one.name: [symbol.nodes[index].name for index, _ in one.inputs] for one in symbol.nodes if one.op != "null"}


def test_a_symbol_is_read(tmp_path: Path) -> None:
    symbol = read_symbol(written(tmp_path, classifier_symbol()))
    assert symbol.version == (1, 9, 1)
    assert [symbol.nodes[index].name for index, _ in symbol.heads] == ["softmax"]
    assert shape_of(symbol)["fc"] == ["flatten0", "fc_weight", "fc_bias"]
    assert symbol.nodes[2].attrs["kernel"] == "(3, 3)"
    assert symbol.labels == {"softmax_label"}
    assert symbol.input_name({"conv0_weight", "fc_weight", "fc_bias"}) == "data"


def test_a_symbol_of_0_8_is_upgraded(tmp_path: Path) -> None:
    symbol = read_symbol(written(tmp_path, old_symbol()))
    assert symbol.version == (0, 8, 0)
    assert shape_of(symbol) == {
        "conv0": ["data", "conv0_weight"],
        "bn0": ["conv0", "bn0_gamma", "bn0_beta", "bn0_moving_mean", "bn0_moving_var"],
        "bn1": ["bn0", "bn1_gamma", "bn1_beta", "bn1_moving_mean", "bn1_moving_var"],
        "best": ["bn1"],
    }
    nodes = {one.name: one for one in symbol.nodes}
    assert nodes["conv0"].attrs == {"kernel": "(3, 3)", "num_filter": "4", "no_bias": "True"}
    assert nodes["best"].attrs == {}
    assert all(index < at for at, one in enumerate(symbol.nodes) for index, _ in one.inputs)
    assert symbol.nodes[symbol.heads[0][0]].name == "best"


def test_a_symbol_of_0_8_is_upgraded_as_mxnet_does(mxnet_python: Path, tmp_path: Path) -> None:
    path = written(tmp_path, old_symbol())
    done = subprocess.run([mxnet_python, "-c", LOAD_WITH_MXNET, path], check=True, capture_output=True, text=True)
    arguments, states, outputs = json.loads(done.stdout.splitlines()[-1])
    symbol = read_symbol(path)
    assert {one.name for one in symbol.nodes if one.op == "null"} == {*arguments, *states}
    assert outputs == [f"{symbol.nodes[index].name}_output" for index, _ in symbol.heads]


def test_what_a_variable_says_of_its_shape_is_kept(tmp_path: Path) -> None:
    data = node("null", "data", __shape__="(0, 3, 8, 8)", __lr_mult__="2", __init__="zero")
    path = written(tmp_path, symbol_of(data, node("Flatten", "flat", [0])))
    assert read_symbol(path).nodes[0].attrs == {"__shape__": "(0, 3, 8, 8)"}


def test_the_input_is_told_from_parameters_and_labels(tmp_path: Path) -> None:
    two = symbol_of(node("null", "left"), node("null", "right"), node("elemwise_add", "sum", [0, 1]))
    symbol = read_symbol(written(tmp_path, two))
    assert symbol.input_name({"left"}) == "right"
    with pytest.raises(ModelError, match="2 variables without parameters: `left`, `right`"):
        symbol.input_name(())
    with pytest.raises(ModelError, match="has no input"):
        symbol.input_name(("left", "right"))


def change(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.update(fields)


def change_node(index: int, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["nodes"][index].update(fields)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(nodes=None), "no symbol of MXNet: it has no nodes and heads"),
        (change(heads=[]), "it has no heads"),
        (change(heads=[[99, 0, 0]]), "a head names no earlier node"),
        (change(heads=[[-1, 0, 0]]), "a head names no earlier node"),
        (change(attrs={"mxnet_version": "new"}), "its mxnet_version is"),
        (change_node(2, inputs=[[2, 0, 0]]), r"an input of node 2 \('conv0'\) names no earlier node"),
        (change_node(2, inputs=[[7, 0, 0]]), "names no earlier node"),
        (change_node(2, inputs=[[True, 0, 0]]), "names no earlier node"),
        (change_node(2, inputs=[0]), "names no earlier node"),
        (change_node(2, inputs=[[0, 0, 0, 0]]), "names no earlier node"),
        (change_node(2, inputs="all"), "node 2 lacks an op, a name or its inputs"),
        (change_node(2, name=7), "node 2 lacks"),
        (change_node(2, attrs={"kernel": 3}), "attributes that are no texts"),
        (change_node(2, attrs=["kernel"]), "attributes that are no texts"),
        (change_node(2, subgraphs=[{}]), "runs a graph inside of this one"),
        (change_node(5, inputs=[[0, 0, 0]]), "is a variable, and has inputs"),
        (change_node(2, name="c" * 600), "node 2 has a name of 600 characters"),
        (change_node(2, name="\ud800"), r"node 2 \('\\ud800'\) has a name that is no Unicode text"),
        (change_node(2, op="\ud800"), r"node 2 \('conv0'\) has a name that is no Unicode text"),
        (change_node(2, inputs=[[0, 0, 0]] * 100_001), "its nodes have 100009 inputs"),
        (change_node(5, name="fc_bias"), "two variables are called 'fc_bias'"),
        (lambda data: data["nodes"].insert(0, 7), "node 0 is no object"),
    ],
)
def test_what_is_no_graph_is_told(damage: Callable[[dict[str, Any]], None], message: str, tmp_path: Path) -> None:
    data = classifier_symbol()
    damage(data)
    path = written(tmp_path, data)
    with pytest.raises(ModelError, match=message) as caught:
        read_symbol(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "is not JSON"),
        ("[1, 2]", "no symbol of MXNet"),
        ('{"x": "' + "y" * (16 << 20) + '"}', "larger than 16 MiB"),
    ],
)
def test_what_is_no_json_is_told(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        read_symbol(written(tmp_path, text))


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the symbol .* cannot be read: No such file"):
        read_symbol(tmp_path / "x-symbol.json")
    (tmp_path / "x-symbol.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelError, match="is not JSON"):
        read_symbol(tmp_path / "x-symbol.json")


def test_a_symbol_is_told_from_a_card_by_what_it_holds() -> None:
    assert is_symbol(json.dumps(classifier_symbol()).encode())
    for content in (b'{"name": "x", "files": {}}', b"[]", b"", b"name: x", b"[" * 100_000):
        assert not is_symbol(content)


def read_or_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        symbol = read_symbol(path)
    except ModelError:
        return
    assert all(index < at for at, one in enumerate(symbol.nodes) for index, _ in one.inputs)


def test_flipped_bits_are_read_or_refused(tmp_path: Path) -> None:
    chance = random.Random(0)
    for data in (classifier_symbol(), old_symbol()):
        content = json.dumps(data).encode()
        for _ in range(200):
            damaged = bytearray(content)
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
            read_or_refused(tmp_path / "x-symbol.json", bytes(damaged))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 12) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 9), st.sampled_from(["op", "name", "inputs", "attrs", "param", "subgraphs"]), JSON, JSON)
def test_made_up_nodes_are_read_or_refused(tmp_path: Path, at: int, field: str, value: Any, heads: Any) -> None:
    data = classifier_symbol()
    data["nodes"][at][field] = value
    read_or_refused(tmp_path / "x-symbol.json", json.dumps(data).encode())
    read_or_refused(tmp_path / "x-symbol.json", json.dumps(data | {"heads": heads}).encode())
