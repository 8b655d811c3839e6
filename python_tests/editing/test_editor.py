"""The editor: four methods as two switches, three readings, and retrieval that finds the category it should."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sage_fast.editing.editor import METHODS, PRESETS, FewShotEditor
from sage_fast.errors import InputError
from sage_fast.factorization.category_irrelevant import CategoryIrrelevantDictionary
from sage_fast.factorization.category_relevant import CategoryRelevantDictionary

S, PER_CLASS, L, D, K = 12, 9, 8, 20, 6


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def seen():
    """Categories in two families far apart; the second varies four times as much, along other directions."""
    labels = torch.arange(S * PER_CLASS) % S
    family = (torch.arange(S) >= S // 2).long()
    means = _random(2, L, D)[family] * 3 + 0.3 * _random(S, L, D, seed=1)
    directions = torch.linalg.qr(_random(L, D, K, seed=2))[0]
    use = torch.tensor([[1.0, 1, 1, 0.1, 0.1, 0.1], [0.4, 0.4, 0.4, 4, 4, 4]])[family]
    codes = _random(len(labels), L, K, seed=3) * use[labels].unsqueeze(1)
    return means[labels] + torch.einsum("ldk,nlk->nld", directions, codes), labels, directions


@pytest.fixture(scope="module")
def dictionaries(seen):
    w_plus, labels, directions = seen
    return CategoryRelevantDictionary(5).fit(w_plus, labels), CategoryIrrelevantDictionary(directions)


@pytest.fixture
def shots(seen):
    return seen[0][seen[1] == 8][:3]


def _adapt(seen, dictionaries, shots, **settings):
    return FewShotEditor(*dictionaries, **{"n_similar": 4, "n_directions": 3, **settings}).fit(*seen[:2]).adapt(shots)


def test_methods_are_the_two_switches():
    switches = {name: (m["class_embedding_mapping"], m["adaptive_editing"]) for name, m in METHODS.items()}
    assert switches == {
        "age": (False, False), "sage-q": (True, False), "sage-i": (False, True), "sage": (True, True),
    }  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_what_each_method_edits_and_draws_from(seen, dictionaries, shots, method):
    distribution = _adapt(seen, dictionaries, shots, **METHODS[method])
    relevant, _ = dictionaries
    if METHODS[method]["class_embedding_mapping"]:
        torch.testing.assert_close(distribution.bases, relevant.project(shots).mean(0, keepdim=True))
    else:
        assert torch.equal(distribution.bases, shots)  # each shot its own base
    if METHODS[method]["adaptive_editing"]:
        assert len(distribution.similar_categories) == 4 and len(distribution.pooled) == 4 * PER_CLASS
        assert (distribution.direction_mask.sum(1) == 3).all()
    else:
        assert distribution.similar_categories.tolist() == list(range(S)) and len(distribution.pooled) == S * PER_CLASS
        assert distribution.direction_mask.all()
    torch.testing.assert_close(distribution.class_embedding, relevant.project(shots).mean(0))


def test_the_class_embedding_is_the_projection_of_the_shots_mean(seen, dictionaries):
    shots = seen[0][:5]
    one_by_one = torch.stack([_adapt(seen, dictionaries, shot[None]).class_embedding for shot in shots])
    together = _adapt(seen, dictionaries, shots).class_embedding
    torch.testing.assert_close(together, one_by_one.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together, dictionaries[0].project(shots.mean(0, keepdim=True))[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reading", ["paper", "released", "default"])
def test_similar_categories_are_of_the_same_family_nearest_first(seen, dictionaries, reading):
    relevant, _ = dictionaries
    for category in (1, 8):
        shots = relevant.class_embeddings_[category][None]
        found = _adapt(seen, dictionaries, shots, reading=reading, n_similar=S // 2).similar_categories
        assert found[0] == category
        assert set(found.tolist()) == set(range(0, 6) if category < 6 else range(6, 12))


def test_readings_measure_distance_as_they_say(seen, dictionaries, shots):
    relevant, _ = dictionaries
    embeddings = relevant.class_embeddings_.double().numpy()
    B = relevant.leading(min(S, 10)).double().numpy()
    project = lambda w: np.einsum("ldr,ler,sle->sld", B, B, w)  # noqa: E731
    query = project(shots.double().mean(0, keepdim=True).numpy())
    distances = {
        "paper": np.sqrt(((embeddings - query) ** 2).sum((1, 2))),
        "released": np.sqrt(((embeddings - query) ** 2).sum(2)).sum(1),
        "default": np.sqrt(((project(embeddings) - query) ** 2).sum(2)).sum(1),
    }
    for reading, distance in distances.items():
        found = _adapt(seen, dictionaries, shots, reading=reading, n_similar=S).similar_categories
        np.testing.assert_array_equal(found.numpy(), distance.argsort())


def test_adaptive_editing_takes_the_directions_and_spread_of_the_family(seen, dictionaries):
    relevant, _ = dictionaries
    for category, directions in ((1, [0, 1, 2]), (8, [3, 4, 5])):
        shots = relevant.class_embeddings_[category][None]
        distribution = _adapt(seen, dictionaries, shots)
        assert (distribution.direction_mask[:, directions]).all() and distribution.direction_mask.sum() == 3 * L
    narrow = _adapt(seen, dictionaries, relevant.class_embeddings_[1][None]).covariance().trace()
    wide = _adapt(seen, dictionaries, relevant.class_embeddings_[8][None]).covariance().trace()
    pooled = _adapt(seen, dictionaries, shots, adaptive_editing=False).covariance().trace()
    assert narrow < 0.2 * wide and narrow < pooled < wide


def test_codes_are_those_of_the_residuals(seen, dictionaries, shots):
    """fit never stores the residuals of Eq. 7; its codes must not show it."""
    w_plus, labels, _ = seen
    relevant, irrelevant = dictionaries
    editor = FewShotEditor(relevant, irrelevant).fit(w_plus, labels)
    expected = irrelevant.transform(w_plus - relevant.class_embeddings_[labels])
    torch.testing.assert_close(editor.codes_, expected, atol=1e-5, rtol=1e-5)


def test_the_covariance_is_that_of_the_similar_categories_codes(seen, dictionaries, shots):
    w_plus, labels, _ = seen
    distribution = _adapt(seen, dictionaries, shots)
    editor = FewShotEditor(*dictionaries).fit(w_plus, labels)
    rows = np.isin(labels.numpy(), distribution.similar_categories.numpy())
    codes = editor.codes_.numpy()[rows].reshape(rows.sum(), -1)
    np.testing.assert_allclose(distribution.covariance().numpy(), np.cov(codes, rowvar=False), atol=1e-4)
    np.testing.assert_allclose(distribution.mean.flatten().numpy(), codes.mean(0), atol=1e-5)


def test_several_ranks_share_the_samples(seen, dictionaries, shots):
    distribution = _adapt(seen, dictionaries, shots, n_components=(1, 5, 12))
    relevant, _ = dictionaries
    mean = shots.mean(0, keepdim=True)
    expected = torch.cat([relevant.project(mean, r) for r in (1, 5, 12)])
    assert torch.equal(distribution.bases, expected)
    assert torch.equal(distribution.class_embedding, expected[0])
    assert torch.equal(distribution.sample(4, alpha=0), expected[[0, 1, 2, 0]])


def test_kept_fine_residual_is_the_shots_own(seen, dictionaries, shots):
    distribution = _adapt(seen, dictionaries, shots, keep_fine_residual=True, n_components=(2, 5))
    assert distribution.bases.shape == (6, L, D)
    assert torch.equal(distribution.bases[:, 7], shots[[0, 1, 2, 0, 1, 2], 7])  # base b comes from shot b mod K
    plain = _adapt(seen, dictionaries, shots, n_components=(2, 5)).bases
    assert torch.equal(distribution.bases[:, :7], plain[[0, 0, 0, 1, 1, 1], :7])


def test_age_drops_directions_that_are_hardly_used(seen, dictionaries, shots):
    age = METHODS["age"]
    editor = FewShotEditor(*dictionaries, **age).fit(*seen[:2])
    used = editor.codes_.abs().mean(0)
    threshold = float(used.flatten().sort().values[used.numel() // 2 :][:2].mean())  # between two of them
    mask = _adapt(seen, dictionaries, shots, **age, beta=threshold).direction_mask
    assert torch.equal(mask, used > threshold) and 0 < mask.sum() < mask.numel()


def test_released_edits_six_layers_and_dictionaries_limit_the_layers(seen, dictionaries, shots):
    edited = lambda d: d.direction_mask.any(1).nonzero().flatten().tolist()  # noqa: E731
    assert edited(_adapt(seen, dictionaries, shots, reading="released")) == [0, 1, 2, 3, 4, 5]
    assert edited(_adapt(seen, dictionaries, shots)) == list(range(L))
    few = (dictionaries[0], CategoryIrrelevantDictionary(seen[2], [[0, 1], [4]]))
    distribution = _adapt(seen, few, shots)
    assert edited(distribution) == [0, 1, 4]
    w_plus = distribution.sample(5)
    assert torch.equal(w_plus[:, 2], distribution.bases[[0] * 5, 2])


def test_settings_that_are_not_given_are_at_most_what_there_is(seen, dictionaries, shots):
    editor = FewShotEditor(*dictionaries)
    assert (editor.n_similar, editor.n_directions) == (S, K)
    distribution = editor.fit(*seen[:2]).adapt(shots)
    assert len(distribution.similar_categories) == S and distribution.direction_mask.all()


def test_each_shot_is_edited_from_its_own_projection(seen, dictionaries, shots):
    relevant = dictionaries[0]
    of_each = _adapt(seen, dictionaries, shots, each_shot=True, n_components=(2, 5))
    expected = torch.cat([relevant.project(shots, 2), relevant.project(shots, 5)])
    torch.testing.assert_close(of_each.bases, expected)
    of_mean = _adapt(seen, dictionaries, shots, n_components=(2, 5))
    torch.testing.assert_close(of_each.class_embedding, of_mean.class_embedding)
    torch.testing.assert_close(of_each.bases.view(2, 3, L, D).mean(1), of_mean.bases)
    one = [_adapt(seen, dictionaries, shots[:1], each_shot=each).bases for each in (True, False)]
    torch.testing.assert_close(*one)
    fine = _adapt(seen, dictionaries, shots, each_shot=True, keep_fine_residual=True)
    assert torch.equal(fine.bases[:, 7:], shots[:, 7:])
    torch.testing.assert_close(fine.bases[:, :7], relevant.project(shots)[:, :7])


def test_presets():
    relevant = CategoryRelevantDictionary.from_class_embeddings(_random(40, 2, 30), 10)
    irrelevant = CategoryIrrelevantDictionary(_random(2, 30, 8))
    expected = {"paper": ("joint", 2.0), "released": ("per_layer", 1.0), "default": ("joint", 1.0)}
    for name, (covariance, alpha) in expected.items():
        editor = FewShotEditor.preset(name, relevant, irrelevant)
        assert (editor.reading, editor.covariance, editor.alpha) == (name, covariance, alpha)
        t_b = 30 if name == "default" else 10  # 40, of which D = 30 allows 30
        assert (editor.n_similar, editor.n_directions, editor.n_components) == (20, 8, (t_b,))
        assert editor.each_shot == (name == "default")
        assert FewShotEditor.preset(name, relevant, irrelevant, n_shots=1).n_similar == 30
        w_plus = _random(80, 2, 30)
        made = editor.fit(w_plus, torch.arange(80) % 40).adapt(w_plus[:1])
        assert (made.kind, made.alpha) == (covariance, alpha)
    changed = FewShotEditor.preset("paper", relevant, irrelevant, method="sage-i", n_similar=7)
    assert (changed.n_similar, changed.class_embedding_mapping, changed.adaptive_editing) == (7, False, True)
    assert set(PRESETS) == set(expected)


def test_distributions_of_one_editor_are_independent(seen, dictionaries, shots):
    editor = FewShotEditor(*dictionaries, n_similar=4).fit(*seen[:2])
    first = editor.adapt(shots)
    before = first.sample(4, rng=torch.Generator().manual_seed(0))
    editor.adapt(seen[0][:2])
    assert torch.equal(first.sample(4, rng=torch.Generator().manual_seed(0)), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_similar": 0}, f"n_similar must be 1 to {S}, the number of seen categories, got 0"),
        ({"n_similar": 500}, f"n_similar must be 1 to {S}, the number of seen categories, got 500"),
        ({"n_directions": 0}, f"n_directions must be 1 to {K}, the number of directions of a layer, got 0"),
        ({"n_directions": K + 1}, f"n_directions must be 1 to {K}"),
        ({"n_components": 13}, "n_components must be 1 to 12"),
        ({"n_components": ()}, "n_components must hold"),
        ({"n_components": 3.0}, "n_components must be a whole number, got 3.0"),
        ({"n_components": (2, "3")}, "n_components must be a whole number, got '3'"),
        ({"n_similar": 3.0}, "n_similar must be a whole number, got 3.0"),
        ({"n_directions": 2.5}, "n_directions must be a whole number, got 2.5"),
        ({"covariance": "full"}, "covariance must be one of joint, per_layer, diagonal"),
        ({"reading": "mine"}, "reading must be one of"),
        ({"shrinkage": 1.5}, "shrinkage must be 0 to 1"),
        ({"shrinkage": 0.5, "covariance": "diagonal"}, "with 'diagonal'"),
        ({"keep_fine_residual": True, "class_embedding_mapping": False}, "no effect without class_embedding_mapping"),
        ({"each_shot": True, "class_embedding_mapping": False}, "each_shot has no effect without"),
        ({"beta": -1.0}, "beta must not be negative"),
        ({"beta": float("nan")}, "beta must not be negative"),
    ],
)
def test_refuses_settings(dictionaries, settings, message):
    with pytest.raises(InputError, match=message):
        FewShotEditor(*dictionaries, **settings)


def test_whole_numbers_may_be_numpys(seen, dictionaries, shots):
    plain = {"n_components": 3, "n_similar": 4, "n_directions": 2}
    ours, numpys = (
        _adapt(seen, dictionaries, shots, **settings)
        for settings in (plain, {name: np.int64(value) for name, value in plain.items()})
    )
    assert torch.equal(ours.bases, numpys.bases) and torch.equal(ours.direction_mask, numpys.direction_mask)
    several = FewShotEditor(*dictionaries, n_components=np.array([2, 3])).n_components
    assert several == (2, 3)


@pytest.mark.parametrize("method", METHODS)
def test_categories_of_one_latent_each_say_nothing_of_edits(seen, dictionaries, shots, method):
    w_plus, labels, directions = seen
    one = slice(S)  # of each category
    relevant = CategoryRelevantDictionary(5).fit(w_plus[one], labels[one])
    editor = FewShotEditor(relevant, CategoryIrrelevantDictionary(directions), **METHODS[method])
    with pytest.raises(InputError, match="how the latents of a seen category differ, and each of the 12 categories"):
        editor.fit(w_plus[one], labels[one]).adapt(shots)
    of_all = FewShotEditor(*dictionaries, **METHODS[method]).fit(w_plus[one], labels[one]).adapt(shots)
    assert of_all.sample(2).diff(dim=0).abs().max() > 0.1  # embeddings of more latents: the codes are not zero


def test_similar_categories_of_one_latent_each_are_refused(seen):
    w_plus, labels, directions = seen
    kept = (labels < S // 2) | (torch.arange(len(labels)) < S)  # the second family has one latent a category
    relevant = CategoryRelevantDictionary(5).fit(w_plus[kept], labels[kept])
    editor = FewShotEditor(relevant, CategoryIrrelevantDictionary(directions), n_similar=3).fit(
        w_plus[kept], labels[kept]
    )
    assert editor.adapt(w_plus[labels == 2][:1]).sample(2).diff(dim=0).abs().max() > 0.1
    with pytest.raises(InputError, match="each of the 3 categories to draw on has one; .* or raise n_similar"):
        editor.adapt(w_plus[labels == 8][:1])


@pytest.mark.parametrize("method", METHODS)
def test_another_dtype_is_refused_by_name(seen, dictionaries, shots, method):
    w_plus, labels, directions = seen
    editor = FewShotEditor(*dictionaries, **METHODS[method])
    with pytest.raises(InputError, match="w_plus must be torch.float32, as the dictionaries are, got torch.float64"):
        editor.fit(w_plus.double(), labels)
    with pytest.raises(InputError, match="w_plus must be torch.float32, as the dictionaries are, got torch.float64"):
        editor.fit(w_plus, labels).adapt(shots.double())
    with pytest.raises(InputError, match="one dtype"):
        FewShotEditor(dictionaries[0], CategoryIrrelevantDictionary(directions.double()), **METHODS[method])


def test_refuses_what_does_not_fit(seen, dictionaries, shots):
    relevant, irrelevant = dictionaries
    editor = FewShotEditor(relevant, irrelevant)
    with pytest.raises(InputError, match="not fitted; call fit"):
        editor.adapt(shots)
    with pytest.raises(InputError, match=r"w_plus must have shape \[N, 8, 20\]"):
        editor.fit(seen[0][:, :4], seen[1])
    with pytest.raises(InputError, match="labels must be 0 to 11, got 1 to 12"):
        editor.fit(seen[0], seen[1] + 1)
    editor.fit(*seen[:2])
    with pytest.raises(InputError, match="N >= 1"):
        editor.adapt(shots[:0])
    with pytest.raises(InputError, match="same L and D"):
        FewShotEditor(relevant, CategoryIrrelevantDictionary(torch.ones(4, D, K)))
    with pytest.raises(InputError, match="not fitted"):
        FewShotEditor(CategoryRelevantDictionary(), irrelevant)
    with pytest.raises(InputError, match="at least 2 latents"):
        FewShotEditor(relevant, irrelevant, adaptive_editing=False).fit(seen[0][:1], seen[1][:1])
    with pytest.raises(InputError, match="preset must be"):
        FewShotEditor.preset("mine", relevant, irrelevant)
    for method, idle in (
        ("age", ("n_components", "n_similar", "n_directions")),
        ("sage-i", ("n_components",)),
        ("sage-q", ("n_similar", "n_directions")),
    ):
        with pytest.raises(InputError, match=f"method '{method}' makes no use of {' and '.join(idle)}; leave out"):
            FewShotEditor.preset("paper", relevant, irrelevant, method=method, **dict.fromkeys(idle, 3))

    with pytest.raises(InputError, match="method must be one of age, sage-q, sage-i, sage, got 'SAGE'"):
        FewShotEditor.preset("paper", relevant, irrelevant, method="SAGE")
