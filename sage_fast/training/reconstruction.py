"""How well an image is rebuilt: the losses that every kind of encoder trains with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from sage_fast.models.identity import identity_loss, load_identity
from sage_fast.models.perceptual import load_perceptual, perceptual_distance
from sage_fast.models.stylegan2 import Discriminator
from sage_fast.training.losses import code_norm, pixel_mse
from sage_fast.training.ranks import Ranks

if TYPE_CHECKING:
    from sage_fast.training.encoder import EncoderConfig

__all__ = ["Reconstruction"]


class Reconstruction:
    """Mean squared error, perceptual distance, norm of the offsets and, with a network for it, identity (pSp, Eq. 5).

    Attributes:
        perceptual: the frozen feature network, or None.
        scalars: the terms of the last call, for the log.
    """

    def __init__(self, config: EncoderConfig, discriminator: Discriminator | None, ranks: Ranks) -> None:
        self.config = config
        self.perceptual = load_perceptual(config.perceptual, discriminator) if config.perceptual_weight else None
        self.identity = None if config.identity == "none" else load_identity(config.identity).to(ranks.device)
        if self.perceptual is not None:
            self.perceptual = self.perceptual.to(ranks.device)
        self.n_perceptual = max(1, round(config.perceptual_share * config.batch / ranks.world))
        self.scalars: dict[str, Tensor] = {}

    def loss(self, rebuilt: Tensor, real: Tensor, offsets: Tensor) -> Tensor:
        """The weighted sum for images [N, C, R, R] in [-1, 1] and the offsets [N, L, D] that gave them."""
        c = self.config
        mse, norm = pixel_mse(rebuilt, real), code_norm(offsets)
        distance = real.new_zeros(())
        if self.perceptual is not None:
            n = self.n_perceptual
            distance = perceptual_distance(self.perceptual, rebuilt[:n], real[:n])
        loss = c.mse_weight * mse + c.perceptual_weight * distance + c.norm_weight * norm
        self.scalars = {"mse": mse.detach(), "norm": norm.detach()}
        if self.identity is not None:
            difference = identity_loss(self.identity, rebuilt, real)
            loss = loss + c.identity_weight * difference
            self.scalars[f"identity_{self.identity.name}"] = difference.detach()
        if self.perceptual is not None:
            self.scalars[f"perceptual_{self.perceptual.name}"] = distance.detach()
        return loss
