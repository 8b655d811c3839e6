"""Arguments of the epilogues of the CUDA synthesis, for their tests on a GPU, thread by thread and on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from sage_fast.ops.synthesis_epilogue import blur_epilogue, blur_epilogue_reference

RULES = {"plain": (0.2, 2**0.5, -1.0), "clamped": (0.0, 1.5, 0.4)}  # slope, gain, clamp


def numbers(
    shape: tuple[int, ...], margin: int, noise: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Tensor | None]:
    """``shape``: n, h, w, c, pitch of the rows, image channels; ``margin``: how much longer the sides of x are than those of y."""
    n, h, w, c, pitch, channels = shape
    rng = torch.Generator().manual_seed(n + c)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng).to(device)

    return dict(
        x=draw(n, h + margin, w + margin, c).to(dtype),
        factor=draw(n, pitch).abs() + 0.1,
        bias=draw(c),
        noise=None if noise == "none" else draw(1 if noise == "shared" else n, 1, h, w),
        next_style=draw(n, pitch),
        image_weight=draw(n, channels, pitch) / c**0.5,
        image_bias=draw(channels),
        skip=draw(n, channels, h // 2, w // 2),
    )


def call(epilogue, t: dict, rule: tuple[float, ...], strength: float = 0.3, **changed):
    t = {**t, **changed}
    common = (t["x"], t["factor"], t["bias"], t["noise"], strength, t["next_style"])
    if epilogue in (blur_epilogue, blur_epilogue_reference):
        return epilogue(*common, *rule)
    return epilogue(*common, t["image_weight"], t["image_bias"], t["skip"], *rule)
