"""The trunks that published encoders stand on, and their head: IR-SE50, ResNet-34, a map to one style.

IR-SE50 is the residual network of ArcFace (Deng et al. 2019) with squeeze-and-excitation (Hu et al. 2018), ResNet-34 that of
He et al. 2016 without its max-pool and with a PReLU. Attribute names, and so state-dict keys, are those of the published
pSp, e4e, ReStyle and HyperStyle files. Both trunks halve the image four times and are read where they leave 128, 256
and 512 channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sage_fast.errors import InputError

__all__ = ["TRUNKS", "WIDTH", "EqualLinear", "StyleHead", "Trunk"]

TRUNKS = ("irse50", "resnet34")
WIDTH = 512  # channels of the last map, and width of a published style
_DEPTHS = {"irse50": (3, 4, 14, 3), "resnet34": (3, 4, 6, 3)}
_WIDTHS = (64, 128, 256, 512)


class Trunk(nn.Module):
    """A published trunk, its layers at the top level; children add heads.

    Deviation: images are square, of 256 px; published files for cars take 192 x 256.

    Args:
        trunk: ``"irse50"`` or ``"resnet34"``.
        n_inputs: channels that the first convolution reads.
    """

    resolution = 256
    input_layer: nn.Sequential
    conv1: nn.Conv2d
    bn1: nn.BatchNorm2d
    relu: nn.PReLU

    def __init__(self, trunk: str, n_inputs: int) -> None:
        super().__init__()
        if trunk not in TRUNKS:
            raise InputError(f"trunk must be {' or '.join(TRUNKS)}, got {trunk!r}.")
        self.trunk, self.n_inputs = trunk, n_inputs
        if trunk == "irse50":
            stem = (nn.Conv2d(n_inputs, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
            self.input_layer = nn.Sequential(*stem)
        else:
            self.conv1 = nn.Conv2d(n_inputs, 64, 7, 2, 3, bias=False)
            self.bn1, self.relu = nn.BatchNorm2d(64), nn.PReLU(64)
        self.body = nn.Sequential(*_blocks(trunk))

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Input [N, n_inputs, R, R] -> maps of 128, 256 and 512 channels at R / 4, R / 8 and R / 16."""
        if x.ndim != 4 or x.shape[1] != self.n_inputs:
            raise InputError(f"this network reads [N, {self.n_inputs}, R, R], got {list(x.shape)}.")
        x = self.input_layer(x) if self.trunk == "irse50" else self.relu(self.bn1(self.conv1(x)))
        ends = [sum(_DEPTHS[self.trunk][: i + 1]) - 1 for i in (1, 2, 3)]
        found = []
        for i, block in enumerate(self.body):
            x = block(x)
            if i in ends:
                found.append(x)
        return found[0], found[1], found[2]


class StyleHead(nn.Module):
    """A map [N, C, 2^n, 2^n] to one style [N, C]: n convolutions of stride 2 and a linear layer."""

    def __init__(self, n_down: int, width: int = WIDTH) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(n_down):
            layers += [nn.Conv2d(width, width, 3, stride=2, padding=1), nn.LeakyReLU()]
        self.convs = nn.Sequential(*layers)
        self.linear = EqualLinear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs(x)
        if x.shape[2:] != (1, 1):
            raise InputError(
                f"the images are too large for this encoder: {list(x.shape[2:])} is left of them, not [1, 1]."
            )
        return self.linear(x.flatten(1))


class EqualLinear(nn.Module):
    """Linear layer with weights stored at unit variance and scaled at run time."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in))
        self.bias = nn.Parameter(torch.zeros(d_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / math.sqrt(self.weight.shape[1]), self.bias)


class _IRSEBlock(nn.Module):
    """Normalise, 3 x 3, PReLU, 3 x 3 with the stride, normalise, weigh the channels; plus the shortcut."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)  # every stride-th pixel
        if c_in != c_out:
            projection = (nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
            self.shortcut_layer = nn.Sequential(*projection)
        first = (nn.BatchNorm2d(c_in), nn.Conv2d(c_in, c_out, 3, 1, 1, bias=False), nn.PReLU(c_out))
        second = (nn.Conv2d(c_out, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), _ChannelWeights(c_out))
        self.res_layer = nn.Sequential(*first, *second)

    def forward(self, x: Tensor) -> Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


class _ChannelWeights(nn.Module):
    """Squeeze and excitation with a reduction of 16."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // 16, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // 16, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class _BasicBlock(nn.Module):
    """ResNet's block by torchvision's names."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        self.downsample: nn.Module | None = None
        if stride != 1 or c_in != c_out:
            projection = (nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
            self.downsample = nn.Sequential(*projection)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def _blocks(trunk: str) -> Sequence[nn.Module]:
    kind = _IRSEBlock if trunk == "irse50" else _BasicBlock
    blocks, c_in = [], 64
    for stage, (depth, c_out) in enumerate(zip(_DEPTHS[trunk], _WIDTHS, strict=True)):
        for i in range(depth):
            halves = i == 0 and (stage > 0 or trunk == "irse50")
            blocks.append(kind(c_in, c_out, 2 if halves else 1))
            c_in = c_out
    return blocks
