"""Networks as others publish them: the format is recognised from the content, and nothing in a file runs.

docs/formats.md lists the formats. :func:`read_published` takes a file apart; the loaders here make networks of it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from sage_fast.errors import InputError, SageFastWarning
from sage_fast.models.checkpoints import Stub, read_checkpoint
from sage_fast.models.image_encoder import ImageEncoder
from sage_fast.models.published_encoders import encoder_from_state, from_absolute
from sage_fast.models.published_nvlabs import read_nvlabs
from sage_fast.models.published_parts import EncoderPart, PublishedFile, fill_network
from sage_fast.models.published_psp import OLD_STYLES, declared_size, read_encoders, read_statistics
from sage_fast.models.published_rosinality import mean_row, read_rosinality
from sage_fast.models.published_runs import read_run
from sage_fast.models.published_safetensors import read_safetensors
from sage_fast.models.published_tensorflow import read_tensorflow
from sage_fast.models.stylegan2 import Discriminator, Generator, n_latent_of

__all__ = [
    "build_encoder_part", "fill_network", "published_directions", "published_discriminator", "published_encoder", "published_generator",
    "read_published",
]  # fmt: skip

StrPath = str | os.PathLike[str]
_ENTRIES = {
    "generator": ("average", "G_ema", "G", "g_ema", "g"),
    "discriminator": ("D", "d"),
}  # the preferred one first
_LARGE = {"average", "G_ema", "G", "D", "g_ema", "g", "d", "g_optim", "d_optim"}
_READERS = (read_run, read_nvlabs, read_tensorflow, read_encoders, read_rosinality, read_statistics)


def read_published(path: StrPath, part: str | None = None) -> PublishedFile:
    """What a file of a published format holds.

    Args:
        part: "generator" or "discriminator": of a file that has it, other networks are not read; None reads all.
    Raises:
        InputError: it is missing, truncated, holds what no such file needs, or no network that is known.
    """
    checkpoint, where = read_checkpoint(path, partial(_needed, part)), f"File {str(path)!r}"
    if checkpoint.container == "safetensors":
        found = read_safetensors(checkpoint.content, checkpoint.metadata, where)
    else:
        found = next((file for read in _READERS if (file := read(checkpoint.content, where)) is not None), None)
    if found is None:
        raise InputError(
            f"{where} holds {_described(checkpoint.content)}, none of the networks of a published format "
            "(G_ema, G, D; g_ema, g, d; state_dict with encoder or decoder); give another file."
        )
    return found


def _needed(part: str | None, content: Any) -> Any:
    """The content without other networks and optimizers, where it has the network that is wanted."""
    if part is None or not isinstance(content, Mapping):
        return content
    state = content.get("state_dict")
    decoder = (
        {name: value for name, value in state.items() if "decoder." in str(name)} if isinstance(state, Mapping) else {}
    )
    if decoder and part == "generator":
        return {**content, "state_dict": decoder}
    found = next((name for name in _ENTRIES[part] if isinstance(content.get(name), Mapping | Stub)), None)
    return content if found is None else {key: v for key, v in content.items() if key == found or key not in _LARGE}


def published_generator(path: StrPath) -> Generator:
    """The averaged generator of a published file (else the plain one), float32 on the CPU.

    Without a mean latent in the file the mean of the mapping over 10,000 prior samples stands in for it, with a warning.

    Raises:
        InputError: the file is missing, truncated, foreign, or holds no generator.
    """
    found = read_published(path, "generator")
    if found.generator is None:
        raise _lacks(path, found, "generator")
    return found.generator().build()


def published_discriminator(path: StrPath) -> Discriminator:
    """The discriminator of a published file, float32 on the CPU. Raises as :func:`published_generator`."""
    found = read_published(path, "discriminator")
    if found.discriminator is None:
        raise _lacks(path, found, "discriminator")
    return found.discriminator().build()


def published_encoder(path: StrPath, w_encoder: StrPath | None = None, n_latent: int | None = None) -> ImageEncoder:
    """The encoder of a published file, float32 on the CPU; its outputs are offsets from ``latent_avg``.

    Args:
        w_encoder: the file of the encoder into W that a HyperStyle file was trained with.
        n_latent: how many of its styles to take, the first ones; None: as many as the file's generator takes.
    Raises:
        InputError: as :func:`published_generator`, or the file holds an encoder that needs another file.
    """
    found = read_published(path)
    if found.encoder is None:
        raise _lacks(path, found, "encoder")
    takes = None if found.generator is None else n_latent_of(found.generator().arguments["resolution"])
    part = found.encoder()
    if w_encoder is not None:
        part = _joined(part, path, w_encoder)
    if n_latent is None:
        return build_encoder_part(part, takes)
    if not isinstance(n_latent, int) or takes not in (None, n_latent):
        raise InputError(
            f"n_latent must be {takes or 'a whole number'}, as the generator of the file takes, got {n_latent!r}."
        )
    return build_encoder_part(part, n_latent, may_drop=True)


def _joined(part: EncoderPart, path: StrPath, w_encoder: StrPath) -> EncoderPart:
    """HyperStyle's hypernetwork and the encoder that gives its codes, from two files."""
    if not any(name.startswith("hypernet.") for name in part.state):
        raise InputError(f"w_encoder is for HyperStyle, File {str(path)!r} holds another encoder; leave it out.")
    codes = read_published(w_encoder)
    if codes.encoder is None:
        raise _lacks(w_encoder, codes, "encoder")
    state = {f"w_encoder.{name.removeprefix('encoder.')}": value for name, value in codes.encoder().state.items()}
    return replace(part, state={**part.state, **state})


def published_directions(path: StrPath) -> tuple[Tensor, int]:
    """A [6, D, K] of a file of AGE or SAGE, and the number of styles L of its generator."""
    found = read_published(path)
    if found.directions is None:
        raise _lacks(path, found, "directions")
    if found.generator is None:
        return found.directions, len(found.directions)
    return found.directions, n_latent_of(found.generator().arguments["resolution"])


def build_encoder_part(part: EncoderPart, n_latent: int | None, may_drop: bool = False) -> ImageEncoder:
    """An encoder of offsets, whatever the file's outputs were relative to.

    An old pSp, AGE or SAGE has 18 styles and its generator takes the first of them; where the file's options have the size of that
    generator they are dropped, with a warning.

    Args:
        part: its weights and options.
        n_latent: L of the generator; None: what the options say.
        may_drop: styles beyond L are dropped whatever the file says.
    Raises:
        InputError: weights of another network, more styles than the generator takes, or one that needs another file.
    """
    options = dict(part.options)
    networks = {name.partition(".")[0] for name in part.state}
    state = {name.removeprefix("encoder."): value for name, value in part.state.items()}
    options.setdefault(
        "encoder_type", "SharedWeightsHyperNetResNet" if "hypernet" in networks else "GradualStyleEncoder"
    )
    try:
        encoder = encoder_from_state(options, state, n_latent)
    except InputError as error:
        raise InputError(f"{part.where}: {error}") from error
    # ReStyle and HyperStyle begin at latent_avg whatever the option says
    if options.get("start_from_latent_avg") is False and not encoder.n_iterations:
        from_absolute(encoder, _mean_of(part, encoder.style_dim))
    if not may_drop:
        _check_styles(encoder, part)
    if str(options.get("dataset_type", "")).startswith("cars"):
        warnings.warn(
            f"{part.where} was trained on images of 192 x 256 (dataset_type {options['dataset_type']!r}), which are not read: what it "
            "gives for square ones is not what its own code gives.",
            SageFastWarning,
            stacklevel=4,
        )
    return encoder


def _mean_of(part: EncoderPart, style_dim: int) -> Tensor:
    """What the generator that is loaded from the file has as its mean latent [D].

    pSp, e4e and AGE store ``latent_avg`` only where their encoder starts from it: beside an encoder of latents there is none, and
    the mapping's own mean stands in, for generator and encoder alike.
    """
    if part.latent_avg is not None:
        return mean_row(part.latent_avg, style_dim, part.where)
    if part.mean_of_generator is None:
        raise InputError(
            f"{part.where} has an encoder of latents (start_from_latent_avg is False), and no latent_avg or generator to make "
            "offsets of them; give the file with its decoder."
        )
    return mean_row(part.mean_of_generator(), style_dim, part.where)


def _check_styles(encoder: ImageEncoder, part: EncoderPart) -> None:
    """Raise InputError where more styles than the generator takes are no convention of old files, else say that some go."""
    n_styles, taken = getattr(encoder, "n_styles", encoder.n_latent), encoder.n_latent
    if n_styles <= taken:
        return
    size = declared_size(part.options, part.where)
    if n_styles != OLD_STYLES or size is None:
        raise InputError(
            f"{part.where} has an encoder of {n_styles} styles, expected {taken} as its generator takes; give load_encoder "
            f"n_latent={taken} to use the first of them."
        )
    warnings.warn(
        f"{part.where}: of the encoder's {n_styles} styles the generator of {size} px takes the first {taken}, the others are "
        "left out.",
        SageFastWarning,
        stacklevel=4,
    )


def _lacks(path: StrPath, found: PublishedFile, wanted: str) -> InputError:
    held = ", ".join(found.holds()) or "nothing that can be loaded"
    return InputError(
        f"File {str(path)!r} ({found.format}) holds no {wanted}, but {held}; give a file that was saved with one."
    )


def _described(content: Any) -> str:
    if isinstance(content, Mapping):
        names = [str(name)[:40] for name in list(content)[:4]]
        return f"a table of {', '.join(names)}{', ...' if len(content) > 4 else ''}" if names else "an empty table"
    return f"a {type(content).__name__}"
