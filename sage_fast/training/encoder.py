"""Train the encoder that maps images to W+ offsets of a given generator ([SAGE], Eq. 3).

Four kinds: psp (Richardson et al. 2021), e4e (Tov et al. 2021), restyle (Alaluf et al. 2021) and hyperstyle (Alaluf et al. 2022).
All learn from mean squared error, perceptual distance, a small norm of the offsets and, with a network for it, identity; with
``tune_generator`` the generator goes on learning beside psp or e4e (see :mod:`sage_fast.training.tuning`).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sage_fast.arithmetic import PRECISIONS
from sage_fast.data.folders import ImageSet
from sage_fast.data.resuming import data_fingerprint
from sage_fast.data.sampling import EpochSampler
from sage_fast.errors import InputError
from sage_fast.models.encoder_kinds import KINDS, encoder_architecture
from sage_fast.models.encoders import PyramidEncoder
from sage_fast.models.hyperstyle import HyperStyle
from sage_fast.models.image_encoder import ImageEncoder
from sage_fast.models.stylegan2 import Discriminator, Generator
from sage_fast.models.weight_deltas import synthesize
from sage_fast.settings import check_at_least_one, check_ignored, check_not_negative, check_numbers, check_positive
from sage_fast.training.batches import deal, to_pixels
from sage_fast.training.encoder_steps import HyperStyleSteps, OnePassSteps, ReStyleSteps, new_encoder
from sage_fast.training.latent_critic import E4EConfig
from sage_fast.training.losses import pixel_mse
from sage_fast.training.ranks import join_ranks
from sage_fast.training.reconstruction import Reconstruction
from sage_fast.training.runtime import Run, ema_update
from sage_fast.training.tuning import GeneratorTuning
from sage_fast.training.updates import Guard, Update, load_optimizer

__all__ = ["EncoderConfig", "HyperStyleConfig", "train_encoder"]

_N_ITERATIONS = 5  # of ReStyle and HyperStyle, in both papers
_TUNING = ("adversarial_weight", "tune_lr", "tune_mapping", "r1_gamma", "r1_every")  # read with tune_generator only


@dataclass(frozen=True)
class HyperStyleConfig:
    """Settings of kind ``"hyperstyle"``."""

    w_encoder: str | None = None  # bundle whose encoder gives the codes; None: one into W is trained first
    w_share: float = 0.4  # share of the steps that this takes
    head_width: int = 16  # channels a layer at 4 px in the hypernetwork
    rank: int = 8  # rank of the changes of a layer

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 0 < self.w_share < 1:
            raise InputError(
                f"w_share is a share of the steps, expected more than 0 and less than 1, got {self.w_share}."
            )
        check_at_least_one(self, "head_width", "rank")


@dataclass(frozen=True)
class EncoderConfig:
    """Settings of :func:`train_encoder`; resolution, styles and channels are the generator's."""

    kind: Literal["psp", "e4e", "restyle", "hyperstyle"] = "psp"  # of encoder; docs/encoders.md compares them
    total_steps: int = 20_000  # length of the training
    batch: int = 16  # images a step
    channel_base: int = 1024  # min(3/4 channel_base / r, channel_max) feature maps at r px
    channel_max: int = 128  # most feature maps of a layer
    head_width: int = 32  # channels per style before the last linear map
    lr: float = 0.001  # of the encoder, after the warmup; Adam
    warmup: int = 200  # steps of linear increase; a cosine to lr_end follows
    lr_end: float = 0.01  # share of lr left at the last step
    mse_weight: float = 1.0  # of the squared error of pixels
    perceptual_weight: float = 0.1  # of the perceptual distance
    #: discriminator (features of the discriminator as it was given), none, lpips-alex, lpips-vgg, lpips-squeeze, or a weights
    #: file of SqueezeNet 1.1 or a VGG
    perceptual: str = "discriminator"
    perceptual_share: float = 1.0  # of the batch that the perceptual term looks at: it costs as much as all the rest
    identity: str = "none"  # none, or a weights file: ArcFace IR-SE50 or what perceptual takes
    identity_weight: float = 0.1  # of the identity term
    norm_weight: float = 0.0005  # of the norm of the offsets from latent_avg
    n_iterations: int | None = None  # corrections of restyle, refinements of hyperstyle, then and afterwards; None: 5
    e4e: E4EConfig = field(default_factory=E4EConfig)
    hyperstyle: HyperStyleConfig = field(default_factory=HyperStyleConfig)
    noise: str = "none"  # the generator's, in training and for the same images afterwards: none or const
    flip: bool = True  # mirror half of the images
    precision: str = "float32"  # float32, or bfloat16 where the device multiplies it
    ema_kimg: float = 5.0  # half-life of the running average that becomes the encoder
    n_validation: int = 128  # images held out to measure val_mse; at most a twentieth of all
    seed: int = 0  # of the weights and of everything drawn
    log_every: int = 50  # steps from one line of the log to the next
    save_every: int = 1000  # steps from one checkpoint to the next
    grid_every: int = 1000  # steps from one grid of images to the next
    keep: int = 2  # checkpoints that stay; the one with the lowest val_mse besides
    tensorboard: bool = False  # event files beside the log: needs the extra "logs"
    tune_generator: bool = False  # train the generator further beside the encoder
    adversarial_weight: float = 0.02  # of the discriminator's verdict; this and what follows need tune_generator
    tune_lr: float = 0.001  # of the generator and its discriminator
    tune_mapping: bool = False  # tune the mapping network too
    r1_gamma: float | None = None  # None: 0.0002 resolution^2 / batch, the rule of StyleGAN2-ADA
    r1_every: int = 16  # steps from one R1 penalty to the next

    def __post_init__(self) -> None:
        check_numbers(self)
        check_positive(self, "total_steps", "batch", "channel_base", "channel_max", "head_width", "lr", "ema_kimg")
        check_positive(self, "log_every", "keep", "save_every", "grid_every", "tune_lr", "r1_every")
        check_not_negative(
            self, "mse_weight", "perceptual_weight", "norm_weight", "identity_weight", "adversarial_weight"
        )
        check_not_negative(self, "warmup", "n_validation", "r1_gamma")
        if self.precision not in PRECISIONS:
            raise InputError(f"precision must be {' or '.join(PRECISIONS)}, got '{self.precision}'.")
        if self.noise not in ("none", "const"):
            raise InputError(
                f"noise must be 'none' or 'const' so that a code stands for one image, got '{self.noise}'."
            )
        if not 0 <= self.lr_end <= 1:
            raise InputError(f"lr_end is a share, expected 0 to 1, got {self.lr_end}.")
        if not 0 < self.perceptual_share <= 1:
            raise InputError(
                f"perceptual_share is a share above 0, at most 1, got {self.perceptual_share}; perceptual 'none' leaves the term out."
            )
        if self.tune_generator and self.batch < 4:
            raise InputError(f"batch must be at least 4 with tune_generator, got {self.batch}.")
        if self.mse_weight == 0 and (self.perceptual_weight == 0 or self.perceptual == "none"):
            raise InputError("mse_weight and the perceptual term are both off; the encoder needs one of them.")
        if not self.tune_generator:
            check_ignored(self, _TUNING, "tune_generator")
        if self.perceptual == "none":
            check_ignored(self, ("perceptual_weight", "perceptual_share"), "a network in perceptual")
        if self.identity == "none":
            check_ignored(self, ("identity_weight",), "a network in identity")
        self._check_kind()

    @property
    def iterations(self) -> int:
        """Corrections of restyle, refinements of hyperstyle."""
        return _N_ITERATIONS if self.n_iterations is None else self.n_iterations

    @property
    def w_steps(self) -> int:
        """Steps in which hyperstyle trains its encoder into W; 0 for every other kind."""
        if self.kind != "hyperstyle" or self.hyperstyle.w_encoder is not None:
            return 0
        return max(1, round(self.hyperstyle.w_share * self.total_steps))

    def _check_kind(self) -> None:
        """Raise InputError for an unknown kind and for settings that this one ignores."""
        if self.kind not in KINDS:
            raise InputError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}.")
        iterated = self.kind in ("restyle", "hyperstyle")
        if self.n_iterations is not None and (not iterated or self.n_iterations < 1):
            raise InputError(
                f"n_iterations is at least 1, for restyle and hyperstyle, got {self.n_iterations} for {self.kind}."
            )
        if self.tune_generator and iterated:
            raise InputError(f"tune_generator goes with psp and e4e, got kind {self.kind!r}; leave it out.")
        for kind, fresh in (("e4e", E4EConfig()), ("hyperstyle", HyperStyleConfig())):
            if self.kind != kind and getattr(self, kind) != fresh:
                raise InputError(f"settings of {kind} have no effect on kind {self.kind!r}; leave them out.")


def train_encoder(
    config: EncoderConfig,
    images: Tensor | ImageSet,
    generator: Generator,
    discriminator: Discriminator | None,
    folder: str | Path,
    resume: bool = False,
    device: str | torch.device = "cpu",
) -> ImageEncoder:
    """Train from uint8 images [M, C, R, R]; returns the averaged encoder in eval mode, offsets from ``generator.latent_avg``.

    The generator and the discriminator given stay as they are, unless ``config.tune_generator``: then their weights are
    replaced by the tuned ones (the generator's average), ``latent_avg`` excepted. Checkpoints continue bit for bit. Ranks that
    torchrun started share every batch (:func:`sage_fast.training.ranks.join_ranks`).

    Deviation: the papers' programs use Ranger and no averaging; codes of a small generator move less between checkpoints
    with it. HyperStyle's two networks are trained one after the other here, by one call.

    Raises:
        InputError: the images do not fit the generator, a network is missing, or a loss is not finite; then no update was made
            with it, and ``logs/encoder_diagnosis.json`` has what is known.
    """
    facts = {"data": data_fingerprint(images), "generator": generator.architecture()}
    images = images.images if isinstance(images, ImageSet) else images
    _check_images(images, generator)
    ranks = join_ranks(device)
    share = ranks.share(config.batch)
    rng = torch.Generator().manual_seed(config.seed)  # equal on all ranks
    run = Run(folder, "encoder", config, resume, ranks, facts)
    E = new_encoder(config, generator).to(ranks.device)
    average = copy.deepcopy(E).eval().requires_grad_(False)
    optim = torch.optim.Adam(E.parameters(), lr=config.lr, betas=(0.9, 0.999), fused=True)
    guard = Guard(run, {"E": E}, _changes(config))
    update = Update("loss", optim, guard)
    reconstruction = Reconstruction(config, discriminator, ranks)
    tuning = GeneratorTuning(config, generator, discriminator, guard) if config.tune_generator else None
    G = tuning.G if tuning else copy.deepcopy(generator).to(ranks.device).eval().requires_grad_(False)
    synthesis = tuning.average_G if tuning else G
    steps = _steps(config, E, average, G, reconstruction, tuning, guard)
    parts: dict[str, torch.nn.Module | torch.optim.Optimizer] = {"E": E, "average": average, "optim": optim}
    parts |= steps.parts()
    if tuning and reconstruction.perceptual is not None:
        parts["perceptual"] = reconstruction.perceptual
    guard.networks = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    train, held_out = _split(len(images), config.n_validation)
    sampler = EpochSampler(len(train), config.batch, config.seed)
    check = to_pixels(images, held_out if len(held_out) else train[:32], None, G.latent_avg)

    first = 0
    if state := run.load():
        for name, part in parts.items():
            if isinstance(part, torch.optim.Optimizer):
                load_optimizer(part, state[name])
            else:
                part.load_state_dict(state[name])
        rng.set_state(state["rng"])
        if "sampler" in state:  # runs of before drew with replacement
            sampler.load_state_dict(state["sampler"])
        first = state["step"]
    else:
        run.grid("reals", check[:32])

    for step in run.track(first, config.total_steps):
        rate = _rate(step, config)
        optim.param_groups[0]["lr"] = config.lr * rate
        index, flips = deal(sampler, share, config.flip, rng)
        guard.begin(step, train[index])
        real = to_pixels(images, train[index], flips, G.latent_avg)

        loss = steps.backward(update, real, step, rate, rng)
        update.apply()
        steps.after(real, step, rate, rng)

        done = step + 1
        decay = _decay(config, done)
        ema_update(average, E, decay)
        if tuning is not None:
            tuning.average(decay)
        logged, val_mse = dict[str, float | Tensor](), None
        if done % config.log_every == 0 or done == config.total_steps:
            guard.look()
            logged = {"loss": loss, "lr": config.lr * rate, **steps.scalars}
        if done % config.grid_every == 0 or done == config.total_steps:
            guard.look()
            rebuilt = _reconstruct(average, synthesis, check, config.noise)
            logged["val_mse"] = val_mse = pixel_mse(rebuilt, check).item()
            run.grid(f"rebuilt_{done:06d}", rebuilt[:32])
        if logged:
            run.log(done, **logged)
        if run.save_due(done, config.total_steps):
            guard.before_saving()
            weights = {name: part.state_dict() for name, part in parts.items()}
            places = {"rng": rng.get_state(), "sampler": sampler.state_dict(), "step": done}
            run.save({**weights, **places, "architecture": encoder_architecture(E)}, score=val_mse)
    if tuning is not None:
        tuning.write_back(generator, discriminator)
    return average.eval()


def _steps(
    config: EncoderConfig,
    E: ImageEncoder,
    average: ImageEncoder,
    G: Generator,
    reconstruction: Reconstruction,
    tuning: GeneratorTuning | None,
    guard: Guard,
) -> OnePassSteps | ReStyleSteps | HyperStyleSteps:
    """What a step of the config's kind does."""
    if isinstance(E, HyperStyle):
        assert isinstance(average, HyperStyle)
        return HyperStyleSteps(config, E, average, G, reconstruction)
    assert isinstance(E, PyramidEncoder)
    if config.kind == "restyle":
        return ReStyleSteps(config, E, G, reconstruction)
    return OnePassSteps(config, E, G, reconstruction, tuning, guard)


def _changes(config: EncoderConfig) -> list[str]:
    """Settings that may help where a loss is not finite, of the networks that this config trains."""
    tuned = ["a lower tune_lr", "a larger r1_gamma"] if config.tune_generator else []
    e4e = ["a lower e4e.discriminator_lr", "a larger e4e.r1_gamma"] if config.kind == "e4e" else []
    return ["a lower lr", *tuned, *e4e]


def _rate(step: int, config: EncoderConfig) -> float:
    """Share of the learning rate at a step: linear warm-up, then a cosine down to ``lr_end``; anew for hyperstyle's second part."""
    total = config.total_steps
    if config.w_steps:
        step, total = (
            (step, config.w_steps) if step < config.w_steps else (step - config.w_steps, total - config.w_steps)
        )
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, total - config.warmup)
    return config.lr_end + (1 - config.lr_end) * 0.5 * (1 + math.cos(math.pi * done))


def _decay(config: EncoderConfig, done: int) -> float:
    """Decay of the averages: the half-life is ``ema_kimg``, at first a twentieth of the images shown."""
    half_life = min(config.ema_kimg * 1000, done * config.batch * 0.05)
    return 0.5 ** (config.batch / half_life)


@torch.no_grad()
def _reconstruct(encoder: ImageEncoder, generator: Generator, images: Tensor, noise: str) -> Tensor:
    rebuilt = []
    for part in images.split(32):
        found = encoder.invert(part, generator, noise)
        rebuilt.append(synthesize(generator, found.offsets + generator.latent_avg, found.weight_deltas, noise))
    return torch.cat(rebuilt)


def _split(n_images: int, n_validation: int) -> tuple[Tensor, Tensor]:
    """Indices to train on and evenly spaced ones held out (at most a twentieth)."""
    n_held = min(n_validation, n_images // 20)
    held = torch.zeros(n_images, dtype=torch.bool)
    if n_held:
        held[torch.arange(n_held) * n_images // n_held] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def _check_images(images: Tensor, generator: Generator) -> None:
    expected = (generator.n_channels, generator.resolution, generator.resolution)
    if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != expected:
        raise InputError(
            f"images must be uint8 [M, {expected[0]}, {expected[1]}, {expected[2]}] for this generator, "
            f"got {images.dtype} {list(images.shape)}; read them at its resolution."
        )
    if len(images) == 0:
        raise InputError("training the encoder needs images, got none; check the data folder.")
