"""Images per second into training: from the cache, while it is made, and from PyTorch's DataLoader over the same files.

A batch of ours is: numbers from ``EpochSampler``, rows of the mapped file, mirrored by chance, floats in [-1, 1]. That moves at
least 5 bytes of memory a value (one read, four written); the DataLoader decodes every image anew each epoch, in two processes, with
torchvision's ImageFolder where that is installed. Making the cache decodes each image once, in threads.

    pytest benchmarks/bench_data.py --benchmark-enable --bench-images 100000
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from clocks import copy_rate
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sage_fast.data.folders import ImageFolder, scan_image_folder
from sage_fast.data.images import to_float
from sage_fast.data.pixel_cache import cached_images
from sage_fast.data.sampling import EpochSampler
from sage_fast.training.batches import deal, to_pixels

SIDE, CATEGORIES, WORKERS = 64, 100, 2
ROUNDS, SECONDS = 7, 0.5


class Files(Dataset):
    """What torchvision's ImageFolder does, for places without torchvision."""

    def __init__(self, folder: ImageFolder) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.folder.root / self.folder.files[index]) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        x = pixels.float() / 127.5 - 1
        return x.flip(2) if torch.rand(()) < 0.5 else x


def torchvision_files(folder: ImageFolder) -> Dataset | None:
    try:
        from torchvision import datasets, transforms
    except ImportError:
        return None
    steps = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
    return datasets.ImageFolder(str(folder.root), transforms.Compose(steps))


def write_images(root: Path, n: int) -> ImageFolder:
    """PNG files with the detail of a photograph: smooth shapes with a little noise."""
    rng = np.random.default_rng(0)
    for i in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize(
            (SIDE, SIDE), Image.Resampling.BICUBIC
        )
        pixels = np.asarray(coarse).astype(np.int16) + rng.integers(-4, 5, (SIDE, SIDE, 1))
        path = root / f"{i % CATEGORIES:03d}" / f"{i:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, compress_level=1)
    return scan_image_folder(root)


def ours(images: Tensor, batch: int) -> Iterator[Tensor]:
    sampler, rng = EpochSampler(len(images), batch, seed=0), torch.Generator().manual_seed(0)
    like, share = torch.empty(0), torch.arange(batch)
    while True:
        yield to_pixels(images, *deal(sampler, share, True, rng), like)


def theirs(dataset: Dataset, batch: int) -> Iterator[Tensor]:
    loader = DataLoader(dataset, batch, shuffle=True, num_workers=WORKERS, persistent_workers=True, drop_last=True)
    while True:
        for loaded in loader:
            yield loaded[0] if isinstance(loaded, list) else loaded


def seconds_per_batch(batches: Iterator[Tensor]) -> float:
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        next(batches)
        n += 1
    return (time.perf_counter() - start) / n


def timed(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    start = time.perf_counter()
    return call(), time.perf_counter() - start


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory) -> ImageFolder:
    enabled = request.config.getoption("--benchmark-enable")
    n = request.config.getoption("--bench-images") if enabled else 2 * CATEGORIES
    return write_images(tmp_path_factory.mktemp("data") / "images", n)


def test_images_per_second(compare, folder, tmp_path):
    if compare.device.type != "cpu":
        pytest.skip("on a CPU")
    images, cold = timed(lambda: cached_images(folder, SIDE, 3, tmp_path / "cache").images)
    _, warm = timed(lambda: cached_images(folder, SIDE, 3, tmp_path / "cache").images)
    plain = Files(folder)
    for i in (0, len(folder) - 1):
        expected = to_float(images[i])
        assert any(torch.equal(plain[i], x) for x in (expected, expected.flip(2)) for _ in range(20))
    compare.benchmark.pedantic(next, (ours(images, 64),), rounds=5, iterations=5)
    if compare.benchmark.disabled:
        return
    dataset, name = torchvision_files(folder), "torchvision + DataLoader"
    if dataset is None:
        dataset, name = plain, "Dataset + DataLoader"
    for batch in (32, 64):
        streams = {"ours": ours(images, batch), name: theirs(dataset, batch)}
        for stream in streams.values():
            next(stream)  # workers start
        times: dict[str, list[float]] = {key: [] for key in streams}
        for _ in range(ROUNDS):
            for key, stream in streams.items():
                times[key].append(seconds_per_batch(stream))
        mine, other = median(times["ours"]), median(times[name])
        add(
            compare,
            f"batch {batch}: {batch / mine:,.0f} images/s, theirs {batch / other:,.0f}",
            mine,
            {name: other / mine},
        )
        n_bytes = 5 * batch * 3 * SIDE**2
        copied = copy_rate(compare.clock)
        compare.rows[-1] |= dict(gb_per_s=round(n_bytes / mine / 1e9, 2), of_copy=round(n_bytes / mine / copied, 3))
    n = len(folder)
    add(compare, f"making the cache of {n:,}: {n / cold:,.0f} images/s", cold, {name: other / 64 * n / cold})
    add(compare, f"opening the cache of {n:,}: {warm:.2f} s", warm, {"making it": cold / warm})


def add(compare, case: str, seconds: float, ratios: dict[str, float]) -> None:
    row = dict(case=case, ms=round(seconds * 1e3, 4))
    compare.rows.append(row | {"ratios": {name: round(ratio, 2) for name, ratio in ratios.items()}})
