"""Which road a generator's synthesis takes, and its weights as the fused kernels want them.

* ``"fused"``: the whole network through fused kernels, for inference in float32 (low-precision products under autocast);
* ``"differentiable"``: layer by layer, native ops with derivatives, plain PyTorch convolutions;
* ``"reference"``: the same layers on the plain-PyTorch reference of every op, where nothing was compiled.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sage_fast import _native
from sage_fast.ops.counter_normal import counter_normal
from sage_fast.ops.synthesis import ImageLayer, StyledLayer, SynthesisNetwork, has_products
from sage_fast.ops.synthesis_cuda import MAX_CHANNELS

if TYPE_CHECKING:
    from sage_fast.models.stylegan2 import Generator

__all__ = ["choose_road", "counter_noise", "fused_network", "wanted_dtype"]

_Key = tuple[tuple[int, int], ...]
_networks: WeakKeyDictionary[nn.Module, tuple[_Key, SynthesisNetwork]] = WeakKeyDictionary()


def choose_road(generator: Generator, w_plus: Tensor) -> tuple[str, str]:
    """The road of ``generator.synthesis(w_plus)`` now, and the reason: the one place where this is decided."""
    device = w_plus.device.type
    if not _native.has_kernel("upfirdn2d", device):
        return "reference", f"there are no kernels on '{device}'"
    if not _native.has_kernel("synthesis", device):
        return "differentiable", f"the fused synthesis has no kernel on '{device}'"
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "differentiable", "a graph is being captured"
    tensors = _tensors(generator)
    if torch.is_grad_enabled() and (w_plus.requires_grad or any(t.requires_grad for t in tensors)):
        return "differentiable", "gradients are recorded"
    if w_plus.dtype != torch.float32 or any(t.dtype != torch.float32 for t in tensors):
        return "differentiable", "the fused kernels take float32 weights and latents"
    if any(t.is_inference() for t in tensors):
        return "differentiable", "weights made in inference mode do not say when they change"
    most = MAX_CHANNELS if device == "cuda" else 4096
    if max(generator.channels) > most:
        return "differentiable", f"more than {most} channels"
    return "fused", "no gradients, float32"


def wanted_dtype(device: torch.device) -> torch.dtype:
    """What the fused kernels are to multiply in: autocast's choice where the device has such products, else float32."""
    if not torch.is_autocast_enabled(device.type):
        return torch.float32
    dtype = torch.get_autocast_dtype(device.type)
    return dtype if has_products(dtype, device) else torch.float32


def counter_noise(generator: Generator, samples: Tensor, seed: int = 0) -> list[Tensor]:
    """Noise maps [N, 1, h, w] of every styled layer that depend only on ``seed`` and a sample's number (``samples``, int64 [N]).

    Given to :meth:`Generator.synthesis` as ``noise``, they make an image depend neither on its batch nor, but for rounding, on
    the device.
    """
    sizes = [4 << ((i + 1) // 2) for i in range(generator.n_latent - 1)]
    return [counter_normal(samples, seed, i, size**2).view(-1, 1, size, size) for i, size in enumerate(sizes)]


def fused_network(generator: Generator) -> SynthesisNetwork:
    """The generator's synthesis weights for :func:`sage_fast.ops.synthesis.synthesis`; made anew when a weight has changed."""
    key = tuple((t.data_ptr(), t._version) for t in _tensors(generator))
    found = _networks.get(generator)
    if found is None or found[0] != key:
        found = _networks[generator] = (key, _build(generator))
    return found[1]


@torch.no_grad()
def _build(generator: Generator) -> SynthesisNetwork:
    layers, images = [], []
    layer: Any
    to_rgb: Any
    for layer in chain([generator.conv1], generator.convs):
        conv = layer.conv
        strength = float(layer.noise.weight)
        layers.append(StyledLayer(conv.weight[0] * conv.scale, *_affine(conv), layer.activate.bias.clone(), strength))
    for to_rgb in chain([generator.to_rgb1], generator.to_rgbs):
        conv = to_rgb.conv
        weight = conv.weight[0, :, :, 0, 0] * conv.scale
        images.append(ImageLayer(weight, *_affine(conv), to_rgb.bias.flatten().clone()))
    return SynthesisNetwork(generator.input.input.clone(), layers, images)


def _affine(conv: Any) -> tuple[Tensor, Tensor]:
    """The map from w to the style: [C_in, D] and [C_in]."""
    linear = conv.modulation
    return linear.weight * linear.scale, linear.bias * linear.lr_mul


def _tensors(generator: Generator) -> list[Tensor]:
    """Everything that synthesis reads but the noise and the resampling filter, which never change."""
    todo: list[nn.Module] = [generator.input, generator.conv1, generator.to_rgb1, generator.convs, generator.to_rgbs]
    found: list[Tensor] = []
    while todo:  # by hand: ``parameters()`` takes twice as long, a good part of a small synthesis
        module = todo.pop()
        found += [p for p in module._parameters.values() if p is not None]
        todo += [m for m in module._modules.values() if m is not None]
    return found
