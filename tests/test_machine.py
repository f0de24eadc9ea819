"""A job's life as a state machine: files come, change and go, commands run and crash, and the rows must follow.

Which rows are right is told by a model: a key's row is either a prediction of the content that the file had when it was
read, or the failure that the file's fate explains.
"""

import random
import shutil
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import infermill
from infermill import Options
from infermill.stores import etag_of
from tests.images import encoded, photo
from tests.networks import tiny_classifier
from tests.test_crashes import CARD, CRASH, run_and_crash

KEYS = [f"{number}.png" for number in range(7)]
OPTIONS = Options(partition_objects=2)


class Row(NamedTuple):
    """A prediction's best class or a failure's code, and the etag of what was read or planned."""

    outcome: int | str
    etag: str


@cache
def picture(seed: int) -> bytes:
    return encoded(photo(seed, (20, 20)), "PNG")


class Life(RuleBasedStateMachine):
    """`rows` are those that the output is known to hold; None while it holds no job."""

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="life-"))
        self.out = self.folder / "out"
        tiny_classifier(self.folder / "tiny.onnx", classes=10, size=32)
        (self.folder / "model.yaml").write_text(CARD)
        (self.folder / "photos").mkdir()
        (self.folder / "site").mkdir()
        (self.folder / "site/sitecustomize.py").write_text(CRASH)
        self.predict = infermill.load_model(self.folder / "model.yaml")
        self.seed = random.Random(0)
        self.rows: dict[str, Row] | None = None
        for key in KEYS[:3]:
            self.write(key)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    @rule(key=st.sampled_from(KEYS))
    def write(self, key: str) -> None:
        """Under a new inode, so that the etag is a new one."""
        path = self.folder / "photos" / key
        new = path.with_suffix(".new")
        new.write_bytes(picture(self.seed.randrange(20)))
        new.rename(path)

    @rule(key=st.sampled_from(KEYS[1:]))
    def remove(self, key: str) -> None:
        (self.folder / "photos" / key).unlink(missing_ok=True)

    @rule()
    def run(self) -> None:
        expected = self.rows or self.fresh()
        self.call("resume")
        self.settle(expected, {key: {row} for key, row in expected.items()})

    @rule()
    def append(self) -> None:
        before, fresh = self.rows or {}, self.fresh()
        self.call("append")
        self.settle(before | fresh, {key: {row} for key, row in (before | fresh).items()})

    @precondition(lambda self: self.rows is not None)
    @rule()
    def retry(self) -> None:
        assert self.rows is not None
        infermill.retry(self.out, options=OPTIONS)
        fresh = self.fresh()
        expected = {key: fresh.get(key, row) if row.outcome == "missing" else row for key, row in self.rows.items()}
        self.settle(expected, {key: {row} for key, row in expected.items()})

    @rule(
        role=st.sampled_from(["driver", "worker"]), step=st.integers(1, 25), flags=st.sampled_from([(), ("--append",)])
    )
    def crash(self, role: str, step: int, flags: tuple[str, ...]) -> None:
        before, fresh = self.rows or {}, self.fresh()
        run_and_crash(self.folder, self.out, role, step, 1, *flags)
        assert all(count == 1 for count in self.counted().values())
        self.call("resume")
        # What an append had got to is not known; that it is one of these is.
        either = {key: {row for row in (before.get(key), fresh.get(key)) if row} for key in before | fresh}
        self.settle(before or fresh, either)

    def call(self, existing: str) -> None:
        infermill.run(self.folder / "photos", self.folder / "model.yaml", self.out, OPTIONS, existing=existing)  # type: ignore[arg-type]

    def settle(self, at_least: dict[str, Row], allowed: dict[str, set[Row]]) -> None:
        """After a command that has ended well, the rows are those that were expected."""
        verification = infermill.verify(self.out)
        assert not verification.problems, verification.problems
        rows = {
            row["key"]: Row(row["error"]["code"] if row["error"] else row["top"][0]["index"], row["etag"])
            for row in infermill.read(self.out).to_pylist()
        }
        assert rows.keys() >= at_least.keys()
        assert rows.keys() <= allowed.keys()
        for key, row in rows.items():
            assert row in allowed[key], key
        self.rows = rows

    def fresh(self) -> dict[str, Row]:
        """What predicting each file gives now."""
        paths = sorted((self.folder / "photos").iterdir())
        predictions = self.predict([path.read_bytes() for path in paths])
        return {
            path.name: Row(one.top[0].index, etag_of(path.stat()))
            for path, one in zip(paths, predictions, strict=True)
            if one.top
        }

    def counted(self) -> Counter[str]:
        parts = list(self.out.glob("*.parquet")) if self.out.exists() else []
        return Counter(key for part in parts for key in pq.ParquetFile(part).read(["key"])["key"].to_pylist())

    @invariant()
    def no_key_twice(self) -> None:
        if hasattr(self, "out"):
            assert all(count == 1 for count in self.counted().values())


@pytest.mark.slow
def test_a_job_keeps_its_rows_right_through_all_that_happens() -> None:
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=8,
            stateful_step_count=10,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )
