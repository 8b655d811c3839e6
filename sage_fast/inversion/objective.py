"""What a projection minimises: the loss of every image by itself, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sage_fast.inversion.config import ProjectionConfig
from sage_fast.inversion.inputs import check_codes
from sage_fast.models.hyperstyle import codes_of
from sage_fast.models.image_encoder import ImageEncoder
from sage_fast.models.perceptual import FeatureNetwork, distance_maps, normalised_features
from sage_fast.models.stylegan2 import Generator

__all__ = ["Objective", "autocorrelation", "spread"]


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


class Objective:
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
            weights = [spread(weight, x.shape[2:]) for x in features]
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
            code = average + check_codes([self._encode(image[None]) for image in shown], self.generator)
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
            loss = loss + config.noise_weight * sum(autocorrelation(m) for m in noise)
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
        rng = torch.Generator().manual_seed(self.config.seed)
        z = torch.randn(self.config.n_candidates, G.style.z_dim, generator=rng).to(G.latent_avg)
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


def spread(weight: Tensor, size: Sequence[int]) -> Tensor:
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


def autocorrelation(noise: Tensor) -> Tensor:
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
