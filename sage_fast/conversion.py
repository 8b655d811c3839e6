"""Files of networks: what is in one, and the same networks in another format (docs/formats.md)."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from sage_fast.data.writers import atomic_write
from sage_fast.errors import InputError, SageFastWarning
from sage_fast.models.checkpoints import path_of, read_checkpoint
from sage_fast.models.inspection import describe as describe_tensors
from sage_fast.models.published import build_encoder_part, read_published
from sage_fast.models.published_nvlabs import to_nvlabs
from sage_fast.models.published_parts import EncoderPart, PublishedFile
from sage_fast.models.published_rosinality import FACTS, facts_of
from sage_fast.models.published_safetensors import pack
from sage_fast.models.stylegan2 import Discriminator, Generator, n_latent_of
from sage_fast.models.weights import load_bundle, load_discriminator

__all__ = ["TARGETS", "convert", "describe"]

TARGETS = ("rosinality", "psp", "nvlabs", "sage_fast")
_ENDINGS = {".safetensors": "sage_fast", ".pt": "rosinality", ".pth": "rosinality"}
#: what the common port's networks are, so far as it differs from network to network
_USUAL: dict[str, dict[str, Any]] = {
    "generator": {
        "connections": "skip", "n_channels": 3, "c_dim": 0, "z_dim": None, "mapping_width": None, "mapping_lr_mul": 0.01,
    },
    "discriminator": {"connections": "resnet", "n_channels": 3, "c_dim": 0, "mbstd_channels": 1},
}  # fmt: skip
StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class _Networks:
    """What a conversion carries over."""

    generator: Generator | None
    discriminator: Discriminator | None
    encoder: EncoderPart | None = None
    left: tuple[str, ...] = ()


def describe(path: StrPath) -> dict[str, Any]:
    """What a file or a bundle folder holds, in words and numbers that JSON can hold.

    Raises:
        InputError: it is missing, damaged or of no known format.
    """
    if path_of(path).is_dir():
        return _describe_bundle(path)
    try:
        found = read_published(path)
    except InputError as error:
        return _describe_tensors(path, error)
    networks: dict[str, Any] = {}
    for name in ("generator", "discriminator", "encoder"):
        if getattr(found, name) is not None:
            networks[name] = _describe_network(found, name)
    report: dict[str, Any] = {"format": found.format, "bytes": Path(path).stat().st_size, "networks": networks}
    if found.generator is not None and "refused" not in networks["generator"]:
        report["latent_avg"] = "stored" if found.has_latent_avg else "absent: computed when it is loaded"
    if found.directions is not None:
        report["directions"] = list(found.directions.shape)
    for name, word in (("embeddings", "class embeddings"), ("codes", "codes"), ("statistics", "statistics of codes")):
        if getattr(found, name) is not None:
            report[word] = {key: list(value.shape) for key, value in getattr(found, name).items()}
    usable = [name for name in found.holds() if "refused" not in networks.get(name, {})]
    report["loads"] = usable
    carried = _quietly(lambda: _from_published(found))
    report["converts to"] = [target for target in TARGETS if carried and _refusal(target, carried) is None]
    return report | {"ignored": list(found.ignored)}


def convert(path: StrPath, out: StrPath, to: str | None = None) -> Path:
    """Write the networks of a file or bundle folder in another format; the weights keep their bits.

    Args:
        path: a file of any format that is read, or a bundle folder.
        out: the file to write, whole or not at all; an older one is replaced.
        to: one of ``TARGETS``; by the ending of ``out`` when absent: ``.safetensors`` sage_fast, ``.pt`` rosinality.
    Returns:
        ``out``.
    Raises:
        InputError: ``path`` cannot be read, ``out`` is that file or in that folder or cannot be written, or the target
            cannot hold a network.
    """
    path, out = path_of(path), path_of(out)
    target = _target(out, to)
    _check_apart(path, out)
    networks = _from_bundle(path) if path.is_dir() else _from_published(read_published(path))
    refusal = _refusal(target, networks)
    if refusal is not None:
        raise InputError(f"{str(path)!r} cannot become a {target} file: {refusal}.")
    lost = _lost(target, networks)
    if lost:
        warnings.warn(f"a {target} file does not keep {', '.join(lost)}", SageFastWarning, stacklevel=2)
    content = {"rosinality": _rosinality, "psp": _psp}[target](networks) if target in ("rosinality", "psp") else None
    with atomic_write(out) as file:
        if content is not None:
            torch.save(content, file)
        else:
            file.write(_safetensors(target, networks))
    return out


def _target(out: Path, to: str | None) -> str:
    if out.suffix == ".pkl" or to == "pickle":
        raise InputError(
            f"out must be no pickle, which would carry code, got {str(out)!r}; --to nvlabs writes the same names to .safetensors."
        )
    if to == "bundle":
        raise InputError(
            "a bundle also holds codes and directions of seen images, which no other file has; train one with "
            "sage-fast train, or use --to sage_fast."
        )
    found = _ENDINGS.get(out.suffix.lower()) if to is None else to
    if found not in TARGETS:
        raise InputError(
            f"--to must be one of {', '.join(TARGETS)}, or OUT end in .pt or .safetensors, got {to or str(out)!r}."
        )
    if out.is_dir():
        raise InputError(f"out must be a file, got the folder {str(out)!r}.")
    ending = ".pt" if found in ("rosinality", "psp") else ".safetensors"
    if _ENDINGS.get(out.suffix.lower(), found) != found and out.suffix.lower() not in (ending, ".pth"):
        raise InputError(f"a {found} file ends in {ending}, got {str(out)!r}.")
    return found


def _check_apart(path: Path, out: Path) -> None:
    """Raise InputError where writing would replace what is read, by whatever name."""
    same = out.exists() and path.exists() and out.samefile(path)
    if same or path.resolve() in out.resolve().parents:
        raise InputError(
            f"out must be another place than what is read, {str(path)!r}, got {str(out)!r}; give another file."
        )


def _from_published(found: PublishedFile) -> _Networks:
    G = None if found.generator is None else found.generator().build()
    D = None if found.discriminator is None else found.discriminator().build()
    E = None if found.encoder is None else found.encoder()
    if G is None and D is None and E is None:
        raise InputError(f"a {found.format} file holds no network, so there is nothing to convert.")
    left = ("directions",) if found.directions is not None else ()
    return _Networks(G, D, E, left)


def _from_bundle(path: StrPath) -> _Networks:
    bundle = load_bundle(path)
    has_discriminator = (Path(path) / "discriminator.safetensors").is_file()
    D = load_discriminator(path) if has_discriminator else None
    return _Networks(bundle.generator, D, None, ("the encoder", "directions", "codes"))


def _refusal(target: str, networks: _Networks) -> str | None:
    """Why a target cannot hold the networks, or None."""
    G, D = networks.generator, networks.discriminator
    if G is None and (target == "psp" or D is None):
        return "it holds no generator"
    if target == "sage_fast":
        return None
    if target == "nvlabs":
        return "NVLabs' discriminator begins at 8 px" if D is not None and D.resolution == 4 else None
    for network, usual in _USUAL.items():
        found_network = G if network == "generator" else D
        if found_network is None or (found_network is D and target == "psp"):
            continue
        for name, value in usual.items():
            found = getattr(found_network, name)
            if found != value:
                return f"the common port's {network} has {name}={value!r} only, this one has {found!r}"
    return None


def _lost(target: str, networks: _Networks) -> list[str]:
    """What is left behind, or what the target's own code does not read."""
    lost = list(networks.left)
    if networks.encoder is not None and target != "psp":
        lost.append("the encoder")
    if networks.discriminator is not None and target == "psp":
        lost.append("the discriminator")
    if target in ("rosinality", "psp"):
        parts = (networks.generator, networks.discriminator if target == "rosinality" else None)
        lost += [f"the clamp {n.clamp} for its own code (this package reads it)" for n in parts[:1] if n and n.clamp]
        lost += ["the standard-deviation groups for its own code" for n in parts[1:] if n and n.mbstd_group != 4]
    return lost


def _rosinality(networks: _Networks) -> dict[str, Any]:
    content: dict[str, Any] = {FACTS: {}}
    if networks.generator is not None:
        state = _cpu(networks.generator)
        content["latent_avg"] = state.pop("latent_avg")
        content["g_ema"], content[FACTS]["g_ema"] = state, facts_of(networks.generator)
    if networks.discriminator is not None:
        content["d"], content[FACTS]["d"] = _cpu(networks.discriminator), facts_of(networks.discriminator)
    return content


def _psp(networks: _Networks) -> dict[str, Any]:
    G, E = networks.generator, networks.encoder
    assert G is not None
    state = _cpu(G)
    average = state.pop("latent_avg")
    weights = {f"decoder.{name}": value for name, value in state.items()} | (dict(E.state) if E is not None else {})
    options: dict[str, Any] = {"output_size": G.resolution, "start_from_latent_avg": True, "learn_in_w": False}
    if E is not None:
        options |= {key: value for key, value in E.options.items() if isinstance(value, str | int | float | None)}
    rows = average.repeat(n_latent_of(G.resolution), 1)
    return {"state_dict": weights, "latent_avg": rows, "opts": options, FACTS: {"decoder": facts_of(G)}}


def _safetensors(target: str, networks: _Networks) -> bytes:
    found: dict[str, nn.Module | None] = {
        "generator": networks.generator,
        "discriminator": networks.discriminator,
    }
    present: dict[str, Any] = {kind: network for kind, network in found.items() if network is not None}
    states = {kind: to_nvlabs(n) if target == "nvlabs" else _cpu(n) for kind, n in present.items()}
    prefixes = {"generator": "G_ema.", "discriminator": "D."} if target == "nvlabs" else {k: f"{k}." for k in found}
    facts = {kind: facts_of(network) for kind, network in present.items()}
    tensors = {name: t.contiguous().clone() for name, t in pack(states, prefixes).items()}
    return to_bytes(tensors, metadata={FACTS: json.dumps(facts), "format": "pt"})


def _cpu(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in network.state_dict().items()}


def _describe_bundle(path: StrPath) -> dict[str, Any]:
    bundle = load_bundle(path)
    carried = _from_bundle(path)
    networks = {"generator": _generator_words(bundle.generator)}
    if carried.discriminator is not None:
        networks["discriminator"] = _discriminator_words(carried.discriminator)
    networks["encoder"] = _encoder_words(bundle.encoder)
    return {
        "format": "sage_fast bundle",
        "bytes": sum(file.stat().st_size for file in Path(path).glob("*.safetensors")),
        "networks": networks,
        "latent_avg": "stored",
        "directions": list(bundle.dictionary.directions.shape),
        "codes": list(bundle.codes.w_plus.shape),
        "loads": [*networks, "directions"],
        "converts to": [target for target in TARGETS if _refusal(target, carried) is None],
        "ignored": [],
    }


def _describe_tensors(path: StrPath, error: InputError) -> dict[str, Any]:
    """The tensors of a file that can be read but is of no known format; ``error`` where there are none."""
    groups = [group for group in describe_tensors(read_checkpoint(path)) if group.tensors]
    if not groups:
        raise error
    tensors = {
        " ".join(filter(None, (group.place, group.class_name))) or "all": {
            "tensors": len(group.tensors), "numbers": group.n_elements, "first": group.tensors[0].name
        }
        for group in groups
    }  # fmt: skip
    report = {"format": "not recognised", "bytes": Path(path).stat().st_size, "networks": {}, "tensors": tensors}
    return report | {"refused": str(error), "loads": [], "converts to": [], "ignored": []}


def _describe_network(found: PublishedFile, name: str) -> dict[str, Any]:
    """One network of a file, or why it is refused."""
    try:
        size = None
        if name == "encoder" and found.generator is not None:
            size = n_latent_of(found.generator().arguments["resolution"])
        part = getattr(found, name)()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SageFastWarning)
            if name == "encoder":
                return _encoder_words(build_encoder_part(part, size))
            words = (_generator_words if name == "generator" else _discriminator_words)(part.build())
        return words | ({"float16 resolutions": part.n_fp16} if part.n_fp16 else {})
    except InputError as error:
        return {"refused": str(error)}


def _generator_words(G: Generator) -> dict[str, Any]:
    return {
        "resolution": G.resolution,
        "image channels": G.n_channels,
        "styles": G.n_latent,
        "style width": G.style_dim,
        "prior width": G.style.z_dim,
        "mapping layers": G.n_mapping,
        "channels": G.channels,
        "connections": G.connections,
        "label width": G.c_dim,
        "clamp": G.clamp,
        "parameters": _parameters(G),
    }


def _discriminator_words(D: Discriminator) -> dict[str, Any]:
    return {
        "resolution": D.resolution,
        "image channels": D.n_channels,
        "channels": D.channels,
        "connections": D.connections,
        "label width": D.c_dim,
        "clamp": D.clamp,
        "standard-deviation group": D.mbstd_group,
        "parameters": _parameters(D),
    }


def _encoder_words(encoder: Any) -> dict[str, Any]:
    return {
        "kind": encoder.kind,
        "network": encoder.network,
        "resolution": encoder.resolution,
        "styles": encoder.n_latent,
        "style width": encoder.style_dim,
        "parameters": _parameters(encoder),
    }


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _quietly(make: Callable[[], _Networks]) -> _Networks | None:
    """The networks, or None where they are refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SageFastWarning)
            return make()
    except InputError:
        return None
