"""What a conversion carries from one format to another, and what a format cannot hold."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sage_fast.data.latent_table import LatentTable
from sage_fast.errors import InputError
from sage_fast.factorization.category_irrelevant import CategoryIrrelevantDictionary, layer_groups
from sage_fast.models.image_encoder import ImageEncoder
from sage_fast.models.published_encoders import ENCODER_TYPES, encoder_type_of
from sage_fast.models.published_parts import EncoderPart, PublishedFile, is_usual_filter
from sage_fast.models.stylegan2 import Discriminator, Generator
from sage_fast.models.weights import (
    Directions,
    load_bundle_codes,
    load_directions,
    load_discriminator,
    load_encoder,
    load_generator,
    read_index,
)

__all__ = [
    "TARGETS",
    "Carried",
    "encoder_part",
    "from_bundle",
    "from_published",
    "lost",
    "refusal",
    "released_directions",
]

TARGETS = ("rosinality", "psp", "nvlabs", "sage_fast", "bundle")
#: what the common port's networks are, so far as it differs from network to network
_USUAL: dict[str, dict[str, Any]] = {
    "generator": {
        "connections": "skip", "n_channels": 3, "c_dim": 0, "z_dim": None, "mapping_width": None, "mapping_lr_mul": 0.01,
    },
    "discriminator": {"connections": "resnet", "n_channels": 3, "c_dim": 0, "mbstd_channels": 1},
}  # fmt: skip
StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Carried:
    """What a conversion carries over.

    Attributes:
        part: an encoder as a published file has it.
        encoder: one as a bundle has it.
        noise, about: of a bundle.
    """

    generator: Generator | None
    discriminator: Discriminator | None
    part: EncoderPart | None = None
    encoder: ImageEncoder | None = None
    directions: Directions | None = None
    codes: LatentTable | None = None
    noise: str = "const"
    about: Mapping[str, Any] = field(default_factory=dict)


def from_published(found: PublishedFile) -> Carried:
    """The networks of a file, and the directions of AGE or SAGE in all layers of their generator.

    Raises:
        InputError: it has no network, or one that is refused.
    """
    G = None if found.generator is None else found.generator().build()
    D = None if found.discriminator is None else found.discriminator().build()
    E = None if found.encoder is None else found.encoder()
    if G is None and D is None and E is None:
        raise InputError(f"a {found.format} file holds no network, so there is nothing to convert.")
    directions = None
    if found.directions is not None:
        n_latent = len(found.directions) if G is None else G.n_latent
        dictionary = CategoryIrrelevantDictionary.from_released(found.directions, n_latent)
        directions = Directions(dictionary.directions, dictionary.groups)
    about = {"format": found.format} | ({} if E is None else {"opts": _plain(E.options)})
    return Carried(G, D, part=E, directions=directions, about=about)


def from_bundle(path: StrPath) -> Carried:
    """All that the folder of a bundle has."""
    index = read_index(path)
    networks, files = index["networks"], index["files"]
    return Carried(
        load_generator(path),
        load_discriminator(path) if "discriminator" in networks else None,
        encoder=load_encoder(path) if "encoder" in networks else None,
        directions=load_directions(path) if "dictionary.safetensors" in files else None,
        codes=load_bundle_codes(path) if "codes.safetensors" in files else None,
        noise=index["noise"],
        about=index["about"],
    )


def encoder_part(carried: Carried) -> EncoderPart | None:
    """The encoder as a published file has it; None where there is none, or no published one is like it."""
    E, G = carried.encoder, carried.generator
    if E is None or G is None:
        return carried.part
    found = encoder_type_of(E)
    if found is None:
        return None
    options = dict(carried.about["opts"]) if isinstance(carried.about.get("opts"), Mapping) else {}
    if options.get("encoder_type") not in ENCODER_TYPES:
        options["encoder_type"] = found
    options |= {"output_size": G.resolution, "start_from_latent_avg": True}
    options |= {"n_iters_per_batch": E.n_iterations} if E.n_iterations else {}
    if options["encoder_type"] == "BackboneEncoderUsingLastLayerIntoW":
        options["learn_in_w"] = True  # how pSp's own code knows that one row is added to one latent
    n_rows = 1 if options.get("learn_in_w") is True else getattr(E, "n_styles", G.n_latent)
    state = {f"encoder.{name}": value.detach().cpu() for name, value in E.state_dict().items()}
    return EncoderPart(state, options, G.latent_avg.repeat(n_rows, 1), "the bundle")


def released_directions(directions: Directions | None) -> Tensor | None:
    """A [6, D, K] as AGE and SAGE keep it; None where there are none, or other layers are edited."""
    if directions is None:
        return None
    A, groups = directions
    released = groups == layer_groups(len(A), "released") and len(A) >= 6
    return A[:6].contiguous() if released and not bool(A[6:].any()) else None


def refusal(target: str, carried: Carried) -> str | None:
    """Why a target cannot hold the networks, or None."""
    G, D = carried.generator, carried.discriminator
    if G is None and (target in ("psp", "bundle") or D is None):
        return "it holds no generator"
    if target == "bundle":
        return _no_encoder(carried)
    if target == "sage_fast":
        return None
    if target == "nvlabs":
        return _no_nvlabs(G, D)
    for network, usual in _USUAL.items():
        found_network = G if network == "generator" else D
        if found_network is None or (found_network is D and target == "psp"):
            continue
        for name, value in usual.items():
            found = getattr(found_network, name)
            if found != value:
                return f"the common port's {network} has {name}={value!r} only, this one has {found!r}"
    return None


def _no_nvlabs(G: Generator | None, D: Discriminator | None) -> str | None:
    if D is not None and D.resolution == 4:
        return "NVLabs' discriminator begins at 8 px"
    kernels = (
        b for network in (G, D) if network is not None for name, b in network.named_buffers() if name.endswith("kernel")
    )
    return None if all(map(is_usual_filter, kernels)) else "its resampling filters differ from their mirror images"


def _no_encoder(carried: Carried) -> str | None:
    if carried.encoder is None and carried.part is None:
        return "it holds no encoder, which a bundle has; use --to sage_fast"
    if carried.part is not None and any(name.startswith("hypernet.") for name in carried.part.state):
        return "the W encoder of its HyperStyle is in another file"
    return None


def lost(target: str, carried: Carried) -> list[str]:
    """What is left behind, or what the target's own code does not read."""
    if target == "bundle":
        return []
    E, D = carried.encoder or carried.part, carried.discriminator
    found = ["the encoder"] if E is not None and (target != "psp" or encoder_part(carried) is None) else []
    if carried.directions is not None and (target != "psp" or released_directions(carried.directions) is None):
        found.append("directions")
    if carried.codes is not None:
        found.append("codes")
    if D is not None and target == "psp":
        found.append("the discriminator")
    if target in ("rosinality", "psp"):
        parts = (carried.generator, D if target == "rosinality" else None)
        found += [f"the clamp {n.clamp} for its own code (this package reads it)" for n in parts[:1] if n and n.clamp]
        found += ["the standard-deviation groups for its own code" for n in parts[1:] if n and n.mbstd_group != 4]
    return found


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that JSON can hold."""
    kept = {str(name): value for name, value in options.items() if isinstance(value, str | int | float | None)}
    return {name: value for name, value in kept.items() if not isinstance(value, float) or math.isfinite(value)}
