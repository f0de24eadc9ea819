"""What the benchmarks work on, made once a run: photos, small images, networks, their cards and their references."""

import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pyarrow as pa
import pyarrow.parquet as pq
from onnx import numpy_helper

from alone import network_rate
from infermill.models.card_file import parse_card, write_card
from measuring import ChildError, infermill
from peers.preprocessing import prepare
from photos import make_photos, make_records
from resnet18 import resnet18
from resnet20 import resnet20

IMAGENET = {"scale": 1 / 255, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
TWELVE = 12
CALIBRATION = 200


@dataclass(frozen=True, slots=True)
class Material:
    """Where everything lies, and how much of it there is."""

    work: Path
    rounds: int
    photos: int
    "Photos that infermill predicts."
    few: int
    "The first of them, which the peers predict."
    records: int
    "Images of 32x32 that infermill predicts."
    few_records: int
    peers: tuple[str, ...]
    "Which programs of peers/ are run."
    cards: dict[str, Path] = field(default_factory=dict)
    "By precision: the cards of ResNet-18 that run here."
    lacking: dict[str, str] = field(default_factory=dict)
    "By precision: why there is none."

    def out(self, name: str) -> Path:
        """A folder for an output, not there."""
        path = self.work / "out" / name
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(exist_ok=True)
        return path


@contextmanager
def material(quick: bool, peers: Sequence[str]) -> Iterator[Material]:
    """Make the folder of a run: networks, photos, and nothing that only one benchmark wants."""
    with tempfile.TemporaryDirectory(prefix="infermill-bench-") as scratch:
        work = Path(scratch)
        os.environ["XDG_CACHE_HOME"] = str(work / "cache")  # no choice of a probe before this run counts
        pace = network_rate(make_card(work, 224))
        # As many for the peers as the network alone takes 15 seconds for: some start for as long, and never the same.
        few = min(max(round(15 * pace, -1), 100), 400)
        counts = (1, 60, 24, 500, 100) if quick else (3, 2000, int(few), 50_000, 10_000)
        made = Material(work, *counts, tuple(peers))
        make_photos(work / "photos", made.photos)
        subset(work / "photos", work / "half", made.photos // 2)
        subset(work / "photos", work / "few", made.few)
        subset(work / "photos", work / "twelve", TWELVE)
        yield made


def add_precisions(made: Material) -> None:
    """Cards of ResNet-18 in bf16 and int8, where infermill and the processor have them."""
    made.cards["fp32"] = made.work / "model-224.yaml"
    lower = made.work / "model-bf16.yaml"
    lower.write_text(made.cards["fp32"].read_text() + "precision: bf16\n")
    _add(made, "bf16", lower, ["inspect", str(lower)])
    small = made.work / "model-int8.yaml"
    # Nothing stays in float for the sake of agreement: random weights say nothing on how well int8 does, only how fast.
    sample = ["--calibrate", str(made.work / "photos"), "--objects", str(min(made.photos, CALIBRATION))]
    gate = ["--min-agreement", "0.01"]
    _add(made, "int8", small, ["quantize", str(made.cards["fp32"]), *sample, "-o", str(small), *gate])


def _add(made: Material, precision: str, card: Path, command: Sequence[str]) -> None:
    try:
        infermill(*command)
        out = str(made.out(f"try-{precision}"))
        told = infermill("run", str(made.work / "twelve"), "-m", str(card), "-o", out, "--json").json["precision"]
        if not told.startswith(precision):
            raise ChildError(f"it ran in {told}")
    except ChildError as error:
        made.lacking[precision] = str(error).replace(f"{made.work}/", "")
    else:
        made.cards[precision] = card


def make_card(work: Path, side: int) -> Path:
    """Write a network and its card: ResNet-18 for images of 224 and 64 pixels a side, ResNet-20 for those of 32."""
    network = work / ("resnet20.onnx" if side == 32 else "resnet18.onnx")
    if not network.exists():
        (resnet20 if side == 32 else resnet18)(network)
        _save_weights(network)
    crop = {"center": [side, side]}
    size = {"resize": {"exact": [32, 32]}} if side == 32 else {"resize": {"shorter": side * 8 // 7}, "crop": crop}
    card = parse_card(
        {
            "name": f"{network.stem}-{side}",
            "files": {"onnx": network.name},
            "preprocess": size | IMAGENET,
            "output": {"activation": "softmax"},
        },
        "benchmark",
    )
    path = work / f"model-{side}.yaml"
    path.write_text(write_card(card))
    return path


def _save_weights(network: Path) -> None:
    """The weights of a network as `.npz` beside it, for peers that do not read ONNX."""
    weights = {one.name: numpy_helper.to_array(one) for one in onnx.load(network).graph.initializer}
    with zipfile.ZipFile(network.with_suffix(".npz"), "w") as archive:
        for name, values in weights.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, values)


def add_records(made: Material) -> Path:
    """Make the images of 32x32; return the card of their network."""
    make_records(made.work / "records", made.records)
    subset(made.work / "records", made.work / "few-records", made.few_records)
    subset(made.work / "records", made.work / "twelve-records", TWELVE)
    return make_card(made.work, 32)


def subset(folder: Path, part: Path, count: int) -> Path:
    """The first files of a folder, as links, in another one."""
    part.mkdir()
    for path in sorted(folder.iterdir())[:count]:
        (part / path.name).hardlink_to(path)
    return part


def reference(folder: Path, network: Path, side: int) -> dict[str, int]:
    """The best class of each image by Pillow and ONNX Runtime in fp32, by name: what agreement is measured against."""
    loaded = ort.InferenceSession(str(network), providers=["CPUExecutionProvider"])
    best = {}
    for path in sorted(folder.iterdir()):
        (logits,) = loaded.run(None, {"data": prepare(path.read_bytes(), side)[None]})
        best[path.name] = int(np.argmax(logits))
    return best


def agreement(out: Path, best: dict[str, int]) -> float:
    """The share of the reference's images whose best class is the same in an output, of infermill or of a peer."""
    table = pa.concat_tables([pq.read_table(path) for path in sorted(out.glob("*.parquet"))])
    if "key" in table.column_names:
        names, tops = table["key"].to_pylist(), [[one["index"] for one in row] for row in table["top"].to_pylist()]
    else:
        names, tops = table["path"].to_pylist(), table["index"].to_pylist()
    found = {Path(name).name: row[0] for name, row in zip(names, tops, strict=True)}
    same = [name for name, index in best.items() if found[name] == index]
    return len(same) / len(best)
