"""The same photos on the Spark engine, as a DataFrame column, and by Spark's own `predict_batch_udf`.

    python benchmarks/bench_spark.py [--photos 2000] [--rounds 3]

All run on the cores of this machine, ResNet-18 in fp32, and write Parquet. Start-up (Java, Python workers, the network,
and 64 photos) is told apart; the rates are those of the photos after it. See `spark_ways.py` for what each way does.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from bench_pipeline import make_card
from measuring import machine, median, run_child, table
from photos import make_photos
from spark_ways import WAYS

NAMES = {
    "local": "infermill, local engine",
    "engine": "infermill, Spark engine",
    "engine_single": "infermill, Spark engine, a task a partition",
    "column": "infermill.spark.predict over binaryFile",
    "batch_udf": "predict_batch_udf over binaryFile, ONNX Runtime",
    "batch_udf_single": "… with a thread of ONNX Runtime for each task",
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--photos", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=[*WAYS])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        make_card(work, 256, 224)
        make_photos(work / "warm", 64)
        make_photos(work / "photos", arguments.photos)
        print(f"{machine()}\n\n{arguments.photos:,} photos of 500x375, ResNet-18 fp32\n", flush=True)
        starts: dict[str, list[float]] = {way: [] for way in arguments.ways}
        rates: dict[str, list[float]] = {way: [] for way in arguments.ways}
        for _ in range(arguments.rounds):
            for way in arguments.ways:
                measured = run_child(
                    sys.executable, str(Path(__file__).with_name("spark_ways.py")), way, str(work)
                ).json
                starts[way].append(measured["start"])
                rates[way].append(arguments.photos / measured["steady"])
    rows = []
    for way in arguments.ways:
        ratios = [one / other for one, other in zip(rates[way], rates[arguments.ways[0]], strict=True)]
        spread = f"{median(ratios):.1%} ({min(ratios):.1%} to {max(ratios):.1%})"
        rows.append([NAMES[way], f"{median(starts[way]):.1f} s", f"{median(rates[way]):.1f}", spread])
    print(table(["way", "start-up", "images/s after it", f"of {NAMES[arguments.ways[0]]}"], rows))


if __name__ == "__main__":
    main()
