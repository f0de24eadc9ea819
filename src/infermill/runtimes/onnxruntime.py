"""ONNX Runtime: on the processor, or on an NVIDIA GPU where onnxruntime-gpu finds one."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from infermill.errors import UsageError
from infermill.models.executable import executable
from infermill.models.model import Model
from infermill.runtimes import Arrays, Batch, Predictor, best_batch_size, failed, refused, warm_up
from infermill.types import Precision

# From its import on, ONNX Runtime sends events to Microsoft, and leaves a device id in the home directory.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

CUDA = "CUDAExecutionProvider"
MAX_STREAMS = 8
BATCH_SIZE = 8
CUDA_STREAMS = 2
CUDA_BATCH_SIZE = 64
SEVERITY_ERROR = 3
_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


def load(model: Model, threads: int, batch_size: int | None = None, streams: int | None = None) -> Predictor:
    """Start a session for `model`, on the GPU if there is one; streams and batch as in `runtimes.load`.

    Raises:
        ModelError: the network does not fit its card, or has an operator that ONNX Runtime lacks.
        UsageError: the precision of its card is not fp32.
    """
    check_precision(model.card.precision, is_here=True)
    streams = streams or min(threads, MAX_STREAMS)
    with executable(model) as graph:
        try:
            session = _session(graph.network, streams, threads)
            device = "cuda" if CUDA in session.get_providers() else "cpu"
            batch_size = best_batch_size(graph, CUDA_BATCH_SIZE if device == "cuda" else BATCH_SIZE, batch_size)
            input_name = session.get_inputs()[0].name

            def infer(batch: Batch) -> Arrays:
                try:
                    return tuple(session.run(list(graph.output_names), {input_name: batch}))
                except _ERRORS as error:
                    raise failed(model, "onnxruntime", _reason(error)) from None

            warm_up(infer, graph, model)
        except _ERRORS as error:
            raise refused(model, "onnxruntime", _reason(error)) from None
    return Predictor(
        run=infer,
        input_shape=graph.input_shape,
        input_dtype=graph.input_dtype,
        output_names=graph.output_names,
        batch_size=batch_size,
        is_fixed=graph.fixed_batch is not None,
        streams=CUDA_STREAMS if device == "cuda" else streams,
        runtime="onnxruntime",
        device=device,
        precision=graph.precision,
    )


def check_precision(precision: Precision, *, is_here: bool) -> None:
    """Refuse what ONNX Runtime would compute in fp32, between casts.

    Args:
        precision: that of a card.
        is_here: it will be computed on this machine.

    Raises:
        UsageError: it is not fp32.
    """
    if precision != "fp32":
        raise UsageError(
            f"--runtime onnxruntime has no {precision}: on a processor it would be fp32 between casts, and slower",
            f"leave --precision out, or take --runtime openvino where `infermill doctor` names {precision}",
        )


def _session(network: bytes | Path, streams: int, threads: int) -> Any:
    options = ort.SessionOptions()
    # The threads that call are the first to compute; the pool of the session adds those that are left.
    options.intra_op_num_threads = threads - streams + 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = SEVERITY_ERROR
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    source = network if isinstance(network, bytes) else str(network)
    if CUDA not in ort.get_available_providers():
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    # TF32, which ONNX Runtime takes by itself, has 10 bits of mantissa.
    providers = [(CUDA, {"use_tf32": "0"}), "CPUExecutionProvider"]
    with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find, and falls back to the processor
        ort.preload_dlls()
        return ort.InferenceSession(source, options, providers=providers)


def _reason(error: Exception) -> str:
    return str(error).split(" : ", 3)[-1]
