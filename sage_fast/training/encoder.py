"""Train the encoder that maps images to W+ offsets of a given generator ([SAGE], Eq. 3; pSp, Richardson et al. 2021).

Mean squared error, perceptual distance and a small norm of the offsets; with ``tune_generator`` the generator goes on
learning beside it (see :mod:`sage_fast.training.tuning`).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sage_fast.errors import InputError
from sage_fast.models.encoders import PyramidEncoder
from sage_fast.models.perceptual import load_perceptual, perceptual_distance
from sage_fast.models.stylegan2 import Discriminator, Generator
from sage_fast.training.losses import code_norm, pixel_mse
from sage_fast.training.runtime import PRECISIONS, Run, autocast, draw_batch, ema_update
from sage_fast.training.tuning import GeneratorTuning

__all__ = ["EncoderConfig", "train_encoder"]


@dataclass(frozen=True)
class EncoderConfig:
    """Settings of :func:`train_encoder`; resolution, styles and channels are the generator's.

    ``perceptual``: ``"discriminator"`` (features of the discriminator as it was given), ``"none"``, ``"lpips-..."`` or a
    weights file: see :func:`sage_fast.models.perceptual.load_perceptual`.
    ``noise``: the generator's noise during training and, for the same images, afterwards: ``"none"`` or ``"const"``.
    """

    total_steps: int = 20_000
    batch: int = 16
    channel_base: int = 1024
    channel_max: int = 128
    head_width: int = 32
    lr: float = 0.001
    warmup: int = 200  # steps of linear increase; a cosine to lr_end follows
    lr_end: float = 0.01  # share of lr left at the last step
    mse_weight: float = 1.0
    perceptual_weight: float = 0.1
    perceptual: str = "discriminator"
    perceptual_share: float = 1.0  # of the batch that the perceptual term looks at: it costs as much as all the rest
    norm_weight: float = 0.0005
    noise: str = "none"
    flip: bool = True
    precision: str = "float32"  # or "bfloat16": see sage_fast.training.runtime.autocast
    ema_kimg: float = 5.0
    n_validation: int = 128  # images held out to measure val_mse; at most a twentieth of all
    seed: int = 0
    log_every: int = 50
    save_every: int = 1000
    grid_every: int = 1000
    tune_generator: bool = False
    adversarial_weight: float = 0.02  # these apply with tune_generator only
    tune_lr: float = 0.001
    tune_mapping: bool = False
    r1_gamma: float | None = None  # None: 0.0002 resolution^2 / batch, the rule of StyleGAN2-ADA
    r1_every: int = 16

    def __post_init__(self) -> None:
        positive = ("total_steps", "batch", "channel_base", "channel_max", "head_width", "lr", "ema_kimg", "log_every")
        for name in (*positive, "save_every", "grid_every", "tune_lr", "r1_every"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} must be positive, got {getattr(self, name)}.")
        for name in ("mse_weight", "perceptual_weight", "norm_weight", "adversarial_weight", "warmup", "n_validation"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}.")
        if self.precision not in PRECISIONS:
            raise InputError(f"precision must be {' or '.join(PRECISIONS)}, got '{self.precision}'.")
        if self.noise not in ("none", "const"):
            raise InputError(
                f"noise must be 'none' or 'const' so that a code stands for one image, got '{self.noise}'."
            )
        for name in ("lr_end", "perceptual_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is a share, expected 0 to 1, got {getattr(self, name)}.")
        if self.tune_generator and self.batch < 4:
            raise InputError(f"batch must be at least 4 with tune_generator, got {self.batch}.")
        if self.mse_weight == 0 and (self.perceptual_weight == 0 or self.perceptual == "none"):
            raise InputError("mse_weight and the perceptual term are both off; the encoder needs one of them.")


def train_encoder(
    config: EncoderConfig,
    images: Tensor,
    generator: Generator,
    discriminator: Discriminator | None,
    folder: str | Path,
    resume: bool = False,
    device: str | torch.device = "cpu",
) -> PyramidEncoder:
    """Train from uint8 images [M, C, R, R]; returns the averaged encoder in eval mode, offsets from ``generator.latent_avg``.

    The generator and the discriminator given stay as they are, unless ``config.tune_generator``: then their weights are
    replaced by the tuned ones (the generator's average), ``latent_avg`` excepted. Checkpoints continue bit for bit.

    Deviation: pSp adds an identity loss for faces and needs none of the averaging; codes of a small generator move less
    between checkpoints with it.

    Raises:
        InputError: the images do not fit the generator, a network is missing, or a loss is not finite.
    """
    _check_images(images, generator, config)
    run = Run(folder, "encoder", config, resume)
    rng = torch.Generator().manual_seed(config.seed)
    E = _new_encoder(config, generator).to(device)
    average = copy.deepcopy(E).eval().requires_grad_(False)
    optim = torch.optim.Adam(E.parameters(), lr=config.lr, betas=(0.9, 0.999))
    perceptual = load_perceptual(config.perceptual, discriminator) if config.perceptual_weight else None
    parts: dict[str, torch.nn.Module | torch.optim.Optimizer] = {"E": E, "average": average, "optim": optim}
    if perceptual is not None:
        perceptual = perceptual.to(device)
    if config.tune_generator:
        tuning = GeneratorTuning(config, generator, discriminator, device)
        G, synthesis = tuning.G, tuning.average_G
        parts |= tuning.parts() | ({"perceptual": perceptual} if perceptual is not None else {})
    else:
        tuning, G = None, copy.deepcopy(generator).to(device).eval().requires_grad_(False)
        synthesis = G
    n_perceptual = max(1, round(config.perceptual_share * config.batch))
    train, held_out = _split(len(images), config.n_validation)
    check = _batch(images, held_out if len(held_out) else train[:32], False, rng, device)

    first = 0
    if state := run.load():
        for name, part in parts.items():
            part.load_state_dict(state[name])
        rng.set_state(state["rng"])
        first = state["step"]
    else:
        run.grid("reals", check[:32])

    for step in run.track(first, config.total_steps):
        rate = _rate(step, config)
        optim.param_groups[0]["lr"] = config.lr * rate
        real = _batch(images, train[draw_batch(len(train), config.batch, rng)], config.flip, rng, device)

        # reconstruction
        with autocast(config.precision, device):
            offsets = E(real).float()
            if tuning is None:
                rebuilt = G(offsets + G.latent_avg, noise=config.noise)
                adversarial = real.new_zeros(())
            else:
                rebuilt, adversarial = tuning.generate(offsets + G.latent_avg, rng)
            mse, norm = pixel_mse(rebuilt, real), code_norm(offsets)
            distance = real.new_zeros(())
            if perceptual is not None:
                distance = perceptual_distance(perceptual, rebuilt[:n_perceptual], real[:n_perceptual])
        loss = config.mse_weight * mse + config.perceptual_weight * distance + config.norm_weight * norm
        loss = loss + config.adversarial_weight * adversarial

        optim.zero_grad(set_to_none=True)
        if tuning is None:
            loss.backward()
        else:
            tuning.step_generator(loss, rate)
        optim.step()
        if tuning is not None:
            tuning.step_discriminator(real, step, rate)

        done = step + 1
        decay = _decay(config, done)
        ema_update(average, E, decay)
        if tuning is not None:
            tuning.average(decay)
        if done % config.log_every == 0 or done == config.total_steps:
            scalars: dict[str, Tensor | float] = {"loss": loss, "mse": mse, "norm": norm, "lr": config.lr * rate}
            if perceptual is not None:
                scalars[f"perceptual_{perceptual.name}"] = distance
            run.log(done, **scalars, **(tuning.scalars if tuning else {}))
        if done % config.grid_every == 0 or done == config.total_steps:
            rebuilt = _reconstruct(average, synthesis, check, config.noise)
            run.grid(f"rebuilt_{done:06d}", rebuilt[:32])
            run.log(done, val_mse=pixel_mse(rebuilt, check))
        if done % config.save_every == 0 or done == config.total_steps:
            weights = {name: part.state_dict() for name, part in parts.items()}
            run.save({**weights, "rng": rng.get_state(), "step": done})
    if tuning is not None:
        tuning.write_back(generator, discriminator)
    return average.eval()


def _new_encoder(config: EncoderConfig, generator: Generator) -> PyramidEncoder:
    """A fresh encoder for the generator; leaves torch's own random state alone."""
    sizes = (config.channel_base, config.channel_max, config.head_width)
    shape = (generator.resolution, generator.n_latent, generator.style_dim, generator.n_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return PyramidEncoder(*shape, *sizes)


def _rate(step: int, config: EncoderConfig) -> float:
    """Share of the learning rate at a step: linear warm-up, then a cosine down to ``lr_end``."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.total_steps - config.warmup)
    return config.lr_end + (1 - config.lr_end) * 0.5 * (1 + math.cos(math.pi * done))


def _decay(config: EncoderConfig, done: int) -> float:
    """Decay of the averages: the half-life is ``ema_kimg``, at first a twentieth of the images shown."""
    half_life = min(config.ema_kimg * 1000, done * config.batch * 0.05)
    return 0.5 ** (config.batch / half_life)


@torch.no_grad()
def _reconstruct(encoder: PyramidEncoder, generator: Generator, images: Tensor, noise: str) -> Tensor:
    rebuilt = [generator(encoder(part) + generator.latent_avg, noise=noise) for part in images.split(32)]
    return torch.cat(rebuilt)


def _split(n_images: int, n_validation: int) -> tuple[Tensor, Tensor]:
    """Indices to train on and evenly spaced ones held out (at most a twentieth)."""
    n_held = min(n_validation, n_images // 20)
    held = torch.zeros(n_images, dtype=torch.bool)
    if n_held:
        held[torch.arange(n_held) * n_images // n_held] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def _batch(images: Tensor, index: Tensor, flip: bool, rng: torch.Generator, device: str | torch.device) -> Tensor:
    """Float images in [-1, 1] of the given indices, each mirrored with probability one half if ``flip``."""
    x = images[index].to(device).float() / 127.5 - 1
    if flip:
        mirrored = (torch.rand(len(x), generator=rng) < 0.5).to(device)
        x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)
    return x


def _check_images(images: Tensor, generator: Generator, config: EncoderConfig) -> None:
    expected = (generator.n_channels, generator.resolution, generator.resolution)
    if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != expected:
        raise InputError(
            f"images must be uint8 [M, {expected[0]}, {expected[1]}, {expected[2]}] for this generator, "
            f"got {images.dtype} {list(images.shape)}; read them at its resolution."
        )
    if len(images) == 0:
        raise InputError("training the encoder needs images, got none; check the data folder.")
