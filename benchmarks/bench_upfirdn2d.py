"""upfirdn2d on the layers of 32 px and 256 px StyleGAN2 networks, in float32 and bfloat16, channels first and last.

The floor is memory: each pixel is read once and written once; sixteen taps a pixel (eight, separated) are little work.
Rivals: depthwise convolutions of PyTorch in both layouts, separated in rows and columns, transposed for upsampling.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sage_fast.ops import upfirdn2d

SIDE = torch.tensor([1.0, 3, 3, 1]) / 8
FIR = torch.outer(SIDE, SIDE)

BLURS = {  # behind an up-convolution (pad 1, gain 4) or in front of a down-convolution (pad 2)
    "32 px generator 4->8, N 16": (16, 128, 9, 1),
    "32 px generator 8->16, N 16": (16, 64, 17, 1),
    "32 px generator 16->32, N 16": (16, 32, 33, 1),
    "32 px generator 16->32, N 1": (1, 32, 33, 1),
    "32 px discriminator 32->16, N 16": (16, 32, 32, 2),
    "256 px generator 8->16, N 1": (1, 512, 17, 1),
    "256 px generator 32->64, N 1": (1, 512, 65, 1),
    "256 px generator 128->256, N 1": (1, 128, 257, 1),
    "256 px discriminator 256->128, N 4": (4, 128, 256, 2),
}
UPSAMPLINGS = {"32 px image 16->32, N 16": (16, 3, 16), "256 px image 128->256, N 4": (4, 3, 128)}
DOWNSAMPLINGS = {
    "32 px skip 32->16, N 16": (16, 32, 32),
    "32 px skip 16->8, N 16": (16, 64, 16),
    "32 px skip 8->4, N 16": (16, 128, 8),
    "256 px skip 256->128, N 4": (4, 128, 256),
}
FORMS = [(dtype, layout) for dtype in ("float32", "bfloat16") for layout in ("first", "last")]
forms = pytest.mark.parametrize("dtype, layout", FORMS)


def moved(x: torch.Tensor, out: int) -> int:
    return x.element_size() * (x.numel() + x.shape[0] * x.shape[1] * out * out)


def images(compare, dtype: str, layout: str, *shape: int) -> torch.Tensor:
    """Random images in that form; bfloat16 rounds, so its parity is coarser."""
    compare.tolerance = 2e-5 if dtype == "float32" else 2e-2
    form = torch.contiguous_format if layout == "first" else torch.channels_last
    return torch.randn(shape, device=compare.device).to(getattr(torch, dtype)).to(memory_format=form)


@forms
@pytest.mark.parametrize("case", BLURS)
def test_blur(compare, case, dtype, layout):
    n, c, size, pad = BLURS[case]
    x, gain = images(compare, dtype, layout, n, c, size, size), 4.0 if pad == 1 else 1.0
    side, fir = SIDE.to(x.device) * math.sqrt(gain), FIR.to(x.device)
    depthwise, one = (fir * gain).expand(c, 1, 4, 4).contiguous().to(x), (fir * gain)[None, None]
    row, column = side.view(1, 1, 1, 4), side.view(1, 1, 4, 1)

    def separated():
        y = F.conv2d(x.view(n * c, 1, size, size), row, padding=(0, pad))
        return F.conv2d(y, column, padding=(pad, 0)).view(n, c, *[size + 2 * pad - 3] * 2)

    rivals = {"depthwise": lambda: F.conv2d(x, depthwise, padding=pad, groups=c)}
    if (dtype, layout) == FORMS[0] and x.numel() < 5e6:  # far behind elsewhere too, and slow to wait for
        rivals["one channel"] = lambda: F.conv2d(x.view(n * c, 1, size, size), one, padding=pad).view(
            n, c, *[size + 2 * pad - 3] * 2
        )
        rivals["separated"] = separated
    if (dtype, layout) == FORMS[0] and x.is_cpu:
        rivals |= others(x, pad, gain)
    ours = lambda: upfirdn2d(x, fir, padding=pad, gain=gain)  # noqa: E731
    compare(f"blur, {case}, {dtype}, {layout}", ours, rivals, moved(x, size + 2 * pad - 3))


def others(x: torch.Tensor, pad: int, gain: float) -> dict:
    """OpenCV, where it is installed: one image after the other."""
    try:
        import cv2
    except ImportError:
        return {}
    cv2.setNumThreads(torch.get_num_threads())
    planes, side = x.numpy().reshape(-1, *x.shape[2:]), SIDE.numpy() * np.sqrt(gain, dtype=np.float32)

    def opencv():
        wide = [cv2.copyMakeBorder(p, pad, pad, pad, pad, cv2.BORDER_CONSTANT) for p in planes]
        y = np.stack([cv2.sepFilter2D(p, -1, side, side, anchor=(0, 0))[:-3, :-3] for p in wide])
        return torch.from_numpy(y).view(*x.shape[:2], *y.shape[1:])

    return {"OpenCV": opencv}


@forms
@pytest.mark.parametrize("case", UPSAMPLINGS)
def test_upsampling(compare, case, dtype, layout):
    n, c, size = UPSAMPLINGS[case]
    x = images(compare, dtype, layout, n, c, size, size)
    fir = FIR.to(x.device)
    depthwise = (4 * fir).expand(c, 1, 4, 4).contiguous().to(x)
    rivals = {"depthwise transposed": lambda: F.conv_transpose2d(x, depthwise, stride=2, padding=1, groups=c)}
    ours = lambda: upfirdn2d(x, fir, up=2, padding=(2, 1, 2, 1), gain=4.0)  # noqa: E731
    compare(f"up 2, {case}, {dtype}, {layout}", ours, rivals, moved(x, 2 * size))


@forms
@pytest.mark.parametrize("case", DOWNSAMPLINGS)
def test_downsampling(compare, case, dtype, layout):
    n, c, size = DOWNSAMPLINGS[case]
    x = images(compare, dtype, layout, n, c, size, size)
    fir = FIR.to(x.device)
    depthwise = fir.expand(c, 1, 4, 4).contiguous().to(x)
    rivals = {"depthwise": lambda: F.conv2d(x, depthwise, stride=2, padding=1, groups=c)}
    ours = lambda: upfirdn2d(x, fir, down=2, padding=1)  # noqa: E731
    compare(f"down 2, {case}, {dtype}, {layout}", ours, rivals, moved(x, size // 2))


@pytest.mark.parametrize("case", ["32 px discriminator 32->16, N 16", "256 px generator 32->64, N 1"])
def test_gradient(compare, case):
    """Forward and backward, as training has it."""
    n, c, size, pad = BLURS[case]
    x, fir = torch.randn(n, c, size, size, device=compare.device, requires_grad=True), FIR.to(compare.device)
    depthwise = fir.expand(c, 1, 4, 4).contiguous()
    grad = torch.randn(n, c, *[size + 2 * pad - 3] * 2, device=compare.device)
    rival = lambda: torch.autograd.grad(F.conv2d(x, depthwise, padding=pad, groups=c), x, grad)[0]  # noqa: E731
    ours = lambda: torch.autograd.grad(upfirdn2d(x, fir, padding=pad), x, grad)[0]  # noqa: E731
    compare(f"blur and gradient, {case}", ours, {"depthwise": rival})
