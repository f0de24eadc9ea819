"""The libraries that execute a network, behind one contract: `load(model, threads, …) -> Predictor`."""

import importlib
import math
import re
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from infermill.errors import InfermillError, MisfitError, ModelError
from infermill.models.executable import Executable
from infermill.models.model import Model
from infermill.types import RuntimeName

Arrays = tuple[NDArray[np.generic], ...]
Batch = NDArray[np.generic]
Infer = Callable[[Batch], Sequence[NDArray[np.generic]]]
MODULES: dict[RuntimeName, str] = {
    "openvino": "infermill.runtimes.openvino",
    "onnxruntime": "infermill.runtimes.onnxruntime",
    "mxnet": "infermill.runtimes.mxnet",
}
SMALL_ROW_BYTES = 512
SMALL_ROWS = 64
_OUT_OF_MEMORY = re.compile(r"bad_alloc|out of memory|(fail|cannot|could not|unable)\w* (to )?allocat", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Predictor:
    """A loaded network: call it with a batch of any length, get one array per output.

    A batch of images is uint8 NHWC. Calls are thread-safe, and release the GIL. `streams` calls at once use the
    machine fully; batches of `batch_size` rows are the best length (for a network with a fixed batch, the only one:
    shorter ones are padded and the padding dropped). Longer ones are cut.
    """

    run: Infer
    "A batch of at most `batch_size` rows; of as many where that is fixed."
    input_shape: tuple[int, ...]
    "That of one row of a batch: height, width and channels of an image."
    input_dtype: str
    "Its type, by the name that NumPy and ONNX have for it: uint8 for images."
    output_names: tuple[str, ...]
    batch_size: int
    is_fixed: bool
    "The network takes no other length of a batch."
    streams: int
    runtime: RuntimeName
    device: str
    precision: str
    "What its layers are computed in: fp32, fp16, bf16, int8, or int8+bf16: what is not int8 of such a network is bf16."
    reason: str = ""
    "Why it has these streams and this length of a batch."

    def __call__(self, batch: Batch) -> Arrays:
        return in_pieces(self.run, batch, self.batch_size, fixed=self.is_fixed)


def load(
    model: Model,
    runtime: RuntimeName,
    threads: int,
    python: str | None = None,
    *,
    streams: int | None = None,
    batch_size: int | None = None,
) -> Predictor:
    """Load `model` into a runtime, and run it once.

    Args:
        model: the model, whose card is known to fit its network or not yet.
        runtime: the library; only this one is imported.
        threads: how many cores the network may use.
        python: the one that has the library, where that is mxnet.
        streams: how many calls at once share these cores; None is the runtime's default, about one a core. A GPU, and
            MXNet, have their own number.
        batch_size: rows of a batch; None is the runtime's default. A network with a fixed batch has its own.

    Raises:
        ModelError: the network does not fit its card, or the runtime cannot execute it.
        UsageError: there is no Python that has mxnet, or no such precision here.
        InfermillError: the library is not installed, or broken.

    Example:
        >>> predictor = load(model, "openvino", threads=2)  # doctest: +SKIP
        >>> (logits,) = predictor(np.zeros((5, 224, 224, 3), np.uint8))  # doctest: +SKIP
        >>> logits.shape  # doctest: +SKIP
        (5, 1000)
    """
    given = (batch_size, python) if runtime == "mxnet" else (batch_size, streams)
    try:
        predictor: Predictor = _module(runtime).load(model, threads, *given)
    except MemoryError as error:
        raise ModelError(
            f"there is no memory to load {model.card.files.network} into {runtime}: {error}",
            "take fewer --threads or --workers, or a machine with more memory",
        ) from None
    return predictor


def _module(runtime: RuntimeName) -> ModuleType:
    try:
        return importlib.import_module(MODULES[runtime])
    except ImportError as error:
        raise missing(runtime, socket.gethostname(), sys.executable, str(error)) from None


def missing(runtime: RuntimeName, host: str, python: str, reason: str) -> InfermillError:
    """The error where a Python lacks a library."""
    return InfermillError(
        f"{runtime} cannot be imported by the Python on {host} ({python}): {' '.join(reason.split())}",
        f"install {runtime} for this Python, or choose with --runtime what it has",
    )


def check_runtime(model: Model, runtime: RuntimeName, python: str | None, *, is_here: bool) -> None:
    """Raise what `load` would say, as far as it is known before anything is loaded.

    Args:
        model: the model.
        runtime: the library.
        python: as for `load`.
        is_here: it will be loaded on this machine.

    Raises:
        ModelError: the runtime does not execute networks of this kind.
        UsageError: there is no Python that could have mxnet, or the precision is not there.
        InfermillError: as `load`.

    Example:
        >>> check_runtime(model, "mxnet", "/opt/mxnet/bin/python", is_here=True)  # doctest: +SKIP
    """
    if model.card.precision != "fp32":  # or the driver would import the runtime for nothing
        _module(runtime).check_precision(model.card.precision, is_here=is_here)
    if runtime == "mxnet":
        module = _module(runtime)
        module.checkpoint_of(model)
        if is_here:
            module.find_python(python)


def best_batch_size(graph: Executable, usual: int, told: int | None) -> int:
    """The length of a batch: the only one that the network takes, or as told, or `usual`, or more for small rows.

    A call costs tens of microseconds whatever it does; for 30 numbers a row, that is ten times what they cost.
    """
    row_bytes = math.prod(graph.input_shape) * np.dtype(graph.input_dtype).itemsize
    return graph.fixed_batch or told or (max(usual, SMALL_ROWS) if row_bytes < SMALL_ROW_BYTES else usual)


def in_pieces(infer: Infer, batch: Batch, batch_size: int, *, fixed: bool) -> Arrays:
    """What `infer` answers to a batch of any length: longer ones are cut, shorter ones padded if it is `fixed`."""
    batch = np.ascontiguousarray(batch)

    def padded(piece: Batch) -> Batch:
        missing = batch_size - len(piece) if fixed else 0
        return np.pad(piece, ((0, missing), *[(0, 0)] * (piece.ndim - 1))) if missing else piece

    pieces = [infer(padded(batch[at : at + batch_size])) for at in range(0, len(batch), batch_size)]
    if len(pieces) == 1:
        return tuple(array[: len(batch)] for array in pieces[0])
    return tuple(np.concatenate(arrays)[: len(batch)] for arrays in zip(*pieces, strict=True))


def warm_up(infer: Infer, graph: Executable, model: Model) -> None:
    """Run a batch of black images or zeros, of two where any length will do, and see that each has its row.

    Raises:
        MisfitError: it has not, or another number of classes than the card.
    """
    network = model.card.files.network
    batch_size = graph.fixed_batch or 2
    outputs = infer(np.zeros((batch_size, *graph.input_shape), graph.input_dtype))
    for name, array in zip(graph.output_names, outputs, strict=True):
        if array.shape[:1] != (batch_size,):
            raise MisfitError(
                f"{network} answers a batch of {batch_size} inputs with {list(array.shape)} in `{name}`, "
                "which is not one row per input",
                "export it with a dynamic batch, or name the output that has one row per input in `output.name`",
            )
        classes = array.size // batch_size
        if model.card.task == "classification" and classes == 1 and model.card.output.activation == "softmax":
            raise MisfitError(
                f"a softmax of the one number of `{name}` is always 1", "set `output.activation: sigmoid`"
            )
        expected = len(model.labels) if model.labels is not None else model.card.classes
        if model.card.task == "classification" and expected not in (None, classes):
            raise MisfitError(
                f"{network} answers {classes} numbers per input in `{name}`, and the card has {expected} classes",
                "use the labels, or the network, that belong together",
            )


def failed(model: Model, runtime: RuntimeName, reason: str) -> Exception:
    """What to raise where a runtime cannot run a batch: MemoryError, or that it refuses the network."""
    return MemoryError(reason) if _OUT_OF_MEMORY.search(reason) else refused(model, runtime, reason)


def refused(model: Model, runtime: RuntimeName, reason: str) -> ModelError:
    """The error of a runtime that cannot execute the network, in one line."""
    return ModelError(
        f"{runtime} cannot execute {model.card.files.network}: {' '.join(reason.split())}",
        f"try --runtime {next(name for name in MODULES if name != runtime)}, or export the network again",
    )
