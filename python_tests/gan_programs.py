"""What the processes of ``training/test_gan_ranks.py`` run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sage_fast.data.folders import ImageSet
from sage_fast.training.augment import AugmentConfig
from sage_fast.training.gan import GANConfig, train_gan


def images(n: int = 24, resolution: int = 8) -> ImageSet:
    """Coloured noise of two categories."""
    rng, labels = torch.Generator().manual_seed(0), torch.arange(n) * 2 // n
    pixels = torch.randint(0, 200, (n, 3, resolution, resolution), dtype=torch.uint8, generator=rng)
    pixels[labels == 1, 0] += 55
    return ImageSet(pixels, labels, ["a", "b"], [f"{i}.png" for i in range(n)], [])


def config(**settings: Any) -> GANConfig:
    """Everything that is drawn at random is on: mixing, flips, noise, path length, adaptive augmentation, classes."""
    usual = dict(
        resolution=8, style_dim=8, n_mapping=2, channel_base=64, channel_max=8, mbstd_group=2, batch=8,
        total_kimg=0.16, r1_every=2, pl_weight=2.0, pl_every=2, precision="float64", conditional=True, balance=True,
        augment=AugmentConfig("ada", speed_kimg=0.1, target=-0.5), log_every=1, save_every=5, grid_every=5,
    )  # fmt: skip
    return GANConfig(**usual | settings)


def train(folder: Path, settings: dict[str, Any], resume: bool = False) -> None:
    """A run of :func:`config` in ``folder``."""
    train_gan(config(**settings), images(), folder, resume)


def spoil(folder: Path) -> None:
    """A run in which the second rank's loss becomes infinite in the third step."""
    from sage_fast.models.stylegan2 import Discriminator
    from sage_fast.training.ranks import join_ranks

    forward, calls = Discriminator.forward, []

    def spoiled(self, *args):
        calls.append(1)
        return forward(self, *args) * (torch.inf if join_ranks().rank == 1 and len(calls) == 10 else 1)

    Discriminator.forward = spoiled  # type: ignore[method-assign]
    train(folder, {})
