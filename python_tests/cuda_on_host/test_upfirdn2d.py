"""The kernels of upfirdn2d on the host: tiles, columns and any, in each dtype, and where the choice between them turns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sage_fast.ops import upfirdn2d, upfirdn2d_reference

SQUARE = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) - 0.3
FILTERS = {"4 x 4": SQUARE, "3 x 4": SQUARE[:3], "5 x 2": torch.rand(5, 2), "vector": SQUARE[0], "one": SQUARE[:1, :1]}
FACTORS = [(1, 1), (2, 1), (1, 2), (2, 2), (3, 2)]
PADDINGS = [(2, 1, 2, 1), (-1, 4, 5, -2), (31, 3, 16, 33)]
# [N, C, H, W]: more tiles than one, less than one; packs of channels whole and not
SHAPES = [(1, 2, 35, 33), (2, 8, 5, 7), (1, 5, 3, 2), (2, 16, 9, 4)]


def images(shape, dtype=torch.float32, last: bool = False) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("name", FILTERS)
def test_equals_the_reference_in_every_order(routed, name, factors, shape, last):
    x, (up, down) = images(shape, last=last), factors
    for i, padding in enumerate(PADDINGS[: 1 if x.numel() > 2000 else 3]):
        options = dict(up=up, down=down, padding=padding, flip_filter=i == 1, gain=1.5)
        y = routed.in_every_order(upfirdn2d, x, FILTERS[name], **options)
        torch.testing.assert_close(y, upfirdn2d_reference(x, FILTERS[name], **options), atol=1e-5, rtol=1e-5)
        assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(routed, dtype, last):
    for up, down in FACTORS:
        for f in (SQUARE, SQUARE[:3]):
            x, options = images((2, 8, 9, 11), dtype, last), dict(up=up, down=down, padding=(2, 1, 3, 1))
            y, exact = upfirdn2d(x, f, **options), upfirdn2d_reference(x.double(), f.to(dtype).double(), **options)
            unit = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-14
            torch.testing.assert_close(y.double(), exact, atol=unit, rtol=unit)


def test_what_is_not_dense_not_aligned_or_empty(routed):
    f, options = SQUARE, dict(padding=(2, 1, 2, 1))
    wide = images((2, 8, 9, 22))[..., ::2]
    shifted = images((1, 1, 1, 2 * 8 * 9 * 11 + 1)).flatten()[1:].view(2, 9, 11, 8).permute(0, 3, 1, 2)
    for x in (wide, wide[:1].expand(3, -1, -1, -1), wide.transpose(2, 3), shifted):
        torch.testing.assert_close(
            upfirdn2d(x, f, **options), upfirdn2d_reference(x, f, **options), atol=1e-5, rtol=1e-5
        )
    assert upfirdn2d(wide[:0], f, **options).shape == (0, 8, 9, 11)


def test_derivatives(routed):
    x = images((1, 2, 5, 6)).double().requires_grad_()
    for factors in FACTORS[:3]:
        torch.autograd.gradcheck(upfirdn2d, (x, SQUARE, *factors, 2))
