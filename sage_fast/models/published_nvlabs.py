"""StyleGAN2 networks of NVLabs' PyTorch code: the ``.pkl`` of stylegan2-ada-pytorch and stylegan3, and their names.

Facts that weights do not tell (clamp, groups of standard deviations, learning-rate multiplier) are attributes of the
pickled modules. State dicts, and a network by itself, are read too; state dicts without those facts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sage_fast.errors import InputError
from sage_fast.models.checkpoints import Stub, is_module, state_dict_of
from sage_fast.models.nvlabs_names import (
    FilterName,
    discriminator_filters,
    discriminator_names,
    generator_filters,
    generator_names,
    theirs,
)
from sage_fast.models.published_parts import (
    Part,
    PublishedFile,
    check_filter,
    count,
    fitted,
    floats,
    misfit,
    number_of,
    shapes_of,
)
from sage_fast.models.stylegan2 import Discriminator, Generator
from sage_fast.models.stylegan2_layers import Resample

__all__ = ["discriminator_part", "generator_part", "is_alias_free", "read_nvlabs", "to_nvlabs"]

_ALIAS_FREE = re.compile(r"synthesis\.(input\.freqs|L\d+_.*)")
_ACTIVATED = re.compile(r"conv[01]?|fromrgb|fc\d*")


def read_nvlabs(content: Any, where: str) -> PublishedFile | None:
    """The networks of an NVLabs ``.pkl``, or None where ``content`` is something else."""
    content = {kind: content} if (kind := _kind_of(content)) else content
    if not isinstance(content, Mapping):
        return None
    found = {key: content[key] for key in ("G_ema", "G", "D") if _is_network(content.get(key))}
    if not found:
        return None
    name = "G_ema" if "G_ema" in found else "G"
    G, D = found.get(name), found.get("D")
    weights = {} if G is None else _weights(G)
    ignored = [str(key) for key, value in content.items() if key not in (name, "D") and value is not None]
    usual = "NVLabs StyleGAN2 .pkl" if any(isinstance(network, Stub) for network in (G, D)) else "NVLabs names in .pt"
    return PublishedFile(
        format="StyleGAN3 (alias-free) .pkl" if is_alias_free(weights) else usual,
        generator=None if G is None else lambda: _stored_generator(G, f"{where}, entry {name!r},"),
        discriminator=None if D is None else lambda: _stored_discriminator(D, f"{where}, entry 'D',"),
        has_latent_avg="mapping.w_avg" in weights and not is_alias_free(weights),
        ignored=tuple(ignored),
    )


def is_alias_free(state: Mapping[str, Any]) -> bool:
    """Whether the weights are those of StyleGAN3's own generator (configurations T and R)."""
    return any(_ALIAS_FREE.fullmatch(name) for name in state)


def generator_part(state: Mapping[str, Tensor], where: str, n_fp16: int = 0, **facts: Any) -> Part:
    """A generator from weights under NVLabs' names.

    Args:
        state: its weights; without noise maps the network has no noise.
        where: the file, for messages.
        n_fp16: resolutions computed in float16 by their code.
        facts: arguments of :class:`Generator` that the weights do not tell.
    Raises:
        InputError: they are weights of something else.
    """
    state = floats(state, where)
    if is_alias_free(state):
        raise InputError(
            f"{where} is a generator of StyleGAN3 (alias-free), which is not supported; give a StyleGAN2 network, as "
            "stylegan3 writes with --cfg=stylegan2."
        )
    try:
        arguments = _generator_arguments(state) | facts
        shapes = shapes_of(Generator, arguments)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise misfit(where, "StyleGAN2 generator", error) from error
    size, connections = len(arguments["channels"]), arguments["connections"]
    names = dict(generator_names(size, arguments["n_mapping"], connections, arguments["c_dim"] > 0))
    if not any(name.endswith("noise_const") for name in state):
        silent = [ours for ours, name in names.items() if name.endswith(("noise_const", "noise_strength"))]
        state |= {names[ours]: torch.zeros(shapes[ours]) for ours in silent}
    filters = list(generator_filters(size, connections))
    return Part(Generator, arguments, _ours(state, names, filters, shapes, where), where, n_fp16)


def discriminator_part(state: Mapping[str, Tensor], where: str, n_fp16: int = 0, **facts: Any) -> Part:
    """A discriminator from weights under NVLabs' names; arguments and errors as of :func:`generator_part`."""
    state = floats(state, where)
    try:
        arguments = _discriminator_arguments(state) | facts
        shapes = shapes_of(Discriminator, arguments)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise misfit(where, "StyleGAN2 discriminator", error) from error
    size, connections = len(arguments["channels"]), arguments["connections"]
    names = dict(discriminator_names(size, arguments["n_mapping"], connections, arguments["c_dim"] > 0))
    filters = list(discriminator_filters(size, connections))
    return Part(Discriminator, arguments, _ours(state, names, filters, shapes, where), where, n_fp16)


def to_nvlabs(network: Generator | Discriminator) -> dict[str, Tensor]:
    """The weights of a network under NVLabs' names and in their shapes, filters included."""
    size = len(network.channels)
    kinds = (
        (generator_names, generator_filters)
        if isinstance(network, Generator)
        else (discriminator_names, discriminator_filters)
    )
    state, usual = network.state_dict(), Resample().kernel
    names = dict(kinds[0](size, network.n_mapping, network.connections, network.c_dim > 0))
    found = {name: theirs(name, state[ours]) for ours, name in names.items()}
    noise = [name for name in found if name.endswith(("noise_const", "noise_strength"))]
    if not any(bool(found[name].any()) for name in noise):  # made without noise: their network has none of these names
        found = {name: value for name, value in found.items() if name not in noise}
    for ours, name, gain in kinds[1](size, network.connections):
        found[name] = usual.clone() if ours is None else state[ours] / gain
    return {name: value.detach().cpu().contiguous() for name, value in found.items()}


def _ours(
    state: Mapping[str, Tensor],
    names: Mapping[str, str],
    filters: list[FilterName],
    shapes: Mapping[str, Iterable[int]],
    where: str,
) -> dict[str, Tensor]:
    """Weights under our names and in our shapes; what is missing or too much is an error."""
    known = {*names.values(), *(f.theirs for f in filters)}
    missing = [name for name in names.values() if name not in state and name != "mapping.w_avg"]
    for word, wrong in (("lacks", missing), ("has an unexpected", [name for name in state if name not in known])):
        if wrong:
            raise InputError(f"{where} {word} {wrong[0]!r}; it is damaged or of a network that is not plain StyleGAN2.")
    ours = {a: fitted(state[b], shapes[a], b, where) for a, b in names.items() if b in state}
    for f in filters:
        if f.ours is not None:
            found = state.get(f.theirs)
            ours[f.ours] = (Resample().kernel if found is None else check_filter(found, where)) * f.gain
    return ours


def _generator_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of :class:`Generator` that its weights tell."""
    sizes = _sizes(state, r"synthesis\.b(\d+)\.conv1\.weight")
    convs = [state[f"synthesis.b{size}.conv1.weight"] for size in sizes]
    style_dim = state["synthesis.b4.conv1.affine.weight"].shape[1]
    n_mapping, first = count(state, "mapping.fc", ".weight"), state["mapping.fc0.weight"]
    embed = state.get("mapping.embed.weight")
    embed_dim, c_dim = (0, 0) if embed is None else embed.shape
    return {
        "resolution": sizes[-1],
        "style_dim": style_dim,
        "n_mapping": n_mapping,
        "n_channels": state[f"synthesis.b{sizes[-1]}.torgb.weight"].shape[0],
        "channels": [weight.shape[0] for weight in convs],
        "c_dim": c_dim,
        "connections": _connections(state, "synthesis.b8.skip.weight", "synthesis.b4.torgb.weight", len(sizes)),
        **_unless(style_dim, z_dim=first.shape[1] - embed_dim, embed_dim=embed_dim if c_dim else style_dim),
        **_unless(style_dim, mapping_width=first.shape[0] if n_mapping > 1 else style_dim),
    }


def _discriminator_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of :class:`Discriminator` that its weights tell."""
    sizes = [4, *_sizes(state, r"b(\d+)\.conv0\.weight", first=8)]
    conv = state["b4.conv.weight"]
    channels = [conv.shape[0], *(state[f"b{size}.conv0.weight"].shape[0] for size in sizes[1:])]
    embed = state.get("mapping.embed.weight")
    n_mapping, cmap = count(state, "mapping.fc", ".weight"), state["b4.out.weight"].shape[0]
    arguments = {
        "resolution": sizes[-1],
        "n_channels": state[f"b{sizes[-1]}.fromrgb.weight"].shape[1],
        "channels": channels,
        "c_dim": 0,
        "connections": _connections(state, f"b{sizes[-1]}.skip.weight", "b4.fromrgb.weight", len(sizes), "resnet"),
        "mbstd_channels": conv.shape[1] - channels[0],
        "n_mapping": 8,  # of no meaning without labels
    }
    if embed is None:
        return arguments
    width = state["mapping.fc0.weight"].shape[0] if n_mapping > 1 else cmap
    arguments |= {"c_dim": embed.shape[1], "n_mapping": n_mapping}
    return (
        arguments | _unless(channels[0], cmap_dim=cmap) | _unless(cmap, embed_dim=embed.shape[0], mapping_width=width)
    )


def _sizes(state: Mapping[str, Tensor], pattern: str, first: int = 4) -> list[int]:
    """The resolutions of the blocks whose names match, each twice the one before."""
    found = sorted(int(match[1]) for name in state if (match := re.fullmatch(pattern, name)))
    if found != [first << i for i in range(len(found))] or (first == 4 and not found):
        raise ValueError(f"blocks of {found} px, expected {first}, {2 * first}, ... px")
    return found


def _connections(state: Mapping[str, Tensor], skip: str, small_rgb: str, n_sizes: int, single: str = "skip") -> str:
    if n_sizes == 1:
        return single
    return "resnet" if skip in state else "skip" if small_rgb in state else "orig"


def _unless(usual: int, **values: int) -> dict[str, int]:
    return {name: value for name, value in values.items() if value != usual}


def _is_network(value: Any) -> bool:
    """Whether it is the record of a module, whole or damaged, or a state dict with NVLabs' names."""
    if isinstance(value, Stub):
        return isinstance(value.state, Mapping) and "_modules" in value.state
    return isinstance(value, Mapping) and _kind_of(value) is not None


def _kind_of(content: Any) -> str | None:
    """ "G" or "D" for a network by itself; None for anything else."""
    names = {str(name).removeprefix("module.") for name in _weights(content)}
    if names & {"synthesis.b4.const", "synthesis.input.freqs"}:
        return "G"
    return "D" if "b4.conv.weight" in names else None


def _weights(value: Any) -> Mapping[str, Tensor]:
    """Those of a record of a module, or a state dict itself; none of what is neither."""
    if isinstance(value, Stub):
        return state_dict_of(value) if is_module(value) else {}
    return value if isinstance(value, Mapping) else {}


def _stored_generator(G: Stub | Mapping[str, Tensor], where: str) -> Part:
    state = _whole_weights(G, where)
    if is_alias_free(state) or not isinstance(G, Stub):
        return generator_part(state, where)
    return generator_part(state, where, **_facts(G, where))


def _stored_discriminator(D: Stub | Mapping[str, Tensor], where: str) -> Part:
    state = _whole_weights(D, where)
    if not isinstance(D, Stub):
        return discriminator_part(state, where)
    facts = _facts(D, where)
    for name, module in _modules(D):
        if name == "b4.mbstd":
            facts["mbstd_group"] = number_of("group_size", module.get("group_size"), where, whole=True)
    return discriminator_part(state, where, **facts)


def _whole_weights(value: Stub | Mapping[str, Tensor], where: str) -> Mapping[str, Tensor]:
    if isinstance(value, Stub) and not is_module(value):
        raise InputError(
            f"{where} is no network: some of it lacks the parameters, buffers or modules of one; it is damaged."
        )
    return _weights(value)


def _facts(network: Stub, where: str) -> dict[str, Any]:
    """What the attributes of the modules tell: clamp, learning-rate multiplier, resolutions in float16.

    Raises:
        InputError: an activation that is not supported, or layers that do not agree.
    """
    modules = [(name, name.rpartition(".")[2], module) for name, module in _modules(network)]
    for name, last, module in modules:
        if _ACTIVATED.fullmatch(last) and module.get("activation", "lrelu") != "lrelu":
            raise InputError(
                f"{where} has the activation {module['activation']!r} in {name!r}, expected 'lrelu'; "
                "other activations are not supported."
            )
    layers = ("conv0", "conv1", "torgb", "fromrgb", "conv")
    clamped = [m for name, last, m in modules if last in layers and name != "b4.fromrgb" and "conv_clamp" in m]
    clamps = {number_of("conv_clamp", module["conv_clamp"], where) for module in clamped}
    if len(clamps) > 1:
        raise InputError(f"{where} has layers with the clamps {sorted(map(str, clamps))}, expected one for all.")
    facts: dict[str, Any] = {"clamp": clamps.pop() if clamps else None}
    multipliers = [m["bias_gain"] for name, _, m in modules if name == "mapping.fc0" and m.get("bias_gain") is not None]
    if multipliers:
        facts["mapping_lr_mul"] = number_of("bias_gain", multipliers[0], where)
    return facts | {"n_fp16": sum(bool(module.get("use_fp16")) for _, _, module in modules)}


def _modules(network: Stub, prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The attributes of every module inside, by its dotted name."""
    for name, child in network.state["_modules"].items():
        if child is not None:
            yield f"{prefix}{name}", child.state
            yield from _modules(child, f"{prefix}{name}.")
