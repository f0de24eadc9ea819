"""The same MXNet checkpoint and the same photos: by the recipe of 2017, by MXNet in infermill, and translated.

    python benchmarks/bench_mxnet.py MXNET_PYTHON [--photos 2000] [--rounds 3]

MXNET_PYTHON is that of an environment with mxnet 1.9.1: `make mxnet-env` makes .make/mxnet/bin/python.
Steady rates are those of the photos after the first 64, which start everything; whole processes predict 200 photos.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import infermill, machine, median, run_child, table
from photos import make_photos

NAMES = {
    "recipe_8": "recipe of 2017 (RDD, mapPartitions, Module), batch 8",
    "recipe_64": "recipe of 2017, batch 64",
    "mxnet": "infermill --runtime mxnet",
    "translated": "infermill, translated, OpenVINO fp32",
}
HERE = Path(__file__).parent
SIZES = ["--shorter", "256", "--crop", "224", "224", "--scale", "0.00392156862745098"]
COLOURS = ["--mean", "0.485", "0.456", "0.406", "--std", "0.229", "0.224", "0.225"]
FLAGS = [*SIZES, *COLOURS, "--task", "classification", "--activation", "softmax"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mxnet_python")
    parser.add_argument("--photos", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        make_photos(work / "warm", 64)
        make_photos(work / "few", 136)
        make_photos(work / "photos", arguments.photos)
        subprocess.run([arguments.mxnet_python, str(HERE / "mxnet_resnet18.py"), scratch], check=True)
        print(f"{machine()}, mxnet 1.9.1\n\n{arguments.photos:,} photos of 500x375, ResNet-18 fp32\n", flush=True)
        _print_ways(work, arguments.mxnet_python, arguments.rounds, arguments.photos)
        _print_first_load(work, arguments.rounds)


def _print_ways(work: Path, mxnet_python: str, rounds: int, photos: int) -> None:
    steady: dict[str, list[float]] = {way: [] for way in NAMES}
    whole: dict[str, list[float]] = {way: [] for way in NAMES}
    for _ in range(rounds):
        for way in NAMES:
            command = [sys.executable, str(HERE / "mxnet_ways.py"), way, str(work), mxnet_python]
            steady[way].append(photos / run_child(*command, "photos").json["steady"])
            whole[way].append(run_child(*command, "few").seconds)
    best = max(("recipe_8", "recipe_64"), key=lambda way: median(steady[way]))
    rows = []
    for way, name in NAMES.items():
        rates = [one / other for one, other in zip(steady[way], steady[best], strict=True)]
        times = [other / one for one, other in zip(whole[way], whole[best], strict=True)]
        rows.append([name, f"{median(steady[way]):.1f}", _ratio(rates), f"{median(whole[way]):.1f} s", _ratio(times)])
    print(table(["way", "images/s, steady", "times the better recipe", "200 photos, whole process", "times"], rows))


def _ratio(values: list[float]) -> str:
    return f"{median(values):.2f}x ({min(values):.2f} to {max(values):.2f})"


def _print_first_load(work: Path, rounds: int) -> None:
    """Translating the checkpoint, loading it and predicting 8 photos, with an empty cache: the whole command."""
    few = work / "eight"
    few.mkdir()
    for photo in sorted((work / "warm").iterdir())[:8]:
        shutil.copy(photo, few)
    seconds = {"translating": [], "from the cache": []}  # type: dict[str, list[float]]
    for number in range(rounds):
        for what, times in seconds.items():
            out, cache = work / f"first-{number}-{what}", work / f"cache-{number}"
            command = ["run", str(few), "-m", str(work / "resnet18-symbol.json"), "-o", str(out), *FLAGS]
            times.append(infermill(*command, XDG_CACHE_HOME=str(cache)).seconds)
    told = ", ".join(f"{what} {median(times):.2f} s" for what, times in seconds.items())
    print(f"\n8 photos, whole process, {told}")


if __name__ == "__main__":
    main()
