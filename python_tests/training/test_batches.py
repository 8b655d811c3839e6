"""Batches: every rank draws the same whole one and takes its share; pixels as floats."""

from __future__ import annotations

import pytest
import torch

from sage_fast.data.sampling import EpochSampler
from sage_fast.training.batches import deal, to_pixels


@pytest.mark.parametrize("flip", [True, False])
def test_shares_make_up_the_batch(flip):
    def parts(world):
        dealt = []
        for rank in range(world):
            sampler, rng = EpochSampler(20, 6, seed=3), torch.Generator().manual_seed(1)
            steps = [deal(sampler, torch.arange(rank, 6, world), flip, rng) for _ in range(4)]
            dealt.append(
                [torch.stack([index, torch.zeros_like(index) if f is None else f.long()]) for index, f in steps]
            )
        return dealt

    (whole,) = parts(1)
    for step, shares in enumerate(zip(*parts(3))):
        assert torch.equal(torch.stack(shares, 2).flatten(1), whole[step])
    mirrored = torch.cat([step[1] for step in whole])
    assert bool(mirrored.any()) == flip and not mirrored.all()


def test_pixels():
    images = torch.randint(0, 256, (5, 2, 3, 4), dtype=torch.uint8)
    index = torch.tensor([3, 1])
    plain = to_pixels(images, index, None, torch.zeros(1, dtype=torch.float64))
    assert plain.dtype == torch.float64 and plain.shape == (2, 2, 3, 4)
    torch.testing.assert_close((plain + 1) * 127.5, images[index].double())
    mirrored = to_pixels(images, index, torch.tensor([True, False]), torch.zeros(1))
    torch.testing.assert_close(mirrored, torch.stack([plain[0].flip(2), plain[1]]).float())
