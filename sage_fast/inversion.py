"""Projection of images into a generator's latent space by optimisation ([Views], section 3.2).

[Views] is Chai et al. 2021, "Ensembling with Deep Generative Views". An encoder answers at once (Eq. 3 of [SAGE]); this
takes seconds an image and comes closer. Latents are absolute here, as at the generator's door.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sage_fast.errors import InputError
from sage_fast.minimize import Minima, minimize_adam, minimize_lbfgs
from sage_fast.models.hyperstyle import codes_of
from sage_fast.models.image_encoder import ImageEncoder, check_encoder
from sage_fast.models.perceptual import FeatureNetwork, distance_maps, normalised_features
from sage_fast.models.stylegan2 import Generator

__all__ = ["METHODS", "NOISES", "SPACES", "Projection", "ProjectionConfig", "project"]

SPACES = ("w", "w_plus")
METHODS = ("lbfgs", "adam")
NOISES = ("const", "none", "optimize")

_LARGEST = 4.0  # images above it were not scaled to [-1, 1]
_RATES = {"lbfgs": 1.0, "adam": 0.1}
_PATIENCE = {"lbfgs": 10, "adam": 50}


@dataclass(frozen=True)
class ProjectionConfig:
    """Settings of :func:`project`.

    ``space``: one latent for all layers (w) or one a layer (w_plus). ``method``: lbfgs or adam.
    ``noise``: the generator's stored maps (const), none, or maps optimised with the latent (optimize); None: as the model was trained,
    where that is known (a bundle says), else const.
    """

    space: str = "w_plus"
    method: str = "lbfgs"
    steps: int = 500  # at most so many for an image
    lr: float | None = None  # None: 1 for lbfgs, 0.1 for adam
    history: int = 10  # pairs that lbfgs remembers
    tolerance: float = 1e-3  # an image is done when its loss falls by less than this share over `patience` steps
    patience: int | None = None  # None: 10 for lbfgs, 50 for adam
    pixel_weight: float = 1.0  # of the masked absolute error
    perceptual_weight: float = 1.0  # of the perceptual distance, where a feature network is given
    latent_weight: float = 0.5  # of the latent's distance from where it started
    noise: str | None = None
    noise_weight: float = 1e5  # keeps optimised noise from carrying structure
    n_candidates: int = (
        0  # start from the best of so many random latents, where no encoder is given; 0: from latent_avg
    )
    seed: int = 0  # of the candidates

    def __post_init__(self) -> None:
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
            if not _is_finite(getattr(self, name)) or getattr(self, name) < 0:
                raise InputError(f"{name} must be a finite number, not negative, got {getattr(self, name)!r}.")
        if self.lr is not None and not (_is_finite(self.lr) and self.lr > 0):
            raise InputError(f"lr must be a finite positive number, got {self.lr!r}.")


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
    if config.n_candidates and (encoder is not None or start is not None):
        raise InputError("n_candidates has no effect where an encoder or a start is given; leave it out.")
    _check_networks(generator, encoder, perceptual)
    images = _check_images(images, generator)
    mask = _check_mask(mask, images)
    with _frozen(generator, encoder, perceptual):
        objective = _Objective(config, generator, encoder, perceptual, images, mask)
        x = objective.begin(_check_start(start, len(images), generator))
        found = _minimize(objective, x, config, progress)
        _check_finite(found.values)
        with torch.no_grad():
            w_plus, maps, drawn = objective.draw(found.x)
    return Projection(w_plus.contiguous(), drawn, found.values, found.n_steps, found.n_evaluations, maps)


def _minimize(
    objective: _Objective, x: Tensor, config: ProjectionConfig, progress: Callable[[int, int], None] | None
) -> Minima:
    lr = config.lr or _RATES[config.method]
    patience = config.patience or _PATIENCE[config.method]
    if config.method == "adam":
        return minimize_adam(objective, x, config.steps, lr, config.tolerance, patience, progress)
    return minimize_lbfgs(objective, x, config.steps, lr, config.history, config.tolerance, patience, progress)


@dataclass(frozen=True, eq=False)
class _Targets:
    """What each of N images is compared with."""

    images: Tensor  # [N, C, R, R]
    mask: Tensor  # [N, 1, R, R]
    fill: Tensor  # [N, C, 1, 1] mean colour of what the mask shows
    weight: Tensor  # [N, 1, R, R] the mask, with sum 1 / C
    features: list[Tensor]  # [N, C_i, h_i, w_i] of the images, and weights [N, h_i, w_i] of their positions
    feature_weights: list[Tensor]
    anchor: Tensor  # [N, L, D] absolute latents that the pull is towards

    def of(self, rows: Tensor) -> _Targets:
        taken: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            taken[field.name] = [part[rows] for part in value] if isinstance(value, list) else value[rows]
        return _Targets(**taken)


class _Objective:
    """The loss of every image and its gradient, for points [n, P]: the latents, then the noise maps where they are optimised."""

    def __init__(
        self,
        config: ProjectionConfig,
        generator: Generator,
        encoder: nn.Module | None,
        perceptual: FeatureNetwork | None,
        images: Tensor,
        mask: Tensor,
    ) -> None:
        self.config, self.generator, self.encoder, self.perceptual = config, generator, encoder, perceptual
        weight = mask / mask.sum((1, 2, 3), keepdim=True)
        fill = (images * weight).sum((2, 3), keepdim=True)
        self.targets = _Targets(images, mask, fill, weight / images.shape[1], [], [], images)
        if perceptual is not None:
            with torch.no_grad():
                features = normalised_features(perceptual, self._shown(images, self.targets))
            weights = [_spread(weight, x.shape[2:]) for x in features]
            self.targets = replace(self.targets, features=features, feature_weights=weights)
        self._rows: Tensor | None = None
        self._current = self.targets

    @torch.no_grad()
    def begin(self, start: Tensor | None) -> Tensor:
        """The points to start from, and what the latents are held to."""
        n, average = len(self.targets.images), self.generator.latent_avg
        code = None
        if self.encoder is not None:  # one at a time: the start does not depend on the batch, to the last bit
            shown = self._shown(self.targets.images, self.targets)
            code = average + _check_codes([self._encode(image[None]) for image in shown], self.generator)
        if start is None:
            start = self._best_candidates() if code is None else code
        self.targets = replace(self.targets, anchor=start if code is None else code)
        w = start.mean(1, keepdim=True) if self.config.space == "w" else start
        maps = [] if self.config.noise != "optimize" else self._stored_maps(n)
        return torch.cat([part.flatten(1) for part in (w, *maps)], 1)

    def __call__(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [n] and gradients [n, P] at x [n, P] of the images ``rows``."""
        if rows is not self._rows:  # only when an image has dropped out
            self._rows, self._current = rows, self.targets.of(rows)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            values = self._losses(x, self._current)
            (gradient,) = torch.autograd.grad(values.sum(), x)
        return values.detach(), gradient

    def draw(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...] | None, Tensor]:
        """Points [n, P] -> absolute latents [n, L, D], noise maps or None, images [n, C, R, R]."""
        G = self.generator
        if self.config.noise != "optimize":
            w_plus = x.view(len(x), -1, G.style_dim).expand(-1, G.n_latent, -1)
            return w_plus, None, G.synthesis(w_plus, noise="none" if self.config.noise == "none" else "const")
        shapes = [m.shape[1:] for m in self._stored_maps(1)]
        width = G.style_dim * (1 if self.config.space == "w" else G.n_latent)
        w, *maps = x.split([width, *(shape.numel() for shape in shapes)], 1)
        w_plus = w.reshape(len(x), -1, G.style_dim).expand(-1, G.n_latent, -1)
        noise = tuple(_standardised(m).view(len(x), *shape) for m, shape in zip(maps, shapes))
        return w_plus, noise, G.synthesis(w_plus, noise=noise)

    def _encode(self, images: Tensor) -> Tensor:
        """The encoder's offsets [n, L, D]; of HyperStyle those of its code, which is drawn by the generator as it is."""
        assert self.encoder is not None
        if not isinstance(self.encoder, ImageEncoder):
            return self.encoder(images)
        noise = "none" if self.config.noise == "none" else "const"
        return codes_of(self.encoder).invert(images, self.generator, noise).offsets

    def _losses(self, x: Tensor, targets: _Targets) -> Tensor:
        config = self.config
        w_plus, noise, images = self.draw(x)
        loss = self._image_losses(images, targets)
        if config.latent_weight:
            code = w_plus if self.encoder is None else self._encode(images) + self.generator.latent_avg
            loss = loss + config.latent_weight * (code - targets.anchor).square().mean((1, 2))
        if noise is not None:
            loss = loss + config.noise_weight * sum(_autocorrelation(m) for m in noise)
        return loss

    def _image_losses(self, images: Tensor, targets: _Targets) -> Tensor:
        """Masked absolute error and perceptual distance (Eq. 1 of [Views]): [n]."""
        loss = self.config.pixel_weight * ((images - targets.images).abs() * targets.weight).sum((1, 2, 3))
        if self.perceptual is None or not self.config.perceptual_weight:
            return loss
        features = normalised_features(self.perceptual, self._shown(images, targets))
        maps = distance_maps(self.perceptual, features, targets.features)
        distance = sum((d * weight).sum((1, 2)) for d, weight in zip(maps, targets.feature_weights))
        return loss + self.config.perceptual_weight * distance

    def _shown(self, images: Tensor, targets: _Targets) -> Tensor:
        """The images with their hidden pixels in the mean colour of the given image's others."""
        return torch.lerp(targets.fill, images, targets.mask)

    def _best_candidates(self) -> Tensor:
        """For each image the random latent that looks most like it, or the average latent: [N, L, D]."""
        G, n = self.generator, len(self.targets.images)
        if not self.config.n_candidates:
            return G.latent_avg.expand(n, G.n_latent, -1)
        if G.c_dim:
            raise InputError(
                "n_candidates needs an unconditional generator; give start, mapped with the images' labels."
            )
        rng = torch.Generator().manual_seed(self.config.seed)
        z = torch.randn(self.config.n_candidates, G.style_dim, generator=rng).to(G.latent_avg)
        w = G.mapping(z)
        noise: Literal["none", "const"] = "none" if self.config.noise == "none" else "const"
        drawn = torch.cat([G.synthesis(part, noise=noise) for part in w.split(64)])
        best = []
        for i in range(n):
            rows = torch.full((len(w),), i, device=w.device)
            best.append(self._image_losses(drawn, self.targets.of(rows)).argmin())
        return G.broadcast(w[torch.stack(best)])

    def _stored_maps(self, n: int) -> list[Tensor]:
        noises = self.generator.noises
        maps = [getattr(noises, f"noise_{i}") for i in range(self.generator.n_latent - 1)]
        return [m.expand(n, -1, -1, -1) for m in maps]


def _spread(weight: Tensor, size: Sequence[int]) -> Tensor:
    """Weights [N, h, w] of a small map's positions, from weights [N, 1, R, R] of pixels.

    The transpose of bilinear enlargement: the sum of a map's values with these weights is that of the enlarged map with ``weight``,
    without enlarging it.
    """
    with torch.enable_grad():
        small = weight.new_zeros(len(weight), 1, *size).requires_grad_()
        large = F.interpolate(small, size=weight.shape[2:], mode="bilinear", align_corners=False)
        (gradient,) = torch.autograd.grad(large, small, weight)
    return gradient[:, 0]


def _standardised(maps: Tensor) -> Tensor:
    """Each row [n, h w] with mean 0 and variance 1: where noise maps stay in the projector of [StyleGAN2], as part of the function."""
    centred = maps - maps.mean(1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + 1e-8)


def _autocorrelation(noise: Tensor) -> Tensor:
    """How much noise maps [n, 1, h, w] resemble themselves one pixel on, at every scale down to 8 px: [n].

    Implements the noise regularisation of Karras et al. 2020 [StyleGAN2], appendix D.
    """
    total = noise.new_zeros(len(noise))
    while True:
        for dim in (2, 3):
            total = total + (noise * noise.roll(1, dim)).mean((1, 2, 3)).square()
        if noise.shape[2] <= 8:
            return total
        noise = 2 * F.avg_pool2d(noise, 2)  # the mean of four, at unit variance again


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


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _check_networks(generator: Generator, encoder: nn.Module | None, perceptual: FeatureNetwork | None) -> None:
    """Raise InputError unless they are networks of one dtype and one device, and the encoder is for the generator."""
    if not isinstance(generator, Generator):
        raise InputError(
            f"generator must be a Generator, got {type(generator).__name__}; load_generator reads one from a file."
        )
    for name, given in (("encoder", encoder), ("perceptual", perceptual)):
        if not isinstance(given, nn.Module | None):
            raise InputError(f"{name} must be a network, got {type(given).__name__}; load it from its file first.")
    if isinstance(encoder, ImageEncoder):
        check_encoder(encoder, generator)
    like = generator.latent_avg
    for network in (encoder, perceptual):
        weights = [] if network is None else list(network.parameters())[:1]
        if any((w.dtype, w.device) != (like.dtype, like.device) for w in weights):
            raise InputError(
                f"{type(network).__name__} must be {like.dtype} on {like.device}, as the generator is, got "
                f"{weights[0].dtype} on {weights[0].device}; move it with .to."
            )


def _check_images(images: Tensor, generator: Generator) -> Tensor:
    """The images [N, C, R, R], in the generator's dtype and on its device."""
    expected = (generator.n_channels, generator.resolution, generator.resolution)
    if not torch.is_tensor(images) or not images.is_floating_point():
        got = images.dtype if torch.is_tensor(images) else type(images).__name__
        raise InputError(
            f"images must be a floating-point tensor in [-1, 1], got {got}; data.images.to_float converts."
        )
    if images.ndim != 4 or images.shape[1:] != expected or len(images) == 0:
        raise InputError(
            f"images must have shape [N, {expected[0]}, {expected[1]}, {expected[2]}] for this generator with N at least 1, "
            f"got {list(images.shape)}; resize them when reading."
        )
    images = images.detach().to(generator.latent_avg)
    largest = images.abs().amax((1, 2, 3))
    wrong = torch.nonzero(~(largest <= _LARGEST)).flatten().tolist()
    if wrong:
        size = float(largest[wrong[0]])
        raise InputError(
            f"images must lie in [-1, 1], got a value of size {size:.4g} in image {wrong[0]}; scale or repair them."
        )
    return images


def _check_codes(codes: Sequence[Any], generator: Generator) -> Tensor:
    """The outputs [1, L, D] of an encoder, one an image, as one tensor."""
    expected = (1, generator.n_latent, generator.style_dim)
    for code in codes:
        if not torch.is_tensor(code) or code.shape != expected:
            got = list(code.shape) if torch.is_tensor(code) else type(code).__name__
            raise InputError(
                f"encoder must give latents {list(expected)} for an image, as the generator takes, got {got}."
            )
    return torch.cat(list(codes))


def _check_mask(mask: Tensor | None, images: Tensor) -> Tensor:
    """The mask of every image [N, 1, R, R], all ones when there is none."""
    n, _, h, w = images.shape
    if mask is None:
        return images.new_ones(n, 1, h, w)
    if not torch.is_tensor(mask) or mask.is_complex():
        got = mask.dtype if torch.is_tensor(mask) else type(mask).__name__
        raise InputError(f"mask must be a tensor of numbers in [0, 1], got {got}; torch.from_numpy converts an array.")
    if mask.ndim != 4 or mask.shape[0] not in (1, n) or mask.shape[1:] != (1, h, w):
        raise InputError(
            f"mask must have shape [{n} or 1, 1, {h}, {w}], as the images have it, got {list(mask.shape)}."
        )
    mask = mask.detach().to(images)
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise InputError("mask must lie in [0, 1], 1 where a pixel counts, got other values; scale it.")
    empty = torch.nonzero(mask.sum((1, 2, 3)) == 0).flatten().tolist()
    if empty:
        raise InputError(f"mask hides all of image {empty[0]}, so nothing is left to project; leave that image out.")
    return mask.expand(n, -1, -1, -1)


def _check_start(start: Tensor | None, n: int, generator: Generator) -> Tensor | None:
    if start is None:
        return None
    expected = (n, generator.n_latent, generator.style_dim)
    if not torch.is_tensor(start):
        raise InputError(f"start must be a tensor of absolute latents {list(expected)}, got {type(start).__name__}.")
    if start.shape != expected or not bool(torch.isfinite(start).all()):
        raise InputError(f"start must be finite absolute latents {list(expected)}, got {list(start.shape)}.")
    return start.detach().to(generator.latent_avg)


def _check_finite(losses: Tensor) -> None:
    wrong = torch.nonzero(~torch.isfinite(losses)).flatten().tolist()
    if wrong:
        raise InputError(
            f"the loss of image {wrong[0]} is not a number from the start; the networks or the start are damaged."
        )
