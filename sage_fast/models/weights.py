"""Network weights on disk: the bundle of this package, and the door to published files.

The files of a bundle are written and read by ``bundles``, published files by ``published``; no file holds code.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from sage_fast.errors import InputError, reason_of
from sage_fast.models.bundles import (
    Directions,
    bundle_directions,
    bundle_folder,
    bundle_hash,
    bundle_tensors,
    check_parts,
    load_bundle_codes,
    read_bundle_file,
    read_index,
    save_bundle,
)
from sage_fast.models.checkpoints import path_of, source_of
from sage_fast.models.encoder_kinds import build_encoder
from sage_fast.models.image_encoder import ImageEncoder
from sage_fast.models.published import (
    fill_network,
    published_discriminator,
    published_encoder,
    published_generator,
)
from sage_fast.models.stylegan2 import Discriminator, Generator

if TYPE_CHECKING:
    from pathlib import Path

    from sage_fast.data.latent_table import LatentTable

__all__ = [
    "Bundle", "Directions", "check_parts", "load_bundle", "load_bundle_codes", "load_directions",
    "load_discriminator", "load_encoder", "load_generator", "read_bundle_file", "read_index", "save_bundle",
]  # fmt: skip

StrPath = str | os.PathLike[str]
Network = TypeVar("Network", Generator, Discriminator, ImageEncoder)


@dataclass(frozen=True, eq=False)
class Bundle:
    """What a bundle folder holds, on one device (the dictionary and the codes stay on the CPU).

    Attributes:
        generator, encoder: the networks, in eval mode.
        dictionary: A of Eq. 8 of [SAGE] and its groups of layers.
        codes: offsets from ``latent_avg`` of the images that the networks were trained on.
        noise: the generator's noise the encoder was trained for, ``"none"`` or ``"const"``.
        about: how it was trained; free content.
        hash: sha256 over everything above that shapes an image (``about`` left out).
    """

    generator: Generator
    encoder: ImageEncoder
    dictionary: Directions
    codes: LatentTable
    noise: str
    about: dict[str, Any]
    hash: str


def load_bundle(folder: StrPath | None = None, device: str | torch.device = "cpu") -> Bundle:
    """Read a bundle; ``None`` is the model shipped with the package.

    Raises:
        InputError: a file is missing, truncated, changed or foreign, the parts do not fit together, or ``device`` is
            not there.
    """
    folder = bundle_folder(folder)
    index = read_index(folder)
    generator = _bundle_network(folder, index, "generator", _generator).to(_device(device))
    encoder = _bundle_network(folder, index, "encoder", build_encoder).to(_device(device))
    dictionary, codes = bundle_directions(folder, index), load_bundle_codes(folder)
    check_parts(generator, encoder, dictionary.directions, codes, f"Model folder {str(folder)!r}")
    return Bundle(generator, encoder, dictionary, codes, index["noise"], index["about"], bundle_hash(index))


def load_generator(
    path: StrPath | None = None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Generator:
    """The generator (its average, where the file has one) of a bundle folder or a published file, in eval mode.

    docs/formats.md lists the formats, which are recognised from the content.

    Raises:
        InputError: the file or folder is missing, truncated, foreign, or holds no such network.
    """
    return _load(path, "generator", _generator, published_generator, device, dtype)


def load_discriminator(
    path: StrPath | None = None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Discriminator:
    """The discriminator of a bundle folder or a published file, in eval mode. Raises as :func:`load_generator`."""
    return _load(path, "discriminator", _discriminator, published_discriminator, device, dtype)


def load_encoder(
    path: StrPath | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    w_encoder: StrPath | None = None,
    n_latent: int | None = None,
) -> ImageEncoder:
    """The encoder of a bundle folder or a published file, of whatever kind, in eval mode.

    Args:
        w_encoder: for a published HyperStyle file, the file of the encoder into W that it was trained with.
        n_latent: of a published encoder with more styles than the generator takes, how many to use, from the first on.
    Raises:
        InputError: as :func:`load_generator`, or ``w_encoder`` beside what is not a HyperStyle file, or an encoder of
            another number of styles than the generator in its file takes.
    """
    for name, given in (("w_encoder", w_encoder), ("n_latent", n_latent)):
        if given is not None and (path is None or not path_of(path).is_file()):
            raise InputError(f"{name} is for a published file; a bundle holds its own, leave it out.")
    published = partial(published_encoder, w_encoder=w_encoder, n_latent=n_latent)
    return _load(path, "encoder", build_encoder, published, device, dtype)


def load_directions(path: StrPath | None = None) -> Directions:
    """The category-irrelevant directions of a bundle folder, on the CPU. Raises as :func:`load_generator`."""
    folder = bundle_folder(path)
    return bundle_directions(folder, read_index(folder))


def _bundle_network(
    folder: Path, index: dict[str, Any], name: str, build: Callable[[Mapping[str, Any]], Network]
) -> Network:
    state = bundle_tensors(folder, f"{name}.safetensors")
    where = f"Model file {str(folder / name) + '.safetensors'!r}"
    return fill_network(lambda: build(index["networks"][name]), state, where)


def _generator(architecture: Mapping[str, Any]) -> Generator:
    return Generator(**architecture)


def _discriminator(architecture: Mapping[str, Any]) -> Discriminator:
    return Discriminator(**architecture)


def _load(
    path: StrPath | None,
    name: str,
    build: Callable[[Mapping[str, Any]], Network],
    published: Callable[[StrPath], Network],
    device: str | torch.device,
    dtype: torch.dtype,
) -> Network:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise InputError(f"dtype must be torch.float32, float64, float16 or bfloat16, got {dtype!r}.")
    path = None if path is None else source_of(path)
    if path is not None and path.is_file():
        network = published(path)
    else:
        folder = bundle_folder(path)
        network = _bundle_network(folder, read_index(folder), name, build)
    return network.to(_device(device), dtype)


def _device(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise InputError(f"device {str(device)!r} cannot be used ({reason_of(error)}); use 'cpu'.") from error
