"""What encoders of every kind do alike: one contract, from images to what shows them."""

import pytest
import torch

from sage_fast.errors import InputError
from sage_fast.models.encoder_kinds import KINDS, build_encoder, encoder_architecture
from sage_fast.models.encoders import PyramidEncoder
from sage_fast.models.hypernets import PyramidHypernet
from sage_fast.models.hyperstyle import HyperStyle
from sage_fast.models.image_encoder import resized
from sage_fast.models.stylegan2 import Generator
from sage_fast.models.weight_deltas import synthesize, weight_shapes


def _generator():
    torch.manual_seed(0)
    generator = Generator(16, 8, 2, channels=[12, 8, 4]).eval()
    generator.latent_avg.copy_(generator.mean_latent(100))
    return generator


def _encoder(kind, generator, seed=1, n_iterations=3):
    torch.manual_seed(seed)
    sizes = (16, 6, 8, 3, 64, 16, 4)
    if kind in ("psp", "e4e"):
        encoder = PyramidEncoder(*sizes, progressive=kind == "e4e")
    elif kind == "restyle":
        encoder = PyramidEncoder(*sizes, n_iterations=n_iterations)
    else:
        hypernet = PyramidHypernet(16, weight_shapes(generator), 3, 64, 16, head_width=4, rank=2)
        for rows in hypernet.rows:
            torch.nn.init.normal_(rows.weight, std=0.1)
        encoder = HyperStyle(PyramidEncoder(*sizes, progressive=True), hypernet, n_iterations)
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if name.endswith(".weight") and "heads" in name and weight.ndim == 3:
                weight.mul_(20)
    return encoder.eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_kind_gives_offsets_and_says_what_it_is(kind):
    generator = _generator()
    encoder, images = _encoder(kind, generator), torch.rand(3, 3, 16, 16) * 2 - 1
    found = encoder.invert(images, generator)
    assert encoder.kind == kind and found.offsets.shape == (3, 6, 8)
    assert (found.weight_deltas is not None) == (kind == "hyperstyle")
    about = encoder_architecture(encoder)
    assert about["kind"] == kind
    again = build_encoder(about)
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again.invert(images, generator).offsets, found.offsets)
    alone = encoder.invert(images[1:2], generator)
    torch.testing.assert_close(alone.offsets, found.offsets[1:2], rtol=1e-4, atol=1e-5)
    for one, all_ in zip(alone.weight_deltas or (), found.weight_deltas or ()):
        assert (one is None and all_ is None) or torch.allclose(one, all_[1:2], rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match=r"\[N, 3, 16, 16\] for this generator, got \[2, 3, 8, 8\]"):
        encoder.invert(torch.zeros(2, 3, 8, 8), generator)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_empty_batch(kind):
    generator = _generator()
    found = _encoder(kind, generator).invert(torch.zeros(0, 3, 16, 16), generator)
    assert found.offsets.shape == (0, 6, 8)
    assert all(delta is None or delta.shape[0] == 0 for delta in found.weight_deltas or ())


@torch.no_grad()
def test_restyle_corrects_as_often_as_it_says():
    generator = _generator()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    encoder = _encoder("restyle", generator, n_iterations=3)
    offsets, calls = torch.zeros(2, 6, 8), 0
    for _ in range(3):  # written out: the first image is that of latent_avg
        rendered = generator(offsets + generator.latent_avg, noise="const")
        offsets = offsets + encoder(torch.cat([images, rendered], 1))

    def count(module, args, output):
        nonlocal calls
        calls += 1

    encoder.register_forward_hook(count)
    torch.testing.assert_close(encoder.invert(images, generator, "const").offsets, offsets, rtol=1e-4, atol=1e-4)
    assert calls == 3


@torch.no_grad()
def test_hyperstyle_refines_the_same_code():
    generator = _generator()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    encoder = _encoder("hyperstyle", generator, n_iterations=2)
    found = encoder.invert(images, generator)
    code = encoder.w_encoder(images)
    assert torch.equal(found.offsets, code)
    first = encoder.hypernet(torch.cat([images, generator(code + generator.latent_avg, noise="none")], 1))
    rendered = synthesize(generator, code + generator.latent_avg, first, "none")
    second = encoder.hypernet(torch.cat([images, rendered], 1))
    for a, b, total in zip(first, second, found.weight_deltas):
        assert (a is None) == (total is None)
        if a is not None:
            torch.testing.assert_close(a + b, total, rtol=1e-4, atol=1e-5)
    assert [delta is None for delta in first] == [shape[2] == 1 for shape in weight_shapes(generator)]


def test_a_new_hypernetwork_changes_nothing():
    generator = _generator()
    with torch.no_grad():
        deltas = PyramidHypernet(16, weight_shapes(generator), 3, 64, 16, 4)(torch.randn(2, 6, 16, 16))
    assert all(delta is None or not delta.any() for delta in deltas)


@torch.no_grad()
def test_progressive_styles_are_deltas_of_the_first():
    generator = _generator()
    encoder, images = _encoder("e4e", generator), torch.rand(2, 3, 16, 16) * 2 - 1
    whole = encoder(images)
    plain = PyramidEncoder(16, 6, 8, 3, 64, 16, 4)
    plain.load_state_dict(encoder.state_dict())
    styles = plain(images)
    torch.testing.assert_close(whole[:, 1:], styles[:, :1] + styles[:, 1:])
    assert torch.equal(whole[:, 0], styles[:, 0])
    for stage in range(6):
        encoder.stage = stage
        staged = encoder(images)
        assert torch.equal(staged[:, : stage + 1], whole[:, : stage + 1])
        assert torch.equal(staged[:, stage + 1 :], whole[:, :1].expand(-1, 5 - stage, -1))


@torch.no_grad()
def test_one_style_is_an_encoder_into_w():
    encoder = PyramidEncoder(16, 6, 8, 3, 64, 16, 4, progressive=True, n_styles=1)
    offsets = encoder(torch.randn(2, 3, 16, 16))
    assert offsets.shape == (2, 6, 8) and torch.equal(offsets, offsets[:, :1].expand(-1, 6, -1))
    assert encoder.levels == [1]


def test_resizing():
    images = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert resized(images, 4) is images
    assert torch.equal(resized(images, 2)[0, 0], torch.tensor([[2.5, 4.5], [10.5, 12.5]]))
    assert resized(images, 8).shape == (1, 1, 8, 8)


def test_refuses_impossible_sizes():
    with pytest.raises(InputError, match="must not be negative"):
        PyramidEncoder(16, 6, 8, n_iterations=-1)
    with pytest.raises(InputError, match="n_styles must be 6, or from 1 with progressive, got 2"):
        PyramidEncoder(16, 6, 8, n_styles=2)
    with pytest.raises(InputError, match="at least 1"):
        HyperStyle(PyramidEncoder(16, 6, 8), PyramidHypernet(16, [(4, 4, 3)]), 0)
    with pytest.raises(InputError, match="3 x 3 layers"):
        PyramidHypernet(16, [(3, 4, 1)])
