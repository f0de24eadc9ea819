"""A model card as a YAML file, read and written.

Apart from `card`, since a worker gets cards and reads none.
"""

from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from infermill.errors import ModelError
from infermill.models.card import ModelCard, parse_card
from infermill.models.files import CARD, read_bounded

MAX_SCALAR_CHARS = 4096
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
        raise ModelError(f"{path} is not YAML: {reason}", "see docs/model-card.md for an example") from None
    return parse_card(data, str(path))


def write_card(card: ModelCard) -> str:
    """The card as YAML, without the fields that keep their default."""
    data = card.model_dump(mode="json", exclude_defaults=True)
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
    if "\x85" in text:  # PyYAML writes this line break unquoted, and reads it back as a space
        return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=100)
    return text
