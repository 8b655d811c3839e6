"""When a generator is measured, when a run stops early, and what the detector says of logits and grids made by hand."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from tiny_model import RESOLUTION, tiny_networks

from sage_fast.data.flora import render
from sage_fast.data.images import to_float
from sage_fast.errors import InputError, SageFastWarning
from sage_fast.evaluation.quality import Quality, QualityConfig
from sage_fast.models.perceptual import DiscriminatorFeatures
from sage_fast.training.watching import CollapseConfig, CollapseDetector, Watch

GENERATOR, _, DISCRIMINATOR = tiny_networks()
REALS = render(np.arange(64) % 32, np.arange(64), 32)[0]


def scripted(*scores):
    left = list(scores)
    return lambda generator: {"fd_x": left.pop(0), "recall_x": 0.5}


def follow(watch, kimgs):
    """Which of the ``kimgs`` were measured, up to the stop."""
    measured = []
    for kimg in kimgs:
        if watch.due(kimg):
            watch.score(GENERATOR, kimg)
            measured.append(kimg)
            if watch.stop:
                break
    return measured


def test_a_measurement_is_due_at_each_multiple_and_after_the_last_step():
    kimgs = [round(0.8 * i, 6) for i in range(1, 50)]
    assert follow(Watch(scripted(*range(9)), every_kimg=8.0), kimgs) == [8.0, 16.0, 24.0, 32.0]
    assert follow(Watch(scripted(*range(9)), every_kimg=10.0), kimgs) == [10.4, 20.0, 30.4]
    watch = Watch(scripted(1, 2), every_kimg=10.0)
    assert watch.due(3.0, last=True) and not watch.due(3.0)
    watch.score(GENERATOR, 3.0)
    assert not watch.due(3.0, last=True)  # just measured


def test_steps_of_any_size_measure_once_a_multiple():
    kimgs = [0.016 * i for i in range(1, 2001)]  # 32 kimg in batches of 16, rounded as floats are
    assert follow(Watch(scripted(*range(50)), every_kimg=1.6), kimgs) == pytest.approx([1.6 * i for i in range(1, 21)])
    assert follow(Watch(scripted(*range(50)), every_kimg=1.6), [7, 7.5, 8, 9]) == [7, 8]


def test_without_a_measure_nothing_is_due():
    watch = Watch(None)
    assert not watch.due(100) and not watch.due(100, last=True) and not watch.stop
    with pytest.raises(InputError, match="at least one score, got none"):
        watch.score(GENERATOR, 100)


def test_the_best_is_the_smallest_first_score():
    watch = Watch(scripted(5.0, 3.0, 4.0), every_kimg=1)
    improved = []
    for kimg in (1, 2, 3):
        assert list(watch.score(GENERATOR, kimg)) == ["fd_x", "recall_x"]
        improved.append(watch.improved)
    assert (improved, watch.best, watch.best_kimg, watch.scores["fd_x"]) == ([True, True, False], 3.0, 2, 4.0)


def test_another_measure_is_refused_where_a_run_goes_on():
    watch = Watch(scripted(5.0))
    watch.score(GENERATOR, 1)
    other = Watch(lambda generator: {"fd_y": 9000.0})
    other.load_state_dict(watch.state_dict())
    with pytest.raises(InputError, match="was measured by fd_x so far, and fd_y does not compare with it; give the"):
        other.score(GENERATOR, 2)
    assert other.best == 5.0


def test_a_run_stops_after_patience_measurements_without_a_new_best():
    scores = (5.0, 4.0, 4.5, 4.0, 4.1, 1.0)
    assert follow(Watch(scripted(*scores), every_kimg=1, patience=3), range(1, 7)) == [1, 2, 3, 4, 5]
    assert follow(Watch(scripted(*scores), every_kimg=1, patience=0), range(1, 7)) == [1, 2, 3, 4, 5, 6]
    nan = Watch(scripted(*[float("nan")] * 4), every_kimg=1, patience=2)
    assert follow(nan, range(1, 5)) == [1, 2]


def test_a_watch_goes_on_from_its_state():
    scores = (5.0, 4.0, 4.5, 4.6, 3.0)
    watch = Watch(scripted(*scores), every_kimg=1, patience=2)
    follow(watch, range(1, 4))
    state = json.loads(json.dumps(watch.state_dict()))  # plain values only
    resumed = Watch(scripted(*scores[3:]), every_kimg=1, patience=2)
    resumed.load_state_dict(state)
    assert not resumed.due(3) and resumed.due(4)
    assert follow(resumed, range(3, 6)) == [4]
    assert (resumed.best, resumed.best_kimg, resumed.stop) == (4.0, 2, True)


def test_quality_is_a_measure():
    reals = render(np.arange(40), np.arange(40), RESOLUTION)[0]
    measure = Quality(QualityConfig(n_images=16, batch=16), reals, DiscriminatorFeatures(DISCRIMINATOR))
    watch = Watch(measure, every_kimg=1)
    assert list(watch.score(GENERATOR, 1.0)) == list(measure(GENERATOR))
    assert watch.best == watch.scores["fd_discriminator"]


@pytest.mark.parametrize("settings", [{"every_kimg": 0}, {"every_kimg": float("nan")}, {"patience": -1}])
def test_settings_are_checked(settings):
    with pytest.raises(InputError, match="every_kimg must be positive and patience at least 0"):
        Watch(None, **settings)


def logits(mean, n=64):
    """Logits [N, 1] of a mean, spread by 0.5 on both sides."""
    return mean + torch.linspace(-0.5, 0.5, n).unsqueeze(1)


def warned(detector, *rounds):
    """The messages of rounds of (kimg, real, fake, held_out)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for kimg, *values in rounds:
            detector.discriminator(kimg, *(None if v is None else logits(v) for v in values))
    return [str(w.message) for w in caught if issubclass(w.category, SageFastWarning)]


def test_a_gap_to_held_out_images_is_overfitting():
    detector = CollapseDetector(REALS)
    told = warned(detector, *[(kimg, 0.4, -2.0, -0.6) for kimg in range(1, 60)])
    assert len(told) == 1
    assert told[0].startswith("after 20 kimg the discriminator tells the training images from others")
    assert "42% of its margin" in told[0] and told[0].endswith(
        "resume with a larger r1_gamma, or begin anew with more images or augmentation (ADA)."
    )


def test_augmentation_is_not_suggested_to_those_who_have_it():
    told = warned(CollapseDetector(REALS, augmented=True), *[(kimg, 3.0, -3.0, None) for kimg in range(1, 60)])
    assert told[0].endswith("resume with a larger r1_gamma, or begin anew with more images.")


def test_sure_of_all_images_is_said_without_held_out_images_too():
    assert len(warned(CollapseDetector(REALS), *[(kimg, 3.0, -3.0, None) for kimg in range(1, 60)])) == 1


def test_a_discriminator_as_sure_of_held_out_images_is_healthy():
    assert warned(CollapseDetector(REALS), *[(kimg, 0.4, -1.0, 0.35) for kimg in range(1, 200)]) == []


def test_losses_that_run_away_are_said_at_once():
    told = warned(CollapseDetector(REALS), (1, 0.5, -1.0, 0.5), (2, 30.0, -333.0, 29.0), (3, -1e9, -1e12, None))
    assert len(told) == 1 and told[0].startswith("after 2 kimg the discriminator's logits are 333 in the mean")
    assert "where one was kept (docs/runtime.md), else begin anew, with a lower lr or a larger r1_gamma" in told[0]


def test_a_short_excursion_is_no_stretch():
    rounds = [(k, 0.3, -1.0, 0.2) for k in range(1, 50)] + [(50, 3.0, -3.0, -3.0)] + [(51, 0.3, -1.0, 0.2)]
    assert warned(CollapseDetector(REALS), *rounds) == []


def test_the_average_has_its_half_life_in_images_however_often_it_is_fed():
    ends = []
    for step in (1.0, 0.25):
        detector = CollapseDetector(REALS, CollapseConfig(start_kimg=1000, half_life_kimg=4.0))
        detector.discriminator(0.0, logits(5.0), logits(-1.0))
        for i in range(1, int(4 / step) + 1):
            last = detector.discriminator(i * step, logits(-5.0), logits(-1.0))
        ends.append(last["real_sign_mean"])
    assert ends == pytest.approx([0.0, 0.0], abs=1e-6)  # from 1 towards -1: half way after one half-life


def test_training_images_alone_tell_how_sure_it_is():
    detector = CollapseDetector(REALS)
    assert detector.discriminator(1.0, logits(3.0)) == {"real_sign_mean": 1.0}
    with pytest.raises(InputError, match="held_out needs the logits of generated images too"):
        detector.discriminator(2.0, logits(3.0), held_out=logits(1.0))


def test_a_margin_that_is_none_counts_for_nothing():
    said = CollapseDetector(REALS).discriminator(1.0, logits(-1.0), logits(0.0), logits(-3.0))
    assert list(said) == ["real_sign_mean"]


def test_a_generator_that_repeats_itself_is_said_once():
    detector = CollapseDetector(REALS)
    images = to_float(REALS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert detector.grid(50, images)["diversity"] == pytest.approx(1)
    repeated = images[:1] + 0.05 * torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with pytest.warns(
        SageFastWarning, match="after 60 kimg the generated images differ by .% .* repeats itself.*lower lr"
    ):
        share = detector.grid(60, repeated)["diversity"]
    assert share < 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector.grid(70, repeated)


def test_a_beginning_is_not_judged():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CollapseDetector(REALS).grid(19, torch.zeros(8, 3, 32, 32))


def test_what_was_said_is_not_said_again_after_a_continuation():
    detector = CollapseDetector(REALS)
    rounds = [(kimg, 3.0, -3.0, -3.0) for kimg in range(1, 30)]
    assert len(warned(detector, *rounds)) == 1
    state = json.loads(json.dumps(detector.state_dict()))
    resumed = CollapseDetector(REALS)
    resumed.load_state_dict(state)
    assert resumed.averages == detector.averages
    assert warned(resumed, (30, 3.0, -3.0, -3.0)) == []


def test_the_reals_are_checked():
    for reals in (REALS.float(), REALS[:1], REALS[0]):
        with pytest.raises(InputError, match=r"reals must be uint8 \[M, C, R, R\], M at least 2"):
            CollapseDetector(reals)
    with pytest.raises(InputError, match="all alike"):
        CollapseDetector(REALS[:1].expand(5, -1, -1, -1))
    with pytest.raises(InputError, match="half_life_kimg positive"):
        CollapseConfig(half_life_kimg=0)


def test_copies_of_two_pictures_reach_half_of_the_reals_diversity():
    detector = CollapseDetector(REALS)
    pairs = torch.randint(len(REALS), (40, 2), generator=torch.Generator().manual_seed(0))
    shares = [detector.grid(1, to_float(REALS[pair].repeat(32, 1, 1, 1)))["diversity"] for pair in pairs]
    assert sum(shares) / len(shares) == pytest.approx(0.5, abs=0.05)


def test_real_images_of_one_category_are_no_collapse():
    reals = render(np.arange(400) % 200, np.arange(400), 32)[0]
    detector = CollapseDetector(reals)
    for category in (0, 60, 120, 199):
        one = render(np.full(64, category), 2000 + np.arange(64), 32)[0]
        assert 0.7 < detector.grid(1, to_float(one))["diversity"] < 1
