"""A model that is ready to be loaded: its card, with every file on this machine, checked against each other."""

import hashlib
import os
import stat
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from obstore.exceptions import PreconditionError

from infermill.errors import InfermillError, ModelError, StoreError
from infermill.models.card import MAX_CARD_BYTES, ModelCard, digest_of, parse_card, read_card
from infermill.models.fit import check_network
from infermill.models.guess import check_image_options, guess_card
from infermill.models.onnx import NetworkInfo, describe, external_files, external_names, read_network
from infermill.stores import STORE_ERRORS, Location, explain, locate, open_store
from infermill.types import CardOptions, StoreOptions

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ObjectStore

CARD_SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a file is for; `max_bytes` keeps what is named by mistake from being downloaded."""

    what: str
    hint: str = ""
    max_bytes: int | None = None


CARD = _Kind("the model card", "a model card is a short YAML file; pass the network as .onnx", MAX_CARD_BYTES)
LABELS = _Kind("the labels file", "a labels file holds one label a line", 16 << 20)
NETWORK = _Kind("the network")


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
    card_options = card_options or CardOptions()
    opened = open_card(model, store, card_options)
    labels = read_labels(opened.card, opened.base, store)
    check_network(opened.card, labels, opened.info)
    files = {"onnx": opened.network, **external_files(opened.graph, opened.network)}
    digest = digest_of(opened.card, labels, files)
    given = model if isinstance(model, ModelCard) else os.fspath(model)
    return Model(opened.card, opened.network, labels, digest, opened.assumptions, given, card_options)


@dataclass(frozen=True, slots=True)
class OpenedCard:
    """A card with its options, and its network; relative paths of the card hang beside `base`."""

    card: ModelCard
    base: Location
    assumptions: tuple[str, ...]
    network: Path
    graph: onnx.ModelProto
    info: NetworkInfo


def open_card(model: str | os.PathLike[str] | ModelCard, store: StoreOptions, given: CardOptions) -> OpenedCard:
    """Read a card, or guess one for a bare network, and parse the network once.

    Raises:
        As `open_model`.
    """
    card: ModelCard | None
    if isinstance(model, ModelCard):
        card, base = model, locate(Path.cwd()).joined("card")
    else:
        base = locate(model)
        if base.path.lower().endswith(".onnx"):
            card = None
        elif base.path.lower().endswith(CARD_SUFFIXES):
            card = read_card(_file_here(base, store, CARD))
            _check_labels_beside(card, base)
        else:
            raise ModelError(f"{base.uri} is neither a model card nor a network", "pass model.yaml or network.onnx")
    network = _network_here(base if card is None else beside(base, card.files.onnx), store)
    graph = read_network(network)
    info = describe(graph, network)
    assumptions: tuple[str, ...] = ()
    if card is None:
        card, assumptions = guess_card(Path(_name(base)), info, given)
    return OpenedCard(_with_options(card, given), base, assumptions, network, graph, info)


def _with_options(card: ModelCard, given: CardOptions) -> ModelCard:
    if card.preprocess is None:
        check_image_options(given)
    data: dict[str, Any] = card.model_dump(mode="json")
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
    }
    resize = dict(resize_before)
    if given.shorter is not None or given.exact is not None:
        resize |= {"shorter": given.shorter, "exact": given.exact}
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
    path = _file_here(place, store, LABELS)
    try:
        return tuple(line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines())
    except UnicodeDecodeError:
        raise ModelError(f"{place.uri} is not UTF-8 text", LABELS.hint) from None
    except OSError as error:
        raise _unreadable(LABELS, path, error) from None


def beside(base: Location, name: str) -> Location:
    """What a path or URI in a card means: relative ones hang beside the card."""
    if "://" in name or Path(name).is_absolute():
        return locate(name)
    return Location(base.scheme, base.container, os.path.normpath(Path(base.path).parent / name))


def _name(place: Location) -> str:
    return place.path.rpartition("/")[2]


def _network_here(place: Location, store: StoreOptions) -> Path:
    """The network on this machine, with its data files beside it."""
    if place.is_local:
        return _local_file(place, NETWORK)
    network = _head(place, store, NETWORK)
    path = _folder_of([network]) / _name(place)
    _download(network, path)
    names = external_names(path)
    if not names:
        return path
    data = {name: _head(beside(place, name), store, _Kind(f"the network's data file {name}")) for name in names}
    folder = _folder_of([network, *data.values()])
    for name, found in data.items():
        _download(found, folder / name)
    _write(folder / path.name, network.size, [path.read_bytes()])
    return folder / path.name


def _file_here(place: Location, store: StoreOptions, kind: _Kind) -> Path:
    """The file on this machine; an object is downloaded once per etag."""
    if place.is_local:
        return _local_file(place, kind)
    found = _head(place, store, kind)
    path = _folder_of([found]) / _name(place)
    _download(found, path)
    return path


def _local_file(place: Location, kind: _Kind) -> Path:
    path = Path(place.uri)
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(f"{kind.what} {path} does not exist", "paths in a card are relative to the card") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise _unreadable(kind, path, error) from None
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{kind.what} {path} is not a file", "paths in a card are relative to the card")
    _check_size(kind, str(path), status.st_size)
    return path


def _unreadable(kind: _Kind, path: Path, error: OSError | ValueError) -> ModelError:
    reason = error.strerror if isinstance(error, OSError) else error
    shown = "".join(char if char.isprintable() else "?" for char in str(path))
    return ModelError(f"{kind.what} {shown} cannot be read: {reason}", "check the path and its permissions")


def _check_size(kind: _Kind, shown: str, size: int) -> None:
    if kind.max_bytes is not None and size > kind.max_bytes:
        raise ModelError(f"{kind.what} {shown} is larger than {kind.max_bytes >> 20} MiB", kind.hint)


@dataclass(frozen=True, slots=True)
class _Found:
    """An object in a store, as it was when it was looked at."""

    client: "ObjectStore"
    place: Location
    kind: _Kind
    etag: str | None
    size: int
    version: str


def _head(place: Location, store: StoreOptions, kind: _Kind) -> _Found:
    with _store_errors(place, kind):
        client = open_store(place, store)
        meta = client.head(place.path)
    _check_size(kind, place.uri, meta["size"])
    version = f"{place.uri}\n{meta['e_tag'] or meta['last_modified']}\n{meta['size']}"
    return _Found(client, place, kind, meta["e_tag"], meta["size"], version)


def _folder_of(found: Sequence[_Found]) -> Path:
    """The folder of the cache for files that belong together, each in the version that was found."""
    versions = hashlib.sha256("\n".join(one.version for one in found).encode()).hexdigest()
    return cache_folder() / "models" / versions[:32]


def _download(found: _Found, to: Path) -> None:
    _write(to, found.size, _content(found))


def _content(found: _Found) -> Iterator[Any]:
    options: GetOptions = {"if_match": found.etag} if found.etag else {}
    with _store_errors(found.place, found.kind):
        yield from found.client.get(found.place.path, options=options)


@contextmanager
def _store_errors(place: Location, kind: _Kind) -> Iterator[None]:
    try:
        yield
    except PreconditionError:
        raise StoreError(f"{place.uri} was overwritten while it was downloaded", "run the same command again") from None
    except STORE_ERRORS as error:
        problem = explain(error, place.uri)
        if isinstance(error, FileNotFoundError):
            raise ModelError(f"{kind.what}: {problem.message}", problem.hint) from None
        raise problem from None


def _write(to: Path, size: int, chunks: Iterable[Any]) -> None:
    """Put a file of so many bytes into the cache, unless it is there; `chunks` raises no OSError of its own."""
    try:
        if to.is_file() and to.stat().st_size == size:
            return
        to.parent.mkdir(0o700, parents=True, exist_ok=True)
        private = to.with_name(f".{uuid.uuid4().hex}")
        try:
            with private.open("xb") as file:
                for chunk in chunks:
                    file.write(chunk)
            private.replace(to)
        finally:
            private.unlink(missing_ok=True)
    except OSError as error:
        raise InfermillError(
            f"the cache folder {cache_folder()} cannot be written: {error.strerror}",
            "set XDG_CACHE_HOME to a folder that can be written, and has room",
        ) from None


def cache_folder() -> Path:
    """Where infermill keeps what can be had again: `$XDG_CACHE_HOME/infermill`, or `~/.cache/infermill`.

    Raises:
        InfermillError: the variable is not set, and the user has no home.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "infermill"
    except RuntimeError:
        raise InfermillError("there is no home folder for the cache", "set XDG_CACHE_HOME to a folder") from None
