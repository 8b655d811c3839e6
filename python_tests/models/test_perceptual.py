"""Feature networks and the perceptual distance."""

from pathlib import Path

import pytest
import torch

from sage_fast.errors import InputError
from sage_fast.models.perceptual import (
    ChainFeatures,
    DiscriminatorFeatures,
    SqueezeFeatures,
    load_perceptual,
    normalised_features,
    perceptual_distance,
)
from sage_fast.models.stylegan2 import Discriminator

WEIGHTS = Path(__file__).parents[3] / "shared" / "weights" / "squeezenet1_1_imagenet_features.safetensors"


def _images(n=4, channels=3, size=32, seed=0):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def discriminator():
    torch.manual_seed(0)
    return Discriminator(32, channel_base=256, channel_max=32)


@pytest.fixture(scope="module")
def networks(discriminator):
    torch.manual_seed(0)
    chain = ChainFeatures([(0, 3, 8), (2, 8, 8), (5, 8, 16)])
    return [DiscriminatorFeatures(discriminator), SqueezeFeatures(), chain]


def test_zero_on_equal_images_and_grows_with_the_difference(networks):
    a, b = _images(), _images(seed=1)
    for network in networks:
        assert perceptual_distance(network, a, a) == 0
        near, far = (perceptual_distance(network, a, torch.lerp(a, b, t)) for t in (0.1, 0.5))
        assert 0 < near < far, network.name


def test_symmetric_bounded_and_a_mean_over_the_batch(networks):
    a, b = _images(), _images(seed=1)
    for network in networks:
        whole = perceptual_distance(network, a, b)
        torch.testing.assert_close(whole, perceptual_distance(network, b, a))
        assert whole <= 4 * len(network(a))
        single = torch.stack([perceptual_distance(network, a[i : i + 1], b[i : i + 1]) for i in range(4)])
        torch.testing.assert_close(whole, single.mean(), rtol=1e-4, atol=1e-5)


def test_does_not_change_when_features_are_scaled():
    class Scaled:
        name, channel_weights = "scaled", None

        def __init__(self, gain):
            self.gain = gain

        def __call__(self, images):
            return [images * self.gain]

    a, b = _images(), _images(seed=1)
    torch.testing.assert_close(perceptual_distance(Scaled(1.0), a, b), perceptual_distance(Scaled(7.0), a, b))
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1)
    torch.testing.assert_close(perceptual_distance(Scaled(1.0), a, b), (2 - 2 * cosine).mean(), rtol=1e-4, atol=1e-5)


def test_channel_weights_weigh():
    class Weighted:
        name, channel_weights = "weighted", (torch.tensor([1.0, 0.0, 0.0]),)

        def __call__(self, images):
            return [images]

    a, b = _images(), _images(seed=1)
    (x,), (y,) = (normalised_features(Weighted(), image) for image in (a, b))
    torch.testing.assert_close(perceptual_distance(Weighted(), a, b), (x - y)[:, 0].square().mean())


def test_target_features_can_be_reused(networks):
    a, b = _images(), _images(seed=1)
    ready = normalised_features(networks[0], b)
    assert perceptual_distance(networks[0], a, ready) == perceptual_distance(networks[0], a, b)


def test_gradient_reaches_images_but_not_weights(networks):
    for network in networks:
        a = _images().requires_grad_()
        perceptual_distance(network, a, _images(seed=1)).backward()
        assert torch.isfinite(a.grad).all() and a.grad.abs().sum() > 0
        assert not any(p.requires_grad for p in network.parameters())


def test_discriminator_is_copied(discriminator):
    network = load_perceptual("discriminator", discriminator)
    assert all(p.requires_grad for p in discriminator.parameters())
    before = perceptual_distance(network, _images(), _images(seed=1))
    with torch.no_grad():
        changed = Discriminator(32, channel_base=256, channel_max=32)
        saved = discriminator.state_dict()
        saved = {k: v.clone() for k, v in saved.items()}
        discriminator.load_state_dict(changed.state_dict())
        assert perceptual_distance(network, _images(), _images(seed=1)) == before
        discriminator.load_state_dict(saved)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_grey_and_alpha(channels):
    torch.manual_seed(0)
    assert perceptual_distance(SqueezeFeatures(), _images(channels=channels), _images(channels=channels, seed=1)) > 0


def test_vgg_layout_from_a_file(tmp_path):
    torch.manual_seed(0)
    network = ChainFeatures([(0, 3, 8), (2, 8, 8), (5, 8, 16), (7, 16, 16)])
    torch.save(network.state_dict() | {"classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "vgg.pth")
    loaded = load_perceptual(tmp_path / "vgg.pth")
    for a, b in zip(network(_images()), loaded(_images())):
        assert torch.equal(a, b)
    assert [tuple(m.shape[1:]) for m in loaded(_images(size=64))] == [(8, 64, 64), (16, 32, 32)]


def test_none_and_misuse(tmp_path, discriminator):
    assert load_perceptual("none") is None
    with pytest.raises(InputError, match="not a file"):
        load_perceptual("resnet-9000")
    with pytest.raises(InputError, match="needs a discriminator"):
        load_perceptual("discriminator")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="is no weights file, or truncated or damaged"):
        load_perceptual(tmp_path / "broken.safetensors")
    torch.save(discriminator.state_dict(), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-1000])
    with pytest.raises(InputError, match="cut.pt is no weights file, or truncated or damaged; fetch it again"):
        load_perceptual(tmp_path / "cut.pt")
    torch.save({"features.0.weight": torch.zeros(4, 3, 7, 7)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="another network"):
        load_perceptual(tmp_path / "other.pth")
    torch.save(discriminator.state_dict(), tmp_path / "empty.pth")
    with pytest.raises(InputError, match="0 such tensors"):
        load_perceptual(tmp_path / "empty.pth")


def test_squeezenet_weights():
    if not WEIGHTS.exists():
        pytest.skip(f"SKIPPED: no perceptual weights at {WEIGHTS}")
    network = load_perceptual(WEIGHTS)
    assert network.name == "squeezenet1_1" and sum(p.numel() for p in network.parameters()) == 722_496
    maps = network(_images(n=2, size=64))
    assert [m.shape[1] for m in maps] == [64, 128, 256, 384, 384, 512, 512]
    # a perceptual metric: a shift by one pixel matters less than noise of the same squared error
    smooth = torch.nn.functional.interpolate(_images(n=8, size=8), 64, mode="bicubic").clamp(-1, 1)
    shifted = smooth.roll(1, 3)
    rng = torch.Generator().manual_seed(1)
    noisy = smooth + torch.randn(smooth.shape, generator=rng) * (shifted - smooth).square().mean().sqrt()
    assert perceptual_distance(network, smooth, shifted) < 0.5 * perceptual_distance(network, smooth, noisy)
