"""A batch of floats is what ``to_float`` gives of the images at its index."""

from __future__ import annotations

import pytest
import torch

from sage_fast.data.batches import float_batch
from sage_fast.data.images import to_float

IMAGES = torch.arange(5 * 3 * 4 * 4).reshape(5, 3, 4, 4).to(torch.uint8)


@pytest.mark.parametrize("index", [[4, 0, 4], [], [2]])
def test_it_is_to_float_of_the_images_at_the_index(index):
    batch = float_batch(IMAGES, torch.tensor(index, dtype=torch.int64))
    assert batch.dtype == torch.float32
    assert torch.equal(batch, to_float(IMAGES[torch.tensor(index, dtype=torch.int64)]))


def test_the_chosen_are_mirrored_and_the_stored_stay_as_they_are():
    before = IMAGES.clone()
    batch = float_batch(IMAGES, torch.tensor([1, 1, 3]), torch.tensor([True, False, True]))
    expected = torch.stack([to_float(IMAGES[1]).flip(2), to_float(IMAGES[1]), to_float(IMAGES[3]).flip(2)])
    assert torch.equal(batch, expected)
    assert torch.equal(IMAGES, before)
    none = float_batch(IMAGES, torch.tensor([1]), torch.tensor([False]))
    assert torch.equal(none[0], to_float(IMAGES[1]))


def test_every_byte_gives_the_float_that_training_has_always_seen():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(float_batch(values, torch.tensor([0])), values.float() / 127.5 - 1)
