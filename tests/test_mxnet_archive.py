"""Archives of MXNet Model Server: what is taken out of them, and what is refused."""

import os
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infermill.errors import ModelError
from infermill.models.mxnet.archive import unpack_archive
from tests.checkpoints import archive_files, write_archive


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_checkpoint_is_unpacked_and_nothing_else(cache: Path, tmp_path: Path) -> None:
    files = archive_files()
    found = unpack_archive(write_archive(tmp_path / "tiny.mar", files))
    assert found.symbol.read_text() == files["tiny-symbol.json"]
    assert found.params.read_bytes() == files["tiny-0000.params"]
    assert found.labels == ("tabby, tabby cat", "Labrador retriever", "tench, Tinca tinca")
    assert found.shape == (3, 96, 96)
    assert {path.name for path in cache.rglob("*") if path.is_file()} == {"tiny-symbol.json", "tiny-0000.params"}


def test_it_is_unpacked_once(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "tiny.mar", archive_files())
    first = unpack_archive(path)
    before = first.params.stat()
    assert unpack_archive(path) == first
    assert first.params.stat().st_mtime_ns == before.st_mtime_ns


def test_the_manifest_before_1_0_says_which_files_are_meant(tmp_path: Path) -> None:
    files = archive_files()
    del files["MAR-INF/MANIFEST.json"]
    files |= {
        "MANIFEST.json": '{"Model": {"Symbol": "tiny-symbol.json", "Parameters": "tiny-0000.params"}}',
        "other-symbol.json": "{}",
        "tiny-0001.params": b"",
    }
    found = unpack_archive(write_archive(tmp_path / "tiny.model", files))
    assert (found.symbol.name, found.params.name) == ("tiny-symbol.json", "tiny-0000.params")


def test_labels_without_numbers_stay_as_they_are(tmp_path: Path) -> None:
    for text, labels in (
        ("n02123045 tabby\ncat\n", ("n02123045 tabby", "cat")),
        ("a b\n\nc", ("a b", "", "c")),
        ("\ufeffa\u2028b\r\nc", ("a\u2028b", "c")),
    ):
        assert unpack_archive(write_archive(tmp_path / "x.mar", archive_files(synset_txt=text))).labels == labels


@pytest.mark.parametrize(
    "signature", ["{}", "[]", '{"inputs": []}', '{"inputs": [{"data_shape": [0, "x"]}]}', '{"inputs": [{}, {}]}']
)
def test_a_signature_that_tells_no_shape(signature: str, tmp_path: Path) -> None:
    found = unpack_archive(write_archive(tmp_path / "x.mar", archive_files(signature_json=signature)))
    assert found.shape is None


def without(name: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        write_archive(path, {key: content for key, content in archive_files().items() if key != name})

    return write


def with_entry(name: str, content: bytes = b"x") -> Callable[[Path], None]:
    def write(path: Path) -> None:
        write_archive(path, archive_files() | {name: content})

    return write


def with_a_link(path: Path) -> None:
    files = archive_files()
    del files["tiny-0000.params"]
    write_archive(path, files)
    entry = zipfile.ZipInfo("tiny-0000.params")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(entry, "/etc/passwd")


def with_a_double(path: Path) -> None:
    write_archive(path, archive_files())
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("tiny-0000.params", b"another")


def with_a_password(path: Path) -> None:
    write_archive(path, archive_files())
    content = bytearray(path.read_bytes())
    for magic, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = -1
        while (at := content.find(magic, at + 1)) >= 0:
            content[at + offset] |= 1
    path.write_bytes(content)


def with_a_bomb(path: Path) -> None:
    write_archive(path, archive_files() | {"tiny-0000.params": bytes(100 << 20)})


def with_other_compression(path: Path) -> None:
    write_archive(path, archive_files(), zipfile.ZIP_LZMA)


def cut(path: Path) -> None:
    write_archive(path, archive_files())
    path.write_bytes(path.read_bytes()[:-40])


def damage_the_content(path: Path) -> None:
    write_archive(path, archive_files(), zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    content[content.index(b"conv0_weight")] ^= 1
    path.write_bytes(content)


def claim_less(path: Path) -> None:
    """The list of contents says that an entry is shorter than it is."""
    write_archive(path, archive_files(), zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    at = content.rindex(b"tiny-0000.params") - 46
    content[at + 24 : at + 28] = (10).to_bytes(4, "little")
    path.write_bytes(content)


def claim_a_long_list(path: Path) -> None:
    write_archive(path, archive_files())
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\5\6")
    content[at + 12 : at + 16] = (1 << 30).to_bytes(4, "little")
    path.write_bytes(content)


def claim_a_long_list_in_64_bits(path: Path) -> None:
    """As archives of more than 4 GiB say it; what they say in 32 bits stays innocent."""
    write_archive(path, archive_files())
    content = path.read_bytes()
    at = content.rindex(b"PK\5\6")
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 6, 6, 1 << 30, 0)
    path.write_bytes(content[:at] + record + struct.pack("<4sLQL", b"PK\6\7", 0, at, 1) + content[at:])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (without("tiny-symbol.json"), "holds no MXNet network: it has no file …-symbol.json"),
        (without("tiny-0000.params"), "holds no MXNet network"),
        (with_entry("more-symbol.json"), "has several files …-symbol.json"),
        (with_entry("../outside"), "lies outside of it: '../outside'"),
        (with_entry("a/../../outside"), "lies outside of it"),
        (with_entry("/etc/outside"), "lies outside of it"),
        (with_entry("C:\\outside"), "lies outside of it"),
        (with_entry("signature.json", b"{"), "signature.json in .* is not JSON"),
        (with_entry("signature.json", b"[" * 10_000), "signature.json in .* is not JSON"),
        (with_entry("synset.txt", b"\xff"), "synset.txt in .* is not UTF-8"),
        (with_entry("synset.txt", os.urandom(17 << 20)), "is larger than 16 MiB"),
        (with_a_link, "is a symbolic link"),
        (with_a_double, "has 2 entries that are called 'tiny-0000.params'"),
        (with_a_password, "is encrypted"),
        (with_a_bomb, "unpacks .* bytes to 104857600"),
        (with_other_compression, "compressed in an unusual way"),
        (cut, "is no zip archive, or it is damaged"),
        (damage_the_content, "is damaged"),
        (claim_less, "is damaged"),
        (claim_a_long_list, "list of contents that is too long"),
        (claim_a_long_list_in_64_bits, "list of contents that is too long"),
        (lambda path: path.write_bytes(b"no archive"), "is no zip archive"),
        (lambda path: None, "No such file"),
    ],
)
def test_what_is_no_archive_or_does_harm_is_refused(
    write: Callable[[Path], None], message: str, cache: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.mar"
    write(path)
    with pytest.raises(ModelError, match=message) as caught:
        unpack_archive(path)
    assert str(path) in caught.value.message
    assert caught.value.hint
    assert not [file for file in cache.rglob("*") if file.is_file() and file.name != "tiny-symbol.json"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 7)), min_size=1, max_size=4))
def test_flipped_bits_are_read_or_refused(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    path = write_archive(tmp_path / "x.mar", archive_files())
    content = bytearray(path.read_bytes())
    for at, bit in flips:
        content[at % len(content)] ^= 1 << bit
    path.write_bytes(content)
    try:
        found = unpack_archive(path)
    except ModelError:
        return
    assert found.symbol.is_relative_to(tmp_path / "cache")
