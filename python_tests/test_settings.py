"""Settings that are no numbers, and settings without effect."""

from __future__ import annotations

import dataclasses
import math

import pytest

from sage_fast.errors import InputError
from sage_fast.evaluation.oracle import OracleConfig
from sage_fast.inversion.config import ProjectionConfig
from sage_fast.settings import (
    check_at_least_one,
    check_ignored,
    check_not_negative,
    check_numbers,
    check_positive,
)
from sage_fast.training.augment import AugmentConfig
from sage_fast.training.classifier import ClassifierConfig
from sage_fast.training.dictionary import DictionaryConfig
from sage_fast.training.encoder import EncoderConfig, HyperStyleConfig
from sage_fast.training.gan import GANConfig
from sage_fast.training.latent_critic import E4EConfig
from sage_fast.training.watching import CollapseConfig

CONFIGS = (
    *(GANConfig(), AugmentConfig(), EncoderConfig(), E4EConfig(), HyperStyleConfig(), DictionaryConfig()),
    *(ClassifierConfig(), OracleConfig(), ProjectionConfig(), CollapseConfig()),
)
FLOATS = [(c, field.name) for c in CONFIGS for field in dataclasses.fields(c) if "float" in str(field.type)]


@pytest.mark.parametrize(("config", "name"), FLOATS, ids=[f"{type(c).__name__}.{name}" for c, name in FLOATS])
def test_every_number_of_a_config_must_be_finite(config, name):
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(InputError, match=rf"^{name} must be a finite number, got {value}\.$"):
            dataclasses.replace(config, **{name: value})


def test_the_floats_of_all_configs_were_found():
    assert len(FLOATS) > 50 and (GANConfig(), "total_kimg") in FLOATS and (EncoderConfig(), "r1_gamma") in FLOATS


@pytest.mark.parametrize("config", [GANConfig(), EncoderConfig(), DictionaryConfig(), ClassifierConfig()], ids=type)
def test_a_seed_has_64_bits(config):
    assert dataclasses.replace(config, seed=-1).seed == -1
    with pytest.raises(InputError, match="seed must be a whole number of at most 64 bits, got 9223372036854775808"):
        dataclasses.replace(config, seed=2**63)


@dataclasses.dataclass(frozen=True)
class Lamp:
    colour: str = "red"
    power: float | None = 2.0
    on: bool = True


def test_what_has_no_effect_is_named_with_what_it_needs():
    check_numbers(Lamp(power=None))
    check_ignored(Lamp(colour="blue"), ("power", "on"), "a bulb")
    with pytest.raises(
        InputError, match=r"^power = 3.0 has no effect without a bulb; give that too, or leave power out"
    ):
        check_ignored(Lamp(power=3.0), ("power", "on"), "a bulb")


def test_numbers_that_are_too_small_are_named():
    lamp = Lamp(power=0.0)
    check_positive(Lamp(), "power")
    check_not_negative(lamp, "power")
    for check, config, wanted in (
        (check_positive, lamp, "must be positive, got 0.0"),
        (check_not_negative, Lamp(power=-1.0), "must not be negative, got -1.0"),
        (check_at_least_one, Lamp(power=0.5), "must be at least 1, got 0.5"),
    ):
        check(Lamp(power=None), "power")
        with pytest.raises(InputError, match=rf"^power {wanted}\.$"):
            check(config, "on", "power")
