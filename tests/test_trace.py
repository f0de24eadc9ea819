"""Traces that Perfetto opens."""

import json
import threading
import time
from pathlib import Path

import pytest

import infermill
from infermill import trace
from infermill.engines import local
from infermill.report import summary_text
from infermill.trace import Trace
from tests.networks import tiny_classifier
from tests.test_job import write_photos


def test_a_job_leaves_a_trace_of_each_worker(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 12)
    tiny_classifier(tmp_path / "tiny.onnx", classes=10, size=32)
    options = infermill.Options(profile=True)
    out = tmp_path / "out"
    card = infermill.CardOptions(exact=(32, 32))
    summary = infermill.run(tmp_path / "photos", tmp_path / "tiny.onnx", out, options, card)
    assert summary.profile is not None
    (file,) = Path(summary.profile).iterdir()
    content = json.loads(file.read_bytes())
    events = [event for event in content["traceEvents"] if event["ph"] == "X"]
    for stage in ("fetch", "decode", "predict"):
        assert sum(event["args"]["objects"] for event in events if event["name"] == stage) == 12
    assert {"write", "predict"} <= {event["name"] for event in events}
    assert all(abs(event["ts"] / 1e6 - time.time()) < 600 and event["dur"] >= 0 for event in events)
    named = {event["tid"] for event in content["traceEvents"] if event["name"] == "thread_name"}
    assert {event["tid"] for event in events} <= named
    assert not infermill.verify(out).problems
    again = infermill.run(tmp_path / "photos", tmp_path / "tiny.onnx", out, options, card)
    assert again.profile is None  # nothing was done


def test_a_job_whose_worker_has_the_network_from_before_tells_as_much(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 4)
    tiny_classifier(tmp_path / "tiny.onnx", classes=10, size=32)
    options, card = infermill.Options(profile=True), infermill.CardOptions(exact=(32, 32))
    with local.start(options) as engine:
        for name in ("first", "second"):
            summary = infermill.run(
                tmp_path / "photos", tmp_path / "tiny.onnx", tmp_path / name, options, card, engine=engine
            )
    assert (summary.workers, summary.model_loads) == (1, 0)
    assert summary.profile is not None
    assert len(list(Path(summary.profile).iterdir())) == 1
    assert "thread-seconds: " in summary_text(summary)


def test_threads_have_their_names_and_what_is_too_much_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "MAX_EVENTS", 2)
    made = Trace()
    for _ in range(3):
        thread = threading.Thread(target=made.add, args=("decode", 1.0, 1.5, 7), name="compute-3")
        thread.start()
        thread.join()
    content = json.loads(made.as_json())
    assert content["events_left_out"] == 1
    events = content["traceEvents"]
    assert next(event["args"] for event in events if event["name"] == "thread_name") == {"name": "compute-3"}
    assert [event["dur"] for event in events if event["ph"] == "X"] == [500_000.0] * 2
