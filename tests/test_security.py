"""What hostile files must not do, and what must not be told: secrets, and temporary files of others."""

import io
import os
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import onnx
import pyarrow.parquet as pq
import pytest

import infermill
from infermill.errors import ModelError, UsageError
from infermill.models.card_file import read_card
from infermill.models.executable import executable
from infermill.models.opening import open_model
from infermill.types import CardOptions, StoreOptions
from tests.networks import tiny_classifier
from tests.servers import Bucket, free_port
from tests.test_cli import INFERMILL
from tests.test_job import write_photos

CARD = "name: tiny\nfiles: {onnx: tiny.onnx}\npreprocess: {resize: {exact: [32, 32]}}\n"
LABELS = "\n".join("abcdefghij")
SENTINEL = "SENTINEL"
SECRETS = {
    "AWS_ACCESS_KEY_ID": f"AKIA{SENTINEL}",
    "AWS_SECRET_ACCESS_KEY": f"{SENTINEL}secret",
    "AWS_SESSION_TOKEN": f"{SENTINEL}session",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A card's folder, with a file beside it that is none of the card's business."""
    place = tmp_path / "model"
    place.mkdir()
    tiny_classifier(place / "tiny.onnx")
    (place / "model.yaml").write_text(CARD)
    (tmp_path / "private.txt").write_text(LABELS)
    return place


# --- model cards


def multiplied() -> str:
    """Mappings that each merge the one before three times: 3^26 entries."""
    lines = ["a: &a {key: value}"]
    for before, name in zip("abcdefghijklmnopqrstuvwxy", "bcdefghijklmnopqrstuvwxyz", strict=True):
        lines.append(f"{name}: &{name} {{<<: [*{before}, *{before}, *{before}], own: 1}}")
    return "\n".join(lines)


def laughs() -> str:
    """Lists that each hold the one before nine times: 9^10 strings, as the labels."""
    lines = ["name: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    for before, name in zip("abcdefghi", "bcdefghij", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    return "\n".join([*lines, "labels: *j"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (multiplied(), "merge keys"),
        (laughs(), "unknown field `b`"),
        ("name: x\nfiles: {onnx: a.onnx}\nlabels: &a [*a]", "`labels`"),
        ("name: 1" + ":59" * 300_000, "longer than 4096 characters"),
        ("name: 0x" + "f" * 1_000_000, "longer than 4096 characters"),
        ("[" * 100_000, "is not YAML"),
        ("- " * 300_000, "is not YAML"),
        ("{a: " * 200_000, "is not YAML"),
        ("name: " + "[" * 90 + "]" * 90, "`name`"),
        ("name: !!python/object/apply:os.system [touch owned]", "is not YAML"),
    ],
    ids=["merge", "laughs", "circle", "base 60", "hex", "brackets", "dashes", "braces", "lists", "python"],
)
def test_a_yaml_bomb_is_refused_soon(content: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(content)
    started = time.process_time()
    with pytest.raises(ModelError, match=reason) as caught:
        read_card(path)
    assert time.process_time() - started < 5
    assert len(str(caught.value)) < 1000


def test_a_card_without_end_is_not_read_to_it() -> None:
    with pytest.raises(ModelError, match="is larger than 1 MiB"):
        read_card(Path("/dev/zero"))


@pytest.mark.parametrize("name", ["../private.txt", "sub/../../private.txt", "/etc/hostname", "file:///etc/hostname",
                                  "link.txt", "linked/private.txt", "s3://bucket/private.txt"])  # fmt: skip
def test_labels_outside_the_folder_of_the_card_are_refused(name: str, folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "link.txt").symlink_to(folder.parent / "private.txt")
    (folder / "linked").symlink_to(folder.parent)
    (folder / "model.yaml").write_text(CARD + f"labels: {name}\n")
    with pytest.raises(ModelError, match="is outside the card's folder") as caught:
        open_model(folder / "model.yaml", StoreOptions())
    assert name in caught.value.message
    assert "--labels" in caught.value.hint


def test_labels_below_the_card_or_named_by_the_user_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = folder / "model.yaml"
    (folder / "sub").mkdir()
    (folder / "sub" / "real.txt").write_text(LABELS)
    (folder / "labels.txt").symlink_to("sub/real.txt")
    for name in ("sub/real.txt", "labels.txt", "./labels.txt"):
        card.write_text(CARD + f"labels: {name}\n")
        assert open_model(card, StoreOptions()).labels == tuple("abcdefghij")
    monkeypatch.chdir(folder)
    assert open_model("model.yaml", StoreOptions()).labels == tuple("abcdefghij")
    options = CardOptions(labels="../private.txt")
    assert open_model("model.yaml", StoreOptions(), options).labels == tuple("abcdefghij")


@pytest.mark.parametrize("name", ["../private.txt", "/etc/hostname", "file:///etc/hostname", "{other}/private.txt"])
def test_labels_of_a_card_in_a_bucket_lie_below_it(name: str, folder: Path, bucket: Bucket) -> None:
    bucket.put("private.txt", LABELS.encode())
    bucket.put("m/tiny.onnx", (folder / "tiny.onnx").read_bytes())
    bucket.put("m/model.yaml", (CARD + f"labels: {name.format(other=bucket.uri)}\n").encode())
    with pytest.raises(ModelError, match="is outside the card's folder"):
        open_model(f"{bucket.uri}/m/model.yaml", bucket.options)


# --- networks


@pytest.fixture
def external(folder: Path) -> Path:
    """A network that keeps its weights in `tiny.onnx.data`."""
    return tiny_classifier(folder / "tiny.onnx", external_data=True)


def relocate(network: Path, location: str) -> None:
    model = onnx.load(network, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    network.write_bytes(model.SerializeToString())


def test_weights_behind_a_linked_folder_are_refused(external: Path, folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    (folder / "tiny.onnx.data").rename(elsewhere / "w.bin")
    (folder / "sub").symlink_to(elsewhere)
    relocate(external, "sub/w.bin")
    with pytest.raises(ModelError, match="are outside the model's folder"):
        open_model(folder / "model.yaml", StoreOptions())


@pytest.mark.parametrize("location", ["../private.bin", "/etc/hostname"])
def test_weights_elsewhere_in_a_bucket_are_not_fetched(
    location: str, external: Path, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bucket.put("private.bin", bytes(100_000))
    relocate(external, location)
    bucket.put("m/tiny.onnx", external.read_bytes())
    with pytest.raises(ModelError, match="are outside the model's folder"):
        open_model(f"{bucket.uri}/m/tiny.onnx", bucket.options)
    assert not [path for path in tmp_path.rglob("private.bin") if "cache" in path.parts]


# --- secrets


def run_with_secrets(arguments: list[str], work: Path, endpoint: str, **settings: str) -> str:
    """Run the command line with sentinels for credentials; the value is all that it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(work), **SECRETS, **settings}
    told = endpoint.replace("://", f"://user:{SENTINEL}password@")
    command = [INFERMILL, *arguments, "--endpoint-url", told, "--region", "us-east-1", "--json"]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=120, check=False)
    return f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"


def contents(work: Path, bucket: Bucket) -> Iterator[bytes]:
    """All that was written, with what compression hides."""
    files = [path.read_bytes() for path in work.rglob("*") if path.is_file()]
    files += [bucket.client.get_object(Bucket=bucket.name, Key=key)["Body"].read() for key in list(bucket.keys())]
    for content in files:
        yield content
        if content.startswith(b"PAR1"):
            table = pq.read_table(io.BytesIO(content))
            yield repr(table.to_pylist()).encode()
            yield repr(pq.read_metadata(io.BytesIO(content)).metadata).encode()


def test_secrets_are_neither_printed_nor_written(folder: Path, bucket: Bucket, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 3)
    for path in (tmp_path / "photos").iterdir():
        bucket.put(f"photos/{path.name}", path.read_bytes())
    bucket.put("photos/bad.png", b"no image")
    for name in ("model.yaml", "tiny.onnx"):
        bucket.put(f"m/{name}", (folder / name).read_bytes())
    photos, model = f"{bucket.uri}/photos/", f"{bucket.uri}/m/model.yaml"
    outputs = [f"{bucket.uri}/out", "here"]
    for output in outputs:
        told = run_with_secrets(["run", photos, "-m", model, "-o", output], tmp_path, bucket.endpoint)
        assert told.startswith("exit 0"), told
        assert '"failed": 1' in told
        assert SENTINEL not in told
    # Another job at the same place: the refusal shows what differs.
    told = run_with_secrets(["run", f"{bucket.uri}/", "-m", model, "-o", "here"], tmp_path, bucket.endpoint)
    assert told.startswith("exit 2"), told
    assert SENTINEL not in told
    written = list(contents(tmp_path, bucket))
    assert len(written) > 20
    assert not [content for content in written if SENTINEL.encode() in content]


def test_secrets_are_not_told_by_what_fails(folder: Path, bucket: Bucket, tmp_path: Path) -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    quick = ["-m", "model/model.yaml", "--store-deadline", "1", "-o"]
    for source, output, endpoint in (
        ("s3://no-such-bucket/photos/", "out1", bucket.endpoint),
        ("s3://photos/", "out3", dead),
        ("model/", "s3://results/out", dead),
        (f"s3://photos/?X-Amz-Signature={SENTINEL}", "out5", dead),
    ):
        told = run_with_secrets(["run", source, *quick, output], tmp_path, endpoint)
        assert told.startswith(("exit 1", "exit 2")), told
        assert "error: " in told
        assert "Traceback" not in told
        assert SENTINEL not in told, told
    assert not [content for content in contents(tmp_path, bucket) if SENTINEL.encode() in content]


@pytest.mark.parametrize(
    "uri",
    [
        f"s3://bucket/a?X-Amz-Signature={SENTINEL}",
        f"gs://bucket/a?X-Goog-Signature={SENTINEL}",
        f"az://container/a?sv=1&sig={SENTINEL}",
        f"s3://user:{SENTINEL}@bucket/a",
        f"az://user:{SENTINEL}@account/a",
        f"https://user:{SENTINEL}@host/a?sig={SENTINEL}",
    ],
)
@pytest.mark.parametrize("place", ["photos", "model.yaml", "out"])
def test_a_uri_with_a_secret_is_refused_and_not_repeated(place: str, uri: str, folder: Path) -> None:
    write_photos(folder / "photos", 1)
    source, model, output = (uri if name == place else folder / name for name in ("photos", "model.yaml", "out"))
    with pytest.raises(UsageError) as caught:
        infermill.run(source, model, output)
    assert SENTINEL not in str(caught.value)
    assert caught.value.hint


# --- temporary files


class Watch:
    """Keeps the permissions of whatever appears in a folder while it is entered."""

    def __init__(self, folder: Path) -> None:
        self.modes: dict[str, int] = {}
        self._folder = folder
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._ending.wait(0.005):
            for entry in os.scandir(self._folder):
                try:
                    self.modes[entry.name] = stat.S_IMODE(entry.stat(follow_symlinks=False).st_mode)
                except FileNotFoundError:
                    continue

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()


def test_temporary_files_of_a_job_are_private_and_gone(folder: Path, bucket: Bucket, tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    write_photos(tmp_path / "photos", 3)
    for name in ("model.yaml", "tiny.onnx"):
        bucket.put(f"m/{name}", (folder / name).read_bytes())
    environment = os.environ | {"TMPDIR": str(temporary), "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "c")}
    command = [
        INFERMILL,
        "run",
        "-",
        "-m",
        f"{bucket.uri}/m/model.yaml",
        "-o",
        "out",
        "--endpoint-url",
        bucket.endpoint,
    ]
    manifest = "\n".join(str(path) for path in (tmp_path / "photos").iterdir())
    with Watch(temporary) as watch:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, input=manifest, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    assert watch.modes, "the manifest of standard input is kept while the job runs"
    assert not [name for name, mode in watch.modes.items() if mode & 0o077]
    assert list(temporary.iterdir()) == []
    kept = list((tmp_path / "c").rglob("*.onnx"))
    assert kept
    assert not [path for path in kept if stat.S_IMODE(path.parent.stat().st_mode) & 0o077]


def test_a_network_beside_its_weights_is_private_and_gone(
    external: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    model = open_model(folder / "model.yaml", StoreOptions())
    with executable(model, max_bytes=0) as graph:
        assert isinstance(graph.network, Path)
        assert graph.network.parent.parent == temporary
        assert stat.S_IMODE(graph.network.parent.stat().st_mode) == 0o700
    assert list(temporary.iterdir()) == []
