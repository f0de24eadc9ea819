"""What each thread of a worker is decoding or predicting at this moment, readable after the worker has died.

    slot 0   started  stage  count  partition row  partition row  …
    slot 1   …                                                          one slot a thread

A worker writes it into memory that it shares with the process that started it. Writing costs a microsecond, and needs
no lock: each thread has its own slot, whose stage is set last and cleared first.
"""

import itertools
import mmap
import os
import struct
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

SLOTS = 256
ROWS_PER_SLOT = 2048
_HEAD = struct.Struct("=dII")
_STARTED, _STAGE_AND_COUNT = struct.Struct("=d"), struct.Struct("=II")
_ROW = struct.Struct("=II")
_SLOT_BYTES = _HEAD.size + ROWS_PER_SLOT * _ROW.size
_STAGES: tuple[Literal["decode", "predict"], Literal["decode", "predict"]] = ("decode", "predict")


class _Note:
    """An entry while it is there; a class, since a generator costs more than the entry does."""

    __slots__ = ("_at", "_memory", "_rows", "_stage")

    def __init__(self, memory: mmap.mmap, at: int, stage: str, rows: Sequence[tuple[int, int]]) -> None:
        self._memory, self._at, self._stage, self._rows = memory, at, stage, rows[:ROWS_PER_SLOT]

    def __enter__(self) -> None:
        memory, at = self._memory, self._at
        for index, row in enumerate(self._rows):
            _ROW.pack_into(memory, at + _HEAD.size + index * _ROW.size, *row)
        _STARTED.pack_into(memory, at, time.monotonic())
        _STAGE_AND_COUNT.pack_into(memory, at + _STARTED.size, _STAGES.index(self._stage) + 1, len(self._rows))

    def __exit__(self, *_: object) -> None:
        _STAGE_AND_COUNT.pack_into(self._memory, self._at + _STARTED.size, 0, 0)


@dataclass(frozen=True, slots=True)
class Entry:
    """What one thread is doing, since when (time.monotonic), and to which (partition, row)."""

    stage: Literal["decode", "predict"]
    started: float
    rows: tuple[tuple[int, int], ...]


def memory_file(name: str) -> int:
    """The descriptor of an empty file that exists only in memory, or at least has no name in a folder.

    Args:
        name: what the system shows it as.

    Example:
        >>> os.close(memory_file("infermill-journal"))
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Journal:
    """A page of slots in shared memory; the file behind it has no name, and is gone with the last process that has it.

    Example:
        >>> journal = Journal()
        >>> with journal.note("decode", [(3, 14)]):
        ...     [entry.rows for entry in journal.entries()]
        [((3, 14),)]
        >>> journal.entries()
        []
    """

    def __init__(self, descriptor: int | None = None) -> None:
        if descriptor is None:
            descriptor = memory_file("infermill-journal")
            os.ftruncate(descriptor, SLOTS * _SLOT_BYTES)
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, SLOTS * _SLOT_BYTES)
        self._thread = threading.local()
        self._next_slot = itertools.count()

    def close(self) -> None:
        self._memory.close()
        os.close(self.descriptor)

    def note(
        self, stage: Literal["decode", "predict"], rows: Sequence[tuple[int, int]]
    ) -> AbstractContextManager[None]:
        """This thread works on these rows while the context is open."""
        return _Note(self._memory, self._slot(), stage, rows)

    def _slot(self) -> int:
        if not hasattr(self._thread, "slot"):
            self._thread.slot = next(self._next_slot) % SLOTS * _SLOT_BYTES
        return int(self._thread.slot)

    def entries(self) -> list[Entry]:
        """What is being worked on."""
        entries = []
        for at in range(0, SLOTS * _SLOT_BYTES, _SLOT_BYTES):
            started, stage, count = _HEAD.unpack_from(self._memory, at)
            if stage:
                rows = tuple(
                    _ROW.unpack_from(self._memory, at + _HEAD.size + index * _ROW.size) for index in range(count)
                )
                entries.append(Entry(_STAGES[stage - 1], started, rows))
        return entries
