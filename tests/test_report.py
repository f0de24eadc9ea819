"""What commands say at their end."""

from dataclasses import replace
from typing import Any

import pytest

from infermill.estimation import Estimate
from infermill.report import estimate_text

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
