"""Weights of each image's own in a generator."""

import pytest
import torch

from sage_fast.errors import InputError
from sage_fast.models.inference import choose_road
from sage_fast.models.stylegan2 import Generator
from sage_fast.models.weight_deltas import add_deltas, layer_names, select_deltas, synthesize, weight_shapes


@pytest.fixture
def generator():
    torch.manual_seed(0)
    return Generator(16, 8, 2, channels=[12, 8, 4]).eval()


def _deltas(generator, n, rng, kernel=False):
    shapes = weight_shapes(generator)
    return tuple(0.3 * torch.randn(n, a, b, *((k, k) if kernel else (1, 1)), generator=rng) for a, b, k in shapes)


def test_layers_are_named_in_the_order_of_synthesis(generator):
    names = layer_names(generator)
    assert names[:5] == ["conv1.conv", "to_rgb1.conv", "convs.0.conv", "convs.1.conv", "to_rgbs.0.conv"]
    assert len(names) == 8
    assert weight_shapes(generator)[:4] == [(12, 12, 3), (3, 12, 1), (8, 12, 3), (8, 8, 3)]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("noise", ["none", "const"])
def test_deltas_of_zero_give_the_plain_image(generator, n, noise):
    w_plus = torch.randn(n, 6, 8)
    zero = tuple(torch.zeros(n, a, b, 1, 1) for a, b, _ in weight_shapes(generator))
    with torch.no_grad():
        plain = generator(w_plus, noise=noise)
        torch.testing.assert_close(synthesize(generator, w_plus, zero, noise), plain, rtol=1e-4, atol=1e-5)
        assert torch.equal(synthesize(generator, w_plus, None, noise), plain)
        assert torch.equal(synthesize(generator, w_plus, (None,) * 8, noise), plain)


@pytest.mark.parametrize("kernel", [False, True])
def test_every_image_is_that_of_a_generator_with_the_changed_weights(generator, kernel):
    rng = torch.Generator().manual_seed(1)
    w_plus, deltas = torch.randn(3, 6, 8, generator=rng), _deltas(generator, 3, rng, kernel)
    deltas = (*deltas[:3], None, *deltas[4:])
    with torch.no_grad():
        images = synthesize(generator, w_plus, deltas, "const")
        for i in range(3):
            other = Generator(**generator.architecture()).eval()
            other.load_state_dict(generator.state_dict())
            for name, delta in zip(layer_names(other), deltas):
                if delta is not None:
                    other.get_parameter(f"{name}.weight").mul_(1 + delta[i])
            torch.testing.assert_close(images[i : i + 1], other(w_plus[i : i + 1]), rtol=1e-4, atol=1e-4)
            alone = synthesize(generator, w_plus[i : i + 1], select_deltas(deltas, slice(i, i + 1)), "const")
            torch.testing.assert_close(images[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_gradients_reach_latents_and_deltas(generator):
    rng = torch.Generator().manual_seed(1)
    w_plus = torch.randn(2, 6, 8, generator=rng, requires_grad=True)
    deltas = tuple(delta.requires_grad_() for delta in _deltas(generator, 2, rng))
    synthesize(generator, w_plus, deltas, "none").square().sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in (w_plus, *deltas))


def test_replaced_weights_never_meet_the_cache_of_the_fused_road(generator):
    w_plus, shapes = torch.randn(1, 6, 8), weight_shapes(generator)
    with torch.no_grad():
        images = []
        for size in (0.1, 0.2, 0.3):  # each call's weights may lie where the last call's did
            deltas = tuple(torch.full((1, a, b, 1, 1), size * (-1) ** i) for i, (a, b, _) in enumerate(shapes))
            images.append(synthesize(generator, w_plus, deltas, "none"))
        plain = generator(w_plus, noise="none")
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(images, [*images[1:], plain]))
    with torch.no_grad():
        changed = dict(generator.named_parameters()) | {"conv1.conv.weight": generator.conv1.conv.weight * 2}
        reasons = []

        class Asked(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.generator = generator

            def forward(self, x):
                reasons.append(choose_road(self.generator, x))

        torch.func.functional_call(Asked(), {f"generator.{k}": v for k, v in changed.items()}, (w_plus,))
    assert reasons[0][0] in ("differentiable", "reference")


def test_sums_and_choices():
    a, b = (torch.ones(2, 1, 1, 1, 1), None), (torch.ones(2, 1, 1, 1, 1), torch.zeros(2, 1, 1, 1, 1))
    total = add_deltas(a, b)
    assert torch.equal(total[0], torch.full((2, 1, 1, 1, 1), 2.0)) and total[1] is b[1]
    assert add_deltas(None, b) is b and select_deltas(None, [0]) is None
    assert select_deltas(a, [0])[0].shape[0] == 1 and select_deltas(a, [0])[1] is None


def test_refuses_deltas_of_another_generator(generator):
    w_plus, deltas = torch.randn(2, 6, 8), _deltas(generator, 2, torch.Generator())
    with pytest.raises(InputError, match="has 8 modulated convolutions, got weight deltas for 7"):
        synthesize(generator, w_plus, deltas[:-1])
    with pytest.raises(InputError, match=r"of conv1.conv must have shape \[2, 12, 12, 3, 3\]"):
        synthesize(generator, w_plus, (deltas[1], *deltas[1:]))
