"""Small networks with seeded random weights, and MXNet's own answers. Runs in MXNet's own Python, as a script:

    python tests/mxnet_small.py FOLDER

writes `residual`, `grey` and `rows` there as MXNet saves checkpoints, and of each an `.npz`: 21 inputs, as they are
before preprocessing, and what `Module` answers after it.
"""

import sys
from pathlib import Path
from typing import Any

import mxnet as mx  # type: ignore[import-not-found]
import numpy as np

COUNT = 21
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def residual() -> Any:
    """32x32 in colour: convolutions with BatchNorm, and one way around them; the label has a name of its own."""
    stem = mx.sym.Convolution(mx.sym.var("data"), num_filter=8, kernel=(3, 3), pad=(1, 1), no_bias=True, name="conv0")
    stem = mx.sym.Activation(mx.sym.BatchNorm(stem, name="bn0"), act_type="relu", name="relu0")
    way = mx.sym.Convolution(stem, num_filter=8, kernel=(3, 3), pad=(1, 1), name="conv1")
    way = mx.sym.Activation(mx.sym.BatchNorm(way, fix_gamma=False, name="bn1"), act_type="relu", name="relu1")
    joined = mx.sym.elemwise_add(stem, way, name="plus0")
    pooled = mx.sym.Pooling(joined, kernel=(4, 4), stride=(4, 4), pool_type="avg", name="pool0")
    features = mx.sym.FullyConnected(mx.sym.flatten(pooled, name="flatten0"), num_hidden=10, name="fc0")
    return mx.sym.SoftmaxOutput(features, mx.sym.var("truth"), name="softmax")


def grey() -> Any:
    """28x28 in grey, with two outputs."""
    tip = mx.sym.Convolution(mx.sym.var("data"), num_filter=6, kernel=(5, 5), name="conv0")
    tip = mx.sym.Pooling(mx.sym.tanh(tip, name="tanh0"), kernel=(2, 2), stride=(2, 2), pool_type="max", name="pool0")
    tip = mx.sym.flatten(tip, name="flatten0")
    hidden = mx.sym.FullyConnected(tip, num_hidden=12, name="fc0")
    return mx.sym.Group([hidden, mx.sym.FullyConnected(hidden, num_hidden=4, name="fc1")])


def rows() -> Any:
    """Six numbers a row."""
    hidden = mx.sym.FullyConnected(mx.sym.var("data"), num_hidden=16, name="fc0")
    return mx.sym.FullyConnected(mx.sym.Activation(hidden, act_type="tanh", name="tanh0"), num_hidden=3, name="fc1")


def write(folder: Path, name: str, symbol: Any, given: Any, data: Any) -> None:
    """A checkpoint, and its answers to `data`, which is `given` after preprocessing."""
    random = np.random.default_rng(0)
    labels = [one for one in symbol.list_arguments() if one == "truth"]
    arguments, _, auxiliary = symbol.infer_shape(data=data.shape)
    values = {
        one: mx.nd.array(random.normal(0, np.sqrt(2 / max(np.prod(shape[1:]), 8)), shape))
        for one, shape in zip(symbol.list_arguments(), arguments, strict=True)
        if one not in ("data", *labels)
    }
    running = {
        one: mx.nd.array(random.uniform(0.3, 1.2, shape))
        for one, shape in zip(symbol.list_auxiliary_states(), auxiliary, strict=True)
    }
    module = mx.mod.Module(symbol, label_names=labels)
    module.bind([("data", data.shape)], for_training=False)
    module.set_params(values, running)
    module.save_checkpoint(str(folder / name), 0)
    module.forward(mx.io.DataBatch([mx.nd.array(data)]), is_train=False)
    np.savez(folder / f"{name}.npz", given=given, **{one: output.asnumpy() for one, output in _named(symbol, module)})


def _named(symbol: Any, module: Any) -> Any:
    return zip(symbol.list_outputs(), module.get_outputs(), strict=True)


def main(folder: Path) -> None:
    """Write all of them."""
    random = np.random.default_rng(1)
    patches = random.integers(0, 256, (COUNT, 4, 4, 3), np.uint8)
    pictures = patches.repeat(8, axis=1).repeat(8, axis=2)
    values = ((pictures / 255 - np.array(MEAN)) / np.array(STD)).transpose(0, 3, 1, 2)
    write(folder, "residual", residual(), pictures, values.astype(np.float32))
    pictures = pictures[:, :28, :28]
    # Pillow's convert("L").
    luminance = (pictures.astype(np.int64) @ np.array([19595, 38470, 7471]) + 0x8000) >> 16
    write(folder, "grey", grey(), pictures, (luminance[:, None] / 255).astype(np.float32))
    numbers = random.normal(0, 1, (COUNT, 6)).astype(np.float32)
    write(folder, "rows", rows(), numbers, numbers)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
