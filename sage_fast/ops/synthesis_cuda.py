"""The fused synthesis on a GPU: a layer by cuDNN and one pass of our own behind it, or wholly by a kernel of our own.

All styles of a synthesis are one batched product, all demodulations another. Then each layer goes one of two ways, whichever
was the faster at its first use (:mod:`sage_fast.ops.cuda_convolution`). Either two kernels: cuDNN's convolution, and an
epilogue (:mod:`sage_fast.ops.synthesis_epilogue`) that demodulates, adds noise and bias, activates, takes the image and
multiplies by the style of the next layer, so activations cross the memory twice a layer. Or
:func:`~sage_fast.ops.styled_conv.styled_conv`, which does all of it before its sums leave the registers: once a layer. After
the first call nothing here waits for the device or asks it anything: a whole synthesis can be captured as a CUDA graph.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import record_function

from sage_fast.ops.cuda_convolution import CUDNN, OWN, Layer, choose, has_products
from sage_fast.ops.styled_conv import composed_weight, styled_conv
from sage_fast.ops.synthesis_epilogue import blur_epilogue, styled_epilogue

if TYPE_CHECKING:
    from sage_fast.ops.synthesis import SynthesisNetwork

__all__ = ["MAX_CHANNELS", "Prepared", "convolutions", "draw", "prepare"]

MAX_CHANNELS = 1024  # a block of 256 threads holds a pixel in vectors of 16 bytes
_MULTIPLE = 8  # channels fill whole vectors and whole tensor-core tiles; the padding meets weights of zero
_MOST_VALUES = 2**31 - 1  # of an activation: cuDNN counts in 32 bits
_MOST_SAMPLES = 65535  # of a grid of the epilogues


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
    composed: dict[int, Tensor] = field(
        default_factory=dict
    )  # weights of styled_conv, made when a layer first wants them


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
) -> Tensor:
    """The images [N, C, R, R] float32 of latents [N, L, D]; every styled layer is a range of a profiler that is on."""
    prepared, n = network.prepared(dtype), len(w_plus)
    size = 2 << len(network.images)
    if n == 0:
        return w_plus.new_empty(0, len(network.images[0].bias), size, size)
    widest = max(len(b) * ((4 << (i + 1) // 2) + 1) ** 2 for i, b in enumerate(prepared.biases))
    most = min(max(1, _MOST_VALUES // widest), _MOST_SAMPLES)
    if n > most:
        starts = range(0, n, most)
        maps = [[m if m is None or len(m) == 1 else m[i : i + most] for m in noise] for i in starts]
        return torch.cat([draw(network, w_plus[i : i + most], m, dtype) for i, m in zip(starts, maps)])
    # every cast is chosen here
    with torch.autocast(w_plus.device.type, enabled=False):
        return _draw(network, prepared, w_plus, noise, dtype)


def _draw(
    network: SynthesisNetwork,
    prepared: Prepared,
    w_plus: Tensor,
    noise: Sequence[Tensor | None],
    dtype: torch.dtype,
) -> Tensor:
    named = torch.autograd._profiler_enabled()  # a range takes microseconds even where nobody listens
    styles, factors, image_weights = _modulation(prepared, w_plus)
    rule = (network.slope, network.gain, -1.0 if network.clamp is None else network.clamp)
    last = len(network.layers) - 1
    x = prepared.input * styles[0, :, : prepared.input.shape[1], None, None]
    x = x.permute(0, 2, 3, 1).to(dtype).contiguous()
    keys = convolutions(prepared, len(x), dtype)
    image: Tensor | None = None
    for i, layer in enumerate(network.layers):
        map_ = noise[i]
        map_ = None if map_ is None else map_.to(w_plus).contiguous()
        following = None if i == last else styles[i + 1]
        behind = (factors[i], prepared.biases[i], map_, layer.strength, following)
        to_image = None if i % 2 == 1 else (image_weights[i // 2], network.images[i // 2].bias, image)
        with record_function("conv1" if i == 0 else f"convs.{i - 1}") if named else nullcontext():
            ways = _ways(network, prepared, i, x, behind, to_image, rule)
            x, new = ways[choose(keys[i], ways)]()
        image = image if new is None else new
    assert image is not None
    return image


def convolutions(prepared: Prepared, n: int, dtype: torch.dtype) -> list[Layer]:
    """What the choice of each styled layer's convolution depends on, for ``n`` samples."""
    device, sizes = prepared.input.device, [prepared.input.shape[1], *map(len, prepared.biases)]
    return [
        Layer(device, dtype, n, 4 << (i + 1) // 2, c_in, c_out, i % 2 == 1)
        for i, (c_in, c_out) in enumerate(zip(sizes, sizes[1:]))
    ]


def _ways(
    network: SynthesisNetwork, prepared: Prepared, i: int, x: Tensor, behind: tuple, to_image: tuple | None, rule: tuple
) -> dict[str, Callable[[], tuple[Tensor, Tensor | None]]]:
    """The ways to run styled layer ``i``; each gives the activations [N, H, W, C] and, with ``to_image``, the image."""

    def by_cudnn() -> tuple[Tensor, Tensor | None]:
        wide, weight = x.permute(0, 3, 1, 2), prepared.weights[i]
        if to_image is None:
            return blur_epilogue(_channels_behind(_convolved(wide, weight, up=True)), *behind, *rule), None
        return styled_epilogue(_channels_behind(_convolved(wide, weight)), *behind, *to_image, *rule)

    def own(columns: int) -> tuple[Tensor, Tensor | None]:
        if i not in prepared.composed:
            prepared.composed[i] = _composed(network, prepared, i, x.dtype)
        for_image = (None, None, None) if to_image is None else to_image
        settings = (i % 2 == 1, *rule, columns)
        y, image = styled_conv(x, prepared.composed[i], *behind, *for_image, *settings)
        return y, None if to_image is None else image

    return {CUDNN: by_cudnn} | {way: functools.partial(own, columns) for way, columns in OWN.items()}


def _convolved(x: Tensor, weight: Tensor, up: bool = False) -> Tensor:
    """The 3 x 3 convolution [N, C, H, W] -> [N, C', H, W], or the transposed one of stride 2, the same to the bit in every call.

    Of cuDNN's transposed ones in float32 some add up in any order; which are allowed can be said for one call only by its own op.
    """
    cudnn = torch.backends.cudnn
    if not (x.is_cuda and cudnn.enabled and cudnn.is_available()):
        return F.conv_transpose2d(x, weight, stride=2) if up else F.conv2d(x, weight, padding=1)
    how = (1, cudnn.benchmark, True, has_products(torch.float32))  # groups, benchmark, deterministic, TF32
    if up:
        return torch.ops.aten.cudnn_convolution_transpose(x, weight, [0, 0], [0, 0], [2, 2], [1, 1], *how)
    return torch.ops.aten.cudnn_convolution(x, weight, [1, 1], [1, 1], [1, 1], *how)


def _composed(network: SynthesisNetwork, prepared: Prepared, i: int, dtype: torch.dtype) -> Tensor:
    weight, c_out = network.layers[i].weight, len(prepared.biases[i])
    scaled = _pad(weight, c_out, _padded(weight.shape[1]), 3, 3) / prepared.weight_scales[i].view(-1, 1, 1, 1)[:c_out]
    return composed_weight(scaled, i % 2 == 1, dtype)


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
