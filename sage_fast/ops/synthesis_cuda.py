"""The fused synthesis on a GPU: convolutions by cuDNN, everything between two of them in one pass of our own.

All styles of a synthesis are one batched product, all demodulations another. Then two kernels a layer: the convolution, and an
epilogue (:mod:`sage_fast.ops.synthesis_epilogue`) that demodulates, adds noise and bias, activates, takes the image and
multiplies by the style of the next layer, so activations cross the memory twice a layer. Nothing here waits for the device
or asks it anything: a whole synthesis can be captured as a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from sage_fast.ops.synthesis_epilogue import blur_epilogue, styled_epilogue

if TYPE_CHECKING:
    from sage_fast.ops.synthesis import SynthesisNetwork

__all__ = ["MAX_CHANNELS", "Prepared", "draw", "prepare"]

MAX_CHANNELS = 1024  # a block of 256 threads holds a pixel in vectors of 16 bytes
_MULTIPLE = 8  # channels fill whole vectors and whole tensor-core tiles; the padding meets weights of zero
_MOST_VALUES = 2**31 - 1  # of an activation: cuDNN counts in 32 bits


@dataclass(frozen=True)
class Prepared:
    """A network's numbers for one precision. M = layers + images, W = the most channels of any layer, rounded up.

    Weights are scaled so that their products stay small, by powers of two, which demodulation takes back exactly;
    float16 would overflow otherwise.
    """

    input: Tensor  # [1, C, 4, 4] float32
    weights: list[Tensor]  # [C_out, C_in, 3, 3], for a layer that doubles the size [C_in, C_out, 3, 3]
    latents: Tensor  # [M] which w each style is made of
    affine: Tensor  # [M, D, W]
    affine_bias: Tensor  # [M, 1, W]
    squares: Tensor  # [layers, W, W], C_in by C_out: sums over the taps of the squared weights
    weight_scales: Tensor  # [layers, 1, W] by which weights were divided
    biases: list[Tensor]  # [C_out] float32
    image_weights: Tensor  # [images, 1, channels, W]


@torch.no_grad()
def prepare(network: SynthesisNetwork, dtype: torch.dtype) -> Prepared:
    """Pad, scale and convert the weights of a network."""
    device, layers, images = network.input.device, network.layers, network.images
    width = max(_padded(max(layer.weight.shape[:2])) for layer in layers)
    weights, squares, scales = [], [], []
    for i, layer in enumerate(layers):
        c_out, c_in = (_padded(c) for c in layer.weight.shape[:2])
        weight = _pad(layer.weight, c_out, c_in, 3, 3)
        scale = _power_of_two(weight.abs().amax((1, 2, 3), keepdim=True) * (3 * math.sqrt(c_in)))
        scaled = (weight / scale).transpose(0, 1) if i % 2 == 1 else weight / scale
        weights.append(scaled.to(dtype).contiguous(memory_format=torch.channels_last))
        squares.append(_pad(weight.square().sum((2, 3)).t(), width, width))
        scales.append(_pad(scale.view(1, -1), 1, width))
    affines = [(m.affine, m.affine_bias) for m in layers] + [(m.affine, m.affine_bias) for m in images]
    return Prepared(
        input=_pad(network.input, 1, _padded(network.input.shape[1]), 4, 4),
        weights=weights,
        latents=torch.tensor([*range(len(layers)), *range(1, len(layers) + 1, 2)], device=device),
        affine=torch.stack([_pad(weight.t(), weight.shape[1], width) for weight, _ in affines]),
        affine_bias=torch.stack([_pad(bias[None], 1, width) for _, bias in affines]),
        squares=torch.stack(squares),
        weight_scales=torch.stack(scales),
        biases=[_pad(layer.bias, _padded(len(layer.bias))) for layer in layers],
        image_weights=torch.stack([_pad(image.weight, len(image.weight), width) for image in images])[:, None],
    )


def draw(
    network: SynthesisNetwork,
    w_plus: Tensor,
    noise: Sequence[Tensor | None],
    dtype: torch.dtype,
    mark: Callable[[], None] = lambda: None,
) -> Tensor:
    """The images [N, C, R, R] float32 of latents [N, L, D]; ``mark`` is called at the start and after every styled layer."""
    prepared, n = network.prepared(dtype), len(w_plus)
    size = 2 << len(network.images)
    if n == 0:
        return w_plus.new_empty(0, len(network.images[0].bias), size, size)
    most = max(1, _MOST_VALUES // max(len(b) * ((4 << (i + 1) // 2) + 1) ** 2 for i, b in enumerate(prepared.biases)))
    if n > most:
        starts = range(0, n, most)
        maps = [[m if m is None or len(m) == 1 else m[i : i + most] for m in noise] for i in starts]
        return torch.cat([draw(network, w_plus[i : i + most], m, dtype, mark) for i, m in zip(starts, maps)])
    # every cast is chosen here
    with torch.autocast(w_plus.device.type, enabled=False):
        return _draw(network, prepared, w_plus, noise, dtype, mark)


def _draw(
    network: SynthesisNetwork,
    prepared: Prepared,
    w_plus: Tensor,
    noise: Sequence[Tensor | None],
    dtype: torch.dtype,
    mark: Callable[[], None],
) -> Tensor:
    mark()
    styles, factors, image_weights = _modulation(prepared, w_plus)
    rule = (network.slope, network.gain, -1.0 if network.clamp is None else network.clamp)
    last = len(network.layers) - 1
    x = prepared.input * styles[0, :, : prepared.input.shape[1], None, None]
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    image: Tensor | None = None
    for i, (layer, weight, bias) in enumerate(zip(network.layers, prepared.weights, prepared.biases)):
        map_ = noise[i]
        map_ = None if map_ is None else map_.to(w_plus).contiguous()
        following = None if i == last else styles[i + 1]
        if i % 2 == 1:
            assert following is not None
            x = _channels_behind(F.conv_transpose2d(x, weight, stride=2))
            x = blur_epilogue(x, factors[i], bias, map_, layer.strength, following, *rule)
        else:
            x = _channels_behind(F.conv2d(x, weight, padding=1))
            to_image = (image_weights[i // 2], network.images[i // 2].bias, image)
            x, image = styled_epilogue(x, factors[i], bias, map_, layer.strength, following, *to_image, *rule)
        if following is not None:
            x = x.permute(0, 3, 1, 2)
        mark()
    assert image is not None
    return image


def _modulation(prepared: Prepared, w_plus: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Styles [layers, N, W] between -1 and 1, factors [layers, N, W], weights to the image [images, N, channels, W]."""
    w = w_plus.index_select(1, prepared.latents).transpose(0, 1)
    styles = torch.baddbmm(prepared.affine_bias, w, prepared.affine)
    styles, image_styles = styles[: len(prepared.squares)], styles[len(prepared.squares) :]
    factors = torch.rsqrt(torch.bmm(styles.square(), prepared.squares) + 1e-8)
    scale = _power_of_two(styles.abs().amax(2, keepdim=True))
    return styles / scale, factors * scale * prepared.weight_scales, prepared.image_weights * image_styles[:, :, None]


def _power_of_two(x: Tensor) -> Tensor:
    """The least power of two above each positive number; 1 for zero."""
    return torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent)


def _channels_behind(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H, W, C], without a copy when the convolution kept its input's layout."""
    return x.permute(0, 2, 3, 1).contiguous()


def _padded(channels: int) -> int:
    return -(-channels // _MULTIPLE) * _MULTIPLE


def _pad(x: Tensor, *shape: int) -> Tensor:
    """``x`` in a corner of zeros."""
    out = x.new_zeros(shape, dtype=torch.float32)
    out[tuple(slice(n) for n in x.shape)] = x
    return out
