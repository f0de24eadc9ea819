"""Networks with seeded random weights and MXNet's own answers. Runs in MXNet's own Python, as a script:

    python tests/mxnet_zoo.py

reads lines of `["FOLDER", "NAME"]`, and answers each with a line when it has written the network: `NAME-symbol.json`
and `NAME-0000.params` as MXNet saves them, and `NAME.npz`: `data` (5 inputs), `outputs0`, … for all of them at once,
`single0`, … for the first one alone, and `names`, those of all tensors. A name is one of `mxnet_symbols`, or `gluon-`
and one of Gluon's zoo; `operators` stands for all of `mxnet_operators`.
"""

import ctypes
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mxnet as mx  # type: ignore[import-not-found]
import numpy as np

from mxnet_operators import operator_cases  # type: ignore[import-not-found]
from mxnet_symbols import CLASSES, SYMBOLS  # type: ignore[import-not-found]

BATCH = 5
SIDES = {
    **dict.fromkeys([f"gluon-densenet{depth}" for depth in (121, 161, 169, 201)], 224),
    **dict.fromkeys(("gluon-squeezenet1.0", "gluon-squeezenet1.1"), 224),
    **dict.fromkeys([f"gluon-vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn")], 32),
    "gluon-alexnet": 96,
    "gluon-inceptionv3": 299,
    "gluon-resnet152_v1": 128,
}


def write(folder: Path, name: str, symbol: Any, shape: tuple[int, ...], seed: int = 0) -> None:
    """A network and its answers."""
    random = np.random.default_rng(seed)
    arrays = _random_parameters(symbol, shape, random)
    data = random.normal(0, 1, (BATCH, *shape)).astype(np.float32)
    _calibrate(symbol, arrays, data, random)
    auxiliary = set(symbol.list_auxiliary_states())
    saved = {f"{'aux' if key in auxiliary else 'arg'}:{key}": mx.nd.array(value) for key, value in arrays.items()}
    saved = saved or {"arg:unused": mx.nd.zeros((1,))}  # MXNet warns of an empty file
    symbol.save(str(folder / f"{name}-symbol.json"))
    mx.nd.save(str(folder / f"{name}-0000.params"), saved)
    answers: dict[str, Any] = {"data": data, "names": np.array(symbol.get_internals().list_outputs())}
    for what, inputs in (("outputs", data), ("single", data[:1])):
        for index, output in enumerate(_module_outputs(folder / name, inputs)):
            answers[f"{what}{index}"] = output
    np.savez(folder / f"{name}.npz", **answers)


def _random_parameters(symbol: Any, shape: tuple[int, ...], random: np.random.Generator) -> dict[str, Any]:
    """He's initialisation, so that activations neither vanish nor explode."""
    arguments, _, auxiliary = symbol.infer_shape(data=(BATCH, *shape))
    shapes = dict(zip(symbol.list_arguments(), arguments, strict=True))
    arrays: dict[str, Any] = {}
    for name, size in shapes.items():
        if name == "data" or name.endswith("label"):
            continue
        if name.endswith("gamma"):
            arrays[name] = random.uniform(0.5, 1.5, size)
        elif name.endswith("weight") and len(size) > 1:
            arrays[name] = random.normal(0, np.sqrt(2 / np.prod(size[1:])), size)
        else:
            arrays[name] = random.normal(0, 0.1, size)
    for name, size in zip(symbol.list_auxiliary_states(), auxiliary, strict=True):
        arrays[name] = random.uniform(0.5, 1.5, size) if name.endswith("var") else random.normal(0, 0.2, size)
    return {name: value.astype(np.float32) for name, value in arrays.items()}


def _calibrate(symbol: Any, arrays: dict[str, Any], data: Any, random: np.random.Generator) -> None:
    """Moving statistics near those of the data, but not the same: else a hundred layers make 1e15 of 1."""
    nodes = json.loads(symbol.tojson())["nodes"]
    norms = {f"{node['name']}_data": node for node in nodes if node["op"] == "BatchNorm"}
    if len(norms) < 5:
        return

    def see(name: bytes, handle: int) -> None:
        node = norms.get(name.decode())
        if node is None:
            return
        values = mx.nd.NDArray(ctypes.cast(handle, mx.base.NDArrayHandle), writable=False).asnumpy()
        mean, variance = values.mean((0, 2, 3)), values.var((0, 2, 3))
        variance += 0.1 * variance.mean()
        mean_name, variance_name = (nodes[entry[0]]["name"] for entry in node["inputs"][3:5])
        arrays[mean_name] = (mean + random.normal(0, 0.2, mean.shape) * np.sqrt(variance)).astype(np.float32)
        arrays[variance_name] = (variance * random.uniform(0.7, 1.4, mean.shape)).astype(np.float32)

    # Else oneDNN's fused layers hide what goes into a BatchNorm.
    os.environ["MXNET_SUBGRAPH_BACKEND"] = "NONE"
    executor = symbol.simple_bind(mx.cpu(), grad_req="null", data=data.shape)
    del os.environ["MXNET_SUBGRAPH_BACKEND"]
    parameters = {name: mx.nd.array(value) for name, value in arrays.items()}
    executor.copy_params_from(parameters, parameters, allow_extra_params=True)
    executor.set_monitor_callback(see, monitor_all=True)
    executor.forward(is_train=True, data=mx.nd.array(data))
    mx.nd.waitall()


def _module_outputs(prefix: Path, data: Any) -> list[Any]:
    symbol, arguments, auxiliary = mx.model.load_checkpoint(str(prefix), 0)
    labels = [name for name in symbol.list_arguments() if name.endswith("label")]
    module = mx.mod.Module(symbol, label_names=labels, context=mx.cpu())
    module.bind(data_shapes=[("data", data.shape)], for_training=False)
    module.set_params(arguments, auxiliary)
    module.forward(mx.io.DataBatch([mx.nd.array(data)]), is_train=False)
    return [output.asnumpy() for output in module.get_outputs()]


def networks(name: str) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """Name, symbol and shape of one input, of what `name` stands for."""
    if name == "operators":
        yield from operator_cases()
    elif name in SYMBOLS:
        build, side = SYMBOLS[name]
        yield name, build(), (3, side, side)
    else:
        network = mx.gluon.model_zoo.vision.get_model(name.removeprefix("gluon-"), classes=CLASSES)
        side = SIDES.get(name, 64)
        yield name, network(mx.sym.Variable("data")), (3, side, side)


if __name__ == "__main__":
    for line in sys.stdin:
        folder, name = json.loads(line)
        for number, (case, symbol, shape) in enumerate(networks(name)):
            write(Path(folder), case, symbol, shape, number)
        print(name, flush=True)
