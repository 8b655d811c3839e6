"""edit_latents (Eq. 20) and combine_rows, its draw, at the sizes of the demo (32 px) and of the paper (1024 px).

Half of the K directions are masked. The floor is 2 N L D K / 2 operations. Rivals: the batched product over the layers,
with the mask folded into A or into the codes. The draw reads 2000 rows of 1800 codes in place; its rivals copy them first.
"""

from __future__ import annotations

import pytest
import torch

from sage_fast.ops import combine_rows, edit_latents

SIZES = {"32 px": (8, 64, 16), "1024 px": (18, 512, 100)}  # L, D, K


@pytest.mark.parametrize("n", [1, 64, 128, 1024])
@pytest.mark.parametrize("case", SIZES)
def test_edit(compare, case, n):
    n_latent, dim, k = SIZES[case]
    e, codes, A = torch.randn(1, n_latent, dim), torch.randn(n, n_latent, k), torch.randn(n_latent, dim, k) / k
    mask = torch.rand(n_latent, k).argsort(1) < k // 2

    def product(codes, A):
        return torch.add(e, torch.bmm(codes.transpose(0, 1), A.mT).transpose(0, 1), alpha=2.0)

    rivals = {
        "mask in A": lambda: product(codes, A * mask.to(A.dtype).unsqueeze(1)),
        "mask in codes": lambda: product(torch.where(mask, codes, 0), A),
    }
    compare(f"{case}, {n} samples", lambda: edit_latents(e, codes, A, 2.0, mask), rivals, 4 * n * n_latent * dim)


@pytest.mark.parametrize("n", [1, 64, 128])
def test_draw(compare, n):
    table, rows = torch.randn(11900, 1800), torch.arange(0, 11900, 6)[:1980]
    weights, columns, centre = torch.randn(n, len(rows)) / 45, torch.arange(0, 1800, 2), torch.zeros(1800)
    rivals = {
        "all columns": lambda: (weights @ (table[rows] - centre))[:, columns],
        "copied": lambda: weights @ (table[rows][:, columns] - centre[columns]),
    }
    compare(f"draw of {n}", lambda: combine_rows(weights, table, centre, rows, columns), rivals, 4 * len(rows) * 1800)
