"""A model from anywhere: what is fetched, what is kept, and what is said when it cannot be."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from infermill.errors import InfermillError, ModelError, StoreError
from infermill.models.card import Files, ModelCard
from infermill.models.card_file import parse_card
from infermill.models.files import NETWORK, _download, _head, cache_folder
from infermill.models.opening import open_model
from infermill.stores import locate
from infermill.types import CardOptions, StoreOptions
from tests.networks import tiny_classifier
from tests.servers import Bucket

CARD = "name: tiny\nfiles: {onnx: tiny.onnx}\npreprocess: {resize: {exact: [32, 32]}}\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


def card_of(network: Path, **fields: object) -> ModelCard:
    preprocess = {"resize": {"exact": [32, 32]}}
    return parse_card({"name": "t", "files": {"onnx": str(network)}, "preprocess": preprocess, **fields}, "test")


def test_a_card_that_python_made_is_checked_where_it_is_opened(tmp_path: Path) -> None:
    network = tiny_classifier(tmp_path / "tiny.onnx")
    wrong = ModelCard(name="t", files=Files(onnx=network))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"`files\.onnx`: Input should be a valid string"):
        open_model(wrong, StoreOptions())
    plain: Any = {"resize": {"exact": [32, 32]}}
    right = ModelCard(name="t", files=Files(onnx=str(network)), preprocess=plain)
    assert open_model(right, StoreOptions()).card == card_of(network)


# --- objects


def test_a_model_in_a_bucket_is_as_the_one_on_disk(bucket: Bucket, tmp_path: Path, cache: Path) -> None:
    network = tiny_classifier(tmp_path / "tiny.onnx", external_data=True)
    (tmp_path / "model.yaml").write_text(CARD)
    for name in ("model.yaml", "tiny.onnx", "tiny.onnx.data"):
        bucket.put(f"m/{name}", (tmp_path / name).read_bytes())
    remote = open_model(f"{bucket.uri}/m/model.yaml", bucket.options)
    assert remote.digest == open_model(tmp_path / "model.yaml", StoreOptions()).digest
    assert remote.network.read_bytes() == network.read_bytes()
    kept = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert open_model(f"{bucket.uri}/m/model.yaml", bucket.options) == remote
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == kept, "downloaded once"


def test_new_weights_of_the_same_size_are_another_model(bucket: Bucket, tmp_path: Path) -> None:
    network = tiny_classifier(tmp_path / "tiny.onnx", external_data=True)
    weights = network.with_name("tiny.onnx.data").read_bytes()
    bucket.put("tiny.onnx", network.read_bytes())
    bucket.put("tiny.onnx.data", weights)
    first = open_model(f"{bucket.uri}/tiny.onnx", bucket.options)
    bucket.put("tiny.onnx.data", weights[::-1])
    second = open_model(f"{bucket.uri}/tiny.onnx", bucket.options)
    assert second.digest != first.digest
    assert first.network.with_name("tiny.onnx.data").read_bytes() == weights


def test_an_object_that_is_overwritten_meanwhile_is_not_kept(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("tiny.onnx", b"old")
    found = _head(locate(f"{bucket.uri}/tiny.onnx"), bucket.options, NETWORK)
    bucket.put("tiny.onnx", b"new")
    with pytest.raises(StoreError, match=r"tiny\.onnx was overwritten") as caught:
        _download(found, tmp_path / "kept" / "tiny.onnx")
    assert caught.value.hint == "run the same command again"
    assert list((tmp_path / "kept").iterdir()) == []


@pytest.mark.parametrize(
    ("key", "size", "message"),
    [
        ("model.yaml", (1 << 20) + 1, "the model card .*model.yaml is larger than 1 MiB"),
        ("labels.txt", (16 << 20) + 1, "the labels file .*labels.txt is larger than 16 MiB"),
    ],
)
def test_a_large_file_is_refused_and_not_downloaded(
    key: str, size: int, message: str, bucket: Bucket, tmp_path: Path, cache: Path
) -> None:
    network = tiny_classifier(tmp_path / "tiny.onnx")
    (tmp_path / key).write_bytes(bytes(size))
    bucket.put(key, bytes(size))
    for folder in (str(tmp_path), bucket.uri):
        uri = f"{folder}/{key}"
        model = uri if key == "model.yaml" else card_of(network, labels=uri)
        with pytest.raises(ModelError, match=message):
            open_model(model, bucket.options)
    assert not cache.exists()


def test_an_object_that_is_missing_is_told(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("tiny.onnx", tiny_classifier(tmp_path / "tiny.onnx", external_data=True).read_bytes())
    with pytest.raises(ModelError, match=r"the network: .*gone\.onnx does not exist"):
        open_model(f"{bucket.uri}/gone.onnx", bucket.options)
    with pytest.raises(ModelError, match=r"data file tiny\.onnx\.data: .* does not exist"):
        open_model(f"{bucket.uri}/tiny.onnx", bucket.options)


# --- labels


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_labels_are_lines_and_no_byte_order_mark(line_end: str, tmp_path: Path) -> None:
    labels = ("tench", "a\u2028b", "", "c\x0bd", "e\x0cf", "g\x85h", "\ufeffi", "j", "k", "l")
    (tmp_path / "labels.txt").write_bytes((line_end.join(labels) + line_end).encode("utf-8-sig"))
    card = card_of(tiny_classifier(tmp_path / "tiny.onnx"), labels=str(tmp_path / "labels.txt"))
    assert open_model(card, StoreOptions()).labels == labels


# --- the cache


def test_a_cache_that_cannot_be_written_is_told_as_such(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("tiny.onnx", tiny_classifier(tmp_path / "tiny.onnx").read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/x")
    with pytest.raises(InfermillError, match="the cache folder /dev/null/x/infermill cannot be written") as caught:
        open_model(f"{bucket.uri}/tiny.onnx", bucket.options)
    assert not isinstance(caught.value, StoreError)
    assert "XDG_CACHE_HOME" in caught.value.hint


# --- files


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", "is not a file"),
        ("missing", "does not exist"),
        ("file/below", "does not exist"),
        ("x" * 300, "cannot be read: File name too long"),
        ("null\0", "cannot be read: embedded null byte"),
    ],
)
def test_a_path_that_is_no_file_is_told_in_one_line(name: str, message: str, tmp_path: Path) -> None:
    network = tiny_classifier(tmp_path / "tiny.onnx")
    (tmp_path / "file").touch()
    for suffix, what in ((".yaml", "the model card"), (".onnx", "the network"), ("", "the labels file")):
        path = tmp_path / (name + suffix)
        if name == "folder":
            path.mkdir()
        model = path if suffix else card_of(network, labels=str(path))
        with pytest.raises(ModelError, match=f"^{what} .*{message}\n") as caught:
            open_model(model, StoreOptions())
        assert "\n" not in caught.value.message
        assert "\0" not in caught.value.message


@pytest.mark.parametrize("locked", ["model.yaml", "labels.txt", "tiny.onnx", "tiny.onnx.data"])
def test_a_file_that_must_not_be_read_is_told(
    locked: str, shared_path: Path, unprivileged: Callable[[], AbstractContextManager[None]]
) -> None:
    tiny_classifier(shared_path / "tiny.onnx", external_data=True)
    (shared_path / "model.yaml").write_text(CARD + "labels: labels.txt\n")
    (shared_path / "labels.txt").write_text("\n".join("abcdefghij"))
    (shared_path / locked).chmod(0o000)
    with unprivileged(), pytest.raises(ModelError, match=rf"{locked}.*: Permission denied") as caught:
        open_model(shared_path / "model.yaml", StoreOptions())
    assert "permissions" in caught.value.hint or caught.value.hint == "check the path"


# --- assumptions


def test_an_option_is_no_assumption(tmp_path: Path) -> None:
    network = tiny_classifier(tmp_path / "tiny.onnx", size=96)
    guessed = "\n".join(open_model(network, StoreOptions()).assumptions)
    given = CardOptions(task="classification", activation="none", scale=0.5, color="BGR", crop=(96, 96))
    rest = "\n".join(open_model(network, StoreOptions(), given).assumptions)
    for name in ("task is", "output.activation", "preprocess.scale", "preprocess.color", "preprocess.crop"):
        assert name in guessed
        assert name not in rest
    assert "preprocess.mean, preprocess.std: those of ImageNet training" in rest
