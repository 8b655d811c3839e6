"""The share that the other categories hold, against bases that are made anew without each category."""

from __future__ import annotations

import pytest
import torch

from sage_fast.errors import InputError
from sage_fast.factorization import CategoryRelevantDictionary
from sage_fast.factorization.held_shares import held_shares, mean_held_share


def brute_force(embeddings, w_plus, labels, n_components):
    """Eq. 16 and 17 in float64, one decomposition for each latent."""
    shares = []
    for w, label in zip(w_plus.double(), labels.tolist()):
        others = torch.cat([embeddings[:label], embeddings[label + 1 :]]).double()
        V = torch.linalg.svd(others.transpose(0, 1), full_matrices=False).Vh[:, :n_components]  # [L, R, D]
        lost = w - torch.einsum("lrd,lr->ld", V, torch.einsum("lrd,ld->lr", V, w))
        shares.append(1 - lost.square().sum() / (w - others.mean(0)).square().sum())
    return torch.stack(shares).clamp(0, 1)


def made(S, D, n_each=3, L=2, seed=0):
    """Dictionary, latents and labels; directions of falling size, a mean far from 0."""
    rng = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(0, -2, D, dtype=torch.float64)
    embeddings = (torch.randn(S, L, D, generator=rng) + 1) * sizes
    labels = torch.arange(S).repeat(n_each)[torch.randperm(S * n_each, generator=rng)]
    w_plus = embeddings[labels] + torch.randn(len(labels), L, D, generator=rng) * sizes
    return CategoryRelevantDictionary.from_class_embeddings(embeddings, 1), w_plus, labels


@pytest.mark.parametrize(
    ("S", "D", "n_components"),
    [(20, 8, 1), (20, 8, 3), (20, 8, 8), (9, 8, 8), (8, 8, 8), (8, 8, 7), (8, 20, 3), (8, 20, 8), (2, 5, 1), (2, 5, 2), (40, 70, 30)],
)  # fmt: skip
def test_shares_are_those_of_bases_made_anew(S, D, n_components):
    relevant, w_plus, labels = made(S, D)
    embeddings, own = relevant.class_embeddings_, torch.arange(S)
    for latents, categories in ((w_plus, labels), (embeddings, own)):
        expected = brute_force(embeddings, latents, categories, n_components)
        shares = held_shares(relevant, latents, categories, n_components)
        torch.testing.assert_close(shares, expected, atol=1e-7, rtol=0)
        single = CategoryRelevantDictionary.from_class_embeddings(embeddings.float(), 1)
        shares = held_shares(single, latents.float(), categories, n_components)
        torch.testing.assert_close(shares, expected, atol=1e-4, rtol=0)


def test_categories_that_span_the_space_hold_everything():
    relevant, w_plus, labels = made(30, 8)
    assert held_shares(relevant, w_plus, labels, 8).min() > 0.9999
    assert held_shares(relevant, w_plus, labels, 2).mean() < 0.97


def test_categories_at_right_angles_hold_nothing_of_each_other():
    embeddings = torch.eye(12)[:, None].repeat(1, 3, 1)
    relevant = CategoryRelevantDictionary.from_class_embeddings(embeddings, 1)
    shares = held_shares(relevant, embeddings, torch.arange(12), 12)
    # all of e is lost, 1 of |e - m|^2 = 1 + 1 / 11
    torch.testing.assert_close(shares, torch.full((12,), 1 / 12, dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_category_counts_as_left_out():
    """One of many is far from the rest: its own embedding is a direction of the basis of all, and not of the others'."""
    relevant, _, _ = made(20, 40)
    embeddings = relevant.class_embeddings_.clone()
    embeddings[5] = 0
    embeddings[5, :, 39] = 100
    relevant = CategoryRelevantDictionary.from_class_embeddings(embeddings, 4)
    assert held_shares(relevant, embeddings[5:6], torch.tensor([5])) < 0.01
    torch.testing.assert_close(relevant.project(embeddings[5:6]), embeddings[5:6], atol=0.1, rtol=0)


def test_equal_categories_and_empty_layers_do_no_harm():
    relevant, w_plus, labels = made(6, 8, n_each=2)
    twice = torch.cat([relevant.class_embeddings_] * 2)
    twice[:, 1], w_plus[:, 1] = 0, 0
    relevant = CategoryRelevantDictionary.from_class_embeddings(twice, 1)
    shares = held_shares(relevant, w_plus, labels, 4)
    torch.testing.assert_close(shares, brute_force(twice, w_plus, labels, 4), atol=1e-7, rtol=0)
    assert held_shares(relevant, twice, torch.arange(12), 6).min() > 0.9999  # each has its double among the others
    nothing = CategoryRelevantDictionary.from_class_embeddings(torch.zeros(5, 2, 4), 1)
    assert bool(held_shares(nothing, torch.zeros(5, 2, 4), torch.arange(5), 2).isfinite().all())


def test_a_single_category_has_no_others():
    relevant = CategoryRelevantDictionary.from_class_embeddings(torch.randn(1, 2, 4), 1)
    assert held_shares(relevant, torch.randn(3, 2, 4), torch.zeros(3, dtype=torch.int64)).tolist() == [0, 0, 0]


def test_the_order_of_the_latents_does_not_show():
    relevant, w_plus, labels = made(20, 8)
    shares, order = held_shares(relevant, w_plus, labels, 3), torch.randperm(len(labels))
    torch.testing.assert_close(held_shares(relevant, w_plus[order], labels[order], 3), shares[order])


@pytest.mark.parametrize("n_each", [1, 3, 20])
def test_the_mean_is_over_evenly_spaced_latents_of_evenly_spaced_categories(n_each):
    relevant, w_plus, labels = made(70, 8, n_each)
    labels = torch.where(labels == 69, 68, labels)  # one without a latent here
    rows = []
    for number in range(32):
        mine = (labels == number * 69 // 32).nonzero().flatten().tolist()
        count = min(8, len(mine))
        rows += [mine[k * len(mine) // count] for k in range(count)]
    expected = held_shares(relevant, w_plus[rows], labels[rows], 3).mean()
    assert mean_held_share(relevant, w_plus, labels, 3) == pytest.approx(float(expected), abs=1e-12)


def test_what_does_not_belong_together_is_refused():
    relevant, w_plus, labels = made(6, 8)
    for arguments in (
        (w_plus[..., :5], labels, 2),
        (w_plus, labels + 1, 2),
        (w_plus, labels[1:], 2),
        (w_plus, labels, 7),
    ):
        with pytest.raises(InputError):
            held_shares(relevant, *arguments)
