"""What another model gives: by name, by resolution, and only where it fits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from sage_fast.errors import InputError
from sage_fast.models.stylegan2 import Discriminator, Generator
from sage_fast.models.weights import load_discriminator, load_encoder, load_generator, save_bundle
from sage_fast.training.gan import GANConfig, train_gan
from sage_fast.training.transfer import transfer

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures"
LIKE_TINY = dict(channel_base=64, channel_max=8)  # the sizes of the tiny bundle: 8 px, style_dim 16, two mapping layers


def fresh(resolution=8, n_channels=3, style_dim=16, n_mapping=2, c_dim=0, **size):
    torch.manual_seed(9)
    size = size or LIKE_TINY
    G = Generator(resolution, style_dim, n_mapping, n_channels, c_dim=c_dim, **size)
    D = Discriminator(resolution, n_channels, c_dim=c_dim, **size)
    return G, D, Generator(resolution, style_dim, n_mapping, n_channels, c_dim=c_dim, **size)


def test_the_same_networks_are_taken_whole(tiny_bundle):
    G, D, average = fresh()
    line = transfer(tiny_bundle, G, D, average)
    for new, old in ((G, load_generator(tiny_bundle)), (average, load_generator(tiny_bundle))):
        assert all(torch.equal(a, b) for a, b in zip(new.state_dict().values(), old.state_dict().values()))
    old = load_discriminator(tiny_bundle).state_dict()
    assert all(torch.equal(value, old[name]) for name, value in D.state_dict().items())
    assert "8 px, 3 channels" in line and "G took 100 % of its weights; D took 100 %" in line and line.count("\n") == 0


def test_twice_the_resolution_takes_the_blocks_in_common(tiny_bundle):
    G, D, average = fresh(16, channels=[8, 8, 4])
    first_D = {name: value.clone() for name, value in D.state_dict().items()}
    line = transfer(tiny_bundle, G, D, average)
    old_G, old_D = load_generator(tiny_bundle), load_discriminator(tiny_bundle)
    w_plus = torch.randn(2, G.n_latent, 16)
    half = G._layer_by_layer  # the image of the first two resolutions is the source's
    assert torch.equal(G.convs[1].conv.weight, old_G.convs[1].conv.weight)
    assert torch.equal(G.latent_avg, old_G.latent_avg) and half(w_plus.unbind(1), [None] * 5).shape == (2, 3, 16, 16)
    for part in ("conv1.0.weight", "conv2.1.weight", "skip.1.weight"):  # 8 px: the first block there, the second here
        assert torch.equal(D.state_dict()[f"convs.2.{part}"], old_D.state_dict()[f"convs.1.{part}"])
    for name in ("convs.0.0.weight", "convs.1.conv1.0.weight"):
        assert torch.equal(D.state_dict()[name], first_D[name])
    assert torch.equal(D.final_linear[1].weight, old_D.final_linear[1].weight)
    assert "fresh: convs.2, convs.3, to_rgbs.1" in line and "fresh: convs.0, convs.1.conv1" in line


def test_half_the_resolution_takes_the_lower_blocks(tiny_bundle):
    G, D, average = fresh(4)
    transfer(tiny_bundle, G, D, average)
    old_G, old_D = load_generator(tiny_bundle), load_discriminator(tiny_bundle)
    assert torch.equal(G.conv1.conv.weight, old_G.conv1.conv.weight)
    assert torch.equal(D.final_conv[0].weight, old_D.final_conv[0].weight)
    assert not torch.equal(D.convs[0][0].weight, old_D.convs[0][0].weight)  # fromRGB is of another resolution


@pytest.mark.parametrize("n_channels", [1, 2, 4])
def test_another_number_of_image_channels(tiny_bundle, n_channels):
    """Colours are averaged or kept; the discriminator answers a grey image as the source does."""
    G, D, average = fresh(n_channels=n_channels)
    alpha = G.to_rgbs[0].conv.weight[:, -1].clone()
    transfer(tiny_bundle, G, D, average)
    old_G, old_D = load_generator(tiny_bundle), load_discriminator(tiny_bundle)
    w_plus = torch.randn(3, G.n_latent, 16)
    images, old_images = G(w_plus, noise="none"), old_G(w_plus, noise="none")
    colours = 1 if n_channels <= 2 else 3
    expected = old_images.mean(1, keepdim=True) if colours == 1 else old_images
    torch.testing.assert_close(images[:, :colours], expected, rtol=1e-4, atol=1e-5)
    if n_channels % 2 == 0:
        assert torch.equal(G.to_rgbs[0].conv.weight[:, -1], alpha)
        with torch.no_grad():
            D.convs[0][0].weight[:, -1] = 0
    grey = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(
        D(grey.expand(-1, n_channels, -1, -1)), old_D(grey.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4
    )


def test_another_width_takes_what_fits(tiny_bundle):
    G, D, average = fresh(channels=[8, 6])
    line = transfer(tiny_bundle, G, D, average)
    old = load_generator(tiny_bundle)
    assert torch.equal(G.conv1.conv.weight, old.conv1.conv.weight)
    assert "fresh: convs.0, convs.1, to_rgbs.0" in line
    with pytest.raises(InputError, match=r"nothing of .* fits: its generator has style_dim 16 and channels \[8, 8\]"):
        transfer(tiny_bundle, *fresh(style_dim=12, n_mapping=3, channels=[6, 5]))


def test_a_mapping_of_another_depth_is_left(tiny_bundle):
    G, D, average = fresh(n_mapping=3)
    transfer(tiny_bundle, G, D, average)
    assert not torch.equal(G.style[1].weight, load_generator(tiny_bundle).style[1].weight)
    assert not G.latent_avg.any() and torch.equal(G.conv1.conv.weight, load_generator(tiny_bundle).conv1.conv.weight)


def test_classes_begin_alike(tiny_bundle):
    G, D, average = fresh(c_dim=3)
    transfer(tiny_bundle, G, D, average)
    z, old = torch.randn(3, 16), load_generator(tiny_bundle)
    torch.testing.assert_close(G.mapping(z, torch.eye(3)), old.mapping(z), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["rosinality_32px.pt", "stylegan2ada_32px_uncond.pkl"])
def test_published_files_give_all_their_networks(name):
    path = FIXTURES / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    old_G, old_D = load_generator(path), load_discriminator(path)
    shape = old_G.architecture()
    G, average = Generator(**shape), Generator(**shape)
    D = Discriminator(**old_D.architecture())
    line = transfer(path, G, D, average)
    assert "G took 100 %" in line and "D took 100 %" in line
    z = torch.randn(2, old_G.style.z_dim)
    assert torch.equal(average(average.mapping(z)), old_G(old_G.mapping(z)))


def test_a_file_without_a_discriminator(tiny_bundle, tmp_path):
    path, old = tmp_path / "g.pt", load_generator(tiny_bundle)
    torch.save({"g_ema": old.state_dict(), "latent_avg": old.latent_avg}, path)
    line = transfer(path, *fresh())
    assert "G took 100 %" in line and "D is fresh (" in line and "discriminator" in line


def test_a_run_whose_bundle_has_no_discriminator_gives_that_of_its_checkpoint(tiny_bundle, tmp_path):
    config = GANConfig(
        resolution=8, style_dim=16, n_mapping=2, channel_base=64, channel_max=8, batch=4, total_kimg=0.004
    )
    _, trained = train_gan(config, torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8), tmp_path)
    save_bundle(tmp_path, generator=load_generator(tiny_bundle), encoder=load_encoder(tiny_bundle))
    G, D, average = fresh()
    line = transfer(tmp_path, G, D, average)
    assert "D took 100 %" in line
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in D.state_dict().items())
    assert torch.equal(G.input.input, load_generator(tiny_bundle).input.input)


def test_training_starts_from_it_once(tiny_bundle, tmp_path, capsys):
    config = GANConfig(
        resolution=8, style_dim=16, n_mapping=2, channel_base=64, channel_max=8, batch=4, total_kimg=0.004,
        lr=1e-9, ema_rampup=None, latent_avg_decay=1.0, transfer_from=str(tiny_bundle), freeze_d=1,
    )  # fmt: skip
    images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    average, D = train_gan(config, images, tmp_path)
    assert "started from" in capsys.readouterr().out
    for name, value in load_generator(tiny_bundle).state_dict().items():
        torch.testing.assert_close(average.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert torch.equal(D.convs[0][0].weight, load_discriminator(tiny_bundle).convs[0][0].weight)
    train_gan(dataclasses.replace(config, total_kimg=0.008), images, tmp_path, resume=True)
    assert "started from" not in capsys.readouterr().out


def test_a_source_that_is_not_there(tmp_path):
    images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    config = GANConfig(resolution=8, batch=4, total_kimg=0.004, transfer_from=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="nowhere.* does not exist"):
        train_gan(config, images, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"nowhere.* does not exist"):
        transfer(tmp_path / "nowhere", *fresh())
