"""What a running job has done so far: counted by the workers' threads, read by the progress display."""

import threading
from collections import Counter

STAGES = ("list", "fetch", "decode", "predict", "write", "idle")


class Meter:
    """Objects, bytes read, failures by code, and thread-seconds by stage; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.listed = 0
        self.todo: int | None = None  # objects of this run; None while the source is listed
        self.objects = 0
        self.size_bytes = 0
        self.failures: Counter[str] = Counter()
        self.stage_seconds = dict.fromkeys(STAGES, 0.0)
        self.threads: dict[str, int] = {}
        self.model_loads = 0

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
