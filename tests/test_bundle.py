"""A model as one file, and back."""

import multiprocessing
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from infermill.errors import InfermillError, ModelError
from infermill.models.bundle import pack, unpack
from infermill.models.model import Model
from infermill.models.opening import open_model
from infermill.types import CardOptions, StoreOptions
from tests.networks import tiny_classifier


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/infermill/models"


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """One with weights beside it, and labels in a file of its own."""
    folder = tmp_path / "model"
    folder.mkdir()
    tiny_classifier(folder / "tiny.onnx", classes=3, size=32, external_data=True)
    (folder / "labels.txt").write_text("cat\n\nZürich\n")
    (folder / "card.yaml").write_text(
        "name: tiny\nfiles: {onnx: tiny.onnx}\nlabels: labels.txt\n"
        "preprocess: {resize: {exact: [32, 32]}, scale: 0.1}\n"
    )
    return open_model(folder / "card.yaml", StoreOptions())


def test_a_model_is_the_same_after_the_way(model: Model, cache: Path, tmp_path: Path) -> None:
    pack(model, tmp_path / "packed")
    again = unpack(tmp_path / "packed", model.digest)
    assert (again.card, again.labels, again.digest) == (model.card, model.labels, model.digest)
    assert again.network.is_relative_to(cache)
    assert {file.name for file in again.network.parent.iterdir()} == {"tiny.onnx", "tiny.onnx.data"}
    assert unpack(tmp_path / "packed", model.digest) == again


def test_its_precision_goes_with_it(model: Model, tmp_path: Path) -> None:
    assert isinstance(model.given, str)
    lower = open_model(model.given, StoreOptions(), CardOptions(precision="bf16"))
    assert lower.digest != model.digest
    pack(lower, tmp_path / "packed")
    assert unpack(tmp_path / "packed", lower.digest).card.precision == "bf16"


def test_the_same_model_gives_the_same_bytes(model: Model, tmp_path: Path) -> None:
    for name in ("first", "second"):
        pack(model, tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_it_is_read_once_from_its_file(model: Model, tmp_path: Path) -> None:
    pack(model, tmp_path / "packed")
    unpack(tmp_path / "packed", model.digest)
    (tmp_path / "packed").unlink()
    assert unpack(tmp_path / "packed", model.digest).digest == model.digest


def test_what_was_changed_in_the_cache_is_made_anew(model: Model, tmp_path: Path) -> None:
    pack(model, tmp_path / "packed")
    network = unpack(tmp_path / "packed", model.digest).network
    before = network.read_bytes()
    tiny_classifier(network, classes=3, seed=1)
    assert unpack(tmp_path / "packed", model.digest).network.read_bytes() == before


def test_another_model_is_refused(model: Model, cache: Path, tmp_path: Path) -> None:
    pack(model, tmp_path / "packed")
    wanted = "sha256:" + "0" * 64
    with pytest.raises(ModelError, match=f"another one: {model.digest}, and not {wanted}"):
        unpack(tmp_path / "packed", wanted)
    assert {path.suffix for path in cache.iterdir()} == {".lock"}


def damage_first_byte(packed: Path) -> None:
    content = bytearray(packed.read_bytes())
    content[content.index(b'"card"')] ^= 1
    packed.write_bytes(content)


def cut(packed: Path) -> None:
    packed.write_bytes(packed.read_bytes()[:-100])


def add(name: str, compression: int = zipfile.ZIP_STORED) -> Callable[[Path], None]:
    def damage(packed: Path) -> None:
        with zipfile.ZipFile(packed, "a") as archive:
            archive.writestr(name, bytes(1000), compression)

    return damage


def claim_more(packed: Path) -> None:
    """An entry says that it is a terabyte."""
    with zipfile.ZipFile(packed, "a") as archive:
        archive.infolist()[-1].file_size = 1 << 40
        archive.writestr("network/last", b"")


@pytest.mark.parametrize(
    "damage",
    [
        damage_first_byte,
        cut,
        Path.unlink,
        add("../outside"),
        add("network/../../outside"),
        add("/tmp/outside"),
        add("network"),
        add("network//twice"),
        add("network/bomb", zipfile.ZIP_DEFLATED),
        claim_more,
    ],
)
def test_what_is_no_packed_model_is_refused(
    damage: Callable[[Path], None], model: Model, cache: Path, tmp_path: Path
) -> None:
    pack(model, tmp_path / "packed")
    damage(tmp_path / "packed")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ModelError, match="packed"):
        unpack(tmp_path / "packed", model.digest)
    assert {path for path in set(tmp_path.rglob("*")) - before if path.suffix != ".lock"} <= {cache, *cache.parents}


def test_files_that_are_gone_or_cannot_be_written(model: Model, tmp_path: Path) -> None:
    with pytest.raises(InfermillError, match="cannot be written"):
        pack(model, tmp_path / "no/folder")
    model.network.unlink()
    with pytest.raises(ModelError, match="cannot read"):
        pack(model, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_a_cache_that_cannot_be_written(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(model, tmp_path / "packed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "packed"))
    with pytest.raises(InfermillError, match="cache folder") as caught:
        unpack(tmp_path / "packed", model.digest)
    assert "XDG_CACHE_HOME" in caught.value.hint


def inode(packed: Path, digest: str) -> int:
    return unpack(packed, digest).network.stat().st_ino


def test_processes_at_once_unpack_it_once(model: Model, tmp_path: Path) -> None:
    pack(model, tmp_path / "packed")
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        inodes = pool.starmap(inode, [(tmp_path / "packed", model.digest)] * 6, chunksize=1)
    assert len(set(inodes)) == 1
