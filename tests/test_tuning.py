"""Which streams and batches are chosen: by a model of what they cost, and with a real network."""

import itertools
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import infermill
from infermill import tuning
from infermill.choices import MAX_TRIES, Choices
from infermill.errors import ModelError
from infermill.jobspec import Job
from infermill.meter import Meter
from infermill.models.card_file import parse_card
from infermill.models.model import Model
from infermill.models.opening import open_model
from infermill.output import Output
from infermill.record import read_record
from infermill.runtimes import Predictor
from infermill.tuning import (
    AS_TOLD,
    FIXED,
    NO_JOB,
    NO_MEMORY,
    PROBE_SECONDS,
    SHORT,
    UNFINISHED,
    Rate,
    Setting,
    Work,
    candidates,
    choose,
    explore,
    load_tuned,
)
from infermill.types import Assignment, Options, RuntimeName
from infermill.worker import run_partitions
from tests.networks import pictures, tiny_classifier, tiny_detector, tiny_tabular

LONG = Work(10**9)
DEFAULT = Setting(2, 8)
runtimes = pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])


# --- choosing, by a model of what calls cost


class Machine:
    """Its clock goes on by what calls take: so much a call, and so much a row; and its speed drifts, and is noisy."""

    def __init__(self, call_seconds: float, row_seconds: float, noise: float = 0.0, drift: float = 0.0) -> None:
        self._call_seconds, self._row_seconds = call_seconds, row_seconds
        self._noise, self._drift = noise, drift
        self._random = random.Random(0)
        self.now = 0.0
        self.refused: set[Setting] = set()
        self.measured: list[Setting] = []

    def rate(self, setting: Setting, seconds: float) -> float:
        self.measured.append(setting)
        if setting in self.refused:
            raise MemoryError("too long")
        call = (self._call_seconds + setting.batch_size * self._row_seconds) * setting.streams / 2
        call *= self._random.uniform(1, 1 + self._noise) * (1 + self._drift * self.now)
        calls = max(round(seconds / call), 1)
        self.now += calls * call
        return setting.streams * setting.batch_size / call

    def choice(self, most_rows: int = 128, load_seconds: float = 0.1) -> Setting:
        tried = candidates(DEFAULT, 2, self._call_seconds / 8 + self._row_seconds, load_seconds, most_rows)
        if not tried:
            return DEFAULT
        self.now = 0.0
        return choose(explore(self.rate, DEFAULT, tried, lambda: self.now), DEFAULT)[0]


def test_where_calls_are_dear_batches_are_long() -> None:
    assert Machine(call_seconds=1e-3, row_seconds=1e-4).choice().batch_size >= 64


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1, 0.5])
def test_where_only_rows_cost_the_default_stays(noise: float) -> None:
    assert Machine(call_seconds=0, row_seconds=1e-3, noise=noise).choice() == DEFAULT


@pytest.mark.parametrize("drift", [0.5, 2.0])
def test_a_machine_that_slows_down_does_not_decide(drift: float) -> None:
    assert Machine(call_seconds=0, row_seconds=1e-3, drift=drift).choice() == DEFAULT
    assert Machine(call_seconds=1e-3, row_seconds=1e-4, drift=drift).choice().batch_size >= 32


@pytest.mark.parametrize("row_seconds", [1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 0.1, 1.0, 10.0])
def test_a_probe_ends_in_time(row_seconds: float) -> None:
    machine = Machine(call_seconds=2e-4, row_seconds=row_seconds, noise=0.2)
    machine.choice()
    assert machine.now <= 1.5 * PROBE_SECONDS


def test_a_large_network_is_not_tried() -> None:
    assert candidates(DEFAULT, 2, row_seconds=0.07, load_seconds=1.0, most_rows=111) == []


def test_settings_for_which_there_is_no_memory_are_left_out() -> None:
    machine = Machine(call_seconds=1e-3, row_seconds=1e-4)
    machine.refused = {Setting(2, 64), Setting(2, 128)}
    assert machine.choice() == Setting(2, 32)


def test_memory_that_others_take_meanwhile_ends_no_probe() -> None:
    machine = Machine(call_seconds=1e-3, row_seconds=1e-4)
    calm = machine.rate

    def rate(setting: Setting, seconds: float) -> float:
        if machine.now > 0.5:
            machine.refused = {Setting(2, 64), Setting(2, 128)}
        return calm(setting, seconds)

    machine.rate = rate  # type: ignore[method-assign]
    assert machine.choice() == Setting(2, 32)


def test_one_core_has_no_choice_of_streams() -> None:
    tried = candidates(Setting(1, 8), 1, row_seconds=1e-4, load_seconds=0.1, most_rows=128)
    assert {one.streams for one in tried} == {1}
    assert {one.batch_size for one in tried} == {4, 16, 32, 64, 128}


def test_many_cores_may_have_a_stream_each() -> None:
    tried = candidates(Setting(8, 8), 64, row_seconds=1e-4, load_seconds=0.1, most_rows=128)
    assert Setting(64, 8) in tried


def test_no_batch_is_longer_than_what_waits() -> None:
    for most_rows in (0, 5, 20):
        tried = candidates(DEFAULT, 2, row_seconds=1e-4, load_seconds=0.1, most_rows=most_rows)
        assert all(one.batch_size <= max(most_rows, 8) for one in tried)


def test_of_equals_the_smallest_batch_is_chosen_and_fewer_streams_must_be_much_better() -> None:
    rounds = [{DEFAULT: 100.0, Setting(2, 16): 119.0, Setting(2, 32): 120.0, Setting(1, 8): 105.0}] * 4
    assert choose(rounds, DEFAULT) == (Setting(2, 16), 1.19)
    assert choose([{DEFAULT: 100.0, Setting(1, 8): 109.0}] * 4, DEFAULT) == (DEFAULT, 1.0)
    assert choose([{DEFAULT: 100.0, Setting(1, 8): 111.0}] * 4, DEFAULT) == (Setting(1, 8), 1.11)


def test_too_few_rounds_and_mixed_ones_decide_nothing() -> None:
    better, worse = {DEFAULT: 100.0, Setting(2, 16): 200.0}, {DEFAULT: 100.0, Setting(2, 16): 50.0}
    assert choose([better] * 2, DEFAULT)[0] == DEFAULT
    assert choose([better, worse, better, better, worse], DEFAULT)[0] == DEFAULT
    assert choose([better, better, better, worse], DEFAULT)[0] == Setting(2, 16)


# --- with a real network


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tiny_model(folder: Path, **network: int) -> Model:
    path = tiny_classifier(folder / "tiny.onnx", **network)  # type: ignore[arg-type]
    fields = {"name": "tiny", "files": {"onnx": path.name}, "preprocess": {"resize": {"exact": [32, 32]}}}
    return Model(parse_card(fields, "test"), path, None, "sha256:7")


@runtimes
def test_a_long_job_probes_once_and_later_ones_know(tmp_path: Path, runtime: RuntimeName) -> None:
    model, options = tiny_model(tmp_path), Options(runtime=runtime)
    default, _ = load_tuned(model, options, 2, Work())
    assert (default.streams, default.batch_size, default.reason) == (2, 8, NO_JOB)
    short, _ = load_tuned(model, options, 2, Work(3000))
    assert (short.streams, short.batch_size, short.reason) == (2, 8, SHORT)
    probed, _ = load_tuned(model, options, 2, LONG)
    assert probed.reason.startswith("probed: ")
    assert ("the default" in probed.reason) == ((probed.streams, probed.batch_size) == (2, 8)) or " x " in probed.reason
    again, _ = load_tuned(model, options, 2, Work())
    assert (again.streams, again.batch_size) == (probed.streams, probed.batch_size)
    assert again.reason.startswith("cached probe of 20")
    (expected,), (found,) = default(pictures(100)), again(pictures(100))
    np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(expected, np.float32), atol=1e-5)
    other, _ = load_tuned(model, options, 1, Work())
    assert other.reason == NO_JOB


def test_what_is_told_is_not_probed(tmp_path: Path) -> None:
    told, _ = load_tuned(tiny_model(tmp_path), Options(batch=3), 2, LONG)
    assert (told.streams, told.batch_size, told.reason) == (2, 3, AS_TOLD)
    fixed, _ = load_tuned(tiny_model(tmp_path, batch=5), Options(batch=3), 2, LONG)
    assert (fixed.batch_size, fixed.reason) == (5, FIXED)
    assert fixed(pictures(7))[0].shape == (7, 10)


def test_a_fixed_batch_leaves_only_streams(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, batch=4)
    one, _ = load_tuned(model, Options(), 1, LONG)
    assert (one.batch_size, one.reason) == (4, FIXED)
    two, _ = load_tuned(model, Options(), 2, LONG)
    assert two.batch_size == 4


def test_networks_of_other_tasks_are_probed(tmp_path: Path) -> None:
    path = tiny_detector(tmp_path / "ssd.onnx", "mxnet-ssd")
    fields: dict[str, Any] = {"name": "ssd", "files": {"onnx": path.name}, "task": "detection"}
    fields |= {"preprocess": {"resize": {"exact": [64, 64]}}, "output": {"format": "mxnet-ssd"}}
    detector, _ = load_tuned(Model(parse_card(fields, "test"), path, None, "sha256:8"), Options(), 2, LONG)
    path = tiny_tabular(tmp_path / "rows.onnx")
    fields = {"name": "rows", "files": {"onnx": path.name}, "preprocess": None}
    tabular, _ = load_tuned(Model(parse_card(fields, "test"), path, None, "sha256:9"), Options(), 1, LONG)
    for predictor in (detector, tabular):
        assert predictor.reason.startswith("probed: ")


def test_the_machine_is_still_while_a_probe_runs(tmp_path: Path) -> None:
    steps: list[str] = []

    class Recorded(threading.Event):
        def set(self) -> None:
            steps.append("set")
            super().set()

        def clear(self) -> None:
            steps.append("clear")
            super().clear()

    load_tuned(tiny_model(tmp_path), Options(), 2, Work(10**9, still=Recorded()))
    assert steps == ["clear", "set"]


def test_a_worker_that_waits_for_the_probe_of_another_takes_its_choice(tmp_path: Path) -> None:
    model, found = tiny_model(tmp_path), []
    choices = Choices(model.digest, "openvino", 2, 1)
    waiting = threading.Thread(target=lambda: found.append(load_tuned(model, Options(), 2, LONG)[0]))
    with choices.alone(lambda: None):
        waiting.start()
        waiting.join(1.0)
        assert waiting.is_alive()
        choices.write(1, 24, "as the other has found")
    waiting.join()
    assert (found[0].streams, found[0].batch_size, found[0].reason) == (1, 24, "probed: as the other has found")


def test_after_probes_that_did_not_end_the_default_is_taken(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    for _ in range(MAX_TRIES):
        assert Choices(model.digest, "openvino", 2, 1).begin()
    predictor, _ = load_tuned(model, Options(), 2, LONG)
    assert (predictor.batch_size, predictor.reason) == (8, f"probed: {UNFINISHED}")


def test_without_a_cache_there_is_no_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/x")
    predictor, _ = load_tuned(tiny_model(tmp_path), Options(), 2, LONG)
    assert predictor.batch_size == 8
    assert predictor.reason.startswith("default: the cache folder /dev/null/x/infermill cannot be written")


def test_no_batch_is_tried_that_might_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "free_memory", lambda: 1 << 10)
    predictor, _ = load_tuned(tiny_model(tmp_path), Options(), 2, LONG)
    assert (predictor.batch_size, predictor.reason) == (8, "probed: the default, of 1 settings")


def test_where_the_default_does_not_fit_into_memory_there_is_no_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def infer_two(predictor: Predictor, batch: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        if len(batch) > 2:
            raise MemoryError
        return predictor(batch)

    monkeypatch.setattr(tuning, "infer", infer_two)
    predictor, _ = load_tuned(tiny_model(tmp_path), Options(), 2, LONG)
    assert (predictor.batch_size, predictor.reason) == (8, NO_MEMORY)


def test_a_network_that_no_other_batch_fits_keeps_its_default() -> None:
    def rate(setting: Setting, _: float) -> float:
        if setting != DEFAULT:
            raise ModelError("no")
        return 1.0

    ticks = itertools.count()
    measured: Rate = rate
    rounds = explore(measured, DEFAULT, [Setting(2, 16), Setting(1, 8)], lambda: next(ticks) / 100)
    assert [list(one) for one in rounds] == [[DEFAULT]]
    assert choose(rounds, DEFAULT) == (DEFAULT, 1.0)


def test_a_job_uses_and_tells_its_choice(tmp_path: Path) -> None:
    tiny_classifier(tmp_path / "tiny.onnx")
    (tmp_path / "model.yaml").write_text(
        "name: tiny\nfiles: {onnx: tiny.onnx}\npreprocess: {resize: {exact: [32, 32]}}\n"
    )
    (tmp_path / "rows").mkdir()
    for number, picture in enumerate(pictures(20)):
        Image.fromarray(picture).save(tmp_path / "rows" / f"{number:02}.png")
    options = Options(partition_objects=8, threads=2)
    first = infermill.run(tmp_path / "rows", tmp_path / "model.yaml", tmp_path / "out", options)
    assert first.choice == {"streams": 2, "batch": 8, "threads": 2, "reason": SHORT}
    output = Output(str(tmp_path / "out"), options)
    record = read_record(output)
    assert record is not None
    (tmp_path / "out" / "part-00001.parquet").unlink()
    model = open_model(tmp_path / "model.yaml", options)
    job = Job(record.source, model, str(tmp_path / "out"), options, record.plans, todo=10**9)
    (report,) = run_partitions(job, [Assignment(1)], Meter())
    assert (report.ok, report.choice["threads"]) == (8, 2)
    assert str(report.choice["reason"]).startswith("probed: ")
    later = infermill.run(tmp_path / "rows", tmp_path / "model.yaml", tmp_path / "later", options)
    assert (later.choice["streams"], later.choice["batch"]) == (report.choice["streams"], report.choice["batch"])
    assert str(later.choice["reason"]).startswith("cached probe of ")
    resumed = infermill.run(tmp_path / "rows", tmp_path / "model.yaml", tmp_path / "out", options)
    assert resumed.choice["reason"] == SHORT  # of most objects
    is_other = (report.choice["streams"], report.choice["batch"]) != (2, 8)
    assert resumed.choice.get("others", 0) == int(is_other)
