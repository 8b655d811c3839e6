"""Settings of training that were found to work, by name; each returns a config to change further: those of the generator a
``GANConfig``, :func:`small_encoder` an ``EncoderConfig``.

[StyleGAN2] is Karras et al. 2020 ("Analyzing and improving"), [ADA] Karras et al. 2020 ("Training generative adversarial
networks with limited data"), [DiffAugment] Zhao et al. 2020. Where they trained in float16 at the four highest
resolutions, bfloat16 is used at all.
"""

from __future__ import annotations

from dataclasses import replace

from sage_fast.errors import InputError
from sage_fast.models.discriminator import group_size
from sage_fast.models.stylegan2 import n_latent_of
from sage_fast.training.augment import AugmentConfig
from sage_fast.training.encoder import EncoderConfig
from sage_fast.training.gan import GANConfig

__all__ = ["NAMES", "auto", "config_f", "flora", "low_shot", "paper256", "preset", "small", "small_encoder"]

NAMES = ("flora", "small", "low_shot", "paper256", "config_f", "auto")

_FEW = 5000

#: [StyleGAN2]: the full-width networks, mixing in nine of ten, path length with weight 2 every fourth step
_FULL = GANConfig(
    resolution=1024,
    style_dim=512,
    n_mapping=8,
    channel_base=32768,
    channel_max=512,
    total_kimg=25_000.0,
    batch=32,
    lr=0.002,
    r1_gamma=10.0,
    pl_weight=2.0,
    pl_every=4,
    style_mixing=0.9,
    ema_kimg=10.0,
    ema_rampup=None,
    precision="bfloat16",
)


def flora() -> GANConfig:
    """32 px, 12 minutes on one CPU core: what the model that comes with the package was trained with (docs/results.md)."""
    return GANConfig(channel_max=96, total_kimg=64.0, precision="bfloat16")


def small(resolution: int = 32) -> GANConfig:
    """32 or 64 px on a CPU: the defaults of ``GANConfig``, with 32 feature maps at the full resolution.

    From the training of the shipped model and, for R1 and the absent path length, the 32 px setting of [ADA].
    """
    n_latent_of(resolution)
    return GANConfig(resolution=resolution, channel_base=32 * resolution, precision="bfloat16")


def small_encoder(tune_generator: bool = True, perceptual: str = EncoderConfig.perceptual) -> EncoderConfig:
    """32 or 64 px on a CPU: what the encoder of the model that comes with the package was trained with (docs/results.md).

    The generator is tuned beside it, which on short trainings is worth more than a longer one of the generator alone. Without
    that, or without a perceptual network, the preset's settings of either are left out.
    """
    config = EncoderConfig(
        total_steps=15_000, channel_base=1536, channel_max=160, lr=0.002, precision="bfloat16", perceptual=perceptual
    )
    if tune_generator:
        config = replace(config, tune_generator=True, tune_lr=0.002)
    return config if perceptual == "none" else replace(config, perceptual_share=0.5)


def low_shot(resolution: int = 256, transfer_from: str | None = None) -> GANConfig:
    """About a hundred images: 300 kimg in batches of 8, full width, mapping of 2 layers, adaptive augmentation ([ADA]).

    From [DiffAugment]'s low-shot setting (StyleGAN2 at 256 px: learning rate 0.002, gamma 10, average over 10 kimg), with the
    augmentation of [ADA], whose ``bgc`` at a target of 0.6 did best on little data there.
    Given ``transfer_from``, fromRGB and three blocks of the discriminator stay fixed (Mo et al. 2020; ten
    convolutions, as in the example of [ADA]'s released code).
    """
    few = replace(_FULL, resolution=resolution, n_mapping=2, total_kimg=300.0, batch=8, augment=AugmentConfig("ada"))
    frozen = min(4, n_latent_of(resolution) // 2) if transfer_from is not None else 0
    return replace(few, transfer_from=transfer_from, freeze_d=frozen)


def paper256() -> GANConfig:
    """256 px as [ADA] has it for its comparisons (appendix, table of hyperparameters): half width, batch 64, gamma 1."""
    config = replace(_FULL, resolution=256, channel_base=16384, batch=64, mbstd_group=8)
    return replace(config, lr=0.0025, r1_gamma=1.0, ema_kimg=20.0)


def config_f(resolution: int = 1024) -> GANConfig:
    """Configuration F of [StyleGAN2]: full width, batch 32, gamma 10, for 25 million images."""
    return replace(_FULL, resolution=resolution)


def auto(resolution: int, n_images: int, n_devices: int = 1) -> GANConfig:
    """A reasonable start for any resolution, number of images and number of GPUs (0: a CPU).

    The heuristic of [ADA]'s released code: batch from resolution and devices, R1 as 0.0002 resolution^2 / batch, half
    width below 512 px, mapping of 2 layers, adaptive augmentation. On a CPU :func:`small`, augmented below 5000 images (it
    takes time there). A batch is never larger than the data set, and its groups for the minibatch standard deviation divide it.
    """
    if n_images < 2:
        raise InputError(f"auto needs at least two images, got {n_images}.")
    if n_devices == 0:
        config = small(resolution)
        augment = AugmentConfig("ada" if n_images < _FEW else "none")
        batch = min(config.batch, n_images // 2 * 2)
        return replace(config, batch=batch, mbstd_group=group_size(batch, config.mbstd_group), augment=augment)
    batch = max(min(n_devices * min(4096 // resolution, 32), 64), n_devices)
    group = min(4, batch // n_devices)
    unit = n_devices * group
    batch = max(unit, min(batch, n_images) // unit * unit)
    return replace(
        _FULL,
        resolution=resolution,
        n_mapping=2,
        channel_base=32768 if resolution >= 512 else 16384,
        batch=batch,
        mbstd_group=group,
        lr=0.002 if resolution >= 1024 else 0.0025,
        r1_gamma=None,
        ema_kimg=batch * 10 / 32,
        ema_rampup=0.05,
        augment=AugmentConfig("ada"),
    )


def preset(
    name: str,
    resolution: int | None = None,
    n_images: int = 0,
    n_devices: int = 1,
    transfer_from: str | None = None,
) -> GANConfig:
    """The preset of a name in ``NAMES``, at ``resolution`` where it has a choice, for a run that starts from ``transfer_from``.

    Raises:
        InputError: an unknown name, another resolution than the preset's, or for "auto" none, or fewer than two images.
    """
    if name not in NAMES:
        raise InputError(f"preset must be one of {', '.join(NAMES)}, got {name!r}.")
    if name in ("flora", "paper256"):
        config = flora() if name == "flora" else paper256()
        if resolution not in (None, config.resolution):
            raise InputError(f"preset {name!r} is for {config.resolution} px, got {resolution}; take 'auto' instead.")
        return config
    if name == "auto":
        if resolution is None:
            raise InputError("preset 'auto' needs a resolution, got none; give --resolution.")
        return auto(resolution, n_images, n_devices)
    if name == "low_shot":
        return low_shot(resolution or 256, transfer_from)
    build = small if name == "small" else config_f
    return build() if resolution is None else build(resolution)
