"""Projection of images into a generator's latent space by optimisation ([Views], section 3.2).

[Views] is Chai et al. 2021, "Ensembling with Deep Generative Views". An encoder answers at once (Eq. 3 of [SAGE]); this
takes seconds an image and comes closer. Latents are absolute here, as at the generator's door.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sage_fast.errors import InputError
from sage_fast.inversion.config import ProjectionConfig
from sage_fast.inversion.inputs import check_images, check_mask, check_networks, check_start
from sage_fast.inversion.objective import Objective
from sage_fast.minimize import Minima, minimize_adam, minimize_lbfgs
from sage_fast.models.perceptual import FeatureNetwork
from sage_fast.models.stylegan2 import Generator
from sage_fast.settings import check_ignored

__all__ = ["Projection", "check_settings", "project"]

_RATES = {"lbfgs": 1.0, "adam": 0.1}
_PATIENCE = {"lbfgs": 10, "adam": 50}


@dataclass(frozen=True, eq=False)
class Projection:
    """Images as a generator can draw them.

    Attributes:
        w_plus: absolute latents [N, L, D]; in space ``"w"`` all L are the same.
        images: G(w_plus) [N, C, R, R], nominally in [-1, 1], not clamped.
        losses: what was minimised, at the end [N].
        n_steps: int64 [N], steps until an image was done.
        n_evaluations: int64 [N], how often each was drawn for them.
        noise: the L - 1 optimised maps [N, 1, h, w], for ``generator.synthesis``; None unless they were optimised.
    """

    w_plus: Tensor
    images: Tensor
    losses: Tensor
    n_steps: Tensor
    n_evaluations: Tensor
    noise: tuple[Tensor, ...] | None


def project(
    images: Tensor,
    generator: Generator,
    encoder: nn.Module | None = None,
    mask: Tensor | None = None,
    space: str = ProjectionConfig.space,
    method: str = ProjectionConfig.method,
    *,
    perceptual: FeatureNetwork | None = None,
    start: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Projection:
    """Find the latents whose images come closest to the given ones.

    Implements Eq. 1, 2 and 4 of [Views]: masked absolute error, perceptual distance and a pull towards the start, which is
    MSE(E(G(w)), E(x)) with an encoder and MSE(w, start) without. Every image is a minimisation of its own, with its own
    history, line search and stopping rule, all in one batch: what comes out does not depend on the other images, but for the
    rounding of the networks.

    Deviation: what the mask hides takes the mean colour of the rest, in both images, before a network sees them, so that
    hidden pixels have no say at all; the released code only masks the map of distances. Without ``perceptual`` the
    image loss is the absolute error alone.

    Args:
        images: [N, C, R, R], floating, in [-1, 1]; dtype and device become the generator's.
        generator: its parameters get no gradient and are left as they are.
        encoder: of any kind, or any network images -> offsets from ``latent_avg`` [N, L, D]; gives the start and the pull.
        mask: [N or 1, 1, R, R] in [0, 1]; 0 hides a pixel from the loss, what lies between weighs it.
        space, method: see :class:`ProjectionConfig`.
        perceptual: a feature network, see :func:`sage_fast.models.perceptual.load_perceptual`.
        start: absolute latents [N, L, D] to start from instead of the encoder's.
        progress: called with (steps done or no longer needed, N times the steps allowed).
        settings: other fields of :class:`ProjectionConfig`.
    Raises:
        InputError: images, a mask, a start or a setting that cannot be used.
    """
    config = ProjectionConfig(space=space, method=method, **settings)
    check_settings(config, generator, encoder, perceptual, start)
    images = check_images(images, generator)
    mask = check_mask(mask, images)
    with _frozen(generator, encoder, perceptual):
        objective = Objective(config, generator, encoder, perceptual, images, mask)
        x = objective.begin(check_start(start, len(images), generator))
        found = _minimize(objective, x, config, progress)
        _check_finite(found.values)
        with torch.no_grad():
            w_plus, maps, drawn = objective.draw(found.x)
    return Projection(w_plus.contiguous(), drawn, found.values, found.n_steps, found.n_evaluations, maps)


def check_settings(
    config: ProjectionConfig,
    generator: Generator,
    encoder: nn.Module | None,
    perceptual: FeatureNetwork | None,
    start: Tensor | None = None,
) -> None:
    """Raise InputError for networks and settings that :func:`project` would refuse whatever the images are."""
    check_networks(generator, encoder, perceptual)
    if config.n_candidates and (encoder is not None or start is not None):
        raise InputError("n_candidates has no effect where an encoder or a start is given; leave it out.")
    if config.n_candidates and generator.c_dim:
        raise InputError("n_candidates needs an unconditional generator; give start, mapped with the images' labels.")
    if perceptual is None:
        check_ignored(config, ("perceptual_weight",), "a perceptual network")


def _minimize(
    objective: Objective, x: Tensor, config: ProjectionConfig, progress: Callable[[int, int], None] | None
) -> Minima:
    lr = config.lr or _RATES[config.method]
    patience = config.patience or _PATIENCE[config.method]
    if config.method == "adam":
        return minimize_adam(objective, x, config.steps, lr, config.tolerance, patience, progress)
    return minimize_lbfgs(objective, x, config.steps, lr, config.history, config.tolerance, patience, progress)


@contextmanager
def _frozen(*networks: nn.Module | None) -> Iterator[None]:
    """Networks in eval mode and without gradients of their parameters; both are as before afterwards."""
    modules = {m: m.training for network in networks if network is not None for m in network.modules()}
    parameters = {p: p.requires_grad for m in modules for p in m._parameters.values() if p is not None}
    try:
        for module in modules:
            module.training = False
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modules.items():
            module.training = training
        for parameter, wanted in parameters.items():
            parameter.requires_grad_(wanted)


def _check_finite(losses: Tensor) -> None:
    wrong = torch.nonzero(~torch.isfinite(losses)).flatten().tolist()
    if wrong:
        raise InputError(
            f"the loss of image {wrong[0]} is not a number from the start; the networks or the start are damaged."
        )
