"""Projection of images into a generator's latent space by optimisation ([Views], section 3.2)."""

from sage_fast.inversion.config import METHODS, NOISES, SPACES, ProjectionConfig
from sage_fast.inversion.projecting import Projection, check_settings, project

__all__ = ["METHODS", "NOISES", "SPACES", "Projection", "ProjectionConfig", "check_settings", "project"]
