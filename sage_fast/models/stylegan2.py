"""StyleGAN2: mapping network, modulated synthesis with skip connections, and the residual discriminator.

Implements Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" [StyleGAN2], Fig. 2 (d) and Fig. 7.
Attribute names, and so state-dict keys, are those of the common PyTorch port (``style.1.weight``,
``convs.0.conv.modulation.weight``, ``noises.noise_0``, ...), so its checkpoints load without renaming. The arithmetic is
in :mod:`sage_fast.ops`: weights are shared by the batch, the style scales activations and demodulation scales outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sage_fast.errors import InputError
from sage_fast.models.inference import choose_road, fused_network, wanted_dtype
from sage_fast.ops import bias_act, modulated_conv2d, upfirdn2d
from sage_fast.ops.conv3x3 import conv3x3
from sage_fast.ops.synthesis import synthesis as fused_synthesis

__all__ = ["Discriminator", "Generator", "MappingNetwork", "StyledConv", "ToRGB", "n_latent_of", "truncate"]

Noise = Literal["const", "none", "random"] | Sequence[Tensor]
_FIR = (1.0, 3.0, 3.0, 1.0)  # the resampling filter of [StyleGAN2], appendix B
_MIN_RESOLUTION, _MAX_RESOLUTION = 4, 1024


def n_latent_of(resolution: int) -> int:
    """Number of styles L = 2 log2(resolution) - 2 of a generator: 8 at 32 px, 14 at 256 px, 18 at 1024 px."""
    return 2 * (_check_resolution(resolution).bit_length() - 1) - 2


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
    ) -> None:
        super().__init__()
        self.resolution = _check_resolution(resolution)
        self.style_dim = _check_positive("style_dim", style_dim)
        self.n_mapping, self.mapping_lr_mul = _check_positive("n_mapping", n_mapping), mapping_lr_mul
        self.n_channels, self.c_dim = _check_channels(n_channels), c_dim
        self.n_latent = n_latent_of(resolution)
        self.channels = _channel_list(resolution, channel_base, channel_max, channels)

        self.style = MappingNetwork(style_dim, n_mapping, c_dim, mapping_lr_mul)
        self.input = _ConstantInput(self.channels[0])
        self.conv1 = StyledConv(self.channels[0], self.channels[0], style_dim)
        self.to_rgb1 = ToRGB(self.channels[0], n_channels, style_dim, upsample=False)
        self.convs, self.to_rgbs = nn.ModuleList(), nn.ModuleList()
        for c_in, c_out in zip(self.channels, self.channels[1:]):
            self.convs.append(StyledConv(c_in, c_out, style_dim, up=2))
            self.convs.append(StyledConv(c_out, c_out, style_dim))
            self.to_rgbs.append(ToRGB(c_out, n_channels, style_dim))
        self.noises = nn.Module()
        for i in range(self.n_latent - 1):
            size = 4 << ((i + 1) // 2)
            self.noises.register_buffer(f"noise_{i}", torch.randn(1, 1, size, size))
        self.register_buffer("latent_avg", torch.zeros(style_dim))
        self.register_load_state_dict_post_hook(_fill_latent_avg)

    def architecture(self) -> dict[str, object]:
        """The constructor's arguments, as plain numbers and lists, that rebuild this network."""
        names = ("resolution", "style_dim", "n_mapping", "n_channels", "c_dim", "mapping_lr_mul", "channels")
        return {name: getattr(self, name) for name in names}

    def mapping(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        """Map prior samples ``z`` [N, D] (and labels ``c`` [N, c_dim]) to absolute latents ``w`` [N, D]."""
        return self.style(z, c)

    def broadcast(self, w: Tensor) -> Tensor:
        """Repeat ``w`` [N, D] once per layer: [N, L, D]."""
        return w.unsqueeze(1).expand(-1, self.n_latent, -1)

    @torch.no_grad()
    def mean_latent(self, n: int = 10_000, seed: int = 0) -> Tensor:
        """Mean of ``mapping`` over ``n`` prior samples drawn on the CPU with ``seed``: [D]. Unconditional networks only."""
        if self.c_dim:
            raise InputError(
                "mean_latent needs an unconditional generator, got c_dim > 0; store latent_avg with the weights."
            )
        z = torch.randn(n, self.style_dim, generator=torch.Generator().manual_seed(seed))
        return self.mapping(z.to(self.latent_avg)).mean(0)

    def synthesis(self, w_plus: Tensor, noise: Noise = "const", rng: torch.Generator | None = None) -> Tensor:
        """Draw images from one absolute latent per layer.

        Args:
            w_plus: [N, L, D] absolute latents (``latent_avg`` included), or [N, D] for the same one in every layer.
            noise: ``"const"`` the stored maps, ``"none"``, ``"random"`` fresh maps from ``rng`` (default: torch's own
                generator), or L - 1 tensors [N or 1, 1, h, w].
        Returns:
            Images [N, C, H, W], nominally in [-1, 1] (not clamped).
        Raises:
            InputError: ``w_plus`` has another number of styles or another width.
        """
        if w_plus.ndim == 2:
            w_plus = self.broadcast(w_plus)
        self._check_w_plus(w_plus)
        maps = self._noise_maps(noise, w_plus, rng)
        if choose_road(self, w_plus, maps)[0] == "fused":
            return fused_synthesis(fused_network(self), w_plus, maps, dtype=wanted_dtype(w_plus.device))
        w = w_plus.unbind(1)
        x = self.conv1(self.input(len(w_plus)), w[0], maps[0])
        image = self.to_rgb1(x, w[1])
        for i, to_rgb in enumerate(self.to_rgbs):
            x = self.convs[2 * i](x, w[2 * i + 1], maps[2 * i + 1])
            x = self.convs[2 * i + 1](x, w[2 * i + 2], maps[2 * i + 2])
            image = to_rgb(x, w[2 * i + 3], image)
        return image

    def forward(self, w_plus: Tensor, noise: Noise = "const", rng: torch.Generator | None = None) -> Tensor:
        """The same as :meth:`synthesis`."""
        return self.synthesis(w_plus, noise, rng)

    def _check_w_plus(self, w_plus: Tensor) -> None:
        if w_plus.ndim != 3 or w_plus.shape[1:] != (self.n_latent, self.style_dim):
            raise InputError(
                f"w_plus must have shape [N, {self.n_latent}, {self.style_dim}] for this {self.resolution} px generator, "
                f"got {list(w_plus.shape)}; use latents of the encoder that was trained with it."
            )

    def _noise_maps(self, noise: Noise, like: Tensor, rng: torch.Generator | None) -> Sequence[Tensor | None]:
        n_maps = self.n_latent - 1
        if noise == "none":
            return [None] * n_maps
        stored = [getattr(self.noises, f"noise_{i}") for i in range(n_maps)]
        if noise == "const":
            return stored
        if noise == "random":
            shapes = [(len(like), *m.shape[1:]) for m in stored]
            return [torch.randn(s, generator=rng, device=like.device, dtype=like.dtype) for s in shapes]
        if isinstance(noise, str) or len(noise) != n_maps:
            raise InputError(
                f"noise must be 'const', 'none', 'random' or {n_maps} tensors [N, 1, h, w], got {noise!r:.60}."
            )
        return noise


class MappingNetwork(nn.Sequential):
    """z (and label) -> w: normalisation, then ``n_layers`` fully connected layers with leaky ReLU.

    Keys are ``1.weight``, ``1.bias``, ... (index 0 is the normalisation); a conditional network has ``embed`` beside them.
    """

    def __init__(self, style_dim: int, n_layers: int, c_dim: int = 0, lr_mul: float = 0.01) -> None:
        widths = [style_dim * (2 if c_dim else 1)] + [style_dim] * n_layers
        layers = [_Linear(a, b, lr_mul=lr_mul, act="lrelu") for a, b in zip(widths, widths[1:])]
        super().__init__(_Normalize(), *layers)
        self.n_layers, self.c_dim, self.style_dim = n_layers, c_dim, style_dim
        self.embed = _Linear(c_dim, style_dim) if c_dim else None

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if z.ndim != 2 or z.shape[1] != self.style_dim:
            raise InputError(f"z must have shape [N, {self.style_dim}], got {list(z.shape)}.")
        _check_label(c, self.c_dim, len(z))
        x = self[0](z)
        if self.embed is not None:
            x = torch.cat([x, self[0](self.embed(c))], dim=1)
        for i in range(1, self.n_layers + 1):
            x = self[i](x)
        return x


class StyledConv(nn.Module):
    """Modulated 3 x 3 convolution, noise, bias and leaky ReLU times sqrt(2); ``up=2`` doubles the size."""

    def __init__(self, c_in: int, c_out: int, style_dim: int, up: int = 1) -> None:
        super().__init__()
        self.conv = _ModulatedConv(c_in, c_out, 3, style_dim, demodulate=True, up=up)
        self.noise = _NoiseStrength()
        self.activate = _BiasAct(c_out)

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        """x [N, C_in, H, W], w [N, D], noise [N or 1, 1, up H, up W] or None -> [N, C_out, up H, up W]."""
        return self.activate(self.noise(self.conv(x, w), noise))


class ToRGB(nn.Module):
    """Modulated 1 x 1 convolution to image channels, added to the upsampled image of the previous resolution."""

    def __init__(self, c_in: int, n_channels: int, style_dim: int, upsample: bool = True) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, n_channels, 1, 1))
        self.conv = _ModulatedConv(c_in, n_channels, 1, style_dim, demodulate=False)
        if upsample:
            self.upsample = _Resample(up=2, padding=(2, 1, 2, 1))

    def forward(self, x: Tensor, w: Tensor, skip: Tensor | None = None) -> Tensor:
        """x [N, C, H, W], w [N, D], skip [N, 3, H/2, W/2] or None -> [N, 3, H, W]."""
        image = self.conv(x, w) + self.bias
        return image if skip is None else image + self.upsample(skip)


class Discriminator(nn.Module):
    """Residual StyleGAN2 discriminator with minibatch standard deviation; arguments as :class:`Generator`'s.

    ``mbstd_group`` images share a standard deviation; a batch it does not divide uses its largest divisor below.
    With ``c_dim`` the logit is the projection on an embedded label, as in Miyato and Koyama (2018).
    """

    def __init__(
        self,
        resolution: int,
        n_channels: int = 3,
        channel_base: int = 32768,
        channel_max: int = 512,
        c_dim: int = 0,
        mbstd_group: int = 4,
        channels: Sequence[int] | None = None,
        n_mapping: int = 8,
    ) -> None:
        super().__init__()
        self.resolution, self.n_channels, self.c_dim = _check_resolution(resolution), _check_channels(n_channels), c_dim
        self.mbstd_group, self.n_mapping = _check_positive("mbstd_group", mbstd_group), n_mapping
        self.channels = _channel_list(resolution, channel_base, channel_max, channels)
        widths = self.channels[::-1]
        blocks = [_DownBlock(a, b) for a, b in zip(widths, widths[1:])]
        self.convs = nn.Sequential(nn.Sequential(_Conv(n_channels, widths[0], 1), _BiasAct(widths[0])), *blocks)
        width, embed = widths[-1], widths[-1] if c_dim else 1
        self.final_conv = nn.Sequential(_Conv(width + 1, width, 3), _BiasAct(width))
        self.final_linear = nn.Sequential(_Linear(width * 16, width, act="lrelu"), _Linear(width, embed))
        self.embed = nn.Sequential(_Linear(c_dim, embed), MappingNetwork(embed, n_mapping)) if c_dim else None

    def architecture(self) -> dict[str, object]:
        """The constructor's arguments, as plain numbers and lists, that rebuild this network."""
        names = ("resolution", "n_channels", "c_dim", "mbstd_group", "channels", "n_mapping")
        return {name: getattr(self, name) for name in names}

    def features(self, images: Tensor) -> list[Tensor]:
        """Feature maps [N, C_r, r, r] for r = resolution, resolution / 2, ..., 4."""
        self._check_images(images)
        first, *blocks = self.convs
        maps = [first(images.contiguous(memory_format=torch.channels_last))]
        for block in blocks:
            maps.append(block(maps[-1]))
        return maps

    def forward(self, images: Tensor, c: Tensor | None = None) -> Tensor:
        """Logits [N, 1] of images [N, C, H, W] (and labels ``c`` [N, c_dim]); large means real."""
        self._check_images(images)
        _check_label(c, self.c_dim, len(images))
        images = images.contiguous(memory_format=torch.channels_last)
        x = self.final_conv(_append_stddev(self.convs(images), self.mbstd_group))
        x = self.final_linear(x.flatten(1))
        if self.embed is None:
            return x
        return (x * self.embed(c)).sum(1, keepdim=True) / math.sqrt(x.shape[1])

    def _check_images(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1:] != (self.n_channels, self.resolution, self.resolution):
            size = self.resolution
            raise InputError(
                f"images must have shape [N, {self.n_channels}, {size}, {size}], got {list(images.shape)}."
            )


class _ModulatedConv(nn.Module):
    """Weight [1, C_out, C_in, k, k] (unit variance, scaled at run time) and the affine map from w to the style."""

    def __init__(self, c_in: int, c_out: int, kernel: int, style_dim: int, demodulate: bool, up: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, c_out, c_in, kernel, kernel))
        self.modulation = _Linear(style_dim, c_in, bias_init=1.0)
        self.scale, self.demodulate, self.up = 1 / math.sqrt(c_in * kernel**2), demodulate, up
        if up == 2:
            self.blur = _Resample(up=2)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style = self.modulation(w)
        # the op applies the gain up^2 itself; the stored kernel has it folded in, as the common port's files do
        fir = self.blur.kernel / 4 if self.up == 2 else None
        weight = self.weight * self.scale
        # [N, ...] where each sample has its own (models.weight_deltas); one that all share is a good deal faster
        weight = weight if len(weight) == len(x) > 1 else weight[0]
        return modulated_conv2d(x, weight, style, demodulate=self.demodulate, up=self.up, resample_filter=fir)


class _DownBlock(nn.Module):
    """Two convolutions, the second with stride 2 behind a blur, and a 1 x 1 skip; (a + b) / sqrt(2)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(_Conv(c_in, c_in, 3), _BiasAct(c_in))
        self.conv2 = nn.Sequential(_Resample(padding=(2, 2, 2, 2)), _Conv(c_in, c_out, 3, stride=2), _BiasAct(c_out))
        self.skip = nn.Sequential(_Resample(down=2, padding=(1, 1, 1, 1)), _Conv(c_in, c_out, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv2(self.conv1(x)) + self.skip(x)) * math.sqrt(0.5)


class _Linear(nn.Module):
    """Fully connected layer with weights stored at unit variance and scaled at run time (equalised learning rate)."""

    def __init__(self, d_in: int, d_out: int, bias_init: float = 0.0, lr_mul: float = 1.0, act: str = "linear") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in) / lr_mul)
        self.bias = nn.Parameter(torch.full([d_out], float(bias_init)))
        self.scale, self.lr_mul, self.act = lr_mul / math.sqrt(d_in), lr_mul, act

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias * self.lr_mul if self.lr_mul != 1 else self.bias
        if self.act == "linear":
            return F.linear(x, self.weight * self.scale, bias)
        return bias_act(F.linear(x, self.weight * self.scale), bias, act=self.act)


class _Conv(nn.Module):
    """Convolution without bias, weights scaled at run time; odd kernels, padded only at stride 1."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in, kernel, kernel))
        self.scale, self.stride = 1 / math.sqrt(c_in * kernel**2), stride
        self.padding = kernel // 2 if stride == 1 else 0

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1 and self.padding == 1:
            return conv3x3(x, self.weight * self.scale)
        return F.conv2d(x, self.weight * self.scale, stride=self.stride, padding=self.padding)


class _Resample(nn.Module):
    """FIR filter [1, 3, 3, 1] x [1, 3, 3, 1], up- or downsampling; ``kernel`` [4, 4] includes the gain up^2."""

    kernel: Tensor

    def __init__(self, up: int = 1, down: int = 1, padding: tuple[int, int, int, int] = (0, 0, 0, 0)) -> None:
        super().__init__()
        taps = torch.tensor(_FIR)
        self.register_buffer("kernel", torch.outer(taps, taps) / taps.sum() ** 2 * up**2)
        self.up, self.down, self.padding = up, down, padding

    def forward(self, x: Tensor) -> Tensor:
        return upfirdn2d(x, self.kernel, up=self.up, down=self.down, padding=self.padding)


class _BiasAct(nn.Module):
    """Bias and leaky ReLU times sqrt(2)."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor) -> Tensor:
        return bias_act(x, self.bias, act="lrelu")


class _NoiseStrength(nn.Module):
    """Adds ``weight * noise``; one learned strength per layer, zero at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, noise: Tensor | None) -> Tensor:
        return x if noise is None else x + self.weight * noise


class _ConstantInput(nn.Module):
    """The learned 4 x 4 input of the synthesis network."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, channels, 4, 4))

    def forward(self, n: int) -> Tensor:
        # channels last from here on: a fifth faster on a CPU, and what tensor cores want
        return self.input.expand(n, -1, -1, -1).contiguous(memory_format=torch.channels_last)


class _Normalize(nn.Module):
    """Scale each row to unit mean square."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


def _append_stddev(x: Tensor, group: int) -> Tensor:
    """Append a map with the standard deviation over groups of the batch: [N, C, H, W] -> [N, C + 1, H, W]."""
    n, c, h, w = x.shape
    group = next((g for g in range(min(group, n), 0, -1) if n % g == 0), 1)
    std = (x.reshape(group, -1, c, h, w).var(0, unbiased=False) + 1e-8).sqrt().mean([1, 2, 3])  # [N / group]
    return torch.cat([x, std.repeat(group).view(n, 1, 1, 1).expand(n, 1, h, w)], dim=1)


def _fill_latent_avg(module: nn.Module, incompatible_keys) -> None:
    """Files of the common port keep ``latent_avg`` outside the weights, or nowhere: take the mapping's mean instead."""
    missing = [key for key in incompatible_keys.missing_keys if key.rpartition(".")[2] == "latent_avg"]
    if missing and isinstance(module, Generator):
        for key in missing:
            incompatible_keys.missing_keys.remove(key)
        if not module.c_dim:
            module.latent_avg.copy_(module.mean_latent())


def _channel_list(resolution: int, base: int, most: int, channels: Sequence[int] | None) -> list[int]:
    sizes = [4 << i for i in range(resolution.bit_length() - 2)]
    if channels is None:
        return [max(1, min(base // size, most)) for size in sizes]
    if len(channels) != len(sizes) or min(channels) < 1:
        raise InputError(f"channels must be {len(sizes)} positive numbers, for {sizes} px, got {list(channels)}.")
    return [int(c) for c in channels]


def _check_resolution(resolution: int) -> int:
    if not _MIN_RESOLUTION <= resolution <= _MAX_RESOLUTION or resolution & (resolution - 1):
        raise InputError(
            f"resolution must be a power of two from 4 to 1024, got {resolution}; choose e.g. 32, 64 or 256."
        )
    return int(resolution)


def _check_channels(n_channels: int) -> int:
    if not 1 <= n_channels <= 4:
        raise InputError(f"n_channels must be 1 to 4, got {n_channels}.")
    return n_channels


def _check_positive(name: str, value: int) -> int:
    if value < 1:
        raise InputError(f"{name} must be at least 1, got {value}.")
    return value


def _check_label(c: Tensor | None, c_dim: int, n: int) -> None:
    if c_dim == 0 and c is None:
        return
    if c is None or c.ndim != 2 or c.shape != (n, c_dim):
        got = "none" if c is None else str(list(c.shape))
        raise InputError(f"c must have shape [{n}, {c_dim}] for this network, got {got}.")
