"""Codes of a labelled image set: the table that every later stage works on."""

from __future__ import annotations

import torch
from torch import Tensor

from sage_fast.data.folders import ImageSet
from sage_fast.data.latent_table import LatentTable
from sage_fast.models.encoders import PyramidEncoder

__all__ = ["embed", "embed_images"]


def embed(images: ImageSet, encoder: PyramidEncoder, batch: int = 64) -> LatentTable:
    """Offsets from ``latent_avg`` of every image of the set, none dropped, with its labels, categories and files.

    The codes do not depend on ``batch`` beyond float rounding. Implements Eq. 3 of [SAGE] for a data set.
    """
    w_plus = embed_images(images.images, encoder, batch)
    return LatentTable(w_plus, images.labels.clone(), list(images.categories), list(images.files) or None)


@torch.no_grad()
def embed_images(images: Tensor, encoder: PyramidEncoder, batch: int = 64) -> Tensor:
    """Images uint8 [N, C, R, R] -> offsets float32 [N, L, D] on the CPU; the encoder runs on its own device in eval mode."""
    device = next(encoder.parameters()).device
    was_training = encoder.training
    encoder.eval()
    parts = [encoder(x.to(device).float() / 127.5 - 1).float().cpu() for x in images.split(batch)]
    encoder.train(was_training)
    return torch.cat(parts) if parts else torch.empty(0, encoder.n_latent, encoder.style_dim)
