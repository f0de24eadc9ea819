"""`.npy` files, arrays and lists of numbers -> one row of a network's input."""

import io
import pickle
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from infermill.decode.tensor import tensor_decoder, to_row
from infermill.errors import BadInputError
from infermill.models.card import TENSOR_DTYPES

# NumPy warns of headers that it has to mend, which Python 2 wrote; damage may look like one.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:numpy", "ignore::UserWarning:infermill")
dtypes = st.sampled_from(TENSOR_DTYPES)
shapes = hnp.array_shapes(min_dims=0, max_dims=4, max_side=4)


def npy(array: NDArray[Any], version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=version)
    return file.getvalue()


def with_header(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


def refusal(data: bytes, shape: tuple[int, ...] = (3,), dtype: str = "float32") -> tuple[str, str]:
    with pytest.raises(BadInputError) as caught:
        tensor_decoder(shape, dtype)(data)
    failure = caught.value.failure
    assert failure.stage == "decode"
    assert "\n" not in failure.message
    return failure.code, failure.message


# --- what is read


@given(st.data(), shapes, dtypes, st.booleans(), st.booleans(), st.sampled_from([(1, 0), (2, 0)]))
def test_a_row_is_read_as_it_was_written(
    data: st.DataObject,
    shape: tuple[int, ...],
    dtype: str,
    is_fortran: bool,
    is_swapped: bool,
    version: tuple[int, int],
) -> None:
    array = data.draw(hnp.arrays(np.dtype(dtype).newbyteorder("S" if is_swapped else "="), shape))
    written = npy(np.asfortranarray(array).reshape(shape, order="A") if is_fortran else array, version)
    for buffer in (written, memoryview(written), bytearray(written)):
        row = tensor_decoder(shape, dtype)(buffer)
        assert (row.dtype, row.shape, row.flags.c_contiguous) == (np.dtype(dtype), shape, True)
        assert row.dtype.isnative
        np.testing.assert_array_equal(row, array)
    assert not np.shares_memory(row, np.frombuffer(written, np.uint8)), "the bytes of the file can be given back"


@given(st.data(), dtypes, dtypes)
def test_another_type_is_cast_where_its_values_fit(data: st.DataObject, stored: str, wanted: str) -> None:
    array = data.draw(hnp.arrays(stored, (3,)))
    integers = np.dtype(stored).kind in "iu" and np.dtype(wanted).kind in "iu"
    try:
        row = tensor_decoder((3,), wanted)(npy(array))
    except BadInputError as error:
        assert error.failure.code == "unsupported"
        if np.can_cast(stored, wanted, "same_kind") or integers:
            assert not np.can_cast(stored, wanted, "safe")
            with np.errstate(all="ignore"):
                assert array.astype(wanted).tolist() != array.tolist()
        return
    assert np.can_cast(stored, wanted, "same_kind") or integers
    assert row.dtype == wanted
    if np.dtype(wanted).kind in "iu":
        np.testing.assert_array_equal(row, array)
    else:
        np.testing.assert_array_equal(row, array.astype(wanted))
        np.testing.assert_array_equal(np.isinf(row), np.isinf(array))


def test_a_flat_row_is_given_its_shape() -> None:
    flat = np.arange(6, dtype=np.float32)
    np.testing.assert_array_equal(tensor_decoder((2, 3), "float32")(npy(flat)), flat.reshape(2, 3))
    np.testing.assert_array_equal(tensor_decoder((), "float32")(npy(flat[4:5])), 4)


# --- what is refused


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(4, np.float32), "a tensor float32 [4], where float32 [3] is wanted"),
        (np.zeros((1, 3), np.float32), "a tensor float32 [1, 3], where float32 [3] is wanted"),
        (np.zeros((), np.float32), "a tensor float32 [], where"),
        (np.zeros(0, np.float32), "a tensor float32 [0], where"),
        (np.zeros(3, np.complex64), "a tensor complex64 [3], where"),
        (np.zeros(3, "datetime64[s]"), "a tensor datetime64[s] [3], where"),
        (np.zeros(3, [("x", "f4"), ("y", "f4")]), "where float32 [3] is wanted"),
        (np.array(["a", "b", "c"]), "no numbers"),
        (np.array([1e300, 0, 0]), "a tensor float64 with values that float32 does not have"),
    ],
)
def test_another_tensor_is_refused(array: NDArray[Any], message: str) -> None:
    code, told = refusal(npy(array))
    assert code == "unsupported"
    assert message in told


@pytest.mark.parametrize(
    ("values", "stored", "dtype"),
    [([256], "int64", "uint8"), ([-1], "int64", "uint8"), ([2**63], "uint64", "int64"), ([65536.0], "f4", "float16"),
     ([70_000], "int32", "float16"), ([1.0], "float32", "int64"), ([1], "int8", "bool"), ([2**40], "int64", "int32")],
)  # fmt: skip
def test_a_value_that_the_type_does_not_have_is_refused(values: list[Any], stored: str, dtype: str) -> None:
    assert refusal(npy(np.array(values, stored)), (1,), dtype)[0] == "unsupported"


def test_python_objects_are_not_read() -> None:
    class Dangerous:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("it was unpickled",))

    header = "{'descr': '|O', 'fortran_order': False, 'shape': (3,), }"
    assert refusal(with_header(header, pickle.dumps(Dangerous())))[0] == "unsupported"


@pytest.mark.parametrize(
    ("data", "code", "message"),
    [
        (b"", "empty", "0 bytes"),
        (b"PK\x03\x04" + bytes(50), "unsupported", "no .npy file: it begins with 50 4b 03 04 00 00 00 00"),
        (b"\x93NUMPY\x03\x00" + bytes(50), "unsupported", "version 3.0"),
        (b"\x93NUMPY\x09\x01", "unsupported", "version 9.1"),
        (with_header("{'descr': '<f4'"), "corrupt", "header"),
        (with_header(""), "corrupt", "header"),
        (with_header("[1, 2]"), "corrupt", "not a dictionary"),
        (with_header("{'descr': '<f4', 'fortran_order': 0, 'shape': (3,)}"), "corrupt", "fortran_order"),
        (with_header("{'descr': 'nonsense', 'fortran_order': False, 'shape': (3,)}"), "corrupt", "descr"),
        (with_header("-" * 9000 + "1"), "corrupt", "header"),
        (with_header("(" * 9000), "corrupt", "header"),
        (with_header("'" + "x" * 20_000 + "'"), "corrupt", "header"),
        (with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-3,)}"), "unsupported", "[-3]"),
        (with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (10**15,)}"), "corrupt", "header"),
        (with_header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**15},)}}"), "unsupported", "where"),
        (npy(np.zeros(3, np.float32)) + b"!", "corrupt", "1 bytes follow the array"),
    ],
)
def test_a_file_that_is_no_array_is_refused(data: bytes, code: str, message: str) -> None:
    found, told = refusal(data)
    assert found == code
    assert message in told
    assert len(told) < 300


@given(st.integers(1, 139))
def test_a_file_that_ends_early_is_truncated(length: int) -> None:
    whole = npy(np.zeros(3, np.float32))
    assert len(whole) == 140
    assert refusal(whole[:length])[0] == "truncated"


@given(st.binary(max_size=40), st.booleans())
@example(b"\x01\x00\xff\xff", True)
def test_any_bytes_are_a_row_or_refused(data: bytes, has_magic: bool) -> None:
    code, _ = refusal(b"\x93NUMPY" * has_magic + data)
    assert code in {"empty", "unsupported", "truncated", "corrupt"}


@given(st.data())
def test_a_damaged_file_is_a_row_or_refused(data: st.DataObject) -> None:
    content = bytearray(npy(np.arange(3, dtype=np.float32)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 80))] = data.draw(st.integers(0, 255))
    try:
        row = tensor_decoder((3,), "float32")(content)
    except BadInputError as error:
        assert (error.failure.stage, "\n" in error.failure.message) == ("decode", False)
    else:
        assert (row.shape, str(row.dtype)) == ((3,), "float32")


# --- lists


@given(hnp.arrays(np.float32, shapes.filter(lambda shape: shape != ()), elements=st.floats(-1e6, 1e6, width=32)))
def test_lists_are_rows(array: NDArray[np.float32]) -> None:
    for value in (array.tolist(), array.ravel().tolist(), array):
        np.testing.assert_array_equal(to_row(value, array.shape, "float32"), array)


def test_a_row_is_a_copy() -> None:
    array = np.zeros(3, np.float32)
    row = to_row(array, (3,), "float32")
    array[:] = 1
    assert row.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("value", "dtype"),
    [([1, 2, 3], "uint8"), ([True, False, True], "bool"), ([True, False, True], "float32"), ([1, 2, 3], "float16")],
)
def test_python_numbers_have_the_type_of_the_network(value: list[Any], dtype: str) -> None:
    row = to_row(value, (3,), dtype)
    assert (row.tolist(), row.dtype) == (value, np.dtype(dtype))


@pytest.mark.parametrize(
    "value",
    [[1, 2], [1, 2, 3, 4], [[1, 2, 3]], [1, None, 3], [[1], [2, 3], []], "abc", None, [2**70] * 3, {"a": 1}, []],
)
def test_what_is_no_row_is_refused(value: Any) -> None:
    with pytest.raises(BadInputError) as caught:
        to_row(value, (3,), "float32")
    assert (caught.value.failure.stage, caught.value.failure.code) == ("decode", "unsupported")
