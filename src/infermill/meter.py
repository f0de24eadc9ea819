"""What a running job has done so far: counted by the workers' threads, read by the progress display."""

import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from infermill.trace import Trace

STAGES = ("list", "fetch", "decode", "predict", "write", "idle")
WAITS = ("fetch", "network")
"A fetch thread waits for room, or for something to fetch; a compute thread, for others to be done with the network."


@dataclass(frozen=True, slots=True)
class Counts:
    """What a worker has done since it last told."""

    objects: int = 0
    size_bytes: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    waits: Mapping[str, float] = field(default_factory=dict)
    looks: int = 0
    "How often somebody looked at the queues."
    fetched_seen: int = 0
    "The sum of the objects that then waited to be decoded."
    decoded_seen: int = 0
    "And to be predicted."
    model_loads: int = 0
    halved_batches: int = 0


class Meter:
    """Objects, bytes read, failures by code, and thread-seconds by stage; safe to use from any thread."""

    def __init__(self, trace: Trace | None = None) -> None:
        self._lock = threading.Lock()
        self.trace = trace
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
        self.waits = dict.fromkeys(WAITS, 0.0)
        self.looks = self.fetched_seen = self.decoded_seen = 0
        self.model_loads = 0
        self.halved_batches = 0

    def spend(self, stage: str, started: float, waited_seconds: float = 0.0, objects: int = 1) -> float:
        """This thread was busy in a stage since `started` (time.perf_counter), but for a time in which it waited.

        Returns:
            The seconds in which it was busy.
        """
        ended = time.perf_counter()
        seconds = ended - started - waited_seconds
        with self._lock:
            self.stage_seconds[stage] += seconds
        if self.trace is not None:
            self.trace.add(stage, started, ended, objects)
        return seconds

    def wait(self, what: str, seconds: float) -> None:
        """This thread waited so long: as one of WAITS says."""
        with self._lock:
            self.waits[what] += seconds

    @property
    def pace_seconds(self) -> dict[str, float]:
        """Thread-seconds by stage, for a verdict: who waits for the network is not idle, but in the stage `predict`."""
        with self._lock:
            seconds, waited = dict(self.stage_seconds), self.waits["network"]
        return seconds | {"predict": seconds["predict"] + waited, "idle": seconds["idle"] - waited}

    def look(self, fetched: int, decoded: int) -> None:
        """So many objects wait at this moment to be decoded, and to be predicted."""
        with self._lock:
            self.looks += 1
            self.fetched_seen += fetched
            self.decoded_seen += decoded

    def fetched(self, size_bytes: int) -> None:
        with self._lock:
            self.size_bytes += size_bytes

    def settled(self, objects: int = 1, code: str | None = None) -> None:
        """Objects are predicted, or failed with a code."""
        with self._lock:
            self.objects += objects
            if code is not None:
                self.failures[code] += objects

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
                self.waits,
                self.looks,
                self.fetched_seen,
                self.decoded_seen,
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
            for what, seconds in counts.waits.items():
                self.waits[what] += seconds
            self.looks += counts.looks
            self.fetched_seen += counts.fetched_seen
            self.decoded_seen += counts.decoded_seen
            self.model_loads += counts.model_loads
            self.halved_batches += counts.halved_batches
