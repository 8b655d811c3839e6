"""Identity networks: a frozen network whose cosine similarity says how much two images show the same thing.

pSp, e4e, ReStyle and HyperStyle train with ArcFace on faces and with other features elsewhere; here it is any file: an ArcFace
IR-SE50 by its published names, or a feature network that :mod:`sage_fast.models.perceptual` reads.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sage_fast.errors import InputError
from sage_fast.models.image_encoder import resized
from sage_fast.models.irse import WIDTH, Trunk
from sage_fast.models.perceptual import FeatureNetwork, load_perceptual, read_weights

__all__ = ["ArcFace", "IdentityNetwork", "MeanFeatures", "identity_loss", "load_identity"]

_FACE = (slice(35, 223), slice(32, 220))  # rows and columns of a face aligned as FFHQ's, at 256 px
_FACE_SIDE = 112


class ArcFace(Trunk):
    """IR-SE50 of ArcFace (Deng et al. 2019) with its output layers: aligned faces -> unit vectors [N, 512]."""

    name = "arcface"

    def __init__(self, affine: bool = True) -> None:
        super().__init__("irse50", 3)
        side = _FACE_SIDE // 16
        flat = (nn.BatchNorm2d(WIDTH), nn.Dropout(), nn.Flatten(), nn.Linear(WIDTH * side * side, WIDTH))
        self.output_layer = nn.Sequential(*flat, nn.BatchNorm1d(WIDTH, affine=affine))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 3, R, R] in [-1, 1] -> unit vectors [N, 512] of the face in their middle."""
        faces = F.adaptive_avg_pool2d(resized(images, self.resolution)[:, :, _FACE[0], _FACE[1]], _FACE_SIDE)
        return F.normalize(self.output_layer(self.maps(faces)[2]))


class MeanFeatures(nn.Module):
    """The last map of a feature network, mean over positions: images -> unit vectors."""

    def __init__(self, network: FeatureNetwork) -> None:
        super().__init__()
        self.network, self.name = network, network.name
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] in [-1, 1] -> unit vectors [N, F]."""
        return F.normalize(self.network(images)[-1].mean((2, 3)))


IdentityNetwork = ArcFace | MeanFeatures


def identity_loss(network: IdentityNetwork, images: Tensor, target: Tensor) -> Tensor:
    """One minus the cosine similarity of the networks' vectors, mean over the batch: 0 at best (pSp, Eq. 4)."""
    with torch.no_grad():
        wanted = network(target)
    return 1 - (network(images).float() * wanted.float()).sum(1).mean()


def load_identity(path: str | Path) -> IdentityNetwork:
    """The identity network of a weights file (.safetensors, .pt, .pth; no pickled code runs), frozen, on the CPU.

    Raises:
        InputError: no such file, or one of another network.
    """
    if not Path(path).is_file():
        raise InputError(f"identity must be 'none' or a weights file, got {str(path)!r}, which is not a file.")
    state = read_weights(Path(path))
    if "output_layer.3.weight" not in state:
        network = load_perceptual(path)
        assert network is not None
        return MeanFeatures(network)
    arcface = ArcFace(affine="output_layer.4.weight" in state)
    try:
        arcface.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(
            f"{path} must hold an ArcFace IR-SE50 with input_layer, body and output_layer, got {len(state)} tensors of "
            "another network; choose another file."
        ) from error
    return arcface
