"""A model as one file: `pack` writes it, `unpack` checks it and lays the model out in the cache.

    model.json        the card, the labels, and which of the files is the network
    network/…         the ONNX file and its files with weights, under the names that it knows them by; or the two
                      files of an MXNet checkpoint (network/symbol/…, network/params/…), translated where they arrive

It is a zip without compression (weights hardly shrink), and the same model always gives the same bytes.
"""

import json
import shutil
import uuid
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from infermill.errors import InfermillError, ModelError
from infermill.models.card import digest_of, plain_fields
from infermill.models.card_file import parse_card
from infermill.models.files import cache_errors, cache_folder, cache_lock
from infermill.models.model import Model, digested_files
from infermill.models.mxnet.checkpoint import Checkpoint, translated
from infermill.models.onnx import external_files, read_network

_INDEX = "model.json"
_FOLDER = "network"
# Zip has no year before 1980; with a fixed time the same model gives the same bytes.
_TIME = (1980, 1, 1, 0, 0, 0)
_CHUNK_BYTES = 1 << 20
# What `zipfile` and `json` raise on files that are not what they should be.
_DAMAGE = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, LookupError, TypeError, ValueError)


def pack(model: Model, path: Path) -> None:
    """Write a model into one file, which appears at `path` when it is complete.

    Args:
        model: the model; its files are read once more.
        path: the file, in a folder that exists.

    Raises:
        ModelError: a file of the model cannot be read.
        InfermillError: the file cannot be written.

    Example:
        >>> pack(open_model("model.yaml", StoreOptions()), Path("model.zip"))  # doctest: +SKIP
    """
    network = model.network
    index: dict[str, Any] = {"card": plain_fields(model.card), "labels": model.labels}
    if model.checkpoint is None:
        index["network"] = network.name
        files = {network.name: network, **external_files(read_network(network), network)}
    else:
        index["checkpoint"] = {role: path.name for role, path in model.checkpoint.files.items()}
        files = {f"{role}/{path.name}": path for role, path in model.checkpoint.files.items()}
    private = path.with_name(f".{uuid.uuid4().hex}")
    try:
        with zipfile.ZipFile(private, "x") as archive:
            archive.writestr(zipfile.ZipInfo(_INDEX, _TIME), json.dumps(index))
            for name, file in sorted(files.items()):
                _add(archive, f"{_FOLDER}/{name}", file)
        private.replace(path)
    except OSError as error:
        raise InfermillError(f"{path} cannot be written: {error.strerror}", "check the folder and the disk") from None
    finally:
        private.unlink(missing_ok=True)


def _add(archive: zipfile.ZipFile, name: str, file: Path) -> None:
    entry = zipfile.ZipInfo(name, _TIME)
    try:
        source = file.open("rb")
        entry.file_size = file.stat().st_size
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror}", "check the path and its permissions") from None
    with source, archive.open(entry, "w") as target:
        shutil.copyfileobj(source, target, _CHUNK_BYTES)


def unpack(path: Path, digest: str) -> Model:
    """Lay a packed model out in the cache folder, once per digest and machine, and open it.

    Args:
        path: what `pack` wrote.
        digest: the digest of the model that was packed.

    Raises:
        ModelError: the file is missing or damaged, or holds another model.
        InfermillError: the cache folder cannot be written.

    Example:
        >>> unpack(Path("model.zip"), "sha256:5f0c…").card.name  # doctest: +SKIP
        'resnet18'
    """
    folder = cache_folder() / "models" / digest.removeprefix("sha256:")
    with cache_lock(folder.name):
        if folder.is_dir():
            try:
                return _open(folder, digest)
            except ModelError:  # somebody wrote into the cache
                shutil.rmtree(folder, ignore_errors=True)
        private = folder.with_name(f".{uuid.uuid4().hex}")
        try:
            _extract(path, private)
            model = _open(private, digest)
            with cache_errors():
                private.rename(folder)
        finally:
            shutil.rmtree(private, ignore_errors=True)
    if model.checkpoint is None:
        return replace(model, network=folder / model.network.relative_to(private))
    moved = {role: folder / path.relative_to(private) for role, path in model.checkpoint.files.items()}
    return replace(model, checkpoint=Checkpoint(**moved))


def _extract(path: Path, folder: Path) -> None:
    try:
        archive, size = zipfile.ZipFile(path), path.stat().st_size
    except OSError as error:
        raise ModelError(f"the packed model {path} cannot be read: {error.strerror}", "pack it again") from None
    except _DAMAGE as error:
        raise _damaged(path, error) from None
    with archive, cache_errors():
        entries = archive.infolist()
        if not _is_plain(entries, size):
            raise ModelError(
                f"{path} is not a packed model: it has entries that `pack` does not write", "pack it again"
            )
        for entry in entries:
            target = folder / entry.filename
            target.parent.mkdir(0o700, parents=True, exist_ok=True)
            try:
                with archive.open(entry) as source, target.open("xb") as file:
                    shutil.copyfileobj(source, file, _CHUNK_BYTES)
            except _DAMAGE as error:
                raise _damaged(path, error) from None


def _is_plain(entries: Sequence[zipfile.ZipInfo], size_bytes: int) -> bool:
    """Whether every entry lies where `pack` puts it, and all of them are no larger than the archive."""
    for entry in entries:
        place = PurePosixPath(entry.filename)
        is_inside = place.parts[0] == _FOLDER and len(place.parts) > 1 and ".." not in place.parts
        if str(place) != entry.filename or not (is_inside or entry.filename == _INDEX):
            return False
        if entry.compress_type != zipfile.ZIP_STORED:
            return False
    return sum(entry.file_size for entry in entries) <= size_bytes


def _open(folder: Path, digest: str) -> Model:
    """The model in a folder, whose digest is computed from its files."""
    try:
        index = json.loads((folder / _INDEX).read_bytes())
        labels = None if index["labels"] is None else tuple(index["labels"])
        names = {role: PurePosixPath(name).name for role, name in index.get("checkpoint", {}).items()}
        files = {role: folder / _FOLDER / role / name for role, name in names.items()}
        checkpoint = Checkpoint(**files) if files else None
        network = folder / _FOLDER / PurePosixPath(index.get("network", "")).name
        card = parse_card(index["card"], f"the card in {folder}")
    except (OSError, *_DAMAGE) as error:
        raise _damaged(folder, error) from None
    if checkpoint is not None:
        network = translated(checkpoint, card.height_width)
    model = Model(card, network, labels, digest, checkpoint=checkpoint)
    found = current_digest(model)
    if found != digest:
        raise ModelError(f"the packed model is another one: {found}, and not {digest}", "pack it again")
    return model


def current_digest(model: Model) -> str:
    """The digest of a model's files as they are now; `model.digest` is that of when it was opened.

    Raises:
        ModelError: a file cannot be read.
    """
    files = digested_files(model.network, read_network(model.network), model.checkpoint)
    return digest_of(model.card, model.labels, files)


def _damaged(path: Path, error: Exception) -> ModelError:
    return ModelError(f"the packed model {path} is damaged: {error}", "pack it again")
