"""ResNet-18 with seeded random weights: the real architecture and cost, without a download.

Run it as `python benchmarks/resnet18.py resnet18.onnx`.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))


class Builder:
    """Collects nodes and weights; each method appends one layer and returns the name of its output."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def node(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [name], name, **attributes))
        return name

    def weight(self, name: str, values: NDArray[np.floating]) -> str:
        self.weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def conv(self, name: str, source: str, shape: tuple[int, int, int], stride: int) -> str:
        """A convolution of shape (out, in, kernel) without bias, and its BatchNormalization."""
        out_channels, in_channels, kernel = shape
        he_std = np.sqrt(2.0 / (in_channels * kernel * kernel))
        values = self.random.normal(0.0, he_std, (out_channels, in_channels, kernel, kernel))
        weight = self.weight(f"{name}_weight", values)
        pads, strides = [kernel // 2] * 4, [stride, stride]
        convolved = self.node(
            "Conv", f"{name}_conv", source, weight, kernel_shape=[kernel, kernel], pads=pads, strides=strides
        )
        statistics = [
            self.weight(f"{name}_gamma", self.random.uniform(0.5, 1.0, out_channels)),
            self.weight(f"{name}_beta", self.random.normal(0.0, 0.1, out_channels)),
            self.weight(f"{name}_mean", self.random.normal(0.0, 0.1, out_channels)),
            self.weight(f"{name}_var", self.random.uniform(0.5, 1.5, out_channels)),
        ]
        return self.node("BatchNormalization", name, convolved, *statistics, epsilon=1e-5)

    def block(self, name: str, source: str, channels: tuple[int, int], stride: int) -> str:
        """Two 3x3 convolutions with a shortcut, of (in, out) channels."""
        inside, out = channels
        first = self.conv(f"{name}_1", source, (out, inside, 3), stride)
        second = self.conv(f"{name}_2", self.node("Relu", f"{name}_relu1", first), (out, out, 3), 1)
        shortcut = source if inside == out else self.conv(f"{name}_down", source, (out, inside, 1), stride)
        return self.node("Relu", f"{name}_out", self.node("Add", f"{name}_add", second, shortcut))


def resnet18(path: Path, seed: int = 0) -> Path:
    """Write ResNet-18 (He et al. 2015, https://arxiv.org/abs/1512.03385) to `path`, 47 MB, opset 17.

    Its input is `data`, float32 [N, 3, height, width], normalised as for ImageNet; its output is `logits`, float32
    [N, 1000]. Different pictures have different best classes.

    Example:
        >>> resnet18(Path("resnet18.onnx"))  # doctest: +SKIP
        PosixPath('resnet18.onnx')
    """
    net = Builder(seed)
    stem = net.node("Relu", "stem_relu", net.conv("stem", "data", (64, 3, 7), 2))
    layer = net.node("MaxPool", "stem_pool", stem, kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2])
    inside = 64
    for number, (out, stride) in enumerate(STAGES, 1):
        layer = net.block(f"stage{number}_a", layer, (inside, out), stride)
        layer = net.block(f"stage{number}_b", layer, (out, out), 1)
        inside = out
    pooled = net.node("Flatten", "flat", net.node("GlobalAveragePool", "pool", layer), axis=1)
    return save_classifier(net, pooled, (inside, 1000), 224, path)


def save_classifier(net: Builder, pooled: str, sizes: tuple[int, int], side: int, path: Path) -> Path:
    """Write the network that ends in `pooled`, with a last layer of (features, classes), for pictures of a `side`."""
    inside, classes = sizes
    mean, std = _feature_statistics(_model(net, pooled, inside), net.random, side)
    weight = net.random.normal(0.0, 4.0 / np.sqrt(inside), sizes) / std[:, None]
    net.node("Gemm", "logits", pooled, net.weight("fc_weight", weight), net.weight("fc_bias", -mean @ weight))
    onnx.save(_model(net, "logits", classes), path)
    return path


def _model(net: Builder, output: str, length: int) -> onnx.ModelProto:
    graph = helper.make_graph(
        net.nodes,
        "resnet",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", length])],
        net.weights,
    )
    opset = helper.make_operatorsetid("", 17)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8, producer_name="infermill benchmarks")


def _feature_statistics(
    model: onnx.ModelProto, random: np.random.Generator, side: int
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Mean and deviation of the features over pictures of coarse patches.

    Features of random weights are nearly the same for every picture; centred and scaled they tell them apart.
    """
    counts = [count for count in (2, 4, 7, 8, 14, 16, 28, 32) if side % count == 0]
    patches = [random.normal(0.0, 1.2, (3, count, count)).astype(np.float32) for count in counts for _ in range(2)]
    pictures = np.stack([np.kron(patch, np.ones((side // patch.shape[1],) * 2, np.float32)) for patch in patches])
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    features = session.run(None, {"data": pictures})[0].astype(np.float64)
    # Rounded, so that the last bit of another processor's sums does not show in the file.
    return features.mean(axis=0).round(3), (features.std(axis=0) + 0.1).round(3)


if __name__ == "__main__":
    print(resnet18(Path(sys.argv[1])))
