"""What a dry run says beside what a run then takes."""

from __future__ import annotations

import pytest

from sage_fast.generation import GenerateConfig, generate
from sage_fast.generation.config import FORMATS
from sage_fast.generation.probing import estimate


@pytest.mark.parametrize("format", FORMATS)
def test_sizes_are_those_of_the_files(tiny_bundle, tiny_shots, tmp_path, format):
    config = GenerateConfig(n=40, batch=20, format=format)
    said = estimate(tiny_bundle, tiny_shots, config)
    generate(tiny_bundle, tiny_shots, tmp_path / "out", config)
    others = ("config.json", "README.md", "SHA256SUMS", "contact_sheet.png", ".sage_fast.json", ".sage_fast.lock")
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file() and file.name not in others]
    assert sum(file.stat().st_size for file in files) == pytest.approx(said.bytes, rel=0.15)


def test_shards_of_a_size_are_counted(tiny_bundle, tiny_shots, tmp_path):
    config = GenerateConfig(n=40, batch=20, format="webdataset", shard_mb=0.05)
    said = estimate(tiny_bundle, tiny_shots, config)
    generate(tiny_bundle, tiny_shots, tmp_path / "out", config)
    assert said.n_shards == len(list((tmp_path / "out").glob("*.tar"))) > 1
