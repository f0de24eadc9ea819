"""Planning a million local keys, and how soon the command line answers.

python benchmarks/bench_plan.py [--keys 1000000]
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from infermill.demo import prepare_demo
from measuring import Child, infermill, machine, median, run_child, table
from photos import make_photos

PLAN = """
import json, sys, time
from infermill.output import Output, PLAN_FOLDER
from infermill.plan import cut, write_plan
from infermill.sources import list_source
from infermill.types import Options
options = Options()
output = Output(sys.argv[2], options)
started = time.perf_counter()
_, batches = list_source(sys.argv[1], None, options)
tables = cut(batches, options.partition_objects, options.partition_bytes, None)
plan = write_plan(tables, "bench", lambda name, content: output.create(f"{PLAN_FOLDER}/{name}", content))
print(json.dumps({"objects": plan.objects, "seconds": time.perf_counter() - started, "partitions": plan.partitions}))
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--keys", type=int, default=1_000_000)
    keys = parser.parse_args().keys
    print(f"{machine()}\n")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        rows = [_plan(work, count) for count in (keys // 10, keys)]
        print(table(["local keys", "keys/s", "partitions", "peak memory"], rows), "\n")
        demo = prepare_demo()
        make_photos(work / "twelve", 12)
        helps = [infermill("--help") for _ in range(5)]
        runs = [_run_twelve(work, demo.card, number) for number in range(5)]
        whole = [
            ["`infermill --help`", f"{median([child.seconds for child in helps]):.2f} s"],
            ["`infermill run` over 12 photos", f"{median([child.seconds for child in runs]):.2f} s"],
        ]
        print(table(["whole process", "median of 5"], whole))


def _plan(work: Path, count: int) -> list[str]:
    folder = work / f"keys-{count}"
    for number in range(count):
        if number % 10_000 == 0:
            (inner := folder / f"{number // 10_000:04d}").mkdir(parents=True)
        os.close(os.open(inner / f"object-{number:08d}.jpg", os.O_CREAT | os.O_WRONLY))
    child = run_child(sys.executable, "-c", PLAN, str(folder), str(work / f"out-{count}"))
    result = json.loads(child.stdout)
    assert result["objects"] == count
    pace = count / result["seconds"]
    return [f"{count:,}", f"{pace:,.0f}", f"{result['partitions']:,}", f"{child.peak_mb:.0f} MB"]


def _run_twelve(work: Path, card: Path, number: int) -> Child:
    return infermill("run", str(work / "twelve"), "-m", str(card), "-o", str(work / f"twelve-{number}"), "--json")


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"\n{time.perf_counter() - started:.0f} s in all")
