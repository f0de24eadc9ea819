"""A model card as a user writes it: read from YAML or plain data, checked, and written."""

import difflib
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml
from pydantic import TypeAdapter, ValidationError
from yaml.constructor import ConstructorError

from infermill.errors import ModelError, guide
from infermill.models.card import ModelCard
from infermill.models.files import CARD, read_bounded

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_CARD = TypeAdapter(ModelCard)
MAX_SCALAR_CHARS = 4096
_FIELDS_HINT = f"see {guide('model-card.md')} for every field"
# PyYAML's own, and what it lets through where a scalar or a nesting is not what its tag or Python can take.
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError)


class _CardLoader(yaml.SafeLoader):
    """YAML less what lets a small file cost much: merge keys, which multiply, and endless numbers."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise ConstructorError(None, None, "a model card has no merge keys (`<<`)", key.start_mark)
        super().flatten_mapping(node)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        if len(node.value) > MAX_SCALAR_CHARS:
            raise ConstructorError(None, None, f"a value is longer than {MAX_SCALAR_CHARS} characters", node.start_mark)
        return super().construct_scalar(node)


def read_card(path: Path) -> ModelCard:
    """Read a card from a local YAML file of at most 1 MiB.

    Raises:
        ModelError: the file cannot be read, is not YAML, or is no card.
    """
    content = read_bounded(path, CARD)
    try:
        data = yaml.load(content.decode(), _CardLoader)  # noqa: S506 - a SafeLoader
    except _YAML_ERRORS as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{path} is not YAML: {reason}", f"see {guide('model-card.md')} for an example") from None
    return parse_card(data, str(path))


def write_card(card: ModelCard) -> str:
    """The card as YAML, without the fields that keep their default."""
    data = _CARD.dump_python(card, mode="json", exclude_defaults=True)
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
    if "\x85" in text:  # PyYAML writes this line break unquoted, and reads it back as a space
        return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=100)
    return text


def parse_card(data: Any, where: str = "the card") -> ModelCard:
    """Check the content of a card.

    Args:
        data: a dict, as YAML has it.
        where: what an error calls it.

    Raises:
        ModelError: a field is unknown (the nearest one is named) or has a wrong value.

    Example:
        >>> parse_card({"name": "tiny", "files": {"onnx": "tiny.onnx"}}).task
        'classification'
    """
    if not isinstance(data, dict):
        raise ModelError(f"{where} is not a model card", "a card is YAML with at least `name:` and `files:`")
    try:
        return _CARD.validate_python(data)
    except ValidationError as error:
        problems = error.errors()
        for problem in problems:  # first, since a misspelt field is also a missing one
            if problem["type"] == "unexpected_keyword_argument":
                field = ".".join(map(str, problem["loc"]))
                raise ModelError(f"{where}: unknown field `{field}`", _nearest(problem["loc"])) from None
        if problems[0]["type"] == "literal_error":
            raise _no_such_word(where, problems[0]) from None
        reason = "Input should have fields" if problems[0]["type"] == "dataclass_type" else problems[0]["msg"]
        message = f"{where}: `{_path(problems[0]['loc'])}`: {reason.removeprefix('Value error, ')}"
        raise ModelError(message, _FIELDS_HINT) from None


def _no_such_word(where: str, problem: "ErrorDetails") -> ModelError:
    """One of a few words, and another one is given."""
    words, given = re.findall(r"'([^']*)'", problem["ctx"]["expected"]), str(problem["input"])
    near = difflib.get_close_matches(given, words, n=1)
    hint = f"did you mean `{near[0]}`?" if near else _FIELDS_HINT
    return ModelError(f"{where}: `{_path(problem['loc'])}`: {problem['msg']}, not {given[:100]!r}", hint)


def _path(loc: tuple[int | str, ...]) -> str:
    """The field's path, without the names that pydantic gives the alternatives of a union."""
    names = {path.rpartition(".")[2] for path in _fields(ModelCard)}
    return ".".join(str(part) for part in loc if isinstance(part, int) or part in names)


def _nearest(loc: tuple[int | str, ...]) -> str:
    parent = ".".join(str(part) for part in loc[:-1])
    known = sorted(path for path in _fields(ModelCard) if path.rpartition(".")[0] == parent)
    everywhere = {path.rpartition(".")[2]: path for path in _fields(ModelCard)}
    name = str(loc[-1])
    for match in difflib.get_close_matches(name, [path.rpartition(".")[2] for path in known], n=1):
        return f"did you mean `{parent}.{match}`?" if parent else f"did you mean `{match}`?"
    for match in difflib.get_close_matches(name, everywhere, n=1):
        return f"did you mean `{everywhere[match]}`?"
    return f"known fields here: {', '.join(path.rpartition('.')[2] for path in known)}"


def _fields(card: type, prefix: str = "") -> Iterator[str]:
    for one in fields(card):
        yield prefix + one.name
        for kind in (one.type, *get_args(one.type)):
            if isinstance(kind, type) and is_dataclass(kind):
                yield from _fields(kind, f"{prefix}{one.name}.")


def card_schema() -> dict[str, Any]:
    """The JSON Schema of a card (draft 2020-12), as published in docs/model-card.schema.json."""
    said, _, _ = (ModelCard.__doc__ or "").partition("\n")
    draft = "https://json-schema.org/draft/2020-12/schema"
    name = "urn:infermill:model-card"
    return {"$schema": draft, "$id": name, **_CARD.json_schema(), "title": "infermill model card", "description": said}
