"""The small residual network: what its docstring promises of shapes, sizes and cost."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sage_fast.errors import InputError
from sage_fast.models.classifiers import SmallResNet


@pytest.fixture
def network() -> SmallResNet:
    torch.manual_seed(0)
    return SmallResNet(5, n_channels=2, width=6).eval()


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (24, 40), (8, 8)])
def test_shapes(network: SmallResNet, size: tuple[int, int]) -> None:
    images = torch.randn(3, 2, *size)
    maps = network.maps(images)
    assert maps.shape == (3, 16, size[0] // 8, size[1] // 8) and (maps >= 0).all()
    assert network.features(images).shape == (3, network.n_features)
    assert network(images).shape == (3, 5)
    assert network(images[:0]).shape == (0, 5)


def test_logits_are_linear_in_the_features(network: SmallResNet) -> None:
    images = torch.randn(4, 2, 16, 16)
    expected = network.features(images) @ network.head.weight.T + network.head.bias
    assert torch.allclose(network(images), expected, atol=1e-6)


def test_logits_do_not_depend_on_the_batch(network: SmallResNet) -> None:
    images = torch.randn(6, 2, 16, 16)
    assert torch.allclose(torch.cat([network(image[None]) for image in images]), network(images), atol=1e-5)


def test_features_do_not_see_where_a_pattern_lies(network: SmallResNet) -> None:
    """Moved by the stride, inside a margin wider than what a pixel sees, a pattern has the same features."""
    pattern = torch.randn(1, 2, 8, 8)
    images = torch.zeros(2, 2, 160, 160)
    images[0, :, 72:80, 72:80], images[1, :, 80:88, 72:80] = pattern, pattern
    a, b = network.features(images)
    blank = network.features(torch.zeros(1, 2, 160, 160))[0]
    assert (a - blank).abs().max() > 1e-4
    assert torch.allclose(a, b, atol=1e-6)


def test_pixels_are_folded_as_pytorch_does(network: SmallResNet) -> None:
    images = torch.randn(2, 2, 16, 24)
    expected = network.blocks(network.stem(nn.functional.pixel_unshuffle(images, 2)).relu())
    assert torch.allclose(network.maps(images), expected, atol=1e-6)


def test_every_pixel_is_seen(network: SmallResNet) -> None:
    images = torch.randn(1, 2, 16, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(images).square().sum(), images)
    assert (gradient != 0).all()


def test_blocks_start_from_their_skip(network: SmallResNet) -> None:
    x = torch.randn(2, 6, 8, 8)
    block = network.blocks[0]
    assert torch.equal(block(x), x.relu())


def test_the_architecture_rebuilds_the_network(network: SmallResNet) -> None:
    copy = SmallResNet(**network.architecture()).eval()
    copy.load_state_dict(network.state_dict())
    images = torch.randn(2, 2, 16, 16)
    assert torch.equal(copy(images), network(images))


def test_size_and_cost_are_those_of_the_docstring() -> None:
    network = SmallResNet(240).eval()
    stored = sum(value.numel() for value in network.state_dict().values())
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == 0.48
    assert 2 * stored < 1_000_000  # bytes in float16
    products = []
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda conv, _, y: products.append(conv.weight.numel() * y[0, 0].numel()))
    network(torch.zeros(1, 3, 32, 32))
    assert len(products) == 9 and round(sum(products) / 1e6) == 25


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (1, 2, 12, 16), (2, 16, 16), (1, 2, 0, 16)])
def test_other_images_are_refused(network: SmallResNet, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="multiples of 8"):
        network(torch.zeros(shape))


def test_sizes_must_be_positive() -> None:
    with pytest.raises(InputError, match="must be positive"):
        SmallResNet(0)
