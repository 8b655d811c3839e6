"""Every native op on drawn shapes, layouts, dtypes and values: the reference's result, or an error that names an argument.

``make sanitize`` runs this too, where an access outside a tensor ends the process. Drawn alike on every run.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sage_fast import _native, ops
from sage_fast.ops.bias_act import ACTIVATIONS
from sage_fast.ops.fuse_pixels import BLENDS
from sage_fast.ops.synthesis import ImageLayer, StyledLayer, SynthesisNetwork

pytestmark = pytest.mark.skipif("cpu" not in _native.load().devices, reason="no kernels on the CPU")
DTYPES = {torch.float64: 1e-11, torch.float32: 3e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
EXACT = [torch.float32, torch.float64]
NAN, INF = float("nan"), float("inf")


def fuzz(examples: int) -> Callable:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    phases = [Phase.generate, Phase.shrink]
    return settings(max_examples=examples, derandomize=True, deadline=None, phases=phases, suppress_health_check=checks)


def sides(most: int) -> st.SearchStrategy[int]:
    return st.one_of(st.integers(0, 5), st.integers(0, most))


@st.composite
def tensors(draw, shape, dtype=torch.float32, specials=(NAN, INF, -INF)) -> Tensor:
    """Normal numbers, a few of them not finite, laid out in one of several ways inside memory that is NaN around it."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))
    for value in draw(st.lists(st.sampled_from(specials), max_size=2)) if x.numel() and specials else ():
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = value
    outside = NAN if dtype.is_floating_point else 7
    x, layout = x.to(dtype), draw(st.sampled_from(["contiguous", "last", "spread", "expanded", "cut", "turned"]))
    if layout == "last" and x.ndim > 2:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "spread":
        return torch.stack([x, torch.full_like(x, outside)], -1)[..., 0]
    if layout == "expanded" and x.ndim and x.shape[0]:
        return x[:1].expand_as(x)
    if layout == "cut" and x.ndim:
        return torch.nn.functional.pad(x, (3, 2), value=outside)[..., 3 : 3 + x.shape[-1]]
    return x.mT.contiguous().mT if layout == "turned" and x.ndim > 1 else x


def agree(run: Callable[[], Tensor], reference: Callable[[], Tensor], names: str, tolerance: float) -> None:
    """Both give one result (NaN where the other has NaN), or ``run`` raises an error with a word of ``names``."""
    try:
        got = run()
    except (ValueError, RuntimeError) as error:
        words = "|".join(names.split())
        assert re.search(rf"\b({words})\b", str(error)), f"names no argument: {error}"
        return
    expected = reference()
    scale = expected[expected.isfinite()].abs().max() if expected.isfinite().any() else torch.ones(())
    torch.testing.assert_close(
        got, expected, atol=tolerance * float(scale.clamp_min(1)), rtol=tolerance, equal_nan=True
    )


@fuzz(150)
@given(data=st.data())
def test_upfirdn2d(data):
    dtype, draw = data.draw(st.sampled_from(list(DTYPES))), data.draw
    shape = [draw(sides(3)), draw(sides(20)), draw(sides(40)), draw(sides(40))]
    x = draw(tensors(shape, dtype))
    taps = draw(st.lists(sides(9), min_size=1, max_size=2))
    f = draw(tensors(taps, draw(st.sampled_from([*DTYPES, torch.int64])), specials=()))
    pad = draw(st.one_of(st.integers(-50, 50), st.lists(st.integers(-12, 12), min_size=4, max_size=4)))
    more = dict(up=draw(st.integers(0, 4)), down=draw(st.integers(0, 4)), padding=pad)
    more |= dict(flip_filter=draw(st.booleans()), gain=draw(st.sampled_from([1.0, -2.5, 0.0, 4])))
    exact = torch.float64 if dtype == torch.float64 else torch.float32

    def reference():
        return ops.upfirdn2d_reference(x.to(exact).contiguous(), f.to(exact), **more).to(dtype)

    agree(lambda: ops.upfirdn2d(x, f, **more), reference, "x f up down padding", DTYPES[dtype])


@fuzz(25)
@given(data=st.data())
def test_upfirdn2d_with_a_filter_that_is_not_finite(data):
    """Which outputs meet such a tap is the order of sums' affair; nothing else may happen."""
    x, f = data.draw(tensors([2, 3, 17, 9])), data.draw(tensors([data.draw(st.integers(1, 5))] * 2))
    f[0, 0] = data.draw(st.sampled_from([NAN, INF]))
    up, down = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (3, 2)]))
    assert not ops.upfirdn2d(x, f, up=up, down=down, padding=4).isfinite().all()


@fuzz(150)
@given(data=st.data())
def test_bias_act(data):
    draw, dtype = data.draw, data.draw(st.sampled_from(list(DTYPES)))
    shape = draw(st.lists(sides(40), max_size=4))
    x = draw(tensors(shape, dtype))
    dim = draw(st.integers(-5, 5))
    length = shape[dim] if -len(shape) <= dim < len(shape) and draw(st.integers(0, 9)) else draw(sides(9))
    b = draw(st.none() | tensors([length], draw(st.sampled_from([dtype, torch.float32]))))
    act = draw(st.sampled_from(list(ACTIVATIONS)))
    more = dict(alpha=draw(st.none() | st.sampled_from([0.2, 1.5]))) if act in ("lrelu", "elu") else {}
    more |= dict(gain=draw(st.sampled_from([None, 2.0, -1.0])), clamp=draw(st.sampled_from([None, 0.5, 3.0, 0.0, NAN])))
    exact = torch.float64 if dtype == torch.float64 else torch.float32

    def reference():
        return ops.bias_act_reference(x.to(exact), b if b is None else b.to(exact), dim, act, **more).to(dtype)

    agree(lambda: ops.bias_act(x, b, dim, act, **more), reference, "x b dim clamp", DTYPES[dtype])


@fuzz(120)
@given(data=st.data())
def test_scaled_bias_act(data):
    """Values; and gradients of images that are finite, in 16 bits without a look at them: a rounding decides at the kink."""
    draw, dtype = data.draw, data.draw(st.sampled_from(list(DTYPES)))
    n, c, h, w = draw(st.integers(0, 4)), draw(sides(90)), draw(sides(12)), draw(sides(12))
    shape = [n, c, h, w]
    x, clamp = draw(tensors(shape, dtype)), draw(st.sampled_from([None, 0.5, 3.0]))
    scale = draw(st.none() | tensors([n, c], specials=()))
    noise = draw(st.none() | tensors([draw(st.sampled_from([1, n])), 1, h, w], specials=()))
    b, strength = draw(st.none() | tensors([c], specials=())), None if noise is None else torch.full([1], 0.3)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    given = [None if t is None else t.to(exact) for t in (scale, noise, strength, b)]

    def reference():
        return ops.scaled_bias_act_reference(x.to(exact), *given, clamp=clamp).to(dtype)

    agree(lambda: ops.scaled_bias_act(x, *given, clamp=clamp), reference, "x", DTYPES[dtype])
    x, grad = torch.where(x.isfinite(), x, 1.0), draw(tensors(shape, dtype, specials=()))
    results = []
    for op, images in ((ops.scaled_bias_act, x), (ops.scaled_bias_act_reference, x.to(exact))):
        every = [images, *given]
        learned = {i: t.clone().requires_grad_() for i, t in enumerate(every) if t is not None and i != 2}  # not noise
        y = op(*(learned.get(i, t) for i, t in enumerate(every)), clamp=clamp)
        results.append(torch.autograd.grad(y, list(learned.values()), grad.to(y)))
    for ours, expected in zip(*results):
        assert ours.shape == expected.shape and ours.isfinite().all()
        error, size = (t.double().norm() for t in (ours - expected, expected))
        assert dtype not in EXACT or error <= 1e-4 * (size + grad.double().norm() + 1)


@fuzz(80)
@given(data=st.data())
def test_project_onto_basis(data):
    draw, dtype = data.draw, data.draw(st.sampled_from(EXACT))
    n, n_latent, dim, rank = draw(sides(20)), draw(sides(4)), draw(sides(70)), draw(sides(40))
    w_plus = draw(tensors([n, n_latent, dim], dtype))
    basis = draw(tensors([n_latent, dim + draw(st.sampled_from([0, 0, 0, 1])), rank], dtype, specials=()))
    op, tolerance = torch.ops.sage_fast.project_onto_basis, 10 * DTYPES[dtype]
    agree(lambda: op(w_plus, basis), lambda: ops.project_onto_basis_reference(w_plus, basis), "w_plus basis", tolerance)


@fuzz(80)
@given(data=st.data())
def test_least_squares_codes(data):
    draw, dtype = data.draw, data.draw(st.sampled_from(EXACT))
    n, n_latent, dim, k = draw(sides(20)), draw(sides(4)), draw(sides(70)), draw(sides(40))
    delta_w = draw(tensors([n, n_latent, dim], dtype))
    inverse = draw(tensors([n_latent, k, dim + draw(st.sampled_from([0, 0, 0, 1]))], dtype, specials=()))
    op, tolerance = torch.ops.sage_fast.least_squares_codes, 10 * DTYPES[dtype]
    reference = ops.least_squares_codes_reference
    agree(lambda: op(delta_w, inverse), lambda: reference(delta_w, inverse), "delta_w pseudo_inverse", tolerance)


@fuzz(100)
@given(data=st.data())
def test_edit_latents(data):
    draw, dtype = data.draw, data.draw(st.sampled_from(EXACT))
    n, n_latent, dim, k = draw(sides(40)), draw(sides(4)), draw(sides(70)), draw(sides(40))
    rows = draw(st.sampled_from([1, n, draw(sides(5))]))
    embedding, codes = draw(tensors([rows, n_latent, dim], dtype)), draw(tensors([n, n_latent, k], dtype))
    directions = draw(tensors([n_latent, dim, k], dtype, specials=()))
    choose = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    mask = draw(st.sampled_from([None, [1, n_latent, k], [rows, n_latent, k], [n_latent, k, 1]]))
    mask = None if mask is None else torch.rand(mask, generator=choose) < 0.6
    index = draw(st.sampled_from([None, rows, rows + 1]))
    index = None if index is None else torch.randint(0, max(1, index), (n,), generator=choose)
    op, alpha = torch.ops.sage_fast.edit_latents, draw(st.sampled_from([1.0, -0.7, 0.0, NAN]))

    def reference():
        one = mask if mask is None or len(mask) != 1 else mask[0]
        return ops.edit_latents_reference(embedding, codes, directions, alpha, one, index)

    names = "class_embedding codes directions mask class_index"
    agree(lambda: op(embedding, codes, directions, alpha, mask, index), reference, names, 10 * DTYPES[dtype])


@fuzz(60)
@given(data=st.data())
def test_combine_rows(data):
    draw, dtype = data.draw, data.draw(st.sampled_from(EXACT))
    n, m, height, width, columns = draw(sides(9)), draw(sides(60)), draw(sides(50)), draw(sides(90)), draw(sides(150))
    weights, centre = draw(tensors([n, m], dtype)), draw(tensors([width], dtype))
    table = draw(tensors([height, width], dtype, specials=()))
    choose = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    # sometimes one row or column too many
    rows = torch.randint(0, max(1, height + draw(st.sampled_from([0, 0, 1]))), (m,), generator=choose)
    picked = torch.randint(-draw(st.sampled_from([0, 0, 1])), max(1, width), (columns,), generator=choose)
    given_ = (weights, table, centre, rows, picked)
    names = "weights table centre rows columns"
    agree(lambda: ops.combine_rows(*given_), lambda: ops.combine_rows_reference(*given_), names, 10 * DTYPES[dtype])


@fuzz(80)
@given(data=st.data())
def test_gaussian_low_pass(data):
    draw, dtype = data.draw, data.draw(st.sampled_from(EXACT))
    x = draw(tensors([draw(sides(3)), draw(sides(3)), draw(sides(60)), draw(sides(60))], dtype, specials=()))
    sigma = draw(st.sampled_from([1e-300, 0.1, 0.7, 3.0, 20.0, 1e3, 1e300, INF, 0.0, -1.0, NAN]))
    border, unit = draw(st.sampled_from(["circular", "reflect"])), draw(st.sampled_from(["frequency", "pixels"]))
    more = dict(sigma=sigma, border=border, unit=unit)

    def reference():
        return ops.gaussian_low_pass_reference(x, **more) if x.numel() else x

    agree(lambda: ops.gaussian_low_pass(x, **more), reference, "images sigma", max(1e-5, DTYPES[dtype]))
    if x.numel() and 0 < sigma < INF:
        bad = x.clone()
        bad[-1, -1, -1, 0] = draw(st.sampled_from([NAN, INF]))
        blurred = ops.gaussian_low_pass(bad, **more)
        assert not blurred[-1, -1].isfinite().all() and blurred[:-1].isfinite().all()


@fuzz(80)
@given(data=st.data())
def test_fusions(data):
    draw, dtype = data.draw, data.draw(st.sampled_from(EXACT))
    n, shape = draw(sides(3)), [draw(sides(4)), draw(sides(70)), draw(sides(40))]
    counts = [draw(st.sampled_from([1, n, 2])) for _ in range(3)]
    real, inverted, low = (draw(tensors([count, *shape], dtype)) for count in counts)
    edited = draw(tensors([n, *shape], dtype))
    low, blend = draw(st.sampled_from([None, low])), draw(st.sampled_from(BLENDS))
    beta = draw(st.sampled_from([0.5, 1.0, 0.0, NAN]))
    names = "real inverted edited low"

    def pixels():
        return ops.fuse_pixels_reference(real, inverted, edited, beta, blend, low) if edited.numel() else edited

    agree(lambda: ops.fuse_pixels(real, inverted, edited, beta, blend, low), pixels, names, DTYPES[dtype])
    three = [x.nan_to_num(0, 0, 0) for x in (real, inverted, edited)]  # an FFT would spread what is not finite
    gamma1 = draw(st.sampled_from([1.0, 0.3]))

    def frequencies():
        return ops.fuse_frequencies_reference(*three, gamma1, 0.8) if edited.numel() else edited

    agree(lambda: ops.fuse_frequencies(*three, gamma1, 0.8), frequencies, names, max(1e-5, DTYPES[dtype]))
    ops.fuse_frequencies(real, inverted, edited) if counts[0] in (1, n) and counts[1] in (1, n) else None


@fuzz(30)
@given(data=st.data())
def test_synthesis(data):
    draw = data.draw
    n, dim, n_channels = draw(st.integers(0, 3)), draw(st.integers(0, 40)), draw(st.integers(1, 5))
    channels = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    wide = [channels[0], channels[0], *(c for c in channels[1:] for _ in range(2))]
    layers = [
        StyledLayer(
            torch.randn(c_out, c_in, 3, 3) / (3 * c_in**0.5), torch.randn(c_in, dim) / (dim or 1) ** 0.5,
            torch.ones(c_in), torch.randn(c_out), 0.3,
        )
        for c_in, c_out in zip(wide, wide[1:])
    ]  # fmt: skip
    images = [
        ImageLayer(torch.randn(n_channels, c) / c**0.5, torch.randn(c, dim), torch.ones(c), torch.randn(n_channels))
        for c in channels
    ]
    network = SynthesisNetwork(torch.randn(1, wide[0], 4, 4), layers, images, clamp=draw(st.sampled_from([None, 2.0])))
    w_plus = draw(tensors([n, 2 * len(images), dim], specials=()))
    noise = [
        torch.randn(draw(st.sampled_from([1, n])), 1, s, s) for s in (4 << (i + 1) // 2 for i in range(len(layers)))
    ]
    noise = [map_ if draw(st.booleans()) else None for map_ in noise]

    def reference():
        return ops.synthesis_reference(network, w_plus, noise)

    agree(lambda: ops.synthesis(network, w_plus, noise), reference, "w_plus noise images", 2e-5)
    if n > 1 and dim and n_channels < 5:
        clean, bad = ops.synthesis(network, w_plus, noise), w_plus.clone()
        bad[0, 0, 0] = draw(st.sampled_from([NAN, INF]))
        assert torch.equal(ops.synthesis(network, bad, noise)[1:], clean[1:])
