"""Small MXNet checkpoints, as models."""

from pathlib import Path
from typing import Any

from infermill.models.card_file import parse_card
from infermill.models.model import Model
from infermill.models.opening import open_model
from infermill.types import StoreOptions

IMAGENET = {"scale": 1 / 255, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
CARDS: dict[str, dict[str, Any]] = {
    "residual": {"preprocess": {"resize": {"exact": [32, 32]}, **IMAGENET}},
    "grey": {"task": "raw", "preprocess": {"resize": {"exact": [28, 28]}, "scale": 1 / 255}},
    "rows": {"task": "raw", "preprocess": None},
}


def card_of(prefix: Path, **fields: Any) -> dict[str, Any]:
    """The card of one of the checkpoints that `mxnet_small` writes; `preprocess` is what follows the resizing."""
    card = {"name": prefix.name, **CARDS[prefix.name], **fields}
    if fields.get("preprocess") is not None:
        card["preprocess"] = {"resize": CARDS[prefix.name]["preprocess"]["resize"], **fields["preprocess"]}
    files = {"symbol": f"{prefix}-symbol.json", "params": f"{prefix}-0000.params"}
    return card | {"files": files}


def checkpoint_model(prefix: Path, **fields: Any) -> Model:
    """One of them, opened."""
    return open_model(parse_card(card_of(prefix, **fields), "test"), StoreOptions())
