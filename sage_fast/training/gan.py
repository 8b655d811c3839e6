"""Train a StyleGAN2 generator and discriminator (Karras et al. 2020).

Non-saturating logistic or hinge loss, lazy R1 and lazy path-length regularisation, style mixing, classes, and an
exponential moving average of the generator with ramp-up. One function, read from top to bottom; docs/training.md says
what the settings and the logged values mean.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sage_fast.arithmetic import PRECISIONS, autocast
from sage_fast.data.folders import ImageSet
from sage_fast.data.resuming import data_fingerprint
from sage_fast.data.sampling import EpochSampler
from sage_fast.errors import InputError
from sage_fast.models.stylegan2 import Discriminator, Generator, n_latent_of
from sage_fast.models.stylegan2_layers import check_channels
from sage_fast.ops.convolution import second_derivatives
from sage_fast.settings import check_at_least_one, check_not_negative, check_numbers, check_positive
from sage_fast.training.augment import Augment, AugmentConfig
from sage_fast.training.checkpoints import Checkpoints
from sage_fast.training.graphed import Networks
from sage_fast.training.grids import grid_latents
from sage_fast.training.losses import hinge_d, hinge_g, logistic_d, nonsaturating_g, path_length_penalty, r1_penalty
from sage_fast.training.prior import draw_pixels, draw_prior, mixed_w_plus
from sage_fast.training.ranks import join_ranks
from sage_fast.training.reals import Reals, as_reals
from sage_fast.training.runtime import Run, ema_update
from sage_fast.training.shares import path_share, share_out
from sage_fast.training.transfer import transfer
from sage_fast.training.updates import Guard, Update, load_optimizer
from sage_fast.training.watching import CollapseDetector, Measure, Watch

__all__ = ["GANConfig", "check_device", "new_networks", "train_gan"]

_LOSSES = {"logistic": (nonsaturating_g, logistic_d), "hinge": (hinge_g, hinge_d)}


@dataclass(frozen=True)
class GANConfig:
    """Settings of :func:`train_gan`. The defaults suit 32 to 64 px on a CPU; kimg = thousands of real images shown."""

    resolution: int = 32  # a power of two from 4 to 1024
    n_channels: int = 3  # 1 grey, 2 grey + alpha, 3 RGB, 4 RGBA
    style_dim: int = 64  # width of the latents z and w
    n_mapping: int = 4  # layers from z to w
    channel_base: int = 1024  # min(channel_base / r, channel_max) feature maps at r px
    channel_max: int = 128  # most feature maps of a layer
    mbstd_group: int = 4  # images that share a minibatch standard deviation
    balance: bool = False  # show every category equally often
    conditional: bool = False  # one class a category: in the mapping, and projected in the discriminator
    total_kimg: float = 400.0  # length of the training: thousands of images shown
    batch: int = 16  # images a step
    accumulate: int = 1  # micro-batches a batch is computed in, to save memory; the result is the same
    loss: Literal["logistic", "hinge"] = "logistic"  # non-saturating logistic, or hinge
    lr: float = 0.0025  # of both networks; Adam
    r1_gamma: float | None = None  # None: 0.0002 resolution^2 / batch, the rule of StyleGAN2-ADA
    r1_every: int = 16  # steps from one R1 penalty to the next; each counts as many times
    pl_weight: float = 0.0  # StyleGAN2 uses 2; off for small images, as in StyleGAN2-ADA's 32 px setting
    pl_every: int = 8  # steps from one path length penalty to the next
    pl_decay: float = 0.01  # share of the newest in the running mean of path lengths
    style_mixing: float = 0.5  # probability; StyleGAN2 uses 0.9
    ema_kimg: float = 5.0  # half-life of the running average that becomes the model
    ema_rampup: float | None = 0.05  # most of that, as a share of the images shown so far; None: no limit
    latent_avg_decay: float = 0.998  # share of the running mean latent that stays at each step
    flip: bool = True  # mirror half of the real images
    augment: AugmentConfig = field(default_factory=AugmentConfig)  # of what the discriminator sees
    transfer_from: str | None = None  # bundle or published file to start from; docs/training.md says what is taken
    freeze_d: int = 0  # highest-resolution layers of the discriminator that stay as they are (FreezeD)
    precision: str = "float32"  # float32, bfloat16 where the device multiplies it, or float64
    graphs: bool = False  # on a GPU: replay both networks as CUDA graphs; docs/training.md
    seed: int = 0  # of the weights and of everything drawn
    log_every: int = 50  # steps from one line of the log to the next
    save_every: int = 1000  # steps from one checkpoint to the next
    grid_every: int = 1000  # steps from one grid of images to the next
    keep: int = 2  # checkpoints that stay; the one with the best measure besides
    tensorboard: bool = False  # event files beside the log: needs the extra "logs"
    measure_every_kimg: float = 10.0  # between two measurements, where train_gan is given a measure
    patience: int = 0  # stop after so many measurements without a new best; 0: never

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.batch < 2:
            raise InputError(f"batch must be at least 2 for the minibatch standard deviation, got {self.batch}.")
        check_positive(self, "total_kimg", "lr", "r1_every", "pl_every", "log_every", "save_every", "grid_every")
        check_positive(self, "ema_kimg", "keep", "measure_every_kimg")
        check_at_least_one(self, "style_dim", "n_mapping", "channel_base", "channel_max", "accumulate", "mbstd_group")
        check_not_negative(self, "r1_gamma", "pl_weight", "ema_rampup", "patience")
        for name in ("latent_avg_decay", "pl_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is a share, expected 0 to 1, got {getattr(self, name)}.")
        check_channels(self.n_channels)
        if self.precision not in (*PRECISIONS, "float64"):
            raise InputError(f"precision must be {', '.join(PRECISIONS)} or float64, got '{self.precision}'.")
        if self.loss not in _LOSSES:
            raise InputError(f"loss must be {' or '.join(_LOSSES)}, got {self.loss!r}.")
        if not 0 <= self.style_mixing <= 1:
            raise InputError(f"style_mixing is a probability, expected 0 to 1, got {self.style_mixing}.")
        n_layers = n_latent_of(self.resolution) // 2
        if not 0 <= self.freeze_d <= n_layers:
            raise InputError(
                f"freeze_d must be 0 to {n_layers}, the layers of a {self.resolution} px discriminator, got {self.freeze_d}."
            )
        if self.freeze_d and self.transfer_from is None:
            raise InputError(
                f"freeze_d = {self.freeze_d} would keep layers that nothing has trained; give transfer_from too, or leave it out."
            )
        if self.graphs and self.accumulate > 1:
            raise InputError(
                f"graphs keeps one micro-batch's gradients, expected accumulate 1, got {self.accumulate}; use more ranks instead."
            )
        share_out(self.batch, self.mbstd_group, accumulate=self.accumulate)

    @property
    def gamma(self) -> float:
        """Weight of R1: ``r1_gamma``, or the rule of StyleGAN2-ADA."""
        return 0.0002 * self.resolution**2 / self.batch if self.r1_gamma is None else self.r1_gamma


def train_gan(
    config: GANConfig,
    images: Tensor | ImageSet,
    folder: str | Path,
    resume: bool = False,
    device: str | torch.device = "cpu",
    measure: Measure | None = None,
    held_out: ImageSet | None = None,
) -> tuple[Generator, Discriminator]:
    """Train from uint8 images [M, C, R, R] (with their labels where the config needs them).

    Each step shows ``config.batch`` real images: one generator update, then one discriminator update on as many new fakes, with
    the labels of the reals. A batch is drawn whole; ranks
    that torchrun started share it (:func:`sage_fast.training.ranks.join_ranks`), and each computes its part in
    ``config.accumulate`` micro-batches. Checkpoints continue bit for bit with ``resume``.

    Args:
        measure: scores a generator now and then, see ``training.watching``; the best one's checkpoint is kept. Every rank calls
            it, and must get the same scores.
        held_out: images of the same categories that are not among ``images``: the log then says how far the discriminator knows
            its own by heart (``held_out_gap``), and a warning comes when it does.
    Returns:
        The averaged generator and the discriminator, in eval mode.
    Raises:
        InputError: the images or the ranks do not fit the config, another network or data set is resumed, or a loss is not
            finite; then no update was made with it, and ``logs/gan_diagnosis.json`` has what is known.
    """
    data, ranks = as_reals(images, config), join_ranks(device)
    check_device(config, ranks.device)
    others = None if held_out is None else as_reals(held_out, config, least=1)
    shares = share_out(config.batch, config.mbstd_group, ranks.rank, ranks.world, config.accumulate)
    path_shares = [path_share(share, config.mbstd_group) for share in shares]
    shares_there = [share.to(ranks.device) for share in shares]
    G, D = new_networks(config, data.n_classes, ranks.device)
    average = copy.deepcopy(G).eval().requires_grad_(False)
    if config.transfer_from is not None and Checkpoints(Path(folder) / "checkpoints", "gan").latest() is None:
        report = transfer(config.transfer_from, G, D, average)
        if ranks.is_first:
            print(report)
    facts = {"data": data_fingerprint(images), "G": G.architecture(), "D": D.architecture()}
    run = Run(folder, "gan", config, resume, ranks, facts)
    D.convs[: config.freeze_d].requires_grad_(False)
    d_params = [p for p in D.parameters() if p.requires_grad]
    g_optim = _lazy_adam(G.parameters(), config.lr, config.pl_every if config.pl_weight else 0)
    d_optim = _lazy_adam(d_params, config.lr, config.r1_every)
    guard = Guard(run, {"G": G, "D": D}, ("a lower lr", "a larger r1_gamma"))
    update = partial(Update, guard=guard, accumulate=config.accumulate)
    g_update, path_update = update("g_loss", g_optim), update("path_penalty", g_optim)
    d_update, r1_update = update("d_loss", d_optim), update("r1", d_optim)
    networks = Networks(G, D, config.precision, config.graphs)
    g_loss_of, d_loss_of = _LOSSES[config.loss]
    augment, watch = Augment(config.augment), Watch(measure, config.measure_every_kimg, config.patience)
    detector = CollapseDetector(data.pixels[data.spread(1024)], augmented=config.augment.kind != "none")
    sampler = EpochSampler(len(data), config.batch, config.seed, data.labels, config.balance)
    rng = torch.Generator().manual_seed(config.seed)  # equal on every rank, as is the next
    noise_rng = rng if ranks.device.type == "cpu" else torch.Generator(ranks.device).manual_seed(config.seed)
    zero = torch.zeros_like(G.latent_avg[0])
    path_mean, r1, first = zero, zero, 0
    z_grid, c_grid = grid_latents(G, seed=config.seed)
    weights: dict[str, Any] = dict(G=G, D=D, average=average)
    optims: dict[str, Any] = dict(g_optim=g_optim, d_optim=d_optim)
    places: dict[str, Any] = dict(sampler=sampler, augment=augment, watch=watch, detector=detector)

    if state := run.load():
        for name, optim in optims.items():
            load_optimizer(optim, state[name])
        for name, part in (weights | places).items():
            if name in state:  # runs of before had no places, and drew with replacement
                part.load_state_dict(state[name])
        rng.set_state(state["rng"])
        noise_rng.set_state(state.get("noise_rng", noise_rng.get_state()))
        path_mean, r1 = state["path_mean"].to(zero), state.get("r1", r1).to(zero)
        first = state["step"]
    else:
        run.grid("reals", data.batch(data.examples(), zero)[0])

    total = max(1, round(config.total_kimg * 1000 / config.batch))
    for step in run.track(first, first if watch.stop else total):
        # everything random is drawn for the whole batch; a share is a micro-batch of it
        index = sampler.next()
        flips = torch.rand(config.batch, generator=rng) < (0.5 if config.flip else 0.0)
        reals, labels = zip(*(data.batch(index[share], zero, flips[share]) for share in shares))
        prior = draw_prior(G, config.batch, config.style_mixing, rng, noise_rng)
        guard.begin(step, index)

        # generator: adversarial loss
        _learn(d_params, False)
        w_mean, draws = torch.zeros_like(G.latent_avg), augment.draw(config.batch, rng)
        for share, c in zip(shares, labels):
            part = prior.take(share)
            w_plus, w = mixed_w_plus(G, part, c)
            with autocast(config.precision, ranks.device):
                images = augment.apply(networks.fakes(w_plus, part.noise), draws[share])
                loss = g_loss_of(networks.logits(images, c))
            g_update.add(loss)
            w_mean += w.detach().mean(0) / config.accumulate
        g_loss = g_update.apply(w_mean)
        G.latent_avg.lerp_(w_mean, 1 - config.latent_avg_decay)

        # generator: path length (lazy)
        if config.pl_weight and step % config.pl_every == 0:
            n = len(path_shares[0]) * config.accumulate * ranks.world
            prior, y, length = draw_prior(G, n, config.style_mixing, rng), draw_pixels(G, n, noise_rng), zero
            for share, c in zip(path_shares, labels):
                w_plus, _ = mixed_w_plus(G, prior.take(share), None if c is None else c[: len(share)])
                with second_derivatives(), autocast(config.precision, ranks.device):
                    penalty, mean = path_length_penalty(
                        G(w_plus), w_plus, path_mean, y[share.to(y.device, non_blocking=True)]
                    )
                path_update.add(penalty, config.pl_weight * config.pl_every)
                length = length + mean / config.accumulate
            path_update.apply(length)
            path_mean = path_mean.lerp(length, config.pl_decay)

        # discriminator: adversarial loss on new fakes, as StyleGAN2 has it; without gradients the fused kernels draw them
        _learn(d_params, True)
        prior = draw_prior(G, config.batch, config.style_mixing, rng, noise_rng)
        logits, draws = zero.new_zeros(2, config.batch), augment.draw(config.batch, rng)  # of reals and fakes
        fake_draws = augment.draw(config.batch, rng)
        for share, there, real, c in zip(shares, shares_there, reals, labels):
            part = prior.take(share)
            with autocast(config.precision, ranks.device):
                with torch.no_grad():
                    fake = networks.fakes(mixed_w_plus(G, part, c)[0], part.noise)
                shown = augment.apply(real, draws[share]), augment.apply(fake, fake_draws[share])
                of_reals, of_fakes = networks.logits_of_both(*shown, c)
                loss = d_loss_of(of_reals, of_fakes)
            d_update.add(loss)
            logits[:, there] = torch.stack([of_reals, of_fakes]).detach().flatten(1).to(logits)
        d_loss = d_update.apply(logits)
        real_logits, fake_logits = logits * ranks.world  # each rank had zeros for the others' shares

        # discriminator: R1 (lazy), with respect to the reals before augmentation, as StyleGAN2-ADA takes it
        if step % config.r1_every == 0:
            draws = augment.draw(config.batch, rng)
            for share, real, c in zip(shares, reals, labels):
                real.requires_grad_(True)
                with second_derivatives(), autocast(config.precision, ranks.device):
                    penalty = r1_penalty(D(augment.apply(real, draws[share]), c), real)
                r1_update.add(penalty, config.gamma / 2 * config.r1_every)
            r1 = r1_update.apply()

        augment.observe(real_logits)
        _average(average, G, config, (step + 1) * config.batch)

        done, kimg, scores = step + 1, (step + 1) * config.batch / 1000, dict[str, float]()
        if done % config.grid_every == 0 or done == total:
            with torch.no_grad():
                images_now = average(average.mapping(z_grid, c_grid))
            run.grid(f"fakes_{done:06d}", images_now)
            scores |= ranks.once(partial(detector.grid, kimg, images_now))
        if measured := watch.due(kimg, done == total):
            scores |= watch.score(average, kimg)
        if done % config.log_every == 0 or done == total or scores:
            guard.look()
            unseen = None if others is None else _held_out_logits(D, others, augment, config, step, zero)
            scores |= ranks.once(partial(detector.discriminator, kimg, real_logits, fake_logits, unseen))
            scores |= {"path_length": path_mean.item()} if config.pl_weight else {}
            scores |= {"augment_p": augment.p} if config.augment.kind == "ada" else {}
            signs = real_logits.sign().mean()
            run.log(done, kimg=kimg, g_loss=g_loss, d_loss=d_loss, r1=r1, real_sign=signs, **scores)
        if run.save_due(done, total) or (measured and watch.improved) or watch.stop:
            guard.before_saving()
            score = next(iter(watch.scores.values())) if measured else None
            state = {name: part.state_dict() for name, part in (weights | optims | places).items()}
            state |= {"rng": rng.get_state(), "noise_rng": noise_rng.get_state(), "path_mean": path_mean, "r1": r1}
            state |= {"architecture": G.architecture(), "architecture_D": D.architecture(), "step": done}
            run.save(state | {"stopped_early": watch.stop}, score)
        if watch.stop:
            if ranks.is_first:
                print(
                    f"Stage 'gan' stopped at step {done}, since {config.patience} measurements brought no better score. The best "
                    f"generator is in {run.checkpoints.best}, this last one goes on; 'train-encoder --generator' takes the best."
                )
            break
    return average.eval(), D.eval().requires_grad_(False)


@torch.no_grad()
def _held_out_logits(
    D: Discriminator, held_out: Reals, augment: Augment, config: GANConfig, step: int, like: Tensor
) -> Tensor:
    """Logits of a batch of held-out images, shown as training images are; drawn from the step alone, so no weight changes."""
    rng = torch.Generator().manual_seed(config.seed + step)
    index = torch.randint(len(held_out), (config.batch,), generator=rng)
    flips = torch.rand(config.batch, generator=rng) < (0.5 if config.flip else 0.0)
    images, labels = held_out.batch(index, like, flips)
    with autocast(config.precision, like.device):
        return D(augment.apply(images, augment.draw(config.batch, rng)), labels)


def check_device(config: GANConfig, device: torch.device) -> None:
    """Raise InputError for a device that the config cannot be trained on."""
    if config.graphs and device.type != "cuda":
        raise InputError(f"graphs needs a GPU, got device '{device}'; leave it out, or give device 'cuda'.")


def new_networks(config: GANConfig, n_classes: int, device: str | torch.device) -> tuple[Generator, Discriminator]:
    """Fresh networks, drawn from ``config.seed`` on the CPU; float32, or float64 throughout."""
    torch.manual_seed(config.seed)
    size: dict[str, Any] = dict(channel_base=config.channel_base, channel_max=config.channel_max, c_dim=n_classes)
    G = Generator(config.resolution, config.style_dim, config.n_mapping, config.n_channels, **size)
    D = Discriminator(
        config.resolution, config.n_channels, mbstd_group=config.mbstd_group, n_mapping=config.n_mapping, **size
    )
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    return G.to(device, dtype), D.to(device, dtype)


def _lazy_adam(parameters: Iterable[torch.nn.Parameter], lr: float, every: int) -> torch.optim.Adam:
    """Adam with the rates corrected for a regulariser that adds one update in ``every`` (StyleGAN2, appendix B)."""
    c = every / (every + 1) if every else 1.0
    return torch.optim.Adam(parameters, lr=lr * c, betas=(0.0, 0.99**c), eps=1e-8, fused=True)


def _learn(parameters: list[torch.nn.Parameter], learn: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(learn)


def _average(average: Generator, G: Generator, config: GANConfig, n_images: int) -> None:
    """Update the averaged generator; the half-life is ``ema_kimg``, shorter at first."""
    half_life = config.ema_kimg * 1000
    if config.ema_rampup is not None:
        half_life = min(half_life, n_images * config.ema_rampup)
    ema_update(average, G, 0.5 ** (config.batch / max(half_life, 1e-8)))
