# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch==2.13.0+cpu",
#     "numpy==2.4.6",
#     "pillow==13.0.0",
#     "pyarrow==26.0.1",
# ]
# ///
"""PyTorch: a Dataset of photos, a DataLoader with workers, a network in eval and inference mode; Parquet.

    torch_dataloader.py PHOTOS NETWORK OUT SIDE WAY

https://docs.pytorch.org/docs/stable/data.html. The weights are those of the network, from the .npz beside it. WAY:
    workers  two worker processes prepare, and the network has a thread for each core
    one      one worker process, the network in channels-last
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from preprocessing import BATCH, arguments, paths, prepare, top5

EPSILON = 1e-5


class Photos(Dataset):
    def __init__(self, photos, side):
        self.paths, self.side = paths(photos), side

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, number):
        path = self.paths[number]
        return path, torch.from_numpy(prepare(Path(path).read_bytes(), self.side))


def convolution(weights, name, stride):
    """A convolution without bias and its BatchNorm, with their weights."""
    weight = torch.from_numpy(weights[f"{name}_weight"])
    out, inside, kernel, _ = weight.shape
    layer, norm = nn.Conv2d(inside, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out, EPSILON)
    statistics = {"weight": "gamma", "bias": "beta", "running_mean": "mean", "running_var": "var"}
    layer.load_state_dict({"weight": weight})
    found = {one: torch.from_numpy(weights[f"{name}_{other}"]) for one, other in statistics.items()}
    norm.load_state_dict(found | {"num_batches_tracked": torch.tensor(0)})
    return nn.Sequential(layer, norm)


class Block(nn.Module):
    def __init__(self, weights, name, stride):
        super().__init__()
        self.first, self.second = convolution(weights, f"{name}_1", stride), convolution(weights, f"{name}_2", 1)
        has_down = f"{name}_down_weight" in weights
        self.shortcut = convolution(weights, f"{name}_down", stride) if has_down else nn.Identity()

    def forward(self, images):
        return torch.relu(self.second(torch.relu(self.first(images))) + self.shortcut(images))


def resnet(weights):
    """The residual network whose weights these are."""
    is_large = weights["stem_weight"].shape[-1] == 7
    layers = [convolution(weights, "stem", 2 if is_large else 1), nn.ReLU()]
    if is_large:
        layers.append(nn.MaxPool2d(3, 2, 1))
    names = sorted({name.rsplit("_", 2)[0] for name in weights if name.startswith("stage")})
    layers += [Block(weights, name, 2 if name.endswith("_a") and "stage1" not in name else 1) for name in names]
    last = nn.Linear(*weights["fc_weight"].shape)
    last.load_state_dict(
        {"weight": torch.from_numpy(weights["fc_weight"].T), "bias": torch.from_numpy(weights["fc_bias"])}
    )
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)


def main():
    photos, network, out, side, way = arguments()
    model = resnet(dict(np.load(Path(network).with_suffix(".npz")))).eval()
    loader = DataLoader(Photos(photos, side), batch_size=BATCH, num_workers=2 if way == "workers" else 1)
    layout = torch.channels_last if way == "one" else torch.contiguous_format
    model = model.to(memory_format=layout)
    rows = []
    with torch.inference_mode():
        for keys, images in loader:
            index, score = top5(model(images.to(memory_format=layout)).numpy())
            rows += zip(keys, index.tolist(), score.tolist(), strict=True)
    Path(out).mkdir(parents=True)
    columns = [pa.array(values) for values in zip(*rows, strict=True)]
    pq.write_table(pa.table(columns, ["path", "index", "score"]), f"{out}/part.parquet")


if __name__ == "__main__":
    main()
