"""The protocol on a judge whose answers can be read off the images."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap

from sage_fast.errors import InputError
from sage_fast.evaluation.oracle import Oracle
from sage_fast.evaluation.protocol import (
    as_written,
    bootstrap_interval,
    category_retention,
    evaluate_sets,
    factor_spreads,
    join,
    measure,
    score,
)


class PixelJudge:
    """Reads the category from the mean of red (steps of 0.2), the factors from green and blue."""

    factor_names = ("light", "turn_cos", "turn_sin")
    largest_batch = 0

    def predict(self, images):
        self.largest_batch = max(self.largest_batch, len(images))
        return ((images[:, 0].mean((1, 2)) + 1) / 0.2).round().long()

    def features(self, images):
        return images.flatten(1)[:, ::7]

    def factors(self, images):
        return torch.stack([images[:, 1, 0, 0], images[:, 2, 0, 0], images[:, 2, 0, 1]], 1)


def draw(categories, n, seed=0, spread=0.3, shift=0.0):
    """n images a category: red tells it, green and blue are noise of the given spread."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.tensor(categories).repeat_interleave(n)
    images = torch.randn(len(labels), 3, 6, 6, generator=rng) * spread
    images[:, 0] = (labels * 0.2 - 1 + shift)[:, None, None]
    return images.clamp(-1, 1), labels


def test_real_images_against_other_real_images_keep_everything():
    scores = evaluate_sets(*draw([1, 4, 6], 40, 1), *draw([1, 4, 6], 40, 2), PixelJudge())
    assert scores.retention == 1.0 and scores.retention_interval == (1.0, 1.0)
    assert (scores.n_images, scores.n_categories, scores.network) == (120, 3, "oracle")
    assert scores.diversity_relative == pytest.approx(1, abs=0.1)
    assert scores.spreads.keys() == {"light", "turn"}
    assert all(value == pytest.approx(1, abs=0.2) for value in scores.spreads.values())


def test_less_spread_gives_less_diversity_and_smaller_spreads_at_a_larger_distance():
    real = draw([1, 4], 60, 2)
    full = evaluate_sets(*draw([1, 4], 60, 1), *real, PixelJudge())
    half = evaluate_sets(*draw([1, 4], 60, 1, spread=0.15), *real, PixelJudge())
    assert half.diversity == pytest.approx(full.diversity / 2, rel=0.02)
    assert half.spread == pytest.approx(full.spread / 2, rel=0.02)
    assert half.frechet > 2 * full.frechet and half.kernel > full.kernel


def test_retention_is_the_mean_over_categories_not_over_images():
    labels = torch.tensor([5, 5, 5, 5, 2])
    predictions = torch.tensor([5, 5, 5, 1, 5])
    np.testing.assert_allclose(category_retention(labels, predictions), [0.0, 0.75])
    images, wanted = draw([1, 4], 10, 1)
    wrong, _ = draw([1, 4], 10, 1, shift=0.2)  # one category up
    mixed = torch.cat([images[:5], wrong[5:10], images[10:]])
    scores = evaluate_sets(mixed, wanted, images, wanted, PixelJudge())
    assert scores.retention == 0.75 and scores.retention_by_category == (0.5, 1.0) and scores.retention_real == 1.0
    turned = evaluate_sets(images, wanted, mixed, wanted, PixelJudge())
    assert turned.retention == 1.0 and turned.retention_real == 0.75


def test_the_interval_agrees_with_scipys_percentile_bootstrap():
    values = np.random.default_rng(3).uniform(size=40)
    low, high = bootstrap_interval(torch.from_numpy(values), n=20_000)
    want = bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0))
    assert low == pytest.approx(want.confidence_interval.low, abs=3e-3)
    assert high == pytest.approx(want.confidence_interval.high, abs=3e-3)
    assert bootstrap_interval(torch.from_numpy(values)) == bootstrap_interval(torch.from_numpy(values))


def test_one_category_has_no_interval_over_categories():
    scores = evaluate_sets(*draw([4], 10, 1), *draw([1, 4], 10, 2), PixelJudge())
    assert scores.retention == 1.0 and scores.retention_interval is None
    assert scores.as_dict()["retention_interval"] is None
    with pytest.raises(InputError, match="at least two values, got 1"):
        bootstrap_interval(torch.ones(1))


def test_spreads_are_numpys_standard_deviations_and_an_angle_is_one_factor():
    factors = torch.randn(12, 3, generator=torch.Generator().manual_seed(4))
    labels = torch.tensor([0, 0, 0, 0, 3, 3, 3, 3, 3, 3, 3, 9])  # category 9 has one image: it does not count
    spreads = factor_spreads(factors, labels, PixelJudge.factor_names)
    groups = [factors[:4].double().numpy(), factors[4:11].double().numpy()]
    assert spreads["light"] == pytest.approx(np.mean([g[:, 0].std(ddof=1) for g in groups]))
    turn = np.mean([math.sqrt(g[:, 1].var(ddof=1) + g[:, 2].var(ddof=1)) for g in groups])
    assert spreads["turn"] == pytest.approx(turn)


def test_the_spread_of_a_uniform_angle_is_one_whichever_way_it_is_turned():
    angle = torch.linspace(0, 2 * math.pi, 721)[:-1]
    for turn in (0.0, 0.7):
        columns = torch.stack([torch.cos(angle + turn), torch.sin(angle + turn)], 1)
        spreads = factor_spreads(columns, torch.zeros(720, dtype=torch.int64), ("a_cos", "a_sin"))
        assert spreads["a"] == pytest.approx(1, abs=1e-3)


def test_the_judge_sees_a_batch_at_a_time_and_the_eight_bits_of_a_file():
    judge, seen = PixelJudge(), []
    images, labels = draw([1, 4], 10, 5)
    judge.features = lambda x: seen.append(x) or x.flatten(1)
    measure(images * 3, labels, judge, batch=8)
    levels = (torch.cat(seen) + 1) * 127.5
    assert judge.largest_batch == 8
    assert torch.allclose(levels, levels.round(), atol=1e-4) and levels.min() >= 0 and levels.max() <= 255
    as_bytes = ((images + 1) * 127.5).round().to(torch.uint8)
    a, b = measure(images, labels, PixelJudge()), measure(as_bytes, labels, PixelJudge())
    assert torch.equal(a.features, b.features)


def test_the_oracles_one_pass_gives_what_its_methods_give():
    torch.manual_seed(0)
    oracle = Oracle(16, 8).eval()
    images, labels = torch.rand(9, 3, 16, 16) * 2 - 1, torch.arange(9) // 3
    images = as_written(images)
    got = measure(images, labels, oracle, batch=4)
    assert torch.equal(got.predictions, oracle.predict(images)) and len(got.factor_names) == got.factors.shape[1]
    torch.testing.assert_close(got.features, oracle.features(images))
    in_units = factor_spreads(oracle.factors(images), labels, got.factor_names)
    standardised = factor_spreads(got.factors, labels, got.factor_names)
    halved = factor_spreads(oracle.factors(images)[:6], labels[:6], got.factor_names)
    halved_standardised = factor_spreads(got.factors[:6], labels[:6], got.factor_names)
    for name, value in in_units.items():  # shares of another set's spread do not depend on the unit
        assert halved[name] / value == pytest.approx(halved_standardised[name] / standardised[name], rel=1e-4)


def test_measurements_of_parts_join_to_those_of_the_whole():
    images, labels = draw([1, 4], 10, 6)
    parts = [measure(x, y, PixelJudge()) for x, y in zip(images.split(7), labels.split(7), strict=True)]
    whole, joined = measure(images, labels, PixelJudge()), join(parts)
    for name in ("labels", "predictions", "features", "factors"):
        assert torch.equal(getattr(whole, name), getattr(joined, name))
    with pytest.raises(InputError, match="one network"):
        join([whole, measure(images, labels, PixelJudge(), "another")])


def test_real_categories_that_were_not_generated_do_not_count():
    generated = draw([1, 4], 20, 7)
    alone = evaluate_sets(*generated, *draw([1, 4], 20, 8), PixelJudge())
    images, labels = draw([1, 4], 20, 8)
    other, other_labels = draw([9], 20, 9)
    more = evaluate_sets(*generated, torch.cat([images, other]), torch.cat([labels, other_labels]), PixelJudge())
    assert more.as_dict() == alone.as_dict()


def test_without_predictions_or_factors_the_other_numbers_remain():
    generated, real = measure(*draw([1], 9, 1), PixelJudge()), measure(*draw([1], 9, 2), PixelJudge())
    strip = {"predictions": None, "factors": torch.zeros(9, 0), "factor_names": ()}
    scores = score(dataclasses.replace(generated, **strip), dataclasses.replace(real, **strip))
    assert scores.retention is None and scores.retention_interval is None and scores.spread is None
    assert scores.frechet > 0 and scores.diversity > 0


def test_scores_become_plain_json_and_cannot_be_changed():
    scores = evaluate_sets(*draw([1, 4], 8, 1), *draw([1, 4], 8, 2), PixelJudge())
    content = json.loads(json.dumps(scores.as_dict(), allow_nan=False))
    assert content["spread"] == pytest.approx(np.mean(list(content["spreads"].values())))
    with pytest.raises(dataclasses.FrozenInstanceError):
        scores.retention = 1.0


def test_a_factor_that_real_images_do_not_vary_in_has_no_relative_spread():
    images, labels = draw([1, 4], 8, 2)
    real = images.clone()
    real[:, 1] = 0
    scores = evaluate_sets(images, labels, real, labels, PixelJudge())
    assert math.isnan(scores.spreads["light"]) and scores.as_dict()["spreads"]["light"] is None
    assert scores.spread == pytest.approx(scores.spreads["turn"])


def test_sets_that_cannot_be_compared_are_refused():
    images, labels = draw([1, 4], 8, 1)
    with pytest.raises(InputError, match=r"Categories \[4\] have generated images but no real ones"):
        evaluate_sets(images, labels, images[:8], labels[:8], PixelJudge())
    with pytest.raises(InputError, match="shapes"):
        measure(images, labels[:-1], PixelJudge())
    with pytest.raises(InputError, match="one network"):
        score(measure(images, labels, PixelJudge(), "a"), measure(images, labels, PixelJudge(), "b"))
