"""The budget of failures: how it is written, and when a job stops for it."""

from pathlib import Path

import pytest

import infermill
from infermill import BudgetError, Options, UsageError
from infermill.budget import Budget
from tests.networks import tiny_classifier
from tests.test_job import write_photos


@pytest.mark.parametrize(
    ("text", "planned", "allowed"), [("10", 2000, 10), ("1%", 2000, 20), ("0", 5, 0), ("0.5%", 1000, 5), (None, 7, 7)]
)
def test_a_budget_is_a_number_or_a_share(text: str | None, planned: int, allowed: int) -> None:
    budget = Budget.parse(text)
    assert budget.allows(allowed, planned)
    assert text is None or not budget.allows(allowed + 1, planned)


@pytest.mark.parametrize("text", ["many", "-1", "nan", "1%%", "inf", "", "101%"])
def test_another_budget_is_bad_usage(text: str) -> None:
    with pytest.raises(UsageError, match="--max-failures"):
        Budget.parse(text)


def test_a_job_stops_only_when_its_budget_cannot_be_kept() -> None:
    budget = Budget.parse("10%")
    budget.check(failed=99, settled=99, planned=500)  # too few to tell
    budget.check(failed=50, settled=400, planned=500)  # may still end well
    budget.check(failed=51, settled=500, planned=500)  # is done anyway
    with pytest.raises(BudgetError, match="51 of the first 100 objects fail, and 500 may have no more"):
        budget.check(failed=51, settled=100, planned=500)


def test_what_is_done_stays_and_a_larger_budget_resumes(tmp_path: Path) -> None:
    tiny_classifier(tmp_path / "tiny.onnx", classes=10, size=32)
    write_photos(tmp_path / "photos", 300)
    for number in range(0, 300, 3):
        (tmp_path / f"photos/photo-{number:03d}.png").write_bytes(b"<html>")
    few = Options(partition_objects=20, max_failures="5%")
    with pytest.raises(BudgetError, match="--max-failures 5%") as caught:
        infermill.run(tmp_path / "photos", tmp_path / "tiny.onnx", tmp_path / "out", few)
    status = infermill.status(tmp_path / "out")
    assert 100 <= status.done < 300
    so_far = caught.value.summary
    assert so_far is not None
    assert 100 <= so_far.ok + so_far.failed < so_far.planned == 300
    assert so_far.failures_by_code == {"unsupported": so_far.failed}
    assert not status.success
    many = Options(partition_objects=20, max_failures="50%")
    summary = infermill.run(tmp_path / "photos", tmp_path / "tiny.onnx", tmp_path / "out", many)
    assert (summary.ok, summary.failed) == (200, 100)
    assert infermill.verify(tmp_path / "out").problem_count == 0
