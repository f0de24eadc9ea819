"""Planning a million local keys, and how soon the command line answers."""

import json
import os
import sys
from pathlib import Path

from material import Material
from measuring import infermill, run_child, spread, table

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


def measure(made: Material) -> str:
    """Both tables, as Markdown."""
    keys = 1_000_000 if made.rounds > 1 else 10_000
    rows = [_plan(made.work, count) for count in (keys // 10, keys)]
    helps = [infermill("--help").seconds for _ in range(5)]
    planned = table(["local keys", "keys/s", "partitions", "peak memory"], rows)
    return f"{planned}\n\n`infermill --help`, whole process: {spread(helps, '.2f')} s."


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
