"""least_squares_codes (Eq. 18) at the sizes of the demo (32 px) and of the paper (256 and 1024 px).

The floor is memory for one latent (the pseudo-inverse once), else arithmetic: 2 N L D K operations. Rivals: einsum, and
batched products with the latents or with the pseudo-inverse on the left.
"""

from __future__ import annotations

import pytest
import torch
from array_rivals import array_library

from sage_fast.ops import least_squares_codes

SIZES = {  # N, L, D, K
    "32 px, one latent": (1, 8, 64, 16),
    "32 px, 64 latents": (64, 8, 64, 16),
    "32 px, 1024 latents": (1024, 8, 64, 16),
    "256 px, 119 seen categories": (119, 14, 512, 100),
    "1024 px, one latent": (1, 18, 512, 100),
    "1024 px, 64 latents": (64, 18, 512, 100),
    "1024 px, 1024 latents": (1024, 18, 512, 100),
}


@pytest.mark.parametrize("case", SIZES)
def test_codes(compare, case):
    n, n_latent, dim, k = SIZES[case]
    delta_w = torch.randn(n, n_latent, dim, device=compare.device)
    inverse = torch.linalg.pinv(torch.randn(n_latent, dim, k)).to(compare.device)
    rivals = {
        "einsum": lambda: torch.einsum("nld,lkd->nlk", delta_w, inverse),
        "bmm": lambda: torch.bmm(delta_w.transpose(0, 1), inverse.mT).transpose(0, 1),
        "bmm of A+": lambda: torch.bmm(inverse, delta_w.permute(1, 2, 0)).permute(2, 0, 1),
    }
    if arrays := array_library(compare.device):
        w, a = arrays.of(delta_w), arrays.of(inverse)
        product = lambda: (w.swapaxes(0, 1) @ a.swapaxes(1, 2)).swapaxes(0, 1)  # noqa: E731
        rivals[arrays.name] = lambda: torch.from_dlpack(product())
    flops = 2.0 * n * n_latent * dim * k
    moved = 4 * (delta_w.numel() + inverse.numel() + n * n_latent * k)
    compare(case, lambda: least_squares_codes(delta_w, inverse), rivals, moved, flops)
