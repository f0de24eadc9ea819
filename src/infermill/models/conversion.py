"""What `infermill convert` writes: a network as ONNX, and the card for it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from infermill.durable import create_durably
from infermill.errors import UsageError
from infermill.models.card import Files
from infermill.models.card_file import write_card
from infermill.models.fit import check_network
from infermill.models.inspection import card_beside, write_new
from infermill.models.onnx import external_tensors, load_weights
from infermill.models.opening import open_card, read_labels
from infermill.types import CardOptions, StoreOptions


@dataclass(frozen=True, slots=True)
class Conversion:
    """The two files that were written, and what was assumed."""

    network: Path
    card: Path
    assumptions: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The conversion as plain JSON types."""
        return {"network": str(self.network), "card": str(self.card), "assumptions": list(self.assumptions)}


def convert_model(model: str, output: Path, store: StoreOptions, card: CardOptions) -> Conversion:
    """Write an MXNet checkpoint as ONNX, and a card beside it under the same name.

    Args:
        model: a symbol, parameters, their prefix, an archive, or a card that names them: a path or a URI.
        output: the `.onnx` to write; it and its `.yaml` must not be there.
        store: how remote files are reached.
        card: what the card is to say.

    Raises:
        ModelError: the checkpoint cannot be read or translated, or the options do not fit it.
        UsageError: a file is there already, or the model is ONNX as it is.

    Example:
        >>> convert_model("resnet-18", Path("resnet-18.onnx"), StoreOptions(), CardOptions()).card  # doctest: +SKIP
        PosixPath('resnet-18.yaml')
    """
    if output.suffix != ".onnx":
        raise UsageError(f"{output} does not end in .onnx", "name the file to write, as in -o resnet-18.onnx")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {output.parent}", "name a file in a folder that is there")
    card_path = output.with_suffix(".yaml")
    for path in (output, card_path):
        if path.exists():
            raise UsageError(f"{path} is there already", "name a new file")
    opened = open_card(model, store, card)
    if opened.checkpoint is None:
        raise UsageError(f"{model} is ONNX already", "copy it; `infermill inspect` with --write writes a card for it")
    check_network(opened.card, read_labels(opened.card, opened.base, store), opened.info)
    written = card_beside(opened.card, opened.base, store, card_path)
    written = replace(written, name=output.stem, files=Files(onnx=output.name))
    load_weights(external_tensors(opened.graph, opened.network))
    create_new(output, opened.graph.SerializeToString())
    write_new(card_path, write_card(written))
    return Conversion(output, card_path, opened.assumptions)


def create_new(path: Path, content: bytes) -> None:
    """Write a file that is not there yet, whole or not at all.

    Raises:
        UsageError: it is there, or cannot be written.
    """
    try:
        create_durably(path, content)
    except FileExistsError:
        raise UsageError(f"{path} is there already", "name a new file") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", "name a file in a folder that can be written") from None
