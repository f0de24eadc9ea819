"""Images for the benchmarks: crops of scikit-image's real photos, as JPEG of 500x375, and as PNG of 32x32."""

import io
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg", "motorcycle_left.png")
DIFFERENT_RECORDS = 10_000


def make_photos(folder: Path, count: int, size: tuple[int, int] = (500, 375), seed: int = 0) -> int:
    """Write `count` different photos, unless they are there already; return their mean size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    here = sorted(folder.glob("*.jpg"))
    if len(here) != count:
        _write_photos(folder, count, size, seed)
        here = sorted(folder.glob("*.jpg"))
    return sum(path.stat().st_size for path in here) // len(here)


def _write_photos(folder: Path, count: int, size: tuple[int, int], seed: int) -> None:
    random = np.random.default_rng(seed)
    originals = [Image.open(Path(skimage.data.data_dir) / name).convert("RGB") for name in NAMES]
    for number in range(count):
        original = originals[number % len(originals)]
        share = random.uniform(0.6, 1.0)
        width = int(original.width * share)
        height = min(int(width * size[1] / size[0]), original.height)
        left = int(random.integers(0, original.width - width + 1))
        top = int(random.integers(0, original.height - height + 1))
        crop = original.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BICUBIC)
        if random.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        # A little sensor noise: enlarged crops are smoother than photos, and would be small files.
        noisy = np.asarray(crop, np.int16) + random.integers(-6, 7, (size[1], size[0], 1), np.int16)
        buffer = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        (folder / f"photo-{number:05d}.jpg").write_bytes(buffer.getvalue())


def make_records(folder: Path, count: int, seed: int = 0) -> None:
    """Write `count` PNG of 32x32, 10,000 of them different, as CIFAR's images unpacked."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    originals = [np.asarray(Image.open(Path(skimage.data.data_dir) / name).convert("RGB").reduce(4)) for name in NAMES]
    contents: list[bytes] = []
    for number in range(count):
        if number < DIFFERENT_RECORDS:
            original = originals[number % len(originals)]
            top, left = (int(random.integers(0, length - 32 + 1)) for length in original.shape[:2])
            noisy = original[top : top + 32, left : left + 32] + random.integers(-6, 7, (32, 32, 1), np.int16)
            buffer = io.BytesIO()
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
            contents.append(buffer.getvalue())
        (folder / f"record-{number:05d}.png").write_bytes(contents[number % DIFFERENT_RECORDS])
