"""styled_conv: its weights and its reference against a transposed convolution and a blur; the kernels on a GPU.

The kernels on a machine without one: ``python_tests/cuda_on_host/test_styled_conv.py``.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from styled_conv_cases import DTYPES, RULES, SHAPES, arguments, bad_inputs, compare
from torch.nn import functional as F

from sage_fast.ops.styled_conv import composed_weight, styled_conv, styled_conv_reference
from sage_fast.ops.synthesis_epilogue import blur_epilogue_reference, styled_epilogue_reference

BIG_SHAPES = [*SHAPES, (1, 4, 4, 512, 512, 3), (5, 32, 32, 64, 200, 3), (2, 64, 48, 256, 128, 4)]


@pytest.mark.parametrize("up", [False, True], ids=["plain", "up"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_is_a_convolution_and_an_epilogue(shape, rule, up):
    t = arguments(shape, up, torch.float32, rule)
    rng = torch.Generator().manual_seed(0)  # integers, so that TF32 holds what they are composed to
    weight = torch.randint(-8, 9, (shape[4], shape[3], 3, 3), generator=rng) / 8
    y, image = styled_conv_reference(**t | dict(weight=composed_weight(weight, up, torch.float32)))
    x, rest = t["x"].permute(0, 3, 1, 2), [t["factor"], t["bias"], t["noise"], t["strength"], t["next_style"]]
    rules = [t["slope"], t["gain"], t["clamp"]]
    if up:
        wide = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2).permute(0, 2, 3, 1)
        expected = blur_epilogue_reference(wide, *rest, *rules)
    else:
        wide = F.conv2d(x, weight, padding=1).permute(0, 2, 3, 1)
        images = [t["image_weight"], t["image_bias"], t["skip"]]
        expected, expected_image = styled_epilogue_reference(wide, *rest, *images, *rules)
        torch.testing.assert_close(image, expected_image, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(y, expected, atol=2e-5 * float(expected.abs().max()), rtol=1e-5)


def test_a_composed_weight_sums_to_four_times_the_weight():
    """The blur doubles each axis: four phases of a constant image."""
    weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    phases = composed_weight(weight, True, torch.float16)
    assert phases.shape == (4, 5, 9, 3) and phases.dtype == torch.float16 and phases.is_contiguous()
    for phase in phases.float().sum(1 + 1):
        torch.testing.assert_close(phase, weight.sum((2, 3)), atol=5e-3, rtol=0)


def test_weights_are_rounded_to_tf32():
    weight = torch.tensor([1 + 2**-11, 1 + 2**-11 - 2**-20, -(1 + 2**-11), 1 + 3 * 2**-11, 2**-30]).view(5, 1, 1, 1)
    rounded = composed_weight(weight.expand(5, 1, 3, 3), False, torch.float32)[0, :, 0, 0]
    assert rounded.tolist() == [1 + 2**-10, 1, -(1 + 2**-10), 1 + 2**-9, 2**-30]


@pytest.mark.parametrize("size", [4, 8, 10, 16, 64])
def test_fragments_are_read_without_bank_conflicts(host_twin, size):
    assert host_twin.twin_conflicts(ctypes.c_int64(size), ctypes.c_int64(size)) == 1


@pytest.mark.parametrize("up", [False, True], ids=["plain", "up"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", BIG_SHAPES, ids=lambda s: f"odd {s}")
def test_kernels_against_reference(device, on_a_gpu, shape, dtype, up):
    for rule in RULES:
        for noise in ("none", "shared", "each"):
            t = arguments(shape, up, dtype, rule, noise, device)
            compare(styled_conv(**t), t)
        for columns in (32, 64, 128):
            compare(styled_conv(**t, columns=columns), t)
        for changed in (dict(next_style=None), dict(skip=None), dict(image_weight=None, image_bias=None, skip=None)):
            compare(styled_conv(**t | changed), t | changed)


def test_kernels_repeat_to_the_bit(device, on_a_gpu):
    for up in (False, True):
        t = arguments((3, 8, 8, 512, 512, 3), up, torch.bfloat16, device=device)
        first = styled_conv(**t)
        for _ in range(5):
            assert all(map(torch.equal, first, styled_conv(**t)))


def test_fake_kernel(device, on_a_gpu):
    for up in (False, True):
        t = arguments(SHAPES[0], up, torch.bfloat16, device=device)
        for changed in ({}, dict(next_style=None), dict(image_weight=None, image_bias=None, skip=None)):
            checks = ("test_schema", "test_faketensor")
            torch.library.opcheck(torch.ops.sage_fast.styled_conv, tuple((t | changed).values()), test_utils=checks)


def test_bad_input_to_the_kernel(device, on_a_gpu):
    t = arguments(SHAPES[0], False, torch.bfloat16, device=device)
    for changed, message in bad_inputs(t):
        with pytest.raises(ValueError, match=message):
            styled_conv(**t | changed)


@pytest.fixture
def on_a_gpu(device) -> None:
    if device == "cpu":
        pytest.skip("styled_conv has a kernel on CUDA alone")
