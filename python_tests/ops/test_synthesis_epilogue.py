"""The epilogues of the CUDA synthesis: the kernels' arithmetic on the host, the kernels on a GPU, against plain PyTorch."""

from __future__ import annotations

import ctypes

import pytest
import torch
from epilogue_cases import RULES, call, numbers
from torch import Tensor

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


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def twin_arguments(shape: tuple[int, ...], t: dict, rule: tuple[float, ...], strength: float) -> list:
    n, h, w, c, pitch, _ = shape
    per_sample = t["noise"] is not None and len(t["noise"]) != 1
    sizes = (ctypes.c_int64 * 6)(n, h, w, c, pitch, per_sample)
    floats = (ctypes.c_float * 5)(rule[0], rule[1], 0.0, rule[2], strength)
    return [sizes, floats, *(pointer(t[name]) for name in ("x", "factor", "bias", "noise", "next_style"))]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("noise", ["none", "shared", "each"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [4, 32])
def test_the_threads_of_the_blur_on_the_host(host_twin, shape, noise, rule, rows):
    t = numbers(shape, 1, noise)
    n, h, w, c, *_ = shape
    y = torch.full((n, h, w, c), float("nan"))
    host_twin.twin_blur(*twin_arguments(shape, t, rule, 0.3), ctypes.c_int64(rows), pointer(y))
    torch.testing.assert_close(y, call(blur_epilogue_reference, t, rule), atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("noise", ["none", "shared", "each"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_threads_of_the_epilogue_on_the_host(host_twin, shape, skip, noise, rule):
    t = numbers(shape, 0, noise)
    t["skip"] = t["skip"] if skip else None
    n, h, w, _, _, channels = shape
    for next_style in (t["next_style"], None):
        t["next_style"] = next_style
        y, image = torch.full_like(t["x"], float("nan")), torch.full((n, channels, h, w), float("nan"))
        outputs = [ctypes.c_int64(channels), *map(pointer, (t["image_weight"], t["image_bias"], t["skip"], y, image))]
        host_twin.twin_styled(*twin_arguments(shape, t, rule, 0.3), *outputs)
        expected_y, expected_image = call(styled_epilogue_reference, t, rule)
        torch.testing.assert_close(image, expected_image, atol=2e-5, rtol=2e-6)
        if next_style is not None:
            torch.testing.assert_close(y, expected_y, atol=2e-5, rtol=2e-6)


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
