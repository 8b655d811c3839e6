"""What a projection is given, in the generator's dtype and shape, or one sentence about what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sage_fast.errors import InputError
from sage_fast.models.image_encoder import ImageEncoder, check_encoder
from sage_fast.models.perceptual import FeatureNetwork
from sage_fast.models.stylegan2 import Generator

__all__ = ["check_codes", "check_images", "check_mask", "check_networks", "check_start"]

_LARGEST = 4.0  # images above it were not scaled to [-1, 1]


def check_networks(generator: Generator, encoder: nn.Module | None, perceptual: FeatureNetwork | None) -> None:
    """Raise InputError unless they are networks of one dtype and one device, and the encoder is for the generator."""
    if not isinstance(generator, Generator):
        raise InputError(
            f"generator must be a Generator, got {type(generator).__name__}; load_generator reads one from a file."
        )
    for name, given in (("encoder", encoder), ("perceptual", perceptual)):
        if not isinstance(given, nn.Module | None):
            raise InputError(f"{name} must be a network, got {type(given).__name__}; load it from its file first.")
    if isinstance(encoder, ImageEncoder):
        check_encoder(encoder, generator)
    like = generator.latent_avg
    for network in (encoder, perceptual):
        weights = [] if network is None else list(network.parameters())[:1]
        if any((w.dtype, w.device) != (like.dtype, like.device) for w in weights):
            raise InputError(
                f"{type(network).__name__} must be {like.dtype} on {like.device}, as the generator is, got "
                f"{weights[0].dtype} on {weights[0].device}; move it with .to."
            )


def check_images(images: Tensor, generator: Generator) -> Tensor:
    """The images [N, C, R, R], in the generator's dtype and on its device."""
    expected = (generator.n_channels, generator.resolution, generator.resolution)
    if not torch.is_tensor(images) or not images.is_floating_point():
        got = images.dtype if torch.is_tensor(images) else type(images).__name__
        raise InputError(
            f"images must be a floating-point tensor in [-1, 1], got {got}; data.images.to_float converts."
        )
    if images.ndim != 4 or images.shape[1:] != expected or len(images) == 0:
        raise InputError(
            f"images must have shape [N, {expected[0]}, {expected[1]}, {expected[2]}] for this generator with N at least 1, "
            f"got {list(images.shape)}; resize them when reading."
        )
    images = images.detach().to(generator.latent_avg)
    largest = images.abs().amax((1, 2, 3))
    wrong = torch.nonzero(~(largest <= _LARGEST)).flatten().tolist()
    if wrong:
        size = float(largest[wrong[0]])
        raise InputError(
            f"images must lie in [-1, 1], got a value of size {size:.4g} in image {wrong[0]}; scale or repair them."
        )
    return images


def check_codes(codes: Sequence[Any], generator: Generator) -> Tensor:
    """The outputs [1, L, D] of an encoder, one an image, as one tensor."""
    expected = (1, generator.n_latent, generator.style_dim)
    for code in codes:
        if not torch.is_tensor(code) or code.shape != expected:
            got = list(code.shape) if torch.is_tensor(code) else type(code).__name__
            raise InputError(
                f"encoder must give latents {list(expected)} for an image, as the generator takes, got {got}."
            )
    return torch.cat(list(codes))


def check_mask(mask: Tensor | None, images: Tensor) -> Tensor:
    """The mask of every image [N, 1, R, R], all ones when there is none."""
    n, _, h, w = images.shape
    if mask is None:
        return images.new_ones(n, 1, h, w)
    if not torch.is_tensor(mask) or mask.is_complex():
        got = mask.dtype if torch.is_tensor(mask) else type(mask).__name__
        raise InputError(f"mask must be a tensor of numbers in [0, 1], got {got}; torch.from_numpy converts an array.")
    if mask.ndim != 4 or mask.shape[0] not in (1, n) or mask.shape[1:] != (1, h, w):
        raise InputError(
            f"mask must have shape [{n} or 1, 1, {h}, {w}], as the images have it, got {list(mask.shape)}."
        )
    mask = mask.detach().to(images)
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise InputError("mask must lie in [0, 1], 1 where a pixel counts, got other values; scale it.")
    empty = torch.nonzero(mask.sum((1, 2, 3)) == 0).flatten().tolist()
    if empty:
        raise InputError(f"mask hides all of image {empty[0]}, so nothing is left to project; leave that image out.")
    return mask.expand(n, -1, -1, -1)


def check_start(start: Tensor | None, n: int, generator: Generator) -> Tensor | None:
    if start is None:
        return None
    expected = (n, generator.n_latent, generator.style_dim)
    if not torch.is_tensor(start):
        raise InputError(f"start must be a tensor of absolute latents {list(expected)}, got {type(start).__name__}.")
    if start.shape != expected or not bool(torch.isfinite(start).all()):
        raise InputError(f"start must be finite absolute latents {list(expected)}, got {list(start.shape)}.")
    return start.detach().to(generator.latent_avg)
