"""An archive of MXNet Model Server (`.mar`, before 1.0 `.model`): the checkpoint inside, and what is told beside it.

    MAR-INF/MANIFEST.json    or MANIFEST.json: which files are the model's
    resnet-18-symbol.json    resnet-18-0000.params
    signature.json           {"inputs": [{"data_name": "data", "data_shape": [0, 3, 224, 224]}], …}; 0 is the batch
    synset.txt               labels
    service.py, …            handlers

Handlers stay where they are, and are never run.
"""

import hashlib
import json
import os
import re
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from infermill.errors import ModelError
from infermill.models.files import LABELS, MAX_SYMBOL_BYTES, cache_folder, label_lines, write_cached

ARCHIVE_SUFFIXES = (".mar", ".model")
_MAX_PARAMS_BYTES = 4 << 30
_MAX_TEXT_BYTES = 1 << 20
_MAX_LABELS_BYTES = LABELS.max_bytes or _MAX_TEXT_BYTES
_MAX_DIRECTORY_BYTES = 4 << 20
# Weights hardly shrink; what shrinks more than this is made to fill a disk.
_MAX_RATIO, _SMALL_BYTES = 100, 64 << 20
_CHUNK_BYTES = 1 << 20
# The end of a zip, in front of a comment of up to 64 KiB, says how long its list of contents is; and before it, in a
# record of 56 bytes and one of 20 that says where that is, in 64 bits.
_MAX_TAIL_BYTES = 56 + 20 + 22 + (1 << 16)
_WORDNET_ID = re.compile(r"^n\d{8}\s+")
_DAMAGE = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, LookupError, ValueError)
_EXPECTED = "give an archive that MXNet's model-archiver made, with PREFIX-symbol.json and PREFIX-0000.params in it"


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What an archive holds, laid out in the cache folder. `shape` is that of one input, without the batch."""

    symbol: Path
    params: Path
    labels: tuple[str, ...] | None
    shape: tuple[int, ...] | None


def unpack_archive(path: Path) -> Unpacked:
    """Lay the checkpoint of an archive out in the cache folder, once; nothing else of it is unpacked, and nothing run.

    Labels are the lines of synset.txt; WordNet's numbers before them (`n02123045 tabby`) are left out where every
    line has one.

    Args:
        path: a local file.

    Raises:
        ModelError: it cannot be read, is damaged, is no archive of MXNet, or is made to do harm.
        InfermillError: the cache folder cannot be written.

    Example:
        >>> unpack_archive(Path("resnet-18.mar")).labels[0]  # doctest: +SKIP
        'tench, Tinca tinca'
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _MAX_TAIL_BYTES))
            _check_directory(path, size, file.read())
        archive = zipfile.ZipFile(path)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from None
    except _DAMAGE as error:
        raise _damaged(path, error) from None
    with archive:
        return _Archive(path, archive, cache_folder() / "models" / digest[:32]).unpacked()


def _check_directory(path: Path, size: int, tail: bytes) -> None:
    """Refuse an archive of a million entries, which `zipfile` would list in memory before it can be asked anything."""
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) < at + 22:
        raise ModelError(f"{path} is no zip archive, or it is damaged ({size} bytes)", _EXPECTED)
    (directory_bytes,) = struct.unpack_from("<I", tail, at + 12)
    if tail[max(0, at - 20) : at].startswith(b"PK\6\7") and at >= 76:  # which `zipfile` prefers where it is there
        (directory_bytes,) = struct.unpack_from("<Q", tail, at - 76 + 40)
    if directory_bytes > _MAX_DIRECTORY_BYTES:
        raise ModelError(f"{path} has a list of contents that is too long ({directory_bytes} bytes)", _EXPECTED)


def _damaged(path: Path, error: Exception) -> ModelError:
    return ModelError(f"the archive {path} is damaged: {error}", "download or make it again")


class _Archive:
    """An open archive, of which entries are chosen, checked and unpacked one by one."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, folder: Path) -> None:
        self._path = path
        self._archive = archive
        self._folder = folder
        self._entries = archive.infolist()

    def unpacked(self) -> Unpacked:
        names = self._names()
        symbol = self._only(names, "-symbol.json", "Symbol")
        params = self._only(names, ".params", "Parameters")
        labels = self._lines("synset.txt") if "synset.txt" in names else None
        shape = self._shape() if "signature.json" in names else None
        return Unpacked(self._unpack(symbol, MAX_SYMBOL_BYTES), self._unpack(params, _MAX_PARAMS_BYTES), labels, shape)

    def _names(self) -> tuple[str, ...]:
        names = tuple(entry.filename for entry in self._entries if not entry.is_dir())
        for name in names:
            if name.startswith("/") or ".." in PurePosixPath(name).parts or "\\" in name or ":" in name:
                raise ModelError(f"{self._path} has an entry that lies outside of it: {name!r}", "do not use it")
        (name, count), *_ = Counter(names).most_common(1) or [("", 0)]
        if count > 1:
            raise ModelError(f"{self._path} has {count} entries that are called {name!r}", "make the archive again")
        return names

    def _only(self, names: Sequence[str], suffix: str, role: str) -> str:
        """The entry that the manifest names for a role, or the only one of its kind."""
        found = [name for name in names if name.endswith(suffix)]
        if len(found) > 1:
            found = [name for name in found if PurePosixPath(name).name == self._manifest(names, role)] or found
        if not found:
            raise ModelError(f"{self._path} holds no MXNet network: it has no file …{suffix}", _EXPECTED)
        if len(found) > 1:
            raise ModelError(f"{self._path} has several files …{suffix}: {', '.join(found[:5])}", _EXPECTED)
        return found[0]

    def _manifest(self, names: Sequence[str], role: str) -> str | None:
        for name in ("MANIFEST.json", "MAR-INF/MANIFEST.json"):
            model = self._json(name).get("Model") if name in names else None
            if isinstance(model, dict) and isinstance(model.get(role), str):
                return PurePosixPath(model[role]).name
        return None

    def _shape(self) -> tuple[int, ...] | None:
        match self._json("signature.json").get("inputs"):
            case [{"data_shape": [_, *dims]}] if all(type(dim) is int and 0 < dim < 1 << 20 for dim in dims):
                return tuple(dims)
            case _:
                return None

    def _json(self, name: str) -> dict[str, Any]:
        try:
            data = json.loads(self._read(name, _MAX_TEXT_BYTES))
        except (ValueError, RecursionError):
            raise ModelError(f"{name} in {self._path} is not JSON", "make the archive again") from None
        return data if isinstance(data, dict) else {}

    def _lines(self, name: str) -> tuple[str, ...]:
        try:
            lines = label_lines(self._read(name, _MAX_LABELS_BYTES))
        except UnicodeDecodeError:
            raise ModelError(f"{name} in {self._path} is not UTF-8 text", "make the archive again") from None
        return tuple(_WORDNET_ID.sub("", line) for line in lines) if all(map(_WORDNET_ID.match, lines)) else lines

    def _read(self, name: str, max_bytes: int) -> bytes:
        return b"".join(self._chunks(self._checked(name, max_bytes)))

    def _unpack(self, name: str, max_bytes: int) -> Path:
        entry, to = self._checked(name, max_bytes), self._folder / PurePosixPath(name).name
        write_cached(to, entry.file_size, self._chunks(entry))
        return to

    def _checked(self, name: str, max_bytes: int) -> zipfile.ZipInfo:
        entry = next(entry for entry in self._entries if entry.filename == name)
        where = f"{name!r} in {self._path}"
        if entry.flag_bits & 1:
            raise ModelError(f"{where} is encrypted", "make the archive without a password")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise ModelError(f"{where} is a symbolic link", "make the archive with the file itself")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ModelError(f"{where} is compressed in an unusual way", "make the archive with deflate")
        if entry.file_size > max_bytes:
            raise ModelError(f"{where} is larger than {max_bytes >> 20} MiB", _EXPECTED)
        if entry.file_size > max(_SMALL_BYTES, _MAX_RATIO * entry.compress_size):
            raise ModelError(f"{where} unpacks {entry.compress_size} bytes to {entry.file_size}", "do not use it")
        return entry

    def _chunks(self, entry: zipfile.ZipInfo) -> Iterator[bytes]:
        """The content of an entry; `zipfile` gives no more than the size that was checked, and checks the CRC."""
        try:
            with self._archive.open(entry) as source:
                left = entry.file_size
                while chunk := source.read(min(_CHUNK_BYTES, left + 1)):
                    left -= len(chunk)
                    yield chunk
        except (OSError, *_DAMAGE) as error:
            raise _damaged(self._path, error) from None
        if left:
            raise _damaged(self._path, ValueError(f"{entry.filename} ends early"))
