"""Fusion: what is the identity, what each blend does with the mask, and frequencies against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from sage_fast.errors import InputError
from sage_fast.fusion import fuse_both, fuse_frequencies, fuse_pixels, fusion_mask, gaussian_low_pass


def _images(n=4, size=16, seed=0, channels=3):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (4, 1, 9, 13), (2, 4, 1, 1)])
def test_a_perfect_inversion_leaves_the_edited_image(shape):
    real, edited = _images(1).expand(4, 3, 16, 16).reshape(-1)[: np.prod(shape)].view(shape), torch.rand(shape)
    torch.testing.assert_close(fuse_frequencies(real, real, edited), edited, atol=1e-6, rtol=0)
    assert torch.equal(fuse_pixels(real, real, edited), edited)


def test_an_unedited_image_gets_the_real_one_s_low_frequencies():
    real, inverted = _images(seed=1), _images(seed=2)
    fused = fuse_frequencies(real, inverted, inverted)
    torch.testing.assert_close(gaussian_low_pass(fused - inverted, 2), gaussian_low_pass(
        gaussian_low_pass(real - inverted), 2), atol=1e-6, rtol=0)  # fmt: skip
    spectrum = lambda x: np.fft.fft2(x.double().numpy())  # noqa: E731
    high = np.hypot(*np.meshgrid(np.fft.fftfreq(16, 1 / 16), np.fft.fftfreq(16, 1 / 16))) > 10
    change = np.abs(spectrum(fused) - spectrum(inverted))[..., high]
    assert change.max() < 0.15 * np.abs(spectrum(real - inverted)).max()


def test_the_wider_the_pass_band_the_nearer_the_real_image():
    real, inverted = _images(seed=1), _images(seed=2)
    errors = [(fuse_frequencies(real, inverted, inverted, sigma=s) - real).norm().item() for s in (1, 3, 5, 20, 1e4)]
    assert all(a > b for a, b in zip(errors, errors[1:], strict=False)) and errors[-1] < 1e-3


@pytest.mark.parametrize(("gamma1", "gamma2"), [(1.0, 1.0), (0.8, 0.3), (0.0, 1.0)])
def test_frequencies_are_those_of_numpy(gamma1, gamma2):
    real, inverted, edited = (_images(seed=s).double() for s in range(3))
    d2 = np.add.outer(np.fft.fftfreq(16, 1 / 16) ** 2, np.fft.fftfreq(16, 1 / 16) ** 2)
    low = lambda x: np.fft.ifft2(np.fft.fft2(x.numpy()) * np.exp(-d2 / 50)).real  # noqa: E731
    expected = edited.numpy() - low(edited) + gamma1 * low(edited) + low(real) - gamma2 * low(inverted)  # Eq. 23
    np.testing.assert_allclose(fuse_frequencies(real, inverted, edited, gamma1, gamma2), expected, atol=1e-9)
    raw = gamma1 * edited.numpy() + low(real) - gamma2 * low(inverted)
    bottom, top = raw.min((2, 3), keepdims=True), raw.max((2, 3), keepdims=True)
    released = fuse_frequencies(real, inverted, edited, gamma1, gamma2, reading="released")
    np.testing.assert_allclose(released, 2 * (raw - bottom) / (top - bottom) - 1, atol=1e-9)


@pytest.mark.parametrize("fuse", [fuse_pixels, fuse_frequencies])
def test_one_source_serves_many_edits(fuse):
    real, inverted, edited = _images(1, seed=1), _images(1, seed=2), _images(4, seed=3)
    each = [fuse(real, inverted, e[None]) for e in edited]
    torch.testing.assert_close(fuse(real, inverted, edited), torch.cat(each))


@pytest.mark.parametrize("reading", ["default", "released"])
@pytest.mark.parametrize("sources, gamma1", [(1, 1.0), (1, 0.8), (4, 1.0)])
def test_both_is_frequencies_then_pixels(sources, gamma1, reading):
    real, inverted, edited = _images(sources, seed=1), _images(sources, seed=2), _images(4, seed=3)
    first = fuse_frequencies(real, inverted, edited, gamma1, 0.8, 3.0, reading).clamp(-1, 1)
    expected = fuse_pixels(real, inverted, first, 0.3, "convex", reading)
    both = fuse_both(real, inverted, edited, gamma1, 0.8, 3.0, 0.3, "convex", reading)
    torch.testing.assert_close(both, expected, atol=1e-6, rtol=0)


def test_mask_is_the_blurred_difference_of_norms():
    """scipy's Gaussian, cut to 3 x 3 pixels, mirrors about the outermost pixel too."""
    real, inverted, edited = (_images(seed=s).double() for s in range(3))
    norm = lambda x: np.sqrt(((x.numpy() / 2) ** 2).sum(1))  # noqa: E731
    sharp = norm(real - inverted) - norm(edited - inverted)
    expected = np.stack([gaussian_filter(s, 1.3, mode="mirror", radius=1) for s in sharp]).clip(0, 1)
    mask = fusion_mask(real, inverted, edited, beta=1.0)
    assert mask.shape == (4, 1, 16, 16)
    np.testing.assert_allclose(mask[:, 0], expected, atol=1e-9)
    assert (mask == 0).any() and (mask > 0.1).any()


def test_released_mask_is_stretched_in_each_image():
    real, inverted, edited = (_images(seed=s).double() for s in range(3))
    stretched = []
    for x in (real - inverted, edited - inverted):
        total = x.abs().sum(1).numpy()
        bottom, top = total.min((1, 2), keepdims=True), total.max((1, 2), keepdims=True)
        stretched.append((total - bottom) / (top - bottom))
    sharp = (stretched[0] - 0.5 * stretched[1]).clip(0)
    expected = np.stack([gaussian_filter(s, 1.3, mode="mirror", radius=1) for s in sharp])
    np.testing.assert_allclose(fusion_mask(real, inverted, edited, reading="released")[:, 0], expected, atol=1e-9)


def test_blends_differ_by_what_they_add():
    real, inverted, edited = _images(seed=1), _images(seed=2), _images(seed=3)
    mask = fusion_mask(real, inverted, edited)
    made = {b: fuse_pixels(real, inverted, edited, blend=b) for b in ("residual", "convex", "printed")}
    torch.testing.assert_close(made["residual"] - edited, mask * (real - inverted))
    torch.testing.assert_close(made["convex"], (1 - mask) * edited + mask * real)
    torch.testing.assert_close((made["printed"] + 1) / 2, (edited + 1) / 2 + mask * (real + 1) / 2)
    assert torch.maximum(made["convex"] - torch.maximum(real, edited), torch.zeros(1)).max() < 1e-6


def test_more_beta_fuses_less():
    real, inverted, edited = _images(seed=1), _images(seed=2), _images(seed=3)
    totals = [fusion_mask(real, inverted, edited, beta).sum().item() for beta in (0.0, 0.5, 1.0, 5.0)]
    assert all(a > b for a, b in zip(totals, totals[1:], strict=False))


@pytest.mark.parametrize("fuse", [fuse_pixels, fuse_frequencies, fuse_both])
def test_refuses_images_that_do_not_belong_together(fuse):
    images = _images()
    with pytest.raises(InputError, match=r"real must have shape \[4, 3, 16, 16\].*got \[2, 3, 16, 16\]"):
        fuse(images[:2], images, images)
    with pytest.raises(InputError, match="inverted must have shape"):
        fuse(images, images[:, :1], images)
    with pytest.raises(InputError, match="edited must be floating point"):
        fuse(images, images, images.to(torch.uint8))
    with pytest.raises(InputError, match="reading must be one of"):
        fuse(images, images, images, reading="mine")


def test_refuses_settings():
    images = _images()
    with pytest.raises(InputError, match="blend must be one of residual, convex, printed, got 'mix'"):
        fuse_pixels(images, images, images, blend="mix")
    with pytest.raises(InputError, match="sigma must be positive"):
        fuse_frequencies(images, images, images, sigma=0)
