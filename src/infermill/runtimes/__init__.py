"""The libraries that execute a network, behind one contract: `load(model, threads) -> Predictor`."""

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infermill.errors import ModelError
from infermill.models.executable import Executable
from infermill.models.model import Model
from infermill.types import RuntimeName

Arrays = tuple[NDArray[np.generic], ...]
Infer = Callable[[NDArray[np.uint8]], Sequence[NDArray[np.generic]]]
MODULES: dict[RuntimeName, str] = {
    "openvino": "infermill.runtimes.openvino",
    "onnxruntime": "infermill.runtimes.onnxruntime",
}
_OUT_OF_MEMORY = re.compile(r"bad_alloc|out of memory|(fail|cannot|could not|unable)\w* (to )?allocat", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Predictor:
    """A loaded network: call it with a uint8 NHWC batch of any length, get one array per output.

    Calls are thread-safe, and release the GIL. `streams` calls at once use the machine fully; batches of
    `batch_size` images are the best length (for a network with a fixed batch, the only one: shorter ones are
    padded and the padding dropped). Longer ones are cut.
    """

    run: Callable[[NDArray[np.uint8]], Arrays]
    input_shape: tuple[int, int, int]
    "Height, width and channels of one image."
    output_names: tuple[str, ...]
    batch_size: int
    is_fixed: bool
    "The network takes no other length of a batch."
    streams: int
    runtime: RuntimeName
    device: str
    precision: str

    def __call__(self, batch: NDArray[np.uint8]) -> Arrays:
        return self.run(batch)


def load(model: Model, runtime: RuntimeName, threads: int) -> Predictor:
    """Load `model` into a runtime, and run it once.

    Args:
        model: the model, whose card is known to fit its network or not yet.
        runtime: the library; only this one is imported.
        threads: how many cores the network may use.

    Raises:
        ModelError: the network does not fit its card, or the runtime cannot execute it.

    Example:
        >>> predictor = load(model, "openvino", threads=2)  # doctest: +SKIP
        >>> (logits,) = predictor(np.zeros((5, 224, 224, 3), np.uint8))  # doctest: +SKIP
        >>> logits.shape  # doctest: +SKIP
        (5, 1000)
    """
    try:
        predictor: Predictor = importlib.import_module(MODULES[runtime]).load(model, threads)
    except MemoryError as error:
        raise ModelError(
            f"there is no memory to load {model.card.files.onnx} into {runtime}: {error}",
            "take fewer --threads or --workers, or a machine with more memory",
        ) from None
    return predictor


def in_pieces(infer: Infer, batch_size: int, *, fixed: bool) -> Callable[[NDArray[np.uint8]], Arrays]:
    """`infer` for batches of any length: longer ones are cut, and shorter ones padded where the length is `fixed`."""

    def run(batch: NDArray[np.uint8]) -> Arrays:
        batch = np.ascontiguousarray(batch)
        pieces = [infer(_padded(batch[at : at + batch_size])) for at in range(0, len(batch), batch_size)]
        if len(pieces) == 1:
            return tuple(array[: len(batch)] for array in pieces[0])
        return tuple(np.concatenate(arrays)[: len(batch)] for arrays in zip(*pieces, strict=True))

    def _padded(piece: NDArray[np.uint8]) -> NDArray[np.uint8]:
        missing = batch_size - len(piece) if fixed else 0
        return np.pad(piece, ((0, missing), (0, 0), (0, 0), (0, 0))) if missing else piece

    return run


def warm_up(infer: Infer, graph: Executable, model: Model) -> None:
    """Run a batch of black images, of two where any length will do, and see that each has its row.

    Raises:
        ModelError: it has not.
    """
    network = model.card.files.onnx
    batch_size = graph.fixed_batch or 2
    outputs = infer(np.zeros((batch_size, *graph.input_shape), np.uint8))
    for name, array in zip(graph.output_names, outputs, strict=True):
        if array.shape[:1] != (batch_size,):
            raise ModelError(
                f"{network} answers a batch of {batch_size} images with {list(array.shape)} in `{name}`, "
                "which is not one row per image",
                "export it with a dynamic batch, or name the output that has one row per image in `output.name`",
            )
        classes = array.size // batch_size
        expected = len(model.labels) if model.labels is not None else model.card.classes
        if model.card.task == "classification" and expected not in (None, classes):
            raise ModelError(
                f"{network} answers {classes} numbers per image in `{name}`, and the card has {expected} classes",
                "use the labels, or the network, that belong together",
            )


def failed(model: Model, runtime: RuntimeName, reason: str) -> Exception:
    """What to raise where a runtime cannot run a batch: MemoryError, or that it refuses the network."""
    return MemoryError(reason) if _OUT_OF_MEMORY.search(reason) else refused(model, runtime, reason)


def refused(model: Model, runtime: RuntimeName, reason: str) -> ModelError:
    """The error of a runtime that cannot execute the network, in one line."""
    return ModelError(
        f"{runtime} cannot execute {model.card.files.onnx}: {' '.join(reason.split())}",
        f"try --runtime {next(name for name in MODULES if name != runtime)}, or export the network again",
    )
