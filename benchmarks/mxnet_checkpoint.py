"""A residual network as an MXNet checkpoint, from the weights of its ONNX. Runs in MXNet's own Python, as a script:

    python benchmarks/mxnet_checkpoint.py resnet18.npz FOLDER/resnet18

writes FOLDER/resnet18-symbol.json and FOLDER/resnet18-0000.params: the same network, so that its predictions can be
compared.
"""

import sys

import mxnet as mx
import numpy as np

EPSILON = 1e-5


def convolution(weights, name, source, stride):
    """A convolution without bias and its BatchNorm."""
    out, _, kernel, _ = weights[f"{name}_weight"].shape
    shape = {"kernel": (kernel, kernel), "stride": (stride, stride), "pad": (kernel // 2, kernel // 2)}
    layer = mx.sym.Convolution(source, num_filter=out, no_bias=True, name=name, **shape)
    return mx.sym.BatchNorm(layer, fix_gamma=False, eps=EPSILON, name=name)


def block(weights, name, source, stride):
    """Two convolutions of 3x3 with a shortcut."""
    first = mx.sym.Activation(convolution(weights, f"{name}_1", source, stride), act_type="relu")
    second = convolution(weights, f"{name}_2", first, 1)
    has_down = f"{name}_down_weight" in weights
    shortcut = convolution(weights, f"{name}_down", source, stride) if has_down else source
    return mx.sym.Activation(second + shortcut, act_type="relu")


def resnet(weights):
    """The residual network whose weights these are."""
    is_large = weights["stem_weight"].shape[-1] == 7
    stem = convolution(weights, "stem", mx.sym.Variable("data"), 2 if is_large else 1)
    layer = mx.sym.Activation(stem, act_type="relu")
    if is_large:
        layer = mx.sym.Pooling(layer, kernel=(3, 3), stride=(2, 2), pad=(1, 1), pool_type="max")
    for name in sorted({name.rsplit("_", 2)[0] for name in weights if name.startswith("stage")}):
        layer = block(weights, name, layer, 2 if name.endswith("_a") and "stage1" not in name else 1)
    pooled = mx.sym.Pooling(layer, global_pool=True, kernel=(1, 1), pool_type="avg")
    return mx.sym.FullyConnected(pooled, num_hidden=len(weights["fc_bias"]), name="fc")


def main(source, prefix):
    weights = dict(np.load(source))
    statistics = {"mean": "moving_mean", "var": "moving_var"}
    arguments, auxiliary = {}, {}
    for name, values in weights.items():
        stem, kind = name.rsplit("_", 1)
        if kind in statistics:
            auxiliary[f"{stem}_{statistics[kind]}"] = mx.nd.array(values)
        else:
            arguments[name] = mx.nd.array(values.T if name == "fc_weight" else values)
    mx.model.save_checkpoint(prefix, 0, resnet(weights), arguments, auxiliary)


if __name__ == "__main__":
    main(*sys.argv[1:])
