"""The data card of an output."""

from __future__ import annotations

from pathlib import Path

import pytest

from sage_fast.generation.card import data_card
from sage_fast.generation.plan import Part, Plan
from sage_fast.models.bundles import bundle_hash, read_index

SETTINGS = {
    "resolution": 8,
    "n_channels": 1,
    "encoder": None,
    "format": "safetensors",
    "image": None,
    "preset": "paper",
}


def card_of(model: str) -> str:
    part = Part("rose", 0, 1, ("rose/0.png",), ("0",), 0, "sage", 1.0, "none")
    return data_card(SETTINGS | {"model": model}, Plan(Path("shots"), (part,), 4, 8))


@pytest.mark.parametrize(("shipped", "words"), [(True, "12  #"), (False, "12 --model RUN  #")])
def test_the_command_names_a_model_that_is_not_the_shipped_one(shipped, words):
    model = bundle_hash(read_index(None)) if shipped else "another"
    assert f"sage-fast regenerate OUT/manifest.jsonl {words}" in card_of(model)


def test_one_of_a_kind_is_no_plural():
    assert "1 image of 1 category, 8 x 8 pixels,\n1 channel. " in card_of("another")
