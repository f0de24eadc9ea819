"""What one thread hands to others at once: a few small objects, with their share of a bound on bytes in memory.

A hand-over between threads costs tens of microseconds, as much as reading a small file or decoding a small image.
So threads do several small things in a row, as many as take about a millisecond, before they hand them over.
"""

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

Item = TypeVar("Item")
MAX_IN_A_ROW = 32
IN_A_ROW_SECONDS = 0.001


class Pace:
    """How many objects a thread takes at once: one, or as many small ones as take about a millisecond."""

    def __init__(self) -> None:
        self.count = 1

    def took(self, seconds: float) -> None:
        """Learn from how long `count` of them took."""
        if seconds > 2 * IN_A_ROW_SECONDS:
            self.count = max(self.count // 2, 1)
        elif seconds < IN_A_ROW_SECONDS / 2:
            self.count = min(self.count * 2, MAX_IN_A_ROW)


class ByteBudget:
    """Bounds the bytes between fetch and decode; one larger object passes alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._stopped = False
        self._changed = threading.Condition()

    def try_acquire(self, size: int) -> bool:
        """Take so much, if there is room or the budget is stopped."""
        with self._changed:
            return self._take(size)

    def acquire(self, size: int) -> None:
        """Wait until there is room, or the budget is stopped."""
        with self._changed:
            while not self._take(size):
                self._changed.wait()

    def _take(self, size: int) -> bool:
        if self._used and self._used + size > self._limit and not self._stopped:
            return False
        self._used += size
        return True

    def release(self, size: int) -> None:
        with self._changed:
            self._used -= size
            self._changed.notify_all()

    def stop(self) -> None:
        """Let everybody pass from here on."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


class Fetched(NamedTuple, Generic[Item]):
    """An object's bytes, and what they take of the budget until they are decoded."""

    item: Item
    data: "ReadableBuffer"
    size_bytes: int


class Packing(Generic[Item]):
    """What one thread has fetched and not handed over yet, and what it has taken from the budget."""

    def __init__(self, budget: ByteBudget, hand_over: Callable[[list[Fetched[Item]]], None]) -> None:
        self._budget = budget
        self._hand_over = hand_over
        self._fetched: list[Fetched[Item]] = []
        self._in_hand_bytes = 0
        self.waited_seconds = 0.0

    def reserve(self, size_bytes: int) -> None:
        """Wait for room for the object in hand; what was taken before, by an attempt that failed, is given back."""
        self.drop()
        if not self._budget.try_acquire(size_bytes):
            self.hand_over()  # or threads could wait for what they hold themselves
            started = time.perf_counter()
            self._budget.acquire(size_bytes)
            self.waited_seconds += time.perf_counter() - started
        self._in_hand_bytes = size_bytes

    def drop(self) -> None:
        """Give back what the object in hand has taken."""
        if self._in_hand_bytes:
            self._budget.release(self._in_hand_bytes)
            self._in_hand_bytes = 0

    def add(self, item: Item, data: "ReadableBuffer") -> None:
        """Put the object in hand to the others."""
        self._fetched.append(Fetched(item, data, self._in_hand_bytes))
        self._in_hand_bytes = 0

    def hand_over(self) -> None:
        """Hand over what there is; this may wait for room in the queue."""
        if self._fetched:
            started = time.perf_counter()
            fetched, self._fetched = self._fetched, []
            self._hand_over(fetched)
            self.waited_seconds += time.perf_counter() - started
