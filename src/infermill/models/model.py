"""A model that is ready to be loaded: its card, with every file on this machine, checked against each other."""

import hashlib
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infermill.errors import ModelError
from infermill.models.card import ModelCard, digest_of, parse_card, read_card
from infermill.models.guess import guess_card
from infermill.models.onnx import check_network, external_files, external_names, inspect_network
from infermill.stores import STORE_ERRORS, Location, explain, locate, open_store
from infermill.types import CardOptions, StoreOptions

CARD_SUFFIXES = (".yaml", ".yml", ".json")
MAX_LABELS_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Model:
    """A card with its files resolved. `digest` is the sha256 over everything that predictions depend on."""

    card: ModelCard
    network: Path
    labels: tuple[str, ...] | None
    digest: str
    assumptions: tuple[str, ...] = ()
    "What was guessed because neither a card nor an option said it."


def open_model(
    model: str | os.PathLike[str] | ModelCard, store: StoreOptions, card_options: CardOptions | None = None
) -> Model:
    """Read a card or a bare `.onnx`, fetch what lies in a store, and check that everything fits.

    Args:
        model: a path or URI of a card (`.yaml`, `.yml`, `.json`) or of a network (`.onnx`), or a card, whose
            relative paths then hang below the current folder.
        store: how remote files are reached.
        card_options: what overrides the card.

    Raises:
        ModelError: a file is missing, the card is wrong, or the network does not fit it.
        StoreError: access is denied, or the store does not answer.

    Example:
        >>> open_model("model.yaml", StoreOptions()).digest  # doctest: +SKIP
        'sha256:5f0c…'
    """
    card, base, assumptions = open_card(model, store, card_options or CardOptions())
    network = network_of(card, base, store)
    labels = _read_labels(card, base, store)
    check_network(card, labels, inspect_network(network))
    digest = digest_of(card, labels, {"onnx": network, **external_files(network)})
    return Model(card, network, labels, digest, assumptions)


def open_card(
    model: str | os.PathLike[str] | ModelCard, store: StoreOptions, given: CardOptions
) -> tuple[ModelCard, Location, tuple[str, ...]]:
    """The card with its options, the place that its relative paths hang beside, and what was assumed."""
    assumptions: tuple[str, ...] = ()
    if isinstance(model, ModelCard):
        card, base = model, locate(Path.cwd()).joined("card")
    else:
        base = locate(model)
        if base.path.lower().endswith(".onnx"):
            network = _network_here(base, store)
            card, assumptions = guess_card(Path(_name(base)), inspect_network(network))
        elif base.path.lower().endswith(CARD_SUFFIXES):
            card = read_card(_file_here(base, store, "the model card"))
        else:
            raise ModelError(f"{base.uri} is neither a model card nor a network", "pass model.yaml or network.onnx")
    return _with_options(card, given), base, assumptions


def network_of(card: ModelCard, base: Location, store: StoreOptions) -> Path:
    """The card's network, on this machine."""
    return _network_here(beside(base, card.files.onnx), store)


def _with_options(card: ModelCard, given: CardOptions) -> ModelCard:
    data: dict[str, Any] = card.model_dump(mode="json")
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
    }
    resize = dict(data["preprocess"]["resize"] or {})
    if given.shorter is not None or given.exact is not None:
        resize |= {"shorter": given.shorter, "exact": given.exact}
    if given.filter is not None:
        resize["filter"] = given.filter
    fields["preprocess", "resize"] = resize if resize != (data["preprocess"]["resize"] or {}) else None
    for (*parents, name), value in fields.items():
        if value is not None:
            target = data
            for parent in parents:
                target = target[parent]
            target[name] = value
    return parse_card(data, "the card, with the options of the command line")


def _read_labels(card: ModelCard, base: Location, store: StoreOptions) -> tuple[str, ...] | None:
    if not isinstance(card.labels, str):
        return card.labels
    place = beside(base, card.labels)
    path = _file_here(place, store, "the labels file")
    if path.stat().st_size > MAX_LABELS_BYTES:
        raise ModelError(f"{place.uri} is larger than 16 MiB", "a labels file holds one label a line")
    try:
        return tuple(line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines())
    except UnicodeDecodeError:
        raise ModelError(f"{place.uri} is not UTF-8 text", "a labels file holds one label a line") from None


def beside(base: Location, name: str) -> Location:
    """What a path or URI in a card means: relative ones hang beside the card."""
    if "://" in name or Path(name).is_absolute():
        return locate(name)
    return Location(base.scheme, base.container, os.path.normpath(Path(base.path).parent / name))


def _name(place: Location) -> str:
    return place.path.rpartition("/")[2]


def _network_here(place: Location, store: StoreOptions) -> Path:
    path = _file_here(place, store, "the network")
    if not place.is_local:
        for name in external_names(path):
            _file_here(beside(place, name), store, f"the network's data file {name}", path.parent / name)
    return path


def _file_here(place: Location, store: StoreOptions, what: str, to: Path | None = None) -> Path:
    """The file on this machine; an object is downloaded once per etag."""
    if place.is_local:
        path = Path(place.uri)
        if not path.is_file():
            raise ModelError(f"{what} {path} does not exist", "paths in a card are relative to the card")
        return path
    try:
        client = open_store(place, store)
        meta = client.head(place.path)
        if to is None:
            version = hashlib.sha256(f"{place.uri}\n{meta['e_tag']}\n{meta['size']}".encode()).hexdigest()[:32]
            to = cache_folder() / "models" / version / _name(place)
        if not (to.is_file() and to.stat().st_size == meta["size"]):
            _download(client.get(place.path), to)
    except STORE_ERRORS as error:
        problem = explain(error, place.uri)
        if isinstance(error, FileNotFoundError):
            raise ModelError(f"{what}: {problem.message}", problem.hint) from None
        raise problem from None
    return to


def _download(chunks: Any, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    private = to.with_name(f".{to.name}.{uuid.uuid4().hex}")
    try:
        with private.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
        private.replace(to)
    finally:
        private.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Where infermill keeps what can be had again: `$XDG_CACHE_HOME/infermill`, or `~/.cache/infermill`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "infermill"
