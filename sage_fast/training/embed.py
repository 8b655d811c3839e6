"""Codes of a labelled image set: the table that every later stage works on."""

from __future__ import annotations

import torch
from torch import Tensor

from sage_fast.data.folders import ImageSet
from sage_fast.data.images import to_float
from sage_fast.data.latent_table import LatentTable
from sage_fast.errors import InputError
from sage_fast.models.hyperstyle import codes_of
from sage_fast.models.image_encoder import ImageEncoder
from sage_fast.models.stylegan2 import Generator

__all__ = ["embed", "embed_images"]


def embed(
    images: ImageSet, encoder: ImageEncoder, generator: Generator, batch: int = 64, noise: str = "none"
) -> LatentTable:
    """Offsets from ``latent_avg`` of every image of the set, none dropped, with its labels, categories and files.

    The codes do not depend on ``batch`` beyond float rounding. Implements Eq. 3 of [SAGE] for a data set.

    Deviation: of HyperStyle the codes alone are kept, not the changes of the generator, which are as large as it for every
    image: what is learned from codes (dictionaries, editing) sees the code, what is drawn from a shot its changes too.
    """
    w_plus = embed_images(images.images, encoder, generator, batch, noise)
    return LatentTable(w_plus, images.labels.clone(), list(images.categories), list(images.files) or None)


@torch.no_grad()
def embed_images(
    images: Tensor, encoder: ImageEncoder, generator: Generator, batch: int = 64, noise: str = "none"
) -> Tensor:
    """Images uint8 [N, C, R, R] -> offsets float32 [N, L, D] on the CPU.

    The encoder runs on its own device, where ``generator`` is too, in eval mode.

    Args:
        batch: images the encoder takes at a time.
        noise: the generator's, which ReStyle looks at.
    Raises:
        InputError: a batch below 1.
    """
    if batch < 1:
        raise InputError(f"batch must be at least 1, got {batch}.")
    encoder, was_training = codes_of(encoder), encoder.training
    encoder.eval()
    device = next(encoder.parameters()).device
    parts = [
        encoder.invert(to_float(x.to(device)), generator, noise).offsets.float().cpu() for x in images.split(batch)
    ]
    encoder.train(was_training)
    return torch.cat(parts) if parts else torch.empty(0, encoder.n_latent, encoder.style_dim)
