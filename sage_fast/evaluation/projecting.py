"""Optimisation in the place of an encoder, so that all that is measured of encoders is measured of it."""

from __future__ import annotations

import copy

from torch import Tensor

from sage_fast.inversion import project
from sage_fast.models.image_encoder import ImageEncoder, Inversion
from sage_fast.models.perceptual import FeatureNetwork
from sage_fast.models.stylegan2 import Generator
from sage_fast.pipeline import FewShotPipeline

__all__ = ["Projecting", "projecting"]


class Projecting(ImageEncoder):
    """Optimisation in the place of an encoder: each image's latents, from an encoder's on."""

    network = "projection"

    def __init__(self, start: ImageEncoder, perceptual: FeatureNetwork | None, steps: int) -> None:
        super().__init__()
        self.start, self.perceptual, self.steps = start, perceptual, steps
        self.resolution, self.n_channels = start.resolution, start.n_channels
        self.n_latent, self.style_dim = start.n_latent, start.style_dim

    @property
    def kind(self) -> str:
        """``"optimisation"``."""
        return "optimisation"

    def architecture(self) -> dict[str, object]:
        """How many steps at most."""
        return {"steps": self.steps}

    def invert(self, images: Tensor, generator: Generator, noise: str = "none") -> Inversion:
        """As of every encoder; see :func:`sage_fast.inversion.project`."""
        found = project(images, generator, self.start, perceptual=self.perceptual, steps=self.steps, noise=noise)
        return Inversion(found.w_plus - generator.latent_avg)


def projecting(pipeline: FewShotPipeline, perceptual: FeatureNetwork | None, steps: int) -> FewShotPipeline:
    """The pipeline with optimisation in place of its encoder; dictionaries and codes are the encoder's.

    ``perceptual`` is copied to where the networks are, in their dtype.
    """
    p = pipeline
    encoder = Projecting(p.encoder, copy.deepcopy(perceptual), steps).to(p.generator.latent_avg)
    return FewShotPipeline(p.generator, encoder, p.relevant, p.irrelevant, p.codes, p.preset, p.noise, p.hash)
