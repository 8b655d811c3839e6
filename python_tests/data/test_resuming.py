"""What tells two data sets apart."""

from __future__ import annotations

import dataclasses

import torch

from sage_fast.data.folders import ImageSet
from sage_fast.data.resuming import data_fingerprint

PIXELS = torch.randint(0, 256, (200, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SET = ImageSet(PIXELS, torch.arange(200) % 2, ["a", "b"], [f"{i}.png" for i in range(200)], [], "somewhere")


def test_names_and_numbers_count_but_not_the_place():
    found = data_fingerprint(SET)
    assert found["images"] == 200 and found["categories"] == 2 and len(found["names"]) == 16
    assert data_fingerprint(dataclasses.replace(SET, root="elsewhere", images=PIXELS + 1)) == found
    for change in ({"files": SET.files[1:] + ["x.png"]}, {"categories": ["a", "c"]}, {"files": SET.files[:-1]}):
        assert data_fingerprint(dataclasses.replace(SET, **change)) != found
    joined = dataclasses.replace(SET, categories=["a"], files=["b", *SET.files])
    assert data_fingerprint(joined)["names"] != data_fingerprint(dataclasses.replace(SET, files=SET.files))["names"]


def test_bare_images():
    found = data_fingerprint(PIXELS)
    assert found["images"] == 200 and set(found) == {"images", "pixels"}
    assert data_fingerprint(PIXELS.clone()) == found and data_fingerprint(PIXELS + 1) != found
    assert data_fingerprint(PIXELS[:3]) != data_fingerprint(PIXELS[:4]) and data_fingerprint(PIXELS[:0])["images"] == 0
