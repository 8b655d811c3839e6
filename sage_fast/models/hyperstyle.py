"""HyperStyle (Alaluf et al. 2022): a code in W, and changes of the generator's weights for each image.

A hypernetwork sees an image and its reconstruction and predicts relative changes of the weights of the modulated
convolutions; it is applied several times, its predictions add up. Hypernetworks are in :mod:`sage_fast.models.hypernets`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sage_fast.errors import InputError
from sage_fast.models.hypernets import PyramidHypernet, ResNetHypernet
from sage_fast.models.image_encoder import ImageEncoder, Inversion, WeightDeltas, resized
from sage_fast.models.weight_deltas import add_deltas, synthesize

if TYPE_CHECKING:
    from sage_fast.models.stylegan2 import Generator

__all__ = ["HyperStyle", "codes_of"]


class HyperStyle(ImageEncoder):
    """A frozen encoder for the code and a hypernetwork for the generator's weights.

    Args:
        w_encoder: gives the code; into W in the paper, any encoder serves.
        hypernet: images beside reconstructions [N, 2 C, R, R] -> deltas, one entry a modulated convolution.
        n_iterations: how often the hypernetwork refines.
    """

    network = "HyperStyle"

    def __init__(
        self, w_encoder: ImageEncoder, hypernet: PyramidHypernet | ResNetHypernet, n_iterations: int = 5
    ) -> None:
        super().__init__()
        if n_iterations < 1:
            raise InputError(f"n_iterations must be at least 1, got {n_iterations}.")
        self.w_encoder, self.hypernet, self.n_iterations = w_encoder, hypernet, n_iterations
        self.resolution, self.n_channels = w_encoder.resolution, w_encoder.n_channels
        self.n_latent, self.style_dim = w_encoder.n_latent, w_encoder.style_dim

    @property
    def kind(self) -> str:
        """``"hyperstyle"``."""
        return "hyperstyle"

    def architecture(self) -> dict[str, object]:
        """Plain values that rebuild this network: see :func:`sage_fast.models.encoder_kinds.build_encoder`."""
        parts = {"w_encoder": self.w_encoder, "hypernet": self.hypernet}
        described = {name: {"network": part.network, **part.architecture()} for name, part in parts.items()}
        return {**described, "n_iterations": self.n_iterations}

    def forward(self, x: Tensor) -> WeightDeltas:
        """Images and their reconstructions [N, 2 C, R, R] -> what to add to the weight deltas."""
        return self.hypernet(x)

    def invert(self, images: Tensor, generator: Generator, noise: str = "none") -> Inversion:
        """Images [N, C, R, R] in [-1, 1], of the generator's size -> codes and weight deltas that show them through ``generator``."""
        offsets = self.w_encoder.invert(images, generator, noise).offsets
        w_plus, deltas = offsets + generator.latent_avg, None
        for _ in range(self.n_iterations):
            deltas = self.refine(images, synthesize(generator, w_plus, deltas, noise), deltas)
        return Inversion(offsets, deltas)

    def refine(self, images: Tensor, rendered: Tensor, deltas: WeightDeltas | None) -> WeightDeltas:
        """One step: the deltas whose reconstructions are ``rendered``, improved."""
        seen = torch.cat([resized(images, self.resolution), resized(rendered, self.resolution)], dim=1)
        return add_deltas(deltas, self.hypernet(seen))


def codes_of(encoder: ImageEncoder) -> ImageEncoder:
    """The part of an encoder that gives codes: of HyperStyle the W encoder, of every other kind all of it."""
    return encoder.w_encoder if isinstance(encoder, HyperStyle) else encoder
