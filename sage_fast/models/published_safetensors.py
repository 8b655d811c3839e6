"""Networks in safetensors files: under our own names, or under those of NVLabs' PyTorch code.

Names of several networks bear a prefix: ``generator.`` and ``discriminator.`` in files of ours, ``G_ema.`` (or ``G.``)
and ``D.`` beside NVLabs' names. What weights do not tell is JSON in the metadata; without it, a network has no clamp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sage_fast.errors import InputError
from sage_fast.models import published_nvlabs, published_rosinality
from sage_fast.models.published_parts import PublishedFile, prefixed
from sage_fast.models.published_rosinality import FACTS, told

__all__ = ["pack", "read_safetensors"]

_PREFIXES = {"generator": ("generator.", "G_ema.", "G."), "discriminator": ("discriminator.", "D.")}
_FIRST = {  # a name that every such network has
    "generator": ("input.input", "synthesis.b4.const", "synthesis.input.freqs"),
    "discriminator": ("final_conv.0.weight", "b4.conv.weight"),
}


def read_safetensors(state: Mapping[str, Tensor], metadata: Mapping[str, str], where: str) -> PublishedFile | None:
    """The networks of such a file, or None where it holds others."""
    found = {kind: _network(state, kind) for kind in _FIRST}
    names = [name for weights in found.values() if weights is not None for name in weights]
    if not names:
        return None
    nvlabs, facts = "synthesis.b4.const" in names or "b4.conv.weight" in names, _facts(metadata, where)
    module = published_nvlabs if nvlabs else published_rosinality
    G, D = found["generator"], found["discriminator"]
    used = sum(weights is not None and len(weights) for weights in found.values())
    return PublishedFile(
        format="NVLabs names in safetensors" if nvlabs else "sage_fast safetensors",
        generator=None
        if G is None
        else lambda: module.generator_part(G, f"{where}, generator,", **told(facts, "generator")),
        discriminator=None
        if D is None
        else lambda: module.discriminator_part(D, f"{where}, discriminator,", **told(facts, "discriminator")),
        has_latent_avg=G is not None and bool({"latent_avg", "mapping.w_avg"} & set(G)),
        ignored=(f"{len(state) - used} tensors",) if used < len(state) else (),
    )


def pack(networks: Mapping[str, Mapping[str, Tensor]], prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """The weights of several networks, by kind, behind the prefix of each."""
    return {f"{prefixes[kind]}{name}": t for kind, state in networks.items() for name, t in state.items()}


def _network(state: Mapping[str, Tensor], kind: str) -> dict[str, Tensor] | None:
    """The weights of the network of a kind; a file of one network alone may do without prefixes."""
    for prefix in (*_PREFIXES[kind], "module."):
        if any(prefix + name in state for name in _FIRST[kind]):
            return prefixed(state, prefix)
    return dict(state) if any(name in state for name in _FIRST[kind]) else None


def _facts(metadata: Mapping[str, str], where: str) -> Mapping[str, Any]:
    text = metadata.get(FACTS, "")
    if not text.startswith("{"):  # the files of a bundle have the network's name there
        return {}
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} has damaged metadata ({error}); write it again.") from error
