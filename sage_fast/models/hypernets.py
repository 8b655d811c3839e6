"""Hypernetworks of HyperStyle (Alaluf et al. 2022): an image beside its reconstruction -> changes of a generator's weights.

The published ones load by their names; the scaled one stands on the trunk of :class:`sage_fast.models.encoders.PyramidEncoder`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sage_fast.errors import InputError
from sage_fast.models.encoders import SLOPE, conv, trunk_layers
from sage_fast.models.image_encoder import WeightDeltas
from sage_fast.models.irse import WIDTH, EqualLinear, Trunk
from sage_fast.models.stylegan2_layers import normal

__all__ = ["PyramidHypernet", "ResNetHypernet", "config_f_shapes"]

_COARSEST = 4  # px


class PyramidHypernet(nn.Module):
    """The scaled hypernetwork, for 8 to 128 px: one number per pair of channels of every 3 x 3 convolution, of low rank.

    The changes of a layer are U V^T / sqrt(rank) with U [C_out, rank] and V [C_in, rank] read from the 4 px maps. U starts at
    zero, so training starts at the generator as it is.

    Deviation: the paper predicts every number by a linear map, and shares a map among its many layers of 512 channels; at
    32 px a low rank does that service. Like its final model, ToRGB layers stay as they are.

    Args:
        resolution: of the images, a power of two from 8.
        shapes: C_out, C_in and k of the generator's modulated convolutions (``weight_deltas.weight_shapes``).
        n_channels: of the images; the network reads twice as many.
        channel_base, channel_max: of the trunk, as of ``PyramidEncoder``.
        head_width: channels per layer at 4 px.
        rank: of the changes.
    """

    network: ClassVar[str] = "PyramidHypernet"

    def __init__(
        self,
        resolution: int,
        shapes: Sequence[Sequence[int]],
        n_channels: int = 3,
        channel_base: int = 1024,
        channel_max: int = 128,
        head_width: int = 16,
        rank: int = 8,
    ) -> None:
        super().__init__()
        self.resolution, self.n_channels, self.head_width, self.rank = resolution, n_channels, head_width, rank
        self.channel_base, self.channel_max = channel_base, channel_max
        self.shapes = [[int(size) for size in shape] for shape in shapes]
        self.stem, self.blocks, width = trunk_layers(2 * n_channels, resolution, channel_base, channel_max)
        changed = [shape for shape in self.shapes if shape[2] == 3]
        if not changed or min(head_width, rank) < 1:
            raise InputError(
                f"the hypernetwork needs 3 x 3 layers and positive sizes, got {self.shapes}, {head_width}, {rank}."
            )
        self.reduce = conv(width, len(changed) * head_width, 1)
        size = head_width * _COARSEST**2
        self.rows = nn.ModuleList(nn.Linear(size, shape[0] * rank) for shape in changed)
        self.columns = nn.ModuleList(nn.Linear(size, shape[1] * rank) for shape in changed)
        for linear in self.rows:
            nn.init.zeros_(linear.weight)  # type: ignore[arg-type]
            nn.init.zeros_(linear.bias)  # type: ignore[arg-type]

    def architecture(self) -> dict[str, Any]:
        """The constructor's arguments, as plain values, that rebuild this network."""
        names = ("resolution", "shapes", "n_channels", "channel_base", "channel_max", "head_width", "rank")
        return {name: getattr(self, name) for name in names}

    def forward(self, x: Tensor) -> WeightDeltas:
        """Images and their reconstructions [N, 2 C, R, R] -> deltas [N, C_out, C_in, 1, 1], None for ToRGB, a layer each."""
        x = F.leaky_relu(self.stem(x.contiguous(memory_format=torch.channels_last)), SLOPE)
        for block in self.blocks:
            x = block(x)
        x = F.leaky_relu(self.reduce(x), SLOPE)
        codes = x.reshape(len(x), len(self.rows), self.head_width * _COARSEST**2).unbind(1)
        deltas = (self._delta(*layer) for layer in zip(codes, self.rows, self.columns, strict=True))
        return tuple(next(deltas) if shape[2] == 3 else None for shape in self.shapes)

    def _delta(self, code: Tensor, rows: nn.Module, columns: nn.Module) -> Tensor:
        u, v = (linear(code).unflatten(1, (-1, self.rank)) for linear in (rows, columns))
        return (u @ v.transpose(1, 2) / math.sqrt(self.rank))[..., None, None]


class ResNetHypernet(Trunk):
    """The published hypernetworks ``SharedWeightsHyperNetResNet`` and ``SharedWeightsHyperNetResNetSeparable``.

    Layers of 512 x 512 channels get full kernels from one shared two-layer map of a code each; the others one number per pair of
    channels, or separable kernels.

    Args:
        n_outputs: modulated convolutions of the generator: 26 at 1024 px, 23 at 512, 20 at 256.
        layers: which of them are changed.
        separable: the second of the two.
    """

    network = "ResNetHypernet"

    def __init__(
        self, n_outputs: int = 26, layers: Sequence[int] | None = None, separable: bool = False, n_channels: int = 3
    ) -> None:
        super().__init__("resnet34", 2 * n_channels)
        self.n_outputs, self.separable, self.n_channels = n_outputs, separable, n_channels
        self.layers = list(range(n_outputs)) if layers is None else sorted(int(layer) for layer in layers)
        if not self.layers or not 0 <= self.layers[0] <= self.layers[-1] < n_outputs:
            raise InputError(f"layers must lie from 0 to {n_outputs - 1}, got {self.layers}.")
        self.shared_weight_hypernet = _SharedKernels()
        shapes = config_f_shapes(n_outputs, n_channels)
        self.refinement_blocks = nn.ModuleList()
        for layer, shape in enumerate(shapes):
            self.refinement_blocks.append(self._block(shape) if layer in self.layers else None)  # type: ignore[arg-type]

    def architecture(self) -> dict[str, Any]:
        """The constructor's arguments, as plain values, that rebuild this network."""
        return {name: getattr(self, name) for name in ("n_outputs", "layers", "separable", "n_channels")}

    def forward(self, x: Tensor) -> WeightDeltas:
        """Images and their reconstructions [N, 2 C, 256, 256] -> deltas [N, C_out, C_in, k or 1, k or 1] or None, a layer each."""
        x = self.maps(x)[2]
        return tuple(None if block is None else block(x) for block in self.refinement_blocks)

    def _block(self, shape: tuple[int, int, int]) -> nn.Module:
        if shape == (WIDTH, WIDTH, 3):
            return _SharedBlock(self.shared_weight_hypernet)
        return _ChannelBlock(*shape, separable=self.separable and shape[2] == 3)


class _SharedKernels(nn.Module):
    """Code [N, 512] -> kernels [N, 512, 512, 3, 3]: a first map to 512 codes, a second one from each to its kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = (nn.Parameter(normal(*size, divisor=40)) for size in ((WIDTH, WIDTH * 9), (WIDTH * 9,)))
        self.w2, self.b2 = (nn.Parameter(normal(*size, divisor=40)) for size in ((WIDTH, WIDTH**2), (WIDTH**2,)))

    def forward(self, code: Tensor) -> Tensor:
        codes = torch.addmm(self.b2, code, self.w2).unflatten(1, (WIDTH, WIDTH))
        return (codes @ self.w1 + self.b1).reshape(-1, WIDTH, WIDTH, 3, 3)  # rows are outputs, as the files expect


class _SharedBlock(nn.Module):
    """Maps [N, 512, 16, 16] -> a code -> kernels by the shared map."""

    def __init__(self, hypernet: _SharedKernels) -> None:
        super().__init__()
        self.convs = _shrink([(WIDTH, 128, 1), (128, 128, 2), (128, 128, 2), (128, 128, 2), (128, WIDTH, 2)])
        self.linear, self.hypernet = EqualLinear(WIDTH, WIDTH), hypernet

    def forward(self, x: Tensor) -> Tensor:
        return self.hypernet(self.linear(self.convs(x).flatten(1)))


class _ChannelBlock(nn.Module):
    """Maps [N, 512, 16, 16] -> a number per pair of channels, or separable kernels."""

    def __init__(self, c_out: int, c_in: int, kernel: int, separable: bool) -> None:
        super().__init__()
        self.shape = (c_out, c_in)
        middle = [(256, 256, 2)] * (1 if kernel == 3 and not separable else 2)
        self.convs = _shrink([(WIDTH, 256, 2), *middle, (256, WIDTH, 2)])
        self.separable = separable
        if separable:
            self.output = nn.Sequential(_SeparableKernels(c_in, c_out, kernel))
        else:
            pool = [nn.AdaptiveAvgPool2d(1)] if kernel == 3 else []
            self.output = nn.Sequential(*pool, nn.Conv2d(WIDTH, c_in * c_out, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.output(self.convs(x))
        return x if self.separable else x.reshape(-1, *self.shape, 1, 1)


class _SeparableKernels(nn.Module):
    """Features [N, 512, 1, 1] -> kernels [N, C_out, C_in, k, k]: an outer product at each position, mixed along both sides."""

    def __init__(self, c_in: int, c_out: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.make_kernel_in, self.make_kernel_out = (nn.Linear(WIDTH, kernel**2 * c) for c in (c_in, c_out))
        self.kernel_linear_in, self.kernel_linear_out = nn.Linear(c_in, c_in), nn.Linear(c_out, c_out)

    def forward(self, features: Tensor) -> Tensor:
        rows, columns = self.make_kernel_out(features.flatten(1)), self.make_kernel_in(features.flatten(1))
        rows, columns = (x.unflatten(1, (self.kernel, self.kernel, -1)) for x in (rows, columns))
        kernels = self.kernel_linear_in(rows.unsqueeze(4) * columns.unsqueeze(3))  # [N, k, k, C_out, C_in]
        return self.kernel_linear_out(kernels.transpose(3, 4)).permute(0, 4, 3, 1, 2)


def config_f_shapes(n_outputs: int, n_channels: int = 3) -> list[tuple[int, int, int]]:
    """C_out, C_in and k of the modulated convolutions of StyleGAN2's configuration F, which published files are for.

    Raises:
        InputError: no such generator has ``n_outputs`` of them.
    """
    if n_outputs < 2 or n_outputs % 3 != 2:
        raise InputError(f"n_outputs must be 26, 23, 20, ... (1024, 512, 256 px, ...), got {n_outputs}.")
    widths = [min(32768 >> (i + 2), WIDTH) for i in range(n_outputs // 3 + 1)]  # at 4, 8, ... px
    shapes = [(widths[0], widths[0], 3), (n_channels, widths[0], 1)]
    for a, b in zip(widths, widths[1:]):
        shapes += [(b, a, 3), (b, b, 3), (n_channels, b, 1)]
    return shapes


def _shrink(layers: Sequence[tuple[int, int, int]]) -> nn.Sequential:
    """3 x 3 convolutions (channels in, channels out, stride), a leaky ReLU behind each."""
    parts: list[nn.Module] = []
    for c_in, c_out, stride in layers:
        parts += [nn.Conv2d(c_in, c_out, 3, stride, padding=1), nn.LeakyReLU()]
    return nn.Sequential(*parts)
