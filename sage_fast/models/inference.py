"""Which road a generator's synthesis takes, and its weights as the fused kernels want them.

* ``"fused"``: the whole network through fused kernels, for inference in float32 (low-precision products under autocast);
* ``"differentiable"``: layer by layer, native ops with derivatives, plain PyTorch convolutions;
* ``"reference"``: the same layers on the plain-PyTorch reference of every op, where nothing was compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.modules.module import _has_any_global_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from sage_fast import _native
from sage_fast.models.stylegan2_layers import GENERATOR_LAYERS
from sage_fast.ops.counter_normal import counter_normal
from sage_fast.ops.synthesis import ImageLayer, StyledLayer, SynthesisNetwork, has_products
from sage_fast.ops.synthesis_cuda import MAX_CHANNELS

if TYPE_CHECKING:
    from sage_fast.models.stylegan2 import Generator

__all__ = ["choose_road", "counter_noise", "fused_network", "layer_by_layer", "wanted_dtype"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_layers: ContextVar[bool] = ContextVar("layer by layer", default=False)
_Made = TypeVar("_Made")
_Key = tuple[object, ...]
_networks: WeakKeyDictionary[nn.Module, tuple[_Key, SynthesisNetwork, list[Tensor]]] = WeakKeyDictionary()
_binomial: WeakKeyDictionary[nn.Module, tuple[_Key, bool, list[Tensor]]] = WeakKeyDictionary()


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """Inside, no synthesis takes the fused road: for weights that change before the next call. On a GPU preparing them is a
    dozen small kernels a layer and a wait for the device, more than a small synthesis.
    """
    token = _layers.set(True)
    try:
        yield
    finally:
        _layers.reset(token)


def choose_road(generator: Generator, w_plus: Tensor, noise: Sequence[Tensor | None] | None = None) -> tuple[str, str]:
    """The road of ``generator.synthesis(w_plus)`` now, and the reason: the one place where this is decided.

    ``noise``: the maps that synthesis gets; the stored ones when absent.
    """
    device = w_plus.device.type
    if not _native.has_kernel("upfirdn2d", device):
        return "reference", f"there are no kernels on '{device}'"
    if not _native.has_kernel("synthesis", device):
        return "differentiable", f"the fused synthesis has no kernel on '{device}'"
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "differentiable", "a graph is being captured"
    if _layers.get():
        return "differentiable", "weights change from call to call"
    if generator.connections == "resnet":
        return "differentiable", "the fused kernels have no residual connections"
    layers = _layers_of(generator)
    if _has_any_global_hook() or not all(map(_is_plain, layers)):
        return "differentiable", "layers have hooks or were replaced"
    tensors, filters = _weights(layers), _filters(generator)
    maps = generator.noises.buffers() if noise is None else (m for m in noise if m is not None)
    if any(type(t) is not nn.Parameter for t in tensors):  # for this call, or by sharded and quantised ones
        return "differentiable", "weights were replaced"
    if torch.is_grad_enabled() and any(t.requires_grad for t in chain([w_plus], tensors, maps)):
        return "differentiable", "gradients are recorded"
    if w_plus.dtype not in _DTYPES or any(t.dtype not in _DTYPES for t in tensors):
        return "differentiable", "the fused kernels take weights and latents of at most 32 bits"
    if device != "cpu" and any(t.is_inference() for t in chain(tensors, filters)):
        return "differentiable", "weights made in inference mode do not say when they change"
    most = MAX_CHANNELS if device == "cuda" else 4096
    if max(generator.channels) > most:
        return "differentiable", f"more than {most} channels"
    if not _are_binomial(generator, filters):
        return "differentiable", "the fused kernels have the resampling filter [1, 3, 3, 1]"
    return "fused", f"no gradients, {str(generator.conv1.conv.weight.dtype).removeprefix('torch.')}"


def wanted_dtype(device: torch.device, weights: torch.dtype = torch.float32) -> torch.dtype:
    """What the fused kernels are to multiply in: autocast's choice or that of the weights, where the device has such products,
    else float32."""
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weights
    return dtype if has_products(dtype, device) else torch.float32


def counter_noise(generator: Generator, samples: Tensor, seed: int = 0) -> list[Tensor]:
    """Noise maps [N, 1, h, w] of every styled layer that depend only on ``seed`` and a sample's number (``samples``, int64 [N]).

    Given to :meth:`Generator.synthesis` as ``noise``, they make an image depend neither on its batch nor, but for rounding, on
    the device.
    """
    sizes = [4 << ((i + 1) // 2) for i in range(generator.n_latent - 1)]
    return [counter_normal(samples, seed, i, size**2).view(-1, 1, size, size) for i, size in enumerate(sizes)]


def fused_network(generator: Generator) -> SynthesisNetwork:
    """The generator's synthesis weights for :func:`sage_fast.ops.synthesis.synthesis`; made anew when a weight has changed.

    On the CPU by writes too that autograd does not see, through ``.data`` or an array, to more than a few numbers of a tensor; such
    writes elsewhere go unseen.
    """
    return _kept(_networks, generator, _weights(_layers_of(generator)), lambda: _build(generator))


@torch.no_grad()
def _build(generator: Generator) -> SynthesisNetwork:
    layers, images = [], []
    layer: Any
    for layer in chain([generator.conv1], generator.convs):
        conv = layer.conv
        strength, bias = float(layer.noise.weight), layer.activate.bias.float().clone()
        weight, rounded = _scaled(conv.weight[0], conv.scale), conv.weight.dtype != torch.float32
        layers.append(StyledLayer(weight, *_affine(conv), bias, strength, rounded))
    for to_rgb in _to_rgbs(generator):
        conv = to_rgb.conv
        weight = _scaled(conv.weight[0, :, :, 0, 0], conv.scale)
        images.append(ImageLayer(weight, *_affine(conv), to_rgb.bias.float().flatten().clone()))
    # without skip connections the smaller sizes add nothing to the image
    nothing = [_zeros(images[-1], channels) for channels in generator.channels[: -len(images)]]
    input, skips = generator.input.input.float().clone(memory_format=torch.contiguous_format), not nothing
    return SynthesisNetwork(input, layers, nothing + images, clamp=generator.clamp, skips=skips)


def _to_rgbs(generator: Generator) -> list[Any]:
    return [layer for layer in (generator.to_rgb1, *generator.to_rgbs) if layer is not None]


def _zeros(like: ImageLayer, channels: int) -> ImageLayer:
    dim = like.affine.shape[1]
    weight, affine = like.weight.new_zeros(len(like.bias), channels), like.affine.new_zeros(channels, dim)
    return ImageLayer(weight, affine, like.affine.new_zeros(channels), torch.zeros_like(like.bias))


def _affine(conv: Any) -> tuple[Tensor, Tensor]:
    """The map from w to the style: [C_in, D] and [C_in]."""
    linear = conv.modulation
    return _scaled(linear.weight, linear.scale), _scaled(linear.bias, linear.lr_mul)


def _scaled(weight: Tensor, scale: float) -> Tensor:
    return (weight.float() * scale).contiguous()


def _layers_of(generator: Generator) -> list[nn.Module]:
    """Every module that synthesis calls."""
    found: list[nn.Module] = [generator.input, generator.conv1, generator.convs, *_to_rgbs(generator)]
    for module in found:  # it grows meanwhile; ``modules()`` takes twice as long, a good part of a small synthesis
        found += [m for m in module._modules.values() if m is not None]
    return found


def _is_plain(module: nn.Module) -> bool:
    """Whether a module computes what the kernels do: it is no other than was made, and nobody listens at it or changes it."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    return not hooked and type(module) in GENERATOR_LAYERS


def _weights(layers: list[nn.Module]) -> list[Tensor]:
    return [p for module in layers for p in module._parameters.values() if p is not None]


def _filters(generator: Generator) -> list[Tensor]:
    """The resampling filters [4, 4] as a file may have set them."""
    layers: Any = generator.convs
    to_rgbs: Any = generator.to_rgbs if generator.connections == "skip" else ()
    return [layer.conv.blur.kernel for layer in layers[::2]] + [to_rgb.upsample.kernel for to_rgb in to_rgbs]


def _are_binomial(generator: Generator, filters: list[Tensor]) -> bool:
    """Whether all are [1, 3, 3, 1] x [1, 3, 3, 1] with a gain of 4; looked at again when one has changed."""

    def look() -> bool:
        taps = torch.tensor([0.25, 0.75, 0.75, 0.25], dtype=torch.float32, device="cpu")
        return all(torch.allclose(f.float().cpu(), torch.outer(taps, taps), atol=1e-6) for f in filters)

    return _kept(_binomial, generator, filters, look)


def _kept(
    cache: MutableMapping[nn.Module, tuple[_Key, _Made, list[Tensor]]],
    generator: Generator,
    tensors: list[Tensor],
    make: Callable[[], _Made],
) -> _Made:
    """What ``make`` made of ``tensors``, made anew when one has changed."""
    key, found = _key(tensors), cache.get(generator)
    if found is None or found[0] != key:
        # while they are kept, nothing else comes to lie at the addresses of a key
        found = cache[generator] = (key, make(), [t.detach() for t in tensors])
    return found[1]


def _key(tensors: list[Tensor]) -> _Key:
    """What changes with the tensors: addresses, versions and, on the CPU, where that does not wait for the device, a hash of
    a sample of their numbers: writes through ``.data``, through an array or by another process count up no version."""
    key: _Key = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
    if tensors and tensors[0].is_cpu and _native.has_kernel("synthesis", "cpu"):
        return (torch.ops.sage_fast.synthesis_fingerprint(tensors), *key)
    return key


def _count_fused_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """The fused kernels of torch's optimizers write weights without counting up their version, by which :func:`_key` knows.

    Only weights that were packed are counted up: an optimizer of other networks stays as it was.
    """
    written = [p for group in optimizer.param_groups if group.get("fused") for p in group["params"]]
    if written and _networks:
        packed = {id(p) for network in list(_networks) for p in network.parameters()}
        increment_version([p for p in written if id(p) in packed])


register_optimizer_step_post_hook(_count_fused_step)
