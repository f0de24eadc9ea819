"""What is kept of a probe, and who may probe."""

import datetime
import json
import multiprocessing
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import infermill.choices
from infermill.choices import KEPT_DAYS, MAX_BYTES, MAX_TRIES, Choice, Choices
from infermill.errors import InfermillError

TODAY = datetime.date.today().isoformat()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "infermill" / "tuning"


def choices(**other: Any) -> Choices:
    case: dict[str, Any] = {"digest": "sha256:1", "runtime": "openvino", "threads": 2, "workers": 1}
    return Choices(**case | other)


def test_a_choice_is_kept_for_its_case_alone(cache: Path) -> None:
    assert choices().read() is None
    choices().write(2, 32, "1.20 x the default")
    assert choices().read() == Choice(2, 32, "1.20 x the default", TODAY)
    for other in ({"digest": "sha256:2"}, {"runtime": "onnxruntime"}, {"threads": 1}, {"workers": 2}):
        assert choices(**other).read() is None, other
    assert [path.suffix for path in cache.iterdir()] == [".json"]


def test_another_number_of_cores_is_another_case(monkeypatch: pytest.MonkeyPatch) -> None:
    choices().write(2, 32, "")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(96)))
    assert choices().read() is None


def changed(**fields: Any) -> bytes:
    return json.dumps(json.loads(choices().path.read_bytes()) | fields).encode()


@pytest.mark.parametrize(
    "damage",
    [
        lambda: b"",
        lambda: b"{",
        lambda: b"[1]",
        lambda: b"\xff\xfe",
        lambda: b"[" * MAX_BYTES,
        lambda: b" " * MAX_BYTES + choices().path.read_bytes(),
        lambda: changed(streams=0),
        lambda: changed(streams=True),
        lambda: changed(streams=10**9),
        lambda: changed(batch_size="8"),
        lambda: changed(batch_size=10**9),
        lambda: changed(why=None),
        lambda: changed(date="yesterday"),
        lambda: changed(date=None),
        lambda: changed(key={}),
        lambda: changed(format=2),
    ],
)
def test_a_damaged_choice_is_none(damage: Any) -> None:
    choices().write(2, 32, "")
    choices().path.write_bytes(damage())
    assert choices().read() is None
    assert choices().begin()
    choices().write(1, 4, "again")
    assert choices().read() == Choice(1, 4, "again", TODAY)


@pytest.mark.parametrize(("days", "is_kept"), [(KEPT_DAYS, True), (KEPT_DAYS + 1, False), (-KEPT_DAYS - 1, False)])
def test_a_choice_is_kept_for_so_long(days: int, is_kept: bool) -> None:
    choices().write(2, 32, "")
    choices().path.write_bytes(changed(date=(datetime.date.today() - datetime.timedelta(days)).isoformat()))
    assert (choices().read() is not None) == is_kept


def test_probes_that_do_not_end_are_not_begun_for_ever() -> None:
    for _ in range(MAX_TRIES):
        assert choices().begin()
        assert choices().read() is None
    assert not choices().begin()
    choices().write(2, 8, "the default")
    assert choices().read() is not None


def hold(seconds: float, ready: Any) -> None:
    with choices().alone(lambda: None):
        ready.set()
        time.sleep(seconds)
        choices().write(2, 64, "by the other")


def test_others_wait_and_have_something_to_do() -> None:
    context = multiprocessing.get_context("spawn")
    ready, waited = context.Event(), threading.Event()
    other = context.Process(target=hold, args=(0.5, ready))
    other.start()
    assert ready.wait(30)
    with choices(digest="sha256:2").alone(waited.set):
        assert choices().read() == Choice(2, 64, "by the other", TODAY)
    assert waited.is_set()
    other.join()


def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infermill.choices, "ALONE_SECONDS", 0.2)
    with (
        choices().alone(lambda: None),
        pytest.raises(InfermillError, match="does not end"),
        choices(digest="sha256:2").alone(lambda: None),
    ):
        pass


def test_a_folder_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/x")
    assert choices().read() is None
    for write in (choices().begin, lambda: choices().write(1, 1, ""), lambda: choices().alone(print).__enter__()):
        with pytest.raises(InfermillError, match="cannot be written"):
            write()
