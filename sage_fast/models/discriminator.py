"""The StyleGAN2 discriminator, with the parameter names of the common PyTorch port."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from sage_fast.errors import InputError
from sage_fast.models.stylegan2_layers import (
    CONNECTIONS,
    BiasAct,
    Conv,
    DownBlock,
    Linear,
    MappingNetwork,
    Resample,
    channel_list,
    channels_last,
    check_channels,
    check_choice,
    check_label,
    check_positive,
    check_resolution,
    exact,
    sparing,
    wide,
)
from sage_fast.ops.inputs import require_floats, require_same_device

__all__ = ["Discriminator", "group_size"]


class Discriminator(nn.Module):
    """StyleGAN2 discriminator with minibatch standard deviation; arguments as :class:`Generator`'s where not listed.

    With ``c_dim`` the logit is the projection on an embedded label, as in Miyato and Koyama (2018).

    Args:
        mbstd_group: images that share a standard deviation, None for the whole batch; a batch it does not divide uses its
            largest divisor below.
        mbstd_channels: maps of standard deviations, each over its share of the channels; 0: none.
        n_mapping: fully connected layers behind the label's embedding, 0 or more.
        cmap_dim: width of the embedded label (default: the channels at 4 px).
        connections: "resnet", "skip" (the image itself, ever smaller, enters at each resolution) or "orig" (neither).
    """

    def __init__(
        self,
        resolution: int,
        n_channels: int = 3,
        channel_base: int = 32768,
        channel_max: int = 512,
        c_dim: int = 0,
        mbstd_group: int | None = 4,
        channels: Sequence[int] | None = None,
        n_mapping: int = 8,
        connections: Literal["skip", "resnet", "orig"] = "resnet",
        clamp: float | None = None,
        mbstd_channels: int = 1,
        cmap_dim: int | None = None,
        embed_dim: int | None = None,
        mapping_width: int | None = None,
        mapping_lr_mul: float = 0.01,
    ) -> None:
        super().__init__()
        self.resolution, self.n_channels, self.c_dim = check_resolution(resolution), check_channels(n_channels), c_dim
        self.mbstd_group = None if mbstd_group is None else check_positive("mbstd_group", mbstd_group)
        self.mbstd_channels, self.n_mapping, self.clamp = mbstd_channels, n_mapping, clamp
        self.cmap_dim, self.embed_dim, self.mapping_width = cmap_dim, embed_dim, mapping_width
        self.mapping_lr_mul = mapping_lr_mul
        self.connections = check_choice("connections", connections, CONNECTIONS)
        self.channels = channel_list(resolution, channel_base, channel_max, channels)

        widths = self.channels[::-1]
        residual = connections == "resnet"
        blocks = [DownBlock(a, b, residual, clamp) for a, b in zip(widths, widths[1:])]
        self.convs = nn.Sequential(_from_rgb(n_channels, widths[0], clamp), *blocks)
        if connections == "skip" and blocks:
            self.downsample = Resample(down=2, padding=(1, 1, 1, 1))
            self.from_rgbs = nn.ModuleList(_from_rgb(n_channels, width, clamp) for width in widths[1:-1])
            self.from_rgbs.append(_from_rgb(n_channels, widths[-1], None))  # the last one has no clamp
        width = widths[-1]
        cmap = (width if cmap_dim is None else cmap_dim) if c_dim else 1
        self.final_conv = nn.Sequential(Conv(width + mbstd_channels, width, 3), BiasAct(width, clamp))
        self.final_linear = nn.Sequential(Linear(width * 16, width, act="lrelu"), Linear(width, cmap))
        self.embed = self._label_embedding(cmap) if c_dim else None

    def _label_embedding(self, cmap: int) -> nn.Sequential:
        embed = cmap if self.embed_dim is None else self.embed_dim
        mapping = MappingNetwork(
            cmap, self.n_mapping, lr_mul=self.mapping_lr_mul, z_dim=embed, width=self.mapping_width
        )
        return nn.Sequential(Linear(self.c_dim, embed), mapping)

    def architecture(self) -> dict[str, object]:
        """The constructor's arguments, as plain numbers and lists, that rebuild this network."""
        names = ("resolution", "n_channels", "c_dim", "mbstd_group", "channels", "n_mapping")
        usual: dict[str, object] = {
            "connections": "resnet",
            "clamp": None,
            "mbstd_channels": 1,
            "cmap_dim": None,
            "embed_dim": None,
        }
        usual |= {"mapping_width": None, "mapping_lr_mul": 0.01}
        special = {name: getattr(self, name) for name, value in usual.items() if getattr(self, name) != value}
        return {name: getattr(self, name) for name in names} | special

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Discriminator:
        """``to`` and its like: 16 bits are for large 3 x 3 kernels alone."""
        return super()._apply(sparing(fn), recurse)

    def features(self, images: Tensor) -> list[Tensor]:
        """Feature maps [N, C_r, r, r] for r = resolution, resolution / 2, ..., 4."""
        self._check_images(images)
        images = channels_last(images)
        maps = [self.convs[0](images)]
        for i in range(len(self.convs) - 1):
            x, images = self._halve(i, maps[-1], images)
            maps.append(x)
        return maps

    def forward(self, images: Tensor, c: Tensor | None = None) -> Tensor:
        """Logits [N, 1] of images [N, C, H, W] (and labels ``c`` [N, c_dim]); large means real."""
        self._check_images(images)
        check_label(c, self.c_dim, images)
        with exact(images.device.type):
            logits = self._logits(wide(images), c)
        return logits if torch.is_grad_enabled() else logits.to(images.dtype)

    def _logits(self, images: Tensor, c: Tensor | None) -> Tensor:
        images = channels_last(images)
        x = self.convs[0](images)
        for i in range(len(self.convs) - 1):
            x, images = self._halve(i, x, images)
        x = self.final_conv(_append_stddev(x, self.mbstd_group, self.mbstd_channels))
        x = self.final_linear(x.flatten(1))
        if self.embed is None:
            return x
        assert c is not None
        return (x * self.embed(c.to(x.dtype))).sum(1, keepdim=True) / math.sqrt(x.shape[1])

    def _halve(self, i: int, x: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Block ``i``: maps and images of one resolution to those of the next."""
        x = self.convs[i + 1](x)
        if self.connections == "skip":
            images = self.downsample(images)
            x = x + self.from_rgbs[i](images)
        return x, images

    def _check_images(self, images: Tensor) -> None:
        size = self.resolution
        require_floats("images", images, 4, f"[N, {self.n_channels}, {size}, {size}]")
        if images.shape[1:] != (self.n_channels, self.resolution, self.resolution):
            raise InputError(
                f"images must have shape [N, {self.n_channels}, {size}, {size}], got {list(images.shape)}."
            )
        require_same_device("images", images, next(self.parameters()), "the network")


def group_size(batch: int, most: int | None) -> int:
    """Images that share a minibatch standard deviation: the largest divisor of ``batch`` up to ``most``; None: all of them."""
    largest = batch if most is None else min(most, batch)
    return next((size for size in range(largest, 0, -1) if batch % size == 0), 1)


def _from_rgb(n_channels: int, width: int, clamp: float | None) -> nn.Sequential:
    return nn.Sequential(Conv(n_channels, width, 1), BiasAct(width, clamp))


def _append_stddev(x: Tensor, group: int | None, n_maps: int) -> Tensor:
    """Append maps with the standard deviation over groups of the batch: [N, C, H, W] -> [N, C + n_maps, H, W]."""
    if n_maps == 0:
        return x
    n, c, h, w = x.shape
    group = group_size(n, group)
    y = x.reshape(group, -1, n_maps, c // n_maps, h, w)
    std = ((y - y.mean(0)).square().mean(0) + 1e-8).sqrt().mean([2, 3, 4])  # x.var(0) is fifteen times slower
    return torch.cat([x, std.repeat(group, 1).view(n, n_maps, 1, 1).expand(n, n_maps, h, w)], dim=1)
