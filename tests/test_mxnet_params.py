"""Parameters of MXNet: every version and form of the file, and what is no such file."""

import random
import struct
import subprocess
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infermill.errors import ModelError
from infermill.models.mxnet.params import read_params
from tests.checkpoints import (
    CODES,
    V1,
    V2,
    V3,
    array_bytes,
    classifier_arrays,
    csr_bytes,
    params_bytes,
    row_sparse_bytes,
    shape_bytes,
    write_params,
)

SAVE_WITH_MXNET = """
import sys, numpy as np, mxnet as mx
random, saved = np.random.RandomState(0), {}
for dtype in ("float32", "float64", "float16", "uint8", "int32", "int8", "int64"):
    saved["arg:" + dtype] = mx.nd.array(random.randint(0, 100, (3, 4, 5)), dtype=dtype)
saved["arg:bool"] = mx.nd.array(random.randint(0, 2, (3, 4)), dtype="int32").astype("bool")
saved["arg:bfloat16"] = mx.nd.array(random.randn(3, 4)).astype(np.dtype([("bfloat16", np.uint16)]))
values = random.randn(10, 4).astype("float32")
values[[1, 2, 5, 9]] = 0
saved["arg:rows"] = mx.nd.array(values).tostype("row_sparse")
saved["arg:no_rows"] = mx.nd.zeros((10, 4), stype="row_sparse")
saved["aux:csr"] = mx.nd.array(values * (values > 0)).tostype("csr")
saved["aux:empty_csr"] = mx.nd.zeros((10, 4), stype="csr")
mx.nd.save(sys.argv[1], saved)
plain = {name: one.tostype("default") if one.stype != "default" else one for name, one in saved.items()}
plain["arg:bfloat16"] = plain["arg:bfloat16"].astype("float32")
np.savez(sys.argv[2], **{name.split(":")[1]: one.asnumpy() for name, one in plain.items()})
mx.npx.set_np()
more = {"arg:scalar": mx.np.array(3.5), "arg:none": mx.np.zeros((0, 3)), "arg:ones": mx.np.ones((2, 3))}
mx.npx.save(sys.argv[3], more)
"""


@pytest.fixture(scope="module")
def saved(mxnet_python: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What MXNet saved, the same as `.npz`, and what it saved of its NumPy arrays."""
    folder = tmp_path_factory.mktemp("saved")
    files = [folder / name for name in ("saved.params", "plain.npz", "np.params")]
    subprocess.run([mxnet_python, "-c", SAVE_WITH_MXNET, *files], check=True, capture_output=True)
    return files


def test_what_mxnet_saved_is_read_as_it_is(saved: list[Path]) -> None:
    params, plain = read_params(saved[0]), np.load(saved[1])
    assert set(params.aux) == {"csr", "empty_csr"}
    assert {*params.arg, *params.aux} == set(plain)
    for name, array in {**params.arg, **params.aux}.items():
        assert array.dtype == plain[name].dtype, name
        np.testing.assert_array_equal(array, plain[name], name)
    shapes = {name: array.shape for name, array in read_params(saved[2]).arg.items()}
    assert shapes == {"scalar": (), "none": (0, 3), "ones": (2, 3)}


@pytest.mark.parametrize("version", [None, V1, V2, V3])
def test_every_version_and_type(version: int | None, tmp_path: Path) -> None:
    arrays = {f"arg:{name}": np.arange(6).reshape(1, 2, 3).astype(name) for name in CODES}
    params = read_params(write_params(tmp_path / "x.params", arrays, version))
    assert params.aux == {}
    for name, array in arrays.items():
        found = params.arg[name.removeprefix("arg:")]
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("is_late", [False, True])
def test_sparse_arrays_are_made_dense(is_late: bool, tmp_path: Path) -> None:
    """MXNet, if it does not wait, writes the shape that the values had before the array was computed."""
    values = np.array([[1, 2], [3, 4]], np.float32)
    stored = (0,) if is_late else None
    content = params_bytes(
        {
            "arg:rows": row_sparse_bytes(values, [0, 3], [4, 2], stored),
            "aux:csr": csr_bytes(np.array([5, 6, 7], np.float32), [0, 1, 1, 3], [2, 0, 1], [3, 3], stored),
        }
    )
    (tmp_path / "x.params").write_bytes(content)
    params = read_params(tmp_path / "x.params")
    assert params.arg["rows"].tolist() == [[1, 2], [0, 0], [0, 0], [3, 4]]
    assert params.aux["csr"].tolist() == [[0, 0, 5], [0, 0, 0], [6, 7, 0]]


def test_an_array_that_was_never_initialised_is_left_out(tmp_path: Path) -> None:
    none = struct.pack("<Iii", V2, 0, 0)
    (tmp_path / "x.params").write_bytes(params_bytes({"arg:a": none, "arg:b": array_bytes(np.ones(2, np.float32))}))
    assert set(read_params(tmp_path / "x.params").arg) == {"b"}


ONE = array_bytes(np.ones((2, 3), np.float32))
HUGE = struct.pack("<Ii", V2, 0) + shape_bytes([1 << 40, 1 << 40]) + struct.pack("<iii", 1, 0, 0)
HUGE_SPARSE = row_sparse_bytes(np.ones((1, 1 << 10), np.float32), [0], [1 << 40, 1 << 10])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n", "no parameter file of MXNet"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (params_bytes({"0.weight": ONE}), "neither arg:NAME nor aux:NAME"),
        (params_bytes({"arg:a": ONE})[:-30], "and the file has"),
        (struct.pack("<QQQ", 0x112, 0, 1 << 60), "says that it has 1152921504606846976 arrays"),
        (struct.pack("<QQQ", 0x112, 0, 100_001) + bytes(21) * 100_001, "it has 100001 arrays, and networks have fewer"),
        (struct.pack("<QQQQ", 0x112, 0, 0, 100_001) + bytes(8) * 100_001, "it has 100001 names, and networks"),
        (params_bytes({"arg:a": HUGE}), "array 0 of shape"),
        (params_bytes({"arg:a": HUGE_SPARSE}), "would be 4503599627370496 bytes"),
        (params_bytes({"arg:a": row_sparse_bytes(np.ones((1, 2), np.float32), [4], [4, 2])}), "do not fit its shape"),
        (params_bytes({"arg:a": row_sparse_bytes(np.ones((1, 2), np.float32), [-1], [4, 2])}), "do not fit its shape"),
        (params_bytes({"arg:a": csr_bytes(np.ones(2, np.float32), [0, 2, 1], [0, 1], [2, 2])}), "do not fit its shape"),
        (params_bytes({"arg:a": csr_bytes(np.ones(2, np.float32), [0, 1, 2], [0, 2], [2, 2])}), "do not fit its shape"),
        (params_bytes({"arg:a": struct.pack("<Ii", V2, 7)}), "stored in the unknown way 7"),
        (params_bytes({"arg:a": struct.pack("<Ii", V2, 0) + shape_bytes([-5])}), "has the shape"),
        (params_bytes({"arg:a": struct.pack("<Iii", V2, 0, 33)}), "of an unknown version"),
        (params_bytes({"arg:a": array_bytes(np.ones((0, 2), np.float32))}), "has no elements"),
        (params_bytes({"arg:a": ONE}).replace(b"arg:a", b"arg:\xff"), "not UTF-8"),
        (params_bytes({"arg:a": ONE, "arg:b": ONE}).replace(b"arg:b", b"arg:a"), "is there twice"),
        (struct.pack("<QQQ", 0x112, 0, 1) + ONE + struct.pack("<Q", 0), "1 arrays, and names for 0"),
    ],
)
def test_what_is_no_checkpoint_is_told(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.params"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ModelError, match=message) as caught:
        read_params(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_a_sparse_array_is_never_made_larger_than_a_network(tmp_path: Path) -> None:
    values = np.zeros((3000, 1000), np.float32)  # 12 MB, for which 3 GB would be in proportion
    path = tmp_path / "x.params"
    path.write_bytes(params_bytes({"arg:a": row_sparse_bytes(values, range(3000), [700_000, 1000])}))
    with pytest.raises(ModelError, match="would be 2800000000 bytes"):
        read_params(path)


def test_gluons_parameters_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "x.params").write_bytes(params_bytes({"0.weight": ONE}))
    with pytest.raises(ModelError) as caught:
        read_params(tmp_path / "x.params")
    assert "net.export(PREFIX)" in caught.value.hint


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot read .*x\.params: No such file"):
        read_params(tmp_path / "x.params")


def real_file() -> bytes:
    arrays = {name: array_bytes(array) for name, array in classifier_arrays().items()}
    arrays["arg:rows"] = row_sparse_bytes(np.ones((2, 3), np.float32), [0, 5], [8, 3])
    arrays["aux:csr"] = csr_bytes(np.ones(3, np.float32), [0, 1, 1, 3], [2, 0, 1], [3, 3])
    arrays["aux:old"] = array_bytes(np.ones((2, 2), np.float32), None)
    return params_bytes(arrays)


def read_or_refused(path: Path, content: bytes) -> None:
    """Whatever a file holds: arrays, or a ModelError; and no more memory than the bound that the reader has."""
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with suppress(ModelError):
            read_params(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= (64 << 20) + 256 * len(content) + (1 << 20)


def test_flipped_bits_are_read_or_refused(tmp_path: Path) -> None:
    check_damaged(real_file(), 800, tmp_path)


def test_flipped_bits_of_what_mxnet_saved_are_read_or_refused(saved: list[Path], tmp_path: Path) -> None:
    for file in (saved[0], saved[2]):
        check_damaged(file.read_bytes(), 300, tmp_path)


def check_damaged(content: bytes, count: int, tmp_path: Path) -> None:
    chance = random.Random(0)
    for _ in range(count):
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        read_or_refused(tmp_path / "x.params", bytes(damaged))
    for size in range(0, len(content), 7):
        read_or_refused(tmp_path / "x.params", content[:size])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from([0, 1, 2, 3, 7, 12, 33, 1 << 20, (1 << 31) - 1, V1, V2, V3, 0xFFFFFFFF]), max_size=40),
    st.binary(max_size=64),
)
def test_made_up_arrays_are_read_or_refused(tmp_path: Path, words: list[int], rest: bytes) -> None:
    array = b"".join(struct.pack("<I", word) for word in words) + rest
    read_or_refused(tmp_path / "x.params", params_bytes({"arg:a": array}))
    read_or_refused(tmp_path / "x.params", params_bytes({"arg:a": struct.pack("<Ii", V2, 0) + array, "aux:b": ONE}))
