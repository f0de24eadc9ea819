"""ResNet-20 for images of 32x32, with seeded random weights: 41 million multiply-adds an image.

Run it as `python benchmarks/resnet20.py resnet20.onnx`.
"""

import sys
from pathlib import Path

from resnet18 import Builder, save_classifier


def resnet20(path: Path, seed: int = 0, width: int = 16, blocks: int = 3) -> Path:
    """Write the ResNet-20 of He et al. 2015 (https://arxiv.org/abs/1512.03385, section 4.2) to `path`, 1 MB, opset 17.

    With other numbers of channels and of blocks a stage, it is one of its relatives.

    Its input is `data`, float32 [N, 3, 32, 32], normalised as for ImageNet; its output is `logits`, float32 [N, 10].
    Where a stage begins, its shortcut is a convolution of 1x1.

    Example:
        >>> resnet20(Path("resnet20.onnx"))  # doctest: +SKIP
        PosixPath('resnet20.onnx')
    """
    net = Builder(seed)
    layer, inside = net.node("Relu", "stem_relu", net.conv("stem", "data", (width, 3, 3), 1)), width
    for stage, out in enumerate((width, 2 * width, 4 * width), 1):
        for block in range(blocks):
            stride = 2 if stage > 1 and block == 0 else 1
            layer = net.block(f"stage{stage}_{'abcdefgh'[block]}", layer, (inside, out), stride)
            inside = out
    pooled = net.node("Flatten", "flat", net.node("GlobalAveragePool", "pool", layer), axis=1)
    return save_classifier(net, pooled, (inside, 10), 32, path)


if __name__ == "__main__":
    print(resnet20(Path(sys.argv[1])))
