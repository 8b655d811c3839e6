"""project_onto_basis (Eq. 17) at the sizes of the demo (32 px) and of the paper (256 and 1024 px).

The floor is memory: the basis once, the latents once in and once out; 4 N L D R operations. Rivals: the two products as
einsum, as batched products, and with the projection matrix B B^T made beforehand.
"""

from __future__ import annotations

import pytest
import torch
from array_rivals import array_library

from sage_fast.ops import project_onto_basis

SIZES = {  # N, L, D, R
    "32 px, one novel category": (1, 8, 64, 10),
    "32 px, 64 latents, 5 columns": (64, 8, 64, 5),
    "32 px, 1024 latents": (1024, 8, 64, 10),
    "32 px, 200 seen categories": (200, 8, 64, 10),
    "256 px, one novel category": (1, 14, 512, 10),
    "256 px, 119 seen categories": (119, 14, 512, 10),
    "1024 px, one novel category": (1, 18, 512, 10),
    "1024 px, 64 latents": (64, 18, 512, 10),
    "1024 px, 1024 latents": (1024, 18, 512, 10),
    "1024 px, one novel category, 40 columns": (1, 18, 512, 40),
    "1024 px, 119 seen categories, 40 columns": (119, 18, 512, 40),
}


@pytest.mark.parametrize("case", SIZES)
def test_projection(compare, case):
    n, n_latent, dim, r = SIZES[case]
    w_plus = torch.randn(n, n_latent, dim, device=compare.device)
    basis = torch.linalg.qr(torch.randn(n_latent, dim, r))[0].contiguous().to(compare.device)
    matrix = basis @ basis.mT
    rivals = {
        "einsum": lambda: torch.einsum("ldr,nlr->nld", basis, torch.einsum("ldr,nld->nlr", basis, w_plus)),
        "bmm": lambda: torch.bmm(torch.bmm(w_plus.transpose(0, 1), basis), basis.mT).transpose(0, 1),
        "B B^T made before": lambda: torch.bmm(w_plus.transpose(0, 1), matrix).transpose(0, 1),
    }
    if arrays := array_library(compare.device):
        w, b = arrays.of(w_plus), arrays.of(basis)
        products = lambda: ((w.swapaxes(0, 1) @ b) @ b.swapaxes(1, 2)).swapaxes(0, 1)  # noqa: E731
        rivals[arrays.name] = lambda: torch.from_dlpack(products())
    compare(case, lambda: project_onto_basis(w_plus, basis), rivals, 4 * (2 * w_plus.numel() + basis.numel()))


@pytest.mark.parametrize("case", SIZES)
def test_projection_of_arrays(compare, case):
    """The same on arrays of the device's array library, whose products are the rival; both sides hand over a tensor for parity."""
    arrays = array_library(compare.device)
    if arrays is None:
        pytest.skip("no array library for this device")
    n, n_latent, dim, r = SIZES[case]
    w = arrays.of(torch.randn(n, n_latent, dim, device=compare.device))
    b = arrays.of(torch.linalg.qr(torch.randn(n_latent, dim, r))[0].contiguous().to(compare.device))
    products = lambda: ((w.swapaxes(0, 1) @ b) @ b.swapaxes(1, 2)).swapaxes(0, 1)  # noqa: E731
    rivals = {arrays.name: lambda: torch.from_dlpack(products())}
    ours = lambda: torch.from_dlpack(project_onto_basis(w, b))  # noqa: E731
    compare(f"{case}, arrays", ours, rivals, 4 * (2 * w.size + b.size))
