"""Files and objects that are read piece by piece."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from obstore.exceptions import PreconditionError

from infermill.reader import open_file, open_reader
from infermill.stores import locate, open_store
from tests.fault_proxy import FaultProxy, Reply
from tests.servers import Bucket


def test_a_reader_seeks_in_an_object(bucket: Bucket) -> None:
    content = bytes(range(256)) * 20_000
    bucket.put("big", content)
    place = locate(f"{bucket.uri}/big")
    with open_reader(place, open_store(place, bucket.options), bucket.options) as reader:
        assert reader.seek(-10, 2) == len(content) - 10
        assert reader.read() == content[-10:]
        assert reader.seek(3) == 3
        assert reader.read(2_000_000) == content[3:2_000_003]
        assert reader.tell() == 2_000_003


def test_an_object_that_is_replaced_while_it_is_read_is_not_mixed(bucket: Bucket) -> None:
    bucket.put("big", b"1" * 5_000_000)
    place = locate(f"{bucket.uri}/big")
    with open_reader(place, open_store(place, bucket.options), bucket.options) as reader:
        assert reader.read(1) == b"1"
        bucket.put("big", b"2" * 5_000_000)
        reader.seek(4_000_000)
        with pytest.raises(PreconditionError):
            reader.read(1)


def test_a_piece_is_asked_for_again(bucket: Bucket, fault_proxy: FaultProxy) -> None:
    bucket.put("big", b"1" * 3_000_000)
    options = replace(bucket.options, endpoint_url=fault_proxy.url)
    # object_store takes this answer for a final one.
    rule = fault_proxy.inject(Reply(400, "RequestTimeout"), "GET", "big", first=2, times=2)
    place = locate(f"{bucket.uri}/big")
    with open_reader(place, open_store(place, options), options) as reader:
        assert reader.read() == b"1" * 3_000_000
    assert rule.hits == 2


def test_a_file_is_found_by_the_key_that_its_odd_name_has(tmp_path: Path) -> None:
    Path(os.fsdecode(bytes(tmp_path) + b"/\xff.rec")).write_bytes(b"content")
    key = r"\xff.rec"
    with open_file(f"{tmp_path}/{key}", key) as file:
        assert file.read() == b"content"
