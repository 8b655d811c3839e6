"""Which road a generator's synthesis takes, and its weights as the fused kernels want them.

* ``"fused"``: the whole network in one native call, for inference in float32 (bfloat16 products under autocast);
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
from sage_fast.ops.synthesis import ImageLayer, StyledLayer, SynthesisNetwork, has_bf16

if TYPE_CHECKING:
    from sage_fast.models.stylegan2 import Generator

__all__ = ["choose_road", "fused_network", "wants_bf16"]

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
    if max(generator.channels) > 4096:
        return "differentiable", "more than 4096 channels"
    return "fused", "no gradients, float32"


def wants_bf16(device: torch.device) -> bool:
    """Whether autocast to bfloat16 is on and the processor multiplies bfloat16."""
    if not torch.is_autocast_enabled(device.type) or torch.get_autocast_dtype(device.type) != torch.bfloat16:
        return False
    return has_bf16(device)


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
    parts = (generator.input, generator.conv1, generator.to_rgb1, generator.convs, generator.to_rgbs)
    return [p for part in parts for p in part.parameters()]
