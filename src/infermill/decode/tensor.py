"""Arrays, lists of numbers and `.npy` files -> one row of a network that takes tensors.

A row has the network's shape, or is flat with as many numbers. Its type may be another one where NumPy casts within
the same kind (float64 -> float32, int32 -> float32), and between integers; but each value has to fit: what would wrap
around or become infinite is refused.
"""

import io
import math
import tokenize
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.lib import format as npy
from numpy.typing import ArrayLike, NDArray

from infermill.errors import BadInputError
from infermill.types import FailureCode

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

Row = NDArray[np.generic]
# How many bytes tell its length, and what reads it. Version 3.0 is for arrays of structures.
_HEADERS: dict[tuple[int, ...], tuple[int, Any]] = {
    (1, 0): (2, npy.read_array_header_1_0),
    (2, 0): (4, npy.read_array_header_2_0),
}
# A header is a Python dict, of at most 10,000 characters, that NumPy evaluates as a literal: what is no such thing
# comes out as any of these.
_DAMAGE = (
    ArithmeticError,
    LookupError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
    tokenize.TokenError,
)


def tensor_decoder(shape: tuple[int, ...], dtype: str) -> "Callable[[ReadableBuffer], Row]":
    """A function from the bytes of a `.npy` file to one row of a network's input.

    It may be called from many threads at once. It raises BadInputError with the stage `decode` and the code `empty`,
    `unsupported`, `truncated` or `corrupt`, and nothing else; before there is memory for a row, its shape and type are
    known to be right. Python objects (pickles) are not read.

    The format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html

    Example:
        >>> file = io.BytesIO()
        >>> np.save(file, np.arange(3.0))
        >>> tensor_decoder((3,), "float32")(file.getvalue())
        array([0., 1., 2.], dtype=float32)
    """
    wanted = np.dtype(dtype)

    def decode(data: "ReadableBuffer") -> Row:
        content = memoryview(data).cast("B")
        if not content:
            _refuse("empty", "0 bytes")
        if bytes(content[: len(npy.MAGIC_PREFIX)]) != npy.MAGIC_PREFIX[: len(content)]:
            _refuse("unsupported", f"no .npy file: it begins with {bytes(content[:8]).hex(' ')}")
        begin, found_shape, is_fortran, found = _read_header(content)
        _check_fits(found_shape, found, shape, wanted)
        missing = begin + math.prod(found_shape) * found.itemsize - len(content)
        if missing > 0:
            _refuse("truncated", f"the file ends {missing} bytes before the array does")
        if missing < 0:
            _refuse("corrupt", f"{-missing} bytes follow the array")
        values = np.frombuffer(content, found, offset=begin)
        return to_row(values.reshape(found_shape, order="F" if is_fortran else "C"), shape, dtype)

    return decode


def to_row(value: ArrayLike, shape: tuple[int, ...], dtype: str) -> Row:
    """One row of a network's input, as a new array, from an array or (nested) lists of numbers.

    Args:
        value: has the shape of the row, or is flat and has as many numbers.
        shape: that of the row: `Predictor.input_shape`.
        dtype: its type: `Predictor.input_dtype`.

    Raises:
        BadInputError: with the stage `decode` and the code `unsupported`: another shape, something else than
            numbers, or a number that does not fit the type.

    Example:
        >>> to_row([1, 2, 3, 4], (2, 2), "float32")
        array([[1., 2.],
               [3., 4.]], dtype=float32)
    """
    wanted = np.dtype(dtype)
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError) as error:
        _refuse("unsupported", f"no array: {error}")
    _check_fits(array.shape, array.dtype, shape, wanted)
    with np.errstate(over="ignore"):
        row = array.reshape(shape).astype(wanted, order="C")
    if not np.can_cast(array.dtype, wanted, "safe") and not _is_within(array, row):
        _refuse("unsupported", f"a tensor {array.dtype} with values that {wanted} does not have")
    return row


def _read_header(content: memoryview) -> tuple[int, tuple[int, ...], bool, np.dtype[Any]]:
    """Where the values begin, their shape, whether they are in Fortran's order, and their type."""
    version = tuple(content[npy.MAGIC_LEN - 2 : npy.MAGIC_LEN])
    if len(version) == 2 and version not in _HEADERS:
        _refuse("unsupported", f"a .npy file of version {version[0]}.{version[1]}, where 1.0 or 2.0 is wanted")
    length_bytes, read = _HEADERS.get(version, (0, None))
    begin = npy.MAGIC_LEN + length_bytes
    begin += int.from_bytes(content[npy.MAGIC_LEN : begin], "little")
    if read is None or len(content) < begin:
        _refuse("truncated", "the file ends before its header does")
    try:
        return begin, *read(io.BytesIO(content[npy.MAGIC_LEN : begin]))
    except _DAMAGE as error:
        _refuse("corrupt", f"the header of the .npy file is damaged: {' '.join(str(error).split())[:200]}")


def _check_fits(
    found_shape: tuple[int, ...], found: np.dtype[Any], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> None:
    is_flat = found_shape == (math.prod(shape),)
    if not (found_shape == shape or is_flat) or not _can_cast(found, dtype):
        what = (
            "no numbers (null or text are among them)"
            if found.kind in "OSUT"
            else f"a tensor {found} {list(found_shape)}"
        )
        _refuse("unsupported", f"{what}, where {dtype} {list(shape)} is wanted")


def _can_cast(found: np.dtype[Any], dtype: np.dtype[Any]) -> bool:
    # Between integers of any sign, since a list of them is int64, and so are the columns of some tables.
    both_integers = found.kind in "iu" and dtype.kind in "iu"
    return found.kind in "biuf" and (both_integers or np.can_cast(found, dtype, "same_kind"))


def _is_within(array: NDArray[Any], row: NDArray[Any]) -> bool:
    """Whether a cast has kept the values, but for rounding."""
    if row.dtype.kind == "f":
        return np.array_equal(np.isinf(array), np.isinf(row).reshape(array.shape))
    limits = np.iinfo(row.dtype)
    return bool(limits.min <= int(array.min()) and int(array.max()) <= limits.max)


def _refuse(code: FailureCode, message: str) -> NoReturn:
    raise BadInputError("decode", code, message)
