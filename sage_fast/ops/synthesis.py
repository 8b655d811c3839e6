"""A whole StyleGAN2 synthesis network in one call, for inference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from sage_fast import _native
from sage_fast.errors import InputError
from sage_fast.ops import synthesis_cuda
from sage_fast.ops.inputs import FLOATS, require_same_device, require_tensor, seen

__all__ = [
    "ImageLayer",
    "StyledLayer",
    "SynthesisNetwork",
    "check_noise_map",
    "has_products",
    "synthesis",
    "synthesis_reference",
]


_NARROW, _WIDE = 32, 256  # channels


@dataclass(frozen=True)
class StyledLayer:
    """Modulated 3 x 3 convolution, noise, bias and leaky ReLU times sqrt(2); every second layer doubles the size first.

    ``weight`` [C_out, C_in, 3, 3], ``affine`` [C_in, D] and ``affine_bias`` [C_in] from w to the style, ``bias`` [C_out],
    ``strength`` of the noise. Weights as they act: run-time scales are multiplied in. ``rounded``: the weight had 16 bits before.
    """

    weight: Tensor
    affine: Tensor
    affine_bias: Tensor
    bias: Tensor
    strength: float
    rounded: bool = False


@dataclass(frozen=True)
class ImageLayer:
    """Modulated 1 x 1 convolution to the image: ``weight`` [C, C_in], ``affine``, ``affine_bias``, ``bias`` [C]."""

    weight: Tensor
    affine: Tensor
    affine_bias: Tensor
    bias: Tensor


@dataclass(frozen=True)
class SynthesisNetwork:
    """The numbers of a synthesis network with skip connections ([StyleGAN2], Fig. 7), float32, without gradients.

    ``input`` [1, C, 4, 4]; ``layers``: one at 4 px, then two for each doubling; ``images``: one for each size. The resampling
    filter is [1, 3, 3, 1]. ``clamp`` bounds each activation, and what each size adds to the image; None: nothing does.
    ``skips``: every size adds to the image, not the last alone.
    Packed weights are made once for each dtype and kept.
    """

    input: Tensor
    layers: Sequence[StyledLayer]
    images: Sequence[ImageLayer]
    slope: float = 0.2
    gain: float = math.sqrt(2)
    clamp: float | None = None
    skips: bool = True
    _packed: dict[torch.dtype, list[Tensor]] = field(default_factory=dict, repr=False, compare=False)
    _prepared: dict[torch.dtype, synthesis_cuda.Prepared] = field(default_factory=dict, repr=False, compare=False)

    def bears_bf16(self, i: int) -> bool:
        """Whether styled layer ``i`` may be multiplied in bfloat16 on the CPU: images are to keep 2e-2 of their largest value.

        The error of an early layer grows on its way to the image, least in wide layers; the last two sizes take half of the time.
        Narrow layers gain none. Weights that had 16 bits are not rounded a second time, and without skip connections one path
        carries every error.
        """
        width, late = self.layers[i].weight.shape[1], i >= max(3, len(self.layers) - 4)
        return self.skips and not self.layers[i].rounded and width >= (_NARROW if late else _WIDE)

    def packed(self, dtype: torch.dtype) -> list[Tensor]:
        """The CPU op's form: for each layer the transformed weights, their squares, affine map and biases."""
        if dtype not in self._packed:
            tensors = []
            for i, layer in enumerate(self.layers):
                bf16 = dtype == torch.bfloat16 and self.bears_bf16(i)
                u = torch.ops.sage_fast.synthesis_pack(layer.weight, i % 2 == 1, bf16)
                squares = layer.weight.square().sum((2, 3))
                rows = (u, squares, layer.affine, layer.affine_bias, layer.bias)
                tensors += [row.contiguous() for row in rows]
            self._packed[dtype] = tensors
        return self._packed[dtype]

    def prepared(self, dtype: torch.dtype) -> synthesis_cuda.Prepared:
        """The form of :mod:`sage_fast.ops.synthesis_cuda`."""
        if dtype not in self._prepared:
            self._prepared[dtype] = synthesis_cuda.prepare(self, dtype)
        return self._prepared[dtype]


def synthesis(
    network: SynthesisNetwork, w_plus: Tensor, noise: Sequence[Tensor | None], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draw images from one absolute latent per layer; no derivatives.

    Implements the generator of Karras et al. 2020 [StyleGAN2] with one weight for the whole batch: the style scales
    activations, demodulation scales outputs. On the CPU the 3 x 3 convolutions take 2.25 (plain, float32) multiplications a
    pixel instead of 9, by Winograd's and Toom and Cook's transforms, and each layer's epilogue is part of the way back from
    them; see ``csrc/cpu/styled_conv.inl``. On a GPU cuDNN convolves, and an epilogue a layer does the rest in one pass, or one
    kernel does both; see :mod:`sage_fast.ops.synthesis_cuda`.

    Args:
        network: weights, on the device of ``w_plus``.
        w_plus: [N, L, D] float32, L = 2 x the number of sizes.
        noise: one map [1 or N, 1, h, w] a styled layer, or None.
        dtype: of the products, whose sums are float32, where :func:`has_products`; bfloat16 on the CPU in the layers that
            bear it (:meth:`SynthesisNetwork.bears_bf16`).
    Returns:
        [N, C, R, R] float32. On the CPU the same bits for every batch size and number of threads.
    Raises:
        InputError: latents or noise that do not fit the network.
    """
    _check(network, w_plus, noise)
    if not _native.has_kernel("synthesis", w_plus.device.type):
        return synthesis_reference(network, w_plus, noise)
    _check_dtype(dtype, w_plus.device)
    if w_plus.device.type == "cuda":
        return synthesis_cuda.draw(network, w_plus, noise, dtype)
    return torch.ops.sage_fast.synthesis(*_arguments(network, w_plus, noise, dtype))


def _arguments(network: SynthesisNetwork, w_plus: Tensor, noise: Sequence[Tensor | None], dtype: torch.dtype) -> tuple:
    empty = w_plus.new_empty(0)
    layers: list[Tensor] = []
    packed = network.packed(dtype)
    for i, map_ in enumerate(noise):
        layers += packed[5 * i : 5 * i + 5]
        layers.append(empty if map_ is None else map_.to(w_plus).contiguous())
    images = [t for image in network.images for t in (image.weight, image.affine, image.affine_bias, image.bias)]
    strengths = [layer.strength for layer in network.layers]
    clamp = -1.0 if network.clamp is None else network.clamp
    return w_plus, network.input, layers, images, strengths, network.slope, network.gain, clamp


def has_products(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels of a device multiply in ``dtype``: float32, or what is faster than it there."""
    if not _native.has_kernel("synthesis", device.type):
        return False
    if device.type == "cuda":
        return dtype in (torch.float32, torch.float16) or (dtype == torch.bfloat16 and torch.cuda.is_bf16_supported())
    bf16 = dtype == torch.bfloat16 and _native.has_bf16_products()
    return dtype == torch.float32 or bf16


def _check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    if not has_products(dtype, device):
        raise InputError(
            f"dtype must be one that the kernels on '{device.type}' multiply in, got {dtype}; use torch.float32."
        )


def synthesis_reference(network: SynthesisNetwork, w_plus: Tensor, noise: Sequence[Tensor | None]) -> Tensor:
    """The same in plain PyTorch, layer by layer: shared weights, scaled activations.

    Under autocast activations stay in 16 bits: no float32 factor widens them.
    """
    _check(network, w_plus, noise)
    taps = torch.tensor([0.25, 0.75, 0.75, 0.25], dtype=w_plus.dtype, device=w_plus.device)
    fir = torch.outer(taps, taps)
    x = network.input.expand(len(w_plus), -1, -1, -1)
    image: Tensor | None = None
    for i, layer in enumerate(network.layers):
        style = F.linear(w_plus[:, i], layer.affine, layer.affine_bias)
        factor = torch.rsqrt(style.square() @ layer.weight.square().sum((2, 3)).t() + 1e-8)
        x = x * style[:, :, None, None].to(x.dtype)
        if i % 2 == 1:
            x = F.conv_transpose2d(x, layer.weight.transpose(0, 1), stride=2)
            x = F.conv2d(x, fir.expand(x.shape[1], 1, 4, 4), padding=1, groups=x.shape[1])
        else:
            x = F.conv2d(x, layer.weight, padding=1)
        x = x * factor[:, :, None, None].to(x.dtype)
        map_ = noise[i]
        if map_ is not None:
            x = x + (layer.strength * map_).to(x.dtype)
        x = F.leaky_relu(x + layer.bias.to(x.dtype).view(1, -1, 1, 1), network.slope) * network.gain
        x = x if network.clamp is None else x.clamp(-network.clamp, network.clamp)
        if i % 2 == 0:
            to_image = network.images[i // 2]
            style = F.linear(w_plus[:, i + 1], to_image.affine, to_image.affine_bias)
            new = F.conv2d(x * style[:, :, None, None].to(x.dtype), to_image.weight[:, :, None, None], to_image.bias)
            new = new if network.clamp is None else new.clamp(-network.clamp, network.clamp)
            if image is not None:
                new = new + F.conv_transpose2d(
                    image, fir.expand(image.shape[1], 1, 4, 4), stride=2, padding=1, groups=image.shape[1]
                )
            image = new
    assert image is not None
    return image


def _check(network: SynthesisNetwork, w_plus: Tensor, noise: Sequence[Tensor | None]) -> None:
    require_tensor("w_plus", w_plus)
    expected = (2 * len(network.images), network.layers[0].affine.shape[1])
    if w_plus.ndim != 3 or w_plus.shape[1:] != expected or w_plus.dtype != torch.float32:
        raise InputError(
            f"w_plus must be float32 [N, {expected[0]}, {expected[1]}] for this network, got {w_plus.dtype} {list(w_plus.shape)}."
        )
    if w_plus.device != network.input.device:
        raise InputError(f"w_plus must be on {network.input.device}, as the network is, got {w_plus.device}.")
    if len(noise) != len(network.layers):
        raise InputError(f"noise must hold {len(network.layers)} maps, one a styled layer, got {len(noise)}.")
    for i, map_ in enumerate(noise):
        check_noise_map(i, map_, w_plus)


def check_noise_map(i: int, noise: Tensor | None, w_plus: Tensor) -> None:
    """Raise InputError unless ``noise`` is a map for styled layer ``i`` and latents ``w_plus`` [N, ...], or None."""
    if noise is None:
        return
    size, n = 4 << ((i + 1) // 2), w_plus.shape[0]
    maps = isinstance(noise, Tensor) and noise.dtype in FLOATS and noise.shape[1:] == (1, size, size)
    if not maps or noise.shape[0] not in (1, n):
        raise InputError(f"noise map {i} must be floating point [1 or {n}, 1, {size}, {size}], got {seen(noise)}.")
    require_same_device(f"noise map {i}", noise, w_plus, "w_plus")


@_native.when_loaded
def _register() -> None:
    def fake(w_plus, input, layers, images, *_):
        size = 4 << (len(images) // 4 - 1)
        return w_plus.new_empty(w_plus.shape[0], images[0].shape[0], size, size)

    torch.library.register_fake("sage_fast::synthesis", fake)
