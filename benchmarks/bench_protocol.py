"""What the output protocol costs: a whole job against the same pipeline that writes its parts without it.

Both list a folder, start one worker process, and write the same rows as Parquet with zstd. The job also probes the
store, writes and reads a plan and its record, creates every part durably and once, and leaves a _SUCCESS. The bare one
(`bare.py`) keeps its partitions in memory and writes files. The objects are small and the network is, too, so that the
protocol weighs as much as it can. Then: how long it takes to resume a large job in which all is done.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import infermill as im
from material import Material, make_card
from measuring import infermill, median, spread, table
from photos import make_photos


def measure(made: Material) -> str:
    """Both tables, as Markdown."""
    objects, keys = (20_000, 1_000_000) if made.rounds > 1 else (200, 10_000)
    card = make_card(made.work, 64)
    make_photos(made.work / "small", objects, (80, 60))
    told = f"{objects:,} images of 80x60, ResNet-18 at 64x64:"
    return f"{told}\n\n{_cost(made, card, objects)}\n\n{_resume(made.work, card, keys)}"


def _cost(made: Material, card: Path, objects: int) -> str:
    work = made.work
    bare, whole = [], []
    bare_program = Path(__file__).with_name("bare.py")
    for _ in range(made.rounds):
        shutil.rmtree(work / "bare", ignore_errors=True)
        started = time.perf_counter()
        subprocess.run([sys.executable, bare_program, work / "small", card, work / "bare"], check=True)
        bare.append(objects / (time.perf_counter() - started))
        shutil.rmtree(work / "whole", ignore_errors=True)
        started = time.perf_counter()
        im.run(work / "small", card, work / "whole")
        whole.append(objects / (time.perf_counter() - started))
    ratios = [one / other for one, other in zip(whole, bare, strict=True)]
    rows = [
        ["without the protocol, images/s", f"{median(bare):.1f}", ""],
        ["the whole job, images/s", f"{median(whole):.1f}", spread(ratios, ".1%")],
    ]
    return table(["protocol", "measured", "ratio"], rows)


def _resume(work: Path, card: Path, keys: int) -> str:
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
    return table(["keys", "parts", "a row for each", "resumed, all done", "peak memory"], [row])
