"""When the user is told that the seen categories are too few for class embedding mapping."""

from __future__ import annotations

import pytest
import torch

from sage_fast.editing.mapping import mapping_warning, usual_components
from sage_fast.factorization import CategoryRelevantDictionary
from sage_fast.factorization.held_shares import mean_held_share

D = 16


def seen(S, rank):
    """Dictionary, 4 latents of each of S categories in ``rank`` directions of a layer, and labels."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(S).repeat_interleave(4)
    embeddings = torch.randn(S, 2, rank, generator=rng)[labels] + 0.3 * torch.randn(4 * S, 2, rank, generator=rng)
    w_plus = embeddings @ torch.randn(rank, D, generator=rng)
    return CategoryRelevantDictionary(1).fit(w_plus, labels), w_plus, labels


def test_nothing_is_said_where_the_others_span_the_latents():
    assert mapping_warning(*seen(30, D), D) is None
    assert mapping_warning(*seen(6, 4), 4) is None


@pytest.mark.parametrize(
    ("S", "n_components", "remedy"),
    [(6, 6, "take --method sage-i."), (30, 5, "take --n-components 16, which keeps 99 %, or --method sage-i.")],
    ids=["few categories", "few components"],
)
def test_the_number_and_the_remedy_are_named(S, n_components, remedy, rank=D):
    relevant, w_plus, labels = seen(S, rank)
    sentence = mapping_warning(relevant, w_plus, labels, n_components)
    share = mean_held_share(relevant, w_plus, labels, n_components)
    assert share < 0.8 and f"keeps {int(100 * share)} %" in sentence and sentence.endswith(remedy)
    assert f"({S} seen categories, {n_components} components of 16 dimensions)" in sentence


def test_as_many_components_as_there_can_be():
    assert [usual_components(*shape) for shape in ((200, 64), (12, 64), (200, 32))] == [40, 12, 32]
