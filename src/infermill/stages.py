"""What the pipeline runs, and what it yields: partitions in, their rows out, and the functions in between."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from infermill.errors import ModelError
from infermill.types import Failure, ObjectRef

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

Image = NDArray[Any]
"What is decoded: an image, or a tensor where the network takes those."
Arrays = tuple[NDArray[np.generic], ...]
BATCHES_IN_A_ROW = 4
"Decoding and the network displace each other from the caches of a core: so each goes on for so many batches."


class Share(NamedTuple):
    """A partition as a worker gets it: its refs, and the rows that are known to fail."""

    partition: int
    refs: Sequence[ObjectRef]
    verdicts: Mapping[int, Failure] = {}


@dataclass(slots=True)
class PartitionRows:
    """A partition on its way: what is known of its rows. `kept` holds one array per kind of value, row by row."""

    partition: int
    refs: Sequence[ObjectRef]
    kept: Arrays | None = None
    failures: dict[int, Failure] = field(default_factory=dict)
    settled: int = 0

    @property
    def is_finished(self) -> bool:
        return self.settled == len(self.refs)

    def keep(self, rows: Sequence[int], values: Arrays, indices: Sequence[int]) -> None:
        """Keep what the network says of some rows: those of `values` at `indices`."""
        if self.kept is None:
            self.kept = tuple(np.zeros((len(self.refs), *array.shape[1:]), array.dtype) for array in values)
        for kept, array in zip(self.kept, values, strict=True):
            if array.shape[1:] != kept.shape[1:]:
                raise ModelError(
                    f"the network answers {list(array.shape[1:])} for one image and {list(kept.shape[1:])} for another",
                    "its outputs must have one shape; end it before the part whose length depends on the image",
                )
            kept[rows] = array[indices]

    def predicted(self) -> NDArray[np.bool_]:
        """Which rows have a prediction."""
        mask = np.ones(len(self.refs), np.bool_)
        mask[list(self.failures)] = False
        return mask


@dataclass(frozen=True, slots=True)
class Network:
    """A loaded network: up to `streams` threads at once call `predict` with batches of up to `batch_size` images."""

    predict: Callable[[Image], Arrays]
    "Raises MemoryError where there is no memory for a batch of this length."
    finish: Callable[[Arrays], tuple[Arrays, NDArray[np.bool_]]]
    "What is kept of each row, and which rows are finite."
    streams: int
    batch_size: int
    is_on_cores: bool = True
    "It computes on the cores that decode, and not on a device of its own."
    is_fixed: bool = False
    "Shorter batches cost as much as full ones."


Watch = Callable[[Literal["decode", "predict"], Sequence[tuple[int, int]]], AbstractContextManager[None]]
"Is told, by the thread that does it, which (partition, row) are decoded or predicted while the context is open."


def unwatched(_stage: Literal["decode", "predict"], _rows: Sequence[tuple[int, int]]) -> AbstractContextManager[None]:
    """A `Watch` that looks away."""
    return nullcontext()


@dataclass(frozen=True, slots=True)
class Stages:
    """What the pipeline runs, and on how many threads."""

    fetch: "Callable[[ObjectRef, Callable[[int], None]], ReadableBuffer]"
    decode: "Callable[[ReadableBuffer], Image]"
    load: Callable[[], Network]
    fetch_threads: int
    compute_threads: int
    decoded_images: int
    "How many images may wait for the network."
    watch: Watch = unwatched
