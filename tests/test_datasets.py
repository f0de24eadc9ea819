"""`infermill datasets cifar10`: an archive as PNG objects with their labels."""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import infermill
from infermill.datasets import unpack_cifar10
from infermill.errors import SourceError, StoreError
from infermill.sources import list_source
from infermill.types import DatasetHome
from tests.fault_proxy import ALWAYS, FaultProxy, Reply
from tests.networks import tiny_classifier
from tests.servers import Bucket
from tests.shards import CIFAR10_NAMES, cifar_images, write_cifar10, write_cifar10_binary
from tests.test_cli import assert_problem
from tests.test_cli import infermill as command
from tests.test_web import Page, Site

PER_BATCH = 6


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_cifar10(tmp_path / "cifar-10-python.tar.gz", PER_BATCH)


@pytest.fixture
def site() -> Iterator[Site]:
    server = Site()
    yield server
    server.close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/infermill/datasets"


def test_an_archive_becomes_png_files_that_a_job_can_be_joined_with(tmp_path: Path, archive: Path) -> None:
    done = command("datasets", "cifar10", "--archive", archive, "--to", "test", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"6 images in {tmp_path}/test; labels in {tmp_path}/test/labels.parquet\n"
    assert "is not the archive of the data set's home: its sha256 is" in done.stderr
    images, labels = cifar_images(PER_BATCH, 5)
    with Image.open(tmp_path / "test/test_batch/0003.png") as image:
        assert np.array_equal(np.asarray(image), images[3].reshape(3, 32, 32).transpose(1, 2, 0))
    table = pq.read_table(tmp_path / "test/labels.parquet").to_pydict()
    assert table == {
        "key": [f"test_batch/{row:04d}.png" for row in range(PER_BATCH)],
        "label": labels,
        "name": [CIFAR10_NAMES[label] for label in labels],
    }
    network = tiny_classifier(tmp_path / "tiny.onnx", size=32)
    infermill.run(tmp_path / "test", network, tmp_path / "out")
    assert infermill.read(tmp_path / "out")["key"].to_pylist() == table["key"]


def test_what_is_there_is_not_written_again(bucket: Bucket, archive: Path) -> None:
    to = f"{bucket.uri}/cifar10/test/"
    first = unpack_cifar10(to, archive, "test", bucket.options)
    assert (first.images, first.skipped) == (PER_BATCH, 0)
    keys = [f"cifar10/test/test_batch/{row:04d}.png" for row in range(PER_BATCH)]
    assert bucket.keys() == ["cifar10/test/labels.parquet", *keys]
    expected = bucket.client.get_object(Bucket=bucket.name, Key=keys[2])["Body"].read()
    bucket.delete(keys[0])
    bucket.put(keys[2], b"cut")
    again = unpack_cifar10(to, archive, "test", bucket.options)
    assert (again.images, again.skipped) == (PER_BATCH, PER_BATCH - 2)
    assert bucket.client.get_object(Bucket=bucket.name, Key=keys[2])["Body"].read() == expected
    labels = bucket.client.get_object(Bucket=bucket.name, Key="cifar10/test/labels.parquet")["Body"].read()
    assert pq.read_table(io.BytesIO(labels))["key"].to_pylist() == keys
    _, batches = list_source(to, None, bucket.options)
    assert [key for batch in batches for key in batch["key"].to_pylist()] == keys


def test_the_archive_may_be_binary_lie_in_a_bucket_and_give_all_its_splits(bucket: Bucket, tmp_path: Path) -> None:
    binary = write_cifar10_binary(tmp_path / "cifar-10-binary.tar.gz", 2)
    bucket.put("cifar-10-binary.tar.gz", binary.read_bytes())
    found = unpack_cifar10(str(tmp_path / "all"), f"{bucket.uri}/cifar-10-binary.tar.gz", "all", bucket.options)
    assert found.images == 12
    assert pq.read_table(found.labels)["name"][0].as_py() in CIFAR10_NAMES


def test_a_store_that_fails_while_the_archive_is_read_is_told(
    bucket: Bucket, fault_proxy: FaultProxy, archive: Path, tmp_path: Path
) -> None:
    bucket.put("a.tar.gz", archive.read_bytes())
    options = replace(bucket.options, endpoint_url=fault_proxy.url)
    fault_proxy.inject(Reply(403, "AccessDenied"), "GET", first=2, times=ALWAYS)
    with pytest.raises(StoreError, match=r"access to s3://.*/a\.tar\.gz is denied"):
        unpack_cifar10(str(tmp_path / "to"), f"{bucket.uri}/a.tar.gz", "test", options)


def test_the_archive_is_downloaded_once_and_must_be_the_one_that_it_was(
    tmp_path: Path, archive: Path, site: Site, cache: Path
) -> None:
    content = archive.read_bytes()
    url = site.page("/~kriz/cifar-10-python.tar.gz", Page(body=content))
    home = DatasetHome(url=url, sha256=hashlib.sha256(content).hexdigest())
    assert unpack_cifar10(str(tmp_path / "a"), home=home).images == PER_BATCH
    assert unpack_cifar10(str(tmp_path / "b"), home=home).images == PER_BATCH
    assert len(site.requests) == 1
    (kept,) = cache.iterdir()
    kept.write_bytes(b"damaged")
    assert unpack_cifar10(str(tmp_path / "c"), home=home).images == PER_BATCH
    assert len(site.requests) == 2
    with pytest.raises(SourceError, match="is not the archive that it was: its sha256 is"):
        unpack_cifar10(str(tmp_path / "d"), home=DatasetHome(url=url))
    assert [one.name for one in cache.iterdir()] == [kept.name]
    missing = DatasetHome(url=site.url("/missing.tar.gz"))
    with pytest.raises(SourceError, match=r"missing\.tar\.gz cannot be downloaded"):
        unpack_cifar10(str(tmp_path / "d"), home=missing)
    assert not (tmp_path / "d").exists()


def test_all_of_many_images_are_written(tmp_path: Path) -> None:
    binary = write_cifar10_binary(tmp_path / "cifar-10-binary.tar.gz", 1_030)
    found = unpack_cifar10(str(tmp_path / "test"), binary)
    assert found.images == 1_030
    assert len(list((tmp_path / "test/test_batch").iterdir())) == 1_030
    assert pq.read_table(found.labels)["label"].to_pylist() == cifar_images(1_030, 5)[1]


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.tar.gz").write_text("<html>")
    done = command("datasets", "cifar10", "--archive", "page.tar.gz", "--to", "out", "--json", cwd=tmp_path)
    assert done.returncode == 1
    assert "error: page.tar.gz is no archive of CIFAR-10" in done.stderr
    assert "Traceback" not in done.stderr
    done = command("datasets", "cifar10", "--archive", "missing.tar.gz", "--to", "out", cwd=tmp_path)
    assert_problem(done, 1, "does not exist")
    done = command("datasets", "cifar10", "--to", "out", "--split", "valid", cwd=tmp_path)
    assert_problem(done, 2)
