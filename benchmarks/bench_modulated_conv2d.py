"""modulated_conv2d on the layers of 32, 64 and 256 px networks: plain, up and down; forward, and with gradients.

Ours shares one weight in the batch, as the best plain form does; on a CPU its 3 x 3 convolutions and filters are kernels. Rivals:
that form in PyTorch (activations scaled by the style, outputs demodulated), and the form that other implementations have, a
weight for each sample and a convolution in groups. Where layers are resampled, both filter by depthwise convolutions. FLOPs
are the direct algorithm's.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sage_fast.ops import modulated_conv2d

SIDE = torch.tensor([1.0, 3, 3, 1]) / 8
FIR = torch.outer(SIDE, SIDE)
#: channels in and out, side of the input, "plain", "up" or "down"
LAYERS = {
    "32s, 8 px, plain": (128, 128, 8, "plain"),
    "32s, 16 px, plain": (128, 128, 16, "plain"),
    "32s, 32 px, plain": (64, 64, 32, "plain"),
    "32s, 8 > 16 px, up": (128, 128, 8, "up"),
    "32s, 16 > 32 px, up": (128, 64, 16, "up"),
    "32s, 32 > 16 px, down": (64, 128, 32, "down"),
    "64s, 64 px, plain": (64, 64, 64, "plain"),
    "64s, 32 > 64 px, up": (128, 64, 32, "up"),
    "256p, 16 px, plain": (512, 512, 16, "plain"),
    "256p, 64 px, plain": (256, 256, 64, "plain"),
    "256p, 256 px, plain": (64, 64, 256, "plain"),
    "256p, 32 > 64 px, up": (512, 256, 32, "up"),
    "256p, 128 > 256 px, up": (128, 64, 128, "up"),
    "256p, 256 > 128 px, down": (64, 128, 256, "down"),
}
SAMPLES = {"32s": 16, "64s": 16, "256p": 4}
_MOST_WITH_GRADIENTS = 6e9  # FLOP forward on a CPU: the others take minutes
Form = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.mark.parametrize("case", LAYERS)
def test_forward(compare, case):
    c_in, c_out, side, kind = LAYERS[case]
    x, weight, style, fir = arguments(compare.device, case)
    with torch.no_grad():
        shared, grouped = shared_weight(kind, fir), own_weights(kind, fir)
        rivals = {"shared weight": lambda: shared(x, weight, style), "grouped": lambda: grouped(x, weight, style)}
        # the transforms round more than the direct sums of up to 4608 products
        compare.tolerance = 1e-4
        name = f"{case}, N {len(x)}"
        compare(name, lambda: ours(kind, fir)(x, weight, style), rivals, flops=flops(case, len(x)))


@pytest.mark.parametrize("case", LAYERS)
def test_gradient(compare, case):
    """Forward and backward, as training has it."""
    kind, n = LAYERS[case][3], SAMPLES[case.split(",")[0]]
    if compare.device.type == "cpu" and flops(case, n) > _MOST_WITH_GRADIENTS:
        pytest.skip("for a GPU")
    x, weight, style, fir = arguments(compare.device, case)
    inputs = [t.requires_grad_() for t in (x, weight, style)]
    forms = {"ours": ours(kind, fir), "shared weight": shared_weight(kind, fir), "grouped": own_weights(kind, fir)}
    grad = torch.randn_like(forms["ours"](*inputs))

    def both(form: Form) -> Callable[[], Tensor]:
        return lambda: torch.cat([g.flatten() for g in torch.autograd.grad(form(*inputs), inputs, grad)])

    calls = {name: both(form) for name, form in forms.items()}
    compare.tolerance, mine = 1e-4, calls.pop("ours")
    compare(f"{case}, N {n}, with gradients", mine, calls, flops=3 * flops(case, n))


def arguments(device: torch.device, case: str) -> list[Tensor]:
    c_in, c_out, side, _ = LAYERS[case]
    n = SAMPLES[case.split(",")[0]]
    x = torch.randn(n, c_in, side, side, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(c_out, c_in, 3, 3, device=device)
    return [x, weight, torch.randn(n, c_in, device=device) + 1, FIR.to(device)]


def flops(case: str, n: int) -> float:
    c_in, c_out, side, kind = LAYERS[case]
    return 2.0 * 9 * n * c_in * c_out * (side // 2 if kind == "down" else side) ** 2


def ours(kind: str, fir: Tensor) -> Form:
    options = {"plain": {}, "up": dict(up=2, resample_filter=fir), "down": dict(down=2, resample_filter=fir)}[kind]
    return lambda x, weight, style: modulated_conv2d(x, weight, style, **options)


def shared_weight(kind: str, fir: Tensor) -> Form:
    def form(x, weight, style):
        x = convolved(x * style[:, :, None, None], weight, kind, fir, 1)
        norm = style.square() @ weight.square().sum((2, 3)).t()
        return x * torch.rsqrt(norm + 1e-8)[:, :, None, None]

    return form


def own_weights(kind: str, fir: Tensor) -> Form:
    def form(x, weight, style):
        n = len(x)
        own = weight * style[:, None, :, None, None]
        own = own * torch.rsqrt(own.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        y = convolved(x.reshape(1, -1, *x.shape[2:]), own.flatten(0, 1), kind, fir, n)
        return y.reshape(n, -1, *y.shape[2:])

    return form


def convolved(x: Tensor, weight: Tensor, kind: str, fir: Tensor, groups: int) -> Tensor:
    """[1, groups C_in, H, W] with a weight [groups C_out, C_in, 3, 3]; resampled where the kind asks for it."""
    if kind == "up":
        c_out = len(weight) // groups
        turned = weight.view(groups, c_out, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
        return filtered(F.conv_transpose2d(x, turned, stride=2, groups=groups), 4 * fir, 1)
    if kind == "down":
        return F.conv2d(filtered(x, fir, 2), weight, stride=2, groups=groups)
    return F.conv2d(x, weight, padding=1, groups=groups)


def filtered(x: Tensor, fir: Tensor, padding: int) -> Tensor:
    c = x.shape[1]
    return F.conv2d(x, fir.expand(c, 1, 4, 4), padding=padding, groups=c)
