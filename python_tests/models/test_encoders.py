"""The pyramid encoder: shapes, size, start, and what it refuses."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sage_fast.errors import InputError
from sage_fast.models.encoders import PyramidEncoder
from sage_fast.models.stylegan2 import Generator, n_latent_of


@pytest.mark.parametrize("resolution", [4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("n_channels", [1, 3])
def test_one_offset_per_style(resolution, n_channels):
    encoder = PyramidEncoder(resolution, n_latent_of(resolution), 16, n_channels, 256, 32, head_width=8)
    offsets = encoder(torch.randn(3, n_channels, resolution, resolution))
    assert offsets.shape == (3, n_latent_of(resolution), 16)
    assert sum(encoder.levels) == encoder.n_latent


@pytest.mark.parametrize("n_channels", [2, 4])
def test_other_channel_counts(n_channels):
    encoder = PyramidEncoder(32, 8, 16, n_channels, 256, 32)
    assert encoder(torch.randn(2, n_channels, 32, 32)).shape == (2, 8, 16)


def test_styles_are_read_coarse_to_fine():
    assert PyramidEncoder(256, 14, 8, channel_base=256, channel_max=16).levels == [3, 4, 7]
    assert PyramidEncoder(32, 8, 8, channel_base=256, channel_max=16).levels == [3, 4, 1]
    assert PyramidEncoder(8, 4, 8, channel_base=256, channel_max=16).levels == [3, 1]


def test_small_enough_for_a_cpu():
    encoder = PyramidEncoder(32, 8, 64)
    with FlopCounterMode(display=False) as counter:
        encoder(torch.randn(1, 3, 32, 32))
    assert counter.get_total_flops() <= 60e6
    assert sum(p.numel() for p in encoder.parameters()) <= 1.2e6


def test_starts_near_latent_avg_with_gradients_everywhere():
    torch.manual_seed(0)
    encoder = PyramidEncoder(32, 8, 64)
    offsets = encoder(torch.randn(8, 3, 32, 32))
    assert offsets.abs().max() < 0.1
    offsets.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


def test_images_of_a_batch_do_not_influence_each_other():
    torch.manual_seed(0)
    encoder = PyramidEncoder(16, 6, 8, channel_base=128, channel_max=16)
    images = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(encoder(images)[2:3], encoder(images[2:3]))
    assert not [name for name, _ in encoder.named_buffers()]  # no running statistics that could drift


def test_every_style_sees_the_whole_image():
    torch.manual_seed(0)
    encoder = PyramidEncoder(32, 8, 4, channel_base=256, channel_max=32)
    for style in range(8):
        image = torch.randn(1, 3, 32, 32, requires_grad=True)
        encoder(image)[0, style].sum().backward()
        seen = image.grad[0].abs().sum(0) > 0
        assert seen[0, 0] and seen[31, 31] and seen[0, 31] and seen[31, 0]


def test_architecture_rebuilds_it():
    encoder = PyramidEncoder(16, 6, 8, 1, 128, 16, head_width=4)
    other = PyramidEncoder(**encoder.architecture())
    other.load_state_dict(encoder.state_dict())
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(encoder(x), other(x))


@pytest.mark.parametrize("sizes", [(33, 8, 8), (2048, 20, 8), (32, 0, 8), (32, 8, 0), (32, 8, 8, 5)])
def test_refuses_impossible_sizes(sizes):
    with pytest.raises(InputError, match="must be"):
        PyramidEncoder(*sizes)


def test_refuses_other_images():
    encoder = PyramidEncoder(16, 6, 8, 3, 128, 16)
    with pytest.raises(InputError, match=r"\[N, 3, 16, 16\].*got \[2, 3, 32, 32\]"):
        encoder(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("settings", [{}, {"n_iterations": 2}], ids=str)
def test_refuses_what_is_no_tensor_of_numbers_or_elsewhere(settings):
    generator = Generator(16, 8, 2, channel_base=128, channel_max=16)
    encoder = PyramidEncoder(16, 6, 8, 3, 128, 16, **settings)
    images = torch.zeros(2, 3, 16, 16)
    for bad in (images.numpy(), [images], images.to(torch.uint8), images.to(torch.complex64), None):
        with pytest.raises(InputError, match=r"images must be floating point \[N, 3, 16, 16\], got"):
            encoder.invert(bad, generator)
        with pytest.raises(InputError, match=r"images must be floating point \[N, ., 16, 16\], got"):
            encoder(bad)
    with pytest.raises(InputError, match="images must be on cpu, as the generator is, got meta"):
        encoder.invert(images.to("meta"), generator)
