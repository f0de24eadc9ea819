"""ResNet-18 as an MXNet checkpoint, with seeded random weights. Runs in MXNet's own Python, as a script:

    python benchmarks/mxnet_resnet18.py FOLDER

writes FOLDER/resnet18-symbol.json and FOLDER/resnet18-0000.params, as Gluon's `export` does.
"""

import sys
from pathlib import Path

import mxnet as mx  # type: ignore[import-not-found]
import numpy as np


def main(folder: Path) -> None:
    random = np.random.default_rng(0)
    network = mx.gluon.model_zoo.vision.resnet18_v1()
    network.initialize(mx.init.Zero())
    network.hybridize()
    network(mx.nd.zeros((1, 3, 224, 224)))
    for name, parameter in network.collect_params().items():
        shape = parameter.shape
        if name.endswith("weight"):
            value = random.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
        elif name.endswith(("gamma", "var")):
            value = random.uniform(0.5, 1.0, shape)
        else:
            value = random.normal(0, 0.1, shape)
        parameter.set_data(mx.nd.array(value.astype(np.float32)))
    network.export(str(folder / "resnet18"), epoch=0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
