"""ResNet-18 of MXNet's example/image-classification, as a checkpoint with seeded random weights; without MXNet."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.checkpoints import node, symbol_of, write_params

STAGES = (64, 128, 256, 512)
UNITS = 2


class _Graph:
    """Collects nodes and parameters; a layer's number is returned."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.arrays: dict[str, NDArray[np.float32]] = {}
        self._random = np.random.default_rng(18)

    def variable(self, name: str) -> int:
        self.nodes.append(node("null", name))
        return len(self.nodes) - 1

    def parameter(self, name: str, values: NDArray[np.floating], kind: str = "arg") -> int:
        self.arrays[f"{kind}:{name}"] = values.astype(np.float32)
        return self.variable(name)

    def layer(self, op: str, name: str, inputs: Sequence[int], **attrs: str) -> int:
        self.nodes.append(node(op, name, inputs, **attrs))
        return len(self.nodes) - 1

    def weight(self, name: str, *shape: int) -> int:
        scale = np.sqrt(2 / np.prod(shape[1:]))
        return self.parameter(f"{name}_weight", self._random.normal(0, scale, shape))

    def convolution(self, name: str, tip: int, shape: tuple[int, int, int], stride: int) -> int:
        outside, inside, side = shape
        inputs = [tip, self.weight(name, outside, inside, side, side)]
        attrs = {"num_filter": str(outside), "kernel": f"({side}, {side})", "stride": f"({stride}, {stride})"}
        return self.layer("Convolution", name, inputs, pad=f"({side // 2}, {side // 2})", no_bias="True", **attrs)

    def norm(self, name: str, tip: int, channels: int, spread: float = 1.0, fix_gamma: str = "False") -> int:
        uniform, normal = self._random.uniform, self._random.normal
        inputs = [
            tip,
            self.parameter(f"{name}_gamma", uniform(0.8, 1.2, channels)),
            self.parameter(f"{name}_beta", normal(0, 0.1, channels)),
            self.parameter(f"{name}_moving_mean", normal(0, 0.1, channels), "aux"),
            self.parameter(f"{name}_moving_var", spread**2 * uniform(0.8, 1.2, channels), "aux"),
        ]
        return self.layer("BatchNorm", name, inputs, eps="2e-05", fix_gamma=fix_gamma)

    def relu(self, name: str, tip: int) -> int:
        return self.layer("Activation", name, [tip], act_type="relu")

    def unit(self, name: str, tip: int, inside: int, outside: int, stride: int) -> int:
        """Two convolutions that are normalised before, beside a shortcut."""
        act1 = self.relu(f"{name}_relu1", self.norm(f"{name}_bn1", tip, inside))
        conv1 = self.convolution(f"{name}_conv1", act1, (outside, inside, 3), stride)
        act2 = self.relu(f"{name}_relu2", self.norm(f"{name}_bn2", conv1, outside))
        conv2 = self.convolution(f"{name}_conv2", act2, (outside, outside, 3), 1)
        is_same = inside == outside and stride == 1
        shortcut = tip if is_same else self.convolution(f"{name}_sc", act1, (outside, inside, 1), stride)
        return self.layer("elemwise_add", f"{name}_plus", [conv2, shortcut])


def write_resnet18(folder: Path, classes: int) -> Path:
    """`resnet-18-symbol.json` and `resnet-18-0000.params`; what is returned is their prefix."""
    graph = _Graph()
    # Pixels of 0..255, which this network normalises by itself.
    tip = graph.norm("bn_data", graph.variable("data"), 3, 70.0, fix_gamma="True")
    tip = graph.convolution("conv0", tip, (64, 3, 7), 2)
    tip = graph.relu("relu0", graph.norm("bn0", tip, 64))
    tip = graph.layer("Pooling", "pooling0", [tip], kernel="(3, 3)", stride="(2, 2)", pad="(1, 1)", pool_type="max")
    inside = STAGES[0]
    for stage, outside in enumerate(STAGES, 1):
        for unit in range(1, UNITS + 1):
            stride = 2 if stage > 1 and unit == 1 else 1
            tip = graph.unit(f"stage{stage}_unit{unit}", tip, inside, outside, stride)
            inside = outside
    tip = graph.relu("relu1", graph.norm("bn1", tip, inside, spread=8.0))
    tip = graph.layer("Pooling", "pool1", [tip], global_pool="True", kernel="(7, 7)", pool_type="avg")
    inputs = [graph.layer("Flatten", "flatten0", [tip]), graph.weight("fc1", classes, inside)]
    inputs.append(graph.parameter("fc1_bias", np.zeros(classes)))
    tip = graph.layer("FullyConnected", "fc1", inputs, num_hidden=str(classes))
    graph.layer("SoftmaxOutput", "softmax", [tip, graph.variable("softmax_label")])
    prefix = folder / "resnet-18"
    Path(f"{prefix}-symbol.json").write_text(json.dumps(symbol_of(*graph.nodes)))
    write_params(Path(f"{prefix}-0000.params"), graph.arrays)
    return prefix
