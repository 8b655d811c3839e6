"""The StyleGAN2 generator: mapping network and modulated synthesis.

Implements Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" [StyleGAN2], Fig. 2 (d) and Fig. 7.
Attribute names, and so state-dict keys, are those of the common PyTorch port (``style.1.weight``,
``convs.0.conv.modulation.weight``, ``noises.noise_0``, ...), so its checkpoints load without renaming. The arithmetic is
in :mod:`sage_fast.ops`: weights are shared by the batch, the style scales activations and demodulation scales outputs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from sage_fast.errors import InputError, SageFastWarning
from sage_fast.models.discriminator import Discriminator
from sage_fast.models.inference import choose_road, fused_network, wanted_dtype
from sage_fast.models.stylegan2_layers import (
    CONNECTIONS,
    ConstantInput,
    MappingNetwork,
    StyledConv,
    ToRGB,
    UpSkip,
    channel_list,
    check_channels,
    check_choice,
    check_positive,
    check_resolution,
    exact,
    normal,
    sparing,
    wide,
)
from sage_fast.ops.inputs import require_floats, require_same_device
from sage_fast.ops.synthesis import check_noise_map
from sage_fast.ops.synthesis import synthesis as fused_synthesis

__all__ = ["Discriminator", "Generator", "MappingNetwork", "StyledConv", "ToRGB", "n_latent_of", "truncate"]

Noise = Literal["const", "none", "random"] | Sequence[Tensor]


def n_latent_of(resolution: int) -> int:
    """Number of styles L = 2 log2(resolution) - 2 of a generator: 8 at 32 px, 14 at 256 px, 18 at 1024 px."""
    return 2 * (check_resolution(resolution).bit_length() - 1) - 2


def truncate(w: Tensor, latent_avg: Tensor, psi: float) -> Tensor:
    """Pull latents towards their mean: ``latent_avg + psi (w - latent_avg)``; [N, D] or [N, L, D], any ``psi`` (1: no change)."""
    return latent_avg + psi * (w - latent_avg)


class Generator(nn.Module):
    """StyleGAN2 generator: z -> w (``mapping``), w_plus -> images (``synthesis``).

    Args:
        resolution: image height and width in pixels, a power of two from 4 to 1024.
        style_dim: D, width of ``z`` and ``w``.
        n_mapping: number of fully connected layers of the mapping network.
        n_channels: image channels, 1 to 4.
        channel_base, channel_max: feature maps at resolution r are ``min(channel_base // r, channel_max)``.
        c_dim: length of the class label vector (0: unconditional).
        mapping_lr_mul: learning-rate multiplier of the mapping network.
        channels: feature maps at 4, 8, ..., ``resolution``; given, it replaces ``channel_base`` and ``channel_max``.
        connections: what joins the resolutions ([StyleGAN2], Fig. 7): "skip" (an image at each, upsampled and added),
            "resnet" (residual blocks, one image at the end) or "orig" (one image at the end).
        clamp: bound of every activation and of what a resolution adds to the image, as networks with float16 layers have
            it; None: no bound.
        z_dim: width of ``z`` (default: ``style_dim``).
        mapping_width: of the mapping's inner layers (default: ``style_dim``).
        embed_dim: width of the embedded label (default: ``style_dim``).
    """

    latent_avg: Tensor

    def __init__(
        self,
        resolution: int,
        style_dim: int = 512,
        n_mapping: int = 8,
        n_channels: int = 3,
        channel_base: int = 32768,
        channel_max: int = 512,
        c_dim: int = 0,
        mapping_lr_mul: float = 0.01,
        channels: Sequence[int] | None = None,
        connections: Literal["skip", "resnet", "orig"] = "skip",
        clamp: float | None = None,
        z_dim: int | None = None,
        mapping_width: int | None = None,
        embed_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.resolution = check_resolution(resolution)
        self.style_dim = check_positive("style_dim", style_dim)
        self.n_mapping, self.mapping_lr_mul = check_positive("n_mapping", n_mapping), mapping_lr_mul
        self.n_channels, self.c_dim = check_channels(n_channels), c_dim
        self.n_latent = n_latent_of(resolution)
        self.channels = channel_list(resolution, channel_base, channel_max, channels)

        self.connections, self.clamp = check_choice("connections", connections, CONNECTIONS), clamp
        self.z_dim, self.mapping_width, self.embed_dim = z_dim, mapping_width, embed_dim

        self.style = MappingNetwork(style_dim, n_mapping, c_dim, mapping_lr_mul, z_dim, embed_dim, mapping_width)
        self.input = ConstantInput(self.channels[0])
        self.conv1 = StyledConv(self.channels[0], self.channels[0], style_dim, clamp=clamp)
        self.to_rgb1 = None
        if connections == "skip" or resolution == 4:
            self.to_rgb1 = ToRGB(self.channels[0], n_channels, style_dim, upsample=False, clamp=clamp)
        self.convs, self.to_rgbs = nn.ModuleList(), nn.ModuleList()
        for c_in, c_out in zip(self.channels, self.channels[1:]):
            self.convs.append(StyledConv(c_in, c_out, style_dim, up=2, clamp=clamp))
            self.convs.append(StyledConv(c_out, c_out, style_dim, clamp=clamp))
            if connections == "skip":
                self.to_rgbs.append(ToRGB(c_out, n_channels, style_dim, clamp=clamp))
        if self.to_rgb1 is None:
            self.to_rgbs.append(ToRGB(self.channels[-1], n_channels, style_dim, upsample=False, clamp=clamp))
        if connections == "resnet":
            self.skips = nn.ModuleList(UpSkip(c_in, c_out) for c_in, c_out in zip(self.channels, self.channels[1:]))
        self.noises = nn.Module()
        for i in range(self.n_latent - 1):
            size = 4 << ((i + 1) // 2)
            self.noises.register_buffer(f"noise_{i}", normal(1, 1, size, size))
        self.register_buffer("latent_avg", torch.zeros(style_dim))
        self.register_load_state_dict_post_hook(_fill_latent_avg)

    def architecture(self) -> dict[str, object]:
        """The constructor's arguments, as plain numbers and lists, that rebuild this network."""
        names = ("resolution", "style_dim", "n_mapping", "n_channels", "c_dim", "mapping_lr_mul", "channels")
        usual = {"connections": "skip", "clamp": None, "z_dim": None, "mapping_width": None, "embed_dim": None}
        special = {name: getattr(self, name) for name, value in usual.items() if getattr(self, name) != value}
        return {name: getattr(self, name) for name in names} | special

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Generator:
        """``to`` and its like: 16 bits are for large 3 x 3 kernels alone."""
        return super()._apply(sparing(fn), recurse)

    def mapping(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        """Map prior samples ``z`` [N, D or ``z_dim``] (and labels ``c`` [N, c_dim]) to absolute latents ``w`` [N, D]."""
        return self.style(z, c)

    def broadcast(self, w: Tensor) -> Tensor:
        """Repeat ``w`` [N, D] once per layer: [N, L, D]."""
        return w.unsqueeze(1).expand(-1, self.n_latent, -1)

    @torch.no_grad()
    def mean_latent(self, n: int = 10_000, seed: int = 0) -> Tensor:
        """Mean of ``mapping`` over ``n`` prior samples drawn on the CPU with ``seed``, the labels taken in turn: [D]."""
        like, rng, cpu = self.input.input, torch.Generator("cpu").manual_seed(seed), torch.device("cpu")
        z = torch.randn(n, self.style.z_dim, generator=rng, dtype=torch.float32, device=cpu).to(like)
        labels = None
        if self.c_dim:
            labels = nn.functional.one_hot(torch.arange(n, device=cpu) % self.c_dim, self.c_dim).to(like)
        return self.mapping(z, labels).mean(0)

    def synthesis(self, w_plus: Tensor, noise: Noise = "const", rng: torch.Generator | None = None) -> Tensor:
        """Draw images from one absolute latent per layer.

        Args:
            w_plus: [N, L, D] absolute latents (``latent_avg`` included), or [N, D] for the same one in every layer.
            noise: ``"const"`` the stored maps, ``"none"``, ``"random"`` fresh maps from ``rng`` (default: torch's own
                generator), or L - 1 tensors [N or 1, 1, h, w], None for a layer without.
        Returns:
            Images [N, C, H, W], nominally in [-1, 1] (not clamped).
        Raises:
            InputError: ``w_plus`` has another number of styles or another width, or it or the noise is no tensor of floating
                point where the network is.
        """
        if isinstance(w_plus, Tensor) and w_plus.ndim == 2:
            w_plus = self.broadcast(w_plus)
        self.check_w_plus(w_plus)
        require_floats("w_plus", w_plus, 3, f"[N, {self.n_latent}, {self.style_dim}]")
        require_same_device("w_plus", w_plus, self.input.input, "the network")
        maps = self._noise_maps(noise, w_plus, rng)
        if choose_road(self, w_plus, maps)[0] == "fused":
            dtype = wanted_dtype(w_plus.device, self.conv1.conv.weight.dtype)
            return fused_synthesis(fused_network(self), w_plus.float(), maps, dtype=dtype).to(w_plus.dtype)
        with exact(w_plus.device.type):
            images = self._layer_by_layer(wide(w_plus).unbind(1), maps)
        return images if torch.is_grad_enabled() else images.to(w_plus.dtype)

    def forward(self, w_plus: Tensor, noise: Noise = "const", rng: torch.Generator | None = None) -> Tensor:
        """The same as :meth:`synthesis`."""
        return self.synthesis(w_plus, noise, rng)

    def _layer_by_layer(self, w: Sequence[Tensor], maps: Sequence[Tensor | None]) -> Tensor:
        """The synthesis by differentiable layers; w: L latents [N, D]."""
        x = wide(self.input(w[0].shape[0]))  # len() would make it a number for torch.export
        x = x.to(w[0].dtype) if w[0].dtype == self.conv1.conv.weight.dtype else x
        x = self.conv1(x, w[0], maps[0])
        image = None if self.to_rgb1 is None else self.to_rgb1(x, w[1])
        for i in range(len(self.channels) - 1):
            before = x
            x = self.convs[2 * i](x, w[2 * i + 1], maps[2 * i + 1])
            x = self.convs[2 * i + 1](x, w[2 * i + 2], maps[2 * i + 2])
            if self.connections == "resnet":
                x = (x + self.skips[i](before)) * math.sqrt(0.5)
            if self.connections == "skip":
                image = self.to_rgbs[i](x, w[2 * i + 3], image)
        return self.to_rgbs[-1](x, w[-1]) if image is None else image

    def check_w_plus(self, w_plus: Tensor) -> None:
        """Raise InputError unless ``w_plus`` has one latent for each layer: [N, L, D]."""
        if not isinstance(w_plus, Tensor):
            raise InputError(f"w_plus must be a tensor of latents, got {type(w_plus).__name__}.")
        if w_plus.ndim != 3 or w_plus.shape[1:] != (self.n_latent, self.style_dim):
            raise InputError(
                f"w_plus must have shape [N, {self.n_latent}, {self.style_dim}] for this {self.resolution} px generator, "
                f"got {list(w_plus.shape)}; use latents of the encoder that was trained with it."
            )

    def _noise_maps(self, noise: Noise, like: Tensor, rng: torch.Generator | None) -> Sequence[Tensor | None]:
        n_maps = self.n_latent - 1
        mode = noise if isinstance(noise, str) else None  # an array would be compared number by number
        if mode == "none":
            return [None] * n_maps
        stored = [getattr(self.noises, f"noise_{i}") for i in range(n_maps)]
        if mode == "const":
            return stored
        if mode == "random":
            if rng is not None and (not isinstance(rng, torch.Generator) or rng.device.type != like.device.type):
                raise InputError(f"rng must be a torch.Generator on {like.device}, as w_plus is, got {rng!r:.60}.")
            shapes = [(like.shape[0], *m.shape[1:]) for m in stored]
            return [torch.randn(s, generator=rng, device=like.device, dtype=like.dtype) for s in shapes]
        if not isinstance(noise, (list, tuple)) or len(noise) != n_maps:
            raise InputError(
                f"noise must be 'const', 'none', 'random' or {n_maps} tensors [N, 1, h, w], got {noise!r:.60}."
            )
        for i, map_ in enumerate(noise):
            check_noise_map(i, map_, like)
        return noise


def _fill_latent_avg(module: nn.Module, incompatible_keys) -> None:
    """Files of the common port keep ``latent_avg`` outside the weights, or nowhere: take the mapping's mean instead."""
    missing = [key for key in incompatible_keys.missing_keys if key.rpartition(".")[2] == "latent_avg"]
    if missing and isinstance(module, Generator):
        for key in missing:
            incompatible_keys.missing_keys.remove(key)
        if incompatible_keys.missing_keys:
            return  # there is no mapping to ask
        module.latent_avg = module.mean_latent()
        warnings.warn(
            "the weights have no latent_avg; the mean of the mapping over 10,000 samples of seed 0 stands in for it.",
            SageFastWarning,
            stacklevel=2,
        )
