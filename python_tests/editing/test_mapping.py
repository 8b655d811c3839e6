"""When the user is told that the seen categories are too few for class embedding mapping."""

from __future__ import annotations

import pytest
import torch

from sage_fast.editing.editor import PRESETS
from sage_fast.editing.mapping import ENOUGH, mapping_warning, usual_components
from sage_fast.factorization import CategoryRelevantDictionary
from sage_fast.factorization.held_shares import mean_held_share
from sage_fast.pipeline import FewShotPipeline

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
    [(6, 6, "take --method sage-i."), (30, 5, "take --n-components 10, which keeps 92 %, or --method sage-i.")],
    ids=["few categories", "few components"],
)
def test_the_number_and_the_remedy_are_named(S, n_components, remedy, rank=D):
    relevant, w_plus, labels = seen(S, rank)
    sentence = mapping_warning(relevant, w_plus, labels, n_components)
    share = mean_held_share(relevant, w_plus, labels, n_components)
    assert share < 0.8 and f"keeps {int(100 * share)} %" in sentence and sentence.endswith(remedy)
    assert f"({S} seen categories, {n_components} components of 16 dimensions)" in sentence


def test_as_many_components_as_an_image_of_a_new_category_needs(monkeypatch):
    relevant, w_plus, labels = seen(30, D)
    for least in (40, 16, 5, 1):
        monkeypatch.setitem(PRESETS["default"], "n_components", least)
        shares = [mean_held_share(relevant, w_plus, labels, n_components) for n_components in range(1, D + 1)]
        enough = next(number for number, share in enumerate(shares, 1) if share >= ENOUGH)
        assert usual_components(relevant, w_plus, labels) == max(min(least, D), enough) and 5 < enough < D
    assert usual_components(*seen(6, D)) == 6  # all that there are, though they keep less
    monkeypatch.setitem(PRESETS["default"], "n_components", 3)
    assert usual_components(*seen(6, 4)) == 4


def test_a_pipeline_takes_as_many_by_default(tiny_bundle, monkeypatch):
    pipeline = FewShotPipeline.from_bundle(tiny_bundle)
    S, _, width = pipeline.relevant.class_embeddings_.shape
    monkeypatch.setitem(PRESETS["default"], "n_components", 1)
    fewest = usual_components(pipeline.relevant, pipeline.codes.w_plus, pipeline.codes.labels)
    assert 1 < fewest <= min(S, width)
    assert pipeline.editor_settings("sage", 3)["n_components"] == fewest
    assert pipeline.editor_settings("sage-q", 1)["n_components"] == fewest
    assert pipeline.editor_settings("sage", 3, n_components=1)["n_components"] == 1
    assert "n_components" not in pipeline.editor_settings("sage-i", 3)
