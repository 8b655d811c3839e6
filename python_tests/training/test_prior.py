"""What the fakes are made from: a share of it gives the same latents and images as the whole."""

from __future__ import annotations

import torch

from sage_fast.models.stylegan2 import Generator
from sage_fast.training.prior import draw_prior, mixed_w_plus
from sage_fast.training.shares import share_out

TINY = dict(channel_base=64, channel_max=8)


def test_a_share_of_the_prior_maps_to_the_same_latents_and_noise():
    torch.manual_seed(0)
    G = Generator(8, 8, 2, **TINY).double()
    prior = draw_prior(G, 16, 0.5, torch.Generator().manual_seed(1), torch.Generator().manual_seed(2))
    whole, first = mixed_w_plus(G, prior)
    assert 0 < (whole == first.unsqueeze(1)).all(2).all(1).sum() < 16  # some are mixed, some not
    share = share_out(16, 4, 1, 2, 2)[1]
    part = prior.take(share)
    w_plus, w = mixed_w_plus(G, part)
    torch.testing.assert_close(w_plus, whole[share])
    torch.testing.assert_close(w, first[share])
    images = G(whole, noise=prior.noise)
    torch.testing.assert_close(G(w_plus, noise=part.noise), images[share])


def test_mixing_is_off_and_always_on():
    G = Generator(8, 8, 2, **TINY)
    never = draw_prior(G, 50, 0.0, torch.Generator().manual_seed(0))
    always = draw_prior(G, 50, 1.0, torch.Generator().manual_seed(0))
    assert (never.cut == G.n_latent).all() and never.noise == []
    assert (always.cut < G.n_latent).all() and (always.cut > 0).all()
