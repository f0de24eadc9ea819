"""The whole job against the additive limit of its parts, all measured in one run.

    python benchmarks/bench_pipeline.py [--photos 2000] [--rounds 3]

The limit is 1 / (1/model + 1/(cores · decode per core)): what the machine could do if decoding JPEG and running
the network were all there is, and neither ever waited. Decoding is JPEG to RGB alone; resizing is not in the limit.
"""

import argparse
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path

import boto3
import numpy as np
import psutil
import simplejpeg

import infermill as im
from infermill.limits import usable_cores
from infermill.models.card import ModelCard, parse_card, write_card
from infermill.models.model import open_model
from infermill.runtimes import load
from measuring import cpu_seconds, infermill, machine, median, s3_server, table
from photos import make_photos
from resnet18 import resnet18

IMAGENET = {"scale": 1 / 255, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
SECONDS = 8.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--photos", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", type=int, default=20_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        card = make_card(work, 256, 224)
        photo_bytes = make_photos(work / "photos", arguments.photos)
        print(
            f"{machine()}\n\n{arguments.photos} photos of 500x375, {photo_bytes / 1024:.0f} KB mean, ResNet-18 fp32\n"
        )
        with s3_server() as (url, server):
            _upload(url, work / "photos")
            _print_speed(work, card, url, server, arguments.rounds)
        _print_agreement(work, card)
        _print_memory(work, arguments.small)


def _print_speed(work: Path, card: Path, url: str, server: psutil.Process, rounds: int) -> None:
    cores = usable_cores()
    environment = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_REGION": "us-east-1"}
    models = [_model_only(card)]
    decodes: list[float] = []
    limits: list[float] = []
    costs: list[float] = []
    local, fast, remote = _Rates(), _Rates(), _Rates()
    peak = 0.0

    def against_limit(rates: _Rates, source: str, *flags: str) -> float:
        """Run a job between two measurements of the network alone: the speed of a shared machine drifts."""
        rate, peak_mb = _job(work, card, source, *flags, **environment)
        models.append(_model_only(card))
        limits.append(1 / (2 / sum(models[-2:]) + 1 / (cores * decodes[-1])))
        rates.measured.append(rate)
        rates.ratios.append(rate / limits[-1])
        return peak_mb

    for _ in range(rounds):
        decodes.append(_decode_only(work / "photos"))
        peak = max(peak, against_limit(local, str(work / "photos")))
        against_limit(fast, str(work / "photos"), "--decode", "fast")
        before, started = cpu_seconds(server), time.perf_counter()
        against_limit(remote, "s3://photos/", "--endpoint-url", url)
        costs.append((cpu_seconds(server) - before) / (time.perf_counter() - started - SECONDS) / cores)
    share = median(costs)
    rows = [
        ["model only, images/s", f"{median(models):.1f}", f"({min(models):.1f} to {max(models):.1f})"],
        ["JPEG decode only, images/s a core", f"{median(decodes):.0f}", ""],
        ["additive limit, images/s", f"{median(limits):.1f}", "100 %"],
        ["whole job, local files", *local.cells()],
        ["whole job, local files, `--decode fast`", *fast.cells()],
        ["whole job, S3 server on the same machine", *remote.cells()],
        ["… less the server's own share of the CPU", f"{share:.1%}", remote.cells(1 / (1 - share))[1]],
        ["peak memory of the job", f"{peak:.0f} MB", ""],
    ]
    print(table(["ResNet-18, fp32", "measured", "of the limit"], rows), "\n", flush=True)


@dataclass
class _Rates:
    """Images per second of the same job, and each as a part of the limit around it."""

    measured: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    def cells(self, factor: float = 1.0) -> tuple[str, str]:
        low, middle, high = (factor * pick(self.ratios) for pick in (min, median, max))
        return f"{median(self.measured):.1f}", f"{middle:.1%} ({low:.1%} to {high:.1%})"


def make_card(work: Path, shorter: int, size: int) -> Path:
    """Write a ResNet-18 and its card, for images of `size` pixels a side."""
    resnet18(work / "resnet18.onnx")
    crop = {"center": [size, size]}
    card: ModelCard = parse_card(
        {
            "name": f"resnet18-{size}",
            "files": {"onnx": "resnet18.onnx"},
            "preprocess": {"resize": {"shorter": shorter}, "crop": crop, **IMAGENET},
            "output": {"activation": "softmax"},
        },
        "benchmark",
    )
    path = work / f"model-{size}.yaml"
    path.write_text(write_card(card))
    return path


def _upload(url: str, photos: Path) -> None:
    client = boto3.client(
        "s3", endpoint_url=url, aws_access_key_id="bench", aws_secret_access_key="bench", region_name="us-east-1"
    )
    client.create_bucket(Bucket="photos")
    for path in sorted(photos.iterdir()):
        client.put_object(Bucket="photos", Key=path.name, Body=path.read_bytes())


def _job(work: Path, card: Path, source: str, *flags: str, **environment: str) -> tuple[float, float]:
    """Objects per second of the whole job, loading the network included, and its peak memory in MB."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    child = infermill("run", source, "-m", str(card), "-o", str(out), "--json", *flags, **environment)
    summary = child.json
    assert summary["failed"] == 0, summary
    return summary["objects_per_second"], child.peak_mb


def _model_only(card: Path) -> float:
    predictor = load(open_model(card, im.Options()), "openvino", usable_cores())
    batch = np.random.default_rng(0).integers(0, 256, (predictor.batch_size, *predictor.input_shape), np.uint8)
    counts = [0] * predictor.streams
    end = time.perf_counter() + SECONDS

    def loop(stream: int) -> None:
        while time.perf_counter() < end:
            predictor(batch)
            counts[stream] += len(batch)

    started = time.perf_counter()
    threads = [threading.Thread(target=loop, args=(stream,)) for stream in range(predictor.streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - started)


def _decode_only(photos: Path) -> float:
    contents = [path.read_bytes() for path in islice(sorted(photos.iterdir()), 200)]
    started = time.perf_counter()
    for count, content in enumerate(cycle(contents)):
        seconds = time.perf_counter() - started
        if seconds > SECONDS / 2:
            return count / seconds
        simplejpeg.decode_jpeg(content)
    raise AssertionError


def _print_agreement(work: Path, card: Path) -> None:
    """Top-1 agreement of `--decode fast` with exact decoding, with the real network of the demo where it is there."""
    from infermill.demo import prepare_demo

    demo = prepare_demo()
    photos = str(work / "photos")
    tops = [
        [row[0]["index"] for row in _top(photos, demo.card, work / f"agree-{decode}", decode)]
        for decode in ("exact", "fast")
    ]
    same = sum(exact == fast for exact, fast in zip(*tops, strict=True))
    agreement = same / len(tops[0])
    print(f"EfficientNet-Lite0, `--decode fast`: the same top-1 as exact for {agreement:.2%} of the photos\n")


def _top(source: str, card: Path, out: Path, decode: str) -> list[list[dict[str, int]]]:
    infermill("run", source, "-m", str(card), "-o", str(out), "--json", "--decode", decode)
    return list(im.read(out)["top"].to_pylist())


def _print_memory(work: Path, small: int) -> None:
    """Peak memory must not grow with the number of objects."""
    card = make_card(work, 64, 64)
    rows = []
    for count in (small // 20, small):
        make_photos(work / f"small-{count}", count, (80, 60))
        rate, peak = _job(work, card, str(work / f"small-{count}"))
        rows.append([f"{count:,}", f"{rate:.0f}", f"{peak:.0f} MB"])
    print(table(["small objects (80x60)", "images/s", "peak memory"], rows))


if __name__ == "__main__":
    main()
