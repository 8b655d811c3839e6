"""e4e's training: codes that grow from one w, kept where the mapping network puts its own (Tov et al. 2021, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sage_fast.errors import InputError
from sage_fast.models.latent_discriminator import LatentDiscriminator
from sage_fast.models.stylegan2 import Generator
from sage_fast.settings import check_not_negative, check_numbers, check_positive
from sage_fast.training.losses import logistic_d, nonsaturating_g, r1_penalty
from sage_fast.training.updates import Guard, Update

__all__ = ["E4EConfig", "LatentCritic", "delta_norm", "stage_of"]


@dataclass(frozen=True)
class E4EConfig:
    """Settings of kind ``"e4e"``: the deltas join one by one (in the paper's program at steps 20,000 to 54,000 of 200,000)."""

    w_share: float = 0.1  # share of the steps without deltas
    deltas_by: float = 0.3  # share of the steps after which all deltas have joined
    delta_weight: float = 0.0002  # of the norm of the deltas
    adversarial_weight: float = 0.1  # of the latent discriminator's verdict
    discriminator_lr: float = 0.0002  # of the latent discriminator; Adam
    n_layers: int = 4  # of the latent discriminator
    r1_gamma: float = 10.0  # of the latent discriminator
    r1_every: int = 16  # steps from one R1 penalty of the latent discriminator to the next

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 0 <= self.w_share <= self.deltas_by <= 1:
            raise InputError(
                f"w_share and deltas_by are shares of the steps, expected 0 <= w_share <= deltas_by <= 1, got "
                f"{self.w_share} and {self.deltas_by}."
            )
        check_not_negative(self, "delta_weight", "adversarial_weight", "r1_gamma")
        check_positive(self, "discriminator_lr", "n_layers", "r1_every")


def stage_of(step: int, total_steps: int, n_styles: int, config: E4EConfig) -> int:
    """The last style that adds its delta at a step: 0 to ``n_styles - 1``, evenly between the two shares."""
    first, last = config.w_share * total_steps, config.deltas_by * total_steps
    if step < first:
        return 0
    if step >= last:
        return n_styles - 1
    return min(n_styles - 1, 1 + int((step - first) / (last - first) * (n_styles - 1)))


def delta_norm(offsets: Tensor, stage: int) -> Tensor:
    """Sum over styles 1 to ``stage`` of the Euclidean norm of their difference from style 0, mean over images (e4e, Eq. 7)."""
    deltas = offsets[:, 1 : stage + 1] - offsets[:, :1]
    return deltas.square().sum(2).add(1e-12).sqrt().sum(1).mean()


class LatentCritic:
    """The latent discriminator beside an encoder's loop: non-saturating loss, R1 on w.

    Deviation: the paper's program shows the discriminator one style an image, half of them from a pool of 50 old ones; here it
    sees every style that has joined, so a batch holds more of them than that pool.
    """

    def __init__(self, config: E4EConfig, generator: Generator, guard: Guard, seed: int) -> None:
        check_prior(generator)
        self.config, self.device = config, guard.run.ranks.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.D = LatentDiscriminator(generator.style_dim, config.n_layers).to(self.device)
        self.optim = torch.optim.Adam(self.D.parameters(), lr=config.discriminator_lr, fused=True)
        self.update, self.r1_update = Update("latent_d_loss", self.optim, guard), Update("latent_r1", self.optim, guard)
        self.scalars: dict[str, Tensor] = {}

    def parts(self) -> dict[str, torch.nn.Module | torch.optim.Optimizer]:
        """What a checkpoint needs, by name."""
        return {"latent_D": self.D, "latent_optim": self.optim}

    def verdict(self, w_plus: Tensor) -> Tensor:
        """The encoder's adversarial loss for absolute styles [N, S, D]: the mean over all of them."""
        self.D.requires_grad_(False)
        return nonsaturating_g(self.D(w_plus.flatten(0, 1)))

    def step(self, w_plus: Tensor, generator: Generator, step: int, z: Tensor) -> None:
        """One update from absolute styles [N, S, D] and the mapping network's samples of z [N, Z]; R1 every ``r1_every`` steps."""
        c = self.config
        with torch.no_grad():
            real = generator.mapping(z.to(self.device))
        self.D.requires_grad_(True)
        loss = logistic_d(self.D(real), self.D(w_plus.detach().flatten(0, 1)))
        self.update.add(loss)
        self.scalars = {"latent_d_loss": self.update.apply()}
        if step % c.r1_every == 0:
            real.requires_grad_(True)
            self.r1_update.add(r1_penalty(self.D(real), real), c.r1_gamma / 2 * c.r1_every)
            self.r1_update.apply()


def check_prior(generator: Generator) -> None:
    """Raise InputError for a generator that :class:`LatentCritic` cannot take samples of w from."""
    if generator.c_dim:
        raise InputError("kind 'e4e' needs an unconditional generator, whose w it compares codes with; use 'psp'.")
