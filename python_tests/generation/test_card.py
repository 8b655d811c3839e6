"""The data card of an output."""

from __future__ import annotations

from pathlib import Path

import pytest

from sage_fast.generation import GenerateConfig, generate
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


@pytest.mark.parametrize(
    ("format", "files"), [("folder", "*/*.jpg"), ("webdataset", "shard-*.tar"), ("safetensors", None)]
)
def test_the_head_names_the_files_with_images_to_hugging_face(tiny_bundle, tiny_shots, tmp_path, format, files):
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    image = "png" if files is None else "jpg"
    generate(tiny_bundle, tiny_shots, tmp_path / "out", GenerateConfig(n=5, format=format, image=image))
    head, mark, rest = (tmp_path / "out" / "README.md").read_text().removeprefix("---\n").partition("---\n")
    if files is None:
        assert head.startswith("# Generated images") and not mark
        return
    (named,) = yaml.safe_load(head)["configs"]
    assert named["data_files"] == files and rest.startswith("# Generated images")
    found = {file.name for file in (tmp_path / "out").glob(files)}
    assert len(found) == (10 if format == "folder" else 1) and "contact_sheet.png" not in found


def test_hugging_face_reads_the_images_with_their_labels(tiny_bundle, tiny_shots, tmp_path):
    load_dataset = pytest.importorskip("datasets", reason="datasets is not installed").load_dataset
    generate(tiny_bundle, tiny_shots, tmp_path / "out", GenerateConfig(n=5))
    read = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    names = read.features["label"].names
    assert sorted(names[label] for label in read["label"]) == [name for name in sorted(names) for _ in range(5)]
