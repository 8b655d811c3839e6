"""The published models: small, whole, with a card, and able to generate."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from sage_fast import FewShotPipeline
from sage_fast.errors import SageFastWarning

ROOT = Path(__file__).parents[1]
BUNDLES = [ROOT / "sage_fast" / "model", *sorted(p.parent for p in (ROOT / "models").glob("*/bundle.json"))]
MOST_BYTES = 12_000_000


@pytest.fixture(params=BUNDLES, ids=lambda folder: folder.name)
def bundle(request):
    return request.param


def test_there_are_models_beside_the_packages_own():
    assert {folder.name for folder in BUNDLES} >= {"model", "omniglot", "grocery81"}


def test_a_bundle_is_small_and_has_a_card(bundle):
    assert sum(path.stat().st_size for path in bundle.iterdir()) <= MOST_BYTES
    card = (bundle / "README.md").read_text(encoding="utf-8")
    for part in ("Data", "Licence", "Command", "Scores", "Known limits"):
        assert f"* **{part}.**" in card, f"the card of {bundle.name} has no {part!r}"


def test_it_generates_from_one_shot(bundle):
    pipeline = FewShotPipeline.from_bundle(bundle)
    generator = pipeline.generator
    size = (1, generator.n_channels, generator.resolution, generator.resolution)
    shot = torch.rand(size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = pipeline(shot, n=4, alpha=1.0, seed=0, method="sage-i").images
    assert images.shape == (4, *size[1:]) and images.isfinite().all()
    assert (images[0] - images[1]).abs().mean() > 1e-3


def test_where_the_card_advises_against_the_mapping_the_package_does_too(bundle):
    pipeline = FewShotPipeline.from_bundle(bundle)
    shot = torch.zeros(1, pipeline.generator.n_channels, pipeline.generator.resolution, pipeline.generator.resolution)
    warns = "--method sage-i" in (bundle / "README.md").read_text(encoding="utf-8")
    with pytest.warns(SageFastWarning, match="take --method sage-i") if warns else contextlib.nullcontext():
        pipeline(shot, n=1, seed=0)
