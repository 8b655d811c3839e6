"""Synthesis of whole images: our ops against plain PyTorch with the same weights, in the same network.

The rival is not the printed form (a weight for each image, a grouped convolution) but the best plain one: activations
scaled by the style, one convolution for the batch, outputs demodulated, blur as a depthwise convolution, activations in
place. Both share the convolutions, where nearly all operations are; what differs is the memory that passes between them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional as F

from sage_fast.models import stylegan2
from sage_fast.models.stylegan2 import Discriminator, Generator
from sage_fast.training.gan import GANConfig
from sage_fast.training.losses import r1_penalty

_CONFIG = GANConfig()
SMALL = dict(
    style_dim=_CONFIG.style_dim, n_mapping=1, channel_base=_CONFIG.channel_base, channel_max=_CONFIG.channel_max
)
LARGE = dict(style_dim=512, n_mapping=1)


def plain_upfirdn2d(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1.0):
    """What the networks ask for, as depthwise convolutions; the filter is symmetric."""
    c, pad = x.shape[1], [padding] * 4 if isinstance(padding, int) else padding
    taps = (f * gain).expand(c, 1, *f.shape)
    if up == 2:
        return F.conv_transpose2d(x, taps, stride=2, padding=1, groups=c)
    return F.conv2d(x, taps, stride=down, padding=(pad[2], pad[0]), groups=c)


def plain_modulated_conv2d(x, weight, style, demodulate=True, up=1, down=1, resample_filter=None, eps=1e-8):
    x = x * style[:, :, None, None]
    if up == 2:
        x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
        x = plain_upfirdn2d(x, resample_filter, padding=1, gain=4.0)
    else:
        x = F.conv2d(x, weight, padding=weight.shape[2] // 2)
    if demodulate:
        norm = style.square() @ weight.square().sum((2, 3)).t()
        x = x * torch.rsqrt(norm + eps)[:, :, None, None]
    return x


def plain_bias_act(x, b, act="lrelu"):
    y = F.leaky_relu_(x + b.view(1, -1, *[1] * (x.ndim - 2)), 0.2)
    return y * math.sqrt(2) if y.requires_grad else y.mul_(math.sqrt(2))


PLAIN = dict(upfirdn2d=plain_upfirdn2d, modulated_conv2d=plain_modulated_conv2d, bias_act=plain_bias_act)
OURS = {name: getattr(stylegan2, name) for name in PLAIN}


@contextmanager
def plain_ops() -> Iterator[None]:
    """The networks of this process take plain PyTorch inside."""
    vars(stylegan2).update(PLAIN)
    try:
        yield
    finally:
        vars(stylegan2).update(OURS)


@pytest.mark.parametrize("n", [1, 4, 64])
def test_generator_of_32_px(compare, n):
    synthesis(compare, Generator(32, **SMALL), n)


def test_generator_of_256_px(compare):
    synthesis(compare, Generator(256, **LARGE), 1)


def synthesis(compare, generator: Generator, n: int) -> None:
    w_plus = torch.randn(n, generator.n_latent, generator.style_dim)

    @torch.inference_mode()
    def ours():
        return generator.synthesis(w_plus)

    def rival():
        with plain_ops():
            return ours()

    compare.tolerance = 1e-4
    compare(f"generator, {generator.resolution} px, N {n}", ours, {"plain PyTorch": rival})


def test_r1_at_32_px(compare):
    """Two derivatives through the discriminator, the dearest step of training."""
    network = Discriminator(32, channel_base=_CONFIG.channel_base, channel_max=_CONFIG.channel_max)
    images = torch.randn(16, 3, 32, 32, requires_grad=True)

    def ours():
        penalty = r1_penalty(network(images), images)
        return torch.cat([g.flatten() for g in torch.autograd.grad(penalty, [network.convs[1].conv1[0].weight])])

    def rival():
        with plain_ops():
            return ours()

    compare.tolerance = 1e-3
    compare("discriminator, R1 and its gradient, 32 px, N 16", ours, {"plain PyTorch": rival})
