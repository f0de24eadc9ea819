"""The pickles of CIFAR: a dict of arrays of integers, lists and texts, which may come from anybody.

Nothing that a pickle names is called, and neither NumPy nor Python reads it with its own code: both allot whatever size
they are told, and die of some states of an array, and of the hash of tuples that lie deep enough in each other.
"""

import io
import pickle
import re
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

# An object may be a hundred times as large as its piece of the file. CIFAR-100 has 50,000 names of files, of up to 15
# pieces each, and 100,000 labels.
_MAX_PIECES = 2_000_000
_INTEGERS = re.compile("[<>|=]?[iu][1248]")


def unpickled(content: bytes) -> dict[Any, Any]:
    """The dict that a pickle holds; `numbers` and `text_of` take what is in it. What it allots is bounded by the file.

    Raises:
        UnpicklingError: it holds something else. Damage raises whatever comes of it, as Python's own unpickler does.

    Example:
        >>> numbers(unpickled(pickle.dumps({b"labels": [3, 1]}))[b"labels"])
        array([3, 1])
    """
    found = _Unpickler(content).load()
    if not isinstance(found, dict):
        raise pickle.UnpicklingError("it is no pickled dict")
    return found


def numbers(found: Any) -> NDArray[Any]:
    """An array, or a list of integers; of lists in lists, which may share them, NumPy would make any size.

    Raises:
        UnpicklingError: it is something else.
    """
    if isinstance(found, _Array):
        return found.values
    if not isinstance(found, list) or not all(type(one) is int for one in found):
        raise pickle.UnpicklingError("it has no list of integers where one is wanted")
    return np.array(found, np.int64)


def text_of(found: Any) -> str:
    """A text, which Python 2 pickled as bytes.

    Raises:
        UnpicklingError: it is something else.
    """
    if not isinstance(found, str | bytes):
        raise pickle.UnpicklingError("it has no text where one is wanted")
    return found.decode() if isinstance(found, bytes) else found


class _Type:
    """A NumPy type of integers while a pickle says it: `i8`, and then its state `<` or `>`."""

    def __init__(self, code: Any, *_: object) -> None:
        self._code, self._order = text_of(code), ""

    def __setstate__(self, state: Any) -> None:
        self._order = text_of(state[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        name = self._order + self._code
        if not _INTEGERS.fullmatch(name):
            raise pickle.UnpicklingError(f"it has an array of the type {name[:20]!r}")
        return np.dtype(name)


class _Array:
    """A NumPy array while a pickle says what it holds: its shape comes later, with its bytes."""

    def __init__(self, *_: object) -> None:
        self.values: NDArray[Any] = np.empty(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, content = state
        self.values = np.frombuffer(content, dtype.dtype).reshape(shape, order="F" if is_fortran else "C")


def _array(content: bytes, dtype: _Type, shape: tuple[int, ...], order: str) -> _Array:
    """An array in a pickle of protocol 5."""
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", content))
    return array


_ALLOWED = {
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): None,  # what `_reconstruct` is told to make
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.numeric", "_frombuffer"): _array,
    ("numpy._core.numeric", "_frombuffer"): _array,
}


class _Pieces(io.BytesIO):
    """The bytes of a pickle, in no more pieces than CIFAR takes."""

    _left = _MAX_PIECES

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise pickle.UnpicklingError("it holds more objects than a file of CIFAR")
        return super().read(size)


class _Names(dict[Any, Any]):
    """A dict whose keys are texts."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, str | bytes):
            raise pickle.UnpicklingError("it has a dict whose keys are no texts")
        super().__setitem__(key, value)


def _put_dict(unpickler: Any) -> None:
    unpickler.append(_Names())


def _put_dict_of_mark(unpickler: Any) -> None:
    if unpickler.pop_mark():  # Python fills it later
        raise pickle.UnpicklingError("it fills a dict in a way that is not Python's")
    unpickler.append(_Names())


def _put_bytes(unpickler: Any) -> None:
    unpickler.load_binbytes8()


def _skip_frame(unpickler: Any) -> None:
    unpickler.read(8)


def _set_state(unpickler: Any) -> None:
    state, made = unpickler.stack.pop(), unpickler.stack[-1]
    if not isinstance(made, _Type | _Array):
        raise pickle.UnpicklingError("it sets the state of what has none")
    made.__setstate__(state)


def _refuse_set(unpickler: Any) -> None:
    raise pickle.UnpicklingError("it has a set, which no file of CIFAR has")


class _Unpickler(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = pickle._Unpickler.dispatch | {
        pickle.EMPTY_DICT[0]: _put_dict,
        pickle.DICT[0]: _put_dict_of_mark,
        pickle.BYTEARRAY8[0]: _put_bytes,
        pickle.BUILD[0]: _set_state,
        pickle.FRAME[0]: _skip_frame,
        pickle.EMPTY_SET[0]: _refuse_set,
        pickle.FROZENSET[0]: _refuse_set,
    }

    def __init__(self, content: bytes) -> None:
        super().__init__(_Pieces(content), encoding="bytes")
        self._left_bytes = len(content)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return self._encoded
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed") from None

    def _encoded(self, text: str, encoding: Any) -> bytes:
        """How Python 3 pickles bytes for Python 2."""
        self._left_bytes -= len(text)
        if text_of(encoding) != "latin1" or self._left_bytes < 0:
            raise pickle.UnpicklingError("it encodes a text in a way that is not Python's")
        return text.encode("latin1")
