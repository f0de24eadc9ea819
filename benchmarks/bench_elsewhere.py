"""The same photos and network by other ways of infermill: from an S3 server, on Spark, and by MXNet itself.

Beside them the two peers that they take the place of: Spark's `predict_batch_udf`, and the recipe of 2017.
"""

import sys
import time
from pathlib import Path

import boto3

from alone import additive_limit, decode_rate, network_rate
from infermill.limits import usable_cores
from material import Material
from measuring import cpu_seconds, median, run_child, s3_server, spread, table
from rates import Series, failures, times
from ways import Way, checkpoint, job, mxnet_python, peer_ways

KEYS = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_REGION": "us-east-1"}
SIZES = ("--shorter", "256", "--crop", "224", "224", "--scale", "0.00392156862745098")
COLOURS = ("--mean", "0.485", "0.456", "0.406", "--std", "0.229", "0.224", "0.225")
REPLACED = ("recipe_2017", "spark_predict_batch_udf")
FLAGS = (*SIZES, *COLOURS, "--task", "classification", "--activation", "softmax")


def measure(made: Material) -> str:
    """A table of rates, of those of local files on this machine's own engine."""
    card = made.work / "model-224.yaml"
    local = Series(job("local files", card))
    lacking, translation = {}, ""
    master = f"local[{usable_cores()}]"
    others = [
        Series(job("`--engine spark`", card, "--engine", "spark", "--master", master)),
        Series(_program("the same, 6 partitions in a task", "spark_engine.py", card, made.few // 6, 8)),
        Series(_program("the same, 6 partitions in 6 tasks", "spark_engine.py", card, made.few // 6, 1)),
        Series(_program("`infermill.spark.predict` over `binaryFile`", "spark_column.py", card)),
    ]
    if python := mxnet_python():
        symbol = checkpoint(made.work / "resnet18.onnx", Path(python)).with_name("resnet18-symbol.json")
        others.append(Series(job("an MXNet checkpoint, translated", symbol, *FLAGS)))
        seconds = [_translated_seconds(made, symbol) for _ in range(made.rounds)]
        translation = f" The MXNet checkpoint is translated and loaded in {spread(seconds, '.1f')} s."
        mxnet = ("--runtime", "mxnet", "--runtime-python", python)
        others.append(Series(job("the same, `--runtime mxnet`", symbol, *FLAGS, *mxnet)))
    else:
        lacking["`--runtime mxnet`"] = "the recipe's environment is not there"
    programs = [program for program in REPLACED if program in made.peers]
    ways, not_there = peer_ways(made.work / "resnet18.onnx", 224, programs)
    lacking |= not_there
    theirs = [Series(way) for way in ways]
    with s3_server() as (url, server):
        remote = Series(job("from an S3 server on the same cores", card, "--endpoint-url", url, **KEYS))
        for folder in ("twelve", "few"):
            _upload(url, made.work / folder)
        shares, limits = [], []
        for _ in range(made.rounds):
            network = network_rate(card)
            local.measure(made, made.work / "twelve", made.work / "few", made.few)
            before, started = cpu_seconds(server), time.perf_counter()
            remote.measure(made, "s3://twelve/", "s3://few/", made.few)
            shares.append((cpu_seconds(server) - before) / (time.perf_counter() - started) / usable_cores())
            limits.append(additive_limit((network + network_rate(card)) / 2, decode_rate(made.work / "photos")))
            for series in (*others, *theirs):
                series.measure(made, made.work / "twelve", made.work / "few", made.few)
    rows = [
        [
            series.way.name,
            spread(series.starts, ".1f"),
            spread(series.rates, ".1f"),
            times(series.rates, local.rates),
            spread(series.wholes, ".1f"),
        ]
        for series in (local, remote, *others, *theirs)
        if not series.failed
    ]
    header = ["", "12 photos, whole process, s", "images/s after start-up", "of local files", "all, whole process, s"]
    return (
        f"{made.few} photos of 500x375, ResNet-18, fp32. The S3 server takes {median(shares):.1%} of the CPU. Of the "
        f"additive limit, local files reach {median(_of(local.rates, limits)):.1%} after start-up, and those from S3 "
        f"{median(_of(remote.rates, limits)):.1%}.{translation}\n\n"
        f"{table(header, rows)}\n\n" + "\n".join(failures([local, remote, *others, *theirs], lacking))
    )


def _translated_seconds(made: Material, symbol: Path) -> float:
    """Without a translation in the cache."""
    program = str(Path(__file__).with_name("translated.py"))
    return float(run_child(sys.executable, program, str(symbol), XDG_CACHE_HOME=str(made.out("no-cache"))).stdout)


def _of(rates: list[float], limits: list[float]) -> list[float]:
    return [rate / limit for rate, limit in zip(rates, limits, strict=True)]


def _program(name: str, file: str, card: Path, *arguments: int) -> Way:
    """A program of this folder."""
    program = [sys.executable, str(Path(__file__).with_name(file))]
    return Way(name, name, lambda source, out: [*program, source, str(card), str(out), *map(str, arguments)])


def _upload(url: str, folder: Path) -> None:
    client = boto3.client(
        "s3", endpoint_url=url, aws_access_key_id="bench", aws_secret_access_key="bench", region_name="us-east-1"
    )
    client.create_bucket(Bucket=folder.name)
    for path in sorted(folder.iterdir()):
        client.put_object(Bucket=folder.name, Key=path.name, Body=path.read_bytes())
