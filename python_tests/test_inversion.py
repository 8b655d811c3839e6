"""Projection into the latent space: what is found again, what a mask hides, and one image against eight."""

from __future__ import annotations

import pytest
import torch
from tiny_model import RESOLUTION, tiny_encoder, tiny_networks

from sage_fast.errors import InputError
from sage_fast.inversion import objective, project
from sage_fast.models.encoders import PyramidEncoder
from sage_fast.models.perceptual import ChainFeatures, DiscriminatorFeatures, perceptual_distance
from sage_fast.models.stylegan2 import Generator


@pytest.fixture(scope="module")
def networks():
    """Generator, encoder and feature network in float64: runs differ by rounding alone, and that is small."""
    generator, encoder, discriminator = (network.double() for network in tiny_networks())
    return generator, encoder, DiscriminatorFeatures(discriminator)


@pytest.fixture(scope="module")
def own(networks):
    """Eight images of the generator's own, in space w, and their latents."""
    G = networks[0]
    z = torch.randn(8, G.style_dim, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    w = G.broadcast(G.mapping(z)).detach()
    return G(w).detach(), w


def half_mask(value=0.0):
    mask = torch.ones(1, 1, RESOLUTION, RESOLUTION, dtype=torch.float64)
    mask[..., RESOLUTION // 2 :] = value
    return mask


def one_sentence(error):
    text = str(error.value)
    return "\n" not in text and text.endswith(".") and ". " not in text


# --- what is found ---


@pytest.mark.parametrize("kind", ["e4e", "restyle", "hyperstyle"])
def test_an_encoder_of_any_kind_gives_the_start(networks, own, kind):
    images, G = own[0][:3], networks[0]
    encoder = tiny_encoder(kind, G).double()
    w_encoder = encoder.w_encoder if kind == "hyperstyle" else encoder
    found = project(images, G, encoder, steps=20)
    with torch.no_grad():
        start = G(w_encoder.invert(images, G, "const").offsets + G.latent_avg)
    error = (start - images).abs().mean((1, 2, 3))
    assert ((found.images - images).abs().mean((1, 2, 3)) < error).all()


@pytest.mark.parametrize("method", ["lbfgs", "adam"])
@pytest.mark.parametrize("space", ["w", "w_plus"])
def test_images_of_the_generator_are_found_again(networks, own, space, method):
    images, w = own
    start = project(images, networks[0], space=space, method=method, steps=1)
    found = project(images, networks[0], space=space, method=method, steps=400, latent_weight=0.0, tolerance=1e-5)
    assert (found.losses < 0.1 * start.losses).all()
    assert (found.images - images).square().mean() < 1e-3 * images.var()
    if space == "w":
        assert (found.w_plus == found.w_plus[:, :1]).all()
        far = networks[0].latent_avg - w
        assert (found.w_plus - w).square().mean() < 0.2 * far.square().mean()  # what 8 px show of 16 numbers


def test_losses_are_those_of_the_images(networks, own):
    images, _ = own
    G = networks[0]
    found = project(images, G, steps=20, latent_weight=0.25)
    pull = (found.w_plus - G.latent_avg).square().mean((1, 2))
    error = (found.images - images).abs().mean((1, 2, 3))
    torch.testing.assert_close(found.losses, error + 0.25 * pull)
    torch.testing.assert_close(found.images, G(found.w_plus))


def test_the_perceptual_term_is_the_distance_of_the_network(networks, own):
    images, _ = own
    G, _, features = networks
    options = dict(steps=3, pixel_weight=0.0, latent_weight=0.0, perceptual=features)
    found = project(images, G, **options)
    each = torch.stack([perceptual_distance(features, a[None], b[None]) for a, b in zip(found.images, images)])
    torch.testing.assert_close(found.losses, each)


def test_the_perceptual_term_brings_the_features_closer(networks, own):
    images, _ = own
    G, _, features = networks
    options = dict(steps=60, latent_weight=0.0, method="adam")  # at one pace, whatever the loss
    with_it = project(images, G, perceptual=features, perceptual_weight=10.0, **options)
    without = project(images, G, **options)
    assert perceptual_distance(features, with_it.images, images) < perceptual_distance(features, without.images, images)


def test_the_pull_keeps_latents_where_they_start(networks, own):
    images, _ = own
    G, E, _ = networks
    start = G.latent_avg + E(images).detach()

    def moved(weight, **options):
        return (project(images, G, steps=40, latent_weight=weight, **options).w_plus - start).square().mean().item()

    free, held, fixed = (moved(weight, start=start) for weight in (0.0, 0.3, 30.0))
    assert fixed < 0.1 * held < 0.1 * free

    def code_moved(weight):  # from what the encoder sees in the given image to what it sees in the drawn one
        found = project(foreign, G, E, steps=40, latent_weight=weight)
        return (E(found.images) - E(foreign)).square().mean().item()

    foreign = torch.rand(images.shape, generator=torch.Generator().manual_seed(7)).double() * 2 - 1
    assert code_moved(1e3) < 0.5 * code_moved(0.0)


def test_the_encoder_gives_the_start(networks, own):
    images, _ = own
    G, E, _ = networks
    code = G.latent_avg + E(images).detach()
    found = project(images, G, E, steps=1, method="adam", lr=1e-9)
    torch.testing.assert_close(found.w_plus, code, rtol=0, atol=1e-6)
    found = project(images, G, E, space="w", steps=1, method="adam", lr=1e-9)
    torch.testing.assert_close(found.w_plus[:, 0], code.mean(1), rtol=0, atol=1e-6)
    found = project(images, G, steps=1, method="adam", lr=1e-9)
    torch.testing.assert_close(found.w_plus, G.latent_avg.expand_as(code), rtol=0, atol=1e-6)


@pytest.mark.parametrize("z_dim", [None, 5])
def test_candidates_start_at_the_one_that_looks_most_like_it(networks, z_dim):
    G = networks[0]
    if z_dim is not None:
        G = Generator(8, 16, 2, channel_base=64, channel_max=8, z_dim=z_dim).double().eval()
        for layer in (G.to_rgb1, *G.to_rgbs):
            layer.conv.weight.data.mul_(0.2)  # colours well inside [-1, 1]
    z = torch.randn(20, G.style.z_dim, generator=torch.Generator().manual_seed(9)).double()  # as the seed draws them
    w = G.broadcast(G.mapping(z)).detach()
    images = G(w[[3, 17]]).detach()
    found = project(images, G, n_candidates=20, seed=9, steps=1, method="adam", lr=1e-9)
    torch.testing.assert_close(found.w_plus, w[[3, 17]], rtol=0, atol=1e-5)


# --- noise ---


def test_noise_is_a_setting_and_can_be_optimised(networks, own):
    G = tiny_networks()[0].double()
    with torch.no_grad():
        for layer in (G.conv1, *G.convs):
            layer.noise.weight.fill_(0.5)
    images = own[0]
    plain = project(images, G, steps=60, latent_weight=0.0, noise="none")
    torch.testing.assert_close(plain.images, G(plain.w_plus, noise="none"))
    free = project(images, G, steps=60, latent_weight=0.0, noise="optimize", noise_weight=0.0)
    held = project(images, G, steps=60, latent_weight=0.0, noise="optimize", noise_weight=1e5)
    const = project(images, G, steps=60, latent_weight=0.0)
    assert const.noise is None and len(free.noise) == G.n_latent - 1
    assert free.losses.mean() < 0.5 * const.losses.mean()
    torch.testing.assert_close(free.images, G(free.w_plus, noise=free.noise))
    for maps, wild in zip(held.noise, free.noise):
        torch.testing.assert_close(maps.mean((1, 2, 3)), torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-6)
        torch.testing.assert_close(maps.square().mean((1, 2, 3)), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-6)
        assert (maps * maps.roll(1, 3)).mean((1, 2, 3)).abs().max() < 0.05
        assert (wild - maps).abs().max() > 0.1


def test_autocorrelation_of_a_gradient_is_high_and_of_noise_low():
    ramp = torch.linspace(-1.7, 1.7, 32).view(1, 1, 1, 32).expand(1, 1, 32, 32)
    white = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert objective.autocorrelation(white) < 0.2 < objective.autocorrelation(ramp)


# --- masks ---


@pytest.mark.parametrize("encoder", [False, True])
def test_hidden_pixels_change_nothing(networks, own, encoder):
    images, _ = own
    G, E, features = networks
    changed = torch.where(half_mask() > 0, images, torch.rand_like(images) * 2 - 1)
    options = dict(encoder=E if encoder else None, mask=half_mask(), perceptual=features, steps=15)
    first, second = (project(x, G, **options) for x in (images, changed))
    for name in ("w_plus", "images", "losses", "n_steps"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    seen = project(changed, G, **{**options, "mask": None})
    assert not torch.allclose(seen.w_plus, first.w_plus)


def test_a_mask_of_ones_is_no_mask_and_one_serves_all(networks, own):
    images, _ = own
    G, _, features = networks
    options = dict(perceptual=features, steps=8)
    bare = project(images, G, **options)
    ones = project(images, G, mask=half_mask(1.0), **options)
    assert torch.equal(bare.losses, ones.losses)
    shared = project(images, G, mask=half_mask(0.5), **options)
    each = project(images, G, mask=half_mask(0.5).expand(8, -1, -1, -1), **options)
    assert torch.equal(shared.losses, each.losses)


def test_a_masked_loss_is_a_weighted_mean(networks, own):
    images, _ = own
    mask = torch.rand(8, 1, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(1)).double()
    found = project(images, networks[0], mask=mask, steps=5, latent_weight=0.0)
    error = (found.images - images).abs().mean(1, keepdim=True)
    torch.testing.assert_close(found.losses, (error * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)))


def test_weights_of_small_maps_are_those_of_the_enlarged_map():
    rng = torch.Generator().manual_seed(0)
    small, weight = torch.rand(2, 5, 7, generator=rng).double(), torch.rand(2, 1, 16, 16, generator=rng).double()
    large = torch.nn.functional.interpolate(small[:, None], size=(16, 16), mode="bilinear", align_corners=False)
    expected = (large * weight).sum((1, 2, 3))
    torch.testing.assert_close((small * objective.spread(weight, (5, 7))).sum((1, 2)), expected)


# --- one and many ---


@pytest.mark.parametrize(("method", "noise"), [("lbfgs", "optimize"), ("adam", "const")])
def test_eight_together_are_eight_alone(networks, own, method, noise):
    """All that one image meets, in float64, where the rounding of batches stays small over the steps taken here."""
    images = own[0].clone()
    images[:2] = 1 - images[:2] * 0.1  # nearly white, which the generator hardly draws: these give up sooner
    G, E, features = networks
    mask = torch.rand(8, 1, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(2)).double()
    options = dict(method=method, perceptual=features, steps=80, tolerance=0.1, patience=10, noise=noise)
    together = project(images, G, E, mask, **options)
    assert len(set(together.n_steps.tolist())) > 1  # images leave at different times
    for i in range(8):
        alone = project(images[i : i + 1], G, E, mask[i : i + 1], **options)
        torch.testing.assert_close(together.losses[i], alone.losses[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(together.w_plus[i], alone.w_plus[0], rtol=0, atol=1e-3)
        assert together.n_steps[i] == alone.n_steps[0]


def test_eight_together_come_as_far_as_eight_alone_in_float32(own):
    """Long runs in float32 part in their last bits and then in their paths, but end alike."""
    G, E, _ = tiny_networks()
    images = own[0].float()
    options = dict(steps=150, latent_weight=0.0, tolerance=0.0)
    together = project(images, G, E, **options)
    alone = torch.cat([project(image[None], G, E, **options).losses for image in images])
    first = project(images, G, E, steps=1, latent_weight=0.0).losses
    assert together.w_plus.dtype == torch.float32
    assert ((together.losses - alone).abs() < 0.05 * first).all()


def test_the_same_again_is_the_same_to_the_last_bit(networks, own):
    runs = [project(own[0].float(), tiny_networks()[0], n_candidates=5, seed=3, steps=20) for _ in range(2)]
    assert torch.equal(runs[0].w_plus, runs[1].w_plus) and torch.equal(runs[0].losses, runs[1].losses)


def test_images_stop_when_they_gain_little(networks, own):
    images, _ = own
    coarse, fine = (project(images, networks[0], steps=300, tolerance=t) for t in (0.1, 1e-3))
    assert (coarse.n_steps < fine.n_steps).all() and (fine.n_steps < 300).any()
    assert (coarse.losses >= fine.losses).all()


# --- manners ---


def test_networks_are_left_as_they_were(own):
    G, E, D = tiny_networks()
    features = DiscriminatorFeatures(D)
    G.requires_grad_(True).train()
    G.conv1.conv.weight.requires_grad_(False)
    E.blocks.eval()
    E.stem.train()
    before = [(p.requires_grad, p.clone()) for n in (G, E, features) for p in n.parameters()]
    modes = [m.training for n in (G, E, features) for m in n.modules()]
    found = project(own[0][:2].float(), G, E, perceptual=features, steps=3)
    with pytest.raises(RuntimeError, match="broken"):
        project(own[0][:2].float(), G, _Broken())
    for (wanted, value), p in zip(before, (p for n in (G, E, features) for p in n.parameters())):
        assert p.requires_grad == wanted and p.grad is None and torch.equal(p, value)
    assert modes == [m.training for n in (G, E, features) for m in n.modules()]
    assert not any(t.requires_grad for t in (found.w_plus, found.images, found.losses))


class _Broken(torch.nn.Module):
    def forward(self, images):
        raise RuntimeError("broken")


def test_it_works_where_gradients_are_off(networks, own):
    with torch.no_grad():
        found = project(own[0][:2], networks[0], steps=5)
    assert (found.n_steps == 5).all()


def test_progress_counts_to_the_end(networks, own):
    seen = []
    project(own[0], networks[0], steps=40, tolerance=0.1, progress=lambda *now: seen.append(now))
    assert seen[-1] == (8 * 40, 8 * 40) and seen == sorted(seen)


def test_a_grey_generator_and_a_network_for_colours(own):
    torch.manual_seed(0)
    G = Generator(8, 16, 2, n_channels=1, channel_base=64, channel_max=8).eval()
    images = own[0][:2, :1].float().clamp(-1, 1)
    features = ChainFeatures([(0, 3, 8), (2, 8, 8), (5, 8, 16)])
    found = project(images, G, perceptual=features, mask=half_mask().float(), steps=5)
    assert found.images.shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda x: dict(images=x[:, :2]), r"\[N, 3, 8, 8\]"),
        (lambda x: dict(images=x[0]), r"\[N, 3, 8, 8\]"),
        (lambda x: dict(images=x[:0]), "at least 1"),
        (lambda x: dict(images=x.to(torch.uint8)), "uint8"),
        (lambda x: dict(images=x.numpy()), "ndarray"),
        (lambda x: dict(images=x.index_fill(0, torch.tensor([1]), torch.nan)), "nan in image 1"),
        (lambda x: dict(images=x * 100), r"\[-1, 1\]"),
        (lambda x: dict(mask=torch.ones(3, 1, 8, 8)), "mask must have shape"),
        (lambda x: dict(mask=torch.ones(1, 3, 8, 8)), "mask must have shape"),
        (lambda x: dict(mask=torch.full((1, 1, 8, 8), 1.5)), r"mask must lie in \[0, 1\]"),
        (lambda x: dict(mask=torch.full((1, 1, 8, 8), torch.nan)), r"mask must lie in \[0, 1\]"),
        (lambda x: dict(mask=torch.ones(2, 1, 8, 8).index_fill(0, torch.tensor([1]), 0)), "hides all of image 1"),
        (lambda x: dict(start=torch.zeros(2, 3, 16)), "start must be"),
        (lambda x: dict(start=torch.full((2, 4, 16), torch.nan)), "start must be"),
        (lambda x: dict(space="z"), "w, w_plus"),
        (lambda x: dict(method="sgd"), "lbfgs, adam"),
        (lambda x: dict(noise="random"), "const, none, optimize"),
        (lambda x: dict(steps=0), "steps"),
        (lambda x: dict(tolerance=-1.0), "tolerance"),
        (
            lambda x: dict(method="adam", history=5),
            "history = 5 has no effect without method 'lbfgs'",
        ),
        (lambda x: dict(history=0), "history must be a whole number, at least 1"),
        (lambda x: dict(noise_weight=1.0), "noise_weight = 1.0 has no effect without noise 'optimize'"),
        (lambda x: dict(noise="const", noise_weight=1.0), "noise_weight = 1.0 has no effect without noise 'optimize'"),
        (lambda x: dict(perceptual_weight=2.0), "perceptual_weight = 2.0 has no effect without a perceptual network"),
        (lambda x: dict(latent_weight=float("nan")), "latent_weight"),
        (lambda x: dict(lr=0.0), "lr"),
        (lambda x: dict(n_candidates=4, start=torch.zeros(2, 4, 16)), "n_candidates has no effect"),
        (lambda x: dict(encoder=tiny_networks()[1]), "float64"),
        (lambda x: dict(encoder=_Narrow()), "encoder must give"),
        (lambda x: dict(encoder=_Words()), "encoder must give .* got str"),
        (lambda x: dict(encoder=encoder_of(style_dim=8)), r"gives latents \[4, 8\] .* takes \[4, 16\]"),
        (lambda x: dict(encoder=encoder_of(style_dim=1)), r"gives latents \[4, 1\]"),
        (lambda x: dict(encoder=encoder_of(n_latent=6)), r"gives latents \[6, 16\]"),
        (lambda x: dict(encoder=encoder_of(n_latent=6, n_iterations=2)), r"gives latents \[6, 16\]"),
        (lambda x: dict(encoder=encoder_of(n_channels=1)), "with 1 channel, .* draws 3 channels"),
        (lambda x: dict(encoder="encoder.pt"), "encoder must be a network, got str"),
        (lambda x: dict(perceptual="lpips-vgg"), "perceptual must be a network, got str"),
        (lambda x: dict(generator="generator.pt"), "generator must be a Generator, got str"),
        (lambda x: dict(generator=tiny_networks()[1]), "generator must be a Generator, got PyramidEncoder"),
        (lambda x: dict(mask=torch.ones(2, 1, 8, 8).numpy()), "mask must be a tensor .* got ndarray"),
        (lambda x: dict(start=torch.zeros(2, 4, 16).numpy()), "start must be a tensor .* got ndarray"),
        (lambda x: dict(steps=1.5), "steps must be a whole number, at least 1, got 1.5"),
        (lambda x: dict(steps="5"), "steps must be a whole number"),
        (lambda x: dict(patience=2.5), "patience must be a whole number"),
        (lambda x: dict(n_candidates=1.5), "n_candidates must be a whole number, at least 0"),
        (lambda x: dict(seed=0.5), "seed must be a whole number"),
        (lambda x: dict(lr=-1.0), "lr must be a finite positive number"),
        (lambda x: dict(tolerance="small"), "tolerance must be a finite number"),
        (lambda x: dict(pixel_weight=float("inf")), "pixel_weight must be a finite number"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(networks, own, change, named):
    given = dict(images=own[0][:2], generator=networks[0]) | change(own[0][:2])
    with pytest.raises(InputError, match=named) as error:
        project(**given)
    assert one_sentence(error)


class _Narrow(torch.nn.Module):
    def forward(self, images):
        return images.new_zeros(len(images), 3, 16)


class _Words(torch.nn.Module):
    def forward(self, images):
        return "codes"


def encoder_of(n_latent=4, style_dim=16, n_channels=3, n_iterations=0):
    sizes = dict(channel_base=64, channel_max=8, head_width=4)
    return PyramidEncoder(RESOLUTION, n_latent, style_dim, n_channels, n_iterations=n_iterations, **sizes).double()


def test_a_damaged_generator_is_named(own):
    G = tiny_networks()[0]
    with torch.no_grad():
        G.input.input.fill_(torch.nan)
    for method in ("lbfgs", "adam"):
        with pytest.raises(InputError, match="image 0 is not a number") as error:
            project(own[0].float(), G, method=method)
        assert one_sentence(error)


def test_candidates_need_an_unconditional_generator(own):
    G = Generator(8, 16, 2, channel_base=64, channel_max=8, c_dim=3).eval()
    with pytest.raises(InputError, match="unconditional"):
        project(own[0].float(), G, n_candidates=4)
