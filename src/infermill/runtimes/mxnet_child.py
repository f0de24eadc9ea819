"""MXNet's side of the runtime `mxnet`, run by a Python of its own (3.8 to 3.11) that has nothing but mxnet and NumPy.

    infermill ◄─ a word that mxnet is there ──────────────── here     JSON
              ── settings, then the length of each batch ──►
              ◄─ what the outputs are, then their shapes ───
              ══ rows of the batch │ first output │ second …          memory that both see

It imports nothing of infermill, and ends when the other side does.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import queue
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

if __name__ == "__main__":  # elsewhere there is none, and nothing here that would need it
    import mxnet as mx  # type: ignore[import-not-found]

MAX_MESSAGE_BYTES = 16 << 20
ALIGNMENT_BYTES = 64


class Network:
    """A checkpoint in MXNet's Module, with its preprocessing in front.

    `mx.model.load_checkpoint` takes one prefix and an epoch, and these are two files of any name.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        symbol = mx.sym.load(settings["symbol"])
        if not set(settings["outputs"]) <= set(symbol.list_outputs()):
            # Fusing fails where values are given out between the layers that it joins (graph_executor.cc, 1830).
            os.environ["MXNET_SUBGRAPH_BACKEND"] = "NONE"
        internals = symbol.get_internals()
        names = internals.list_outputs()
        self._symbol = mx.sym.Group([internals[names.index(name)] for name in settings["outputs"]])
        parameters: dict[str, dict[str, Any]] = {"arg": {}, "aux": {}}
        for key, value in mx.nd.load(settings["params"]).items():
            kind, _, name = key.partition(":")
            parameters[kind][name] = value
        arguments = self._symbol.list_arguments()
        self._labels = [name for name in arguments if name in settings["labels"] and name not in parameters["arg"]]
        self._longest = self._bind(settings["batch_size"])
        self._longest.set_params(parameters["arg"], parameters["aux"], allow_extra=True)
        self._modules = {settings["batch_size"]: self._longest}

    def __call__(self, rows: np.ndarray[Any, Any]) -> list[Any]:
        """The outputs for an array of rows, as NDArrays."""
        data = mx.nd.array(rows, dtype=rows.dtype)
        if self._settings["images"] is not None:
            data = self._preprocessed(data, **self._settings["images"])
        module = self._module(len(rows))
        module.forward(mx.io.DataBatch(data=[data], label=None), is_train=False)
        outputs: list[Any] = module.get_outputs()
        return outputs

    def _preprocessed(
        self,
        images: Any,
        layout: str,
        grey: tuple[list[float], float, float] | None,
        is_bgr: bool,
        factor: list[float],
        offset: list[float],
    ) -> Any:
        """What `infermill.models.executable` puts in front of an ONNX graph: from uint8 NHWC RGB to the input."""
        data = images.astype("float32")
        if grey is not None:
            weights, half, unit = grey
            data = mx.nd.floor((mx.nd.dot(data, mx.nd.array(weights).reshape((3, 1))) + half) * unit)
        is_nchw = layout == "NCHW"
        if is_nchw:
            data = data.transpose((0, 3, 1, 2))
        if is_bgr:
            data = data.flip(axis=1 if is_nchw else 3)
        per_channel = (1, -1, 1, 1) if is_nchw else (1, 1, 1, -1)
        data = data * mx.nd.array(factor).reshape(per_channel) + mx.nd.array(offset).reshape(per_channel)
        return data.astype(self._settings["dtype"])

    def _module(self, length: int) -> Any:
        if length not in self._modules:
            self._modules[length] = self._bind(length, self._longest)
        return self._modules[length]

    def _bind(self, length: int, longest: Any = None) -> Any:
        """A Module for batches of this length; all share parameters and memory with the one for the longest."""
        name, dtype = self._settings["input"], self._settings["dtype"]
        shape = (length, *self._settings["shape"])
        shapes, _, _ = self._symbol.infer_shape(**{name: shape})
        arguments = self._symbol.list_arguments()
        labels = [(label, shapes[arguments.index(label)]) for label in self._labels]
        module = mx.mod.Module(self._symbol, data_names=[name], label_names=self._labels)
        module.bind([mx.io.DataDesc(name, shape, dtype)], labels or None, for_training=False, shared_module=longest)
        return module


class Memory:
    """The memory that both sides see: room for a batch of rows, and for each output of it."""

    def __init__(self, descriptor: int, rows: np.ndarray[Any, Any], outputs: list[Any]) -> None:
        self.places: list[dict[str, Any]] = []
        size = _aligned(rows.nbytes)
        for output in outputs:
            dtype = np.dtype(output.dtype)
            self.places.append({"shape": output.shape, "dtype": dtype.name, "offset": size})
            size += _aligned(math.prod(output.shape) * dtype.itemsize)
        os.ftruncate(descriptor, size)
        self._memory = mmap.mmap(descriptor, size)
        self.rows = np.frombuffer(self._memory, rows.dtype, rows.size).reshape(rows.shape)

    def write(self, outputs: list[Any]) -> list[tuple[int, ...]]:
        """Put the outputs of a batch where the other side reads them, and return their shapes."""
        for place, output in [(self.places[index], output) for index, output in enumerate(outputs)]:
            if output.size > math.prod(place["shape"]):
                raise ValueError(f"an output of shape {place['shape']} grew to {output.shape}")
            target = np.frombuffer(self._memory, place["dtype"], output.size, place["offset"])
            np.copyto(target.reshape(output.shape), output.asnumpy())
        return [output.shape for output in outputs]


def _aligned(size: int) -> int:
    return -(-max(size, 1) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _requests(connection: Connection) -> queue.Queue[dict[str, Any]]:
    """Messages, read by a thread that ends this process with the other side, whatever it is doing then."""
    messages: queue.Queue[dict[str, Any]] = queue.Queue()

    def receive() -> None:
        try:
            while True:
                messages.put(json.loads(connection.recv_bytes(MAX_MESSAGE_BYTES)))
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=receive, name="receive", daemon=True).start()
    return messages


def main() -> None:
    """Serve the connection and the memory that are open as the file descriptors in the arguments."""
    connection = Connection(int(sys.argv[1]))
    requests = _requests(connection)
    connection.send_bytes(json.dumps({"mxnet": mx.__version__}).encode())
    network: Network | None = None
    memory: Memory | None = None
    answer: dict[str, Any]
    while True:
        request = requests.get()
        try:
            if network is None or memory is None:
                network = Network(request)
                rows = np.zeros([request["batch_size"], *request["row_shape"]], request["row_dtype"])
                memory = Memory(int(sys.argv[2]), rows, network(rows))
                answer = {"outputs": memory.places}
            else:
                answer = {"shapes": memory.write(network(memory.rows[: request["length"]]))}
        except Exception as error:  # noqa: BLE001 - raised again by the other side
            answer = {"error": f"{type(error).__name__}: {error}"}
        connection.send_bytes(json.dumps(answer).encode())


if __name__ == "__main__":
    main()
