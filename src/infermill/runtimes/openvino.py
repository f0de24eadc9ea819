"""OpenVINO: the fastest on most processors."""

import sys
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from infermill.errors import ModelError
from infermill.models.executable import executable
from infermill.models.model import Model
from infermill.runtimes import Arrays, Batch, Predictor, best_batch_size, failed, refused, warm_up

# With this package, `import openvino` tells Google Analytics of each import, and leaves a folder in the home directory.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

import openvino as ov  # noqa: E402

MAX_STREAMS = 8
BATCH_SIZE = 8
_INT32 = np.iinfo(np.int32)
# Lines of an OpenVINO error that tell its developers where, and nobody what.
_NOISE = ("Exception from", "Check '", "FrontEnd API", "Summary:", "To facilitate", "Loading input model")


def load(model: Model, threads: int, batch_size: int | None = None, streams: int | None = None) -> Predictor:
    """Compile `model` for the processor, in fp32; streams and batch as in `runtimes.load`.

    Raises:
        ModelError: the network does not fit its card, or has an operator that OpenVINO lacks.
    """
    streams = streams or min(threads, MAX_STREAMS)
    with executable(model) as graph:
        batch_size = best_batch_size(graph, BATCH_SIZE, batch_size)
        try:
            requests = _compile(graph.network, streams, threads)
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
        precision="fp32",
    )


def _compile(network: bytes | Path, streams: int, threads: int) -> "SimpleQueue[Any]":
    core = ov.Core()
    settings = {
        # Without it a processor that has bf16 computes in bf16.
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": threads,
        # Two workers on one host would be pinned to the same cores.
        "ENABLE_CPU_PINNING": False,
    }
    compiled = core.compile_model(core.read_model(network), "CPU", settings)
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
