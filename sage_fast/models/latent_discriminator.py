"""The discriminator of latents that keeps e4e's codes where the mapping network puts its own."""

from __future__ import annotations

from torch import Tensor, nn

from sage_fast.errors import InputError

__all__ = ["LatentDiscriminator"]


class LatentDiscriminator(nn.Module):
    """w [N, D] -> logits [N, 1] by ``n_layers`` linear layers (Tov et al. 2021, section 4.2); names as in published files.

    Args:
        style_dim: D.
        n_layers: 4 in the paper's program.
    """

    def __init__(self, style_dim: int, n_layers: int = 4) -> None:
        super().__init__()
        if style_dim < 1 or n_layers < 1:
            raise InputError(f"style_dim and n_layers must be at least 1, got {style_dim} and {n_layers}.")
        layers: list[nn.Module] = []
        for _ in range(n_layers - 1):
            layers += [nn.Linear(style_dim, style_dim), nn.LeakyReLU(0.2)]
        self.mlp = nn.Sequential(*layers, nn.Linear(style_dim, 1))

    def forward(self, w: Tensor) -> Tensor:
        return self.mlp(w)
