"""Encoders rebuilt from what a bundle says of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sage_fast.models.encoders import PyramidEncoder
from sage_fast.models.hypernets import PyramidHypernet, ResNetHypernet
from sage_fast.models.hyperstyle import HyperStyle
from sage_fast.models.image_encoder import ImageEncoder
from sage_fast.models.psp import GradualStyleEncoder, WEncoder, WPlusEncoder

__all__ = ["KINDS", "build_encoder", "encoder_architecture"]

KINDS = ("psp", "e4e", "restyle", "hyperstyle")

_ONE_NETWORK = {cls.network: cls for cls in (PyramidEncoder, GradualStyleEncoder, WEncoder, WPlusEncoder)}
_HYPERNETS = {cls.network: cls for cls in (PyramidHypernet, ResNetHypernet)}


def encoder_architecture(encoder: ImageEncoder) -> dict[str, Any]:
    """Plain values that say what an encoder is: its kind, its network, and the network's sizes."""
    return {"kind": encoder.kind, "network": encoder.network, **encoder.architecture()}


def build_encoder(architecture: Mapping[str, Any]) -> ImageEncoder:
    """The encoder, with fresh weights, of :func:`encoder_architecture`; without kind and network a ``PyramidEncoder``.

    Raises:
        KeyError, TypeError: the values are not those of an encoder.
    """
    sizes = {key: value for key, value in architecture.items() if key not in ("kind", "network")}
    network = architecture.get("network", PyramidEncoder.network)
    if network != HyperStyle.network:
        return _ONE_NETWORK[network](**sizes)
    about = dict(sizes["hypernet"])
    hypernet = _HYPERNETS[about.pop("network")](**about)
    return HyperStyle(build_encoder(sizes["w_encoder"]), hypernet, sizes["n_iterations"])
