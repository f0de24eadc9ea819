"""The parameters of an MXNet network, as `.params` has them.

    u64 0x112 · u64 0 · u64 n · n arrays · u64 n · n names, each u64 length + UTF-8

    array   u32 magic · [i32 storage · sparse: shape of the stored values] · shape · i32 device · i32 device number
            · i32 dtype · [sparse: i32 dtype and shape of each index] · values · [sparse: indices]

The magic is that of version 1, 2 or 3; before them stood the number of dims. Everything is little-endian
(MXNet 1.9.1: src/ndarray/ndarray.cc `NDArray::Save` and `Load`, include/mxnet/tuple.h).
"""

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infermill.errors import ModelError

_FILE_MAGIC = 0x112
_V1, _V2, _V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
_DENSE, _ROW_SPARSE, _CSR = 0, 1, 2
_INDICES = {_DENSE: 0, _ROW_SPARSE: 1, _CSR: 2}
_BFLOAT16 = 12
_DTYPES = {
    0: "<f4", 1: "<f8", 2: "<f2", 3: "<u1", 4: "<i4", 5: "<i1", 6: "<i8", 7: "?", 8: "<i2", 9: "<u2", 10: "<u4",
    11: "<u8", _BFLOAT16: "<u2",
}  # fmt: skip
_MAX_NDIM = 32
# A hundred times those of the largest networks. An array may take 21 bytes here, and takes half a kilobyte in memory.
_MAX_ARRAYS = 100_000
# A sparse array may say that it is huge in a few bytes; rows that are left out of real ones are some of many.
_MAX_DENSE_FACTOR, _MAX_DENSE_BYTES = 256, 64 << 20
# No ONNX file holds more.
_MAX_SPARSE_BYTES = 2 << 30
_DOWNLOAD_AGAIN = "download or save it again"


@dataclass(frozen=True, slots=True)
class Params:
    """Arrays by name: weights (`arg:`) and running statistics (`aux:`)."""

    arg: Mapping[str, NDArray[Any]]
    aux: Mapping[str, NDArray[Any]]


def read_params(path: Path) -> Params:
    """Read a `.params` file of any version; dense arrays are views of the file, mapped into memory.

    Sparse arrays are made dense, and bfloat16 is widened to float32.

    Args:
        path: a local file.

    Raises:
        ModelError: the file cannot be read, is damaged, is none of MXNet, or has no names that tell weights from
            statistics.

    Example:
        >>> read_params(Path("resnet-18-0000.params")).arg["conv0_weight"].shape  # doctest: +SKIP
        (64, 3, 7, 7)
    """
    try:
        with path.open("rb") as file:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except ValueError:  # mmap of nothing
        raise ModelError(f"{path} is empty", _DOWNLOAD_AGAIN) from None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from None
    if bytes(content[:23]) == b"version https://git-lfs":
        raise ModelError(f"{path} is a Git LFS pointer, not the parameters themselves", "run: git lfs pull")
    try:
        return _sorted_out(_Reader(content).named_arrays())
    except _DamageError as error:
        raise ModelError(f"{path}: {error}", error.hint) from None


class _DamageError(Exception):
    """What is wrong with the file; the caller knows its name."""

    def __init__(self, message: str, hint: str = _DOWNLOAD_AGAIN) -> None:
        super().__init__(message)
        self.hint = hint


def _sorted_out(arrays: Mapping[str, NDArray[Any] | None]) -> Params:
    kinds: dict[str, dict[str, NDArray[Any]]] = {"arg": {}, "aux": {}}
    for full_name, array in arrays.items():
        kind, colon, name = full_name.partition(":")
        if not colon or kind not in kinds:
            raise _DamageError(
                f"the array {full_name!r} is called neither arg:NAME nor aux:NAME, as in a checkpoint",
                "what Gluon's save_parameters wrote has no graph: load it there, and call net.export(PREFIX)",
            )
        if array is not None:
            kinds[kind][name] = array
    return Params(kinds["arg"], kinds["aux"])


class _Reader:
    """Goes through the bytes of a file; every size is held against what is left before anything is made of it."""

    def __init__(self, content: memoryview) -> None:
        self._content = content
        self._at = 0
        self._dense_bytes_left = min(_MAX_SPARSE_BYTES, _MAX_DENSE_BYTES + _MAX_DENSE_FACTOR * len(content))

    def named_arrays(self) -> dict[str, NDArray[Any] | None]:
        if len(self._content) < 8 or self._integer(8) != _FILE_MAGIC:
            raise _DamageError("this is no parameter file of MXNet", "give what MXNet saved as PREFIX-0000.params")
        self._integer(8)
        arrays = [self._array(number) for number in range(self._count("arrays", 4))]
        count = self._count("names", 8)
        if count != len(arrays):
            hint = "save them as a dict of name and array" if count == 0 else _DOWNLOAD_AGAIN
            raise _DamageError(f"it has {len(arrays)} arrays, and names for {count}", hint)
        named: dict[str, NDArray[Any] | None] = {}
        for array in arrays:
            try:
                name = bytes(self._take(self._integer(8), "a name")).decode()
            except UnicodeDecodeError:
                raise _DamageError("a name is not UTF-8") from None
            if name in named:
                raise _DamageError(f"the name {name!r} is there twice")
            named[name] = array
        return named

    def _take(self, size: int, what: str) -> memoryview:
        if not 0 <= size <= len(self._content) - self._at:
            left = len(self._content) - self._at
            raise _DamageError(f"{what} at byte {self._at} takes {size} bytes, and the file has {left} more")
        self._at += size
        return self._content[self._at - size : self._at]

    def _integer(self, size: int, *, signed: bool = False) -> int:
        return int.from_bytes(self._take(size, "a number"), "little", signed=signed)

    def _count(self, what: str, least_bytes: int) -> int:
        count = self._integer(8)
        if count * least_bytes > len(self._content) - self._at:
            raise _DamageError(f"it says that it has {count} {what}, which do not fit into it")
        if count > _MAX_ARRAYS:
            raise _DamageError(f"it has {count} {what}, and networks have fewer than {_MAX_ARRAYS}")
        return count

    def _array(self, number: int) -> NDArray[Any] | None:
        """The next array; None where it has no elements, as a parameter that was never initialised."""
        magic = self._integer(4)
        storage = self._integer(4, signed=True) if magic in (_V2, _V3) else _DENSE
        if storage not in _INDICES:
            raise _DamageError(f"array {number} is stored in the unknown way {storage}")
        stored_shape = None if storage == _DENSE else self._shape(number)
        shape = self._shape(number) if magic in (_V1, _V2, _V3) else self._dims(number, magic, 4, signed=False)
        if shape is None or (magic != _V3 and not shape):
            return None
        if magic != _V3 and 0 in shape:
            raise _DamageError(f"array {number} has no elements: {list(shape)}")
        self._take(8, "the device")
        dtype = self._integer(4, signed=True)
        indices = [(self._integer(4, signed=True), self._shape(number)) for _ in range(_INDICES[storage])]
        if storage == _DENSE:
            return self._values(number, dtype, shape)
        if stored_shape is not None and 0 in stored_shape:  # as it was before the array was computed
            kept = indices[-1][1]
            stored_shape = kept if storage == _CSR or kept is None else (*kept[:1], *shape[1:])
        values = self._values(number, dtype, stored_shape)
        parts = [self._values(number, index_dtype, index_shape) for index_dtype, index_shape in indices]
        return self._densified(number, shape, values, parts)

    def _shape(self, number: int) -> tuple[int, ...] | None:
        ndim = self._integer(4, signed=True)
        return None if ndim == -1 else self._dims(number, ndim, 8, signed=True)

    def _dims(self, number: int, ndim: int, size: int, *, signed: bool) -> tuple[int, ...] | None:
        if not 0 <= ndim <= _MAX_NDIM:
            raise _DamageError(f"array {number} is damaged, or of an unknown version ({ndim:#x})")
        dims = tuple(self._integer(size, signed=signed) for _ in range(ndim))
        if any(dim < -1 for dim in dims):
            raise _DamageError(f"array {number} has the shape {list(dims)}")
        return None if -1 in dims else dims

    def _values(self, number: int, dtype_code: int, shape: tuple[int, ...] | None) -> NDArray[Any]:
        if dtype_code not in _DTYPES or shape is None:
            raise _DamageError(f"array {number} has the unknown type {dtype_code}, or no shape")
        dtype, count = np.dtype(_DTYPES[dtype_code]), math.prod(shape)
        data = self._take(count * dtype.itemsize, f"array {number} of shape {list(shape)}")
        try:
            array = np.frombuffer(data, dtype).reshape(shape)
        except ValueError:  # dims beside a 0 that NumPy cannot count with
            raise _DamageError(f"array {number} has the shape {list(shape)}") from None
        if dtype_code == _BFLOAT16:
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(dtype.newbyteorder("="), copy=False)

    def _densified(
        self, number: int, shape: tuple[int, ...], values: NDArray[Any], indices: list[NDArray[Any]]
    ) -> NDArray[Any]:
        size = math.prod(shape) * values.dtype.itemsize
        self._dense_bytes_left -= size
        if self._dense_bytes_left < 0:
            raise _DamageError(
                f"array {number} is sparse, and would be {size} bytes of shape {list(shape)} when made dense",
                "save it with tostype('default') if that is what it should be",
            )
        rows = len(shape) > 0 and all(index.ndim == 1 and index.dtype.kind in "iu" for index in indices)
        if rows and len(indices) == 1 and values.shape == (len(indices[0]), *shape[1:]):
            where: Any = indices[0]
            are_inside = _are_inside(where, shape[0])
        elif rows and len(indices) == 2 and len(shape) == 2 and len(indices[0]) == shape[0] + 1:
            starts, columns = indices[0].astype(np.int64), indices[1]
            lengths = np.diff(starts)
            fits = values.shape == columns.shape == (starts[-1],) and starts[0] == 0 and bool(np.all(lengths >= 0))
            are_inside = fits and _are_inside(columns, shape[1])
            where = (np.repeat(np.arange(shape[0]), lengths), columns) if are_inside else None
        else:
            are_inside = False
        if not are_inside:
            raise _DamageError(f"array {number} is sparse, and its indices do not fit its shape {list(shape)}")
        dense = np.zeros(shape, values.dtype)
        dense[where] = values
        return dense


def _are_inside(indices: NDArray[Any], length: int) -> bool:
    return len(indices) == 0 or (int(indices.min()) >= 0 and int(indices.max()) < length)
