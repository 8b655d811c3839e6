"""What the stages keep of a table of codes for the bundle."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from sage_fast.data.latent_table import LatentTable
from sage_fast.errors import InputError
from sage_fast.training.stages import BundleConfig, _first_of_each, read_seen


def test_the_first_codes_of_each_category_are_kept():
    labels = torch.tensor([1, 0, 1, 1, 0, 2])
    w_plus = torch.arange(6.0).view(6, 1, 1)
    table = LatentTable(w_plus, labels, ["a", "b", "c"], [f"{i}.png" for i in range(6)])
    assert _first_of_each(table, None) is table
    kept = _first_of_each(table, 2)
    assert kept.w_plus.flatten().tolist() == [0, 1, 2, 4, 5]
    assert kept.labels.tolist() == [1, 0, 1, 0, 2] and kept.files == ["0.png", "1.png", "2.png", "4.png", "5.png"]
    with pytest.raises(InputError, match="codes_per_category must be at least 1"):
        BundleConfig(codes_per_category=0)


def test_seen_images_may_come_from_a_data_set_object_and_lie_in_a_cache(tmp_path):
    rows = [{"image": Image.new("RGB", (8, 9), (i, 0, 0)), "label": f"c{i % 2}"} for i in range(6)]
    images = read_seen(rows, 8)
    assert images.categories == ["c0", "c1"] and images.images[:, 0, 0, 0].tolist() == [0, 2, 4, 1, 3, 5]
    assert torch.equal(read_seen(rows, 8, cache=tmp_path / "cache").images, images.images)
    assert (tmp_path / "cache").is_dir()
    with pytest.raises(InputError, match="6 of 6 images .* smaller than the resolution 16"):
        read_seen(rows, 16)
    with pytest.raises(InputError, match="expected at least 2"):
        read_seen([row for row in rows if row["label"] == "c0"], 8)
