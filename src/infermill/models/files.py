"""The files of a model on this machine: local ones as they are, objects downloaded into the cache once per version."""

import fcntl
import hashlib
import os
import re
import stat
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obstore.exceptions import PreconditionError

from infermill.errors import InfermillError, ModelError, StoreError
from infermill.models.onnx import external_names
from infermill.stores import STORE_ERRORS, Location, explain, locate, open_store
from infermill.types import StoreOptions

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ObjectStore


@dataclass(frozen=True, slots=True)
class FileKind:
    """What a file is for; `max_bytes` keeps what is named by mistake from being downloaded."""

    what: str
    hint: str = ""
    max_bytes: int | None = None


MAX_SYMBOL_BYTES = 16 << 20
CARD = FileKind("the model card", "a model card is a short YAML file; pass the network as .onnx", 1 << 20)
LABELS = FileKind("the labels file", "a labels file holds one label a line", 16 << 20)
NETWORK = FileKind("the network")
SYMBOL = FileKind("the symbol", "a symbol is the JSON file that MXNet saves as PREFIX-symbol.json", MAX_SYMBOL_BYTES)
PARAMS = FileKind("the parameters file", "parameters are what MXNet saves as PREFIX-0000.params")
ARCHIVE = FileKind("the archive")
_LINE_END = re.compile(r"\r\n?|\n")
_is_trusted = ContextVar("is_trusted", default=True)
PATH_HINT = "check the path; those in a card are relative to the card"


def beside(base: Location, name: str) -> Location:
    """What a path or URI in a card means: relative ones hang beside the card."""
    if "://" in name or Path(name).is_absolute():
        return locate(name)
    return Location(base.scheme, base.container, os.path.normpath(Path(base.path).parent / name))


def name_of(place: Location) -> str:
    return place.path.rpartition("/")[2]


def network_here(place: Location, store: StoreOptions) -> Path:
    """The network on this machine, with its data files beside it."""
    if place.is_local:
        return _local_file(place, NETWORK)
    network = _head(place, store, NETWORK)
    path = _folder_of([network]) / name_of(place)
    _download(network, path)
    names = external_names(path)
    if not names:
        return path
    data = {name: _head(beside(place, name), store, FileKind(f"the network's data file {name}")) for name in names}
    folder = _folder_of([network, *data.values()])
    for name, found in data.items():
        _download(found, folder / name)
    write_cached(folder / path.name, network.size, [path.read_bytes()])
    return folder / path.name


def file_here(place: Location, store: StoreOptions, kind: FileKind) -> Path:
    """The file on this machine; an object is downloaded once per etag."""
    if place.is_local:
        return _local_file(place, kind)
    found = _head(place, store, kind)
    path = _folder_of([found]) / name_of(place)
    _download(found, path)
    return path


def _local_file(place: Location, kind: FileKind) -> Path:
    path = Path(place.uri)
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(f"{kind.what} {path} does not exist", PATH_HINT) from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise unreadable(kind, path, error) from None
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{kind.what} {path} is not a file", PATH_HINT)
    _check_size(kind, str(path), status.st_size)
    return path


def read_bounded(path: Path, kind: FileKind) -> bytes:
    """All of a local file, read no further than its kind allows, whatever size it is said to have.

    Raises:
        ModelError: it cannot be read, or is larger.
    """
    try:
        with path.open("rb") as file:
            content = file.read(-1 if kind.max_bytes is None else kind.max_bytes + 1)
    except OSError as error:
        raise unreadable(kind, path, error) from None
    _check_size(kind, str(path), len(content))
    return content


def label_lines(content: bytes) -> tuple[str, ...]:
    """The lines of a labels file, without a byte order mark; a label may hold what `str.splitlines` ends lines at.

    Raises:
        UnicodeDecodeError: it is not UTF-8.

    Example:
        >>> label_lines(b"tench\\r\\ngoldfish\\n")
        ('tench', 'goldfish')
    """
    text = content.decode("utf-8-sig").rstrip()
    return tuple(line.strip() for line in _LINE_END.split(text)) if text else ()


def unreadable(kind: FileKind, path: Path, error: OSError | ValueError) -> ModelError:
    reason = error.strerror if isinstance(error, OSError) else error
    shown = "".join(char if char.isprintable() else "?" for char in str(path))
    return ModelError(f"{kind.what} {shown} cannot be read: {reason}", "check the path and its permissions")


def _check_size(kind: FileKind, shown: str, size: int) -> None:
    if kind.max_bytes is not None and size > kind.max_bytes:
        raise ModelError(f"{kind.what} {shown} is larger than {kind.max_bytes >> 20} MiB", kind.hint)


@dataclass(frozen=True, slots=True)
class _Found:
    """An object in a store, as it was when it was looked at."""

    client: "ObjectStore"
    place: Location
    kind: FileKind
    etag: str | None
    size: int
    version: str


def _head(place: Location, store: StoreOptions, kind: FileKind) -> _Found:
    with store_errors(place, kind):
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
    write_cached(to, found.size, _content(found))


def _content(found: _Found) -> Iterator[Any]:
    options: GetOptions = {"if_match": found.etag} if found.etag else {}
    with store_errors(found.place, found.kind):
        yield from found.client.get(found.place.path, options=options)


@contextmanager
def store_errors(place: Location, kind: FileKind) -> Iterator[None]:
    try:
        yield
    except PreconditionError:
        raise StoreError(f"{place.uri} was overwritten while it was downloaded", "run the same command again") from None
    except STORE_ERRORS as error:
        problem = explain(error, place.uri)
        if isinstance(error, FileNotFoundError):
            raise ModelError(f"{kind.what}: {problem.message}", problem.hint) from None
        raise problem from None


def write_cached(to: Path, size: int, chunks: Iterable[Any]) -> None:
    """Put a file of so many bytes into the cache, unless it is there; `chunks` raises no OSError of its own."""
    with cache_errors():
        if _is_trusted.get() and to.is_file() and to.stat().st_size == size:
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


@contextmanager
def cache_renewed() -> Iterator[None]:
    """What is opened meanwhile is downloaded again: somebody may have written into the cache."""
    token = _is_trusted.set(False)
    try:
        yield
    finally:
        _is_trusted.reset(token)


def cache_folder() -> Path:
    """Where infermill keeps what can be had again: `$XDG_CACHE_HOME/infermill`, or `~/.cache/infermill`.

    Raises:
        InfermillError: the variable is not set, and the user has no home.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "infermill"
    except RuntimeError:
        raise InfermillError("there is no home folder for the cache", "set XDG_CACHE_HOME to a folder") from None


@contextmanager
def cache_lock(name: str) -> Iterator[None]:
    """Keep other processes of this machine from making the same thing in the cache at once.

    Raises:
        InfermillError: the cache folder cannot be written.
    """
    path = cache_folder() / "models" / f"{name}.lock"
    with cache_errors():
        path.parent.mkdir(0o700, parents=True, exist_ok=True)
        file = path.open("ab")
    with file:
        with cache_errors():
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def cache_errors() -> Iterator[None]:
    """What cannot be written to the cache, in the words of a user."""
    try:
        yield
    except OSError as error:
        raise InfermillError(
            f"the cache folder {cache_folder()} cannot be written: {error.strerror}",
            "set XDG_CACHE_HOME to a folder that can be written, and has room",
        ) from None
