"""Identity networks: one at best, and read from files."""

import pytest
import torch
from published_weights import filled

from sage_fast.errors import InputError
from sage_fast.models.identity import ArcFace, identity_loss, load_identity
from sage_fast.models.perceptual import SqueezeFeatures


@pytest.fixture(scope="module")
def arcface_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("identity") / "arcface.pt"
    torch.save(filled(ArcFace().state_dict()), path)
    return path


def test_arcface_of_a_file(arcface_file):
    network = load_identity(arcface_file)
    images = (torch.rand(3, 3, 32, 32) * 2 - 1).requires_grad_()
    vectors = network(images)
    assert network.name == "arcface" and vectors.shape == (3, 512)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    assert not any(p.requires_grad for p in network.parameters())
    loss = identity_loss(network, images, images.detach())
    assert abs(loss.item()) < 1e-5
    loss = identity_loss(network, images, images.detach().flip(0))
    assert 0 < loss.item() <= 2
    loss.backward()
    assert images.grad.abs().sum() > 0
    assert len(network.state_dict()) == 397  # as the published program has


def test_mean_features_of_a_file(tmp_path):
    torch.manual_seed(0)
    torch.save(SqueezeFeatures().state_dict(), tmp_path / "squeeze.pt")
    network = load_identity(tmp_path / "squeeze.pt")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert network.name == "squeezenet1_1" and network(images).shape == (2, 512)
    assert abs(float(identity_loss(network, images, images))) < 1e-5


def test_refuses_other_files(tmp_path):
    with pytest.raises(InputError, match="which is not a file"):
        load_identity(tmp_path / "none.pt")
    torch.save({"output_layer.3.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="ArcFace IR-SE50"):
        load_identity(tmp_path / "other.pt")
