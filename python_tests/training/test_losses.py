"""The losses against their definitions."""

import math

import pytest
import torch

from sage_fast.training.losses import (
    code_norm,
    hinge_d,
    hinge_g,
    logistic_d,
    nonsaturating_g,
    path_length_penalty,
    pixel_mse,
    r1_penalty,
)


def test_logistic_losses_are_the_cross_entropies():
    real, fake = torch.randn(6, 1), torch.randn(6, 1)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    torch.testing.assert_close(nonsaturating_g(fake), entropy(fake, torch.ones_like(fake)))
    expected = entropy(real, torch.ones_like(real)) + entropy(fake, torch.zeros_like(fake))
    torch.testing.assert_close(logistic_d(real, fake), expected)
    assert nonsaturating_g(torch.tensor([[-1e4]])) == 1e4  # no overflow


def test_hinge_losses():
    real, fake = torch.tensor([[2.0], [0.5], [-1.0]]), torch.tensor([[-3.0], [0.0], [1.0]])
    torch.testing.assert_close(hinge_d(real, fake), torch.tensor((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))
    torch.testing.assert_close(hinge_g(fake), torch.tensor(2 / 3))
    logits = torch.full((3, 1), 1.0).bfloat16() + torch.tensor([[0.0], [1 / 64], [1 / 32]]).bfloat16()
    torch.testing.assert_close(hinge_g(logits), -logits.double().mean().float())  # in bfloat16 it would lose digits


def test_r1_of_a_linear_discriminator_is_its_squared_norm():
    weight = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    images = torch.randn(5, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    penalty = r1_penalty((images * weight).sum([1, 2, 3]).unsqueeze(1), images)
    torch.testing.assert_close(penalty, weight.square().sum())
    penalty.backward()
    torch.testing.assert_close(weight.grad, 2 * weight)


def test_path_length_of_a_linear_generator():
    torch.manual_seed(0)
    a = torch.randn(2, 4, 3 * 8 * 8, dtype=torch.float64, requires_grad=True)  # L = 2, D = 4
    w_plus = torch.randn(6, 2, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    images = torch.einsum("nld,ldp->np", w_plus, a).view(6, 3, 8, 8)
    mean = torch.tensor(2.0, dtype=torch.float64)
    penalty, length = path_length_penalty(images, w_plus, mean, y)
    gradient = torch.einsum("np,ldp->nld", y.flatten(1), a) / 8
    lengths = gradient.square().sum(2).mean(1).sqrt()
    torch.testing.assert_close(length, lengths.mean())
    torch.testing.assert_close(penalty, (lengths - mean).square().mean())
    assert not length.requires_grad
    penalty.backward()
    assert a.grad.abs().sum() > 0


def test_reconstruction_terms():
    a = torch.zeros(2, 3, 4, 4)
    assert pixel_mse(a, a + 0.5) == 0.25
    offsets = torch.full((2, 3, 4), 0.5)
    assert code_norm(offsets).item() == pytest.approx(math.sqrt(4 * 0.25))
    zero = torch.zeros(2, 3, 4, requires_grad=True)
    code_norm(zero).backward()
    assert torch.isfinite(zero.grad).all()
