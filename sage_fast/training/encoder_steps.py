"""One step of each kind of encoder: from a batch of images to gradients.

psp and e4e look once; restyle and hyperstyle correct a reconstruction several times, with a loss each time, and look at the last
reconstruction without gradients through it (ReStyle, section 3.3; HyperStyle, section 3.4).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sage_fast.arithmetic import autocast
from sage_fast.errors import InputError
from sage_fast.models.encoders import PyramidEncoder
from sage_fast.models.hypernets import PyramidHypernet
from sage_fast.models.hyperstyle import HyperStyle, codes_of
from sage_fast.models.image_encoder import ImageEncoder
from sage_fast.models.stylegan2 import Generator
from sage_fast.models.weight_deltas import synthesize, weight_shapes
from sage_fast.models.weights import load_encoder
from sage_fast.training.latent_critic import LatentCritic, delta_norm, stage_of
from sage_fast.training.reconstruction import Reconstruction
from sage_fast.training.tuning import GeneratorTuning
from sage_fast.training.updates import Guard, Update

if TYPE_CHECKING:
    from sage_fast.training.encoder import EncoderConfig

__all__ = ["HyperStyleSteps", "OnePassSteps", "ReStyleSteps", "new_encoder"]

Parts = dict[str, "torch.nn.Module | torch.optim.Optimizer"]


class OnePassSteps:
    """psp and e4e: one look, one reconstruction; for e4e a latent discriminator and deltas that join one by one."""

    def __init__(
        self,
        config: EncoderConfig,
        encoder: PyramidEncoder,
        generator: Generator,
        reconstruction: Reconstruction,
        tuning: GeneratorTuning | None,
        guard: Guard,
    ) -> None:
        self.config, self.E, self.G, self.device = config, encoder, generator, generator.latent_avg.device
        self.reconstruction, self.tuning = reconstruction, tuning
        self.critic = LatentCritic(config.e4e, generator, guard, config.seed) if config.kind == "e4e" else None
        self.share = guard.run.ranks.share(config.batch)
        self.styles = torch.empty(0)
        self.scalars: dict[str, Tensor | float] = {}

    def parts(self) -> Parts:
        """What a checkpoint needs beside the encoder, by name."""
        critic = self.critic.parts() if self.critic else {}
        return critic | (self.tuning.parts() if self.tuning else {})

    def backward(self, update: Update, real: Tensor, step: int, rate: float, rng: torch.Generator) -> Tensor:
        """Gradients of the encoder for images [N, C, R, R] in [-1, 1]; returns the loss. A tuned generator is updated."""
        c = self.config
        if self.critic is not None:
            self.E.stage = stage_of(step, c.total_steps, self.E.n_styles, c.e4e)
        with autocast(c.precision, self.device):
            offsets = self.E(real).to(self.G.latent_avg)
            w_plus = offsets + self.G.latent_avg
            if self.tuning is None:
                rebuilt, adversarial = self.G(w_plus, noise=c.noise), real.new_zeros(())
            else:
                rebuilt, adversarial = self.tuning.generate(w_plus, rng)
            loss = self.reconstruction.loss(rebuilt, real, offsets)
        loss = loss + c.adversarial_weight * adversarial
        self.scalars = {**self.reconstruction.scalars, **(self.tuning.scalars if self.tuning else {})}
        if self.critic is not None:
            loss = loss + self._latent_loss(self.critic, w_plus)
        if self.tuning is not None:
            self.tuning.g_optim.zero_grad(set_to_none=True)
        update.add(loss)
        if self.tuning is not None:
            self.tuning.step_generator(loss, rate)
        return loss.detach()

    def after(self, real: Tensor, step: int, rate: float, rng: torch.Generator) -> None:
        """What is updated once the encoder has been: the discriminators. ``rng`` is equal on all ranks."""
        if self.tuning is not None:
            self.tuning.step_discriminator(real, step, rate)
            self.scalars |= self.tuning.scalars
        if self.critic is not None:
            z = torch.randn(self.config.batch, self.G.style.z_dim, generator=rng)[self.share]
            self.critic.step(self.styles, self.G, step, z)
            self.scalars |= self.critic.scalars

    def _latent_loss(self, critic: LatentCritic, w_plus: Tensor) -> Tensor:
        """e4e's two terms on the styles that have joined."""
        c = self.config.e4e
        self.styles = w_plus[:, : self.E.stage + 1]
        verdict, deltas = critic.verdict(self.styles), delta_norm(w_plus, self.E.stage)
        self.scalars |= {"latent_loss": verdict.detach(), "delta": deltas.detach(), "stage": float(self.E.stage)}
        return c.adversarial_weight * verdict + c.delta_weight * deltas


class ReStyleSteps:
    """restyle: corrections from ``latent_avg`` on, a loss after each."""

    def __init__(
        self,
        config: EncoderConfig,
        encoder: PyramidEncoder,
        generator: Generator,
        reconstruction: Reconstruction,
    ) -> None:
        self.config, self.E, self.G, self.device = config, encoder, generator, generator.latent_avg.device
        self.reconstruction = reconstruction
        self.start = encoder.average_image(generator, config.noise)
        self.scalars: dict[str, Tensor | float] = {}

    def parts(self) -> Parts:
        """Nothing beside the encoder."""
        return {}

    def backward(self, update: Update, real: Tensor, step: int, rate: float, rng: torch.Generator) -> Tensor:
        """Gradients of the encoder, summed over the corrections; returns the last loss."""
        rendered = self.start.expand(len(real), -1, -1, -1)
        offsets = real.new_zeros(len(real), self.E.n_latent, self.E.style_dim)
        loss = real.new_zeros(())
        for _ in range(self.E.n_iterations):
            with autocast(self.config.precision, self.device):
                offsets = offsets.detach() + self.E.correction(real, rendered).to(self.G.latent_avg)
                rebuilt = self.G(offsets + self.G.latent_avg, noise=self.config.noise)
                loss = self.reconstruction.loss(rebuilt, real, offsets)
            update.add(loss)
            rendered = rebuilt.detach().to(self.G.latent_avg)
        self.scalars = dict(self.reconstruction.scalars)
        return loss.detach()

    def after(self, real: Tensor, step: int, rate: float, rng: torch.Generator) -> None:
        """Nothing is left to do."""


class HyperStyleSteps:
    """hyperstyle: first the encoder into W, then, with that frozen, the hypernetwork."""

    def __init__(
        self,
        config: EncoderConfig,
        encoder: HyperStyle,
        average: HyperStyle,
        generator: Generator,
        reconstruction: Reconstruction,
    ) -> None:
        self.config, self.E, self.average, self.G = config, encoder, average, generator
        self.device = generator.latent_avg.device
        self.reconstruction = reconstruction
        self.scalars: dict[str, Tensor | float] = {}

    def parts(self) -> Parts:
        """Nothing beside the encoder."""
        return {}

    def backward(self, update: Update, real: Tensor, step: int, rate: float, rng: torch.Generator) -> Tensor:
        """Gradients of the encoder into W, or those of the hypernetwork summed over its refinements; the last loss."""
        if step == self.config.w_steps:  # from here on the codes are those of the average
            self.E.w_encoder.load_state_dict(self.average.w_encoder.state_dict())
        loss = (self._code if step < self.config.w_steps else self._refinements)(update, real)
        self.scalars = dict(self.reconstruction.scalars)
        return loss

    def after(self, real: Tensor, step: int, rate: float, rng: torch.Generator) -> None:
        """Nothing is left to do."""

    def _code(self, update: Update, real: Tensor) -> Tensor:
        with autocast(self.config.precision, self.device):
            offsets = self.E.w_encoder(real).to(self.G.latent_avg)
            rebuilt = self.G(offsets + self.G.latent_avg, noise=self.config.noise)
            loss = self.reconstruction.loss(rebuilt, real, offsets)
        update.add(loss)
        return loss.detach()

    def _refinements(self, update: Update, real: Tensor) -> Tensor:
        with torch.no_grad(), autocast(self.config.precision, self.device):
            offsets = self.E.w_encoder.invert(real, self.G, self.config.noise).offsets.to(self.G.latent_avg)
            w_plus = offsets + self.G.latent_avg
            rendered = self.G(w_plus, noise=self.config.noise).to(self.G.latent_avg)
        deltas, loss = None, real.new_zeros(())
        for _ in range(self.E.n_iterations):
            with autocast(self.config.precision, self.device):
                deltas = self.E.refine(real, rendered, deltas)
                rebuilt = synthesize(self.G, w_plus, deltas, self.config.noise)
                loss = self.reconstruction.loss(rebuilt, real, offsets)
            update.add(loss)
            rendered = rebuilt.detach().to(self.G.latent_avg)
            deltas = tuple(None if delta is None else delta.detach() for delta in deltas)
        return loss.detach()


def new_encoder(config: EncoderConfig, generator: Generator) -> ImageEncoder:
    """A fresh encoder of the config's kind for the generator; leaves torch's own random state alone.

    Raises:
        InputError: the encoder that ``hyperstyle.w_encoder`` names is of another generator.
    """
    sizes: dict[str, Any] = {"channel_base": config.channel_base, "channel_max": config.channel_max}
    shape = (generator.resolution, generator.n_latent, generator.style_dim, generator.n_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.kind != "hyperstyle":
            n_iterations = config.iterations if config.kind == "restyle" else 0
            sizes |= {"head_width": config.head_width, "progressive": config.kind == "e4e"}
            return PyramidEncoder(*shape, **sizes, n_iterations=n_iterations)
        given = config.hyperstyle.w_encoder
        if given is None:
            w_encoder: ImageEncoder = PyramidEncoder(
                *shape, **sizes, head_width=config.head_width, progressive=True, n_styles=1
            )
        else:
            w_encoder = _fitting(codes_of(load_encoder(given)), generator, given)
        hypernet = PyramidHypernet(
            generator.resolution,
            weight_shapes(generator),
            generator.n_channels,
            **sizes,
            head_width=config.hyperstyle.head_width,
            rank=config.hyperstyle.rank,
        )
        return HyperStyle(w_encoder, hypernet, config.iterations)


def _fitting(encoder: ImageEncoder, generator: Generator, path: str) -> ImageEncoder:
    shape, wanted = ((x.n_latent, x.style_dim, x.n_channels) for x in (encoder, generator))
    if shape != wanted:
        raise InputError(
            f"the encoder in {path!r} has {shape[0]} styles of width {shape[1]} for {shape[2]} channels, the generator "
            f"{wanted[0]}, {wanted[1]} and {wanted[2]}; give one that was trained with this generator."
        )
    return encoder
