"""A bound on bytes in memory, shared by threads."""

import threading
import time


class ByteBudget:
    """Bounds the bytes between fetch and decode; one larger object passes alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._stopped = False
        self._changed = threading.Condition()

    def acquire(self, size: int) -> None:
        """Wait until there is room, or the budget is stopped."""
        with self._changed:
            while self._used and self._used + size > self._limit and not self._stopped:
                self._changed.wait()
            self._used += size

    def release(self, size: int) -> None:
        with self._changed:
            self._used -= size
            self._changed.notify_all()

    def stop(self) -> None:
        """Let everybody pass from here on."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


class Lease:
    """One object's share of the budget, from before its bytes are read until they are decoded."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self.size_bytes = 0
        self.waited_seconds = 0.0

    def take(self, size_bytes: int) -> None:
        """Wait for room; what was taken before, by an attempt that failed, is given back."""
        started = time.perf_counter()
        self.give_back()
        self._budget.acquire(size_bytes)
        self.size_bytes = size_bytes
        self.waited_seconds += time.perf_counter() - started

    def give_back(self) -> None:
        self._budget.release(self.size_bytes)
        self.size_bytes = 0
