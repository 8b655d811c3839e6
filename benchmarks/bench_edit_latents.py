"""edit_latents (Eq. 20) and combine_rows, its draw, at the sizes of the demo (32 px) and of the paper (1024 px).

Half of the K directions are masked. The floor is 2 N L D K / 2 operations. Rivals: the batched product over the layers,
with the mask folded into A or into the codes. Of several categories in one call (``class_index``), each with a mask of its own,
the rivals are a loop over the categories and a product with the mask in the codes. The draw reads 2000 rows of 1800 codes in
place; its rivals copy them first.
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
    e, codes, A, mask = arguments(compare.device, case, n, 1)
    rivals = {
        "mask in A": lambda: product(e, codes, A * mask[0].to(A.dtype).unsqueeze(1)),
        "mask in codes": lambda: product(e, torch.where(mask[0], codes, 0), A),
    }
    ours = lambda: edit_latents(e, codes, A, 2.0, mask[0])  # noqa: E731
    compare(f"{case}, {n} samples", ours, rivals, moved(e, codes, A, n), 2.0 * A.numel() * n / 2)


@pytest.mark.parametrize("n, classes", [(64, 8), (1024, 8), (1000, 100)])
@pytest.mark.parametrize("case", SIZES)
def test_edits_of_several_classes(compare, case, n, classes):
    e, codes, A, mask = arguments(compare.device, case, n, classes)
    each = n // classes
    index = torch.arange(classes, device=compare.device).repeat_interleave(each)

    def one_by_one(edit):
        return torch.cat([edit(base[None], some, own) for base, some, own in zip(e, codes.split(each), mask)])

    plain = lambda base, some, own: product(base, torch.where(own, some, 0), A)  # noqa: E731
    rivals = {
        "loop of products": lambda: one_by_one(plain),
        "one product": lambda: product(e[index], torch.where(mask[index], codes, 0), A),
        "ours, class by class": lambda: one_by_one(lambda base, some, own: edit_latents(base, some, A, 2.0, own)),
    }
    ours = lambda: edit_latents(e, codes, A, 2.0, mask, index)  # noqa: E731
    compare(f"{case}, {n} samples of {classes} classes", ours, rivals, moved(e, codes, A, n), 2.0 * A.numel() * n / 2)


def arguments(device, case, n, classes):
    """Embeddings [B, L, D], codes [N, L, K], directions [L, D, K] and masks [B, L, K] of half of them."""
    n_latent, dim, k = SIZES[case]
    sizes = ((classes, n_latent, dim), (n, n_latent, k), (n_latent, dim, k))
    e, codes, A = (torch.randn(size, device=device) for size in sizes)
    return e, codes, A / k, torch.rand(classes, n_latent, k, device=device).argsort(2) < k // 2


def moved(e, codes, A, n):
    return 4 * (e.numel() + codes.numel() + A.numel() + n * A.shape[0] * A.shape[1])


def product(e, codes, A):
    return torch.add(e, torch.bmm(codes.transpose(0, 1), A.mT).transpose(0, 1), alpha=2.0)


@pytest.mark.parametrize("n", [1, 64, 128])
def test_draw(compare, n):
    if compare.device.type != "cpu":
        pytest.skip("PyTorch's products run on a GPU")
    table, rows = torch.randn(11900, 1800), torch.arange(0, 11900, 6)[:1980]
    weights, columns, centre = torch.randn(n, len(rows)) / 45, torch.arange(0, 1800, 2), torch.zeros(1800)
    rivals = {
        "all columns": lambda: (weights @ (table[rows] - centre))[:, columns],
        "copied": lambda: weights @ (table[rows][:, columns] - centre[columns]),
    }
    compare(f"draw of {n}", lambda: combine_rows(weights, table, centre, rows, columns), rivals, 4 * len(rows) * 1800)
