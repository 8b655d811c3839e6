"""Settings of a projection into the latent space."""

from __future__ import annotations

from dataclasses import dataclass

from sage_fast.errors import InputError
from sage_fast.settings import check_ignored, check_numbers

__all__ = ["METHODS", "NOISES", "SPACES", "ProjectionConfig"]

SPACES = ("w", "w_plus")
METHODS = ("lbfgs", "adam")
NOISES = ("const", "none", "optimize")


@dataclass(frozen=True)
class ProjectionConfig:
    """Settings of :func:`sage_fast.inversion.project`."""

    space: str = "w_plus"  # one latent for all layers (w) or one a layer (w_plus)
    method: str = "lbfgs"  # lbfgs or adam
    steps: int = 500  # at most so many for an image
    lr: float | None = None  # None: 1 for lbfgs, 0.1 for adam
    history: int = 10  # pairs that lbfgs remembers
    tolerance: float = 1e-3  # an image is done when its loss falls by less than this share over `patience` steps
    patience: int | None = None  # None: 10 for lbfgs, 50 for adam
    pixel_weight: float = 1.0  # of the masked absolute error
    perceptual_weight: float = 1.0  # of the perceptual distance, where a feature network is given
    latent_weight: float = 0.5  # of the latent's distance from where it started
    #: the generator's stored maps (const), none, or maps optimised with the latent (optimize); None: as the model was
    #: trained, where that is known (a bundle says), else const
    noise: str | None = None
    noise_weight: float = 1e5  # keeps optimised noise from carrying structure
    n_candidates: int = 0  # random latents to choose the start among, where no encoder is given; 0: from latent_avg
    seed: int = 0  # of the candidates

    def __post_init__(self) -> None:
        check_numbers(self)
        for name, known in (("space", SPACES), ("method", METHODS), ("noise", (*NOISES, None))):
            if getattr(self, name) not in known:
                raise InputError(
                    f"{name} must be one of {', '.join(filter(None, known))}, got '{getattr(self, name)}'."
                )
        for name, least in (("steps", 1), ("history", 1), ("patience", 1), ("n_candidates", 0), ("seed", None)):
            value = getattr(self, name)
            if name == "patience" and value is None:
                continue
            if not isinstance(value, int) or (least is not None and value < least):
                bound = "" if least is None else f", at least {least}"
                raise InputError(f"{name} must be a whole number{bound}, got {value!r}.")
        for name in ("tolerance", "pixel_weight", "perceptual_weight", "latent_weight", "noise_weight"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or value < 0:
                raise InputError(f"{name} must be a finite number, not negative, got {value!r}.")
        if self.lr is not None and not (isinstance(self.lr, int | float) and self.lr > 0):
            raise InputError(f"lr must be a finite positive number, got {self.lr!r}.")
        if self.method != "lbfgs":
            check_ignored(self, ("history",), "method 'lbfgs'")
        if self.noise != "optimize":
            check_ignored(self, ("noise_weight",), "noise 'optimize'")
