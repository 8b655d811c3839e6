"""The epilogues of the CUDA synthesis against plain PyTorch, on a GPU; on the host: cuda_on_host/test_synthesis.py."""

from __future__ import annotations

import pytest
import torch
from epilogue_cases import RULES, call, numbers

from sage_fast.ops.synthesis_epilogue import (
    blur_epilogue,
    blur_epilogue_reference,
    styled_epilogue,
    styled_epilogue_reference,
)

# n, h, w, c, pitch of the rows, image channels
SHAPES = [
    (1, 4, 4, 8, 8, 3),
    (3, 8, 6, 24, 40, 1),
    (2, 10, 34, 16, 16, 4),
    (1, 64, 64, 512, 512, 3),
    (2, 4, 2, 520, 1024, 2),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("noise", ["none", "shared", "each"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"odd {s}")
def test_kernels_against_reference(device, shape, noise, dtype):
    """What differs is the order of sums, and one rounding of the result."""
    tolerance = dict(atol=3e-5, rtol=3e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)
    for rule in RULES.values():
        t = numbers(shape, 0, noise, device=device)
        t["x"] = t["x"].to(dtype)
        for changed in ({}, {"next_style": None}, {"skip": None}):
            for ours, plain in zip(
                *(call(f, t, rule, **changed) for f in (styled_epilogue, styled_epilogue_reference))
            ):
                assert ours.dtype == plain.dtype
                torch.testing.assert_close(ours, plain, **tolerance)
        t = numbers(shape, 1, noise, device=device)
        t["x"] = t["x"].to(dtype)
        torch.testing.assert_close(*(call(f, t, rule) for f in (blur_epilogue, blur_epilogue_reference)), **tolerance)


def test_nothing_is_read_or_lost_between_samples(device):
    """More rounds than one for every block, and samples that are not a number beside clean ones."""
    t = numbers((130, 32, 32, 24, 24, 3), 0, "each", device=device)
    clean = call(styled_epilogue, t, RULES["plain"])
    t["x"][1::2] = float("nan")
    y, image = call(styled_epilogue, t, RULES["plain"])
    assert torch.equal(y[::2], clean[0][::2]) and torch.equal(image[::2], clean[1][::2])
    assert y[1::2].isnan().all() and image[1::2].isnan().all()


def test_fake_kernels(device):
    if device == "cpu":
        pytest.skip("the epilogues have kernels on CUDA alone")
    t = numbers(SHAPES[1], 0, "each", device=device)
    rule = RULES["plain"]
    common = (t["factor"], t["bias"], t["noise"], 0.3, t["next_style"])
    ops, utils = torch.ops.sage_fast, ("test_schema", "test_faketensor")
    images = (t["image_weight"], t["image_bias"], t["skip"])
    torch.library.opcheck(ops.styled_epilogue, (t["x"], *common, *images, *rule), test_utils=utils)
    wide = numbers(SHAPES[1], 1, "each", device=device)["x"]
    torch.library.opcheck(ops.blur_epilogue, (wide, *common, *rule), test_utils=utils)


def test_bad_input_to_the_kernels(device):
    if device == "cpu":
        pytest.skip("the epilogues have kernels on CUDA alone")
    t = numbers(SHAPES[1], 0, "each", device=device)
    for changed, message in [
        ({"x": t["x"][..., :7].contiguous()}, "channels must fill vectors"),
        ({"x": t["x"].double()}, "float32, float16 and bfloat16"),
        ({"factor": t["factor"][:, :8].contiguous()}, "factor must be"),
        ({"bias": t["bias"][:8]}, "contiguous float32 of x's sizes"),
        ({"skip": t["skip"][:1]}, "contiguous float32 of the image's sizes"),
        ({"noise": t["noise"][..., :2]}, "contiguous float32 of x's sizes"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(styled_epilogue, t, RULES["plain"], **changed)
    with pytest.raises(ValueError, match="2 H \\+ 1"):
        call(blur_epilogue, t, RULES["plain"])
    for rule in ((1.5, 1.0, -1.0), (0.2, 0.0, -1.0)):
        with pytest.raises(ValueError, match="slope must be from 0 to 1"):
            call(styled_epilogue, t, rule)
