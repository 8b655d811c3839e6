"""The kernels of project_onto_basis, least_squares_codes and edit_latents on the host."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sage_fast.ops import (
    combine_rows_reference,
    edit_latents_reference,
    least_squares_codes_reference,
    project_onto_basis_reference,
)

OPS = torch.ops.sage_fast_on_host
TOLERANCE = {torch.float32: dict(atol=2e-5, rtol=2e-5), torch.float64: dict(atol=1e-13, rtol=1e-13)}
BOTH = pytest.mark.parametrize("dtype", TOLERANCE)


def normal(*shape: int, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def strided(x: Tensor) -> list[Tensor]:
    """The same values with other strides: rows with a gap, the last axis not the fastest, axes exchanged."""
    wide = x.new_full((*x.shape[:2], x.shape[2] + 3), torch.nan)
    wide[..., : x.shape[2]] = x
    return [
        wide[..., : x.shape[2]],
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x.transpose(0, 1).contiguous().transpose(0, 1),
    ]


# N, L, D, R: whole blocks of eight samples and an end, sums shorter and longer than a warp
@BOTH
@pytest.mark.parametrize(
    "n, layers, dim, rank", [(1, 1, 1, 1), (3, 2, 5, 7), (17, 2, 97, 9), (8, 3, 32, 1), (9, 1, 64, 65)]
)
def test_project_onto_basis(library, n, layers, dim, rank, dtype):
    w, basis = normal(n, layers, dim, dtype=dtype), normal(layers, dim, rank, dtype=dtype) / (dim * rank) ** 0.5
    expected = project_onto_basis_reference(w, basis)
    ours = library.in_every_order(OPS.project_onto_basis, w, basis)
    torch.testing.assert_close(ours, expected, **TOLERANCE[dtype])
    for others in zip(strided(w), strided(basis)):
        assert torch.equal(OPS.project_onto_basis(*others), ours)
    assert OPS.project_onto_basis(w[:0], basis).shape == (0, layers, dim)


# rows of one to 32, 128 and 256 packs, whole and not; samples of whole warps and blocks and not; a basis of 32 columns
@BOTH
@pytest.mark.parametrize(
    "n, layers, dim, rank",
    [
        (1, 2, 4, 1),
        (5, 1, 64, 10),
        (37, 2, 128, 3),
        (3, 2, 132, 10),
        (33, 1, 256, 32),
        (18, 1, 512, 10),
        (3, 1, 1024, 7),
    ],
)
def test_project_rows_of_packs(library, n, layers, dim, rank, dtype):
    w, basis = normal(n, layers, dim, dtype=dtype), normal(layers, dim, rank, dtype=dtype) / (dim * rank) ** 0.5
    expected = project_onto_basis_reference(w, basis)
    ours = library.in_every_order(OPS.project_onto_basis, w, basis)
    torch.testing.assert_close(ours, expected, **TOLERANCE[dtype])
    for others in zip(strided(w), strided(basis)):
        assert torch.equal(OPS.project_onto_basis(*others), ours)
    shifted = w.new_full((w.numel() + 1,), torch.nan)[1:].view_as(w).copy_(w)
    torch.testing.assert_close(OPS.project_onto_basis(shifted, basis), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("rank", [12, 23, 24, 32])
def test_a_basis_beside_99_kib_of_shared_memory(library, rank):
    """As on sm_86, sm_89 and sm_120: 32 columns of 1,024 values take 132 KiB, 23 fit."""
    w, basis = normal(3, 1, 1024), normal(1, 1024, rank) / 32
    with library.shared_memory(99 << 10):
        ours = OPS.project_onto_basis(w, basis)
    torch.testing.assert_close(ours, project_onto_basis_reference(w, basis), **TOLERANCE[torch.float32])


def test_what_is_not_a_number_stays_in_its_sample(library):
    w, basis = normal(9, 2, 64), normal(2, 64, 10) / 25
    clean = OPS.project_onto_basis(w, basis)
    w[1::2] = torch.nan
    ours = OPS.project_onto_basis(w, basis)
    assert torch.equal(ours[::2], clean[::2]) and ours[1::2].isnan().all()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_widest_basis(library, dtype):
    """512 columns: 32 KiB of dynamic shared memory in float64; one more is refused."""
    w, basis = normal(2, 1, 40, dtype=dtype), normal(1, 40, 512, dtype=dtype) / 40
    torch.testing.assert_close(
        OPS.project_onto_basis(w, basis), project_onto_basis_reference(w, basis), **TOLERANCE[dtype]
    )
    with pytest.raises(ValueError, match="512 columns"):
        OPS.project_onto_basis(w, normal(1, 40, 513, dtype=dtype))


# N, L, D, K: ends of eight samples, of four columns, of 32 columns a block
@BOTH
@pytest.mark.parametrize(
    "n, layers, dim, k", [(1, 1, 1, 1), (3, 2, 5, 7), (9, 2, 59, 33), (16, 1, 64, 32), (17, 3, 31, 67)]
)
def test_least_squares_codes(library, n, layers, dim, k, dtype):
    w, inverse = normal(n, layers, dim, dtype=dtype), normal(layers, k, dim, dtype=dtype) / dim**0.5
    ours = library.in_every_order(OPS.least_squares_codes, w, inverse)
    torch.testing.assert_close(ours, least_squares_codes_reference(w, inverse), **TOLERANCE[dtype])
    for others in zip(strided(w), strided(inverse)):
        assert torch.equal(OPS.least_squares_codes(*others), ours)
    assert OPS.least_squares_codes(w[:0], inverse).shape == (0, layers, k)
    assert (OPS.least_squares_codes(w[..., :0], inverse[..., :0]) == 0).all()


# N, L, D, K: ends of 32 samples, 64 values, 32 directions
@BOTH
@pytest.mark.parametrize(
    "n, layers, dim, k", [(1, 1, 1, 1), (5, 3, 59, 7), (33, 2, 65, 33), (32, 1, 64, 64), (3, 2, 130, 0)]
)
def test_edit_latents(library, n, layers, dim, k, dtype):
    codes, directions = normal(n, layers, k, dtype=dtype), normal(layers, dim, k, dtype=dtype)
    mask = torch.rand(2, layers, k, generator=torch.Generator().manual_seed(0)) < 0.5
    index = torch.arange(n) * 7 % 2
    for rows, chosen, masks in (
        (n, None, None),
        (1, None, mask[:1]),
        (2, index, None),
        (2, index, mask),
        (2, index, mask[:1]),
    ):
        e = normal(rows, layers, dim, dtype=dtype)
        ours = library.in_every_order(OPS.edit_latents, e, codes, directions, 1.7, masks, chosen)
        of_each = e if chosen is None else e[chosen]
        used = None if masks is None else masks if chosen is None or len(masks) == 1 else masks[chosen]
        expected = edit_latents_reference(of_each, codes if used is None else codes * used, directions, 1.7, None)
        torch.testing.assert_close(ours, expected, **TOLERANCE[dtype])
        others = zip(strided(e), strided(codes), strided(directions))
        assert all(torch.equal(OPS.edit_latents(*three, 1.7, masks, chosen), ours) for three in others)
    assert OPS.edit_latents(e, codes[:0], directions, 1.0, None, index[:0]).shape == (0, layers, dim)


def test_a_class_that_is_not_there_gives_nan(library):
    e, codes, directions = normal(2, 1, 4), normal(3, 1, 5), normal(1, 4, 5)
    found = OPS.edit_latents(e, codes, directions, 1.0, None, torch.tensor([0, 2, 1]))
    known = OPS.edit_latents(e, codes, directions, 1.0, None, torch.tensor([0, 0, 1]))
    assert found[1].isnan().all() and torch.equal(found[::2], known[::2])


# N, m, K: whole tiles of 32 samples and 64 columns and ends of both, sums of none, of part of a chunk of 16, and of many
@BOTH
@pytest.mark.parametrize(
    "n, m, k", [(1, 1, 1), (5, 17, 9), (33, 16, 65), (70, 50, 64), (4, 0, 3), (0, 5, 3), (3, 5, 0)]
)
def test_combine_rows(library, n, m, k, dtype):
    weights, table, centre = normal(n, m, dtype=dtype), normal(40, 80, dtype=dtype), normal(80, dtype=dtype)
    draw = torch.Generator().manual_seed(n + m)
    rows, columns = torch.randint(40, (m,), generator=draw), torch.randint(80, (k,), generator=draw)
    ours = library.in_every_order(OPS.combine_rows, weights, table, centre, rows, columns)
    expected = combine_rows_reference(weights, table, centre, rows, columns)
    torch.testing.assert_close(ours, expected, **TOLERANCE[dtype])
    if n > 3:
        assert torch.equal(OPS.combine_rows(weights[3:], table, centre, rows, columns), ours[3:])


def test_rows_and_columns_that_are_not_there_give_nan(library):
    weights, table, centre = normal(5, 3), normal(4, 6), normal(6)
    rows, columns = torch.tensor([0, 2, 3]), torch.tensor([1, 9, -1, 5])
    found = OPS.combine_rows(weights, table, centre, rows, columns)
    assert found[:, [1, 2]].isnan().all()
    known = combine_rows_reference(weights, table, centre, rows, columns[[0, 3]])
    torch.testing.assert_close(found[:, [0, 3]], known, **TOLERANCE[torch.float32])
    assert OPS.combine_rows(weights, table, centre, rows + 1, columns).isnan().all()
