"""Structural similarity of two images ([SSIM], Wang et al. 2004)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sage_fast.errors import InputError

__all__ = ["ssim"]

_SIDE, _SIGMA = 11, 1.5  # of the Gaussian window
_K1, _K2 = 0.01, 0.03
_RANGE = 2.0  # of images in [-1, 1]


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Mean structural similarity of each pair: [N], 1 for equal images, at least -1.

    Implements Eq. 13 of [SSIM] with its constants: Gaussian windows of 11 x 11 pixels, sigma 1.5, that lie wholly within the
    image (of the largest odd side that fits into a smaller image); mean over windows and channels.

    Args:
        a, b: [N, C, H, W] in [-1, 1].
    Raises:
        InputError: shapes that differ, or no pixel.
    """
    if a.ndim != 4 or a.shape != b.shape or min(a.shape[2:]) < 1:
        raise InputError(f"ssim compares images [N, C, H, W] of one shape, got {list(a.shape)} and {list(b.shape)}.")
    a, b = a.double(), b.double()
    mean_a, mean_b = _window_mean(a), _window_mean(b)
    var_a, var_b = _window_mean(a * a) - mean_a**2, _window_mean(b * b) - mean_b**2
    covariance = _window_mean(a * b) - mean_a * mean_b
    c1, c2 = (_K1 * _RANGE) ** 2, (_K2 * _RANGE) ** 2
    light = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (light * structure).mean((1, 2, 3)).float()


def _window_mean(x: Tensor) -> Tensor:
    """Weighted means over all windows: [N, C, H - side + 1, W - side + 1]."""
    side = min(_SIDE, (min(x.shape[2:]) - 1) // 2 * 2 + 1)
    taps = torch.exp(-0.5 * ((torch.arange(side, dtype=x.dtype, device=x.device) - side // 2) / _SIGMA) ** 2)
    taps = taps / taps.sum()
    planes = x.flatten(0, 1).unsqueeze(1)
    planes = F.conv2d(F.conv2d(planes, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))
    return planes.reshape(*x.shape[:2], *planes.shape[2:])
