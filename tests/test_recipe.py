"""The recipe of 2017, from the archive of CIFAR-10 to its accuracy, on a real cluster: the page runs as written."""

import gzip
import pickle
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

import infermill
from infermill import CardOptions
from tests.clusters import StandaloneCluster
from tests.resnet18 import write_resnet18
from tests.servers import Bucket
from tests.shards import CIFAR10_NAMES, cifar10_batch, tar_of

ROOT = Path(__file__).parents[1]
IMAGES = 10_000
# What the page says, and what it is here: images stay as small as they are, which is a 49th of the work.
SIDE = "32"
BROKEN = 3
"An object that is no image; on this one, the job of 2017 ends."


def pictures(count: int, seed: int) -> tuple[NDArray[np.uint8], list[int]]:
    """Rows of CIFAR that differ more than noise does: 16 coloured squares each, and their labels."""
    random = np.random.default_rng(seed)
    squares = random.integers(0, 256, (count, 3, 4, 4)).astype(np.uint8)
    labels = random.integers(0, len(CIFAR10_NAMES), count)
    return squares.repeat(8, axis=2).repeat(8, axis=3).reshape(count, -1), [int(label) for label in labels]


def write_archive(path: Path) -> None:
    """The python version of CIFAR-10 with its whole test set, and a little of the other batches."""
    files = {"batches.meta": pickle.dumps({b"label_names": [name.encode() for name in CIFAR10_NAMES]}, 2)}
    for number in range(1, 6):
        files[f"data_batch_{number}"] = cifar10_batch(*pictures(10, number))
    files["test_batch"] = cifar10_batch(*pictures(IMAGES, 0))
    content = tar_of({f"cifar-10-batches-py/{name}": content for name, content in files.items()})
    path.write_bytes(gzip.compress(content, 1))


@dataclass(frozen=True)
class Page:
    """The code of docs/recipe-2017.md, as it runs in a folder, with a bucket and a cluster of this test."""

    folder: Path
    bucket: Bucket
    cluster: StandaloneCluster

    def command(self, beginning: str) -> "subprocess.CompletedProcess[str]":
        """Run the one command that begins so."""
        lines = [line for block in self._blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
        (line,) = [line for line in lines if line.startswith(beginning)]
        program, *arguments = shlex.split(line)
        arguments = [self._here(argument) for argument in arguments]
        if "--master" in arguments:
            conf = [*self.cluster.options.conf, f"spark.executorEnv.AWS_ENDPOINT_URL={self.bucket.endpoint}"]
            arguments += [argument for setting in conf for argument in ("--conf", setting)]
        return self._run([str(Path(sys.executable).with_name(program)), *arguments])

    def snippet(self) -> str:
        """Run the Python on the page."""
        (code,) = self._blocks("python")
        return self._run([sys.executable, "-c", self._here(code)]).stdout

    def _here(self, text: str) -> str:
        text = text.replace("s3://bucket", self.bucket.uri).replace("spark://head:7077", self.cluster.master)
        return str(ROOT / text) if text.startswith("examples/") else SIDE if text == "224" else text

    def _blocks(self, language: str) -> list[str]:
        return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs/recipe-2017.md").read_text(), re.DOTALL)

    def _run(self, command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=170, check=False)
        assert done.returncode == 0, done.stderr
        return done


@pytest.fixture
def page(standalone: StandaloneCluster, bucket: Bucket, tmp_path: Path, aws_environment: pytest.MonkeyPatch) -> Page:
    """The page in a folder that has what it names."""
    aws_environment.setenv("AWS_ENDPOINT_URL", bucket.endpoint)
    aws_environment.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_archive(tmp_path / "cifar-10-python.tar.gz")
    write_resnet18(tmp_path, len(CIFAR10_NAMES))
    (tmp_path / "synset.txt").write_text("\n".join(CIFAR10_NAMES))
    return Page(tmp_path, bucket, standalone)


def indexes_and_scores(rows: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The best five classes of each row."""
    best = [one for top in rows["top"].to_pylist() for one in top]
    indexes, scores = ([one[field] for one in best] for field in ("index", "score"))
    return np.array(indexes).reshape(-1, 5), np.array(scores).reshape(-1, 5)


@pytest.mark.slow
def test_the_page_runs_as_it_is_written(page: Page) -> None:
    unpacked = page.command("infermill datasets").stdout
    assert unpacked.startswith(f"{IMAGES:,} images in {page.bucket.uri}/cifar10/test; labels in ")
    keys = [f"cifar10/test/test_batch/{number:04d}.png" for number in range(IMAGES)]
    page.bucket.put(keys[BROKEN], b"<html>Slow down</html>")
    example = page.command("python examples/")
    assert example.stderr.endswith(f"{IMAGES - 1} of {IMAGES} images predicted by 2 executors\n")
    done_before = page.command("infermill run").stdout
    assert done_before.startswith(f"{IMAGES:,} objects: {IMAGES - 1:,} predicted, 1 failed in ")
    assert "(all of it was done before)" in done_before
    verified = page.command("infermill verify").stdout
    assert verified.startswith(f"verified: {IMAGES:,} objects in 20 partitions, {IMAGES - 1:,} predicted and 1 failed")

    rows = infermill.read(f"{page.bucket.uri}/predictions/")
    assert rows["key"].to_pylist() == keys
    assert [number for number, error in enumerate(rows["error"].to_pylist()) if error] == [BROKEN]
    local = predict_here(page.folder)
    found, expected = (indexes_and_scores(table.filter(rows["error"].is_null())) for table in (rows, local))
    assert np.allclose(found[1], expected[1], atol=1e-4)
    # Scores that are all but equal may change places.
    assert np.mean(found[0] == expected[0]) > 0.999
    assert len(np.unique(found[0][:, 0])) > 3

    printed = re.split(r"^(\S+\.png)(.*)\n", example.stdout, flags=re.MULTILINE)[1:]
    assert printed[::3] == keys[:10]
    for row, failure, text in zip(rows.slice(0, 10).to_pylist(), printed[1::3], printed[2::3], strict=True):
        assert failure == (f" {row['error']['code']}: {row['error']['message']}" if row["error"] else "")
        best = [(f"{one['score']:f}", one["label"]) for one in row["top"] or ()]
        assert re.findall(r"^    probability=(\S+), class=(\S+)$", text, re.MULTILINE) == best

    labels = np.delete(pictures(IMAGES, 0)[1], BROKEN)
    assert page.snippet() == f"{np.mean(found[0][:, 0] == labels):.2%} of {IMAGES - 1} images\n"


def predict_here(folder: Path) -> pa.Table:
    """What the network says of the pixels in the archive, by the engine of one machine."""
    card = CardOptions(labels=str(folder / "synset.txt"), exact=(int(SIDE), int(SIDE)), filter="lanczos")
    source = f"cifar10:{folder}/cifar-10-python.tar.gz?split=test"
    infermill.run(source, folder / "resnet-18", folder / "local", card_options=card)
    return infermill.read(folder / "local")
