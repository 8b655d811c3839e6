"""Move images by an affine map of each: the executed half of the geometric transforms of ADA.

[ADA] is Karras et al. 2020, "Training generative adversarial networks with limited data", appendix B.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sage_fast.ops import upfirdn2d

__all__ = ["SYM6", "resample", "source_margins"]

#: orthonormal low-pass of the symlet with six vanishing moments (Daubechies 1992); [ADA] takes tap 5 for its centre, which is at 5.1
SYM6 = (
    (0.015404109327044714, 0.003490712084221747, -0.11799011114852142, -0.04831174258569753)
    + (0.49105594192796375, 0.7876411410286511, 0.3379294217281658, -0.07263752278637658)
    + (-0.02106029251237117, 0.04472490177078139, 0.0017677118642540077, -0.00780070832503238)
)
_LOW_PASS = torch.tensor(SYM6, dtype=torch.float64) / sum(SYM6)
_REACH = 6  # pixels beyond the image that both filters together may look at


def source_margins(inverse: Tensor, height: int, width: int) -> tuple[int, int, int, int]:
    """How far (left, right, top, bottom) any of the maps [N, 2, 3] looks beyond the image, at most one reflection."""
    x, y = (width - 1) / 2, (height - 1) / 2
    corners = torch.tensor([[-x, x, x, -x], [-y, -y, y, y], [1, 1, 1, 1]], dtype=inverse.dtype)
    seen = inverse @ corners  # [N, 2, 4]
    edges = torch.cat([-seen.amin((0, 2)) - torch.tensor([x, y]), seen.amax((0, 2)) - torch.tensor([x, y])])
    left, top, right, bottom = (edges + _REACH).ceil().to(torch.int64).tolist()
    return tuple(
        min(max(m, 0), side - 1) for m, side in ((left, width), (right, width), (top, height), (bottom, height))
    )  # type: ignore[return-value]


def resample(images: Tensor, inverse: Tensor, margins: tuple[int, int, int, int]) -> Tensor:
    """Reflect at the borders, upsample by 2 with the symlet, sample bilinearly at mapped places, downsample by 2.

    Implements the execution of geometric transforms in [ADA], appendix B. Differentiable any number of times in images. The
    result of an image depends on its own map and on the margins alone.

    Args:
        images: [N, C, H, W], float32 or float64.
        inverse: [N, 2, 3] float64 on the CPU; from a place in the result to one in the image, in pixels from the centre,
            x to the right and y downwards.
        margins: see :func:`source_margins`; black lies beyond them.
    Returns:
        [N, C, H, W].
    """
    height, width = images.shape[2:]
    padded = F.pad(images, margins, mode="reflect")
    # pixel i of the padded image is pixel 2i of the upsampled one: the filter's centre is its tap 5
    taps = _LOW_PASS.to(images.device, non_blocking=True)
    fine = upfirdn2d(padded, taps, up=2, padding=(6, 5, 6, 5), gain=4.0)
    grid = _grid(inverse, (height, width), margins, fine)
    # sample m of these is at pixel (m - 5) / 2 of the result
    return upfirdn2d(_Sample.apply(fine, grid), taps, down=2, flip_filter=True)


def _grid(inverse: Tensor, size: tuple[int, int], margins: tuple[int, int, int, int], fine: Tensor) -> Tensor:
    """Where grid_sample finds each sample: [N, 2H + 10, 2W + 10, 2], from -1 to 1 between the outer edges of ``fine``."""
    height, width = size
    half = torch.tensor([(width - 1) / 2, (height - 1) / 2], dtype=torch.float64)
    start = torch.tensor([margins[0], margins[2]], dtype=torch.float64)
    scale = 2 / torch.tensor([fine.shape[3], fine.shape[2]], dtype=torch.float64)
    linear = inverse[:, :, :2]
    first = (linear @ (-2.5 - half)) + inverse[:, :, 2] + half + start  # sample (0, 0), in pixels of the padded image
    steps = torch.cat([linear * scale[:, None], ((2 * first + 0.5) * scale - 1)[:, :, None]], 2)
    steps = steps.to(fine.device, fine.dtype, non_blocking=True)  # [N, 2, 3]: along x, along y, at (0, 0)
    columns = torch.arange(2 * width + 10, device=fine.device, dtype=fine.dtype)
    rows = torch.arange(2 * height + 10, device=fine.device, dtype=fine.dtype)
    grid = fine.new_empty(len(inverse), len(rows), len(columns), 2)
    for axis in (0, 1):
        along_x = steps[:, axis, 0, None] * columns
        along_y = torch.addcmul(steps[:, axis, 2, None], steps[:, axis, 1, None], rows)
        torch.add(along_x[:, None, :], along_y[:, :, None], out=grid[..., axis])
    return grid


class _Sample(torch.autograd.Function):
    """Bilinear samples of the images, zero outside. Linear in them, so that it and its transpose are each other's
    derivative; torch's own second derivative of grid_sample is missing in many versions."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.size = images.shape
        return torch.grid_sampler(images, grid, 0, 0, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (grid,) = ctx.saved_tensors
        return _SampleTransposed.apply(grad, grid, ctx.size), None


class _SampleTransposed(torch.autograd.Function):
    """Adds each sample's value back to the four pixels that it was taken from."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, grid: Tensor, size: torch.Size) -> Tensor:
        ctx.save_for_backward(grid)
        unread = grad.new_zeros(()).expand(size)  # values of the images matter to the gradient of the grid alone
        return torch.ops.aten.grid_sampler_2d_backward(grad, unread, grid, 0, 0, False, [True, False])[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (grid,) = ctx.saved_tensors
        return _Sample.apply(grad, grid), None, None
