"""The scaled encoders, for 4 to 1024 px: images -> one latent offset per generator layer ([SAGE], Eq. 3)."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sage_fast.errors import InputError
from sage_fast.models.image_encoder import ImageEncoder, on_base
from sage_fast.models.stylegan2_layers import check_channels, check_positive, check_resolution
from sage_fast.ops.inputs import require_floats, require_same_device

__all__ = ["SLOPE", "PyramidEncoder", "conv", "trunk_layers"]

SLOPE = 0.2  # of the leaky ReLUs
_COARSE, _MIDDLE = 3, 7  # styles 0-2 read the 4 px maps, 3-6 the 8 px maps, the rest the 16 px maps (pSp, Fig. 2)


class PyramidEncoder(ImageEncoder):
    """pSp, e4e or ReStyle scaled to the resolution: residual trunk, feature pyramid, one head per style.

    Implements Eq. 3 of [SAGE] with the design of pSp (Richardson et al. 2021): the trunk halves the maps down to 4 px; coarse
    maps are added top-down to finer ones; styles 0-2, 3-6 and 7 to L - 1 are read from the 4, 8 and 16 px level. The
    heads of a level run together: one strided convolution to 4 px shared by them, one 1 x 1 convolution with a block of
    channels per style, one batched linear map. The last map starts near zero, so training starts at ``latent_avg``.

    Deviation: no ImageNet or face backbone (pSp uses an IR-SE50 with batch normalisation whose statistics drift in the released
    training); no normalisation at all, residual sums are scaled to constant variance instead.

    Args:
        resolution: image height and width, a power of two from 4 to 1024.
        n_latent: L, number of styles of the generator.
        style_dim: D, width of a style.
        n_channels: image channels, 1 to 4.
        channel_base, channel_max: as the generator's; trunk maps at resolution r have three quarters of ``channel_base // r``
            channels, at least 8 and at most ``channel_max``; the pyramid has ``channel_max // 2``.
        head_width: channels per style at 4 px before the last linear map.
        progressive: style 0 is the base and the others are added to it (e4e, Tov et al. 2021, Eq. 2).
        n_iterations: 0, or how often a reconstruction is corrected (ReStyle, Alaluf et al. 2021); ``forward`` then takes images
            and reconstructions side by side.
        n_styles: heads of a progressive encoder; layers beyond them have style 0 alone, so that 1 is an encoder into W. None: L.

    Attributes:
        stage: of a progressive encoder, the last style that adds its delta; 0 leaves the same offset in all layers.
    """

    network = "PyramidEncoder"

    def __init__(
        self,
        resolution: int,
        n_latent: int,
        style_dim: int,
        n_channels: int = 3,
        channel_base: int = 1024,
        channel_max: int = 128,
        head_width: int = 32,
        progressive: bool = False,
        n_iterations: int = 0,
        n_styles: int | None = None,
    ) -> None:
        super().__init__()
        check_resolution(resolution)
        check_channels(n_channels)
        sizes = {"n_latent": n_latent, "style_dim": style_dim, "channel_base": channel_base}
        for name, size in (sizes | {"channel_max": channel_max, "head_width": head_width}).items():
            check_positive(name, size)
        if n_iterations < 0:
            raise InputError(f"n_iterations must not be negative, got {n_iterations}.")
        self.n_styles = n_latent if n_styles is None else n_styles
        if not 1 <= self.n_styles <= n_latent or (self.n_styles < n_latent and not progressive):
            raise InputError(f"n_styles must be {n_latent}, or from 1 with progressive, got {n_styles}.")
        self.resolution, self.n_latent, self.style_dim, self.n_channels = resolution, n_latent, style_dim, n_channels
        self.channel_base, self.channel_max, self.head_width = channel_base, channel_max, head_width
        self.progressive, self.n_iterations, self.stage = progressive, n_iterations, self.n_styles - 1
        widths = _widths(resolution, channel_base, channel_max)
        n_inputs = 2 * n_channels if n_iterations else n_channels
        self.stem, self.blocks, _ = trunk_layers(n_inputs, resolution, channel_base, channel_max)

        self.levels = _split_styles(self.n_styles, min(3, len(widths)))  # styles read from 4, 8, 16 px
        width = max(8, channel_max // 2)
        self.lateral = nn.ModuleList(conv(widths[-1 - i], width, 1) for i in range(len(self.levels)))
        self.heads = nn.ModuleList(_Heads(width, n, style_dim, head_width, i) for i, n in enumerate(self.levels))

    @property
    def kind(self) -> str:
        """``"restyle"``, ``"e4e"`` or ``"psp"``."""
        return "restyle" if self.n_iterations else "e4e" if self.progressive else "psp"

    def architecture(self) -> dict[str, object]:
        """The constructor's arguments, as plain numbers, that rebuild this network."""
        names = ("resolution", "n_latent", "style_dim", "n_channels", "channel_base", "channel_max", "head_width")
        return {name: getattr(self, name) for name in (*names, "progressive", "n_iterations", "n_styles")}

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, R, R] in [-1, 1] (for ReStyle beside their reconstructions [N, 2 C, R, R]) -> offsets [N, L, D].

        Raises:
            InputError: the images are no floating-point tensor where the encoder is, or have another size or number of channels than
                it was built for.
        """
        n_inputs = self.n_channels * (2 if self.n_iterations else 1)
        expected = (n_inputs, self.resolution, self.resolution)
        require_floats("images", images, 4, f"[N, {expected[0]}, {expected[1]}, {expected[2]}]")
        if images.shape[1:] != expected:
            raise InputError(
                f"images must have shape [N, {expected[0]}, {expected[1]}, {expected[2]}] for this encoder, "
                f"got {list(images.shape)}; resize them when reading."
            )
        require_same_device("images", images, next(self.parameters()), "the encoder")
        images = images.contiguous(memory_format=torch.channels_last)  # a quarter to a half faster on a CPU
        maps = [_act(self.stem(images))]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        x, offsets = None, []
        for lateral, heads, fine in zip(self.lateral, self.heads, reversed(maps)):  # 4, 8, 16 px
            x = lateral(fine) if x is None else _top_down(x, lateral(fine))
            offsets.append(heads(x))
        styles = torch.cat(offsets, dim=1)
        return on_base(styles[:, : self.stage + 1], self.n_latent) if self.progressive else styles


class _DownBlock(nn.Module):
    """Residual block that halves the maps: 3 x 3 with stride 2, 3 x 3; skip by average pooling and 1 x 1."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1 = conv(c_in, c_out, 3, stride=2)
        self.conv2 = conv(c_out, c_out, 3)
        self.skip = conv(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = _act(self.conv2(_act(self.conv1(x))))
        return (y + self.skip(F.avg_pool2d(x, 2))) * math.sqrt(0.5)


class _Heads(nn.Module):
    """All styles of one pyramid level: maps [N, C, 4 * 2^n_down, .] -> [N, n_styles, D]."""

    def __init__(self, c_in: int, n_styles: int, style_dim: int, width: int, n_down: int) -> None:
        super().__init__()
        self.n_styles = n_styles
        self.down = nn.ModuleList(conv(c_in, c_in, 3, stride=2) for _ in range(n_down))
        self.reduce = conv(c_in, n_styles * width, 1)
        weight = torch.empty(n_styles, width * 16, style_dim)
        if not weight.is_meta:  # where drawing imports torch's compiler
            weight.normal_().mul_(0.01 / math.sqrt(width * 16))
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(n_styles, 1, style_dim))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.down:
            x = _act(conv(x))
        x = _act(self.reduce(x)).reshape(len(x), *self.weight.shape[:2])  # [N, S, width * 16]
        return torch.baddbmm(self.bias, x.transpose(0, 1), self.weight).transpose(0, 1)


def trunk_layers(
    n_inputs: int, resolution: int, channel_base: int, channel_max: int
) -> tuple[nn.Module, nn.ModuleList, int]:
    """Stem and blocks that halve the maps down to 4 px, and the channels there."""
    widths = _widths(resolution, channel_base, channel_max)
    return (
        conv(n_inputs, widths[0], 3),
        nn.ModuleList(_DownBlock(a, b) for a, b in pairwise(widths)),
        widths[-1],
    )


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Convolution with zero bias; weights keep the variance of a leaky ReLU's output (1 x 1: of the input)."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2)
    gain = nn.init.calculate_gain("leaky_relu", SLOPE) if kernel > 1 else 1.0
    if not conv.weight.is_meta:  # see _Heads
        nn.init.normal_(conv.weight, std=gain / math.sqrt(c_in * kernel**2))
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def _widths(resolution: int, channel_base: int, channel_max: int) -> list[int]:
    """Channels at ``resolution``, ..., 8, 4 px."""
    sizes = [resolution >> i for i in range(resolution.bit_length() - 2)]
    return [max(8, min(3 * channel_base // (4 * size), channel_max)) for size in sizes]


def _top_down(coarse: Tensor, fine: Tensor) -> Tensor:
    """Add the maps of the coarser level, enlarged twice, to those of the finer one."""
    return (F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False) + fine) * math.sqrt(0.5)


def _act(x: Tensor) -> Tensor:
    return F.leaky_relu(x, SLOPE)


def _split_styles(n_latent: int, n_levels: int) -> list[int]:
    """Number of styles read at 4, 8 and 16 px; the last level takes all that remain."""
    bounds = [0, _COARSE, _MIDDLE][:n_levels] + [n_latent]
    bounds = [min(b, n_latent) for b in bounds]
    return [b - a for a, b in pairwise(bounds) if b > a]
