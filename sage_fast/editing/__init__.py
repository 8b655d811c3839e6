"""What a novel category is, in latent space: estimated from its shots, sampled without limit."""

from sage_fast.editing.distribution import ClassDistribution
from sage_fast.editing.editor import METHODS, FewShotEditor

__all__ = ["METHODS", "ClassDistribution", "FewShotEditor"]
