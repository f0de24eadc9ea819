"""What a running job has done so far: counted by the workers' threads, read by the progress display."""

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

STAGES = ("list", "fetch", "decode", "predict", "write", "idle")


@dataclass(frozen=True, slots=True)
class Counts:
    """What a worker has done since it last told."""

    objects: int = 0
    size_bytes: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    model_loads: int = 0
    halved_batches: int = 0


class Meter:
    """Objects, bytes read, failures by code, and thread-seconds by stage; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.listed = 0
        self.todo: int | None = None  # objects of this run; None while the source is listed
        self.workers = 0
        self.activity = "loading the network"  # before the first object is done
        self.detail = ""  # what an engine has to say beside the objects
        self._reset()

    def _reset(self) -> None:
        self.objects = 0
        self.size_bytes = 0
        self.failures: Counter[str] = Counter()
        self.stage_seconds = dict.fromkeys(STAGES, 0.0)
        self.model_loads = 0
        self.halved_batches = 0

    def spend(self, stage: str, seconds: float) -> None:
        with self._lock:
            self.stage_seconds[stage] += seconds

    def fetched(self, size_bytes: int) -> None:
        with self._lock:
            self.size_bytes += size_bytes

    def settled(self, code: str | None = None) -> None:
        """One object is predicted, or failed with a code."""
        with self._lock:
            self.objects += 1
            if code is not None:
                self.failures[code] += 1

    def loaded(self) -> None:
        """A network is loaded."""
        with self._lock:
            self.model_loads += 1

    def halve_batch(self) -> None:
        """Memory ran out, and a batch was cut in two."""
        with self._lock:
            self.halved_batches += 1

    def drain(self) -> Counts:
        """What was counted since the last call; it counts from nothing again."""
        with self._lock:
            counts = Counts(
                self.objects,
                self.size_bytes,
                dict(self.failures),
                self.stage_seconds,
                self.model_loads,
                self.halved_batches,
            )
            self._reset()
        return counts

    def add(self, counts: Counts) -> None:
        """Add what another meter has counted; failures that become none are forgotten."""
        with self._lock:
            self.objects += counts.objects
            self.size_bytes += counts.size_bytes
            for code, count in counts.failures.items():
                self.failures[code] += count
            self.failures = +self.failures
            for stage, seconds in counts.stage_seconds.items():
                self.stage_seconds[stage] += seconds
            self.model_loads += counts.model_loads
            self.halved_batches += counts.halved_batches
