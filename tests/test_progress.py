"""What a person sees while a job runs."""

import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infermill.meter import Meter
from infermill.progress import duration, show_progress
from tests.networks import tiny_classifier
from tests.test_job import write_photos


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (42, "42 s"), (187, "3:07"), (18_187, "5:03:07"), (59.6, "1:00")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_elsewhere_than_in_a_terminal_there_are_log_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infermill.progress.LOG_SECONDS", 0.05)
    meter = Meter()
    with show_progress(meter):
        meter.listed = 1234
        time.sleep(0.2)
        meter.todo, meter.model_loads = 100, 1
        meter.stage_seconds["decode"] += 3
        meter.stage_seconds["predict"] += 2
        for number in range(25):
            meter.fetched(1_000_000)
            meter.settled(1, "truncated" if number == 3 else None)
        time.sleep(0.3)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "listing: 1,234 objects\n" in captured.err
    assert re.search(
        r"^ +\d s  25/100 · 25 MB · [\d,.]+/s · ETA \S+ s · 1 failed · decode-bound$", captured.err, re.MULTILINE
    )
    assert "\x1b" not in captured.err


@pytest.mark.parametrize("no_color", [True, False])
def test_a_terminal_has_a_bar_and_honours_no_color(tmp_path: Path, no_color: bool) -> None:
    tiny_classifier(tmp_path / "tiny.onnx", classes=10, size=32)
    write_photos(tmp_path / "photos", 30)
    keys = "\n".join(f"photos/photo-{i % 30:03d}.png" for i in range(6000))
    (tmp_path / "keys.txt").write_text(keys)
    command = [str(Path(sys.executable).with_name("infermill")), "run", "keys.txt", "-m", "tiny.onnx", "-o", "out"]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"}
    environment.pop("NO_COLOR", None)
    if no_color:
        environment["NO_COLOR"] = "1"
    screen, terminal = pty.openpty()
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=terminal, env=environment)
    os.close(terminal)
    shown = b""
    while True:
        try:
            shown += os.read(screen, 65536)
        except OSError:  # the other end is closed
            break
    os.close(screen)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    text = shown.decode()
    assert re.search(r"[\d,]+/6,000 · \d+ MB · [\d.,]+/s · ETA ", text)
    assert "━" in text
    assert bool(re.search(r"\x1b\[[\d;]*3[18]", text)) != no_color
    assert out.decode().splitlines()[-1] == str(tmp_path / "out")
