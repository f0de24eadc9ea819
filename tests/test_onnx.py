"""ONNX files, read without running them: what they hold."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from infermill.errors import ModelError
from infermill.models.fit import check_network
from infermill.models.guess import guess_card
from infermill.models.onnx import (
    NetworkInfo,
    TensorInfo,
    external_files,
    external_names,
    inspect_network,
    read_network,
)
from infermill.types import CardOptions
from tests.networks import Network, tiny_classifier, tiny_quantised


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


def test_a_quantised_network_is_computed_in_int8(tmp_path: Path) -> None:
    info = inspect_network(tiny_quantised(tmp_path / "int8.onnx"))
    assert info.is_quantised
    assert [info.computed_in(precision) for precision in ("fp32", "bf16")] == ["int8", "int8+bf16"]
    plain = inspect_network(tmp_path / "float.onnx")
    assert [plain.computed_in(precision) for precision in ("fp32", "bf16")] == ["fp32", "bf16"]
    assert (info.inputs[0].op, info.outputs[0].op) == (plain.inputs[0].op, plain.outputs[0].op)


def test_weights_alone_and_16_bits_are_not_int8(tmp_path: Path) -> None:
    assert not inspect_network(tiny_quantised(tmp_path / "int16.onnx", bits=16)).is_quantised
    net = Network()
    for name, values in (("w", np.ones((3, 4), np.int8)), ("zero", np.int8(0))):
        net.weights.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    weight = net.node("DequantizeLinear", "w", net.weight(np.array(0.5)), "zero")
    net.node("MatMul", "rows", weight, name="out")
    rows, out = (helper.make_tensor_value_info(name, 1, ["N", size]) for name, size in (("rows", 3), ("out", 4)))
    assert not inspect_network(net.save(tmp_path / "weights.onnx", [rows], [out])).is_quantised


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
