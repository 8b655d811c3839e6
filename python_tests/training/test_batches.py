"""Batches: every rank draws the same whole one and takes its share; pixels as floats."""

from __future__ import annotations

import pytest
import torch

from sage_fast.data.sampling import EpochSampler
from sage_fast.models.stylegan2 import Generator
from sage_fast.training.augment import Augment, AugmentConfig
from sage_fast.training.batches import deal, to_pixels
from sage_fast.training.prior import draw_prior, mixed_w_plus


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="whether a GPU is waited for shows on one")
@pytest.mark.parametrize("augment", ["ada", "diffaugment"])
def test_nothing_of_a_step_that_is_drawn_on_the_host_waits_for_cuda(augment):
    G = Generator(16, 16, 2, channel_base=256, channel_max=32).to("cuda")
    augmented, like = Augment(AugmentConfig(augment, p=0.9 if augment == "ada" else None)), G.latent_avg
    rng, noise_rng = torch.Generator().manual_seed(0), torch.Generator("cuda").manual_seed(0)
    images, index = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8), torch.tensor([3, 1, 8, 2])

    def drawn() -> None:
        prior = draw_prior(G, 4, 0.9, rng, noise_rng)
        for share in (torch.tensor([0, 2]), torch.tensor([1, 3])):
            mixed_w_plus(G, prior.take(share))
        flips = torch.tensor([True, False, True, False])
        augmented.apply(to_pixels(images, index, flips, like), augmented.draw(4, rng))

    drawn()  # kernels are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_pixels():
    images = torch.randint(0, 256, (5, 2, 3, 4), dtype=torch.uint8)
    index = torch.tensor([3, 1])
    plain = to_pixels(images, index, None, torch.zeros(1, dtype=torch.float64))
    assert plain.dtype == torch.float64 and plain.shape == (2, 2, 3, 4)
    torch.testing.assert_close((plain + 1) * 127.5, images[index].double())
    mirrored = to_pixels(images, index, torch.tensor([True, False]), torch.zeros(1))
    torch.testing.assert_close(mirrored, torch.stack([plain[0].flip(2), plain[1]]).float())


def test_pixels_are_what_they_have_always_been_and_the_stored_stay_as_they_are():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    before = values.clone()
    assert torch.equal(to_pixels(values, torch.tensor([0]), None, torch.zeros(1)), values.float() / 127.5 - 1)
    mirrored = to_pixels(values, torch.tensor([0, 0]), torch.tensor([True, False]), torch.zeros(1))
    assert torch.equal(mirrored[0], mirrored[1].flip(2)) and torch.equal(values, before)
    assert to_pixels(values, torch.tensor([], dtype=torch.int64), None, torch.zeros(1)).shape == (0, 1, 16, 16)
