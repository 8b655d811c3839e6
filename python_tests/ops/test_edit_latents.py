"""edit_latents (Eq. 15, 20): against the printed form and NumPy, derivatives, and bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sage_fast.errors import InputError
from sage_fast.ops import edit_latents, edit_latents_reference
from sage_fast.ops.edit_latents import _base, _kept


def arguments(n=5, n_latent=3, dim=59, k=7, dtype=torch.float32, rows=None) -> list[torch.Tensor]:
    """class_embedding [rows, L, D], codes [N, L, K], directions [L, D, K], mask [L, K]."""
    rng = torch.Generator().manual_seed(n + k)
    shapes = (n if rows is None else rows, n_latent, dim), (n, n_latent, k), (n_latent, dim, k)
    tensors = [torch.randn(shape, generator=rng, dtype=dtype) for shape in shapes]
    return [*tensors, (torch.rand(n_latent, k, generator=rng) < 0.5).to(dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n, k, rows", [(5, 7, 5), (5, 7, 1), (1, 1, 1), (97, 33, 1), (0, 4, 1), (0, 4, 0), (3, 0, 3)])
def test_equals_reference(n, k, rows, dtype):
    e, codes, directions, mask = arguments(n=n, k=k, rows=rows, dtype=dtype)
    for chosen in (None, mask, mask.bool()):
        expected = edit_latents_reference(e, codes, directions, 1.7, chosen)
        torch.testing.assert_close(edit_latents(e, codes, directions, 1.7, chosen), expected, atol=1e-5, rtol=1e-5)
        assert expected.shape == (n, 3, 59)


@pytest.mark.parametrize("op", [edit_latents, edit_latents_reference])
def test_equals_numpy(op):
    e, codes, directions, mask = (t.numpy() for t in arguments(dtype=torch.float64))
    expected = np.empty_like(e)
    for j, layer in np.ndindex(*e.shape[:2]):
        expected[j, layer] = e[j, layer] - 0.5 * directions[layer] @ (mask[layer] * codes[j, layer])
    np.testing.assert_allclose(
        op(*arguments(dtype=torch.float64)[:3], -0.5, torch.from_numpy(mask)), expected, atol=1e-13
    )


def test_memory_layouts(laid_out):
    tensors = [laid_out(t) for t in arguments()]
    e, codes, directions, mask = tensors
    expected = edit_latents_reference(e, codes, directions, 2.0, mask)
    torch.testing.assert_close(edit_latents(e, codes, directions, 2.0, mask), expected, atol=1e-5, rtol=1e-5)


def test_without_strength_or_directions_the_embedding_stays():
    e, codes, directions, mask = arguments()
    assert torch.equal(edit_latents(e, codes, directions, alpha=0.0), e)
    assert torch.equal(edit_latents(e, codes, directions, mask=torch.zeros_like(mask)), e)


def test_masked_directions_leave_no_trace():
    e, codes, directions, mask = arguments()
    changed = torch.where(mask.bool(), codes, codes + 100)
    torch.testing.assert_close(
        edit_latents(e, changed, directions, mask=mask), edit_latents(e, codes, directions, mask=mask)
    )


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("masked", [True, False])
def test_gradcheck(rows, masked):
    *tensors, mask = arguments(n=2, n_latent=2, dim=3, k=3, rows=rows, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in tensors]
    op = lambda *t: edit_latents(*t, 1.3, mask if masked else None)  # noqa: E731
    assert torch.autograd.gradcheck(op, tensors)
    assert torch.autograd.gradgradcheck(op, tensors)


KERNEL_SIZES = [
    (1, 1, 1, 1),
    (1, 2, 59, 7),
    (3, 3, 64, 33),
    (4, 2, 130, 100),
    (37, 3, 97, 20),
    (5, 2, 16, 0),
]  # N, L, D, K


def classes(n, n_latent, k, rows=3, device="cpu"):
    """mask bool [rows, L, K] and class_index [N], both arbitrary."""
    rng = torch.Generator().manual_seed(n)
    mask = torch.rand(rows, n_latent, k, generator=rng) < 0.5
    return mask.to(device), torch.randint(rows, (n,), generator=rng).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n, n_latent, dim, k", KERNEL_SIZES)
def test_kernel_equals_reference(device, n, n_latent, dim, k, dtype):
    kernel = torch.ops.sage_fast.edit_latents.default
    e, codes, directions, _ = (t.to(device) for t in arguments(n, n_latent, dim, k, dtype, rows=3))
    mask, index = classes(n, n_latent, k, device=device)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-13
    own = e[index]
    cases = [(e, mask, index), (e, mask[:1], index), (e, None, index), (own, mask[:1], None), (e[:1], mask[:1], None)]
    for base, chosen, rows in [*cases, (own, mask[index], None)]:
        printed = None if chosen is None else chosen[0] if len(chosen) == 1 else chosen
        expected = edit_latents_reference(base, codes, directions, 1.7, printed, rows)
        ours = kernel(base, codes, directions, 1.7, chosen, rows)
        torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)


def test_more_than_a_cache_holds(device):
    e, codes, directions, mask = (t.to(device) for t in arguments(1601, 8, 512, 6, rows=1))
    expected = edit_latents_reference(e, codes, directions, 1.7, mask)
    ours = torch.ops.sage_fast.edit_latents.default(e, codes, directions, 1.7, mask[None].bool(), None)
    assert ours.nbytes > 24 << 20
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)


def test_kernel_takes_any_rows(device):
    e, codes, directions, _ = (t.to(device) for t in arguments(9, 3, 20, 6))
    mask, index = classes(9, 3, 6, rows=9, device=device)
    expected = edit_latents_reference(e, codes, directions, 2.0, mask, index)
    wide = directions.repeat(1, 1, 2)[..., :6]
    other = codes.transpose(0, 1).contiguous().transpose(0, 1), e.repeat(2, 1, 1)[::2]
    kernel = torch.ops.sage_fast.edit_latents.default
    every_second = e.transpose(0, 1).contiguous().transpose(0, 1)
    for base, n, A in ((e, other[0], wide), (every_second, codes.mT.contiguous().mT, directions.mT.contiguous().mT)):
        torch.testing.assert_close(kernel(base, n, A, 2.0, mask, index), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n", [2, 6])
def test_kernel_gradients(device, n):
    e, codes, directions, _ = (t.to(device).requires_grad_() for t in arguments(n, 2, 3, 3, torch.float64, rows=3))
    mask, index = classes(n, 2, 3, device=device)
    for base_mask in (None, mask[:1], mask):
        op = lambda *t: torch.ops.sage_fast.edit_latents.default(*t, 1.3, base_mask, index)  # noqa: B023, E731
        assert torch.autograd.gradcheck(op, (e, codes, directions))
        assert torch.autograd.gradgradcheck(op, (e, codes, directions))


def test_opcheck(device):
    e, codes, directions, _ = (t.to(device).requires_grad_() for t in arguments(5, 2, 6, 3, rows=3))
    mask, index = classes(5, 2, 3, device=device)
    op = torch.ops.sage_fast.edit_latents.default
    torch.library.opcheck(op, (e, codes, directions, 1.5, mask, index))
    torch.library.opcheck(op, (e[:1].detach(), codes.detach(), directions.detach(), 1.5, None, None))


def test_a_sample_is_summed_by_itself(same_bits_for_all_thread_counts):
    e, codes, directions, _ = arguments(41, 3, 150, 60, rows=3)
    mask, index = classes(41, 3, 60)
    kernel = torch.ops.sage_fast.edit_latents.default
    whole = kernel(e, codes, directions, 2.0, mask, index)
    assert torch.equal(kernel(e, codes[7:18], directions, 2.0, mask, index[7:18]), whole[7:18])
    same_bits_for_all_thread_counts(lambda: kernel(e, codes, directions, 2.0, mask, index))


def test_kernel_refuses_a_class_that_is_not_there():
    e, codes, directions, _ = arguments(5, 2, 6, 3, rows=3)
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match="class_index must be 0 to B - 1"):
            torch.ops.sage_fast.edit_latents.default(e, codes, directions, 1.0, None, torch.tensor([0, 1, wrong, 0, 0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(no_worse_than_plain, dtype):
    e, codes, directions, mask = (t.to(dtype) for t in arguments(n=33, k=40))
    exact = edit_latents_reference(e.double(), codes.double(), directions.double(), 1.5, mask)
    plain = edit_latents_reference(e, codes, directions, 1.5, mask)
    no_worse_than_plain(edit_latents(e, codes, directions, 1.5, mask), plain, exact)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_sample_and_layer(value):
    e, codes, directions, mask = arguments()
    codes[2, 1, 3], mask[1, 3] = value, 1
    y, expected = (op(e, codes, directions, 1.0, mask) for op in (edit_latents, edit_latents_reference))
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert not y[2, 1].isfinite().any() and y.isfinite().sum() == y.numel() - 59


@pytest.mark.parametrize("op", [edit_latents, edit_latents_reference])
@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(directions=torch.zeros(8, 5)),
            r"directions must be floating point \[L, D, K\], got torch.float32 \[8, 5\]",
        ),
        (
            dict(codes=torch.zeros(4, 3, 6)),
            r"codes must be floating point \[N, 3, 5\], as directions have, got torch.float32 \[4, 3, 6\]",
        ),
        (dict(codes=torch.zeros(3, 5)), r"got torch.float32 \[3, 5\]"),
        (dict(codes=torch.zeros(4, 3, 5, dtype=torch.int64)), "codes must be floating point .* got torch.int64"),
        (dict(mask=torch.zeros(3, 5, device="meta")), "mask must be on cpu, as codes are, got meta"),
        (dict(class_index=torch.tensor([0, 1, 2, 4])), "class_index must be 0 to 3, got 0 to 4"),
        (dict(class_index=torch.tensor([0, -1, 2, 3])), "class_index must be 0 to 3, got -1 to 3"),
        (dict(class_embedding=torch.zeros(4, 3, 9)), r"class_embedding must have shape \[N, 3, 8\].* got \[4, 3, 9\]"),
        (dict(class_embedding=torch.zeros(2, 3, 8)), "class_embedding must hold 1 or 4 rows, as codes do, got 2"),
        (dict(mask=torch.zeros(5)), r"mask must have shape \[3, 5\] or \[4, 3, 5\], got \[5\]"),
        (
            dict(class_index=torch.zeros(3, dtype=torch.int64)),
            r"class_index must be int64 \[4\], .* got torch.int64 \[3\]",
        ),
        (dict(class_index=torch.zeros(4)), r"class_index must be int64 \[4\], .* got torch.float32 \[4\]"),
        (
            dict(directions=torch.zeros(3, 8, 5).double()),
            "directions must be torch.float32 on cpu, .* got torch.float64",
        ),
    ],
)
def test_bad_input(op, change, message):
    given = dict(class_embedding=torch.zeros(4, 3, 8), codes=torch.zeros(4, 3, 5), directions=torch.zeros(3, 8, 5))
    with pytest.raises(InputError, match=message):
        op(**given | change)


def test_a_class_that_nobody_looked_at_is_nan():
    """On a GPU a look would wait, and plain indexing there would end the process's use of it."""
    e, index = torch.randn(4, 3, 8), torch.tensor([2, 4, -1, 0])
    found = _base(e, index)
    assert found[1:3].isnan().all() and torch.equal(found[[0, 3]], e[[2, 0]])
    mask = torch.zeros(4, 3, 5, dtype=torch.bool)
    assert _kept(torch.ones(4, 3, 5), mask, index).sum() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_gpu_goes_on_after_a_class_that_is_not_there(dtype):
    e, codes, directions, mask = (t.cuda() for t in (*arguments(),))
    e, codes, directions = (t.to(dtype).requires_grad_() for t in (e, codes, directions))
    index = torch.arange(len(codes), device="cuda") % len(e)
    bad, masks = index.clone(), mask.expand(len(e), *mask.shape[-2:]).contiguous()
    bad[1], bad[2] = len(e), -(2**40)
    for m in (None, mask, masks):
        y, good = (edit_latents(e, codes, directions, 0.7, m, i) for i in (bad, index))
        assert y[1:3].isnan().all() and torch.equal(y[3:], good[3:])
        gradients = torch.autograd.grad(y[3:].sum(), (e, codes, directions))
        torch.cuda.synchronize()
        assert all(g.isfinite().all() for g in gradients)
    with pytest.raises(InputError, match="class_index must be empty"):
        edit_latents(e[:0], codes, directions, class_index=bad)


@pytest.mark.parametrize("byte", [2, 128, 255])
@pytest.mark.parametrize("n", [3, 40])
def test_any_byte_but_zero_is_a_direction_in_use(n, byte):
    """A mask image seen as bool, by a view, has other bytes than 0 and 1; a count of them went beyond its buffer."""
    e, codes, directions, _ = arguments(n=n, k=33, rows=1)
    used = np.random.default_rng(0).random((3, 33)) < 0.7
    strange = np.where(used, byte, 0).astype(np.uint8).view(bool)
    expected = edit_latents(e, codes, directions, 1.7, torch.from_numpy(used))
    assert torch.equal(edit_latents(e, codes, directions, 1.7, torch.from_numpy(strange)), expected)
    of_arrays = edit_latents(e.numpy(), codes.numpy(), directions.numpy(), 1.7, strange)
    np.testing.assert_array_equal(of_arrays, expected.numpy())
