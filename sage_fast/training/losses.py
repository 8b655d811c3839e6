"""Losses as plain functions of tensors, each returning a scalar.

[StyleGAN2] is Karras et al. 2020; its R1 is Mescheder et al. 2018, its logistic loss Goodfellow et al. 2014.
[DIP] is "Data Instance Prior for Transfer Learning in GANs"; its Eq. 1 is the hinge loss of Tran et al. 2017.
[SAGE] losses of the dictionary itself (Eq. 10, 12, 13) live with the dictionary, in ``factorization``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "code_norm", "hinge_d", "hinge_g", "logistic_d", "nonsaturating_g", "path_length_penalty", "pixel_mse", "r1_penalty",
]  # fmt: skip


def nonsaturating_g(fake: Tensor) -> Tensor:
    """Non-saturating logistic loss of the generator: mean of ``-log sigmoid(D(G(w)))`` over logits ``fake`` [N, 1].

    The generator's side of the loss that [StyleGAN2] trains with (its section 2 and appendix B).
    """
    return F.softplus(-fake).mean()


def logistic_d(real: Tensor, fake: Tensor) -> Tensor:
    """Logistic loss of the discriminator: mean of ``-log sigmoid(real) - log(1 - sigmoid(fake))``, logits [N, 1]."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def hinge_g(fake: Tensor) -> Tensor:
    """Hinge loss of the generator: mean of ``-D(G(w))`` over logits ``fake`` [N, 1]: [DIP], Eq. 1."""
    return -_wide(fake).mean()


def hinge_d(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator: mean of ``max(0, 1 - real) + max(0, 1 + fake)``: [DIP], Eq. 1."""
    return F.relu(1 - _wide(real)).mean() + F.relu(1 + _wide(fake)).mean()


def r1_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """Squared norm of the logits' gradient at the real images (or latents), mean over the batch.

    The caller multiplies with gamma / 2 (and with the interval, when lazy: [StyleGAN2], appendix B, Eq. 1).

    Args:
        logits: [N, 1], computed from ``images`` with gradients recorded.
        images: [N, C, H, W] real images, or latents [N, D], with ``requires_grad``.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.square().sum(list(range(1, gradient.ndim))).mean()


def path_length_penalty(images: Tensor, w_plus: Tensor, mean: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance of the path lengths ``|J_w^T y|_2`` from their running mean a: [StyleGAN2], Eq. 4.

    Deviation: a is the mean before these lengths enter it (the caller does that), so that the micro-batches and ranks
    that share a batch measure from one a; StyleGAN2's own code lets them enter first, with weight 0.01.

    Args:
        images: [N, C, H, W] generated from ``w_plus`` with gradients recorded.
        w_plus: [N, L, D] latents.
        mean: scalar, the running mean a.
        noise: y, [N, C, H, W] standard normal.
    Returns:
        (penalty, the mean of these lengths, without gradient). A layer's share is averaged over the L layers, so that w_plus with
        one shared w has the scale of w.
    """
    y = noise / math.sqrt(images.shape[2] * images.shape[3])
    (gradient,) = torch.autograd.grad((images * y).sum(), w_plus, create_graph=True)  # [N, L, D]
    lengths = gradient.square().sum(2).mean(1).sqrt()  # [N]
    return (lengths - mean).square().mean(), lengths.mean().detach()


def pixel_mse(images: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over images, channels and pixels, both [N, C, H, W] in [-1, 1]: the first term of [SAGE] Eq. 11."""
    return F.mse_loss(images, target)


def code_norm(offsets: Tensor) -> Tensor:
    """Mean Euclidean norm of the offsets [N, L, D] from ``latent_avg`` over images and layers.

    The regulariser of pSp (Richardson et al. 2021, Eq. 3): it keeps codes where the generator was trained.
    Deviation: a norm per layer instead of one over all layers, so that its scale does not depend on L.
    """
    return offsets.square().sum(2).add(1e-12).sqrt().mean()


def _wide(logits: Tensor) -> Tensor:
    """At least float32: a mean of bfloat16 logits would be rounded to three digits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
