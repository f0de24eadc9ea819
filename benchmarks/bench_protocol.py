"""What the output protocol costs: a whole job against the same pipeline that writes its parts without it.

    python benchmarks/bench_protocol.py [--objects 20000] [--rounds 5]

Both list a folder, start one worker process, and write the same rows as Parquet with zstd. The job also probes the
store, writes and reads a plan and its record, creates every part durably and once, and leaves a _SUCCESS. The bare one
(`bare.py`) keeps its partitions in memory and writes files. The objects are small and the network is, too, so that the
protocol weighs as much as it can. Then: how long it takes to resume a large job in which all is done.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import infermill as im
from bench_pipeline import make_card
from measuring import infermill, machine, median, table
from photos import make_photos


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--objects", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keys", type=int, default=1_000_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        card = make_card(work, 64, 64)
        make_photos(work / "photos", arguments.objects, (80, 60))
        print(f"{machine()}\n\n{arguments.objects:,} images of 80x60, ResNet-18 at 64x64\n")
        _print_cost(work, card, arguments.objects, arguments.rounds)
        _print_resume(work, card, arguments.keys)


def _print_cost(work: Path, card: Path, objects: int, rounds: int) -> None:
    bare, whole = [], []
    bare_program = Path(__file__).with_name("bare.py")
    for _ in range(rounds):
        shutil.rmtree(work / "bare", ignore_errors=True)
        started = time.perf_counter()
        subprocess.run([sys.executable, bare_program, work / "photos", card, work / "bare"], check=True)
        bare.append(objects / (time.perf_counter() - started))
        shutil.rmtree(work / "whole", ignore_errors=True)
        started = time.perf_counter()
        im.run(work / "photos", card, work / "whole")
        whole.append(objects / (time.perf_counter() - started))
    ratios = [one / other for one, other in zip(whole, bare, strict=True)]
    rows = [
        ["without the protocol, images/s", f"{median(bare):.1f}", ""],
        ["the whole job, images/s", f"{median(whole):.1f}", f"{median(ratios):.1%}"],
        ["", "", f"({min(ratios):.1%} to {max(ratios):.1%})"],
    ]
    print(table(["protocol", "measured", "ratio"], rows), "\n", flush=True)


def _print_resume(work: Path, card: Path, keys: int) -> None:
    """A job whose objects are all gone: it ends soon, with a row for each, and resuming it has as much to look at."""
    manifest = work / "keys.txt"
    with manifest.open("w") as file:
        file.writelines(f"{work}/archive/{number // 1000:06d}/photo-{number:09d}.jpg\n" for number in range(keys))
    out = work / "resumed"
    first = infermill("run", str(manifest), "-m", str(card), "-o", str(out), "--json").json
    assert first["failed"] == keys, first
    again = infermill("run", str(manifest), "-m", str(card), "-o", str(out), "--json")
    assert again.json["model_loads"] == 0
    parts = len(list(out.glob("*.parquet")))
    row = [
        f"{keys:,}",
        f"{parts:,}",
        f"{first['seconds']:.0f} s",
        f"{again.seconds:.1f} s",
        f"{again.peak_mb:.0f} MB",
    ]
    print(table(["keys", "parts", "a row for each", "resumed, all done", "peak memory"], [row]))


if __name__ == "__main__":
    main()
