import fnmatch
import glob
import io
import os
import re
import string
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from infermill.errors import InfermillError, SourceError, StoreError, UsageError
from infermill.fetch import fetcher
from infermill.sources import IMAGE_SUFFIXES, canonical, list_source, objects, rereadable
from infermill.stores import is_nameable
from infermill.types import ObjectRef, StoreOptions
from tests.servers import Bucket

ALL = ("",)


def listed(uri: str, suffix: tuple[str, ...] | None = None, options: StoreOptions | None = None) -> list[ObjectRef]:
    """What a source holds."""
    _, batches = list_source(uri, suffix, options or StoreOptions())
    return refs_of(batches)


def refs_of(batches: Iterable[pa.RecordBatch]) -> list[ObjectRef]:
    return [ObjectRef(row["key"], row["size"], row["etag"]) for batch in batches for row in batch.to_pylist()]


def keys(uri: str, suffix: tuple[str, ...] | None = None, options: StoreOptions | None = None) -> list[str]:
    return [ref.key for ref in listed(uri, suffix, options)]


def fetched(uri: str, suffix: tuple[str, ...] | None = None, options: StoreOptions | None = None) -> dict[str, bytes]:
    """What a source holds, read back by the keys that it was listed with."""
    options = options or StoreOptions()
    source, batches = list_source(uri, suffix, options)
    fetch = fetcher(source, options)
    return {ref.key: bytes(fetch(ref)) for ref in refs_of(batches)}


def make_files(root: Path, names: Sequence[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


TREE = [
    "a.jpg",
    "b.PNG",
    "c.txt",
    ".hidden.jpg",
    ".git/e.jpg",
    "sub/d.jpeg",
    "sub/.thumbs/f.jpg",
    "sub/deep/..g.jpg",
    "sub/deep/h.tif",
    "z.jpgx",
]


def test_a_folder_is_listed_recursively_in_order_without_what_is_hidden_or_no_image(tmp_path: Path) -> None:
    make_files(tmp_path, TREE)
    assert keys(str(tmp_path)) == ["a.jpg", "b.PNG", "sub/d.jpeg", "sub/deep/h.tif"]
    assert keys(f"{tmp_path}/") == keys(str(tmp_path))
    assert fetched(str(tmp_path))["sub/d.jpeg"] == b"sub/d.jpeg"
    assert [ref.size for ref in listed(str(tmp_path))] == [5, 5, 10, 14]


def test_suffixes_are_compared_whatever_their_case(tmp_path: Path) -> None:
    make_files(tmp_path, TREE)
    assert keys(str(tmp_path), (".PnG", ".txt")) == ["b.PNG", "c.txt"]
    assert keys(str(tmp_path), ALL) == ["a.jpg", "b.PNG", "c.txt", "z.jpgx", "sub/d.jpeg", "sub/deep/h.tif"]
    with pytest.raises(UsageError, match="empty list of suffixes"):
        keys(str(tmp_path), ())


def test_links_and_special_files(tmp_path: Path) -> None:
    make_files(tmp_path, ["a/real.jpg"])
    (tmp_path / "broken.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "link.jpg").symlink_to("a/real.jpg")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "folder.jpg").symlink_to("a")
    os.mkfifo(tmp_path / "pipe.jpg")
    refs = {ref.key: ref for ref in listed(str(tmp_path))}
    assert list(refs) == ["broken.jpg", "link.jpg", "a/real.jpg"]
    assert refs["broken.jpg"] == ObjectRef("broken.jpg", -1, None)
    (tmp_path / "broken.jpg").unlink()
    assert fetched(str(tmp_path)) == {"link.jpg": b"a/real.jpg", "a/real.jpg": b"a/real.jpg"}


def test_an_empty_folder_and_one_without_images_hold_nothing(tmp_path: Path) -> None:
    assert keys(str(tmp_path)) == []
    make_files(tmp_path, ["readme.txt"])
    assert keys(str(tmp_path)) == []


@pytest.mark.parametrize("name", ["missing", "missing.jpg", "missing.txt", "missing/*.jpg", "a.jpg/b.jpg"])
def test_what_is_missing_is_told(name: str, tmp_path: Path) -> None:
    make_files(tmp_path, ["a.jpg"])
    with pytest.raises(InfermillError, match=str(tmp_path)) as caught:
        keys(f"{tmp_path}/{name}")
    assert caught.value.hint


def test_an_unreadable_folder_is_told_rather_than_left_out(
    shared_path: Path, unprivileged: Callable[[], AbstractContextManager[None]]
) -> None:
    make_files(shared_path, ["a.jpg", "locked/b.jpg"])
    (shared_path / "locked").chmod(0o000)
    with unprivileged(), pytest.raises(SourceError, match=r"locked.* is denied"):
        keys(str(shared_path))
    with unprivileged():
        assert keys(f"{shared_path}/*.jpg") == ["a.jpg"]


def test_a_file_in_a_folder_that_may_be_entered_and_not_listed(
    shared_path: Path, unprivileged: Callable[[], AbstractContextManager[None]]
) -> None:
    make_files(shared_path, ["private/a.jpg"])
    (shared_path / "private").chmod(0o711)
    with unprivileged():
        assert fetched(f"{shared_path}/private/a.jpg") == {"a.jpg": b"private/a.jpg"}


@pytest.mark.parametrize("name", ["photo.jpg", "photo.dat", "photo", ".hidden", "sub/a[1]*.bin", os.fsdecode(b"\xff")])
def test_one_file_is_taken_whatever_its_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / name).write_bytes(b"cat")
    assert list(fetched(f"{tmp_path}/{name}").values()) == [b"cat"]


def test_a_relative_path_and_a_file_uri_are_the_same_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_files(tmp_path, ["my photos/a.jpg"])
    monkeypatch.chdir(tmp_path)
    assert fetched("my photos") == fetched(f"file://{tmp_path}/my%20photos") == {"a.jpg": b"my photos/a.jpg"}
    for same in ("my photos", "my photos/", f"file://{tmp_path}/my%20photos/"):
        assert canonical(same, StoreOptions()) == f"{tmp_path}/my photos"


def test_a_bucket_is_another_one_elsewhere() -> None:
    here = canonical("s3://b/photos/", StoreOptions(endpoint_url="http://127.0.0.1:1"))
    assert here != canonical("s3://b/photos/", StoreOptions(endpoint_url="http://127.0.0.1:2"))


def test_a_manifest_is_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in (("a.txt", "1\n"), ("b.txt", "1\n"), ("c.txt", "2\n")):
        (tmp_path / name).write_text(content)
    a, b, c = (canonical(name, StoreOptions()) for name in ("a.txt", "b.txt", "c.txt"))
    assert a == b != c
    (tmp_path / "folder.txt").mkdir()
    assert canonical("folder.txt", StoreOptions()) == f"{tmp_path}/folder.txt"
    assert canonical("*.txt", StoreOptions()) == f"{tmp_path}/*.txt"


def test_a_folder_whose_name_looks_like_a_uri(tmp_path: Path) -> None:
    make_files(tmp_path, ["s3:/bucket/a.jpg"])
    assert fetched(f"{tmp_path}/s3://bucket") == {"a.jpg": b"s3:/bucket/a.jpg"}


def test_a_batch_holds_the_files_of_many_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "BATCH_ROWS", 4)
    make_files(tmp_path, [f"{folder}/{name}.jpg" for folder in range(5) for name in range(2)])
    _, batches = list_source(str(tmp_path), None, StoreOptions())
    assert [batch.num_rows for batch in batches] == [4, 4, 2]
    assert keys(str(tmp_path)) == [f"{folder}/{name}.jpg" for folder in range(5) for name in range(2)]


GLOB_TREE = [
    "a.jpg",
    "ab.jpg",
    "b.jpg",
    "c.txt",
    "sub/a.jpg",
    "sub/x+y(1).jpg",
    "sub/deep/a.jpg",
    "sub/.a.jpg",
    "sub[1]/a.jpg",
    "su\nb/a.jpg",
]
GLOBS = {
    "*.jpg": ["a.jpg", "ab.jpg", "b.jpg"],
    "*": ["a.jpg", "ab.jpg", "b.jpg"],
    "*.*": ["a.jpg", "ab.jpg", "b.jpg", "c.txt"],
    "?.jpg": ["a.jpg", "b.jpg"],
    "[ab].jpg": ["a.jpg", "b.jpg"],
    "[!a].jpg": ["b.jpg"],
    "[b-z].???": ["b.jpg", "c.txt"],
    "sub[!a]a.jpg": [],
    "sub?a.jpg": [],
    "sub[+-9]a.jpg": [],
    "sub/*.jpg": ["sub/a.jpg", "sub/x+y(1).jpg"],
    "sub/x+y(*).jpg": ["sub/x+y(1).jpg"],
    "s*/a.jpg": ["su\nb/a.jpg", "sub/a.jpg", "sub[1]/a.jpg"],
    "**/a.jpg": ["a.jpg", "su\nb/a.jpg", "sub/a.jpg", "sub/deep/a.jpg", "sub[1]/a.jpg"],
    "sub/**/a.jpg": ["sub/a.jpg", "sub/deep/a.jpg"],
    "sub[[]1]/*.jpg": ["sub[1]/a.jpg"],
    "sub[[]1[]]/*.jpg": ["sub[1]/a.jpg"],
    "sub[1]/*.jpg": [],
    "sub/**": ["sub/a.jpg", "sub/deep/a.jpg", "sub/x+y(1).jpg"],
}


@pytest.mark.parametrize("pattern", GLOBS)
def test_a_glob_in_a_folder(pattern: str, tmp_path: Path) -> None:
    make_files(tmp_path, GLOB_TREE)
    found = fetched(f"{tmp_path}/{pattern}")
    prefix = pattern[: pattern.rfind("/", 0, re.search(r"[*?\[]", pattern).start()) + 1]  # type: ignore[union-attr]
    assert sorted(prefix + key for key in found) == GLOBS[pattern]
    assert all(content == (prefix + key).encode() for key, content in found.items())


def test_a_glob_in_a_bucket(bucket: Bucket) -> None:
    for name in filter(is_nameable, GLOB_TREE):
        bucket.put(f"base/{name}", name.encode())
    for pattern, names in GLOBS.items():
        found = fetched(f"{bucket.uri}/base/{pattern}", None, bucket.options)
        assert found == {f"base/{name}": name.encode() for name in filter(is_nameable, names)}, pattern


@pytest.mark.parametrize("name", ["a[1].jpg", "what?.jpg", "*.jpg"])
def test_wildcards_in_a_name_that_exists_are_no_wildcards(name: str, tmp_path: Path, bucket: Bucket) -> None:
    for other in (name, "a1.jpg", "whats.jpg"):
        (tmp_path / other).write_bytes(other.encode())
        bucket.put(other, other.encode())
    assert fetched(f"{tmp_path}/{name}") == {name: name.encode()}
    assert fetched(f"{bucket.uri}/{name}", None, bucket.options) == {name: name.encode()}


def matches(pattern: str, key: str) -> bool:
    """The reference: `**/` is any number of folders; in every other segment, fnmatch decides."""

    def fit(patterns: list[str], segments: list[str]) -> bool:
        if not patterns:
            return not segments
        if patterns == ["**"]:
            return bool(segments)
        if patterns[0] == "**":
            return any(fit(patterns[1:], segments[start:]) for start in range(len(segments)))
        return bool(segments) and fnmatch.fnmatchcase(segments[0], patterns[0]) and fit(patterns[1:], segments[1:])

    return fit(pattern.split("/"), key.split("/"))


NAMES = [
    "a",
    "b",
    "ab",
    "-",
    "a-b",
    "a!",
    "]",
    "a]",
    "z.",
    "a\\",
    "^",
    "\n",
    "é",
    "/".join("abab"),
    "b/a",
    "b/ab/]",
    "-/a",
]


@pytest.fixture(scope="module")
def tree_of_names() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        for directory in {Path(folder, name).parent for name in NAMES if "/" in name}:
            directory.mkdir(parents=True, exist_ok=True)
        for name in NAMES:
            if not Path(folder, name).is_dir():
                Path(folder, name).touch()
        yield folder


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.just("**") | st.text("ab*?[]!-^\\zé", min_size=1, max_size=6).filter(lambda text: "**" not in text),
        min_size=1,
        max_size=4,
    )
    .map("/".join)
    .filter(lambda pattern: re.search(r"[*?\[]", pattern))
)
@example("[]]")
@example("[!]]")
@example("[z-a]")
@example("[!z-a]")
@example("b[+-9]a")
@example("[^a]")
@example("[a/b]")
@example("**/**/a")
def test_globs_match_like_fnmatch_in_each_segment(tree_of_names: str, pattern: str) -> None:
    root = Path(tree_of_names)
    files = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
    head = pattern[: pattern.rfind("/", 0, re.search(r"[*?\[]", pattern).start()) + 1]  # type: ignore[union-attr]
    try:
        found = [head + key for key in keys(f"{root}/{pattern}", ALL)]
    except SourceError:
        found = []
    assert sorted(found) == sorted(file for file in files if matches(pattern, file))


ODD_NAMES = [
    "two words.jpg",
    " edge .jpg",
    "new\nline.jpg",
    "tab\t.jpg",
    "slash%2F.jpg",
    "percent%41.jpg",
    "nfc-é.jpg",
    "nfd-e\u0301.jpg",
    "plus+and&.jpg",
    "q?x=1&y#z.jpg",
    "back\\slash.jpg",
    "star*[1].jpg",
    "control\x01\x7f\x1b.jpg",
    "日本/😀.jpg",
    r"not\xffescaped\x5c.jpg",
    "~tilde.jpg",
    "$HOME'\"`|<>{}^.jpg",
    "a/b/c/d/e.jpg",
]
S3_NAMES = [
    *ODD_NAMES,
    "a//b.jpg",
    "a/../b.jpg",
    "../up.jpg",
    "./x.jpg",
    "a/./b.jpg",
    "x" * 1020 + ".jpg",
    "/leading.jpg",
    "//leading.jpg",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_odd_name_in_a_folder_round_trips(name: str, tmp_path: Path) -> None:
    make_files(tmp_path, [name])
    assert fetched(str(tmp_path)) == {name: name.encode()}


def test_odd_keys_round_trip(bucket: Bucket) -> None:
    names = [name for name in ODD_NAMES if is_nameable(name)]
    for name in names:
        bucket.put(f"base/{name}", name.encode())
    assert fetched(bucket.uri, None, bucket.options) == {f"base/{name}": name.encode() for name in names}
    for name in names:
        found = fetched(f"{bucket.uri}/base/{glob.escape(name)}", None, bucket.options)
        assert found == {f"base/{name}": name.encode()}


@pytest.mark.parametrize("name", [name for name in S3_NAMES if not is_nameable(name)], ids=ascii)
def test_a_key_that_object_store_cannot_name_round_trips(name: str, bucket: Bucket) -> None:
    bucket.put(name, name.encode())
    assert fetched(bucket.uri, None, bucket.options) == {name: name.encode()}
    assert fetched(f"{bucket.uri}/{name}", None, bucket.options) == {name: name.encode()}


def test_odd_keys_are_told_apart_from_their_plain_neighbours(bucket: Bucket) -> None:
    names = [*S3_NAMES, "leading.jpg", "b.jpg", "a/b.jpg", "x.jpg", "up.jpg", "percentA.jpg"]
    for name in names:
        bucket.put(name, name.encode())
    assert keys(bucket.uri, None, bucket.options) == sorted(names, key=str.encode)
    assert fetched(bucket.uri, None, bucket.options) == {name: name.encode() for name in names}


@pytest.mark.parametrize("prefix", ["/", "//", "a//", "a/../", "./", "new\nline/", "a b/%2F#?/"])
def test_a_prefix_means_itself_and_no_neighbour(prefix: str, bucket: Bucket) -> None:
    for name in (f"{prefix}x.jpg", f"{prefix.strip('/.')}/x.jpg", "x.jpg", "a/x.jpg", "b/x.jpg"):
        bucket.put(name, name.encode())
    uri = f"{bucket.uri}/{glob.escape(prefix)}" + ("*.jpg" if "?" in prefix else "")
    assert fetched(uri, None, bucket.options) == {f"{prefix}x.jpg": f"{prefix}x.jpg".encode()}


def test_without_boto3_a_plain_bucket_is_listed_and_a_leading_slash_is_told(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    bucket.put("folder/", b"")
    bucket.put("folder/a.jpg", b"cat")
    assert fetched(bucket.uri, None, bucket.options) == {"folder/a.jpg": b"cat"}
    bucket.put("/b.jpg", b"dog")
    with pytest.raises(SourceError, match="needs boto3"):
        fetched(bucket.uri, None, bucket.options)


@pytest.mark.parametrize(
    "raw",
    [b"\xff.jpg", b"caf\xe9.jpg", b"\xff\\xff\\.jpg", b"sub\xfe/\xc3\xa9\xe9.jpg"],
)
def test_a_name_that_is_not_utf8_round_trips(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / r"fold\xffer" / os.fsdecode(raw)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"cat")
    ((key, content),) = fetched(str(tmp_path / r"fold\xffer")).items()
    assert content == b"cat"
    assert re.search(r"\\x[ef]", key.encode().decode())


@settings(max_examples=150, deadline=None)
@given(
    st.binary(min_size=1, max_size=60)
    | st.text(st.characters(codec="utf-8"), min_size=1, max_size=60).map(str.encode)
    | st.text(r"\x5cfé", min_size=1, max_size=20).map(str.encode)
)
def test_any_file_name_round_trips(name: bytes) -> None:
    name = name.replace(b"/", b"_").replace(b"\0", b"_").lstrip(b".") or b"_"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, os.fsdecode(name)).write_bytes(name)
        found = fetched(folder, ALL)
    assert list(found.values()) == [name]
    if name.decode(errors="replace").encode() == name:
        assert list(found) == [name.decode()]


def test_a_prefix_an_object_and_neighbours_of_the_same_name(bucket: Bucket) -> None:
    for name in ("photos/a.jpg", "photos/sub/b.png", "photos2/c.jpg", "photos.txt/d.jpg", "photos/note.txt"):
        bucket.put(name, name.encode())
    below = ["photos/a.jpg", "photos/sub/b.png"]
    assert keys(f"{bucket.uri}/photos/", None, bucket.options) == below
    assert keys(f"{bucket.uri}/photos", None, bucket.options) == below
    assert keys(f"{bucket.uri}/photos/note.txt/", None, bucket.options) == []
    assert keys(f"{bucket.uri}/photos/sub/b.png", None, bucket.options) == ["photos/sub/b.png"]
    assert keys(f"{bucket.uri}/nothing", None, bucket.options) == []
    ref = listed(f"{bucket.uri}/photos/a.jpg", None, bucket.options)[0]
    assert ref == listed(f"{bucket.uri}/photos/", None, bucket.options)[0]
    assert ref.size == 12
    assert ref.etag


def test_one_object_is_taken_whatever_its_name(bucket: Bucket) -> None:
    bucket.put("photos/data", b"cat")
    assert fetched(f"{bucket.uri}/photos/data", None, bucket.options) == {"photos/data": b"cat"}


def test_a_bucket_is_filtered_like_a_folder(bucket: Bucket) -> None:
    for name in TREE:
        bucket.put(f"data/{name}", b"x")
    expected = ["data/a.jpg", "data/b.PNG", "data/sub/d.jpeg", "data/sub/deep/h.tif"]
    assert keys(f"{bucket.uri}/data/", None, bucket.options) == expected
    assert keys(f"{bucket.uri}/data/", (".TXT",), bucket.options) == ["data/c.txt"]


def test_a_prefix_that_is_named_hides_nothing(bucket: Bucket) -> None:
    bucket.put(".cache/a.jpg", b"x")
    assert keys(bucket.uri, None, bucket.options) == []
    assert keys(f"{bucket.uri}/.cache/", None, bucket.options) == [".cache/a.jpg"]


@pytest.mark.parametrize("odd", [[], ["data/odd//key"]])
def test_markers_of_folders_are_no_objects_and_empty_objects_are(odd: list[str], bucket: Bucket) -> None:
    for name in ("data", "data/", "data/both/", "data/sub/", "data/x.jpg/", "data/empty", *odd):
        bucket.put(name, b"")
    for name in ("data/both", "data/sub/a.jpg"):
        bucket.put(name, b"x")
    assert keys(f"{bucket.uri}/data/", ALL, bucket.options) == ["data/both", "data/empty", *odd, "data/sub/a.jpg"]
    assert keys(f"{bucket.uri}/data/", None, bucket.options) == ["data/sub/a.jpg"]


def test_thousands_of_keys_come_once_and_in_order(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"k{number:05d}.jpg" for number in range(998)] + ["m-1.jpg"]
    names += [f"n{number:05d}.jpg" for number in range(1501)]
    bucket.put_many(names, b"x")
    assert keys(bucket.uri, None, bucket.options) == names
    # A page ends with a marker that sorts behind its neighbour but is listed before it,
    # and the page after it holds a key that object_store cannot name.
    monkeypatch.setattr(objects, "BATCH_ROWS", 1000)
    bucket.put("m/", b"")
    bucket.put("n00700//.jpg.jpg", b"x")
    names = sorted([*names, "n00700//.jpg.jpg"])
    _, batches = list_source(bucket.uri, None, bucket.options)
    sizes = [batch.num_rows for batch in batches]
    assert sizes[0] == 999
    assert keys(bucket.uri, None, bucket.options) == [name for name in names if "/." not in name]


def test_a_text_manifest_names_files_and_objects(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_files(tmp_path, ["a b.jpg", "sub/c%2F.dat"])
    bucket.put("a//d#.jpg", b"remote")
    lines = ["a b.jpg", f"{tmp_path}/sub/c%2F.dat", f"file://{tmp_path}/a%20b.jpg", f"{bucket.uri}/a//d#.jpg", "é.jpg"]
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines[:2], "", *lines[2:]]).encode())
    monkeypatch.chdir(tmp_path)
    assert listed("list.txt") == [ObjectRef(line) for line in lines]
    (tmp_path / "é.jpg").write_bytes(b"local")
    assert list(fetched("list.txt", None, bucket.options).values()) == [
        b"a b.jpg",
        b"sub/c%2F.dat",
        b"a b.jpg",
        b"remote",
        b"local",
    ]


def test_a_manifest_in_a_bucket(bucket: Bucket) -> None:
    bucket.put("a.jpg", b"cat")
    bucket.put("list.txt", f"{bucket.uri}/a.jpg\n".encode())
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"url": [f"{bucket.uri}/a.jpg"]}), sink)
    bucket.put("list.parquet", sink.getvalue().to_pybytes())
    for name in ("list.txt", "list.parquet"):
        assert fetched(f"{bucket.uri}/{name}", None, bucket.options) == {f"{bucket.uri}/a.jpg": b"cat"}


def write_parquet(path: Path, columns: dict[str, object]) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.mark.parametrize("column", ["uri", "url", "key", "path"])
def test_a_parquet_manifest_is_taken_by_its_column(column: str, tmp_path: Path) -> None:
    manifest = write_parquet(tmp_path / "list.parquet", {"other": [1, 2], column: ["a.jpg", "b.dat"]})
    assert listed(manifest) == [ObjectRef("a.jpg"), ObjectRef("b.dat")]


def test_a_parquet_manifest_knows_sizes_and_etags(tmp_path: Path) -> None:
    columns = {"uri": ["a.jpg", "b.jpg"], "size": pa.array([7, None], pa.int32()), "etag": [None, '"x"']}
    manifest = write_parquet(tmp_path / "list.parquet", columns)
    assert listed(manifest) == [ObjectRef("a.jpg", 7, None), ObjectRef("b.jpg", -1, '"x"')]


def test_a_parquet_manifest_of_many_rows_is_streamed(tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(40_000)]
    manifest = write_parquet(tmp_path / "list.parquet", {"key": pa.array(names).dictionary_encode()})
    _, batches = list_source(manifest, None, StoreOptions())
    assert [batch.num_rows for batch in batches] == [16_384, 16_384, 7_232]
    assert keys(manifest) == names


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"image": ["a.jpg"]}, "none of the columns uri, url, key, path"),
        ({"key": ["a.jpg", None]}, "rows without a key"),
        ({"key": ["a.jpg"], "size": ["large"]}, "cannot be read"),
        ({"key": ["ftp://host/a.jpg"]}, "cannot read ftp://"),
    ],
)
def test_a_parquet_manifest_that_cannot_be_used_is_told(
    columns: dict[str, object], problem: str, tmp_path: Path
) -> None:
    manifest = write_parquet(tmp_path / "list.parquet", columns)
    with pytest.raises(SourceError, match=problem) as caught:
        listed(manifest)
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("list.txt", b"\xff\xfe\n", "is not UTF-8"),
        ("list.txt", b"a.jpg\nftp://host/b.jpg\n", "cannot read ftp://"),
        ("list.txt", b"s3:///b.jpg\n", "names no bucket"),
        ("list.parquet", b"a.jpg\n", "cannot be read"),
        ("list.parquet", b"", "cannot be read"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_told(name: str, content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=problem) as caught:
        listed(str(tmp_path / name))
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint


def test_an_unreadable_manifest_is_told(
    shared_path: Path, unprivileged: Callable[[], AbstractContextManager[None]]
) -> None:
    (shared_path / "list.txt").write_text("a.jpg\n")
    (shared_path / "list.txt").chmod(0o000)
    with unprivileged(), pytest.raises(StoreError, match="is denied"):
        listed(f"{shared_path}/list.txt")


def parquet_of(keys: Sequence[str]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"uri": pa.array(keys, pa.string())}), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        (b"a b.jpg\n\ns3://b/c\n", ["a b.jpg", "s3://b/c"]),
        (b"PAR1.jpg\n", ["PAR1.jpg"]),
        (b"", []),
        (parquet_of(["a.jpg", "b.jpg"]), ["a.jpg", "b.jpg"]),
        (parquet_of([]), []),
    ],
)
def test_a_manifest_on_standard_input(content: bytes, keys: list[str], tmp_path: Path) -> None:
    program = (
        "from infermill.sources import list_source, rereadable\n"
        "from infermill.types import StoreOptions\n"
        "with rereadable('-') as uri:\n"
        "    source, batches = list_source(uri, None, StoreOptions())\n"
        "    print(source.root, [key for batch in batches for key in batch['key'].to_pylist()])\n"
    )
    told = subprocess.run([sys.executable, "-c", program], input=content, capture_output=True, cwd=tmp_path, check=True)
    assert told.stdout.decode() == f"{tmp_path} {keys}\n"


def test_a_closed_standard_input_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="is closed") as caught, rereadable("-"):
        pass
    assert caught.value.hint


def test_the_suffixes_of_images_are_lower_case() -> None:
    assert set("".join(IMAGE_SUFFIXES)) <= set(string.ascii_lowercase + ".")
