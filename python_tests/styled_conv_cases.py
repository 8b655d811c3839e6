"""Arguments of ``styled_conv`` and what its results may differ by, for its tests on a GPU and on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from sage_fast.ops.styled_conv import composed_weight, styled_conv_reference

#: N, H, W, C_in, C_out, image channels: samples that share a tile, and are one too few for it; rectangles that stand over; channels
#: that fill no chunk and no block
SHAPES = [(3, 4, 4, 24, 40, 3), (9, 4, 4, 8, 16, 4), (3, 8, 8, 40, 24, 1), (1, 6, 18, 72, 16, 3), (2, 16, 16, 8, 72, 2)]
RULES = {"plain": (0.2, 2**0.5, -1.0), "clamped": (0.0, 1.5, 0.7)}  # slope, gain, clamp
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def arguments(shape, up: bool, dtype: torch.dtype, rule="plain", noise="each", device="cpu", **changed) -> dict:
    n, h, w, c_in, c_out, channels = shape
    rng = torch.Generator().manual_seed(sum(shape))

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng).to(device)

    s, pitch = 2 if up else 1, c_out + 8
    found = dict(
        x=draw(n, h, w, c_in).to(dtype),
        weight=composed_weight(draw(c_out, c_in, 3, 3) / (3 * c_in**0.5), up, dtype),
        factor=draw(n, pitch).abs() + 0.1,
        bias=draw(c_out),
        noise=None if noise == "none" else draw(1 if noise == "shared" else n, 1, s * h, s * w),
        strength=0.3,
        next_style=draw(n, pitch),
        image_weight=draw(n, channels, pitch) / c_out**0.5,
        image_bias=draw(channels),
        skip=draw(n, channels, s * h // 2, s * w // 2),
        up=up,
    )
    return found | dict(zip(("slope", "gain", "clamp"), RULES[rule])) | changed


def exact(t: dict) -> dict:
    """The same with operands as the products see them: what is left is the order of float32 sums, and the last rounding."""
    if t["x"].dtype != torch.float32:
        return t
    return t | dict(x=((t["x"].view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32))


def compare(ours: tuple[Tensor, Tensor], t: dict) -> None:
    """Asserts that ``ours`` is the reference's but for roundings: K sums in float32 lose at most K u of the sum of magnitudes."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        plain = styled_conv_reference(**exact(t))
    c_in, c_out, dtype = t["x"].shape[-1], len(t["bias"]), t["x"].dtype
    magnitudes = {k: v.abs().float() if isinstance(v, Tensor) else v for k, v in t.items()}
    most = styled_conv_reference(**magnitudes | dict(slope=1.0, clamp=-1.0))
    unit = torch.finfo(torch.float32).eps
    last = torch.finfo(dtype).eps * plain[0].float().abs() + torch.finfo(dtype).tiny
    allowed = (2 * 9 * c_in + 8) * unit * most[0] + last, 2 * (9 * c_in + c_out + 8) * unit * most[1]
    for x, expected, bound in zip(ours, plain, allowed):
        assert x.dtype == expected.dtype and x.shape == expected.shape
        assert ((x.float() - expected.float()).abs() <= bound).all()


def bad_inputs(t: dict) -> list[tuple[dict, str]]:
    """Changes to the arguments that the kernel refuses, and what it says."""
    return [
        (dict(x=t["x"].double()), "weight must be contiguous"),
        (dict(x=t["x"].transpose(1, 2)), "x must be contiguous"),
        (dict(weight=t["weight"][..., :16].contiguous()), "weight must be contiguous"),
        (dict(up=True), "weight must be contiguous"),
        (dict(bias=t["bias"][:8]), "contiguous float32 of x's sizes"),
        (dict(image_weight=None), "come together"),
        (dict(image_weight=None, image_bias=None), "skip with them alone"),
        (dict(skip=t["skip"][:1]), "contiguous float32 of the image's sizes"),
        (dict(columns=48), "columns must be"),
    ]
