"""The random numbers behind the fakes of one step of adversarial training.

They are drawn for the whole batch, from generators that are equal on every rank, and then indexed: so a batch that is cut
into micro-batches or spread over ranks shows the networks the same numbers as one that is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sage_fast.models.stylegan2 import Generator

__all__ = ["Prior", "draw_pixels", "draw_prior", "mixed_w_plus"]


@dataclass(frozen=True)
class Prior:
    """What the fakes of one batch of N are made from.

    Attributes:
        z: [2, N, D] prior samples; the second of a pair is for style mixing.
        cut: [N] the layer from which the second sample takes over; L: none.
        noise: L - 1 maps [N, 1, h, w].
    """

    z: Tensor
    cut: Tensor
    noise: list[Tensor]

    def take(self, share: Tensor) -> Prior:
        """The samples at the indices ``share``."""
        if len(share) == len(self.cut):  # a share of everything is the batch in its order
            return self
        here = share.to(self.z.device, non_blocking=True)
        return Prior(self.z[:, here], self.cut[share], [noise[here] for noise in self.noise])


def draw_prior(
    G: Generator, n: int, style_mixing: float, rng: torch.Generator, noise_rng: torch.Generator | None = None
) -> Prior:
    """Draw for n samples: latents and mixing from ``rng`` on the CPU, noise maps where the network is.

    Args:
        style_mixing: probability that a second sample takes over from a random layer.
        noise_rng: a generator on the network's device; None: no noise maps.
    """
    like = G.latent_avg
    z = torch.randn(2, n, G.style.z_dim, generator=rng, dtype=like.dtype).to(like.device, non_blocking=True)
    cut = torch.randint(1, G.n_latent, (n,), generator=rng)
    cut[torch.rand(n, generator=rng) >= style_mixing] = G.n_latent
    maps = [] if noise_rng is None else [buffer.shape[1:] for buffer in G.noises.buffers()]
    noise = [torch.randn(n, *size, generator=noise_rng, device=like.device, dtype=like.dtype) for size in maps]
    return Prior(z, cut, noise)


def draw_pixels(G: Generator, n: int, noise_rng: torch.Generator) -> Tensor:
    """n images [n, C, R, R] of standard normal pixels, on the network's device."""
    like, shape = G.latent_avg, (n, G.n_channels, G.resolution, G.resolution)
    return torch.randn(shape, generator=noise_rng, device=like.device, dtype=like.dtype)


def mixed_w_plus(G: Generator, prior: Prior, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """w_plus [N, L, D] of the prior's samples (of ``labels`` [N, c_dim]), mixed at its cuts, and the first w [N, D] of each."""
    w, w2 = G.mapping(prior.z.flatten(0, 1), None if labels is None else labels.repeat(2, 1)).chunk(2)
    first = torch.arange(G.n_latent) < prior.cut.unsqueeze(1)  # [N, L]
    first = first.unsqueeze(2).to(w.device, non_blocking=True)
    return torch.where(first, w.unsqueeze(1), w2.unsqueeze(1)), w
