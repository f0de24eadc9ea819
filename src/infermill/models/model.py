"""A model that is ready to be loaded: its card, with every file on this machine."""

from dataclasses import dataclass
from pathlib import Path

from infermill.models.card import ModelCard


@dataclass(frozen=True, slots=True)
class Model:
    """A card with its files resolved. `digest` is the sha256 over everything that predictions depend on."""

    card: ModelCard
    network: Path
    labels: tuple[str, ...] | None
    digest: str
