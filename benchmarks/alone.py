"""What the network and the decoder do alone: the terms of the limit."""

import threading
import time
from collections.abc import Callable
from functools import cache
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import simplejpeg

import infermill as im
from infermill.limits import usable_cores
from infermill.models.opening import open_model
from infermill.runtimes import Predictor, load

DECODE_SECONDS = 3.0
NETWORK_SECONDS = 3.0


@cache
def _predictor(card: Path) -> Predictor:
    return load(open_model(str(card), im.Options()), "openvino", usable_cores())


def network_rate(card: Path, seconds: float = NETWORK_SECONDS) -> float:
    """Images per second of the network alone, on all cores, as a job runs it."""
    predictor = _predictor(card)
    batch = np.random.default_rng(0).integers(0, 256, (predictor.batch_size, *predictor.input_shape), np.uint8)
    predictor(batch)
    counts = [0] * predictor.streams
    end = time.perf_counter() + seconds

    def loop(stream: int) -> None:
        while time.perf_counter() < end:
            predictor(batch)
            counts[stream] += len(batch)

    started = time.perf_counter()
    _in_threads(loop, predictor.streams)
    return sum(counts) / (time.perf_counter() - started)


def additive_limit(network: float, decode: float) -> float:
    """Images per second where decoding on all cores and the network are all there is, and neither ever waits.

    Args:
        network: images per second of the network alone, on all cores.
        decode: JPEG files that a core decodes per second.
    """
    return 1 / (1 / network + 1 / (usable_cores() * decode))


def _in_threads(loop: Callable[[int], None], count: int) -> None:
    threads = [threading.Thread(target=loop, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def decode_rate(photos: Path) -> float:
    """JPEG to RGB, images per second of one core."""
    contents = [path.read_bytes() for path in islice(sorted(photos.iterdir()), 200)]
    started = time.perf_counter()
    for count, content in enumerate(cycle(contents)):
        seconds = time.perf_counter() - started
        if seconds > DECODE_SECONDS:
            return count / seconds
        simplejpeg.decode_jpeg(content)
    raise AssertionError
