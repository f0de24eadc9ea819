"""The reader of tar shards: the labels beside the files, and tars that are damaged or hostile."""

import io
import tarfile
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infermill.sources.tar import Damage, File, files
from tests.shards import tar_of

SUFFIXES = (".jpg", ".png")


def read(content: bytes, suffixes: tuple[str, ...] = SUFFIXES) -> list[File | Damage]:
    return list(files(io.BytesIO(content), len(content), suffixes))


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = size, kind, link
    return member.tobuf(tarfile.GNU_FORMAT)


def test_files_have_the_class_that_lies_beside_them() -> None:
    content = tar_of(
        {
            "a/1.cls": b"3\n",
            "a/1.jpg": b"one",
            "a/2.left.jpg": b"two",
            "a/2.RIGHT.PNG": b"three",
            "a/2.cls": "Hund é".encode(),
            "a/2.json": b"{}",
            "b/2.jpg": b"four",
            "./.hidden.jpg": b"",
            "a/.git/x.jpg": b"",
        }
    )
    found = [one for one in read(content) if isinstance(one, File)]
    assert [(one.name, one.label) for one in found] == [
        ("a/1.jpg", "3"),
        ("a/2.left.jpg", "Hund é"),
        ("a/2.RIGHT.PNG", "Hund é"),
        ("b/2.jpg", None),
    ]
    assert [content[one.offset : one.offset + one.size] for one in found] == [b"one", b"two", b"three", b"four"]


def test_hidden_files_do_not_come_between_a_file_and_its_class() -> None:
    names = ("._1.cls", "1.cls", "._1.jpg", "1.jpg", "d/._2.jpg", "d/2.jpg", "d/._2.cls", "d/2.cls")
    found = read(tar_of({name: name.encode() for name in names}))
    assert [(one.name, one.label) for one in found if isinstance(one, File)] == [
        ("1.jpg", "1.cls"),
        ("d/2.jpg", "d/2.cls"),
    ]


def test_a_name_that_is_there_twice_has_the_class_beside_it_each_time() -> None:
    end = bytes(1024)
    once, again = (tar_of({"1.jpg": b"", "1.cls": label}).rstrip(b"\0") for label in (b"old", b"new"))
    content = b"".join(one + bytes(-len(one) % 512) for one in (once, again)) + end
    assert [one.label for one in read(content) if isinstance(one, File)] == ["old", "new"]


@pytest.mark.parametrize("format_", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_odd_names_are_just_keys(format_: int) -> None:
    names = ["../../etc/passwd.jpg", "/absolute.jpg", "ü/" + "x" * 900 + ".jpg", "a\nb.jpg", "back\\slash.jpg"]
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=format_) as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    assert [one.name for one in read(sink.getvalue()) if isinstance(one, File)] == names


def test_names_that_are_not_utf8_are_escaped() -> None:
    member = tarfile.TarInfo(b"\xff\\x.jpg".decode("utf-8", "surrogateescape"))
    (found,) = read(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    assert found == File(r"\xff\x5cx.jpg", 512, 0, None)


def test_links_and_sparse_files_hold_no_bytes_and_devices_are_none() -> None:
    content = (
        header("link.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd")
        + header("hard.jpg", kind=tarfile.LNKTYPE, link="a.jpg")
        + header("device.jpg", kind=tarfile.CHRTYPE)
        + header("pipe.jpg", kind=tarfile.FIFOTYPE)
        + header("folder.jpg", kind=tarfile.DIRTYPE)
        + bytes(1024)
    )
    assert [(one.name, one.size) for one in read(content) if isinstance(one, File)] == [
        ("link.jpg", 0),
        ("hard.jpg", 0),
    ]


def test_a_tar_that_ends_early_says_so() -> None:
    content = tar_of({"a.jpg": b"1" * 700, "b.jpg": b"2" * 700, "c.jpg": b"3"})
    cut_in_b = read(content[: 512 + 1024 + 512 + 100])
    assert cut_in_b == [File("a.jpg", 512, 700, None), File("b.jpg", 2048, 100, None), Damage(2148)]
    cut_in_header = read(content[: 512 + 1024 + 60])
    assert cut_in_header == [File("a.jpg", 512, 700, None), Damage(1536)]
    assert read(content[: 512 + 1024]) == [File("a.jpg", 512, 700, None)]  # without the zeros at the end
    assert read(b"") == [Damage(0)]
    assert read(b"no tar at all" * 100) == [Damage(0)]


def test_a_damaged_header_ends_what_can_be_known() -> None:
    content = bytearray(tar_of({"a.jpg": b"1", "b.jpg": b"2", "c.jpg": b"3"}))
    content[1024] ^= 0xFF
    assert read(bytes(content)) == [File("a.jpg", 512, 1, None), Damage(1024)]


@pytest.mark.parametrize("size", [8 << 30, 1 << 80, -(1 << 40)])
def test_sizes_that_cannot_be_lead_nowhere(size: int) -> None:
    member = tarfile.TarInfo("a.jpg")
    buffer = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    buffer[124:136] = (b"\x80" if size > 0 else b"\xff") + (size % (1 << 88)).to_bytes(11, "big")
    buffer[148:156] = b" " * 8
    buffer[148:156] = b"%06o\0 " % sum(buffer)
    found = read(bytes(buffer) + bytes(2048))
    assert isinstance(found[-1], Damage)
    assert all(isinstance(one, Damage) or one.size <= 2048 for one in found)


def test_headers_that_would_fill_the_memory_are_damage() -> None:
    bomb = header("pax", 1 << 33, tarfile.XHDTYPE) + bytes(1 << 20)
    assert read(bomb) == [Damage(0)]
    chain = b"".join(header("pax", 0, tarfile.XHDTYPE) for _ in range(5_000)) + header("a.jpg") + bytes(1024)
    assert isinstance(read(chain)[-1], Damage)


def test_headers_that_would_take_minutes_to_parse_are_damage() -> None:
    bomb = header("pax", 60_000, tarfile.XHDTYPE) + b"1" * 60_000 + bytes(-60_000 % 512) + header("a.jpg")
    started = time.monotonic()
    assert read(bomb * 20) == [Damage(0)]
    assert time.monotonic() - started < 2


def test_many_files_of_one_key_are_not_held_for_their_label() -> None:
    found = read(tar_of({f"a.{number}.jpg": b"" for number in range(1_500)} | {"a.cls": b"7"}))
    assert [one.label for one in found if isinstance(one, File)] == [None] * 1_024 + ["7"] * 476


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20).filter(
            lambda name: not name.endswith("/")
        ),
        st.binary(max_size=1_100),
        max_size=6,
    )
)
def test_what_was_written_is_read(contents: dict[str, bytes]) -> None:
    named = {f"{number}-{name}": content for number, (name, content) in enumerate(contents.items())}
    content = tar_of(named)
    found = [one for one in read(content, ("",)) if isinstance(one, File)]
    expected = {name: one for name, one in named.items() if "/." not in name and not name.lower().endswith(".cls")}
    assert {one.name: content[one.offset : one.offset + one.size] for one in found if one.name in expected} == expected


@given(st.lists(st.tuples(st.integers(0, 3_000), st.integers(0, 255)), max_size=8), st.integers(0, 4_000))
def test_bit_flips_and_cuts_lead_to_files_and_damage(flips: list[tuple[int, int]], length: int) -> None:
    content = bytearray(tar_of({"a.jpg": b"1" * 600, "a.cls": b"5", "b.jpg": b"2" * 600}))
    for place, value in flips:
        content[place % len(content)] = value
    cut = bytes(content[:length])
    for one in read(cut):
        assert isinstance(one, Damage) or one.offset + one.size <= len(cut) or one.size == 0
