"""A model from its card or its network: opened, with every file on this machine, checked against each other."""

import os
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from infermill.errors import ModelError
from infermill.models.card import HeightWidth, ModelCard, digest_of
from infermill.models.card_file import parse_card, read_card
from infermill.models.files import (
    CARD,
    LABELS,
    SYMBOL,
    beside,
    file_here,
    label_lines,
    name_of,
    network_here,
    read_bounded,
    unreadable,
)
from infermill.models.fit import check_network
from infermill.models.guess import Known, check_image_options, guess_card
from infermill.models.model import Model, digested_files
from infermill.models.onnx import NetworkInfo, describe, read_network
from infermill.stores import Location, locate
from infermill.types import CardOptions, StoreOptions

if TYPE_CHECKING:
    from infermill.models.mxnet.checkpoint import Checkpoint, Found

CARD_SUFFIXES = (".yaml", ".yml", ".json")


def open_model(
    model: str | os.PathLike[str] | ModelCard, store: StoreOptions, card_options: CardOptions | None = None
) -> Model:
    """Read a card or a bare network, fetch what lies in a store, and check that everything fits.

    Args:
        model: a path or URI of a card (`.yaml`, `.yml`, `.json`), of a network (`.onnx`) or of an MXNet checkpoint
            (its symbol, parameters, prefix or archive), or a card, whose relative paths then hang below the current
            folder.
        store: how remote files are reached.
        card_options: what overrides the card.

    Raises:
        ModelError: a file is missing, the card is wrong, or the network does not fit it.
        StoreError: access is denied, or the store does not answer.

    Example:
        >>> open_model("model.yaml", StoreOptions()).digest  # doctest: +SKIP
        'sha256:5f0c…'
    """
    card_options = card_options or CardOptions()
    opened = open_card(model, store, card_options)
    labels = read_labels(opened.card, opened.base, store)
    check_network(opened.card, labels, opened.info)
    files = digested_files(opened.network, opened.graph, opened.checkpoint)
    digest = digest_of(opened.card, labels, files)
    given = model if isinstance(model, ModelCard) else os.fspath(model)
    return Model(
        opened.card, opened.network, labels, digest, opened.assumptions, given, card_options, opened.checkpoint
    )


@dataclass(frozen=True, slots=True)
class OpenedCard:
    """A card with its options, and its network; relative paths of the card hang beside `base`."""

    card: ModelCard
    base: Location
    assumptions: tuple[str, ...]
    network: Path
    graph: onnx.ModelProto
    info: NetworkInfo
    checkpoint: "Checkpoint | None" = None


def open_card(model: str | os.PathLike[str] | ModelCard, store: StoreOptions, given: CardOptions) -> OpenedCard:
    """Read a card, or guess one for a bare network, and parse the network once.

    Raises:
        As `open_model`.
    """
    if isinstance(model, ModelCard):
        return _open_with_card(model, locate(Path.cwd()).joined("card"), store, given)
    base = locate(model)
    suffix = Path(base.path).suffix.lower()
    if suffix == ".onnx":
        _check_epoch(given, name_of(base))
        return _guessed(network_here(base, store), base, given)
    if suffix in CARD_SUFFIXES and not _is_symbol(base, store):
        card = read_card(file_here(base, store, CARD))
        _check_labels_beside(card, base)
        return _open_with_card(card, base, store, given)
    from infermill.models.mxnet.checkpoint import find_checkpoint, translated

    found = find_checkpoint(base, store, given.epoch)
    if found is None:
        hint = "pass model.yaml, network.onnx, or an MXNet checkpoint: PREFIX-symbol.json, PREFIX or model.mar"
        raise ModelError(f"{base.uri} is neither a model card nor a network", hint)
    return _guessed(translated(found.checkpoint, _size_given(given) or found.height_width), base, given, found)


def _check_epoch(given: CardOptions, shown: str) -> None:
    if given.epoch is not None:
        raise ModelError(f"--epoch is given, and {shown} says itself which parameters are meant", "leave --epoch out")


def _size_given(given: CardOptions) -> HeightWidth | None:
    return given.crop or given.exact or given.letterbox


def _is_symbol(base: Location, store: StoreOptions) -> bool:
    """Whether a `.json` is no card but the graph of an MXNet checkpoint."""
    if not base.path.endswith(".json"):
        return False
    from infermill.models.mxnet.symbol import is_symbol

    return is_symbol(read_bounded(file_here(base, store, SYMBOL), SYMBOL))


def _open_with_card(card: ModelCard, base: Location, store: StoreOptions, given: CardOptions) -> OpenedCard:
    _check_epoch(given, f"the card {card.name!r}")
    card = _with_options(card, given)
    checkpoint = None
    if card.files.onnx is None:
        from infermill.models.mxnet.checkpoint import checkpoint_of, translated

        checkpoint = checkpoint_of(card.files, base, store)
        network = translated(checkpoint, card.height_width)
    else:
        network = network_here(beside(base, card.files.onnx), store)
    graph = read_network(network)
    return OpenedCard(card, base, (), network, graph, describe(graph, network), checkpoint)


def _guessed(network: Path, base: Location, given: CardOptions, found: "Found | None" = None) -> OpenedCard:
    graph = read_network(network)
    info = describe(graph, network)
    if found is None:
        card, notes = guess_card(Path(name_of(base)), info, given)
        return OpenedCard(_with_options(card, given), base, notes, network, graph, info)
    from infermill.models.mxnet.families import family_of
    from infermill.models.mxnet.symbol import read_symbol

    family = family_of(read_symbol(found.checkpoint.symbol))
    known = Known(found.files, family.task, found.labels, family.preprocess, f"those of {family.name}")
    card, notes = guess_card(Path(found.files.network), info, given, known)
    card, notes = replace(card, name=found.name), (*found.notes, *notes)
    size = card.height_width
    if size is not None and found.height_width is None and _size_given(given) is None:
        notes = (f"the size of images is {size[0]}x{size[1]}, the first usual one that the network takes", *notes)
    return OpenedCard(_with_options(card, given), base, notes, network, graph, info, found.checkpoint)


def _with_options(card: ModelCard, given: CardOptions) -> ModelCard:
    if card.preprocess is None:
        check_image_options(given)
    data: dict[str, Any] = asdict(card)
    resize_before = (data["preprocess"] or {}).get("resize") or {}
    fields: dict[tuple[str, ...], Any] = {
        ("task",): given.task,
        # An option is relative to where the command runs, a card's field to the card.
        ("labels",): given.labels and locate(given.labels).uri,
        ("classes",): given.classes,
        ("preprocess", "crop"): given.crop and {"center": given.crop},
        ("preprocess", "color"): given.color,
        ("preprocess", "scale"): given.scale,
        ("preprocess", "mean"): given.mean,
        ("preprocess", "std"): given.std,
        ("input", "layout"): given.layout,
        ("output", "activation"): given.activation,
        ("output", "top_k"): given.top_k,
        ("output", "format"): given.format,
        ("output", "score_threshold"): given.score_threshold,
        ("output", "iou_threshold"): given.iou_threshold,
        ("output", "max_detections"): given.max_detections,
        ("precision",): given.precision,
    }
    resize = dict(resize_before)
    size = {"shorter": given.shorter, "exact": given.exact, "letterbox": given.letterbox}
    if any(value is not None for value in size.values()):
        resize |= size
    if given.filter is not None:
        resize["filter"] = given.filter
    fields["preprocess", "resize"] = resize if resize != resize_before else None
    for (*parents, name), value in fields.items():
        if value is not None:
            target = data
            for parent in parents:
                target = target[parent]
            target[name] = value
    return parse_card(data, "the card, with the options of the command line")


def _check_labels_beside(card: ModelCard, base: Location) -> None:
    """Refuse a card that would have another file's lines written to the output: whoever wrote it may not read them."""
    if not isinstance(card.labels, str):
        return
    place, folder = beside(base, card.labels), beside(base, ".")
    inside = place.container == folder.container and Path("/", place.path).is_relative_to(Path("/", folder.path))
    if inside and place.is_local:
        with suppress(OSError, RuntimeError, ValueError):  # told when it is read; RuntimeError: links in a circle
            inside = Path(place.uri).resolve().is_relative_to(Path(folder.uri).resolve())
    if not inside:
        raise ModelError(
            f"{base.uri}: the labels file {card.labels!r} is outside the card's folder",
            "put it beside the card, as a file and not as a link, or name it with --labels",
        )


def read_labels(card: ModelCard, base: Location, store: StoreOptions) -> tuple[str, ...] | None:
    """The labels that a card names, whose paths are relative to `base`."""
    if not isinstance(card.labels, str):
        return card.labels
    place = beside(base, card.labels)
    path = file_here(place, store, LABELS)
    try:
        return label_lines(path.read_bytes())
    except UnicodeDecodeError:
        raise ModelError(f"{place.uri} is not UTF-8 text", LABELS.hint) from None
    except OSError as error:
        raise unreadable(LABELS, path, error) from None
