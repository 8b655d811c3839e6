"""StyleGAN2 modules: shapes over the whole range, properties of the layers, derivatives that training needs."""

from __future__ import annotations

import pytest
import torch

from sage_fast.errors import InputError, SageFastWarning
from sage_fast.models.stylegan2 import Discriminator, Generator, n_latent_of, truncate

SMALL = dict(channel_base=256, channel_max=16)


@pytest.mark.parametrize("resolution", [4, 8, 32, 64, 256, 1024])
@pytest.mark.parametrize("n_channels", [1, 3])
def test_shapes(resolution, n_channels):
    g = Generator(resolution, 8, 2, n_channels, channel_base=64, channel_max=8)
    d = Discriminator(resolution, n_channels, channel_base=64, channel_max=8)
    with torch.no_grad():
        w = g.mapping(torch.randn(2, 8))
        images = g(g.broadcast(w))
        assert images.shape == (2, n_channels, resolution, resolution)
        assert d(images).shape == (2, 1)
        assert [f.shape[-1] for f in d.features(images)] == [resolution >> i for i in range(len(d.channels))]


@pytest.mark.parametrize("resolution, n_latent", [(4, 2), (32, 8), (64, 10), (128, 12), (256, 14), (1024, 18)])
def test_n_latent(resolution, n_latent):
    assert n_latent_of(resolution) == n_latent


def test_architecture_rebuilds_the_network():
    g = Generator(16, 8, 3, 2, c_dim=5, **SMALL)
    d = Discriminator(16, 2, c_dim=5, **SMALL)
    Generator(**g.architecture()).load_state_dict(g.state_dict())
    Discriminator(**d.architecture()).load_state_dict(d.state_dict())


def test_explicit_channels():
    assert Generator(32, 8, 1, channels=[48, 48, 32, 24]).convs[-1].conv.weight.shape == (1, 24, 24, 3, 3)
    with pytest.raises(InputError, match="channels must be 4 positive numbers"):
        Generator(32, 8, 1, channels=[48, 48])


def test_mapping_is_scale_free_and_of_any_depth():
    for depth in (1, 2, 8):
        g = Generator(8, 16, depth, **SMALL)
        z = torch.randn(3, 16)
        torch.testing.assert_close(g.mapping(z), g.mapping(z * 7), atol=1e-5, rtol=1e-5)


def test_demodulation_keeps_unit_variance():
    torch.manual_seed(0)
    g = Generator(16, 32, 2, channel_base=1024, channel_max=64)
    x = torch.randn(8, 64, 16, 16)
    y, factor = g.convs[-1].conv(x, torch.randn(8, 32) * 5)
    y = y * factor[:, :, None, None]
    assert y.shape[1] == 64
    assert 0.8 < y[:, :, 2:-2, 2:-2].std() < 1.2


def test_each_layer_reads_its_own_style():
    g = Generator(16, 8, 1, **SMALL)
    w = torch.randn(1, g.n_latent, 8)
    base = g(w, noise="none")
    for layer in range(g.n_latent):
        changed = w.clone()
        changed[:, layer] += 1
        assert not torch.equal(g(changed, noise="none"), base), layer


def test_noise_modes():
    g = Generator(8, 8, 1, **SMALL)
    with torch.no_grad():
        for p in (m.weight for m in g.modules() if type(m).__name__ == "_NoiseStrength"):
            p.fill_(1.0)
    w = torch.randn(2, g.n_latent, 8)
    const, none = g(w), g(w, noise="none")
    assert not torch.allclose(const, none)
    torch.testing.assert_close(g(w, noise=[getattr(g.noises, f"noise_{i}") for i in range(g.n_latent - 1)]), const)
    random = [g(w, noise="random", rng=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(random[0], random[1]) and not torch.allclose(random[0], random[2])
    with pytest.raises(InputError, match="noise must be"):
        g(w, noise="fixed")


def test_truncate():
    w, mean = torch.randn(4, 8), torch.randn(8)
    torch.testing.assert_close(truncate(w, mean, 1.0), w)
    torch.testing.assert_close(truncate(w, mean, 0.0), mean.expand(4, 8))


def test_conditional_networks_use_the_label():
    g, d = Generator(8, 8, 2, c_dim=3, **SMALL), Discriminator(8, c_dim=3, **SMALL)
    z, eye = torch.randn(2, 8), torch.eye(3)
    assert not torch.allclose(g.mapping(z, eye[:2]), g.mapping(z, eye[1:]))
    images = torch.randn(2, 3, 8, 8)
    assert not torch.allclose(d(images, eye[:2]), d(images, eye[1:]))
    with pytest.raises(InputError, match=r"c must have shape \[2, 3\]"):
        g.mapping(z)
    with pytest.raises(InputError, match=r"c must have shape \[2, 0\]"):
        Generator(8, 8, 2, **SMALL).mapping(z, eye[:2])


def test_stddev_groups():
    d = Discriminator(8, mbstd_group=4, **SMALL).eval()
    for n in (1, 2, 3, 4, 6, 8):
        assert d(torch.randn(n, 3, 8, 8)).shape == (n, 1)


def test_second_derivatives_for_r1_and_path_length():
    torch.manual_seed(0)
    g, d = Generator(8, 8, 1, channels=[4, 4]).double(), Discriminator(8, channels=[4, 4]).double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: d(x).sum(), images, atol=1e-5)
    w_plus = torch.randn(1, g.n_latent, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda w: (g(w, noise="none") ** 2).mean(), w_plus, atol=1e-5)


def test_state_dict_without_latent_avg_takes_the_mapping_mean():
    g = Generator(8, 8, 2, **SMALL)
    state = {k: v for k, v in g.state_dict().items() if k != "latent_avg"}
    other = Generator(8, 8, 2, **SMALL)
    with pytest.warns(SageFastWarning, match="no latent_avg"):
        other.load_state_dict(state)
    torch.testing.assert_close(other.latent_avg, g.mean_latent())


@pytest.mark.parametrize("resolution", [0, 2, 24, 48, 2048])
def test_resolution_must_be_a_power_of_two(resolution):
    with pytest.raises(InputError, match="power of two from 4 to 1024"):
        Generator(resolution, 8)


def test_styles_for_another_resolution():
    g = Generator(32, 8, 1, **SMALL)
    with pytest.raises(
        InputError, match=r"w_plus must have shape \[N, 8, 8\] for this 32 px generator, got \[1, 18, 8\]"
    ):
        g(torch.randn(1, 18, 8))


def test_wrong_image_size():
    with pytest.raises(InputError, match=r"images must have shape \[N, 3, 8, 8\], got \[1, 3, 16, 16\]"):
        Discriminator(8, **SMALL)(torch.randn(1, 3, 16, 16))


def refused(message, function, *args, **more):
    with pytest.raises(InputError, match=message):
        function(*args, **more)


@pytest.mark.parametrize("recorded", [True, False])
def test_latents_that_are_no_tensor_of_numbers_or_elsewhere(recorded):
    g, w_plus = Generator(8, 8, 1, **SMALL), torch.randn(2, 4, 8)
    with torch.set_grad_enabled(recorded):
        for w in (w_plus, w_plus[:, 0]):
            refused("w_plus must be on cpu, as the network is, got meta", g.synthesis, w.to("meta"))
            refused(r"w_plus must be floating point \[N, 4, 8\], got torch.int64", g.synthesis, w.long())
        refused("w_plus must be a tensor of latents, got ndarray", g.synthesis, w_plus.numpy())
        refused("w_plus must be a tensor of latents, got NoneType", g.synthesis, None)
        refused("w_plus must be .* convert it to 16 bits or more", g.synthesis, w_plus.to(torch.float8_e5m2))
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            assert g.synthesis(w_plus.to(dtype)).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("recorded", [True, False])
def test_noise_that_does_not_fit(recorded):
    """The fused road and the road by layers say the same."""
    g, w_plus = Generator(8, 8, 1, **SMALL), torch.randn(2, 4, 8)
    good = [torch.zeros(1, 1, s, s) for s in (4, 8, 8)]
    with torch.set_grad_enabled(recorded):
        assert torch.equal(g.synthesis(w_plus, [None, *good[1:]]), g.synthesis(w_plus, "none"))
        for bad in (good[0], good[1][0], good[1].expand(3, -1, -1, -1), good[1].long(), good[1].numpy(), 0.5):
            refused(r"noise map 1 must be .* \[1 or 2, 1, 8, 8\], got", g.synthesis, w_plus, [good[0], bad, good[2]])
        elsewhere = [*good[:2], good[2].to("meta")]
        refused("noise map 2 must be on cpu, as w_plus is, got meta", g.synthesis, w_plus, elsewhere)
        for bad in (None, 1.0, good[:2], torch.zeros(3), torch.zeros(3).numpy(), "some"):
            refused("noise must be 'const', 'none', 'random' or 3 tensors", g.synthesis, w_plus, bad)
        refused("rng must be a torch.Generator on cpu, .* got 3", g.synthesis, w_plus, "random", rng=3)


def test_prior_samples_labels_and_images_that_are_no_tensor_of_numbers_or_elsewhere():
    g, z, c = Generator(8, 8, 1, c_dim=3, **SMALL), torch.randn(2, 8), torch.eye(3)[:2]
    refused("z must be on cpu, as the network is, got meta", g.mapping, z.to("meta"), c)
    refused(r"z must be floating point \[N, 8\], got torch.int64", g.mapping, z.long(), c)
    refused(r"z must be floating point \[N, 8\], got None", g.mapping, None, c)
    refused("z must be .* got a numpy.ndarray", g.mapping, z.numpy(), c)
    refused("c must be on cpu, .* got meta", g.mapping, z, c.to("meta"))
    refused(r"c must have shape \[2, 3\] for this network, got a list", g.mapping, z, [0, 1])
    assert torch.equal(g.mapping(z, c.long()), g.mapping(z, c))
    d, images = Discriminator(8, **SMALL), torch.randn(2, 3, 8, 8)
    for run in (d, d.features):
        refused("images must be on cpu, as the network is, got meta", run, images.to("meta"))
        refused(r"images must be floating point \[N, 3, 8, 8\], got torch.uint8", run, images.byte())
        refused("images must be .* got a numpy.ndarray", run, images.numpy())


@pytest.mark.parametrize("recorded", [True, False])
def test_whole_networks_on_the_meta_device(recorded):
    g, d = Generator(16, 8, 1, **SMALL).to("meta"), Discriminator(16, **SMALL).to("meta")
    with torch.set_grad_enabled(recorded):
        images = g.synthesis(g.mapping(torch.zeros(2, 8, device="meta")))
        assert images.is_meta and images.shape == (2, 3, 16, 16) and d(images).shape == (2, 1)


@pytest.mark.parametrize("settings", [dict(fused=True), dict(foreach=True), dict(foreach=False)], ids=str)
def test_images_are_those_of_the_weights_that_an_optimizer_has_just_written(settings):
    """torch's fused optimizers do not count up the version of what they write, by which packed weights are known to be old."""
    torch.manual_seed(0)
    G = Generator(16, 8, 1, channels=[12, 8, 6])
    optimizer, w_plus = torch.optim.Adam(G.parameters(), lr=0.1, **settings), torch.randn(2, G.n_latent, 8)
    before = G.synthesis(w_plus)
    with torch.no_grad():
        torch.testing.assert_close(G.synthesis(w_plus), before, rtol=1e-4, atol=1e-4)
    before.square().sum().backward()
    optimizer.step()
    after = G.synthesis(w_plus)
    assert (after - before).abs().max() > 0.1
    with torch.no_grad():
        torch.testing.assert_close(G.synthesis(w_plus), after, rtol=1e-4, atol=1e-4)
