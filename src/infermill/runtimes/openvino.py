"""OpenVINO: the fastest on most processors."""

import functools
import sys
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from infermill.errors import ModelError, UsageError
from infermill.models.executable import executable
from infermill.models.model import Model
from infermill.runtimes import Arrays, Batch, Predictor, best_batch_size, failed, refused, warm_up
from infermill.types import Precision

# With this package, `import openvino` tells Google Analytics of each import, and leaves a folder in the home directory.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

import openvino as ov  # noqa: E402

MAX_STREAMS = 8
BATCH_SIZE = 8
HINTS: dict[Precision, ov.Type] = {"fp32": ov.Type.f32, "fp16": ov.Type.f16, "bf16": ov.Type.bf16}
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
"As OpenVINO calls them, too, in capitals."
_INT32 = np.iinfo(np.int32)
# Lines of an OpenVINO error that tell its developers where, and nobody what.
_NOISE = ("Exception from", "Check '", "FrontEnd API", "Summary:", "To facilitate", "Loading input model")


def load(model: Model, threads: int, batch_size: int | None = None, streams: int | None = None) -> Predictor:
    """Compile `model` for the processor, in the precision of its card; streams and batch as in `runtimes.load`.

    Raises:
        ModelError: the network does not fit its card, or has an operator that OpenVINO lacks.
        UsageError: the processor does not have the precision.
    """
    check_precision(model.card.precision, is_here=True)
    streams = streams or min(threads, MAX_STREAMS)
    with executable(model) as graph:
        batch_size = best_batch_size(graph, BATCH_SIZE, batch_size)
        try:
            requests = _compile(graph.network, model.card.precision, streams, threads)
        except RuntimeError as error:
            raise refused(model, "openvino", _reason(error)) from None
        infer = _Pool(requests, len(graph.output_names), model)
        warm_up(infer, graph, model)
    return Predictor(
        run=infer,
        input_shape=graph.input_shape,
        input_dtype=graph.input_dtype,
        output_names=graph.output_names,
        batch_size=batch_size,
        is_fixed=graph.fixed_batch is not None,
        streams=streams,
        runtime="openvino",
        device="cpu",
        precision=graph.precision,
    )


def precisions() -> tuple[str, ...]:
    """What the processor has, of fp32, bf16, fp16 and int8.

    Example:
        >>> precisions()  # doctest: +SKIP
        ('fp32', 'bf16', 'int8')
    """
    capabilities = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return tuple(name for name in PRECISIONS if name.upper() in capabilities)


def check_precision(precision: Precision, *, is_here: bool) -> None:
    """Refuse what OpenVINO would silently compute in fp32.

    Args:
        precision: that of a card.
        is_here: it will be computed on this machine.

    Raises:
        UsageError: the processor of this machine does not have it.
    """
    if precision != "fp32" and is_here and precision not in precisions():
        raise _lacking(precision)


def _lacking(precision: Precision) -> UsageError:
    processor = str(core().get_property("CPU", "FULL_DEVICE_NAME")).strip()
    return UsageError(
        f"this processor ({processor}) has no {precision}, and OpenVINO would compute in fp32",
        f"leave --precision out, or take a machine for which `infermill doctor` names {precision}",
    )


@functools.cache
def core() -> ov.Core:
    """OpenVINO itself, once for the life of the process.

    It gives the thread that first uses it a stack for signals, and takes the memory back when it is let go of: where
    another thread does that, the next signal, such as Ctrl-C, ends the process with SIGSEGV.
    """
    return ov.Core()


def _compile(network: bytes | Path, precision: Precision, streams: int, threads: int) -> "SimpleQueue[Any]":
    settings = {
        # Without it a processor that has bf16 computes in bf16.
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": threads,
        # Two workers on one host would be pinned to the same cores.
        "ENABLE_CPU_PINNING": False,
    }
    compiled = core().compile_model(core().read_model(network), "CPU", settings)
    if compiled.get_property("INFERENCE_PRECISION_HINT") != HINTS[precision]:
        raise _lacking(precision)
    requests: SimpleQueue[Any] = SimpleQueue()
    for _ in range(streams):
        requests.put(compiled.create_infer_request())
    return requests


class _Pool:
    """Infer requests, each used by one thread at a time."""

    def __init__(self, requests: "SimpleQueue[Any]", outputs: int, model: Model) -> None:
        self._requests = requests
        self._outputs = outputs
        self._model = model

    def __call__(self, batch: Batch) -> Arrays:
        if batch.dtype == np.int64 and not _INT32.min <= batch.min() <= batch.max() <= _INT32.max:
            raise ModelError(
                f"{self._model.card.files.network} is given an integer beyond 32 bits, which OpenVINO would cut off",
                "run it with --runtime onnxruntime; what is finished stays",
            )
        request = self._requests.get()
        try:
            results = request.infer({0: batch}, share_inputs=True, share_outputs=False)
            return tuple(results[index] for index in range(self._outputs))
        except RuntimeError as error:
            raise failed(self._model, "openvino", _reason(error)) from None
        finally:
            self._requests.put(request)


def _reason(error: RuntimeError) -> str:
    lines = [line.strip().removeprefix("-- ") for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(_NOISE)) or str(error)
