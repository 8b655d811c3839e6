"""The networks of a file or a bundle folder written in another format."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from sage_fast.conversion.carrying import (
    TARGETS,
    Carried,
    StrPath,
    encoder_part,
    from_bundle,
    from_published,
    lost,
    refusal,
    released_directions,
)
from sage_fast.data.writers import atomic_write
from sage_fast.errors import InputError, SageFastWarning
from sage_fast.models.checkpoints import path_of, source_of
from sage_fast.models.published import build_encoder_part, read_published
from sage_fast.models.published_nvlabs import to_nvlabs
from sage_fast.models.published_rosinality import FACTS, facts_of
from sage_fast.models.published_safetensors import pack
from sage_fast.models.weights import save_bundle

__all__ = ["convert"]

_ENDINGS = {".safetensors": "sage_fast", ".pt": "rosinality", ".pth": "rosinality"}


def convert(path: StrPath, out: StrPath, to: str | None = None, overwrite: bool = False) -> Path:
    """Write the networks of a file or bundle folder in another format; the weights keep their bits.

    Args:
        path: a file of any format that is read, or a bundle folder.
        out: the file to write, whole or not at all. For ``"bundle"`` a folder, new or empty.
        to: one of ``TARGETS``; by the ending of ``out`` when absent: ``.safetensors`` sage_fast, ``.pt`` rosinality.
        overwrite: replace an older file ``out``.
    Returns:
        ``out``.
    Raises:
        InputError: ``path`` cannot be read, ``out`` is that file or in that folder, is there already or cannot be written,
            or the target cannot hold a network.
    """
    path, out = source_of(path), path_of(out)
    target = _target(out, to)
    _check_apart(path, out)
    if out.is_file() and not overwrite:
        raise InputError(f"File {str(out)!r} is there already; add --overwrite to replace it, or give another file.")
    carried = from_bundle(path) if path.is_dir() else from_published(read_published(path))
    reason = refusal(target, carried)
    if reason is not None:
        raise InputError(f"{str(path)!r} cannot become a {target}{'' if target == 'bundle' else ' file'}: {reason}.")
    left = lost(target, carried)
    if left:
        warnings.warn(f"a {target} file does not keep {', '.join(left)}", SageFastWarning, stacklevel=2)
    if target == "bundle":
        return _bundle(carried, out)
    content = {"rosinality": _rosinality, "psp": _psp}[target](carried) if target in ("rosinality", "psp") else None
    with atomic_write(out) as file:
        if content is not None:
            torch.save(content, file)
        else:
            file.write(_safetensors(target, carried))
    return out


def _target(out: Path, to: str | None) -> str:
    if out.suffix == ".pkl" or to == "pickle":
        raise InputError(
            f"out must be no pickle, which would carry code, got {str(out)!r}; --to nvlabs writes the same names to .safetensors."
        )
    if to == "bundle":
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"a bundle is a folder, new or empty, got {str(out)!r}; give another name.")
        return to
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


def _rosinality(carried: Carried) -> dict[str, Any]:
    content: dict[str, Any] = {FACTS: {}}
    if carried.generator is not None:
        state = _cpu(carried.generator)
        content["latent_avg"] = state.pop("latent_avg")
        content["g_ema"], content[FACTS]["g_ema"] = state, facts_of(carried.generator)
    if carried.discriminator is not None:
        content["d"], content[FACTS]["d"] = _cpu(carried.discriminator), facts_of(carried.discriminator)
    return content


def _psp(carried: Carried) -> dict[str, Any]:
    G, E, A = carried.generator, encoder_part(carried), released_directions(carried.directions)
    assert G is not None
    state = _cpu(G)
    average = state.pop("latent_avg")
    weights = {f"decoder.{name}": value for name, value in state.items()} | (dict(E.state) if E is not None else {})
    weights |= {} if A is None else {"ax.A": A}
    options: dict[str, Any] = {"output_size": G.resolution, "start_from_latent_avg": True, "learn_in_w": False}
    n_rows = G.n_latent
    if E is not None:
        options |= {key: value for key, value in E.options.items() if isinstance(value, str | int | float | None)}
        if E.latent_avg is not None and E.latent_avg.ndim == 2:  # 18 for an encoder of 18 styles, whatever G takes
            n_rows = len(E.latent_avg)
    rows = average.repeat(n_rows, 1)
    return {"state_dict": weights, "latent_avg": rows, "opts": options, FACTS: {"decoder": facts_of(G)}}


def _bundle(carried: Carried, out: Path) -> Path:
    G, E, found = carried.generator, carried.encoder, carried.directions
    assert G is not None
    if E is None:
        assert carried.part is not None
        E = build_encoder_part(carried.part, G.n_latent)
    return save_bundle(
        out,
        generator=G,
        encoder=E,
        directions=None if found is None else found.directions,
        groups=None if found is None else found.groups,
        codes=carried.codes,
        discriminator=carried.discriminator,
        noise=carried.noise,
        about=carried.about,
    )


def _safetensors(target: str, carried: Carried) -> bytes:
    found: dict[str, nn.Module | None] = {
        "generator": carried.generator,
        "discriminator": carried.discriminator,
    }
    present: dict[str, Any] = {kind: network for kind, network in found.items() if network is not None}
    states = {kind: to_nvlabs(n) if target == "nvlabs" else _cpu(n) for kind, n in present.items()}
    prefixes = {"generator": "G_ema.", "discriminator": "D."} if target == "nvlabs" else {k: f"{k}." for k in found}
    facts = {kind: facts_of(network) for kind, network in present.items()}
    tensors = {name: t.contiguous().clone() for name, t in pack(states, prefixes).items()}
    return to_bytes(tensors, metadata={FACTS: json.dumps(facts), "format": "pt"})


def _cpu(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in network.state_dict().items()}
