"""The discriminator of latents."""

import pytest
import torch

from sage_fast.errors import InputError
from sage_fast.models.latent_discriminator import LatentDiscriminator


def test_names_and_shapes_are_the_published_ones():
    shapes = {name: list(x.shape) for name, x in LatentDiscriminator(512, 4).state_dict().items()}
    assert [name for name in shapes if name.endswith("weight")] == [f"mlp.{i}.weight" for i in (0, 2, 4, 6)]
    assert shapes["mlp.0.weight"] == [512, 512] and shapes["mlp.6.weight"] == [1, 512]
    assert LatentDiscriminator(8)(torch.randn(5, 8)).shape == (5, 1)
    with pytest.raises(InputError, match="at least 1"):
        LatentDiscriminator(0)
