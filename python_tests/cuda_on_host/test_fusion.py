"""The kernels of gaussian_low_pass, fuse_frequencies and fuse_pixels on the host."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sage_fast.ops import (
    fuse_frequencies_reference,
    fuse_pixels_reference,
    gaussian_low_pass,
    gaussian_low_pass_reference,
)

OPS = torch.ops.sage_fast_on_host
BLENDS = ["residual", "convex", "printed"]
SIZES = [(35, 70), (1, 1), (7, 1), (2, 5), (33, 8)]
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def images(n: int, size: tuple[int, int], dtype=torch.float32, c: int = 2) -> Tensor:
    rng = torch.Generator().manual_seed(n + sum(size))
    return torch.rand(n, c, *size, generator=rng, dtype=dtype) * 2 - 1


def close(ours: Tensor, expected: Tensor, in_float32: float = 2e-6) -> None:
    tolerance = in_float32 if ours.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)


@BOTH
@pytest.mark.parametrize("unit", ["frequency", "pixels"])
@pytest.mark.parametrize("border", ["circular", "reflect"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gaussian_low_pass(routed, size, border, unit, dtype):
    """Blurs of one band and of two, on either axis, narrower than a tile of places and wider."""
    x = images(2, size, dtype)
    for sigma in (0.05, 0.9, 4.0, 300.0):
        ours = routed.in_every_order(gaussian_low_pass, x, sigma, border, unit)
        close(ours, gaussian_low_pass_reference(x, sigma, border, unit))


# lanes of four pixels: strips of 128 columns whole and not; of one: widths beside a strip's, and what is not aligned
PACKED = [(70, 136), (9, 260), (20, 68)]


@BOTH
@pytest.mark.parametrize("size", PACKED, ids=str)
def test_low_pass_of_packs(routed, size, dtype):
    """Axes that go around once more than a block's outputs reach, and blocks of more outputs than one batch."""
    x = images(1, size, dtype, c=3)
    for sigma, border, unit in (
        (5.0, "circular", "frequency"),
        (30.0, "circular", "frequency"),
        (3.0, "reflect", "pixels"),
    ):
        ours = routed.in_every_order(gaussian_low_pass, x, sigma, border, unit)
        close(ours, gaussian_low_pass_reference(x, sigma, border, unit))
    close(gaussian_low_pass(unaligned(x), 5.0), gaussian_low_pass_reference(x, 5.0))


@pytest.mark.parametrize("settings", [(1.0, 1.0), (0.8, 0.3)])
def test_fuse_frequencies_of_packs(library, settings):
    """Every source in turn where it is not aligned, and more edits of one source than the blocks write at once."""
    size = (40, 132)
    edited = images(5, size)
    for n in (1, 5):
        real, inverted = images(n, size).flip(1), images(n, size).flip(2)
        expected = fuse_frequencies_reference(real, inverted, edited, *settings, 5.0)
        close(library.in_every_order(OPS.fuse_frequencies, real, inverted, edited, *settings, 5.0), expected, 5e-6)
        for i in range(3):
            three = [real, inverted, edited]
            three[i] = unaligned(three[i])
            close(OPS.fuse_frequencies(*three, *settings, 5.0), expected, 5e-6)


def test_many_edits_of_one_source(library):
    """On axes of one band and of two: blocks that write several edits, the last one fewer."""
    for n, size in ((70, (16, 20)), (1030, (2, 3)), (35, (40, 132))):
        edited, source = images(n, size), images(1, size)
        ours = OPS.fuse_frequencies(source, source.flip(2), edited, 1.0, 0.8, 2.0)
        close(ours, fuse_frequencies_reference(source, source.flip(2), edited, 1.0, 0.8, 2.0), 5e-6)


def unaligned(x: Tensor) -> Tensor:
    y = x.new_full((x.numel() + 1,), torch.nan)[1:].view_as(x).copy_(x)
    assert y.data_ptr() % 16 != 0
    return y


def test_low_pass_of_long_axes(routed):
    for size in ((3, 301), (257, 2)):
        x = images(1, size, c=3)
        for sigma in (1.5, 9.0, 60.0):
            close(gaussian_low_pass(x, sigma), gaussian_low_pass_reference(x, sigma))
    assert gaussian_low_pass(x[:0], 3.0).shape == x[:0].shape


def test_low_pass_of_what_is_not_dense(routed):
    x = images(2, (9, 22))
    for other in (x[..., ::2], x.transpose(2, 3), x[:1].expand(3, -1, -1, -1)):
        close(gaussian_low_pass(other, 2.0), gaussian_low_pass_reference(other, 2.0))


@BOTH
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("settings", [(1.0, 1.0), (0.8, 0.3), (0.0, 1.5)])
def test_fuse_frequencies(library, settings, size, dtype):
    edited = images(3, size, dtype)
    for sources in ((3, 3), (1, 1), (1, 3), (3, 1)):
        real, inverted = (images(n, size, dtype).flip(1 + i) for i, n in enumerate(sources))
        for sigma in (0.7, 5.0):
            ours = library.in_every_order(OPS.fuse_frequencies, real, inverted, edited, *settings, sigma)
            close(ours, fuse_frequencies_reference(real, inverted, edited, *settings, sigma), 5e-6)
    assert OPS.fuse_frequencies(edited[:0], edited[:1], edited[:0], *settings, 1.0).shape == edited[:0].shape


@BOTH
@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_fuse_pixels(library, size, blend, dtype):
    """More images than the grid is deep on the host, so that a block takes several."""
    edited = images(5, size, dtype)
    for sources in ((5, 5), (1, 1), (1, 5), (5, 1)):
        real, inverted = (images(n, size, dtype).flip(1 + i) for i, n in enumerate(sources))
        for low in (None, real / 2):
            args = (low, 0.4, BLENDS.index(blend), 1.3)
            ours = library.in_every_order(OPS.fuse_pixels, real, inverted, edited, *args)
            close(ours, fuse_pixels_reference(real, inverted, edited, 0.4, blend, low), 1e-6)
    x = edited.transpose(2, 3).contiguous().transpose(2, 3)
    close(
        OPS.fuse_pixels(x, x.flip(0), x, None, 0.4, 0, 1.3),
        OPS.fuse_pixels(edited, edited.flip(0), edited, None, 0.4, 0, 1.3),
    )
    assert OPS.fuse_pixels(x[:0], x[:0], x[:0], None, 0.4, 0, 1.3).shape == x[:0].shape


@pytest.mark.parametrize("c", [1, 3, 4, 5])
@pytest.mark.parametrize("size", [(9, 4), (5, 8), (3, 132), (37, 260), (6, 35), (11, 129), (1, 12)], ids=str)
def test_fuse_pixels_in_packs_and_alone(library, size, c):
    """Stretches of all lanes and of few, whole and not, strips that go down and up, the last one short."""
    edited, real = images(3, size, c=c), images(1, size, c=c).flip(2)
    for low in (None, real / 2):
        for blend in range(3):
            expected = fuse_pixels_reference(real, edited.flip(0), edited, 0.4, BLENDS[blend], low)
            ours = library.in_every_order(OPS.fuse_pixels, real, edited.flip(0), edited, low, 0.4, blend, 1.3)
            close(ours, expected, 1e-6)
        three = [real, edited.flip(0), edited]
        for i in range(3):
            close(OPS.fuse_pixels(*three[:i], unaligned(three[i]), *three[i + 1 :], low, 0.4, 2, 1.3), expected, 1e-6)
