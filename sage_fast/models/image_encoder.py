"""What every encoder shares: images in, offsets from ``latent_avg`` out, in one pass or in several with the generator."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sage_fast.errors import InputError, counted
from sage_fast.ops.inputs import require_floats, require_same_device

if TYPE_CHECKING:
    from sage_fast.models.stylegan2 import Generator

__all__ = ["ImageEncoder", "Inversion", "WeightDeltas", "check_encoder", "check_images", "on_base", "resized"]

WeightDeltas = tuple[Tensor | None, ...]
"""One entry a modulated convolution, in the order of synthesis (see :func:`sage_fast.models.weight_deltas.layer_names`):
relative changes [N, C_out, C_in, k, k] or [N, C_out, C_in, 1, 1] of its weight, or None."""


@dataclass(frozen=True, eq=False)
class Inversion:
    """What shows an image through a generator.

    Attributes:
        offsets: from ``latent_avg`` [N, L, D].
        weight_deltas: what HyperStyle changes in the generator for each image; None for every other kind.
    """

    offsets: Tensor
    weight_deltas: WeightDeltas | None = None


class ImageEncoder(nn.Module):
    """Images to latents of a generator (Eq. 3 of [SAGE]).

    ``n_iterations`` 0: ``forward`` takes images [N, C, R, R] and gives offsets. Otherwise (ReStyle, Alaluf et al. 2021) it takes
    images and their current reconstructions side by side [N, 2 C, R, R] and gives a correction of the offsets;
    :meth:`invert` starts at ``latent_avg`` and repeats it.

    Attributes:
        resolution: height and width that ``forward`` is made for; :meth:`invert` resizes.
        n_channels: C, of the images.
        n_latent, style_dim: L and D.
    """

    network: ClassVar[str]
    resolution: int
    n_channels: int
    n_latent: int
    style_dim: int
    n_iterations: int = 0

    @property
    @abstractmethod
    def kind(self) -> str:
        """``"psp"``, ``"e4e"``, ``"restyle"`` or ``"hyperstyle"``."""

    @abstractmethod
    def architecture(self) -> dict[str, object]:
        """The constructor's arguments, as plain values, that rebuild this network."""

    def invert(self, images: Tensor, generator: Generator, noise: str = "none") -> Inversion:
        """Images [N, C, R, R] in [-1, 1], of the generator's size -> what shows them through ``generator``.

        Args:
            noise: the generator's noise while iterating, ``"none"`` or ``"const"``.
        Raises:
            InputError: the images are not of the generator's size, or the encoder is for another generator.
        """
        check_encoder(self, generator)
        check_images(images, generator)
        images = resized(images, self.resolution)
        if not self.n_iterations:
            return Inversion(self(images))
        offsets = images.new_zeros(len(images), self.n_latent, self.style_dim)
        rendered = self.average_image(generator, noise).expand(len(images), -1, -1, -1)
        for number in range(self.n_iterations):
            if number:
                rendered = generator(offsets + generator.latent_avg, noise=noise)
            offsets = offsets + self.correction(images, rendered)
        return Inversion(offsets)

    def average_image(self, generator: Generator, noise: str = "none") -> Tensor:
        """The image [1, C, R, R] of ``latent_avg``, where ReStyle starts."""
        with torch.no_grad():
            return generator(generator.latent_avg.expand(1, self.n_latent, -1), noise=noise)

    def correction(self, images: Tensor, rendered: Tensor) -> Tensor:
        """One step of ReStyle: what to add to the offsets [N, L, D] whose reconstructions are ``rendered``."""
        shown = F.adaptive_avg_pool2d(rendered, self.resolution)  # repeats pixels of smaller ones
        return self(torch.cat([images, shown], dim=1))


def check_encoder(encoder: ImageEncoder, generator: Generator) -> None:
    """Raise InputError unless the encoder sees the generator's image channels and gives one latent for each of its layers."""
    gives = (encoder.n_latent, encoder.style_dim, encoder.n_channels)
    takes = (generator.n_latent, generator.style_dim, generator.n_channels)
    if gives != takes:
        raise InputError(
            f"the encoder gives latents {list(gives[:2])} of images with {counted(gives[2], 'channel')}, the generator of "
            f"{generator.resolution} px takes {list(takes[:2])} and draws {counted(takes[2], 'channel')}; use the encoder that was "
            "trained with it."
        )


def check_images(images: Tensor, generator: Generator) -> None:
    """Raise InputError unless the images are floating point where the generator is, with its channels, height and width."""
    expected = (generator.n_channels, generator.resolution, generator.resolution)
    require_floats("images", images, 4, f"[N, {expected[0]}, {expected[1]}, {expected[2]}]")
    require_same_device("images", images, generator.latent_avg, "the generator")
    if images.shape[1:] != expected:
        raise InputError(
            f"images must have shape [N, {expected[0]}, {expected[1]}, {expected[2]}] for this generator, "
            f"got {list(images.shape)}; resize them when reading."
        )


def on_base(styles: Tensor, n_latent: int) -> Tensor:
    """Style 0 of [N, S, D] in every layer, the others added to it in theirs: [N, L, D] with S at most L (e4e, Eq. 2)."""
    return styles[:, :1] + F.pad(styles[:, 1:], (0, 0, 1, n_latent - styles.shape[1]))


def resized(images: Tensor, side: int) -> Tensor:
    """Square images [N, C, H, H] at ``side`` x ``side``: averaged over pixels when larger, interpolated when smaller."""
    if images.shape[2] == side:
        return images
    if images.shape[2] > side:
        return F.adaptive_avg_pool2d(images, side)
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
