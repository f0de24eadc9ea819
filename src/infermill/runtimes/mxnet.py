"""Apache MXNet itself: the Module API, in a process of its own, for it needs another NumPy and so another Python.

The process is `mxnet_child`. Batches and answers lie in memory that both sides see; what is said beside them is short.
MXNet may die of an input, and then a worker must die of it, too: its journal is what finds the culprit (`engines`).
"""

import json
import mmap
import os
import shutil
import socket
import subprocess
import threading
import weakref
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from importlib import resources
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from infermill.errors import ModelError, RuntimeDiedError, UsageError, death_of
from infermill.journal import memory_file
from infermill.models.executable import LUMINANCE, LUMINANCE_HALF, LUMINANCE_UNIT, Executable, executable, folded
from infermill.models.files import cache_folder
from infermill.models.fit import channels_and_size
from infermill.models.model import Model
from infermill.models.mxnet.checkpoint import Checkpoint
from infermill.models.mxnet.symbol import read_symbol
from infermill.models.onnx import TensorInfo, inspect_network
from infermill.runtimes import Arrays, Batch, Predictor, best_batch_size, failed, refused, warm_up
from infermill.types import Precision

BATCH_SIZE = 8
PYTHON_VARIABLE = "INFERMILL_MXNET_PYTHON"
REQUIREMENTS = "mxnet==1.9.1 'numpy<1.24'"
MAX_MESSAGE_BYTES = 16 << 20
_SAID_LINES = 20
_IMPORT_SECONDS = 60
_TOO_SLOW = f"it is not there after {_IMPORT_SECONDS} seconds"
# All that MXNet and Python need of the environment: it may hold credentials, which are none of their business.
_VARIABLES = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")
_PREFIXES = ("MXNET_", "OMP_", "KMP_", "GOMP_", "MKL_", "DNNL_")


def load(model: Model, threads: int, batch_size: int | None = None, python: str | None = None) -> Predictor:
    """Start MXNet with the files of the checkpoint that `model` was opened from, in fp32.

    Args:
        model: a model with a checkpoint.
        threads: for OpenMP.
        batch_size: rows of a batch, at most; 8 where it is None.
        python: the Python that has mxnet; as `find_python` where it is None.

    Raises:
        ModelError: the model has no checkpoint, does not fit its card, or MXNet refuses it.
        UsageError: there is no Python that has mxnet, or the precision of its card is not fp32.
    """
    checkpoint = checkpoint_of(model)
    check_precision(model.card.precision, is_here=True)
    with executable(model) as graph:
        source = inspect_network(model.network).inputs[0]
        batch_size = best_batch_size(graph, BATCH_SIZE, batch_size)
        settings = {
            "symbol": str(checkpoint.symbol),
            "params": str(checkpoint.params),
            "input": source.name,
            "labels": sorted(read_symbol(checkpoint.symbol).labels),
            "shape": _shape(model, graph, source),
            "dtype": source.dtype,
            "outputs": graph.output_names,
            "batch_size": batch_size,
            "row_shape": graph.input_shape,
            "row_dtype": graph.input_dtype,
            "images": _images(model, source),
        }
        infer = _Process(model, find_python(python), threads, settings)
        warm_up(infer, graph, model)
    return Predictor(
        run=infer,
        input_shape=graph.input_shape,
        input_dtype=graph.input_dtype,
        output_names=graph.output_names,
        batch_size=batch_size,
        is_fixed=False,
        streams=1,
        runtime="mxnet",
        device="cpu",
        precision="fp32",
    )


def check_precision(precision: Precision, *, is_here: bool) -> None:
    """Refuse all but fp32.

    Args:
        precision: that of a card.
        is_here: it will be computed on this machine.

    Raises:
        UsageError: it is not fp32.
    """
    if precision != "fp32":
        raise UsageError(
            f"MXNet computes a checkpoint in fp32, and not in {precision}",
            f"leave --precision out, or take --runtime openvino where `infermill doctor` names {precision}",
        )


def checkpoint_of(model: Model) -> Checkpoint:
    """What MXNet executes of a model.

    Raises:
        ModelError: it is no MXNet checkpoint.
    """
    if model.checkpoint is None:
        raise ModelError(
            f"{model.network.name} is no MXNet checkpoint, and --runtime mxnet executes nothing else",
            "pass network-symbol.json with its .params beside it, or run it with --runtime openvino",
        )
    return model.checkpoint


def _shape(model: Model, graph: Executable, source: TensorInfo) -> tuple[int, ...]:
    """The shape of one input of the network itself, without the batch."""
    if model.card.preprocess is None:
        return graph.input_shape
    height, width, _ = graph.input_shape
    channels = _channels(model, source)
    return (channels, height, width) if model.card.input.layout == "NCHW" else (height, width, channels)


def _channels(model: Model, source: TensorInfo) -> int:
    return 1 if channels_and_size(source, model.card.input.layout)[0] == 1 else 3


def _images(model: Model, source: TensorInfo) -> dict[str, Any] | None:
    """How images become the input, as `mxnet_child` does it; None for tensors."""
    preprocess = model.card.preprocess
    if preprocess is None:
        return None
    channels = _channels(model, source)
    factor, offset = folded(preprocess)
    return {
        "layout": model.card.input.layout,
        "grey": (LUMINANCE, LUMINANCE_HALF, LUMINANCE_UNIT) if channels == 1 else None,
        "is_bgr": preprocess.color == "BGR",
        "factor": factor[:channels].tolist(),
        "offset": offset[:channels].tolist(),
    }


def find_python(given: str | None = None) -> Path:
    """The Python that has mxnet: as told, or as the environment says, or of `make mxnet-env`, or in the cache folder.

    Raises:
        UsageError: there is none.

    Example:
        >>> find_python("/opt/mxnet/bin/python")  # doctest: +SKIP
        PosixPath('/opt/mxnet/bin/python')
    """
    for origin, name in (("--runtime-python", given), (PYTHON_VARIABLE, os.environ.get(PYTHON_VARIABLE))):
        if name:
            found = shutil.which(name)
            if found is None:
                raise UsageError(f"{origin} {name} is no program that can be run", "name the Python that has mxnet")
            return Path(found)
    checkout = Path(__file__).parents[3] / ".make"
    for folder in (checkout / "mxnet", cache_folder() / "mxnet"):
        if os.access(folder / "bin/python", os.X_OK):
            return folder / "bin/python"
    where = cache_folder() / "mxnet"
    raise UsageError(
        "there is no Python with mxnet, which needs one of its own (3.8 to 3.11, with NumPy before 1.24)",
        f"python3.11 -m venv {where}, then {where}/bin/pip install {REQUIREMENTS}; "
        f"or name one that has it: --runtime-python PATH, or {PYTHON_VARIABLE}",
    )


def installed_version(python: Path) -> str:
    """The version of mxnet that a Python has.

    Raises:
        UsageError: it has none that can be imported.

    Example:
        >>> installed_version(find_python())  # doctest: +SKIP
        '1.9.1'
    """
    command = [str(python), "-I", "-c", "import mxnet; print(mxnet.__version__)"]
    try:
        done = subprocess.run(
            command, env=_environment(1), capture_output=True, check=False, text=True, timeout=_IMPORT_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise _no_mxnet(python, [_TOO_SLOW]) from None
    except OSError as error:
        raise _no_mxnet(python, [str(error.strerror)]) from None
    if done.returncode:
        raise _no_mxnet(python, done.stderr.splitlines())
    return done.stdout.strip()


def _no_mxnet(python: Path, said: Iterable[str]) -> UsageError:
    return UsageError(f"{python} cannot run mxnet: {_last_line(said)}", f"{python} -m pip install {REQUIREMENTS}")


def _environment(threads: int) -> dict[str, str]:
    kept = {name: text for name, text in os.environ.items() if name in _VARIABLES or name.startswith(_PREFIXES)}
    return {"MXNET_SUBGRAPH_VERBOSE": "0", **kept, "OMP_NUM_THREADS": str(threads)}


class _Process:
    """MXNet's process, and the memory that both sides see: the file behind it has no name, and is gone with them."""

    def __init__(self, model: Model, python: Path, threads: int, settings: dict[str, Any]) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._said: deque[str] = deque(maxlen=_SAID_LINES)
        descriptor = memory_file("infermill-batch")
        ours, theirs = socket.socketpair()
        self._connection: Connection[object, object] = Connection(ours.detach())
        try:
            with theirs, resources.as_file(resources.files(__package__) / "mxnet_child.py") as script:
                # -I: neither a module of this folder, nor one of the user's, stands in for another.
                self._process = subprocess.Popen(
                    [python, "-I", script, str(theirs.fileno()), str(descriptor)],
                    pass_fds=(theirs.fileno(), descriptor),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env=_environment(threads),
                    text=True,
                    errors="replace",
                    process_group=0,  # Ctrl-C in a terminal is for this process alone
                )
                theirs.close()
                self._listener = threading.Thread(target=self._said.extend, args=(self._process.stdout,), daemon=True)
                self._listener.start()
                self._end = weakref.finalize(self, _end, self._process, self._connection, self._listener)
                ready = self._start(python, settings)
            memory = mmap.mmap(descriptor, 0)
        except OSError as error:
            raise _no_mxnet(python, [str(error.strerror)]) from None
        finally:
            os.close(descriptor)
        self._rows = np.frombuffer(memory, settings["row_dtype"], settings["batch_size"] * _size(settings["row_shape"]))
        self._rows = self._rows.reshape(settings["batch_size"], *settings["row_shape"])
        self._outputs = [
            np.frombuffer(memory, place["dtype"], _size(place["shape"]), place["offset"]) for place in ready["outputs"]
        ]

    def _start(self, python: Path, settings: dict[str, Any]) -> dict[str, Any]:
        if not self._connection.poll(_IMPORT_SECONDS):
            raise _no_mxnet(python, [_TOO_SLOW])
        try:
            self._receive()  # that it is there
        except RuntimeDiedError:
            raise _no_mxnet(python, self._said) from None
        try:
            return self._ask(settings)
        except RuntimeDiedError as error:
            raise refused(self._model, "mxnet", error.message) from None
        except MemoryError as error:
            raise refused(self._model, "mxnet", str(error)) from None

    def __call__(self, batch: Batch) -> Arrays:
        with self._lock:
            self._check(batch)
            self._rows[: len(batch)] = batch
            shapes = self._ask({"length": len(batch)})["shapes"]
            return tuple(
                flat[: _size(shape)].reshape(shape).copy() for flat, shape in zip(self._outputs, shapes, strict=True)
            )

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        is_answered = False
        try:
            with suppress(OSError):  # it is dead, which `_receive` will say
                self._connection.send_bytes(json.dumps(question).encode())
            answer = self._receive()
            is_answered = True
        finally:
            if not is_answered:  # Ctrl-C: the next question would get this one's answer
                self._end()
        if "error" in answer:
            raise failed(self._model, "mxnet", _last_line(answer["error"].splitlines()))
        return answer

    def _receive(self) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = json.loads(self._connection.recv_bytes(MAX_MESSAGE_BYTES))
        except (EOFError, OSError):
            code = self._process.wait()
            self._listener.join()
            raise RuntimeDiedError(
                f"the process of mxnet died ({death_of(code)}): {_last_line(self._said)}",
                "load the model again; or try --runtime openvino, --threads 1, or a machine with more memory",
                code,
            ) from None
        return answer

    def _check(self, batch: Batch) -> None:
        if batch.shape[1:] != self._rows.shape[1:]:
            raise refused(self._model, "mxnet", f"rows of {list(batch.shape[1:])}, not {list(self._rows.shape[1:])}")


def _end(
    process: "subprocess.Popen[str]", connection: "Connection[object, object]", listener: threading.Thread
) -> None:
    connection.close()
    process.kill()
    process.wait()
    listener.join()
    if process.stdout is not None:
        process.stdout.close()


def _size(shape: list[int] | tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _last_line(said: Iterable[str]) -> str:
    lines = [line.strip() for line in said if line.strip()]
    return lines[-1] if lines else "it said nothing"
