"""least_squares_codes (Eq. 18): kernel against reference, reference against NumPy, derivatives, and bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sage_fast.errors import InputError
from sage_fast.ops import least_squares_codes, least_squares_codes_reference

# N, L, D, K: whole panels and ends, one sample and more than a task takes, one direction and more than a tile has
SHAPES = [
    (1, 1, 1, 1),
    (1, 3, 512, 100),
    (3, 2, 5, 7),
    (9, 3, 59, 11),
    (131, 2, 97, 9),
    (64, 2, 16, 1),
    (70, 2, 128, 23),
    (41, 2, 64, 16),  # short rows: lanes across the directions
    (19, 3, 30, 21),
    (1, 2, 17, 37),
]


def arguments(n: int, n_latent: int, dim: int, k: int, dtype=torch.float32, device="cpu") -> list[torch.Tensor]:
    """delta_w [N, L, D] and the pseudo-inverse [L, K, D] of random directions of unit norm."""
    rng = torch.Generator().manual_seed(n + dim)
    delta_w = torch.randn(n, n_latent, dim, generator=rng, dtype=dtype)
    directions = torch.randn(n_latent, dim, k, generator=rng, dtype=torch.float64)
    inverse = torch.linalg.pinv(directions / directions.norm(dim=1, keepdim=True), rtol=0.1)
    return [delta_w.to(device), inverse.to(dtype).to(device)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_equals_reference(device, shape, dtype):
    delta_w, inverse = arguments(*shape, dtype=dtype, device=device)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    expected = least_squares_codes_reference(delta_w, inverse)
    for op in (torch.ops.sage_fast.least_squares_codes, least_squares_codes):
        torch.testing.assert_close(op(delta_w, inverse), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("op", [least_squares_codes, least_squares_codes_reference])
def test_equals_numpy_s_least_squares(op):
    """Eq. 18 as an outsider solves it: the code of least squares, of minimal norm."""
    rng = torch.Generator().manual_seed(0)
    delta_w, directions = (torch.randn(s, generator=rng, dtype=torch.float64) for s in ((5, 3, 20), (3, 20, 6)))
    directions[1, :, 5] = directions[1, :, 4]  # of lower rank
    codes = op(delta_w, torch.linalg.pinv(directions))
    for layer, a in enumerate(directions.numpy()):
        expected = np.linalg.lstsq(a, delta_w[:, layer].numpy().T, rcond=1e-12)[0].T
        np.testing.assert_allclose(codes[:, layer], expected, atol=1e-12)


def test_memory_layouts(device):
    delta_w, inverse = arguments(12, 3, 64, 5, device=device)
    expected = least_squares_codes_reference(delta_w, inverse)
    for w in (
        delta_w.transpose(0, 1).contiguous().transpose(0, 1),
        delta_w.mT.contiguous().mT,
        delta_w.repeat(2, 1, 1)[::2],
        torch.cat([delta_w, delta_w * float("nan")], 2)[..., :64],
    ):
        for a in (
            inverse,
            inverse.mT.contiguous().mT,
            inverse.repeat(1, 2, 1)[:, :5],
            torch.cat([inverse, inverse * float("nan")], 2)[..., :64],
        ):
            torch.testing.assert_close(least_squares_codes(w, a)[:1], expected[:1], atol=1e-5, rtol=1e-5)
    same = least_squares_codes(delta_w[:1].expand(12, -1, -1), inverse[:1].expand(3, -1, -1))
    other = least_squares_codes_reference(delta_w[:1], inverse[:1].repeat(3, 1, 1))
    torch.testing.assert_close(same, other.expand(12, -1, -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3, 8, 2), (2, 3, 8, 0), (2, 0, 8, 2), (2, 3, 0, 2)])
def test_empty(device, shape):
    n, n_latent, dim, k = shape
    delta_w = torch.ones(n, n_latent, dim, device=device, requires_grad=True)
    inverse = torch.ones(n_latent, k, dim, device=device, requires_grad=True)
    codes = least_squares_codes(delta_w, inverse)
    codes.sum().backward()
    assert codes.shape == (n, n_latent, k) and codes.abs().sum() == 0
    assert delta_w.grad.abs().sum() == 0 and inverse.grad.abs().sum() == 0


def test_gradients_equal_those_of_the_reference(device):
    tensors = [t.requires_grad_() for t in arguments(9, 3, 17, 4, dtype=torch.float64, device=device)]
    ours, theirs = (op(*tensors) for op in (least_squares_codes, least_squares_codes_reference))
    grad = torch.randn_like(ours)
    torch.testing.assert_close(torch.autograd.grad(ours, tensors, grad), torch.autograd.grad(theirs, tensors, grad))


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)], ids=["both", "delta_w", "inverse"])
def test_gradcheck(device, needed):
    tensors = arguments(3, 2, 4, 3, dtype=torch.float64, device=device)
    tensors = [t.requires_grad_(need) for t, need in zip(tensors, needed)]
    assert torch.autograd.gradcheck(least_squares_codes, tensors)
    assert torch.autograd.gradgradcheck(least_squares_codes, tensors)


def test_opcheck(device):
    delta_w, inverse = arguments(3, 2, 6, 2, device=device)
    op = torch.ops.sage_fast.least_squares_codes.default
    torch.library.opcheck(op, (delta_w.requires_grad_(), inverse.requires_grad_()))
    torch.library.opcheck(op, (delta_w.detach().mT.contiguous().mT, inverse.detach()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(no_worse_than_plain, dtype):
    delta_w, inverse = (t.to(dtype) for t in arguments(20, 3, 64, 10))
    exact = least_squares_codes_reference(delta_w.double(), inverse.double())
    plain = (delta_w.transpose(0, 1) @ inverse.mT).transpose(0, 1)
    no_worse_than_plain(least_squares_codes(delta_w, inverse), plain, exact)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_stay_in_their_sample_and_layer(device, value):
    delta_w, inverse = arguments(34, 3, 20, 5, device=device)
    delta_w[1, 2, 7] = value
    codes = least_squares_codes(delta_w, inverse)
    assert not codes[1, 2].isfinite().any() and codes.isfinite().sum() == codes.numel() - 5


@pytest.mark.parametrize("shape", [(1, 18, 512, 100), (200, 3, 59, 23)])
def test_threads(same_bits_for_all_thread_counts, shape):
    delta_w, inverse = arguments(*shape)
    same_bits_for_all_thread_counts(lambda: least_squares_codes(delta_w, inverse))


def test_a_code_does_not_depend_on_the_other_samples():
    delta_w, inverse = arguments(150, 2, 59, 23)
    together = least_squares_codes(delta_w, inverse)
    for i in (0, 7, 63, 64, 149):
        assert torch.equal(least_squares_codes(delta_w[i : i + 1], inverse)[0], together[i])


@pytest.mark.parametrize("op", [least_squares_codes, least_squares_codes_reference])
@pytest.mark.parametrize(
    "delta_w, inverse, message",
    [
        (torch.zeros(4, 8), torch.zeros(3, 2, 8), r"delta_w must be floating point \[N, L, D\], got torch.float32 \[4, 8\]"),
        (torch.zeros(4, 3, 8).long(), torch.zeros(3, 2, 8), "got torch.int64"),
        (torch.zeros(4, 3, 8), torch.zeros(3, 8, 2), r"\[L, K, D\] with L = 3, D = 8, got \[3, 8, 2\]"),
        (torch.zeros(4, 3, 8), torch.zeros(3, 8), r"L = 3, D = 8, got \[3, 8\]"),
        (torch.zeros(4, 3, 8), torch.zeros(3, 2, 8).double(), "must be torch.float32 on cpu.*got torch.float64 on cpu"),
        (torch.zeros(4, 3, 8), torch.zeros(3, 2, 8, device="meta"), "got torch.float32 on meta"),
    ],
)  # fmt: skip
def test_bad_input(op, delta_w, inverse, message):
    with pytest.raises(InputError, match=message):
        op(delta_w, inverse)


def test_the_kernel_refuses_what_memory_safety_forbids(device):
    op = torch.ops.sage_fast.least_squares_codes
    with pytest.raises((RuntimeError, ValueError), match=r"pseudo_inverse must be \[L, K, D\] of delta_w"):
        op(torch.zeros(4, 3, 8, device=device), torch.zeros(3, 8, 2, device=device))
    with pytest.raises((RuntimeError, ValueError), match="the dtype and device of delta_w"):
        op(torch.zeros(4, 3, 8, device=device), torch.zeros(3, 2, 8, device=device).double())
