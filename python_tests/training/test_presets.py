"""Each preset is a config that can be trained, and says what its sources say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import sage_fast
from sage_fast.errors import InputError
from sage_fast.training import presets
from sage_fast.training.augment import AugmentConfig
from sage_fast.training.gan import GANConfig
from sage_fast.training.shares import share_out


def test_flora_is_how_the_shipped_model_was_trained():
    about = json.loads((Path(sage_fast.__file__).parent / "model" / "bundle.json").read_text())["about"]
    flora = dataclasses.asdict(presets.flora())
    assert {key: flora[key] for key in about["settings"]["gan"]} == about["settings"]["gan"]


def test_small_encoder_is_how_that_of_the_shipped_model_was_trained():
    about = json.loads((Path(sage_fast.__file__).parent / "model" / "bundle.json").read_text())["about"]
    small = json.loads(json.dumps(dataclasses.asdict(presets.small_encoder())))
    old = about["settings"]["encoder"]
    assert old["tune_generator"] and {key: small[key] for key in old if key in small} == old


def test_small_encoder_without_tuning_or_features_has_no_settings_of_them():
    plain = presets.small_encoder(tune_generator=False, perceptual="none")
    assert dataclasses.replace(plain, tune_generator=True, tune_lr=0.002, perceptual_share=0.5, perceptual="a") == (
        presets.small_encoder(perceptual="a")
    )
    assert not plain.tune_generator and plain.perceptual == "none" and presets.small_encoder().tune_generator


def test_the_papers_numbers():
    f, p = presets.config_f(), presets.paper256()
    assert (f.resolution, f.batch, f.lr, f.gamma, f.ema_kimg, f.channel_base) == (1024, 32, 0.002, 10, 10, 32768)
    assert (p.resolution, p.batch, p.lr, p.gamma, p.ema_kimg, p.channel_base) == (256, 64, 0.0025, 1, 20, 16384)
    assert p.mbstd_group == 8 and f.mbstd_group == 4 and f.n_mapping == p.n_mapping == 8 and f.ema_rampup is None


def test_small_and_low_shot():
    assert presets.small() == dataclasses.replace(GANConfig(), precision="bfloat16")
    assert presets.low_shot().augment.kind == presets.auto(256, 100).augment.kind == "ada"
    assert presets.small(64).channel_base // 64 == 32
    assert presets.low_shot().freeze_d == 0 and presets.low_shot(256, "model.pkl").freeze_d == 4
    assert presets.low_shot(8, "model.pkl").freeze_d == 2  # all there is


@pytest.mark.parametrize("resolution", [32, 256, 1024])
@pytest.mark.parametrize("n_devices", [1, 2, 8])
def test_auto_is_the_heuristic_of_ada(resolution, n_devices):
    config = presets.auto(resolution, 10**6, n_devices)
    batch = {(32, 1): 32, (32, 2): 64, (256, 1): 16, (256, 2): 32, (1024, 1): 4, (1024, 2): 8, (1024, 8): 32}
    assert config.batch == batch.get((resolution, n_devices), 64)
    assert config.gamma == pytest.approx(0.0002 * resolution**2 / config.batch)
    assert share_out(config.batch, config.mbstd_group, 0, n_devices)


def test_auto_fits_few_images_and_a_cpu():
    assert presets.auto(256, 10, 1).batch == 8
    small = dataclasses.replace(presets.small(32), augment=AugmentConfig("ada"))
    assert presets.auto(32, 10, 0) == dataclasses.replace(small, batch=10, mbstd_group=2)
    assert [presets.auto(32, n, 0).mbstd_group for n in (2, 3, 4, 6, 7, 9, 15, 16)] == [2, 2, 4, 3, 3, 4, 2, 4]
    assert presets.auto(32, 5000, 0) == presets.small(32)
    with pytest.raises(InputError, match="at least two images, got 1"):
        presets.auto(32, 1)


def test_by_name():
    assert presets.preset("flora") == presets.flora() and presets.preset("small", 64) == presets.small(64)
    assert presets.preset("low_shot", 128).resolution == 128
    assert presets.preset("low_shot", transfer_from="a.pkl") == presets.low_shot(256, "a.pkl")
    assert presets.preset("auto", 64, 100, 1) == presets.auto(64, 100, 1)
    with pytest.raises(InputError, match="preset 'paper256' is for 256 px, got 128"):
        presets.preset("paper256", 128)
    with pytest.raises(InputError, match="'auto' needs a resolution, got none; give --resolution"):
        presets.preset("auto")
    with pytest.raises(InputError, match="must be one of flora, small"):
        presets.preset("large")
