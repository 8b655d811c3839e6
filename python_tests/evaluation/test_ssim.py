"""Structural similarity against its formula in NumPy, window by window."""

import numpy as np
import pytest
import torch

from sage_fast.errors import InputError
from sage_fast.evaluation.ssim import ssim


def by_hand(a, b, side):
    """Eq. 13 with means, variances and the covariance of each window under Gaussian weights."""
    r = np.arange(side) - side // 2
    weight = np.exp(-(r[:, None] ** 2 + r[None] ** 2) / (2 * 1.5**2))
    weight /= weight.sum()
    values = []
    for c in range(a.shape[0]):
        for i in range(a.shape[1] - side + 1):
            for j in range(a.shape[2] - side + 1):
                x, y = a[c, i : i + side, j : j + side], b[c, i : i + side, j : j + side]
                mx, my = (weight * x).sum(), (weight * y).sum()
                vx, vy = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum()
                cov = (weight * (x - mx) * (y - my)).sum()
                c1, c2 = 0.02**2, 0.06**2
                values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return np.mean(values)


@pytest.mark.parametrize(("size", "side"), [((14, 17), 11), ((8, 9), 7)])
def test_it_is_the_formula(size, side):
    rng = np.random.default_rng(0)
    a = np.clip(rng.normal(0, 0.5, (2, 3, *size)), -1, 1)
    b = np.clip(a + rng.normal(0, 0.2, a.shape), -1, 1)
    found = ssim(torch.from_numpy(a).float(), torch.from_numpy(b).float())
    expected = [by_hand(x.astype(np.float32), y.astype(np.float32), side) for x, y in zip(a, b)]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_equal_opposite_and_bad():
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(ssim(x, x), torch.ones(2))
    assert (ssim(x, 1 - x) < -0.5).all()
    with pytest.raises(InputError, match="of one shape"):
        ssim(x, x[:, :1])
