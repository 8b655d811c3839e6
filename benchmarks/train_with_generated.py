"""Trains a classifier of timm on real images with generated ones among them; the generated ones change every epoch.

The real folder is ``<class>/<image>``; the shots' folder holds a few images of those classes that are to get more, under the
same names. Without timm (extra ``metrics``) a network of two layers takes its place, which is said. This is an example to
start from: it prints the training loss, and no claim about accuracy is made.

    python benchmarks/train_with_generated.py --real REAL_DIR --shots NOVEL_DIR [--net resnet18] [--ratio 0.5] [--workers 2]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from sage_fast import Augmenter
from sage_fast.data.folders import scan_image_folder
from sage_fast.errors import InputError
from sage_fast.generation import GenerateConfig


class RealImages(Dataset):
    """A folder of images as (image of Pillow, label)."""

    def __init__(self, folder: Path) -> None:
        self.folder = scan_image_folder(folder)
        self.classes = self.folder.categories

    def __len__(self) -> int:
        return len(self.folder.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with Image.open(self.folder.root / self.folder.files[index]) as image:
            return image.convert("RGB"), self.folder.labels[index]


def to_input(image: Image.Image, size: int) -> torch.Tensor:
    """float32 [3, size, size] in [-1, 1]."""
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR), np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)


def network_and_loader(dataset, net: str, n_classes: int, size: int, batch: int, workers: int, seed: int):
    """A network of timm behind timm's own loader and augmentation; or a small one behind a loader of PyTorch."""
    torch.manual_seed(seed)
    if find_spec("timm") is None:
        print("timm is not installed (pip install 'sage_fast[metrics]'): a network of two layers takes its place.")
        dataset.transform = Resized(size)
        network = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, n_classes)
        )
        return network, DataLoader(dataset, batch, shuffle=True, num_workers=workers)
    import timm
    from timm.data import create_loader

    network = timm.create_model(net, pretrained=False, num_classes=n_classes)
    loader = create_loader(
        dataset,
        (3, size, size),
        batch,
        is_training=True,
        use_prefetcher=False,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return network, loader


class Resized:
    """:func:`to_input` as an object that spawned workers can be sent."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return to_input(image, self.size)


def train(arguments: argparse.Namespace) -> list[float]:
    """The mean loss of each epoch."""
    real, losses = RealImages(arguments.real), []
    augmenter = Augmenter(arguments.model, arguments.shots, GenerateConfig(seed=arguments.seed))
    with augmenter.dataset(real, arguments.ratio, epochs_per_image=arguments.epochs_per_image) as dataset:
        a = arguments
        network, loader = network_and_loader(
            dataset, a.net, len(real.classes), a.size, a.batch, a.workers, arguments.seed
        )
        if not len(loader):  # timm's leaves out the last batch where it is not whole
            raise InputError(f"--batch must be at most the {len(dataset)} samples of an epoch, got {a.batch}.")
        optimizer = torch.optim.SGD(network.parameters(), lr=arguments.lr, momentum=0.9)
        for epoch in range(arguments.epochs):
            dataset.set_epoch(epoch)  # before the loader begins; a DistributedSampler has its own
            total = 0.0
            for images, labels in loader:
                loss = nn.functional.cross_entropy(network(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item()
            losses.append(total / len(loader))
            print(f"epoch {epoch}: loss {losses[-1]:.4f} over {len(dataset)} samples, {dataset.n_generated} generated")
    return losses


def main(argv: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", type=Path, required=True)
    parser.add_argument("--shots", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a bundle folder; the shipped model without")
    parser.add_argument("--net", default="resnet18", help="a name of timm")
    for name, value in (
        ("size", 32),
        ("batch", 32),
        ("epochs", 10),
        ("workers", 2),
        ("seed", 0),
        ("epochs-per-image", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("ratio", 0.5), ("lr", 0.02)):
        parser.add_argument(f"--{name}", type=float, default=value)
    return train(parser.parse_args(argv))


if __name__ == "__main__":
    main()
