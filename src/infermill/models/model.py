"""A model: a card with every file on this machine."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from infermill.models.card import ModelCard
from infermill.models.onnx import external_files
from infermill.types import CardOptions

if TYPE_CHECKING:
    from infermill.models.mxnet.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Model:
    """A card with its files resolved. `digest` is the sha256 over everything that predictions depend on."""

    card: ModelCard
    network: Path
    labels: tuple[str, ...] | None
    digest: str
    assumptions: tuple[str, ...] = ()
    "What was guessed because neither a card nor an option said it."
    given: str | ModelCard | None = None
    "What it was opened from: a URI, a path, or a card."
    card_options: CardOptions = field(default_factory=CardOptions)
    "What overrode the card."
    checkpoint: "Checkpoint | None" = None
    "The files of MXNet that `network` is a translation of."


def in_fp32(model: Model) -> Model:
    """The same network, to be computed in fp32: what a lower precision is compared with.

    Its digest is still that of `model`.

    Example:
        >>> in_fp32(open_model("model.yaml", StoreOptions())).card.precision  # doctest: +SKIP
        'fp32'
    """
    return replace(model, card=replace(model.card, precision="fp32"))


def digested_files(network: Path, graph: onnx.ModelProto, checkpoint: "Checkpoint | None") -> Mapping[str, Path]:
    """The files that make a network what it is: name in the model -> local file.

    Of a checkpoint those are MXNet's own, so that it has one digest, however it is executed.

    Raises:
        ModelError: a file with weights is missing.
    """
    if checkpoint is not None:
        return checkpoint.files
    return {"onnx": network, **external_files(graph, network)}
