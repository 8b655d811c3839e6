"""Sampling: the moments of the pooled codes, the same bits however samples are split, masked directions untouched."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from sage_fast.editing import distribution as module
from sage_fast.editing.distribution import ClassDistribution, sample_together
from sage_fast.errors import InputError

L, D, K, M = 3, 8, 4, 40


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _pooled():
    """Codes [M, L, K] whose layers move together."""
    codes = _random(M, 5) @ _random(5, L * K, seed=1) + 0.1 * _random(M, L * K, seed=2)
    return codes.view(M, L, K)


def _distribution(kind="joint", shrinkage=0.0, n_bases=1, **changes):
    codes = _pooled() + 1
    mean = codes.mean(0)
    made = ClassDistribution(
        class_embedding=_random(L, D, seed=3),
        bases=_random(n_bases, L, D, seed=4),
        similar_categories=torch.arange(3),
        mean=mean,
        direction_mask=torch.ones(L, K, dtype=torch.bool),
        directions=_random(L, D, K, seed=5),
        codes=codes,
        rows=torch.arange(M),
        kind=kind,
        shrinkage=shrinkage,
    )
    return dataclasses.replace(made, **changes)


def test_joint_covariance_is_that_of_numpy_over_all_layers_at_once():
    expected = np.cov(_pooled().flatten(1).double().numpy(), rowvar=False)
    np.testing.assert_allclose(_distribution().covariance().numpy(), expected, atol=1e-5)
    blocks = _distribution("per_layer").covariance()
    for layer in range(L):
        part = slice(layer * K, (layer + 1) * K)
        np.testing.assert_allclose(blocks[layer].numpy(), expected[part, part], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "shrinkage"), [("joint", 0.0), ("joint", 0.4), ("per_layer", 0.0), ("per_layer", 0.4), ("diagonal", 0.0)]
)
def test_the_map_from_noise_to_codes_squares_to_the_covariance(kind, shrinkage):
    """The codes are mean + F eps, so F F^T is their covariance exactly: no sampling error."""
    distribution = _distribution(kind, shrinkage)
    F = (distribution.codes_with(torch.eye(distribution.n_random)) - distribution.mean).flatten(1).T  # [L K, n_random]
    expected = distribution.covariance()
    if kind != "joint":
        expected = torch.block_diag(*expected)
    torch.testing.assert_close(F @ F.T, expected, atol=1e-4, rtol=1e-4)
    at_zero = distribution.codes_with(torch.zeros(1, distribution.n_random))
    torch.testing.assert_close(at_zero[0], distribution.mean)


def test_shrinkage_keeps_the_variances_and_scales_the_rest():
    full, half = _distribution().covariance(), _distribution(shrinkage=0.5).covariance()
    torch.testing.assert_close(half.diagonal(), full.diagonal())
    off = ~torch.eye(L * K, dtype=torch.bool)
    torch.testing.assert_close(half[off], 0.5 * full[off])
    torch.testing.assert_close(_distribution(shrinkage=1.0).covariance(), torch.diag(full.diagonal()))


@pytest.mark.parametrize("kind", ["joint", "per_layer"])
def test_sample_moments(kind):
    """Drawn latents, back as codes: layers move together only in the joint draw."""
    distribution = _distribution(kind)
    w_plus = distribution.sample(6000, alpha=1.0, rng=torch.Generator().manual_seed(0))
    edits = w_plus - distribution.bases[0]
    codes = torch.einsum("lkd,nld->nlk", torch.linalg.pinv(distribution.directions), edits).flatten(1).double().numpy()
    expected = distribution.covariance()
    expected = (expected if kind == "joint" else torch.block_diag(*expected)).numpy()
    scale = np.sqrt(np.outer(expected.diagonal(), expected.diagonal()))
    assert np.abs((np.cov(codes, rowvar=False) - expected) / scale).max() < 0.08
    assert np.abs((codes.mean(0) - distribution.mean.flatten().numpy()) / scale.diagonal() ** 0.5).max() < 0.08


@pytest.mark.parametrize("kind", ["joint", "per_layer", "diagonal"])
@pytest.mark.parametrize("sizes", [(1,) * 5 + (145,), (63, 1, 64, 22), (7, 130, 13), (150,)])
def test_samples_do_not_depend_on_how_the_batch_is_split(kind, sizes):
    distribution = _distribution(kind, n_bases=3)
    noise = _random(150, distribution.n_random)
    whole = distribution.sample_with(noise)
    first, parts = 0, []
    for size in sizes:
        parts.append(distribution.sample_with(noise[first : first + size], first=first))
        first += size
    assert torch.equal(torch.cat(parts), whole)


def test_samples_do_not_depend_on_the_split_at_the_size_of_a_matrix_product():
    pooled = _random(700, 8, 60)
    distribution = _distribution(
        codes=pooled, rows=torch.arange(700), mean=torch.zeros(8, 60), directions=_random(8, 64, 60), bases=_random(1, 8, 64),
        direction_mask=torch.ones(8, 60, dtype=torch.bool),
    )  # fmt: skip
    noise = _random(70, 700)
    whole = distribution.sample_with(noise)
    alone = [distribution.sample_with(noise[i : i + 1], first=i) for i in (0, 5, 31, 63, 64, 69)]
    assert torch.equal(torch.cat(alone), whole[[0, 5, 31, 63, 64, 69]])


def test_one_random_stream_can_be_drawn_in_batches():
    distribution = _distribution()
    assert distribution.n_random % 16 != 0
    whole = distribution.sample(48, rng=torch.Generator().manual_seed(3))
    rng = torch.Generator().manual_seed(3)
    parts = [distribution.sample(16, rng=rng), distribution.sample(32, rng=rng, first=16)]
    assert torch.equal(torch.cat(parts), whole)
    other = distribution.sample(48, rng=torch.Generator().manual_seed(4))
    assert not torch.equal(other, whole)


def test_alpha_zero_returns_the_bases_in_turn():
    distribution = _distribution(n_bases=3)
    w_plus = distribution.sample(7, alpha=0.0, first=2)
    assert torch.equal(w_plus, distribution.bases[[2, 0, 1, 2, 0, 1, 2]])


def test_alpha_scales_the_edit_and_defaults_to_the_distribution_s():
    distribution = _distribution(alpha=3.0)
    noise = _random(5, distribution.n_random)
    edits = {a: distribution.sample_with(noise, a) - distribution.bases[0] for a in (None, 1.0, 3.0)}
    torch.testing.assert_close(edits[3.0], 3 * edits[1.0], atol=1e-4, rtol=1e-4)
    assert torch.equal(edits[None], edits[3.0])


def test_masked_directions_are_not_used():
    mask = torch.zeros(L, K, dtype=torch.bool)
    mask[0, 1] = mask[1] = True
    distribution = _distribution(direction_mask=mask)
    edits = distribution.sample(20, rng=torch.Generator().manual_seed(0)) - distribution.bases[0]
    codes = torch.einsum("lkd,nld->nlk", torch.linalg.pinv(distribution.directions), edits)
    assert codes[:, ~mask].abs().max() < 1e-4 and codes[:, mask].abs().amin(0).max() > 1e-3
    assert (edits[:, 2] == 0).all()


def _several():
    """Distributions of one editor with other codes, bases and masks, and the arguments of each."""
    directions, codes = _random(L, D, K, seed=5), _pooled() + 1
    made = []
    for i, n_bases in enumerate((1, 3, 2)):
        rows, mask = torch.arange(i, M, 2), _random(L, K, seed=20 + i) > -0.5
        parts = {
            "directions": directions,
            "codes": codes,
            "rows": rows,
            "direction_mask": mask,
            "mean": codes[rows].mean(0),
        }
        made.append(_distribution(n_bases=n_bases, **parts))
    noise = [_random(n, d.n_random, seed=30 + n) for n, d in zip((5, 1, 70), made)]
    return made, noise, [0, 7, 130]


@pytest.mark.parametrize("alphas", [(None, None, None), (0.5, 0.5, 0.5), (None, 0.5, 3.0)])
@pytest.mark.parametrize("which", [[0, 1, 2], [1], [1, 0], [2, 2, 1]])
def test_distributions_sampled_together_give_the_bits_of_each(alphas, which):
    made, noise, firsts = _several()
    args = [[values[i] for i in which] for values in (made, noise, alphas, firsts)]
    expected = torch.cat([d.sample_with(eps, alpha, first) for d, eps, alpha, first in zip(*args)])
    assert torch.equal(sample_together(*args), expected)


def test_distributions_of_other_kinds_are_sampled_one_by_one(monkeypatch):
    made, noise, firsts = _several()
    monkeypatch.setattr(module, "edit_latents", None)  # of the grouped call; sample_with is replaced below
    calls = []
    monkeypatch.setattr(
        ClassDistribution, "sample_with", lambda self, *rest: calls.append(rest) or torch.zeros(1, L, D)
    )
    diagonal = dataclasses.replace(made[1], kind="diagonal")
    assert sample_together([made[0], diagonal], noise[:2], [None, None], firsts[:2]).shape == (2, L, D)
    other = dataclasses.replace(made[1], directions=made[1].directions.clone())
    sample_together([made[0], other], noise[:2], [None, None], firsts[:2])
    monkeypatch.setattr(module._native, "has_kernel", lambda *_: False)
    sample_together(made[:2], noise[:2], [None, None], firsts[:2])
    assert len(calls) == 6


def test_none_and_misuse():
    distribution = _distribution()
    assert distribution.sample(0).shape == (0, L, D)
    with pytest.raises(InputError, match=rf"noise must be torch.float32 \[n, {M}\]"):
        distribution.sample_with(torch.zeros(2, M + 1))
    with pytest.raises(InputError, match="got torch.float64"):
        distribution.sample_with(torch.zeros(2, M, dtype=torch.float64))
    with pytest.raises(InputError, match="first"):
        distribution.sample(2, first=-1)
    with pytest.raises(InputError, match="n, how many to draw, must be 0 or more, got -1"):
        distribution.sample(-1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        distribution.alpha = 1.0
