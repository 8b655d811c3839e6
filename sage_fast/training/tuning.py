"""Let a generator go on learning while its encoder is trained.

Deviation from [SAGE], which freezes the generator before inversion: a small generator trained for hours cannot show every
category faithfully, so inverted images lose their category whatever the encoder does. Here the generator also learns to rebuild
the images, and stays a generator: its adversarial loss goes on for prior samples, for reconstructions and for
reconstructions of mixed codes, so that the space between codes (where class means and edits lie) stays photographic.
``latent_avg`` never changes: offsets keep their meaning. The mapping network is frozen too unless asked, so
``latent_avg`` stays the mean of w and truncation stays valid.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sage_fast.arithmetic import autocast
from sage_fast.errors import InputError
from sage_fast.models.discriminator import group_size
from sage_fast.models.stylegan2 import Discriminator, Generator
from sage_fast.ops.convolution import second_derivatives
from sage_fast.training.losses import logistic_d, nonsaturating_g, r1_penalty
from sage_fast.training.ranks import Ranks
from sage_fast.training.runtime import ema_update
from sage_fast.training.shares import logits_of_both, share_out
from sage_fast.training.updates import Guard, Update

if TYPE_CHECKING:
    from sage_fast.training.encoder import EncoderConfig

__all__ = ["GeneratorTuning", "check_tunable", "mix_codes"]


class GeneratorTuning:
    """Generator, discriminator, their optimizers and the generator's average, beside an encoder's loop.

    Of the fakes the discriminator sees in a step, half are prior samples, a quarter mixed codes, a quarter reconstructions. They are
    made for the whole batch: each rank draws its :meth:`~sage_fast.training.ranks.Ranks.share`, whole groups of the minibatch
    standard deviation, of codes mixed from those of all ranks.
    """

    def __init__(
        self,
        config: EncoderConfig,
        generator: Generator,
        discriminator: Discriminator | None,
        guard: Guard,
    ) -> None:
        self.ranks = guard.run.ranks
        check_tunable(generator, discriminator, config.batch, self.ranks)
        assert discriminator is not None
        self.config, self.device = config, self.ranks.device
        self.G = copy.deepcopy(generator).to(self.device).train().requires_grad_(True)
        self.G.style.requires_grad_(config.tune_mapping)
        self.D = copy.deepcopy(discriminator).to(self.device).train().requires_grad_(True)
        self.average_G = copy.deepcopy(self.G).eval().requires_grad_(False)
        learned = [p for p in self.G.parameters() if p.requires_grad]
        c = config.r1_every / (config.r1_every + 1)  # lazy regularisation, StyleGAN2 appendix B
        self.g_optim = torch.optim.Adam(learned, lr=config.tune_lr, betas=(0.0, 0.99), fused=True)
        self.d_optim = torch.optim.Adam(self.D.parameters(), lr=config.tune_lr * c, betas=(0.0, 0.99**c), fused=True)
        self.g_update = Update("loss", self.g_optim, guard)
        self.d_update, self.r1_update = Update("d_loss", self.d_optim, guard), Update("r1", self.d_optim, guard)
        gamma = 0.0002 * generator.resolution**2 / config.batch if config.r1_gamma is None else config.r1_gamma
        self.r1_weight = gamma / 2 * config.r1_every
        self.fakes = torch.empty(0)
        self.scalars: dict[str, Tensor] = {}

    def parts(self) -> dict[str, torch.nn.Module | torch.optim.Optimizer]:
        """What a checkpoint needs, by name."""
        names = ("G", "D", "average_G", "g_optim", "d_optim")
        return {name: getattr(self, name) for name in names}

    def generate(self, w_plus: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Reconstructions [n, C, R, R] of this rank's absolute codes [n, L, D], and the generator's adversarial loss.

        Args:
            rng: equal on all ranks.
        """
        batch, rank, world = self.config.batch, self.ranks.rank, self.ranks.world
        n_mixed, n_prior = batch // 4, batch // 2
        n_rebuilt = batch - n_mixed - n_prior
        mixed = mix_codes(self.ranks.whole(w_plus, batch), n_mixed, rng)
        drawn = torch.cat([mixed, self._prior(n_prior, rng)])[(rank - n_rebuilt) % world :: world]
        images = self.G(torch.cat([w_plus, drawn]), noise=self.config.noise)
        rebuilt, n = images[: len(w_plus)], len(range(rank, n_rebuilt, world))
        fakes = torch.cat([rebuilt[:n], images[len(w_plus) :]])
        self.D.requires_grad_(False)
        loss = nonsaturating_g(self.D(fakes))
        self.fakes = fakes.detach()
        self.scalars = {"g_loss": loss.detach()}
        return rebuilt, loss

    def step_generator(self, loss: Tensor, rate: float) -> None:
        """One update of the generator, with the gradients that the backward of the whole loss left beside the encoder's."""
        self.g_optim.param_groups[0]["lr"] = self.config.tune_lr * rate
        self.g_update.step(loss.detach().clone())

    def step_discriminator(self, real: Tensor, step: int, rate: float) -> None:
        """Logistic loss on the real images and the fakes of this step; R1 every ``r1_every`` steps."""
        c = self.config.r1_every / (self.config.r1_every + 1)
        self.d_optim.param_groups[0]["lr"] = self.config.tune_lr * c * rate
        self.D.requires_grad_(True)
        with autocast(self.config.precision, self.device):
            loss = logistic_d(*logits_of_both(self.D, real, self.fakes))
        self.d_update.add(loss)
        self.scalars["d_loss"] = self.d_update.apply()
        if step % self.config.r1_every == 0:
            real = real.detach().requires_grad_(True)
            with second_derivatives(), autocast(self.config.precision, self.device):
                r1 = r1_penalty(self.D(real), real)
            self.r1_update.add(r1, self.r1_weight)
            self.r1_update.apply()

    def average(self, decay: float) -> None:
        """Update the averaged generator."""
        ema_update(self.average_G, self.G, decay)

    def write_back(self, generator: Generator, discriminator: Discriminator | None) -> None:
        """Copy the averaged generator and the discriminator into the caller's networks."""
        generator.load_state_dict(self.average_G.state_dict())
        if discriminator is not None:
            discriminator.load_state_dict(self.D.state_dict())

    def _prior(self, n: int, rng: torch.Generator) -> Tensor:
        """Absolute codes [n, L, D] of prior samples; in half of them a second w takes over from a random layer."""
        z = torch.randn(2 * n, self.G.style.z_dim, generator=rng).to(self.device)
        w, w2 = self.G.mapping(z).chunk(2)
        keep = torch.rand(n, generator=rng) < 0.5
        return _crossover(self.G.broadcast(w), self.G.broadcast(w2), keep, rng)


def check_tunable(generator: Generator, discriminator: Discriminator | None, batch: int, ranks: Ranks) -> None:
    """Raise InputError for networks that :class:`GeneratorTuning` cannot train on, or a batch that these ranks cannot share."""
    if discriminator is None:
        raise InputError(
            "tune_generator needs the discriminator of the generator's training, got none; give a model that has one, or leave "
            "tune_generator out."
        )
    if generator.c_dim or discriminator.c_dim:
        raise InputError(
            f"tune_generator samples the prior without labels, got networks of {generator.c_dim} classes; leave it out."
        )
    if ranks.world > 1:
        share_out(batch, group_size(batch, discriminator.mbstd_group), ranks.rank, ranks.world)


def mix_codes(w_plus: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """n codes made of pairs of ``w_plus`` [N, L, D]: half take over another's layers from a random one on, half lie between the two."""
    a, b = (
        w_plus[torch.randperm(len(w_plus), generator=rng)[:n]],
        w_plus[torch.randperm(len(w_plus), generator=rng)[:n]],
    )
    between = torch.rand(n, 1, 1, generator=rng).to(w_plus)
    crossed = _crossover(a, b, torch.zeros(n, dtype=torch.bool), rng)
    use_between = (torch.arange(n) % 2 == 1).view(-1, 1, 1).to(w_plus.device)
    return torch.where(use_between, torch.lerp(a, b, between), crossed)


def _crossover(a: Tensor, b: Tensor, keep: Tensor, rng: torch.Generator) -> Tensor:
    """Layers of ``a`` [n, L, D] up to a random one, of ``b`` from there; ``a`` alone where ``keep`` [n]."""
    n_latent = a.shape[1]
    cut = torch.randint(1, max(2, n_latent), (len(a),), generator=rng)
    cut[keep] = n_latent
    below = torch.arange(n_latent).view(1, -1, 1) < cut.view(-1, 1, 1)
    return torch.where(below.to(a.device), a, b)
