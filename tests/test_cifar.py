"""CIFAR archives, folders and files as sources; hostile pickles and archives."""

import gzip
import io
import pickle
import struct
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import infermill
from infermill import Options
from infermill.errors import BadInputError, SourceError
from infermill.members import member_fetcher
from infermill.plan import refs_of
from infermill.sources import list_source
from infermill.sources.cifar import DamagedError, as_picture, batches, class_names
from infermill.types import ObjectRef, Source, StoreOptions
from tests.networks import tiny_tabular
from tests.servers import Bucket
from tests.shards import (
    CIFAR10_NAMES,
    cifar10_batch,
    cifar10_binary,
    cifar_images,
    png_of,
    tiny_card,
    write_cifar10,
    write_cifar10_binary,
    write_compressed,
)

PER_BATCH = 7


def listed(uri: str, options: StoreOptions | None = None) -> tuple[Source, list[ObjectRef]]:
    source, parts = list_source(uri, None, options or StoreOptions())
    return source, [ref for batch in parts for ref in refs_of(pa.table(batch))]


def pixels_of(uri: str, options: StoreOptions | None = None) -> dict[str, Any]:
    source, refs = listed(uri, options)
    fetch = member_fetcher(source, options or StoreOptions())
    return {ref.key.partition("#")[2]: np.asarray(fetch(ref)) for ref in refs}


@pytest.fixture
def card(tmp_path: Path) -> Path:
    return tiny_card(tmp_path / "model", top_k=2)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_cifar10(tmp_path / "cifar-10-python.tar.gz", PER_BATCH)


def test_images_are_predicted_like_the_same_ones_as_png(tmp_path: Path, archive: Path, card: Path) -> None:
    images, labels = cifar_images(PER_BATCH, 5)
    folder = tmp_path / "files"
    folder.mkdir()
    for row, planes in enumerate(images):
        (folder / f"{row}.png").write_bytes(png_of(planes))
    summary = infermill.run(f"cifar10:{archive}?split=test", card, tmp_path / "out", Options(partition_objects=3))
    infermill.run(folder, card, tmp_path / "out-files")
    rows = infermill.read(tmp_path / "out")
    assert (summary.planned, summary.ok) == (PER_BATCH, PER_BATCH)
    assert rows["key"].to_pylist() == [f"cifar-10-python.tar.gz#test_batch/{row:04d}" for row in range(PER_BATCH)]
    assert rows.schema.field("label").type == pa.int32()
    assert rows["label"].to_pylist() == labels
    assert rows["size"].to_pylist() == [3_072] * PER_BATCH
    assert rows["top"].to_pylist() == infermill.read(tmp_path / "out-files")["top"].to_pylist()
    assert infermill.verify(tmp_path / "out").problems == ()


def test_every_way_that_cifar_10_comes_in_holds_the_same_images(tmp_path: Path, archive: Path) -> None:
    binary = write_cifar10_binary(tmp_path / "cifar-10-binary.tar.gz", PER_BATCH)
    for path in (archive, binary):
        with tarfile.open(path) as packed:
            packed.extractall(tmp_path / "unpacked", filter="data")
    expected = pixels_of(f"cifar10:{archive}?split=all")
    assert len(expected) == 6 * PER_BATCH
    assert pixels_of(f"cifar10:{binary}").keys() == expected.keys()
    for key, pixels in pixels_of(f"cifar10:{binary}").items():
        assert np.array_equal(pixels, expected[key])
    for folder in ("cifar-10-batches-py", "cifar-10-batches-bin"):
        unpacked = tmp_path / "unpacked" / folder
        assert len(listed(f"cifar10:{unpacked}")[1]) == 6 * PER_BATCH
        assert len(listed(f"cifar10:{unpacked}?split=train")[1]) == 5 * PER_BATCH
        found = pixels_of(f"cifar10:{unpacked}?split=test")
        assert [f"test_batch/{row}" for row in found] == [key for key in expected if key.startswith("test_batch")]
        assert all(np.array_equal(found[row], expected[f"test_batch/{row}"]) for row in found)
    single = pixels_of(f"cifar10:{tmp_path}/unpacked/cifar-10-batches-bin/data_batch_2.bin")
    assert np.array_equal(single["0003"], expected["data_batch_2/0003"])


def test_cifar_100_has_its_fine_labels(tmp_path: Path) -> None:
    images, labels = cifar_images(4)
    (tmp_path / "test.bin").write_bytes(
        b"".join(bytes([9, label]) + image.tobytes() for label, image in zip(labels, images, strict=True))
    )
    (tmp_path / "train").write_bytes(
        pickle.dumps({b"data": images, b"fine_labels": labels, b"coarse_labels": [9] * 4}, protocol=2)
    )
    for split in ("test", "train"):
        _, refs = listed(f"cifar100:{tmp_path}?split={split}")
        assert [ref.label for ref in refs] == labels
        found = pixels_of(f"cifar100:{tmp_path}?split={split}")
        assert np.array_equal(found["0002"], as_picture(images[2]))


def test_archives_of_cifar_100(tmp_path: Path) -> None:
    batches_of = {name: cifar_images(4, seed) for seed, name in enumerate(("train", "test"))}
    python, binary = {}, {}
    for name, (images, labels) in batches_of.items():
        content = {b"data": images, b"fine_labels": labels, b"coarse_labels": [9] * 4}
        python[f"cifar-100-python/{name}"] = pickle.dumps(content, protocol=2)
        rows = [bytes([9, label]) + image.tobytes() for label, image in zip(labels, images, strict=True)]
        binary[f"cifar-100-binary/{name}.bin"] = b"".join(rows)
    meta = {b"fine_label_names": [b"apple", b"bee"], b"coarse_label_names": [b"fruit"]}
    python["cifar-100-python/meta"] = pickle.dumps(meta, protocol=2)
    binary["cifar-100-binary/coarse_label_names.txt"] = b"fruit\n"
    binary["cifar-100-binary/fine_label_names.txt"] = b"apple\nbee\n"
    for kind, files in (("python", python), ("binary", binary)):
        path = write_compressed(tmp_path / f"cifar-100-{kind}.tar.gz", files)
        _, refs = listed(f"cifar100:{path}")
        assert [ref.label for ref in refs] == batches_of["train"][1] + batches_of["test"][1]
        found = pixels_of(f"cifar100:{path}?split=test")
        assert list(found) == [f"test/{row:04d}" for row in range(4)]
        assert np.array_equal(found["test/0003"], as_picture(batches_of["test"][0][3]))
        with path.open("rb") as file:
            assert class_names(file, "cifar100") == ["apple", "bee"]


def test_archives_and_batches_in_a_bucket(bucket: Bucket, archive: Path) -> None:
    images, labels = cifar_images(PER_BATCH, 5)
    bucket.put("data/cifar-10-python.tar.gz", archive.read_bytes())
    bucket.put("bin/test_batch.bin", cifar10_binary(images, labels))
    whole = pixels_of(f"cifar10:{bucket.uri}/data/cifar-10-python.tar.gz?split=test", bucket.options)
    assert np.array_equal(whole["test_batch/0006"], as_picture(images[6]))
    parts = pixels_of(f"cifar10:{bucket.uri}/bin/?split=test", bucket.options)
    assert np.array_equal(parts["0006"], as_picture(images[6]))


def test_a_network_of_tensors_takes_the_pixels_as_they_are(tmp_path: Path, archive: Path) -> None:
    network = tiny_tabular(tmp_path / "rows.onnx", (32, 32, 3), dtype="uint8")
    summary = infermill.run(f"cifar10:{archive}?split=test", network, tmp_path / "out")
    assert summary.ok == PER_BATCH
    other = tiny_tabular(tmp_path / "other.onnx", (5,))
    assert infermill.run(f"cifar10:{archive}?split=test", other, tmp_path / "out-2").failures_by_code == {
        "unsupported": PER_BATCH
    }


def test_an_archive_that_changes_is_not_read_as_the_old_one(archive: Path) -> None:
    source, refs = listed(f"cifar10:{archive}")
    write_cifar10(archive, PER_BATCH + 1)
    with pytest.raises(BadInputError, match="overwritten"):
        member_fetcher(source, StoreOptions())(refs[0])


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_every_protocol_are_read(protocol: int) -> None:
    images, labels = cifar_images(3)
    content = pickle.dumps({b"data": images, b"labels": np.array(labels)}, protocol=protocol)
    (batch,) = batches(io.BytesIO(content), "test_batch", "cifar10")
    assert np.array_equal(batch.images, images)
    assert batch.labels.tolist() == labels


class _Command:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize(
    "value",
    [
        _Command(exec, "raise SystemExit"),
        _Command(getattr, "", "join"),
        _Command(print, "x"),
        {b"data": np.array([print], object), b"labels": [0]},
        {b"data": np.zeros((2, 3_072)), b"labels": [0, 0]},
        {b"data": np.zeros((2, 3_072), np.uint8), b"labels": [0]},
        {b"data": np.zeros((1, 3_072), np.uint8), b"labels": ["cat"]},
        {b"data": np.zeros((1, 3_072), np.uint8), b"labels": [-1]},
        {b"data": np.zeros((1, 3_072), np.uint8), b"labels": [2**40]},
        {b"labels": []},
        [1, 2],
    ],
)
def test_pickles_of_something_else_are_refused(value: Any) -> None:
    with pytest.raises(DamagedError):
        list(batches(io.BytesIO(pickle.dumps(value)), "test_batch", "cifar10"))


def array_pickle(type_: bytes, length: int, content: bytes) -> bytes:
    """An array as NumPy pickles it, less what begins a pickle."""
    start = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01J"
    return (
        start + struct.pack("<i", length) + b"\x85cnumpy\ndtype\n(U\x02" + type_ + b"K\x00K\x01tR\x89" + content + b"tb"
    )


NO_IMAGES = array_pickle(b"u1", 0, b"U\x00")
# np.ndarray((20,000, 3072), np.dtype("u1")), called by the pickle.
CALLED = b"cnumpy\nndarray\n((J" + struct.pack("<i", 20_000) + b"J" + struct.pack("<i", 3_072) + b"t"
CALLED += b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tRtR"
LISTS = b"](K\x00K\x00e" + b"".join(b"q%c](h%ch%ce" % (n, n, n) for n in range(1, 30))
ENCODED = b"c_codecs\nencode\nq\x01X" + struct.pack("<I", 9_000) + b"x" * 9_000 + b"U\x06latin1\x86q\x02"


@pytest.mark.parametrize(
    "content",
    [
        b"Nr" + struct.pack("<I", 2**32 - 1) + b".",  # a place far away in the memo
        b"\x8e" + struct.pack("<Q", 2**62) + b"x.",
        b"\x96" + struct.pack("<Q", 1 << 28) + b"x.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nJ\xff\xff\xff\x7fU\x01btR.",
        CALLED + b".",
        b"}(U\x04data" + CALLED + b"U\x06labels]u.",
        b"cnumpy\nndarray\n)\x81.",
        array_pickle(b"O8", 10_000_000, b"]") + b".",
        array_pickle(b"u1", 10_000_000, b"U\x01x") + b".",
        b"}(U\x04data" + NO_IMAGES + b"U\x06labels" + LISTS + b"u.",
        b"}(U\x04data" + NO_IMAGES + b"U\x06labels](" + ENCODED + b"h\x01h\x02R" * 1_000 + b"eu.",
        b"})" + b"\x85" * 200_000 + b"K\x01s.",  # a key at whose hash Python dies
        b"(" + b")" + b"\x85" * 200_000 + b"K\x01d.",
        b"\x8f()" + b"\x85" * 200_000 + b"\x90.",
        b"()" + b"\x85" * 200_000 + b"\x91.",
    ],
)
def test_a_pickle_cannot_ask_for_more_memory_than_it_fills(content: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DamagedError):
            list(batches(io.BytesIO(b"\x80\x05" + content), "test_batch", "cifar10"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (1 << 20) + 200 * len(content)


def test_a_pickle_sets_no_state_of_a_function() -> None:
    content = b"cnumpy.core.numeric\n_frombuffer\n}X\x01\x00\x00\x00aK\x01sb."
    with pytest.raises(DamagedError, match="state"):
        list(batches(io.BytesIO(b"\x80\x02" + content), "test_batch", "cifar10"))


def test_a_pickle_of_many_small_things_is_refused() -> None:
    with pytest.raises(DamagedError, match="more objects than a file of CIFAR"):
        list(batches(io.BytesIO(b"\x80\x02" + b"N0" * 1_000_001), "test_batch", "cifar10"))


def test_names_of_classes_are_texts() -> None:
    meta = io.BytesIO()
    with tarfile.open(fileobj=meta, mode="w") as packed:
        member, content = (
            tarfile.TarInfo("cifar-10-batches-py/batches.meta"),
            pickle.dumps({b"label_names": [[b"cat"]]}),
        )
        member.size = len(content)
        packed.addfile(member, io.BytesIO(content))
    meta.seek(0)
    with pytest.raises(DamagedError, match="no text where one is wanted"):
        class_names(meta, "cifar10")


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("cifar-10-batches-py/test_batch")
    member.size = 8 << 30
    with gzip.open(tmp_path / "bomb.tar.gz", "wb", compresslevel=1) as bomb:
        bomb.write(member.tobuf())
        for _ in range(600):
            bomb.write(bytes(1 << 20))
    with (tmp_path / "bomb.tar.gz").open("rb") as file, pytest.raises(DamagedError, match="more than 512 MiB"):
        list(batches(file, "bomb.tar.gz", "cifar10"))


def test_damaged_archives_are_refused_by_name(tmp_path: Path, archive: Path, card: Path) -> None:
    content = archive.read_bytes()
    damaged = {"cut": content[:-200], "text": b"<html>", "empty": b"", "none": gzip.compress(bytes(10_240))}
    for name, bad in damaged.items():
        path = tmp_path / f"{name}.tar.gz"
        path.write_bytes(bad)
        with pytest.raises(SourceError, match=rf"{name}\.tar\.gz cannot be read as cifar10"):
            infermill.run(f"cifar10:{path}", card, tmp_path / "out")
    (tmp_path / "test_batch.bin").write_bytes(bytes(3_072))
    with pytest.raises(SourceError, match="cut short"):
        infermill.run(f"cifar10:{tmp_path}/test_batch.bin", card, tmp_path / "out")


@given(st.integers(0, 20_000), st.integers(0, 255), st.integers(0, 20_000))
def test_bit_flips_are_images_or_damage(place: int, value: int, length: int) -> None:
    content = bytearray(cifar10_batch(*cifar_images(5)))
    content[place % len(content)] = value
    try:
        (batch,) = batches(io.BytesIO(bytes(content[: length + 100])), "test_batch", "cifar10")
    except DamagedError:
        return
    assert batch.images.shape == (len(batch.labels), 3_072)


def test_the_names_of_the_classes_come_with_the_archive(tmp_path: Path, archive: Path) -> None:
    binary = write_cifar10_binary(tmp_path / "cifar-10-binary.tar.gz", 1)
    for path in (archive, binary):
        with path.open("rb") as file:
            assert class_names(file, "cifar10") == list(CIFAR10_NAMES)
