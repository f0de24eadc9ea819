"""The attributes of a node of `symbol.json`: text, as MXNet's parameter structs print and parse it."""

import math
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from infermill.errors import ModelError
from infermill.models.mxnet.symbol import Node
from infermill.models.onnx import shown

_Value = TypeVar("_Value")
_TRUE, _FALSE = ("True", "true", "1"), ("False", "false", "0")
# More elements, or more digits than any length needs, are an attack. Python 2 wrote integers in tuples as `3L`.
_MAX_ELEMENTS = 1024
_INTEGER = re.compile(r"([+-]?\d{1,18})L?")


class Attributes:
    """The attributes of one node by type; where a default is None, MXNet has none.

    Each method raises ModelError where the text cannot be read, or is missing and has no default.

    Example:
        >>> Attributes(Node("Pooling", "pool", {"kernel": "(3, 3)"}, ())).integers("kernel")
        (3, 3)
    """

    def __init__(self, node: Node) -> None:
        self._node = node

    def boolean(self, name: str, default: bool) -> bool:
        """`True`, `true`, `1` or their opposites; `None` is the default."""
        return self._parsed(name, default, lambda text: default if text == "None" else _boolean(text), "True or False")

    def integer(self, name: str, default: int | None = None) -> int:
        """An integer."""
        return self._parsed(name, default, _integer, "an integer")

    def optional_integer(self, name: str) -> int | None:
        """An integer, or None where the attribute is missing or `None`."""
        return None if self._is_none(name) else self.integer(name)

    def number(self, name: str, default: float | None = None) -> float:
        """A number, or infinity; never NaN."""
        return self._parsed(name, default, _number, "a number")

    def optional_number(self, name: str) -> float | None:
        """A number, or None where the attribute is missing or `None`."""
        return None if self._is_none(name) else self.number(name)

    def integers(self, name: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """A tuple of integers, also of one without brackets. An empty tuple is MXNet's way to say the default."""
        return (
            self._parsed(name, default, lambda text: _elements(text, _integer), "a tuple of integers") or default or ()
        )

    def optional_integers(self, name: str, default: tuple[int | None, ...] | None = None) -> tuple[int | None, ...]:
        """A tuple of integers and `None`."""
        return self._parsed(
            name, default, lambda text: _elements(text, _optional_integer), "a tuple of integers and None"
        )

    def numbers(self, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
        """A tuple of numbers."""
        return self._parsed(name, default, lambda text: _elements(text, _number), "a tuple of numbers")

    def choice(self, name: str, choices: Sequence[str], default: str | None = None) -> str:
        """One of these words."""
        value = self._parsed(name, default, str, "a word")
        if value not in choices:
            raise self._unreadable(name, f"one of {', '.join(choices)}")
        return value

    def _is_none(self, name: str) -> bool:
        return self._node.attrs.get(name, "None").strip() == "None"

    def _parsed(self, name: str, default: _Value | None, parse: Callable[[str], _Value], expected: str) -> _Value:
        text = self._node.attrs.get(name)
        if text is not None:
            try:
                return parse(text.strip())
            except ValueError:
                raise self._unreadable(name, expected) from None
        if default is None:
            raise ModelError(
                f"{described(self._node)} lacks the attribute `{name}`",
                "the symbol file is damaged, or not MXNet's: export it again",
            )
        return default

    def _unreadable(self, name: str, expected: str) -> ModelError:
        text = repr(self._node.attrs.get(name))[:100]
        return ModelError(
            f"{described(self._node)}: its attribute `{name}` is {text}, and not {expected}",
            "the symbol file is damaged, or of an MXNet that has other attributes: export it again with MXNet 1.9.1",
        )


def described(node: Node) -> str:
    """A node, as messages name it.

    Example:
        >>> described(Node("Pooling", "pool0", {}, ()))
        'node `pool0` (Pooling)'
    """
    return f"node `{shown(node.name)}` ({shown(node.op)})"


def _boolean(text: str) -> bool:
    if text not in _TRUE + _FALSE:
        raise ValueError(text)
    return text in _TRUE


def _integer(text: str) -> int:
    match = _INTEGER.fullmatch(text)
    if match is None:
        raise ValueError(text)
    return int(match[1])


def _optional_integer(text: str) -> int | None:
    return None if text == "None" else _integer(text)


def _number(text: str) -> float:
    value = float(text)
    if math.isnan(value):
        raise ValueError(text)
    return value


def _elements(text: str, parse: Callable[[str], _Value]) -> tuple[_Value, ...]:
    if (text[:1], text[-1:]) in (("(", ")"), ("[", "]")):
        inner = text[1:-1].strip().removesuffix(",")
        if inner.count(",") >= _MAX_ELEMENTS:
            raise ValueError(text)
        return tuple(parse(element.strip()) for element in inner.split(",")) if inner else ()
    return (parse(text),)
