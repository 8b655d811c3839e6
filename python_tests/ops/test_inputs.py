"""Arguments of the wrong kind, for every op and its reference: one InputError that begins with the argument's name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from sage_fast import _native, ops
from sage_fast.errors import InputError
from sage_fast.ops.inputs import number, seen

INDEX = torch.zeros(3, dtype=torch.int64)
IMAGES = dict(real=torch.zeros(2, 3, 8, 8), inverted=torch.zeros(2, 3, 8, 8), edited=torch.zeros(2, 3, 8, 8))
FIR = torch.ones(4, 4)
#: op -> arguments that it takes
GOOD: dict[str, dict[str, Any]] = {
    "bias_act": dict(x=torch.zeros(2, 3, 4), b=torch.zeros(3), act="lrelu", alpha=0.1, gain=2.0, clamp=1.0),
    "scaled_bias_act": dict(
        x=torch.zeros(2, 3, 4, 4), scale=torch.zeros(2, 3), noise=torch.zeros(1, 1, 4, 4), strength=torch.zeros(1),
        b=torch.zeros(3), gain=2.0, clamp=1.0,
    ),
    "upfirdn2d": dict(x=torch.zeros(1, 2, 8, 8), f=FIR, gain=1.0),
    "conv3x3": dict(x=torch.zeros(1, 16, 8, 8), weight=torch.zeros(16, 16, 3, 3)),
    "conv3x3_transposed": dict(x=torch.zeros(1, 16, 8, 8), weight=torch.zeros(16, 16, 3, 3)),
    "modulated_conv2d": dict(
        x=torch.zeros(2, 3, 8, 8), weight=torch.zeros(4, 3, 3, 3), style=torch.zeros(2, 3), up=2, resample_filter=FIR, eps=1e-8
    ),
    "project_onto_basis": dict(w_plus=torch.zeros(1, 3, 4), basis=torch.zeros(3, 4, 2)),
    "least_squares_codes": dict(delta_w=torch.zeros(1, 3, 4), pseudo_inverse=torch.zeros(3, 2, 4)),
    "edit_latents": dict(
        class_embedding=torch.zeros(3, 3, 4), codes=torch.zeros(3, 3, 2), directions=torch.zeros(3, 4, 2), alpha=1.0,
        mask=torch.ones(3, 2), class_index=INDEX,
    ),
    "combine_rows": dict(
        weights=torch.zeros(2, 3), table=torch.zeros(5, 4), centre=torch.zeros(4), rows=INDEX, columns=INDEX
    ),
    "gaussian_low_pass": dict(images=torch.zeros(1, 3, 8, 8), sigma=2.0),
    "fuse_frequencies": dict(**IMAGES, gamma1=0.5, gamma2=0.5, sigma=2.0),
    "fuse_pixels": dict(**IMAGES, low=torch.zeros(1, 3, 8, 8), beta=0.5),
    "counter_normal": dict(samples=INDEX, seed=0, stream=0, numel=4),
}  # fmt: skip
OPTIONAL = {"b", "mask", "class_index", "low", "resample_filter", "alpha", "gain", "clamp", "scale"}
#: of any dtype: numbers of which zero is no, or a filter that is converted
LOOSE = {"mask", "f", "resample_filter"}
#: whose device the others are to share
FIRST = {"x", "edited", "images", "samples", "w_plus", "delta_w", "codes", "weights"}
NO_TENSORS = [None, [1.0], "a", 3.0]
NO_NUMBERS = ["a", [1.0], None, 1j, torch.zeros(2)]


def wrong() -> Iterator[tuple[str, str, Any]]:
    """(op, argument, value) that do not go together."""
    for op, given in GOOD.items():
        for name, value in given.items():
            if isinstance(value, torch.Tensor):
                bad = [*NO_TENSORS, value.to("meta")]
                if value.is_floating_point():
                    bad += [value.to(torch.float8_e4m3fn), value + 0j] if name != "mask" else []
                    bad += [value.long()] if name not in {*LOOSE, "b", "strength"} else []
                if name in FIRST:  # that it is elsewhere than the others is their fault
                    bad = [b for b in bad if not isinstance(b, torch.Tensor) or not b.is_meta]
            elif isinstance(value, float):
                bad = NO_NUMBERS
            else:
                continue
            yield from ((op, name, b) for b in bad if b is not None or name not in OPTIONAL)


@pytest.mark.parametrize("suffix", ["", "_reference"])
@pytest.mark.parametrize("op", GOOD)
def test_good_arguments_are_taken(op, suffix):
    assert getattr(ops, op + suffix)(**GOOD[op]).numel() > 0


@pytest.mark.parametrize("suffix", ["", "_reference"])
@pytest.mark.parametrize("op, name, value", list(wrong()), ids=lambda v: re.sub(r"\s+", " ", f"{v!s:.40}"))
def test_an_argument_of_the_wrong_kind_is_named(op, name, value, suffix):
    if (op, suffix) == ("counter_normal", "_reference"):
        return  # the definition: it looks at nothing
    with pytest.raises(InputError, match=rf"^{name} must"):
        getattr(ops, op + suffix)(**GOOD[op] | {name: value})


@pytest.mark.parametrize("dtype", [complex, object, "U1"])
@pytest.mark.parametrize("op, name", [("upfirdn2d", "f"), ("bias_act", "b"), ("upfirdn2d", "x"), ("bias_act", "x")])
def test_numpy_arrays_of_no_real_numbers(op, name, dtype):
    given = {n: v.numpy() if isinstance(v, torch.Tensor) else v for n, v in GOOD[op].items()}
    with pytest.raises(InputError, match=f"^{name} must"):
        getattr(ops, op)(**given | {name: given[name].astype(dtype)})


def test_numpy_masks_of_objects():
    given = {n: v.numpy() if isinstance(v, torch.Tensor) else v for n, v in GOOD["edit_latents"].items()}
    with pytest.raises(InputError, match="^mask must"):
        ops.edit_latents(**given | dict(mask=given["mask"].astype(object)))


@pytest.mark.parametrize("value", [2, 2.0, True, np.float32(2), torch.tensor([2.0]), torch.tensor(2)])
def test_one_number_of_any_kind_is_a_number(value):
    assert type(number("sigma", value)) is float and number("sigma", value) == float(value)


def test_what_came_is_said_in_a_word():
    assert seen(torch.zeros(2, 3)) == "torch.float32 [2, 3]"
    assert (seen(None), seen([1]), seen(np.zeros(1))) == ("None", "a list", "a numpy.ndarray")


@pytest.mark.parametrize("op", [op for op in GOOD if op != "counter_normal"])
def test_all_on_the_meta_device_gives_the_shape(op):
    given = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in GOOD[op].items()}
    y = getattr(ops, op)(**given)
    assert y.is_meta and y.shape == getattr(ops, op)(**GOOD[op]).shape


#: arguments that kernels alone look at: what PyTorch reads first it answers for itself
READ = [
    *(("bias_act", name) for name in ("x", "b")),
    *(("scaled_bias_act", name) for name in ("x", "scale", "noise", "strength", "b")),
    *(("upfirdn2d", name) for name in ("x", "f")),
    *(("conv3x3", name) for name in ("x", "weight")),
    *(("conv3x3_transposed", name) for name in ("x", "weight")),
    *(("project_onto_basis", name) for name in ("w_plus", "basis")),
    *(("least_squares_codes", name) for name in ("delta_w", "pseudo_inverse")),
    *(("edit_latents", name) for name in ("class_embedding", "codes", "directions")),
    *(("combine_rows", name) for name in ("weights", "table", "centre")),
    ("gaussian_low_pass", "images"),
    *((op, name) for op in ("fuse_frequencies", "fuse_pixels") for name in IMAGES),
    ("fuse_pixels", "low"),
]


@pytest.mark.parametrize("op, name", READ)
def test_memory_that_was_freed_is_not_read(op, name):
    """As of weights that FSDP gathered: a kernel that reads them ends the process."""
    if not _native.has_kernel(op.removesuffix("_transposed"), "cpu"):
        pytest.skip("no kernels on the CPU")
    given = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in GOOD[op].items()}
    if op.startswith("conv3x3"):
        given["x"] = torch.zeros(4, 16, 8, 8)
    if op.startswith("conv3x3") or op == "scaled_bias_act":  # or PyTorch reads them, to lay them so
        given["x"] = given["x"].contiguous(memory_format=torch.channels_last)
    given[name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="a tensor has no memory; it was freed"):
        getattr(ops, op)(**given)
