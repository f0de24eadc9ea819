"""The reader of `.rec` and `.idx` files, against files that are made here, damaged ones, and those of MXNet."""

import io
import json
import struct
import subprocess
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from infermill.sources.recordio import MAGIC, DamagedError, Gap, Record, image_of, index_entries, record_at, records
from tests.shards import framed, packed

LABELS = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=5)
# Pieces of the magic number in the data are what frames are split at.
DATA = st.lists(st.one_of(st.just(MAGIC), st.binary(max_size=9)), max_size=6).map(b"".join)


def read(content: bytes) -> list[Record | Gap]:
    return list(records(io.BytesIO(content), len(content)))


@given(st.lists(st.tuples(DATA, LABELS), max_size=6))
@example([(MAGIC * 3, [1.0]), (b"", [0.0]), (bytes(4) + MAGIC, [7.0, 8.0])])
@example([(b"x", [struct.unpack("<f", MAGIC)[0]] * 2)])  # labels that look like the magic number
def test_what_was_written_is_read(inputs: list[tuple[bytes, list[float]]]) -> None:
    frames = [framed(packed(content, labels)) for content, labels in inputs]
    found = read(b"".join(frames))
    assert len(found) == len(inputs)
    for record, frame, (content, labels) in zip(found, frames, inputs, strict=True):
        assert isinstance(record, Record)
        assert record.label is not None
        assert record.label.tolist() == labels
        whole = b"".join(frames)[record.offset : record.offset + record.size]
        assert frame.startswith(whole)
        assert bytes(image_of(whole)) == content


@given(st.binary(max_size=400))
@example(MAGIC + struct.pack("<I", (1 << 29) - 1))
@example(MAGIC + struct.pack("<I", 1 << 29) + MAGIC + struct.pack("<I", 3 << 29))
@example(MAGIC + struct.pack("<I", 24) + struct.pack("<IfQQ", 2**32 - 1, 0, 0, 0))
def test_any_bytes_are_accounted_for_and_none_are_made_up(content: bytes) -> None:
    found = read(content)
    assert all(one.offset + one.size <= len(content) for one in found)
    assert not content or found[0].offset == 0
    for before, after in pairwise(found):
        assert before.offset + before.size <= after.offset <= before.offset + before.size + 3


@given(st.binary(max_size=60), st.booleans())
def test_any_bytes_are_an_image_or_damage(content: bytes, begins_well: bool) -> None:
    data = (MAGIC if begins_well else b"") + content
    with suppress(DamagedError):
        assert len(memoryview(image_of(data))) <= len(data)


def test_damage_costs_the_records_it_lies_in() -> None:
    frames = [framed(packed(bytes([number]) * 101, [number])) for number in range(5)]
    content = bytearray(b"".join(frames))
    content[len(frames[0]) + 1] ^= 0xFF
    found = read(bytes(content))
    assert [type(one) for one in found] == [Record, Gap, Record, Record, Record]
    assert found[1] == Gap(len(frames[0]), len(frames[1]))
    cut = read(b"".join(frames)[:-30])
    assert [type(one) for one in cut] == [Record] * 4 + [Gap]


def test_a_file_that_was_made_to_be_read_for_ever_is_given_up() -> None:
    # Each frame claims to begin a record, whose second frame is the first of a long chain that never ends.
    chain = (MAGIC + struct.pack("<I", 2 << 29)) * 2_000
    heads = 4_000
    begins = b"".join(MAGIC + struct.pack("<I", 1 << 29 | 8 * (heads - 1 - number)) for number in range(heads))
    found = read(begins + chain)
    assert len(found) == 1_000
    assert found[-1].offset + found[-1].size == len(begins + chain)


def test_a_frame_that_continues_nothing_begins_no_record() -> None:
    middle = MAGIC + struct.pack("<I", 2 << 29 | 4) + b"abcd"
    with pytest.raises(DamagedError, match="no frame begins there"):
        record_at(io.BytesIO(middle), 0, len(middle))
    with pytest.raises(DamagedError, match="no record begins there"):
        image_of(middle)


def test_a_record_without_the_header_of_an_image_has_no_label_and_no_image() -> None:
    content = framed(b"record_0")
    (record,) = read(content)
    assert isinstance(record, Record)
    assert record.label is None
    with pytest.raises(DamagedError, match="holds no image"):
        image_of(content)


def test_an_index_is_lines_of_key_and_offset() -> None:
    lines = b"0\t0\r\n17\t4096\n\nname with\ttab\t8\n"
    assert list(index_entries(io.BytesIO(lines))) == [("0", 0), ("17", 4096), ("name with\ttab", 8)]


@pytest.mark.parametrize("line", [b"nothing\n", b"1\t-5\n", b"1\t5", b"1\t" + b"9" * 19 + b"\n", b"x" * 5000])
def test_an_index_of_other_lines_is_damaged(line: bytes) -> None:
    with pytest.raises(DamagedError, match="line 2"):
        list(index_entries(io.BytesIO(b"0\t0\n" + line)))


_WRITE = """
import json, sys
import numpy as np
import mxnet as mx
folder = sys.argv[1]
magic = np.array([0xced7230a], np.uint32).tobytes()
contents = [b"", b"abc", magic, b"1234" + magic * 2 + b"z", bytes(range(256)) * 40]
labels = [1.5, [1, 2, 3], -0.25, np.arange(7), [4.5, 5.5]]
writer = mx.recordio.MXIndexedRecordIO(folder + "/a.idx", folder + "/a.rec", "w")
for number, (content, label) in enumerate(zip(contents, labels)):
    writer.write_idx(10 * number, mx.recordio.pack(mx.recordio.IRHeader(0, label, number, 0), content))
writer.close()
reader = mx.recordio.MXIndexedRecordIO(folder + "/a.idx", folder + "/a.rec", "r")
rows = []
for number in range(len(contents)):
    header, content = mx.recordio.unpack(reader.read_idx(10 * number))
    rows.append([np.ravel(header.label).tolist(), content.hex()])
print(json.dumps(rows))
"""


def test_what_mxnet_writes_is_read_as_mxnet_reads_it(tmp_path: Path, mxnet_python: Path) -> None:
    command = [str(mxnet_python), "-c", _WRITE, str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    expected = json.loads(told.splitlines()[-1])
    content = (tmp_path / "a.rec").read_bytes()
    with (tmp_path / "a.idx").open("rb") as index:
        entries = list(index_entries(index))
    assert [key for key, _ in entries] == ["0", "10", "20", "30", "40"]
    found = [record_at(io.BytesIO(content), offset, len(content)) for _, offset in entries]
    assert [one.offset for one in found] == [one.offset for one in read(content)]
    for record, (label, image) in zip(found, expected, strict=True):
        assert np.array_equal(record.label, np.array(label, np.float32))  # type: ignore[arg-type]
        assert bytes(image_of(content[record.offset : record.offset + record.size])).hex() == image
    assert content == b"".join(
        framed(packed(bytes.fromhex(image), label, number)) for number, (label, image) in enumerate(expected)
    )
