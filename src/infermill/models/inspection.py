"""What `infermill inspect` finds out about a model."""

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from infermill.errors import ModelError, UsageError
from infermill.models.card import ModelCard
from infermill.models.card_file import write_card
from infermill.models.files import beside
from infermill.models.fit import check_network
from infermill.models.onnx import NetworkInfo
from infermill.models.opening import open_card, read_labels
from infermill.stores import Location
from infermill.types import CardOptions, StoreOptions


@dataclass(frozen=True, slots=True)
class Inspection:
    """A network's tensors, and the card for it; `problem` says why that card cannot be used as it is.

    `precision` is what the network's layers would be computed in, where the processor has that.
    """

    network: NetworkInfo
    precision: str
    card_yaml: str
    assumptions: tuple[str, ...]
    problem: str | None
    written: Path | None

    def as_json(self) -> dict[str, Any]:
        """The inspection as plain JSON types."""
        return asdict(self) | {"written": str(self.written) if self.written else None}


def inspect_model(model: str, store: StoreOptions, card: CardOptions, write: Path | None) -> Inspection:
    """Look at a network or a card, and write the card to a new file where one is named.

    Raises:
        ModelError: the network cannot be read, or does not fit the card.
        UsageError: the file to write is there already.
    """
    opened = open_card(model, store, card)
    text = write_card(card_beside(opened.card, opened.base, store, write))
    problem = None
    try:
        check_network(opened.card, None, opened.info)
    except ModelError as error:
        problem = f"{error.message}; {error.hint}"
    if write is not None:
        write_new(write, text)
    return Inspection(
        opened.info, opened.info.computed_in(opened.card.precision), text, opened.assumptions, problem, write
    )


def card_beside(card: ModelCard, base: Location, store: StoreOptions, write: Path | None) -> ModelCard:
    """The card with paths that hold where it is written, and labels from elsewhere as a list.

    Raises:
        ModelError: the labels cannot be read.
    """
    folder = (write or Path("model.yaml")).absolute().parent

    def moved(name: str) -> str:
        place = beside(base, name)
        if not place.is_local:
            return place.uri
        return os.path.relpath(place.uri, folder)

    labels = moved(card.labels) if isinstance(card.labels, str) else card.labels
    if isinstance(labels, str) and ("://" in labels or labels.startswith("..")):
        labels = read_labels(card, base, store)  # a card may not name a file outside of its folder
    files = replace(card.files, **{role: moved(name) for role, name in card.files.given.items()})
    return replace(card, files=files, labels=labels)


def write_new(path: Path, text: str) -> None:
    """Write a file that is not there yet.

    Raises:
        UsageError: it is there, or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"{path} is there already", "name a new file") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", "name a file in a folder that can be written") from None
