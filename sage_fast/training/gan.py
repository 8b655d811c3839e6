"""Train a StyleGAN2 generator and discriminator (Karras et al. 2020).

Non-saturating logistic loss, lazy R1 and lazy path-length regularisation, style mixing, and an exponential moving
average of the generator with ramp-up. One function, read from top to bottom.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sage_fast.errors import InputError
from sage_fast.models.stylegan2 import Discriminator, Generator
from sage_fast.training.losses import logistic_d, nonsaturating_g, path_length_penalty, r1_penalty
from sage_fast.training.runtime import PRECISIONS, Run, autocast, draw_batch, ema_update

__all__ = ["GANConfig", "train_gan"]


@dataclass(frozen=True)
class GANConfig:
    """Settings of :func:`train_gan`. The defaults suit 32 to 64 px on a CPU; kimg = thousands of real images shown."""

    resolution: int = 32
    n_channels: int = 3
    style_dim: int = 64
    n_mapping: int = 4
    channel_base: int = 1024
    channel_max: int = 128
    total_kimg: float = 400.0
    batch: int = 16
    lr: float = 0.0025
    r1_gamma: float | None = None  # None: 0.0002 resolution^2 / batch, the rule of StyleGAN2-ADA
    r1_every: int = 16
    pl_weight: float = 0.0  # StyleGAN2 uses 2; off for small images, as in StyleGAN2-ADA's 32 px setting
    pl_every: int = 8
    pl_decay: float = 0.01
    style_mixing: float = 0.5  # probability; StyleGAN2 uses 0.9
    ema_kimg: float = 5.0
    ema_rampup: float | None = 0.05
    latent_avg_decay: float = 0.998
    flip: bool = True
    precision: str = "float32"  # or "bfloat16": see sage_fast.training.runtime.autocast
    seed: int = 0
    log_every: int = 50
    save_every: int = 1000
    grid_every: int = 1000

    def __post_init__(self) -> None:
        if self.batch < 2:
            raise InputError(f"batch must be at least 2 for the minibatch standard deviation, got {self.batch}.")
        for name in ("total_kimg", "lr", "r1_every", "pl_every", "log_every", "save_every", "grid_every", "ema_kimg"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} must be positive, got {getattr(self, name)}.")
        if self.precision not in PRECISIONS:
            raise InputError(f"precision must be {' or '.join(PRECISIONS)}, got '{self.precision}'.")
        if not 0 <= self.style_mixing <= 1:
            raise InputError(f"style_mixing is a probability, expected 0 to 1, got {self.style_mixing}.")

    @property
    def gamma(self) -> float:
        """Weight of R1: ``r1_gamma``, or the rule of StyleGAN2-ADA."""
        return 0.0002 * self.resolution**2 / self.batch if self.r1_gamma is None else self.r1_gamma


def train_gan(
    config: GANConfig, images: Tensor, folder: str | Path, resume: bool = False, device: str | torch.device = "cpu"
) -> tuple[Generator, Discriminator]:
    """Train from uint8 images [M, C, R, R]; returns the averaged generator and the discriminator, in eval mode.

    Each step shows ``config.batch`` real images: one generator update, then one discriminator update on the same fakes
    (which saves a generator pass; StyleGAN2 draws new ones). Checkpoints continue bit for bit with ``resume``.

    Raises:
        InputError: the images do not fit the config, or a loss is not finite.
    """
    _check_images(images, config)
    run = Run(folder, "gan", config, resume)
    torch.manual_seed(config.seed)
    size: dict[str, Any] = dict(channel_base=config.channel_base, channel_max=config.channel_max)
    G = Generator(config.resolution, config.style_dim, config.n_mapping, config.n_channels, **size).to(device)
    D = Discriminator(config.resolution, config.n_channels, **size).to(device)
    average = copy.deepcopy(G).eval().requires_grad_(False)
    g_optim = _lazy_adam(G, config.lr, config.pl_every if config.pl_weight else 0)
    d_optim = _lazy_adam(D, config.lr, config.r1_every)
    rng = torch.Generator().manual_seed(config.seed)
    path_mean, r1, first = torch.zeros([], device=device), torch.zeros([]), 0
    z_grid = torch.randn(64, config.style_dim, generator=torch.Generator().manual_seed(config.seed)).to(device)

    if state := run.load():
        for name, part in (("G", G), ("D", D), ("average", average), ("g_optim", g_optim), ("d_optim", d_optim)):
            part.load_state_dict(state[name])
        rng.set_state(state["rng"])
        torch.set_rng_state(state["torch_rng"])
        path_mean, first = state["path_mean"].to(device), state["step"]
    else:
        run.grid("reals", _batch(images, torch.arange(64) % len(images), False, rng, device))

    total = max(1, round(config.total_kimg * 1000 / config.batch))
    for step in run.track(first, total):
        real = _batch(images, draw_batch(len(images), config.batch, rng), config.flip, rng, device)

        # generator: non-saturating logistic loss
        D.requires_grad_(False)
        w_plus = _mixed_w_plus(G, config, rng, device)
        with autocast(config.precision, device):
            fake = G(w_plus, noise="random", rng=rng if torch.device(device).type == "cpu" else None)
            g_loss = nonsaturating_g(D(fake))
        g_optim.zero_grad(set_to_none=True)
        g_loss.backward()
        g_optim.step()

        # generator: path length (lazy)
        if config.pl_weight and step % config.pl_every == 0:
            w_plus = _mixed_w_plus(G, config, rng, device, batch=max(1, config.batch // 2))
            with autocast(config.precision, device):
                penalty, path_mean = path_length_penalty(G(w_plus), w_plus, path_mean, config.pl_decay)
            g_optim.zero_grad(set_to_none=True)
            (penalty * config.pl_weight * config.pl_every).backward()
            g_optim.step()

        # discriminator: logistic loss on the same fakes
        D.requires_grad_(True)
        with autocast(config.precision, device):
            real_logits, fake_logits = D(real), D(fake.detach())
            d_loss = logistic_d(real_logits, fake_logits)
        d_optim.zero_grad(set_to_none=True)
        d_loss.backward()
        d_optim.step()

        # discriminator: R1 (lazy)
        if step % config.r1_every == 0:
            real.requires_grad_(True)
            with autocast(config.precision, device):
                r1 = r1_penalty(D(real), real)
            d_optim.zero_grad(set_to_none=True)
            (r1 * (config.gamma / 2 * config.r1_every)).backward()
            d_optim.step()

        _average(average, G, config, (step + 1) * config.batch)
        done = step + 1
        if done % config.log_every == 0 or done == total:
            kimg = done * config.batch / 1000
            signs = real_logits.detach().sign().mean()
            run.log(done, kimg=kimg, g_loss=g_loss, d_loss=d_loss, r1=r1, real_sign=signs)
        if done % config.grid_every == 0 or done == total:
            with torch.no_grad():
                run.grid(f"fakes_{done:06d}", average(average.mapping(z_grid)))
        if done % config.save_every == 0 or done == total:
            parts: dict[str, Any] = dict(G=G, D=D, average=average, g_optim=g_optim, d_optim=d_optim)
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"rng": rng.get_state(), "torch_rng": torch.get_rng_state()}
            run.save({**state, "path_mean": path_mean, "step": done})
    return average.eval(), D.eval().requires_grad_(False)


def _lazy_adam(model: torch.nn.Module, lr: float, every: int) -> torch.optim.Adam:
    """Adam with the rates corrected for a regulariser that adds one update in ``every`` (StyleGAN2, appendix B)."""
    c = every / (every + 1) if every else 1.0
    return torch.optim.Adam(model.parameters(), lr=lr * c, betas=(0.0, 0.99**c), eps=1e-8)


def _mixed_w_plus(G: Generator, config: GANConfig, rng: torch.Generator, device, batch: int | None = None) -> Tensor:
    """w_plus [N, L, D] of prior samples; with probability ``style_mixing`` a second w takes over from a random layer."""
    n = batch or config.batch
    z = torch.randn(2 * n, config.style_dim, generator=rng).to(device)
    w, w2 = G.mapping(z).chunk(2)
    G.latent_avg.lerp_(w.detach().mean(0), 1 - config.latent_avg_decay)
    cut = torch.randint(1, G.n_latent, (n, 1, 1), generator=rng)
    cut[torch.rand(n, generator=rng) >= config.style_mixing] = G.n_latent
    layer = torch.arange(G.n_latent).view(1, -1, 1)
    return torch.where((layer < cut).to(device), w.unsqueeze(1), w2.unsqueeze(1))


def _average(average: Generator, G: Generator, config: GANConfig, n_images: int) -> None:
    """Update the averaged generator; the half-life is ``ema_kimg``, shorter at first."""
    half_life = config.ema_kimg * 1000
    if config.ema_rampup is not None:
        half_life = min(half_life, n_images * config.ema_rampup)
    ema_update(average, G, 0.5 ** (config.batch / max(half_life, 1e-8)))


def _batch(images: Tensor, index: Tensor, flip: bool, rng: torch.Generator, device) -> Tensor:
    """Float images in [-1, 1] of the given indices, each mirrored with probability one half if ``flip``."""
    x = images[index].to(device).float() / 127.5 - 1
    if flip:
        mirrored = (torch.rand(len(x), generator=rng) < 0.5).to(device)
        x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)
    return x


def _check_images(images: Tensor, config: GANConfig) -> None:
    expected = (config.n_channels, config.resolution, config.resolution)
    if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != expected:
        raise InputError(
            f"images must be uint8 [M, {expected[0]}, {expected[1]}, {expected[2]}], got {images.dtype} {list(images.shape)}."
        )
    if len(images) < config.batch:
        raise InputError(
            f"training needs at least one batch of {config.batch} images, got {len(images)}; lower --batch."
        )
