"""The fixed grids: a row a class, the same z down a column, real images of the same classes."""

from __future__ import annotations

import pytest
import torch
from tiny_model import STYLE_DIM, tiny_networks

from sage_fast.errors import InputError
from sage_fast.models.stylegan2 import Generator
from sage_fast.training.grids import grid_latents, grid_reals


def conditional(c_dim: int) -> Generator:
    return Generator(4, STYLE_DIM, n_mapping=1, channel_base=32, channel_max=8, c_dim=c_dim).requires_grad_(False)


def test_a_grid_without_classes_is_fixed_by_the_seed():
    generator, before = tiny_networks()[0], torch.get_rng_state()
    z, c = grid_latents(generator, rows=3, columns=5)
    assert z.shape == (15, STYLE_DIM) and c is None
    assert torch.equal(z, grid_latents(generator, 3, 5)[0]) and not torch.equal(z, grid_latents(generator, 3, 5, 1)[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_conditional_generator_has_a_row_a_class_and_a_column_a_latent():
    z, c = grid_latents(conditional(3), rows=8, columns=5)
    assert c.argmax(1).view(3, 5).tolist() == [[0] * 5, [1] * 5, [2] * 5]
    assert c.sum(1).tolist() == [1] * 15
    assert all(torch.equal(row, z[:5]) for row in z.split(5)) and len(z[:5].unique(dim=0)) == 5
    images = conditional(3)(conditional(3).mapping(z, c))
    assert images.shape == (15, 3, 4, 4)


def test_many_classes_are_shown_at_equal_distances():
    assert grid_latents(conditional(50), rows=8, columns=1)[1].argmax(1).tolist() == [0, 7, 14, 21, 28, 35, 42, 49]
    assert grid_latents(conditional(50), rows=1, columns=2)[1].argmax(1).tolist() == [0, 0]


def test_real_images_of_the_grid_are_of_the_same_classes():
    labels = torch.tensor([2, 0, 2, 1, 2, 2, 0])
    index = grid_reals(labels, rows=3, columns=3)
    assert labels[index].view(3, 3).tolist() == [[0] * 3, [1] * 3, [2] * 3]
    assert index.tolist() == [1, 6, 1, 3, 3, 3, 0, 2, 4]
    many = torch.arange(50).repeat(2)
    assert torch.equal(many[grid_reals(many, 8, 1)], grid_latents(conditional(50), 8, 1)[1].argmax(1))


def test_an_empty_grid_is_refused():
    with pytest.raises(InputError, match="rows and columns must be at least 1, got 0 and 8"):
        grid_reals(torch.zeros(4, dtype=torch.int64), rows=0)
    with pytest.raises(InputError, match="got 8 and -1"):
        grid_latents(conditional(2), columns=-1)
