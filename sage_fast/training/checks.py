"""What a stage would refuse, found before anything is written: files, networks and extras that its settings name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sage_fast.errors import InputError
from sage_fast.models.identity import ArcFace
from sage_fast.models.perceptual import load_perceptual
from sage_fast.models.stylegan2 import Discriminator, Generator
from sage_fast.training.encoder import EncoderConfig
from sage_fast.training.encoder_steps import new_encoder
from sage_fast.training.gan import GANConfig, check_device, new_networks
from sage_fast.training.latent_critic import check_prior
from sage_fast.training.logs import check_tensorboard
from sage_fast.training.ranks import Ranks
from sage_fast.training.reconstruction import Reconstruction
from sage_fast.training.shares import share_out
from sage_fast.training.transfer import transfer
from sage_fast.training.tuning import check_tunable

if TYPE_CHECKING:
    from sage_fast.training.stages import TrainConfig

__all__ = ["check_encoder", "check_gan", "check_road"]


def check_gan(config: GANConfig, ranks: Ranks, resume: bool = False) -> None:
    """Raise InputError for what ``train_gan`` would refuse whatever the images are; a run that goes on needs no source."""
    check_device(config, ranks.device)
    share_out(config.batch, config.mbstd_group, ranks.rank, ranks.world, config.accumulate)
    check_tensorboard(config.tensorboard)
    if config.transfer_from is not None and not resume:
        G, D = new_networks(config, 0, "cpu")
        transfer(config.transfer_from, G, D, G)


def check_encoder(
    config: EncoderConfig, generator: Generator, discriminator: Discriminator | None, ranks: Ranks
) -> None:
    """Raise InputError for what ``train_encoder`` would refuse whatever the images are."""
    ranks.share(config.batch)
    check_tensorboard(config.tensorboard)
    new_encoder(config, generator)
    identity = Reconstruction(config, discriminator, ranks).identity
    if isinstance(identity, ArcFace) and generator.n_channels != 3:
        raise InputError(
            f"identity {config.identity!r} is an ArcFace, for images of 3 channels, got a generator of {generator.n_channels}; "
            "give another network, or 'none'."
        )
    if config.kind == "e4e":
        check_prior(generator)
    if config.tune_generator:
        check_tunable(generator, discriminator, config.batch, ranks)


def check_road(config: TrainConfig, ranks: Ranks, resume: bool = False) -> None:
    """Raise InputError for what any stage of ``train_all`` would refuse whatever the images are."""
    gan, dictionary = config.resolved_gan, config.dictionary
    check_gan(gan, ranks, resume)
    G, D = new_networks(gan, 0, "cpu")
    check_encoder(config.encoder, G, D, ranks)
    ranks.share(dictionary.batch)
    check_tensorboard(dictionary.tensorboard)
    dictionary.check_network(config.encoder.perceptual)
    if dictionary.rec_weight and dictionary.perceptual_weight:
        load_perceptual(config.encoder.perceptual, D)
