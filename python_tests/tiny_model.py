"""A model small enough to run everywhere: 8 px, six seen categories, random weights."""

from __future__ import annotations

from typing import Any

import torch

from sage_fast.data.latent_table import LatentTable
from sage_fast.models.encoders import PyramidEncoder
from sage_fast.models.hypernets import PyramidHypernet
from sage_fast.models.hyperstyle import HyperStyle
from sage_fast.models.image_encoder import ImageEncoder
from sage_fast.models.stylegan2 import Discriminator, Generator
from sage_fast.models.weight_deltas import weight_shapes

RESOLUTION, STYLE_DIM, N_SEEN, N_EACH, N_DIRECTIONS = 8, 16, 6, 8, 5


def tiny_networks() -> tuple[Generator, PyramidEncoder, Discriminator]:
    """Networks with random weights whose outputs do depend on their inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        generator = Generator(RESOLUTION, STYLE_DIM, n_mapping=2, channel_base=64, channel_max=8)
        encoder = PyramidEncoder(
            RESOLUTION, generator.n_latent, STYLE_DIM, channel_base=64, channel_max=8, head_width=4
        )
        discriminator = Discriminator(RESOLUTION, channel_base=64, channel_max=8)
        generator.latent_avg.copy_(generator.mean_latent(1000))
        with torch.no_grad():
            for heads in encoder.heads:
                heads.weight.mul_(30)  # starts near zero, which would make all codes alike
            for layer in (generator.to_rgb1, *generator.to_rgbs):
                layer.conv.weight.mul_(0.2)  # colours well inside [-1, 1]
    return generator.eval(), encoder.eval(), discriminator.eval()


def tiny_encoder(kind: str, generator: Generator) -> ImageEncoder:
    """An encoder of a kind for :func:`tiny_networks`, with random weights whose outputs depend on their inputs."""
    sizes: dict[str, Any] = {"channel_base": 64, "channel_max": 8, "head_width": 4}
    shape = (RESOLUTION, generator.n_latent, STYLE_DIM)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        n_iterations = 3 if kind == "restyle" else 0
        one = PyramidEncoder(*shape, **sizes, progressive=kind in ("e4e", "hyperstyle"), n_iterations=n_iterations)
        with torch.no_grad():
            for heads in one.heads:
                heads.weight.mul_(30 if kind != "restyle" else 10)
        if kind != "hyperstyle":
            return one.eval()
        hypernet = PyramidHypernet(RESOLUTION, weight_shapes(generator), **sizes, rank=2)
        for rows in hypernet.rows:
            torch.nn.init.normal_(rows.weight, std=1.0)
        return HyperStyle(one, hypernet, n_iterations=2).eval()


def tiny_codes(n_latent: int) -> tuple[LatentTable, torch.Tensor]:
    """Codes e + A n + a little, and A [L, D, K]; every e lies in the span of the other five, three directions of a layer."""
    rng = torch.Generator().manual_seed(4)
    spanning = torch.randn(n_latent, 3, STYLE_DIM, generator=rng) / 3**0.5
    embeddings = torch.einsum("slk,lkd->sld", torch.randn(N_SEEN, n_latent, 3, generator=rng), spanning)
    directions = torch.randn(n_latent, STYLE_DIM, N_DIRECTIONS, generator=rng)
    labels = torch.arange(N_SEEN).repeat_interleave(N_EACH)
    n = 0.1 * torch.randn(len(labels), n_latent, N_DIRECTIONS, generator=rng)
    w_plus = embeddings[labels] + torch.einsum("ldk,nlk->nld", directions, n)
    w_plus += 0.02 * torch.randn(w_plus.shape, generator=rng)
    return LatentTable(w_plus, labels, [f"seen_{i}" for i in range(N_SEEN)]), directions


def codes_that_do_not_span(n_latent: int) -> LatentTable:
    """Codes of as many categories, each in a direction of its own: the others hold little of it."""
    rng = torch.Generator().manual_seed(6)
    labels = torch.arange(N_SEEN).repeat_interleave(N_EACH)
    w_plus = torch.randn(N_SEEN, n_latent, STYLE_DIM, generator=rng)[labels]
    w_plus += 0.1 * torch.randn(w_plus.shape, generator=rng)
    return LatentTable(w_plus, labels, [f"seen_{i}" for i in range(N_SEEN)])
