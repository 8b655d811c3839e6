"""One or two small cases of every CUDA kernel: what compute-sanitizer watches on a card (``benchmarks/gpu.sh``).

Here the cases run on the kernels of this machine, on a card on the CUDA ones and, with ``SAGE_FAST_CUDA_ON_HOST=1``, on the CUDA
ones as compiled for the host. Sizes are odd where a kernel takes odd ones.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import kernels_on_host
import pytest
import torch
from torch import Tensor

from sage_fast import ops
from sage_fast.models.inference import fused_network
from sage_fast.models.stylegan2 import Generator
from sage_fast.ops import bias_act, upfirdn2d
from sage_fast.ops.bias_act import bias_act_reference
from sage_fast.ops.counter_normal import counter_normal, counter_normal_reference
from sage_fast.ops.scaled_bias_act import scaled_bias_act, scaled_bias_act_reference
from sage_fast.ops.styled_conv import composed_weight, styled_conv, styled_conv_reference
from sage_fast.ops.synthesis import synthesis_reference
from sage_fast.ops.synthesis_epilogue import (
    blur_epilogue,
    blur_epilogue_reference,
    styled_epilogue,
    styled_epilogue_reference,
)
from sage_fast.ops.upfirdn2d import upfirdn2d_reference

ROOT = Path(__file__).parents[2]
Pair = tuple[Tensor | Sequence[Tensor], Tensor | Sequence[Tensor]]
RULE = (0.2, 2**0.5, 1.5)  # slope, gain, clamp


def normal(device: str, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size))).to(device)


def both(name: str, *arguments, **options) -> Pair:
    """An op of ``sage_fast.ops`` and its reference."""
    return getattr(ops, name)(*arguments, **options), getattr(ops, f"{name}_reference")(*arguments, **options)


def resampled(device: str, side: int, c: int, last: bool = False, size: int = 4, **options) -> Pair:
    x, f = normal(device, 2, c, side, side + 2), normal(device, size, 4)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    return upfirdn2d(x, f, padding=2, **options), upfirdn2d_reference(x, f, padding=2, **options)


def activated(device: str, act: str, *size: int) -> Pair:
    x, b = normal(device, *size), normal(device, size[1])
    return bias_act(x, b, act=act, clamp=0.9), bias_act_reference(x, b, act=act, clamp=0.9)


def gradient(device: str, act: str, *size: int) -> Pair:
    x, b, grad = normal(device, *size), normal(device, size[1]) * 0, normal(device, *size) + 1
    results = []
    for op in (bias_act, bias_act_reference):
        leaf = x.clone().requires_grad_()
        results.append(torch.autograd.grad(op(leaf, b, act=act, clamp=0.9), leaf, grad)[0])
    return results[0], results[1]


def scaled(device: str, c: int, backward: bool = False, plain: bool = False) -> Pair:
    """``plain``: without scale and noise."""
    x, grad = normal(device, 3, c, 5, 7), normal(device, 3, c, 5, 7) + 1
    t = [normal(device, 3, c), normal(device, 3, 1, 5, 7), normal(device, 1), normal(device, c)]
    t = [None, None, None, t[3]] if plain else t
    results: list[Tensor | list[Tensor]] = []
    for op in (scaled_bias_act, scaled_bias_act_reference):
        leaves = [None if s is None else s.clone().requires_grad_(s.ndim < 4 or s is x) for s in (x, *t)]
        y = op(*leaves, clamp=1.5)
        learned = [s for s in leaves if s is not None and s.requires_grad]
        results.append(list(torch.autograd.grad(y, learned, grad)) if backward else y.detach())
    return results[0], results[1]


def fused(device: str, name: str, sources: int, *settings, size=(21, 34), channels: int = 3) -> Pair:
    return both(name, *(normal(device, n, channels, *size) for n in (sources, sources, 3)), *settings)


def epilogue(device: str, k: int) -> Pair:
    n, h, w, c = 2, 6, 10, 24
    t = [normal(device, n, h, w, c), normal(device, n, 40), normal(device, c), normal(device, n, 1, h, w), 0.3]
    t += [normal(device, n, 40), normal(device, n, k, 40), normal(device, k), normal(device, n, k, h // 2, w // 2)]
    return styled_epilogue(*t, *RULE), styled_epilogue_reference(*t, *RULE)


def blurred(device: str) -> Pair:
    n, h, w, c = 2, 6, 10, 24
    t = [normal(device, n, h + 1, w + 1, c), normal(device, n, 40), normal(device, c), normal(device, 1, 1, h, w), 0.3]
    t.append(normal(device, n, 40))
    return blur_epilogue(*t, *RULE), blur_epilogue_reference(*t, *RULE)


def convolved(device: str, c_in: int, c_out: int, up: bool = False, image: bool = True) -> Pair:
    """In bfloat16, whose products on the host and on a card are exact in float32."""
    n, h, w, k = 2, 6, 10, 3
    size = (2 * h, 2 * w) if up else (h, w)
    x = normal(device, n, h, w, c_in).bfloat16()
    weight = composed_weight(normal(device, c_out, c_in, 3, 3) / (3 * c_in**0.5), up, x.dtype)
    t = [normal(device, n, c_out), normal(device, c_out), normal(device, 1, 1, *size), 0.3, normal(device, n, c_out)]
    t += [normal(device, n, k, c_out) / c_out**0.5, normal(device, k)] if image else [None, None]
    t.append(normal(device, n, k, size[0] // 2, size[1] // 2) if image else None)
    return styled_conv(x, weight, *t, up, *RULE), styled_conv_reference(x, weight, *t, up, *RULE)


def synthesized(device: str) -> Pair:
    torch.manual_seed(0)
    G = Generator(16, 12, 1, channels=[24, 16, 8]).eval().requires_grad_(False).to(device)
    w_plus = normal(device, 3, G.n_latent, 12)
    noise = [getattr(G.noises, f"noise_{i}") for i in range(G.n_latent - 1)]
    return G.synthesis(w_plus), synthesis_reference(fused_network(G), w_plus, noise)


def projected(device: str, dim: int) -> Pair:
    """By the op itself: on a GPU the sizes of some would choose two products."""
    arguments = normal(device, 5, 3, dim), normal(device, 3, dim, 7) / 6
    return torch.ops.sage_fast.project_onto_basis(*arguments), ops.project_onto_basis_reference(*arguments)


def solved(device: str) -> Pair:
    return both("least_squares_codes", normal(device, 5, 3, 37), normal(device, 3, 7, 37) / 6)


def combined(device: str) -> Pair:
    rows, columns = torch.arange(0, 36, 2, device=device), torch.arange(70, 0, -1, device=device)
    t = normal(device, 35, 18), normal(device, 37, 71), normal(device, 71)
    return both("combine_rows", *t, rows, columns)


def edited(device: str, classes: int) -> Pair:
    index = torch.arange(9, device=device) % classes
    mask = normal(device, classes, 3, 19) > 0
    t = (normal(device, classes, 3, 35), normal(device, 9, 3, 19), normal(device, 3, 35, 19) / 5)
    return both("edit_latents", *t, 1.5, mask, index)


def numbered(device: str) -> Pair:
    arguments = (torch.arange(5, device=device) * 2**33, 3, 1, 203)
    return counter_normal(*arguments), counter_normal_reference(*arguments)


#: file.kernel, then which case of it
CASES: dict[str, Callable[[str], Pair]] = {
    "upfirdn2d.tiles, up": lambda d: resampled(d, 35, 2, up=2),
    "upfirdn2d.tiles, down": lambda d: resampled(d, 35, 2, down=2),
    "upfirdn2d.tiles, blur": lambda d: resampled(d, 35, 2),
    "upfirdn2d.columns, blur": lambda d: resampled(d, 330 if d == "cuda" else 9, 16, last=True),
    "upfirdn2d.columns, down": lambda d: resampled(d, 660 if d == "cuda" else 17, 16, last=True, down=2),
    "upfirdn2d.columns, few, blur": lambda d: resampled(d, 3, 4, last=True),
    "upfirdn2d.columns, few, down": lambda d: resampled(d, 5, 4, last=True, down=2),
    "upfirdn2d.any, packed": lambda d: resampled(d, 9, 16, last=True, up=2),
    "upfirdn2d.any": lambda d: resampled(d, 9, 3, size=3, up=3, down=2),
    "bias_act.forward, packed": lambda d: activated(d, "lrelu", 2, 8, 4, 4),
    "bias_act.forward": lambda d: activated(d, "swish", 2, 5, 7, 3),
    "bias_act.backward, packed": lambda d: gradient(d, "lrelu", 2, 8, 4, 4),
    "bias_act.backward": lambda d: gradient(d, "swish", 2, 5, 7, 3),
    "scaled_bias_act.forward, packed": lambda d: scaled(d, 24),
    "scaled_bias_act.forward": lambda d: scaled(d, 5, plain=True),
    "scaled_bias_act.backward, packed": lambda d: scaled(d, 24, True),
    "scaled_bias_act.backward, packed, plain": lambda d: scaled(d, 24, True, True),
    "scaled_bias_act.backward": lambda d: scaled(d, 5, True),
    "scaled_bias_act.backward, plain": lambda d: scaled(d, 5, True, True),
    "scaled_bias_act.join": lambda d: scaled(d, 1100, True),
    "low_pass.rows": lambda d: both("gaussian_low_pass", normal(d, 2, 3, 37, 50), 5.0),
    "low_pass.rows, packed": lambda d: both("gaussian_low_pass", normal(d, 1, 3, 150, 132), 3.0),
    "low_pass.rows, change": lambda d: fused(d, "fuse_frequencies", 3, 0.7, 0.8),
    "low_pass.rows, one source": lambda d: fused(d, "fuse_frequencies", 1, 1.0, 0.8),
    "low_pass.columns": lambda d: both("gaussian_low_pass", normal(d, 1, 3, 37, 50), 3.0, "reflect", "pixels"),
    "fuse_pixels.run": lambda d: fused(d, "fuse_pixels", 3),
    "fuse_pixels.run, packed": lambda d: fused(d, "fuse_pixels", 1, size=(21, 132)),
    "fuse_pixels.run, one channel": lambda d: fused(d, "fuse_pixels", 1, size=(21, 36), channels=1),
    "fuse_pixels.run, after the frequencies": lambda d: fused(
        d, "fuse_pixels", 1, 0.5, "convex", normal(d, 1, 3, 21, 34)
    ),
    "project_onto_basis.any": lambda d: projected(d, 37),
    "project_onto_basis.packed": lambda d: projected(d, 36),
    "project_onto_basis.packed, four packs": lambda d: projected(d, 260),
    "project_onto_basis.packed, eight packs": lambda d: projected(d, 516),
    "least_squares_codes.run": solved,
    "combine_rows.run": combined,
    "edit_latents.run": lambda d: edited(d, 1),
    "edit_latents.run, classes": lambda d: edited(d, 3),
    "counter_normal.run": numbered,
    "synthesis.styled": lambda d: epilogue(d, 3),
    "synthesis.styled, four channels": lambda d: epilogue(d, 4),
    "synthesis.blurred": blurred,
    "synthesis.blurred, whole": synthesized,
    "styled_conv.convolve_tiles": lambda d: convolved(d, 8, 24, image=False),
    "styled_conv.convolve_tiles, up": lambda d: convolved(d, 16, 40, up=True),
    "styled_conv.join_splits": lambda d: convolved(d, 128, 64),
    "styled_conv.join_image": lambda d: convolved(d, 32, 136),
}


@pytest.mark.parametrize("case", CASES)
def test_small_odd_case(device, case, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for ours, expected in zip(*map(torch.utils._pytree.tree_leaves, CASES[case](device))):
        tolerance = 1e-2 if ours.dtype == torch.bfloat16 else 2e-4 if case.startswith("synthesis") else 2e-5
        scale = max(1.0, expected.abs().max().item() if expected.numel() else 1.0)
        torch.testing.assert_close(ours, expected, atol=tolerance * scale, rtol=tolerance)


def test_every_kernel_has_a_case():
    kernels = set()
    for path in (ROOT / "csrc" / "cuda").glob("*.cu*"):
        names = re.findall(r"__global__ void (?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(", path.read_text())
        assert len(names) == path.read_text().count("__global__"), f"a kernel of {path.name} has another form"
        kernels |= {f"{path.stem}.{name}" for name in names}
    assert kernels == {case.split(",")[0] for case in CASES}


def test_the_cases_reach_every_launch():
    """In a process of its own, whose kernels nothing else has launched."""
    kernels_on_host.load()
    program = (
        "import json, kernels_on_host, test_every_kernel as cases\n"
        "library = kernels_on_host.load()\n"
        "with kernels_on_host.routed():\n"
        "    for case in cases.CASES.values():\n"
        "        case('cpu')\n"
        "print(json.dumps(sorted(kernels_on_host.launches() - library.launched())))\n"
    )
    folders = [str(Path(__file__).parent), str(ROOT / "python_tests"), str(ROOT)]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {folders}\n{program}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # counter_normal goes to its kernel for numbers on a GPU alone
    missed = json.loads(done.stdout.splitlines()[-1])
    assert [line for line in missed if not line.startswith("counter_normal.cu")] == []
