"""The ``.pt`` of the common PyTorch port: state dicts ``g_ema``, ``g``, ``d`` under our own names, and ``latent_avg``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sage_fast.errors import InputError
from sage_fast.models.published_parts import (
    Part,
    PublishedFile,
    average_of,
    count,
    floats,
    misfit,
    shapes_of,
)
from sage_fast.models.stylegan2 import Discriminator, Generator

__all__ = ["FACTS", "discriminator_part", "facts_of", "generator_part", "mean_row", "read_rosinality", "told"]

#: entry of ours in others' files: what weights do not tell, by the name of the network's entry
FACTS = "sage_fast"
_TOLD = ("clamp", "mapping_lr_mul", "mbstd_group")


def read_rosinality(content: Any, where: str) -> PublishedFile | None:
    """The networks of such a file, or of a bare state dict; None where ``content`` is something else."""
    if not isinstance(content, Mapping):
        return None
    if "input.input" in content or "module.input.input" in content:
        content = {"g_ema": content}
    elif "final_conv.0.weight" in content or "module.final_conv.0.weight" in content:
        content = {"d": content}
    if not {"g_ema", "g", "d"} & set(content):
        return None
    key = "g_ema" if "g_ema" in content else "g"
    average, facts = content.get("latent_avg"), content.get(FACTS)
    G, D = content.get(key), content.get("d")
    return PublishedFile(
        format="rosinality .pt",
        generator=None
        if G is None
        else lambda: generator_part(G, f"{where}, entry {key!r},", average, **told(facts, key)),
        discriminator=None if D is None else lambda: discriminator_part(D, f"{where}, entry 'd',", **told(facts, "d")),
        has_latent_avg=average is not None or (isinstance(G, Mapping) and "latent_avg" in G),
        ignored=tuple(str(name) for name in content if name not in {key, "d", "latent_avg", FACTS}),
    )


def generator_part(state: Any, where: str, latent_avg: Any = None, **facts: Any) -> Part:
    """A generator from weights under the port's names, which are ours.

    Args:
        state: its weights; a prefix ``module.`` of all names is dropped, noise maps may be missing.
        where: the file, for messages.
        latent_avg: [D], [1, D] or [n, D]; a mean of rows that differ.
        facts: arguments of :class:`Generator` that the weights do not tell.
    Raises:
        InputError: they are weights of something else.
    """
    state = floats(state, where)
    try:
        arguments = _generator_arguments(state) | facts
        shapes = shapes_of(Generator, arguments)
    except (KeyError, IndexError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise misfit(where, "StyleGAN2 generator", error) from error
    average = average_of(latent_avg, where)
    if average is not None:
        state["latent_avg"] = mean_row(average, arguments["style_dim"], where)
    if not any(name.startswith("noises.") for name in state):
        state |= {name: torch.zeros(shape) for name, shape in shapes.items() if name.startswith("noises.")}
    return Part(Generator, arguments, _checked(state, shapes, where), where)


def discriminator_part(state: Any, where: str, **facts: Any) -> Part:
    """A discriminator from weights under the port's names; arguments and errors as of :func:`generator_part`."""
    state = floats(state, where)
    try:
        arguments = _discriminator_arguments(state) | facts
        shapes = shapes_of(Discriminator, arguments)
    except (KeyError, IndexError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise misfit(where, "StyleGAN2 discriminator", error) from error
    return Part(Discriminator, arguments, _checked(state, shapes, where), where)


def mean_row(latent_avg: Tensor, style_dim: int, where: str) -> Tensor:
    """A mean latent [D] from what files keep: [D], [1, D], or one row a layer [n, D], of which the mean is taken.

    Raises:
        InputError: another width.
    """
    rows = latent_avg.float().reshape(-1, latent_avg.shape[-1] if latent_avg.ndim else 1)
    if rows.shape[1] != style_dim or not len(rows):
        raise InputError(
            f"{where} has a latent_avg of shape {list(latent_avg.shape)}, expected [{style_dim}] or [n, {style_dim}]."
        )
    return rows[0].clone() if bool((rows == rows[0]).all()) else rows.mean(0)


def told(facts: Any, key: str) -> dict[str, Any]:
    """The arguments of the network ``key`` that :func:`facts_of` wrote beside its weights."""
    found = facts.get(key, {}) if isinstance(facts, Mapping) else {}
    numbers = found.items() if isinstance(found, Mapping) else ()
    return {name: value for name, value in numbers if name in _TOLD and isinstance(value, int | float | None)}


def facts_of(network: Generator | Discriminator) -> dict[str, Any]:
    """The arguments of a network that its weights do not tell."""
    return {name: getattr(network, name) for name in _TOLD if hasattr(network, name)}


def _checked(state: dict[str, Tensor], shapes: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    missing = [name for name in shapes if name not in state and name != "latent_avg"]
    for word, wrong in (("lacks", missing), ("has an unexpected", [name for name in state if name not in shapes])):
        if wrong:
            raise InputError(f"{where} {word} {wrong[0]!r}, so it does not hold the weights expected of StyleGAN2.")
    for name, value in state.items():
        if value.shape != shapes[name]:
            raise InputError(
                f"{where} does not hold the weights expected: {name!r} has shape {list(value.shape)}, the other weights "
                f"ask for {list(shapes[name])}."
            )
    return state


def _generator_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of :class:`Generator` that its weights tell."""
    n_blocks = count(state, "convs.", ".conv.weight") // 2
    convs = [state["conv1.conv.weight"], *(state[f"convs.{2 * i}.conv.weight"] for i in range(n_blocks))]
    style_dim = state["conv1.conv.modulation.weight"].shape[1]
    n_mapping, first = count(state, "style.", ".weight"), state["style.1.weight"]
    embed, single = state.get("style.embed.weight"), n_blocks > 0 and "to_rgb1.bias" not in state
    embed_dim, c_dim = (0, 0) if embed is None else embed.shape
    usual = {"z_dim": first.shape[1] - embed_dim, "embed_dim": embed_dim if c_dim else style_dim}
    usual["mapping_width"] = first.shape[0] if n_mapping > 1 else style_dim
    return {
        "resolution": 4 << n_blocks,
        "style_dim": style_dim,
        "n_mapping": n_mapping,
        "n_channels": state["to_rgbs.0.bias" if single else "to_rgb1.bias"].shape[1],
        "channels": [weight.shape[1] for weight in convs],
        "c_dim": c_dim,
        "connections": "resnet" if "skips.0.conv.weight" in state else "orig" if single else "skip",
        **{name: width for name, width in usual.items() if width != style_dim},
    }


def _discriminator_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of :class:`Discriminator` that its weights tell."""
    n_blocks = count(state, "convs.", ".conv1.0.weight")
    first, last = state["convs.0.0.weight"], state["final_conv.0.weight"]
    widths = [first.shape[0]] + [state[f"convs.{i + 1}.conv2.1.weight"].shape[0] for i in range(n_blocks)]
    connections = "resnet" if n_blocks == 0 or "convs.1.skip.1.weight" in state else "orig"
    arguments = {
        "resolution": 4 << n_blocks,
        "n_channels": first.shape[1],
        "channels": widths[::-1],
        "connections": "skip" if "from_rgbs.0.0.weight" in state else connections,
        "mbstd_channels": last.shape[1] - last.shape[0],
    }
    embed = state.get("embed.0.weight")
    if embed is None:
        return arguments
    cmap, n_mapping = state["final_linear.1.weight"].shape[0], count(state, "embed.1.", ".weight")
    arguments |= {"c_dim": embed.shape[1], "n_mapping": n_mapping}
    inner = state["embed.1.1.weight"].shape[0] if n_mapping > 1 else cmap
    usual = [("cmap_dim", cmap, widths[-1]), ("embed_dim", embed.shape[0], cmap), ("mapping_width", inner, cmap)]
    return arguments | {name: width for name, width, other in usual if width != other}
