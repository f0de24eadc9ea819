"""What commands say at their end."""

from dataclasses import replace
from typing import Any

import pytest

from infermill.estimation import Estimate
from infermill.report import estimate_text, summary_text
from infermill.types import Summary

ESTIMATE = Estimate(
    objects=20_000,
    size_bytes=1_500_000_000,
    partitions=40,
    probed=64,
    objects_per_second=50.04,
    seconds=400.2,
    expected_failures=625,
    probe_failures={"empty": 2},
    list_seconds=1.5,
)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, {}),
        ({"size_bytes": 0}, {"input": "unknown"}),
        ({"expected_failures": 0, "probe_failures": {}}, {"failures": "none expected"}),
    ],
)
def test_an_estimate_is_a_line_for_each_figure(changes: dict[str, Any], told: dict[str, str]) -> None:
    lines = {
        "objects": "20,000",
        "input": "1,500.0 MB",
        "partitions": "40",
        "pace": "50.0 images/s (probed with 64 objects, start-up not counted)",
        "ETA": "6:40",
        "failures": "about 625 (2 empty in the probe)",
    }
    shown = [line.split(maxsplit=1) for line in estimate_text(replace(ESTIMATE, **changes)).splitlines()]
    assert shown == [list(line) for line in (lines | told).items()]


def test_a_summary_says_where_the_time_went() -> None:
    summary = Summary(
        planned=12,
        ok=12,
        failed=0,
        failures_by_code={},
        example_keys={},
        seconds=3.0,
        objects_per_second=4.0,
        stage_seconds={"list": 0.0, "fetch": 0.1, "decode": 0.4, "predict": 1.5, "write": 0.0, "idle": 2.3},
        idle_seconds={"fetch": 0.7, "compute": 2.3, "network": 0.25},
        queue_depths={"fetched": 2.7, "decoded": 4.9},
        verdict="predict-bound: …",
        workers=1,
        model_loads=0,
        halved_batches=0,
        runtime="openvino",
        precision="fp32",
        choice={"streams": 2, "batch": 8, "threads": 2, "reason": "as told (--batch)"},
        digest="sha256:0",
        output="out",
    )
    text = summary_text(summary)
    assert "thread-seconds: list 0.0 · fetch 0.1 · decode 0.4 · predict 1.5 · write 0.0 · idle 2.3\n" in text
    assert "waited: fetch threads 0.7 · for the network 0.2; queued objects: 2.7 fetched · 4.9 decoded\n" in text
    assert "\npredict-bound: …\nbatches of 8, 2 at once, 2 threads (as told (--batch))\n" in text
    assert "thread-seconds" not in summary_text(replace(summary, workers=0))
