"""An MXNet checkpoint: the two files that MXNet wrote, wherever they are, and the network as ONNX in the cache.

    resnet-18 · resnet-18-symbol.json · resnet-18-0000.params · resnet-18.mar
        ─ find_checkpoint ─► symbol and params on this machine ─ translated ─► ~/.cache/infermill/models/…/network.onnx

Everything but the runtime `mxnet` sees nothing else than that ONNX file.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import accumulate
from pathlib import Path

import onnx

from infermill.errors import ModelError
from infermill.models.card import Files, HeightWidth
from infermill.models.files import (
    ARCHIVE,
    PARAMS,
    SYMBOL,
    beside,
    cache_errors,
    cache_folder,
    cache_lock,
    file_here,
    name_of,
    store_errors,
    write_cached,
)
from infermill.models.mxnet.archive import ARCHIVE_SUFFIXES, unpack_archive
from infermill.models.mxnet.families import family_of, input_shapes
from infermill.models.mxnet.operators import OPERATORS
from infermill.models.mxnet.params import read_params
from infermill.models.mxnet.symbol import read_symbol
from infermill.models.mxnet.translate import translate
from infermill.models.onnx import external_tensors, read_network
from infermill.stores import Location, open_store
from infermill.types import StoreOptions

_SYMBOL_SUFFIX, _PARAMS_SUFFIX = "-symbol.json", ".params"
_WEIGHTS_FILE = "network.weights"
# Shorter ones say shapes and axes, which must be in the graph for other shapes to be told.
_LONG_WEIGHTS_BYTES = 4096
_EPOCH_OF = re.compile(r"(.+)-(\d{4,9})\.params", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An MXNet network as MXNet wrote it, on this machine: what the runtime `mxnet` executes."""

    symbol: Path
    params: Path

    @property
    def files(self) -> Mapping[str, Path]:
        """What a model's digest covers."""
        return {"symbol": self.symbol, "params": self.params}


@dataclass(frozen=True, slots=True)
class Found:
    """The checkpoint that a path, a prefix or an archive stands for, and what is told of it beside its graph."""

    checkpoint: Checkpoint
    name: str
    files: Files
    "As a card beside it names them."
    labels: tuple[str, ...] | None = None
    height_width: HeightWidth | None = None
    notes: tuple[str, ...] = ()


def find_checkpoint(place: Location, store: StoreOptions, epoch: int | None) -> Found | None:
    """What stands at `place`: a symbol, parameters, the prefix of both, or an archive; None where it is none of them.

    Args:
        place: where to look.
        store: how remote files are reached.
        epoch: which one; None for the newest.

    Raises:
        ModelError: one of the two files is missing, or there is no such epoch.
        StoreError: access is denied, or the store does not answer.

    Example:
        >>> find_checkpoint(locate("resnet-18"), StoreOptions(), None).name  # doctest: +SKIP
        'resnet-18'
    """
    name = name_of(place)
    if name.lower().endswith(ARCHIVE_SUFFIXES):
        return _in_archive(place, store, epoch)
    if name.endswith(_PARAMS_SUFFIX):
        match = _EPOCH_OF.fullmatch(name)
        if epoch is not None and (match is None or int(match[2]) != epoch):
            raise ModelError(f"{place.uri} is not epoch {epoch}, which --epoch asks for", "give one of the two")
        stem = match[1] if match else name.removesuffix(_PARAMS_SUFFIX)
        if not _has_symbol(beside(place, stem), store):
            raise ModelError(
                f"{place.uri} has no symbol beside it: there is no {stem}{_SYMBOL_SUFFIX}",
                "put it there, or name both files in a card; what Gluon's save_parameters wrote has none: load it and "
                "call net.export(PREFIX)",
            )
        return _pair(place, store, stem + _SYMBOL_SUFFIX, name, stem)
    if name.endswith(".json"):
        stem = name.removesuffix(_SYMBOL_SUFFIX).removesuffix(".json")
        params, notes = _params_of(place, stem, store, epoch)
        return _pair(place, store, name, params, stem, notes)
    if not name or not _has_symbol(place, store):
        return None
    params, notes = _params_of(place, name, store, epoch)
    return _pair(place, store, name + _SYMBOL_SUFFIX, params, name, notes)


def checkpoint_of(files: Files, base: Location, store: StoreOptions) -> Checkpoint:
    """The checkpoint that a card at `base` names.

    Raises:
        ModelError: a file is missing, or the archive is damaged.
    """
    if files.archive is not None:
        unpacked = unpack_archive(file_here(beside(base, files.archive), store, ARCHIVE))
        return Checkpoint(unpacked.symbol, unpacked.params)
    symbol, params = beside(base, files.symbol or ""), beside(base, files.params or "")
    return Checkpoint(file_here(symbol, store, SYMBOL), file_here(params, store, PARAMS))


def _pair(
    place: Location, store: StoreOptions, symbol: str, params: str, name: str, notes: tuple[str, ...] = ()
) -> Found:
    files = Files(symbol=symbol, params=params)
    return Found(checkpoint_of(files, place, store), name, files, notes=notes)


def _in_archive(place: Location, store: StoreOptions, epoch: int | None) -> Found:
    name = name_of(place)
    unpacked = unpack_archive(file_here(place, store, ARCHIVE))
    if epoch is not None:
        raise ModelError(f"--epoch is given, and {place.uri} is an archive, which holds one", "leave --epoch out")
    shape, notes = unpacked.shape, []
    if unpacked.labels is not None:
        notes.append("labels are those of synset.txt in the archive")
    height_width = (shape[1], shape[2]) if shape is not None and len(shape) == 3 else None
    if height_width is not None:
        notes.append(f"images are made {height_width[0]}x{height_width[1]}, as signature.json in the archive says")
    checkpoint, stem = Checkpoint(unpacked.symbol, unpacked.params), Path(name).stem
    return Found(checkpoint, stem, Files(archive=name), unpacked.labels, height_width, tuple(notes))


def _has_symbol(prefix: Location, store: StoreOptions) -> bool:
    return name_of(prefix) + _SYMBOL_SUFFIX in _names_after(prefix, store)


def _params_of(place: Location, stem: str, store: StoreOptions, epoch: int | None) -> tuple[str, tuple[str, ...]]:
    """The file with the parameters of the epoch that is wanted, and a sentence where it was chosen."""
    prefix = beside(place, stem)
    names = list(_names_after(prefix, store))
    epochs = {int(match[2]): name for name in names if (match := _EPOCH_OF.fullmatch(name)) and match[1] == stem}
    if not epochs and epoch is None and stem + _PARAMS_SUFFIX in names:
        return stem + _PARAMS_SUFFIX, ()
    if not epochs:
        raise ModelError(
            f"{prefix.uri} has a symbol and no parameters: there is no {stem}-0000.params",
            "put the parameters beside the symbol, or name both files in a card",
        )
    if epoch is not None and epoch not in epochs:
        there = ", ".join(map(str, sorted(epochs)[:10]))
        raise ModelError(f"{prefix.uri} has no epoch {epoch}", f"its epochs: {there}")
    chosen = max(epochs) if epoch is None else epoch
    notes = (f"the epoch is {chosen}, the newest of {len(epochs)} (--epoch takes another)",)
    return epochs[chosen], notes if epoch is None and len(epochs) > 1 else ()


def _names_after(prefix: Location, store: StoreOptions) -> Iterator[str]:
    """The names in the folder of `prefix` that begin with its last part and `-` or `.`."""
    start = name_of(prefix)
    if prefix.is_local:
        try:
            names = [path.name for path in Path(prefix.uri).parent.iterdir()]
        except (OSError, ValueError):  # told when a file of it is opened; ValueError: a null character
            return
        yield from sorted(name for name in names if name.startswith((f"{start}-", f"{start}.")))
        return
    folder = prefix.path.rpartition("/")[0]
    with store_errors(prefix, SYMBOL):
        for objects in open_store(prefix, store).list(folder or None, offset=prefix.path):
            for found in objects:
                if found["path"] > f"{prefix.path}/":  # all that is wanted comes before: `-` and `.` do
                    return
                name = found["path"][len(folder) :].lstrip("/")
                if "/" not in name and name.startswith((f"{start}-", f"{start}.")):
                    yield name


def translated(checkpoint: Checkpoint, height_width: HeightWidth | None) -> Path:
    """Translate a checkpoint to ONNX, once: the file stays in the cache.

    Args:
        checkpoint: the two files.
        height_width: of the images; None to find out which size fits.

    Raises:
        ModelError: a file is damaged, or the network has no translation.
        InfermillError: the cache folder cannot be written.

    Example:
        >>> translated(checkpoint, (224, 224)).name  # doctest: +SKIP
        'network.onnx'
    """
    key = _cache_key(checkpoint, height_width)
    network = cache_folder() / "models" / key / "network.onnx"
    if not _is_whole(network):
        with cache_lock(key):
            if not _is_whole(network):
                _keep(_translate(checkpoint, height_width), network)
    return network


def _is_whole(network: Path) -> bool:
    """Whether it is in the cache, with its weights; somebody may have written there."""
    try:
        external_tensors(read_network(network), network)
    except ModelError:
        return False
    return True


def _keep(model: onnx.ModelProto, network: Path) -> None:
    """Write a network, whose weights lie beside it: who only wants to see its graph need not read them.

    The graph is the last to be written, for it says that the weights are there.
    """
    with cache_errors():
        network.unlink(missing_ok=True)
    weights = [tensor for tensor in model.graph.initializer if len(tensor.raw_data) >= _LONG_WEIGHTS_BYTES]
    lengths = [len(tensor.raw_data) for tensor in weights]
    write_cached(network.with_name(_WEIGHTS_FILE), sum(lengths), (tensor.raw_data for tensor in weights))
    for tensor, length, end in zip(weights, lengths, accumulate(lengths), strict=True):
        tensor.ClearField("raw_data")
        tensor.data_location = tensor.EXTERNAL
        for key, value in {"location": _WEIGHTS_FILE, "offset": end - length, "length": length}.items():
            tensor.external_data.add(key=key, value=str(value))
    content = model.SerializeToString()
    write_cached(network, len(content), [content])


def _translate(checkpoint: Checkpoint, height_width: HeightWidth | None) -> onnx.ModelProto:
    symbol, params = read_symbol(checkpoint.symbol), read_params(checkpoint.params)
    shapes = input_shapes(symbol, params, family_of(symbol), height_width)
    if not shapes:
        raise ModelError(
            f"{checkpoint.symbol.name} does not tell the shape of its input",
            "save the symbol with it: mx.sym.Variable('data', shape=(0, 3, 224, 224)), where 0 is the batch",
        )
    problems = []
    for shape in shapes:
        try:
            return translate(symbol, params, shape, checkpoint.symbol.name.removesuffix(_SYMBOL_SUFFIX))
        except ModelError as error:
            problems.append(error)
            if any(node.op not in OPERATORS for node in symbol.nodes if node.op != "null"):
                break  # no other size of images would help
    raise ModelError(f"{checkpoint.symbol.name}: {problems[0].message}", problems[0].hint)


def _cache_key(checkpoint: Checkpoint, height_width: HeightWidth | None) -> str:
    """The network and what makes the translation: the two files, the size that is asked for, and this package."""
    parts = [_package_digest(), repr(height_width)]
    for path in (checkpoint.symbol, checkpoint.params):
        try:
            with path.open("rb") as file:
                parts.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from None
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


@cache
def _package_digest() -> str:
    """Another translator makes another file, without a version number that somebody has to think of."""
    sources = [file for file in resources.files("infermill.models.mxnet").iterdir() if file.name.endswith(".py")]
    content = [file.read_bytes() for file in sorted(sources, key=lambda file: file.name)]
    return hashlib.sha256(b"\0".join(content)).hexdigest()
