"""How infermill and a model reach the Python workers of Spark, and how their errors come back.

    driver                                               Python worker
    task(function, *given) ── pickled by value ────────► the same infermill here? then function(*given, *inputs)
    ship_code(session)     ── pyfile artifact ─────────► sys.path
    ship_model(session, …) ── file artifact, or a URI ─► ShippedModel.open()
    translated(exception)  ◄─ one line in Spark's text ─ errors_told()

All of it is `SparkSession.addArtifacts`, which classic Spark and Spark Connect both have.
"""

import functools
import hashlib
import io
import json
import os
import pickle
import re
import socket
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from pyspark import SparkFiles
from pyspark.sql import SparkSession

import infermill
from infermill import errors
from infermill.errors import InfermillError, ModelError, StoreError
from infermill.models.bundle import current_digest, pack, unpack
from infermill.models.card import plain_fields
from infermill.models.files import cache_errors, cache_folder, cache_lock, cache_renewed
from infermill.models.model import Model
from infermill.models.opening import open_model
from infermill.stores import locate
from infermill.types import CardOptions, StoreOptions

_TAG = "infermill-error: "
_ITS_OWN = (
    "its network and its credentials count; spark.executorEnv.AWS_ACCESS_KEY_ID and the like give it some, by --conf "
    "or where a Connect server is started"
)
_TIME = (1980, 1, 1, 0, 0, 0)
_shipped: "WeakKeyDictionary[SparkSession, set[str]]" = WeakKeyDictionary()


def runs_here(session: SparkSession) -> bool:
    """Whether the Python workers are processes of this machine, with this Python and these files.

    Of a Spark Connect server that is not known, even where its address is this machine's.
    """
    # A remote session is not an instance of the class that stands in `pyspark.sql`.
    return isinstance(session, SparkSession) and session.conf.get("spark.master", "").startswith("local")


def ship_code(session: SparkSession) -> None:
    """Give the Python workers this infermill, ahead of any that they have; what it depends on must be there.

    Args:
        session: classic or Connect; it is done once for each.

    Raises:
        InfermillError: the cache folder cannot be written.

    Example:
        >>> ship_code(spark)  # doctest: +SKIP
    """
    content = _code()
    # Spark refuses another file of a name that it has.
    path = _shipping_folder() / f"infermill-{infermill.__version__}-{hashlib.sha256(content).hexdigest()[:16]}.zip"
    with cache_lock(path.stem), cache_errors():
        if not path.exists():
            private = path.with_suffix(f".{os.getpid()}")
            private.write_bytes(content)
            private.replace(path)
    _add(session, path, pyfile=True)


@functools.cache
def _code() -> bytes:
    """This package as a zip; it may itself be running from one."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name, file in sorted(_sources(resources.files(infermill), "infermill")):
            archive.writestr(zipfile.ZipInfo(name, _TIME), file.read_bytes(), zipfile.ZIP_DEFLATED)
    return sink.getvalue()


def _sources(folder: Traversable, prefix: str) -> Iterator[tuple[str, Traversable]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _sources(entry, f"{prefix}/{entry.name}")
        elif entry.name.endswith(".py"):
            yield f"{prefix}/{entry.name}", entry


def _shipping_folder() -> Path:
    """Spark reads a file that was added when an executor asks for it, which may be late: so it stays."""
    folder = cache_folder() / "shipped"
    with cache_errors():
        folder.mkdir(0o700, parents=True, exist_ok=True)
    return folder


def _add(session: SparkSession, path: Path, *, pyfile: bool = False) -> None:
    names = _shipped.setdefault(session, set())
    if path.name not in names:
        session.addArtifacts(str(path), pyfile=pyfile, file=not pyfile)
        names.add(path.name)


@dataclass(frozen=True, slots=True)
class _Uri:
    """A model that workers fetch for themselves."""

    uri: str
    store: StoreOptions
    card_options: CardOptions


@dataclass(frozen=True, slots=True)
class _Artifact:
    """A packed model among the files of a Spark session."""

    name: str


@dataclass(frozen=True, slots=True)
class ShippedModel:
    """A model on its way to a worker. Two are equal if they are one model, whichever way they take."""

    digest: str
    way: Model | _Uri | _Artifact = field(compare=False)

    def open(self) -> Model:
        """The model, on the worker.

        Raises:
            ModelError: it has another digest than on the driver.
            StoreError: it cannot be fetched.
        """
        if isinstance(self.way, _Artifact):
            return unpack(Path(SparkFiles.get(self.way.name)), self.digest)
        if isinstance(self.way, Model):
            model, found, where = self.way, current_digest(self.way), str(self.way.network)
        else:
            # One worker downloads, the others of the machine find it in the cache.
            with cache_lock(self.digest.removeprefix("sha256:")):
                model = self._fetched(self.way)
            found, where = model.digest, self.way.uri
        if found != self.digest:
            raise ModelError(
                f"the model {where} has changed: it is {found} on the worker, and was {self.digest} on the driver",
                "start again with the model as it is now",
            )
        return model

    def _fetched(self, way: _Uri) -> Model:
        """The model of a store, downloaded again where what the cache has of it is another one."""
        with suppress(ModelError):
            model = open_model(way.uri, way.store, way.card_options)
            if model.digest == self.digest:
                return model
        with cache_renewed():
            return open_model(way.uri, way.store, way.card_options)


def ship_model(session: SparkSession, model: Model, store: StoreOptions) -> ShippedModel:
    """Find the way on which workers get a model, and send its files with the session where that is the way.

    Where workers share this machine's files, they read the same ones. A model in a store they fetch for themselves,
    with their own credentials; anything else becomes an artifact of the session, once.

    Args:
        session: classic or Connect.
        model: the model, as `open_model` opened it.
        store: how stores are reached.

    Raises:
        ModelError: a file of the model has changed since it was opened.
        InfermillError: the cache folder cannot be written.

    Example:
        >>> shipped = ship_model(spark, open_model("model.yaml", StoreOptions()), StoreOptions())  # doctest: +SKIP
    """
    if runs_here(session):
        return ShippedModel(model.digest, model)
    if isinstance(model.given, str) and _is_remote(locate(model.given).uri, model):
        return ShippedModel(model.digest, _Uri(locate(model.given).uri, store, model.card_options))
    # Another version may have packed it with a card that this one cannot read: its digest knows only what decides.
    card = hashlib.sha256(json.dumps(plain_fields(model.card)).encode()).hexdigest()[:16]
    name = f"{model.digest.removeprefix('sha256:')}-{card}"
    path = _shipping_folder() / f"infermill-model-{name}.zip"
    with cache_lock(name):
        if not path.exists():
            pack(model, path)
            if current_digest(model) != model.digest:
                path.unlink()
                raise ModelError(f"{model.network} was changed while it was read", "run the same command again")
    _add(session, path)
    return ShippedModel(model.digest, _Artifact(path.name))


def _is_remote(uri: str, model: Model) -> bool:
    """Whether another machine can open the same: neither the card, the network nor the labels are files of this one."""
    labels = model.card.labels
    are_labels_local = isinstance(labels, str) and Path(labels).is_absolute()
    network = (model.network,) if model.checkpoint is None else model.checkpoint.files.values()
    is_network_local = not all(path.is_relative_to(cache_folder()) for path in network)
    return "://" in uri and not is_network_local and not are_labels_local


def task(function: Callable[..., Any], *given: Any) -> Callable[..., Any]:
    """A function for Spark that calls `function(*given, *inputs)` on a worker, or says in one line why it cannot.

    Spark unpickles it with nothing but Python: that infermill, or what it depends on, is missing or has another
    version is not found out in the middle of unpickling, which would be a traceback.

    Args:
        function: one of infermill's, at the top level of its module.
        given: its first arguments, picklable.

    Example:
        >>> df.mapInArrow(task(run_partitions_of, job), "partition int")  # doctest: +SKIP
    """
    module, name, payload = function.__module__, function.__name__, pickle.dumps(given)
    version, tag = infermill.__version__, _TAG

    # Spark pickles a nested function by value: it must hold nothing but bytes and strings, and import all it needs.
    def run(*inputs: Any) -> Any:
        import importlib
        import json
        import pickle
        import socket
        import sys

        problem = ""
        try:
            found = importlib.import_module("infermill").__version__
            if found == version:
                target = getattr(importlib.import_module(module), name)
                first = pickle.loads(payload)  # noqa: S301 - from the driver
            else:
                problem = f"has infermill {found}, and the driver has {version}"
        except ImportError as error:
            problem = f"cannot import what infermill needs: {error}"
        if not problem:
            return target(*first, *inputs)
        told = {
            "error": "InfermillError",
            "message": f"the Python worker on {socket.gethostname()} ({sys.executable}) {problem}",
            "hint": f"install infermill {version} with all that it needs for this Python, or set PYSPARK_PYTHON",
        }
        raise RuntimeError(tag + json.dumps(told))

    return run


@contextmanager
def errors_told() -> Iterator[None]:
    """On a worker: errors of infermill leave in the form that `translated` finds in what Spark makes of them.

    Those of stores say where it was, for what the driver may read, a worker may not.
    """
    try:
        yield
    except InfermillError as error:
        hint, host = error.hint, socket.gethostname()
        if isinstance(error, StoreError) and host not in error.message:
            hint = f"{hint}; it was the executor on {host} that asked: {_ITS_OWN}"
        told = {"error": type(error).__name__, "message": error.message, "hint": hint}
        raise RuntimeError(_TAG + json.dumps(told)) from None


def translated(exception: BaseException) -> InfermillError | None:
    """On the driver: the error of a worker, from the text of what Spark raises; None where it is none of infermill's.

    Example:
        >>> translated(RuntimeError('… infermill-error: {"error": "ModelError", "message": "no", "hint": ""} …'))
        ModelError('no')
    """
    text = str(exception)
    for found in re.finditer(re.escape(_TAG), text):
        try:
            told, _ = json.JSONDecoder().raw_decode(text, found.end())
            kind: type[InfermillError] = vars(errors)[told["error"]]
            return kind(told["message"], told["hint"])
        except (ValueError, LookupError, TypeError):  # the line is cut off, or it is another's
            continue
    return None
