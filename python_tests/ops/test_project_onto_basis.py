"""project_onto_basis (Eq. 17): kernel against reference, reference against NumPy, derivatives, and bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sage_fast.errors import InputError
from sage_fast.ops import project_onto_basis, project_onto_basis_reference

SHAPES = [(1, 1, 1, 1), (3, 2, 5, 5), (5, 3, 59, 7), (33, 2, 97, 10), (64, 2, 16, 1), (2, 8, 128, 40), (300, 2, 65, 3)]
SHAPES += [(150, 4, 512, 70)]  # N, L, D, R; panels of a basis beyond what a CPU's L2 cache is taken to hold


def arguments(n: int, n_latent: int, dim: int, r: int, dtype=torch.float32, device="cpu") -> list[torch.Tensor]:
    """w_plus [N, L, D] and an orthonormal basis [L, D, R]."""
    rng = torch.Generator().manual_seed(n + dim)
    w_plus = torch.randn(n, n_latent, dim, generator=rng, dtype=dtype)
    basis = torch.linalg.qr(torch.randn(n_latent, dim, r, generator=rng, dtype=torch.float64))[0].to(dtype)
    return [w_plus.to(device), basis.to(device)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_equals_reference(device, shape, dtype):
    w_plus, basis = arguments(*shape, dtype=dtype, device=device)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-14
    expected = project_onto_basis_reference(w_plus, basis)
    for op in (torch.ops.sage_fast.project_onto_basis, project_onto_basis):  # the kernel, and what the sizes choose
        torch.testing.assert_close(op(w_plus, basis), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dim", [512, 516])
def test_more_than_a_cache_holds(device, dim):
    """On a CPU such a result goes past the caches, if its rows are whole lines."""
    w_plus, basis = arguments(1601, 8, dim, 5, device=device)
    assert w_plus.nbytes > 24 << 20
    expected = project_onto_basis_reference(w_plus, basis)
    torch.testing.assert_close(torch.ops.sage_fast.project_onto_basis(w_plus, basis), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("shape", [(300, 2, 65, 3), (150, 4, 512, 70)])
def test_bits_do_not_depend_on_how_many(shape):
    """From two samples on: one is summed as the basis lies."""
    w_plus, basis = arguments(*shape)
    expected = torch.ops.sage_fast.project_onto_basis(w_plus, basis)
    for n in (2, 9, 64, 65, 128, 129):
        assert torch.equal(torch.ops.sage_fast.project_onto_basis(w_plus[:n], basis), expected[:n]), n


@pytest.mark.parametrize("op", [project_onto_basis, project_onto_basis_reference])
def test_equals_numpy(op):
    w_plus, basis = arguments(5, 3, 20, 6, dtype=torch.float64)
    expected = [[b @ (b.T @ w) for b, w in zip(basis.numpy(), code)] for code in w_plus.numpy()]
    np.testing.assert_allclose(op(w_plus, basis), expected, atol=1e-14)


def test_is_a_projection(device):
    """What lies in the span stays, what stands on it goes, and twice is once."""
    w_plus, basis = arguments(4, 3, 30, 6, dtype=torch.float64, device=device)
    once = project_onto_basis(w_plus, basis)
    torch.testing.assert_close(project_onto_basis(once, basis), once)
    rest = project_onto_basis(w_plus - once, basis)
    torch.testing.assert_close(rest, torch.zeros_like(rest))
    assert (once.norm(dim=2) < w_plus.norm(dim=2)).all()


def test_memory_layouts(device):
    w_plus, basis = arguments(32, 3, 20, 5, device=device)
    expected = project_onto_basis_reference(w_plus, basis)
    for w in (
        w_plus.transpose(0, 1).contiguous().transpose(0, 1),
        w_plus.mT.contiguous().mT,
        w_plus.repeat(2, 1, 1)[::2],
    ):
        for b in (basis, basis.mT.contiguous().mT, basis.repeat(1, 1, 2)[..., :5]):
            torch.testing.assert_close(project_onto_basis(w, b)[:1], expected[:1])
    torch.testing.assert_close(
        project_onto_basis(w_plus[:1].expand(32, -1, -1), basis), expected[:1].expand(32, -1, -1)
    )


@pytest.mark.parametrize("shape", [(0, 3, 8, 2), (2, 3, 8, 0), (2, 0, 8, 2), (2, 3, 0, 0)])
def test_empty(device, shape):
    n, n_latent, dim, r = shape
    w_plus = torch.ones(n, n_latent, dim, device=device, requires_grad=True)
    basis = torch.ones(n_latent, dim, r, device=device, requires_grad=True)
    y = project_onto_basis(w_plus, basis)
    y.sum().backward()
    assert y.shape == w_plus.shape and w_plus.grad.shape == w_plus.shape and basis.grad.shape == basis.shape
    assert y.abs().sum() == 0


@pytest.mark.parametrize("n", [5, 40])
def test_gradients_equal_those_of_the_reference(device, n):
    tensors = [t.requires_grad_() for t in arguments(n, 3, 17, 4, dtype=torch.float64, device=device)]
    ours, theirs = (op(*tensors) for op in (project_onto_basis, project_onto_basis_reference))
    grad = torch.randn_like(ours)
    torch.testing.assert_close(torch.autograd.grad(ours, tensors, grad), torch.autograd.grad(theirs, tensors, grad))


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)], ids=["both", "w_plus", "basis"])
def test_gradcheck(device, needed):
    """Of the kernel and of what runs for few latents. The basis need not be orthonormal for its derivative to hold."""
    rng = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=rng, dtype=torch.float64).to(device) for shape in ((3, 2, 4), (2, 4, 2))]
    tensors = [t.requires_grad_(need) for t, need in zip(tensors, needed)]
    for op in (torch.ops.sage_fast.project_onto_basis, project_onto_basis):
        assert torch.autograd.gradcheck(op, tensors)
        assert torch.autograd.gradgradcheck(op, tensors)


def test_opcheck(device):
    w_plus, basis = arguments(3, 2, 6, 2, device=device)
    op = torch.ops.sage_fast.project_onto_basis.default
    torch.library.opcheck(op, (w_plus.requires_grad_(), basis.requires_grad_()))
    torch.library.opcheck(op, (w_plus.detach().mT.contiguous().mT, basis.detach()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(no_worse_than_plain, dtype):
    w_plus, basis = (t.to(dtype) for t in arguments(20, 3, 64, 10))
    exact = project_onto_basis_reference(w_plus.double(), basis.double())
    plain = ((w_plus.transpose(0, 1) @ basis) @ basis.mT).transpose(0, 1)
    no_worse_than_plain(project_onto_basis(w_plus, basis), plain, exact)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_stay_in_their_sample_and_layer(device, value):
    w_plus, basis = arguments(34, 3, 20, 5, device=device)
    w_plus[1, 2, 7] = value
    y, expected = project_onto_basis(w_plus, basis), project_onto_basis_reference(w_plus, basis)
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert not y[1, 2].isfinite().any() and y.isfinite().sum() == y.numel() - 20


@pytest.mark.parametrize("rank", [5, 40])
def test_autocast_rounds_nothing(device, rank):
    """Whichever of the kernel and two products the sizes choose."""
    w_plus, basis = arguments(3, 2, 64, rank, device=device)
    with torch.autocast(w_plus.device.type, torch.bfloat16):
        under = project_onto_basis(w_plus, basis)
    assert torch.equal(under, project_onto_basis(w_plus, basis))


def test_threads(same_bits_for_all_thread_counts):
    w_plus, basis = arguments(70, 3, 59, 7)
    same_bits_for_all_thread_counts(lambda: project_onto_basis(w_plus, basis))


def test_bases_that_a_cache_does_not_hold(same_bits_for_all_thread_counts):
    """Samples go through them in longer runs, with the same bits."""
    w_plus, basis = arguments(137, 16, 256, 40)
    assert basis.nbytes > 512 << 10
    y = project_onto_basis(w_plus, basis)
    assert (y - project_onto_basis_reference(w_plus.double(), basis.double())).abs().max() < 2e-6
    for a, b in ((0, 5), (60, 70), (128, 137)):
        assert torch.equal(project_onto_basis(w_plus[a:b], basis), y[a:b])
    same_bits_for_all_thread_counts(lambda: project_onto_basis(w_plus, basis))


@pytest.mark.parametrize("op", [project_onto_basis, project_onto_basis_reference])
@pytest.mark.parametrize(
    "w_plus, basis, message",
    [
        (torch.zeros(4, 8), torch.zeros(3, 8, 2), r"w_plus must be floating point \[N, L, D\], got torch.float32 \[4, 8\]"),
        (torch.zeros(4, 3, 8).long(), torch.zeros(3, 8, 2), "got torch.int64"),
        (torch.zeros(4, 3, 8), torch.zeros(5, 8, 2), r"\[L, D, R\] with L = 3, D = 8, got \[5, 8, 2\]"),
        (torch.zeros(4, 3, 8), torch.zeros(3, 8), r"L = 3, D = 8, got \[3, 8\]"),
        (torch.zeros(4, 3, 8), torch.zeros(3, 8, 2).double(), "basis must be torch.float32 on cpu.*got torch.float64 on cpu"),
        (torch.zeros(4, 3, 8), torch.zeros(3, 8, 2, device="meta"), "got torch.float32 on meta"),
    ],
)  # fmt: skip
def test_bad_input(op, w_plus, basis, message):
    with pytest.raises(InputError, match=message):
        op(w_plus, basis)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n_latent", "dim", "rank", "wide"), [(14, 40, 1, 33), (8, 17, 1, 5), (3, 48, 20, 21), (2, 512, 8, 8)]
)
def test_where_a_basis_lies_changes_no_bit(n_latent, dim, rank, wide, dtype):
    """The last rows of one that ends with its memory are copied before whole vectors of them are read; all add up alike."""
    w = torch.randn(1, n_latent, dim, dtype=dtype)
    inside = torch.randn(n_latent, dim, wide, dtype=dtype)[:, :, :rank]
    ends = inside.contiguous()
    room = torch.zeros(ends.numel() + 64, dtype=dtype)
    room[: ends.numel()] = ends.flatten()
    roomy = room[: ends.numel()].view(ends.shape)
    found = [project_onto_basis(w, basis) for basis in (inside, ends, roomy)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.equal(found[0], torch.from_numpy(project_onto_basis(w.numpy(), inside.numpy())))
    if dim > 48:
        assert torch.equal(project_onto_basis(w[:, :-1], ends[:-1]), found[0][:, :-1])
