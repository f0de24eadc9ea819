"""What the probe chooses, against every setting in a grid: the network alone, decoded rows in, predictions out.

Settings are measured in turn, in rounds, and figures are medians of what each round gives as a share of its best.

Run it as `python benchmarks/bench_tuning.py`, or with the names of some of the networks.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from infermill.limits import usable_cores
from infermill.models.card_file import parse_card
from infermill.models.model import Model
from infermill.predictions import TaskRows, infer, rows_for
from infermill.runtimes import Predictor, load
from infermill.tuning import Work, load_tuned
from infermill.types import Options
from measuring import machine, median, table
from resnet18 import Builder, resnet18, save_classifier
from resnet20 import resnet20

ROUNDS = 5
LONG = 10**9


def resnet50(path: Path) -> Path:
    """ResNet-50 with seeded random weights."""
    net = Builder(0)
    stem = net.node("Relu", "stem_relu", net.conv("stem", "data", (64, 3, 7), 2))
    layer = net.node("MaxPool", "stem_pool", stem, kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2])
    inside = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for number in range(blocks):
            name, stride = f"stage{stage}_{number}", 1 + (stage > 0 and number == 0)
            tip = net.node("Relu", f"{name}_relu1", net.conv(f"{name}_1", layer, (width, inside, 1), 1))
            tip = net.node("Relu", f"{name}_relu2", net.conv(f"{name}_2", tip, (width, width, 3), stride))
            tip = net.conv(f"{name}_3", tip, (4 * width, width, 1), 1)
            short = net.conv(f"{name}_down", layer, (4 * width, inside, 1), stride) if number == 0 else layer
            layer, inside = net.node("Relu", f"{name}_out", net.node("Add", f"{name}_add", tip, short)), 4 * width
    pooled = net.node("Flatten", "flat", net.node("GlobalAveragePool", "pool", layer), axis=1)
    return save_classifier(net, pooled, (inside, 1000), 224, path)


@dataclass(frozen=True, slots=True)
class Case:
    """A network, and the batches of its grid."""

    name: str
    make: Callable[[Path], Path]
    size: int
    batches: tuple[int, ...]
    slice_seconds: float


CASES = (
    Case("thin", lambda path: resnet20(path, width=4, blocks=1), 32, (1, 4, 8, 16, 32, 64, 128), 0.2),
    Case("resnet20", resnet20, 32, (1, 4, 8, 16, 32, 64, 128), 0.4),
    Case("resnet18", resnet18, 224, (1, 4, 8, 16, 32), 1.0),
    Case("resnet50", resnet50, 224, (1, 4, 8, 16), 1.0),
)


def images_per_second(predictor: Predictor, tasks: TaskRows, batch: int, seconds: float) -> float:
    """Of as many threads as there are streams."""
    rows = list(np.random.default_rng(0).integers(0, 256, (batch, *predictor.input_shape), np.uint8))
    predictor = replace(predictor, batch_size=batch)
    stop = time.perf_counter() + seconds

    def go(_: int) -> float:
        started, calls = time.perf_counter(), 0
        while not calls or time.perf_counter() < stop:
            tasks.finish(infer(predictor, np.stack(rows)))
            calls += 1
        return calls * batch / (time.perf_counter() - started)

    with ThreadPoolExecutor(predictor.streams) as pool:
        return sum(pool.map(go, range(predictor.streams)))


def measure(case: Case, folder: Path, threads: int) -> None:
    """Print a network's grid, and what the probe chooses in it."""
    path = case.make(folder / f"{case.name}.onnx")
    fields = {"name": case.name, "files": {"onnx": path.name}, "preprocess": {"resize": {"exact": [case.size] * 2}}}
    model = Model(parse_card(fields, case.name), path, None, f"sha256:{case.name}")
    started = time.perf_counter()
    chosen, _ = load_tuned(model, Options(), threads, Work(LONG, (64 << 20) // (3 * case.size**2)))
    took = time.perf_counter() - started
    loaded = {streams: load(model, "openvino", threads, streams=streams) for streams in {threads, 1}}
    tasks = rows_for(model, chosen)
    choice = (chosen.streams, chosen.batch_size)
    settings = sorted({(streams, batch) for streams in loaded for batch in case.batches} | {choice})
    rounds: list[dict[tuple[int, int], float]] = []
    for number in range(ROUNDS + 1):  # the first one warms up
        order = settings if number % 2 else settings[::-1]
        seconds = case.slice_seconds if number else 0.0
        rounds.append({one: images_per_second(loaded[one[0]], tasks, one[1], seconds) for one in order})
    shares = {one: median([each[one] / max(each.values()) for each in rounds[1:]]) for one in settings}
    best = max(shares, key=lambda one: shares[one])
    rates = {one: median([each[one] for each in rounds[1:]]) for one in settings}
    batches = sorted({batch for _, batch in settings})
    print(f"\n{case.name}, {case.size}x{case.size}: images/s, and as a share of the best of each round\n")
    body = [
        [
            f"{streams} stream{'s' if streams > 1 else ''}",
            *(
                f"{rates[streams, batch]:,.0f} ({shares[streams, batch]:.0%})" if (streams, batch) in rates else ""
                for batch in batches
            ),
        ]
        for streams in sorted(loaded, reverse=True)
    ]
    print(table(["batch", *map(str, batches)], body))
    default = (threads, 8)
    print(
        f"\nchosen: {choice[1]} x {choice[0]} streams ({chosen.reason}), in {took:.1f} s with loading; "
        f"{shares[choice] / shares[best]:.0%} of the best, {best[1]} x {best[0]}; "
        f"the default is {shares[default] / shares[best]:.0%} of it",
        flush=True,
    )


def main() -> None:
    """Measure the networks that are named, or all."""
    threads = usable_cores()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        for case in CASES:
            if case.name in sys.argv[1:] or not sys.argv[1:]:
                measure(case, Path(folder), threads)


if __name__ == "__main__":
    main()
