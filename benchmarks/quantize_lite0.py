"""EfficientNet-Lite0 in int8 on crops of real photos: what agrees with fp32, what was kept in float, what it costs.

python benchmarks/quantize_lite0.py [--objects 800]
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from infermill.decode.image import image_decoder
from infermill.demo import prepare_demo
from infermill.models.card import ModelCard
from infermill.models.card_file import read_card
from infermill.models.opening import open_model
from infermill.quantize import TARGET, Quantization, quantize
from infermill.runtimes import Predictor, load
from infermill.types import MAX_PIXELS, RuntimeName, StoreOptions
from measuring import machine, median, table
from photos import NAMES, make_photos

RUNTIMES: tuple[RuntimeName, ...] = ("openvino", "onnxruntime")
ROUNDS, ROWS = 5, 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--objects", type=int, default=800)
    objects = parser.parse_args().objects
    flags = Path("/proc/cpuinfo").read_text()
    print(f"{machine()}, {'VNNI' if 'vnni' in flags else 'no VNNI'}\n")
    demo = prepare_demo()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        make_photos(work / "photos", objects)
        # A gate that everything passes keeps nothing in float.
        found = {
            "all of it": quantize(demo.card, work / "photos", work / "all.yaml", objects=objects, min_agreement=1e-9),
            f"until {TARGET}": quantize(demo.card, work / "photos", work / "most.yaml", objects=objects),
        }
        rows = _rows(read_card(demo.card), work / "photos")
        cards = {"fp32": demo.card, **{name: one.card for name, one in found.items() if one.card is not None}}
        paces = {runtime: _paces(cards, rows, runtime) for runtime in RUNTIMES}
        header = ["int8", "same top-1", "95 %", "max, mean |Δp|", "in float", "MACs in int8"]
        header += [f"as fast as fp32, {runtime}" for runtime in RUNTIMES]
        lines = [[name, *_line(one), *(paces[runtime][name] for runtime in RUNTIMES)] for name, one in found.items()]
        print(table(header, lines), "\n")
        last = found[f"until {TARGET}"]
        parts = f"{last.calibrated} to calibrate, {last.selected} to choose"
        print(f"{last.evidence.objects} held out, {parts}: {last.tries} tries")
        print(f"in float: {', '.join(last.kept_in_float)}")
        print(
            "worst:",
            *(f"{_photo(one.key)} {one.expected} -> {one.found} ({one.delta:.3f})" for one in last.worst),
            sep="\n  ",
        )


def _line(one: Quantization) -> list[str]:
    low, high = one.evidence.interval or (0.0, 1.0)
    return [
        f"{one.evidence.agreement:.1%}",
        f"{low:.1%} to {high:.1%}",
        f"{one.evidence.max_delta:.3f}, {one.evidence.mean_delta:.4f}",
        f"{len(one.kept_in_float)} of {one.nodes}",
        f"{one.int8_share or 0:.0%}",
    ]


def _photo(key: str) -> str:
    """The photo that a crop was cut from."""
    return NAMES[int(Path(key).stem.removeprefix("photo-")) % len(NAMES)]


def _rows(card: ModelCard, folder: Path) -> NDArray[np.uint8]:
    assert card.preprocess is not None
    decode = image_decoder(card.preprocess, "exact", MAX_PIXELS)
    return np.stack([decode(path.read_bytes()) for path in itertools.islice(sorted(folder.iterdir()), ROWS)])


def _paces(cards: dict[str, Path], rows: NDArray[np.uint8], runtime: RuntimeName) -> dict[str, str]:
    """How many times as fast as fp32 each network is: the median of rounds in which all of them take turns."""
    loaded = {name: load(open_model(card, StoreOptions()), runtime, threads=1) for name, card in cards.items()}
    seconds = [{name: _seconds(predictor, rows) for name, predictor in loaded.items()} for _ in range(ROUNDS)]
    return {name: f"{median([one['fp32'] / one[name] for one in seconds]):.2f}" for name in cards}


def _seconds(predictor: Predictor, rows: NDArray[np.uint8]) -> float:
    """CPU seconds, which other work on the machine disturbs least."""
    started = time.process_time()
    predictor(rows)
    return time.process_time() - started


if __name__ == "__main__":
    main()
