"""What ADA can do to images beyond places and colours: gains of frequency bands, noise, and a cut-out rectangle.

[ADA] is Karras et al. 2020, "Training generative adversarial networks with limited data", appendix B.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sage_fast.ops.counter_normal import counter_normal

__all__ = ["add_noise", "band_taps", "cut_out", "filter_bands"]

#: the share of an image's power that each band is taken to have, lowest first
_POWER = torch.tensor([10, 1, 1, 1], dtype=torch.float64) / 13


def filter_bands(images: Tensor, log_gains: Tensor) -> Tensor:
    """Scale four bands of frequency, an octave each and the rest, in rows and columns; borders are reflected.

    Implements the image-space filtering of [ADA], appendix B. After each band's gain t the whole is divided by
    sqrt(1 + P (t^2 - 1)), so that an image with the power P in that band keeps its power. The filters of an image are a
    matrix on either side, whatever its size.

    Args:
        images: [N, C, H, W], float32 or float64.
        log_gains: [N, 4] float64 on the CPU, log2 of t, lowest band first; zero leaves a band as it is.
    """
    gains = torch.exp2(log_gains)
    gains = gains / (1 + _POWER * (gains.square() - 1)).sqrt().prod(1, keepdim=True)
    rows, columns = (
        (gains[:, :, None, None] * _band_matrices(side)).sum(1).to(images, non_blocking=True)
        for side in images.shape[2:]
    )
    # image by image: the bits of a batched product can depend on the batch
    return torch.stack([row @ image @ column.mT for row, image, column in zip(rows, images, columns)])


def band_taps() -> np.ndarray:
    """[4, 43]: the zero-phase filters of the bands, lowest first, which sum to a single one.

    H(z) H(1/z) / 2 of the Daubechies filter of two moments halves the band; its complement is the upper half.
    """
    root = 3**0.5
    low_pass = np.array([1 + root, 3 + root, 3 - root, 1 - root]) / 32**0.5
    low = np.convolve(low_pass, low_pass[::-1]) / 2
    high = low * (-1.0) ** np.arange(-3, 4)
    bands, below = [], np.ones(1)
    for octave in (1, 2, 4):  # the filters of an octave are those of the one above with zeros between the taps
        spread = np.zeros((2, 6 * octave + 1))
        spread[:, ::octave] = high, low
        bands.append(np.convolve(below, spread[0]))
        below = np.convolve(below, spread[1])
    return np.stack([np.pad(band, (43 - len(band)) // 2) for band in (below, *bands[::-1])])


@lru_cache(maxsize=8)
def _band_matrices(side: int) -> Tensor:
    """[4, side, side] float64: the filters along one axis as matrices."""
    padded = np.pad(np.eye(side), ((21, 21), (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 43, axis=0)  # [side, side, 43]
    return torch.from_numpy(np.einsum("bk,ijk->bij", band_taps(), windows))


def add_noise(images: Tensor, sigma: Tensor, number: Tensor) -> Tensor:
    """Add normal noise of deviation |sigma| [N] to the images; ``number`` [N] says which noise each of them gets."""
    number, sigma = number.long().to(images.device, non_blocking=True), sigma.to(images, non_blocking=True)
    noise = counter_normal(number, 0, 0, images[0].numel()).view(images.shape)
    return images + noise.to(images.dtype) * sigma[:, None, None, None]


def cut_out(images: Tensor, size: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Black out a rectangle in each image: its size [N] and the place [N] of its centre from the image's are shares of the sides."""
    height, width = images.shape[2:]
    inside = [
        ((torch.arange(side) + 0.5) / side - 0.5 - centre[:, None]).abs() < size[:, None] / 2
        for side, centre in ((height, y), (width, x))
    ]
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return images.masked_fill(hole.to(images.device, non_blocking=True), 0)
