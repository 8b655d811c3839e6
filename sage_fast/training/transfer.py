"""Start adversarial training from other networks: Wang et al. 2018, "Transferring GANs: generating images from limited data".

Layers go by name and by the resolution they work at, so a source of another size, width or number of image channels
gives what it has.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sage_fast.errors import InputError, counted
from sage_fast.models.stylegan2 import Discriminator, Generator
from sage_fast.models.weights import load_discriminator, load_generator

__all__ = ["transfer"]

_NAMED = 6  # fresh layers that the report lists by name


@torch.no_grad()
def transfer(source: str | os.PathLike[str], G: Generator, D: Discriminator, average: Generator) -> str:
    """Copy into G, D and the averaged generator what the networks of ``source`` have for them; the rest stays as it is.

    A layer is taken whole, where every tensor of it has the shape that is needed. Beyond that, toRGB and fromRGB are
    carried over to another number of image channels (colours averaged or repeated; alpha stays fresh), and the first
    layer of an unconditional mapping to a conditional one (labels weigh nothing at first). The mapping is taken only
    from one of the same depth.

    Args:
        source: a bundle, or a file that ``load_generator`` reads; a discriminator may be missing. A run whose bundle has none
            gives that of its GAN.
    Returns:
        One line that says what was taken and what is fresh.
    Raises:
        InputError: ``source`` cannot be read, or no layer of its generator fits.
    """
    old = load_generator(source)
    taken = _into_generator(old, G)
    if not any(name.startswith(("convs.", "conv1", "style.")) for name in taken):
        raise InputError(
            f"nothing of {str(source)!r} fits: its generator has style_dim {old.style_dim} and channels {old.channels} at "
            f"4, 8, ... px, the new one {G.style_dim} and {G.channels}; give --style-dim, --channel-base and --channel-max alike."
        )
    average.load_state_dict(G.state_dict())
    parts = [_report("G", G, taken)]
    try:
        parts.append(_report("D", D, _into_discriminator(_discriminator_of(source), D)))
    except InputError as error:  # many files hold none
        parts.append(f"D is fresh ({str(error).rstrip('.')})")
    what = f"{old.resolution} px, {counted(old.n_channels, 'channel')}"
    return f"started from {str(source)!r} ({what}): {'; '.join(parts)}."


def _discriminator_of(source: str | os.PathLike[str]) -> Discriminator:
    """That of a bundle or file; of a run whose bundle has none, that of its GAN."""
    try:
        return load_discriminator(source)
    except InputError:
        checkpoint = Path(source) / "checkpoints" / "gan.pt"
        if not checkpoint.is_file():
            raise
        return load_discriminator(checkpoint)


def _into_generator(old: Generator, G: Generator) -> set[str]:
    """Copy; returns the names of the layers taken. Names count from 4 px up, so equal names are equal resolutions."""
    state = {name: value for name, value in old.state_dict().items() if name != "latent_avg"}
    if old.connections != G.connections:  # one toRGB at the end instead of one a resolution
        state = {name: value for name, value in state.items() if not name.startswith(("to_rgb", "skips."))}
    if (old.n_mapping, old.mapping_lr_mul) != (G.n_mapping, G.mapping_lr_mul):
        state = {name: value for name, value in state.items() if not name.startswith("style.")}
    for name, value in state.items():
        if name.startswith("to_rgb") and old.n_channels != G.n_channels:
            if name.endswith((".conv.weight", ".bias")) and ".modulation." not in name:
                state[name] = _recoloured(value, G.state_dict().get(name))
    if G.c_dim and not old.c_dim and "style.1.weight" in state:
        state["style.1.weight"] = _with_labels(state["style.1.weight"], G.state_dict()["style.1.weight"])
    taken = _copy(state, G)
    if all(f"style.{i}" in taken for i in range(1, G.n_mapping + 1)):
        G.latent_avg.copy_(old.latent_avg)
    return taken


def _into_discriminator(old: Discriminator, D: Discriminator) -> set[str]:
    """Copy; returns the names of the layers taken. Names count from the largest resolution down, so they are shifted."""
    shift = old.resolution.bit_length() - D.resolution.bit_length()
    state = {}
    for name, value in old.state_dict().items():
        parts = name.split(".")
        if parts[0] == "convs":
            number = int(parts[1]) - shift if parts[1] != "0" else 0
            if (number < 1) != (parts[1] == "0") or (number == 0 and shift):
                continue  # a block of a resolution that D lacks, or fromRGB of another
            parts[1] = str(number)
        state[".".join(parts)] = value
    first = "convs.0.0.weight"
    if first in state and old.n_channels != D.n_channels:
        seen = [1 if n <= 2 else 3 for n in (old.n_channels, D.n_channels)]  # colours
        scale = math.sqrt(D.n_channels / old.n_channels) * seen[0] / seen[1]  # the response to a grey image stays
        state[first] = _recoloured(state[first] * scale, D.state_dict()[first])
    return _copy(state, D)


def _copy(state: Mapping[str, Tensor], network: nn.Module) -> set[str]:
    """Copy the layers of which every tensor is there in the shape that is needed; returns their names."""
    own = {name: value for name, value in network.state_dict().items() if name != "latent_avg"}
    fits = {name: name in state and state[name].shape == value.shape for name, value in own.items()}
    taken = {_layer(name) for name in own} - {_layer(name) for name, good in fits.items() if not good}
    for name, value in own.items():
        if _layer(name) in taken:
            value.copy_(state[name])
    return taken


def _layer(name: str) -> str:
    """The layer a tensor belongs to: ``style.1``, ``convs.3`` (generator), ``convs.2.conv1`` (discriminator), ..."""
    parts = name.split(".")
    if parts[0] == "final_conv":
        return parts[0]
    if parts[0] == "convs" and parts[2] in ("conv1", "conv2", "skip"):
        return ".".join(parts[:3])
    inner = len(parts) > 1 and (parts[1].isdigit() or parts[1] == "embed" or parts[0] == "noises")
    return ".".join(parts[:2]) if inner else parts[0]


def _recoloured(weight: Tensor, like: Tensor | None) -> Tensor:
    """A tensor [A, n_channels, ...] for the number of channels of ``like``, whose alpha stays where there was none."""
    if like is None or like.shape[2:] != weight.shape[2:] or len(like) != len(weight):
        return weight
    before, after = weight.shape[1], like.shape[1]
    colours = weight[:, : 1 if before <= 2 else 3]
    if after <= 2:
        colours = colours.mean(1, keepdim=True)
    elif before <= 2:
        colours = colours.expand(-1, 3, *weight.shape[2:])
    alpha = like[:, colours.shape[1] :] if before % 2 else weight[:, -1:]
    return torch.cat([colours, alpha], 1)[:, :after]


def _with_labels(weight: Tensor, like: Tensor) -> Tensor:
    """The first layer of a mapping without labels [D, Z] for one with [D, Z + E]: as before, whatever the label."""
    if like.shape[1] <= weight.shape[1] or len(like) != len(weight):
        return weight
    wide = torch.zeros_like(like)
    wide[:, : weight.shape[1]] = weight * math.sqrt(like.shape[1] / weight.shape[1])  # weights are scaled by the width
    return wide


def _report(name: str, network: nn.Module, taken: Iterable[str]) -> str:
    sizes = {n: p.numel() for n, p in network.named_parameters()}
    share = sum(size for n, size in sizes.items() if _layer(n) in taken) / sum(sizes.values())
    fresh = list(dict.fromkeys(_layer(n) for n in sizes if _layer(n) not in taken))
    more = f" and {len(fresh) - _NAMED} more" if len(fresh) > _NAMED else ""
    rest = f", fresh: {', '.join(fresh[:_NAMED])}{more}" if fresh else ""
    return f"{name} took {100 * share:.0f} % of its weights{rest}"
