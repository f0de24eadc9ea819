"""The libraries that execute a network, behind one contract: `load(model, threads) -> Predictor`."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infermill.types import RuntimeName


@dataclass(frozen=True, slots=True)
class Predictor:
    """A loaded network: call it with a uint8 NHWC batch of any length, get one array per output.

    Calls are thread-safe, and release the GIL. `streams` calls at once use the machine fully; batches of
    `batch_size` images are the best length (for a network with a fixed batch, the only one: shorter ones are
    padded and the padding dropped, longer ones are cut).
    """

    run: Callable[[NDArray[np.uint8]], tuple[NDArray[np.generic], ...]]
    input_shape: tuple[int, int, int]
    "Height, width and channels of one image."
    output_names: tuple[str, ...]
    batch_size: int
    streams: int
    runtime: RuntimeName
    device: str
    precision: str

    def __call__(self, batch: NDArray[np.uint8]) -> tuple[NDArray[np.generic], ...]:
        return self.run(batch)
