"""What the stages keep of a table of codes for the bundle."""

from __future__ import annotations

import shutil

import pytest
import rank_programs
import torch
from PIL import Image
from rank_processes import finish, start_ranks
from safetensors.torch import load_file

from sage_fast.data.latent_table import LatentTable
from sage_fast.data.writers import save_png
from sage_fast.errors import InputError
from sage_fast.training import stages
from sage_fast.training.logs import read_log
from sage_fast.training.stages import BundleConfig, _first_of_each, _without_folders, adopt_generator, read_seen


def test_the_first_codes_of_each_category_are_kept():
    labels = torch.tensor([1, 0, 1, 1, 0, 2])
    w_plus = torch.arange(6.0).view(6, 1, 1)
    table = LatentTable(w_plus, labels, ["a", "b", "c"], [f"{i}.png" for i in range(6)])
    assert _first_of_each(table, None) is table
    kept = _first_of_each(table, 2)
    assert kept.w_plus.flatten().tolist() == [0, 1, 2, 4, 5]
    assert kept.labels.tolist() == [1, 0, 1, 0, 2] and kept.files == ["0.png", "1.png", "2.png", "4.png", "5.png"]
    with pytest.raises(InputError, match="codes_per_category must be at least 2, since edits are drawn from"):
        BundleConfig(codes_per_category=1)


def test_a_bundle_names_files_but_not_the_folders_of_its_maker(tmp_path):
    settings = {
        "perceptual": str(tmp_path / "net.safetensors"),
        "augment": {"kind": "ada"},
        "lr": 0.1,
        "identity": "none",
    }
    told = {"perceptual": "net.safetensors", "augment": {"kind": "ada"}, "lr": 0.1, "identity": "none"}
    assert _without_folders(settings) == told


def test_seen_images_may_come_from_a_data_set_object_and_lie_in_a_cache(tmp_path):
    rows = [{"image": Image.new("RGB", (8, 9), (i, 0, 0)), "label": f"c{i % 2}"} for i in range(6)]
    images = read_seen(rows, 8)
    assert images.categories == ["c0", "c1"] and images.images[:, 0, 0, 0].tolist() == [0, 2, 4, 1, 3, 5]
    assert torch.equal(read_seen(rows, 8, cache=tmp_path / "cache").images, images.images)
    assert (tmp_path / "cache").is_dir()
    with pytest.raises(InputError, match="6 of 6 images .* smaller than the resolution 16"):
        read_seen(rows, 16)
    one = [row for row in rows if row["label"] == "c0"]
    with pytest.raises(
        InputError, match=r"has 1 category \(c0\), expected at least 2, since the dictionaries are learned"
    ):
        read_seen(one, 8)
    assert read_seen(one, 8, needs_two=None).categories == ["c0"]
    apart = [row | {"label": f"c{i}"} for i, row in enumerate(rows)]
    with pytest.raises(InputError, match=r"one image in each of its 6 categories, expected two in one at least"):
        read_seen(apart, 8)
    assert len(read_seen(apart, 8, needs_two="it makes a class of each").categories) == 6


def test_two_ranks_walk_the_road_as_one_does(tmp_path, tiny_bundle):
    """train-encoder, embed and train-dictionary with a given generator: the same bundle to rounding, written once."""
    for label in ("a", "b"):
        (tmp_path / "seen" / label).mkdir(parents=True)
        for i in range(8):
            pixels = torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
            save_png(tmp_path / "seen" / label / f"{i}.png", pixels)
    few = ["--total-steps=4", "--batch=4", "--save-every=2", "--log-every=1"]
    children = []
    for world in (1, 2):
        words = [f"--data={tmp_path / 'seen'}", f"--out={tmp_path / str(world)}"]
        encoder = [*few, "--channel-base=64", "--channel-max=16", "--head-width=4", "--perceptual=none"]
        road = [["train-encoder", *words, *encoder, f"--generator={tiny_bundle}"], ["embed", *words]]
        road += [["train-dictionary", *words, *few, "--n-directions=6", "--perceptual-weight=0"]]
        children += start_ranks(rank_programs.command, world, tmp_path / f"words_{world}", road)
    finish(children)
    for name in ("codes", "dictionary", "encoder"):
        one, two = (load_file(tmp_path / str(world) / f"{name}.safetensors") for world in (1, 2))
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-3, msg=f"{name}: {key}")
    assert [line["step"] for line in read_log(tmp_path / "2/logs/dictionary.jsonl")] == [1, 2, 3, 4]
    said = [child.text() for child in children]
    assert "The model is in" in said[1] and "The model is in" not in said[2]


def test_ranks_refuse_together(tmp_path):
    words = ["embed", f"--data={tmp_path / 'nowhere'}", f"--out={tmp_path}"]
    children = start_ranks(rank_programs.command, 2, tmp_path / "words", [words])
    assert [child.wait() for child in children] == [2, 2]
    assert all("holds no trained stage 'gan'" in child.text() for child in children)


def test_a_damaged_discriminator_is_not_taken_for_none(tmp_path, tiny_bundle):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (bundle / "discriminator.safetensors").write_bytes(b"cut off")
    with pytest.raises(InputError, match="discriminator.safetensors' is truncated or changed"):
        adopt_generator(bundle, tmp_path / "run")


@pytest.mark.parametrize("at", ["write_json", "atomic_write"])
def test_a_generator_that_was_taken_by_half_is_taken_again(tmp_path, tiny_bundle, monkeypatch, at):
    def full(*_):
        raise InputError("The disk is full.")

    with monkeypatch.context() as patched, pytest.raises(InputError, match="full"):
        patched.setattr(stages, at, full)
        adopt_generator(tiny_bundle, tmp_path)
    adopt_generator(tiny_bundle, tmp_path)
    assert stages._load_trained(tmp_path, "encoder").generator.resolution == 8
