"""scaled_bias_act: kernel against reference, reference against NumPy, derivatives, and what bad input gets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sage_fast.errors import InputError
from sage_fast.models.stylegan2 import Generator
from sage_fast.ops import bias_act
from sage_fast.ops.scaled_bias_act import scaled_bias_act, scaled_bias_act_reference

#: which of scale, noise and b are there; noise as one map for all images, or one each
PARTS = [(True, "each", True), (True, "one", True), (True, None, True), (False, None, True), (False, "each", False)]
OPTIONS = [dict(), dict(clamp=0.8), dict(gain=0.5), dict(gain=3.0, clamp=1.0)]
#: with whole packs and whole vectors, with neither, with a tail, more than a CUDA block has lanes for, a pixel
SHAPES = [(3, 64, 9, 5), (2, 5, 7, 3), (2, 72, 4, 4), (1, 1, 3, 2), (2, 2080, 2, 3), (4, 16, 1, 1)]


def arguments(shape, parts=(True, "each", True), dtype=torch.float32, device="cpu", wide=torch.float32):
    rng = torch.Generator().manual_seed(sum(shape))
    n, c, h, w = shape

    def normal(*size: int, dtype=wide) -> torch.Tensor:
        return torch.randn(size, generator=rng, dtype=torch.float64).to(dtype).to(device)

    has_scale, noise, has_b = parts
    x = normal(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    map_ = None if noise is None else normal(n if noise == "each" else 1, 1, h, w)
    strength = None if noise is None else normal(1)
    return x, normal(n, c) if has_scale else None, map_, strength, normal(c) if has_b else None


def leaves(given, keep=(2,)):
    """Copies that want gradients; noise does not."""
    return [t if t is None or i in keep else t.detach().clone().requires_grad_() for i, t in enumerate(given)]


def gradients(op, given, grad, **options):
    given = leaves(given)
    return torch.autograd.grad(op(*given, **options), [t for t in given if t is not None and t.requires_grad], grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_equals_reference(device, shape, parts, options, dtype):
    given = arguments(shape, parts, dtype, device, dtype)
    y, expected = (op(*given, **options) for op in (scaled_bias_act, scaled_bias_act_reference))
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last)
    grad = torch.randn(shape, dtype=dtype).to(device)  # channels first
    ours, theirs = (gradients(op, given, grad, **options) for op in (scaled_bias_act, scaled_bias_act_reference))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_reference_equals_numpy():
    x, scale, noise, strength, b = (t.numpy() for t in arguments((2, 3, 4, 5), dtype=torch.float64, wide=torch.float64))
    u = x * scale[:, :, None, None] + strength * noise + b[None, :, None, None]
    expected = np.clip(1.7 * np.where(u > 0, u, 0.2 * u), -0.9, 0.9)
    y = scaled_bias_act_reference(*map(torch.from_numpy, (x, scale, noise, strength, b)), gain=1.7, clamp=0.9)
    np.testing.assert_allclose(y, expected, atol=1e-14)


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_gradcheck(device, parts):
    """First and second derivatives, the second by the steps one by one."""
    given = leaves(arguments((2, 3, 2, 3), parts, torch.float64, device, torch.float64))
    learned = [t for t in given if t is not None and t.requires_grad]

    def of(*values):
        some = iter(values)
        return scaled_bias_act(*(next(some) if t is not None and t.requires_grad else t for t in given), clamp=20.0)

    assert torch.autograd.gradcheck(of, learned)
    assert torch.autograd.gradgradcheck(lambda *values: of(*values) ** 2, learned)


def test_both_roads_of_the_gradient_agree(device):
    """That of one pass, and that which can be differentiated again."""
    given = leaves(arguments((3, 24, 5, 7), device=device))
    learned = [t for t in given if t.requires_grad]
    y, grad = scaled_bias_act(*given, clamp=1.0), torch.randn(3, 24, 5, 7).to(device)
    once, again = (torch.autograd.grad(y, learned, grad, retain_graph=True, create_graph=g) for g in (False, True))
    torch.testing.assert_close(once, tuple(t.detach() for t in again), atol=1e-5, rtol=1e-5)


def test_noise_that_wants_a_gradient(device):
    given = leaves(arguments((2, 8, 3, 4), device=device), keep=())
    ours, theirs = (
        torch.autograd.grad(op(*given).square().sum(), given) for op in (scaled_bias_act, scaled_bias_act_reference)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert ours[2].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(device, no_worse_than_plain, dtype):
    """Values, and the gradients by all there is."""
    given, grad = arguments((4, 40, 6, 5), dtype=dtype, device=device), torch.randn(4, 40, 6, 5).to(device).to(dtype)

    def all_of(op, convert):
        some = leaves([convert(t) for t in given])
        y = op(*some)
        return [y, *torch.autograd.grad(y, [t for t in some if t.requires_grad], convert(grad))]

    ours, plain = all_of(scaled_bias_act, torch.clone), all_of(scaled_bias_act_reference, torch.clone)
    for case in zip(ours, plain, all_of(scaled_bias_act_reference, torch.Tensor.double)):
        no_worse_than_plain(*case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_layouts(device, laid_out, dtype):
    given = [laid_out(t) if t.ndim in (2, 4) else t for t in arguments((3, 24, 6, 5), dtype=dtype, device=device)]
    grad = laid_out(torch.ones(3, 24, 6, 5, dtype=dtype, device=device))
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    y, expected = (op(*given) for op in (scaled_bias_act, scaled_bias_act_reference))
    torch.testing.assert_close(y, expected, atol=tolerance, rtol=tolerance)
    ours = gradients(scaled_bias_act, given, grad)
    exact = gradients(scaled_bias_act_reference, [t.double() for t in given], grad.double())
    for of_ours, of_exact in zip(ours, exact):  # a sign at the kink turns on a rounding of y
        distance = (of_ours.double() - of_exact).norm() / of_exact.norm()
        assert distance < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8), (2, 3, 0, 8)])
def test_empty(device, shape):
    given = leaves(arguments(shape, device=device))
    y = scaled_bias_act(*given)
    y.sum().backward()
    assert y.shape == shape and all(not t.grad.any() for t in given if t.requires_grad)


def test_nan_and_infinity(device):
    given = arguments((2, 20, 3, 3), device=device)
    given[0][0, 3, 1, 1], given[0][1, 19, 2, 2], given[0][1, 0, 0, 0] = math.nan, math.inf, -math.inf
    for options in (dict(), dict(clamp=2.0)):
        y, expected = (op(*given, **options) for op in (scaled_bias_act, scaled_bias_act_reference))
        torch.testing.assert_close(y, expected, equal_nan=True)


def test_the_same_bits_again(device):
    given, grad = arguments((3, 40, 17, 9), device=device), torch.randn(3, 40, 17, 9).to(device)
    first, second = (gradients(scaled_bias_act, given, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_threads(same_bits_for_all_thread_counts):
    """With several sums for each image."""
    given, grad = arguments((2, 40, 37, 29)), torch.randn(2, 40, 37, 29)
    same_bits_for_all_thread_counts(lambda: scaled_bias_act(*given))
    for i in range(4):
        same_bits_for_all_thread_counts(lambda i=i: gradients(scaled_bias_act, given, grad)[i])


def test_opcheck(device):
    op = torch.ops.sage_fast.scaled_bias_act.default
    torch.library.opcheck(op, (*leaves(arguments((2, 8, 3, 4), device=device)), 0.2, 1.4, 0.8))
    torch.library.opcheck(op, (*leaves(arguments((2, 5, 3, 4), (False, None, True), device=device)), 0.2, 1.4, -1.0))
    x, scale, noise, *_ = arguments((2, 8, 3, 4), device=device)
    backward = torch.ops.sage_fast.scaled_bias_act_backward.default
    torch.library.opcheck(backward, (x, x, x, scale, noise, 0.2, 1.4, 0.8))
    torch.library.opcheck(backward, (x, None, x, None, None, 0.2, 1.4, -1.0))


@pytest.mark.parametrize("clamp", [None, 0.9])
@pytest.mark.parametrize("act", ["lrelu", "linear"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bias_act_of_images_sums_its_bias_beside(device, shape, act, clamp):
    """Its gradient by the bias comes with that by the images."""
    x, _, _, _, b = arguments(shape, device=device)
    grad, results = torch.randn(shape).to(device), []
    for layout in (torch.channels_last, torch.contiguous_format):
        given = [x.clone(memory_format=layout).requires_grad_(), b.clone().requires_grad_()]
        results.append(torch.autograd.grad(bias_act(*given, act=act, gain=1.3, clamp=clamp), given, grad))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("connections", ["skip", "resnet", "orig"])
def test_a_generator_on_kernels_and_on_the_reference(device, on_reference, connections):
    """The path-length penalty: first and second derivatives of a whole generator, noise and clamp included."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        G = Generator(16, 8, 1, channels=[16, 16, 8], connections=connections, clamp=3.0).double().to(device)
        w_plus = torch.randn(3, G.n_latent, 8, dtype=torch.float64).to(device).requires_grad_()
        onto = torch.randn(3, 3, 16, 16, dtype=torch.float64).to(device)
    for module in G.modules():
        if type(module).__name__ == "_NoiseStrength":
            torch.nn.init.constant_(module.weight, 0.3)

    def penalty_and_its_gradients() -> list[torch.Tensor]:
        images = G(w_plus)
        (by_w,) = torch.autograd.grad((images * onto).sum(), w_plus, create_graph=True)
        learned = [p for name, p in G.named_parameters() if not name.startswith("style.")]
        first = torch.autograd.grad(images.square().sum(), learned, retain_graph=True)
        second = torch.autograd.grad(by_w.square().sum(), learned, allow_unused=True)
        return [images, by_w, *first, *(g for g in second if g is not None)]

    native = penalty_and_its_gradients()
    on_reference()
    torch.testing.assert_close(native, penalty_and_its_gradients(), atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("op", [scaled_bias_act, scaled_bias_act_reference])
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 3)), r"x must .*\[N, C, H, W\], got"),
        (dict(x=torch.zeros(2, 3, 4, 4, dtype=torch.int64)), "x must be floating"),
        (dict(scale=torch.zeros(2, 4)), r"scale must have shape \[2, 3\] for x of \[2, 3, 4, 4\], got \[2, 4\]"),
        (dict(scale=torch.zeros(2, 3, device="meta")), "scale must be on cpu, as x is, got meta"),
        (dict(strength=None), "strength must be a torch.Tensor, got None"),
        (dict(noise=None), "noise must be given where strength is"),
        (dict(noise=torch.zeros(3, 1, 4, 4)), r"noise must have shape \[2, 1, 4, 4\]"),
        (dict(noise=torch.zeros(1, 1, 4, 5)), r"noise must have shape \[1, 1, 4, 4\]"),
        (dict(strength=torch.zeros(2)), r"strength must be one number, got \[2\]"),
        (dict(b=torch.zeros(4)), r"b must have shape \[3\]"),
        (dict(gain=0.0), "gain must be above 0, got 0"),
        (dict(clamp=-1.0), "clamp must be None or at least 0, got -1"),
    ],
)
def test_bad_input(op, change, message):
    given = dict(x=torch.zeros(2, 3, 4, 4), scale=torch.zeros(2, 3), noise=torch.zeros(2, 1, 4, 4))
    given |= dict(strength=torch.zeros(1), b=torch.zeros(3))
    with pytest.raises(InputError, match=message):
        op(**given | change)
