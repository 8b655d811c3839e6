"""Files of pSp and its family (e4e, ReStyle, HyperStyle) and of AGE and SAGE: an encoder, a generator, options.

``state_dict`` holds ``encoder.*`` or ``hypernet.*`` beside ``decoder.*``, which are the common port's names; training in
parallel leaves ``module.`` before all names or behind the first word. AGE and SAGE add ``ax.*`` and keep class embeddings,
codes and their statistics in files of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sage_fast.errors import InputError
from sage_fast.models.published_parts import EncoderPart, Part, PublishedFile, average_of, floats, prefixed
from sage_fast.models.published_rosinality import FACTS, generator_part, told
from sage_fast.models.stylegan2 import n_latent_of

__all__ = ["OLD_STYLES", "declared_size", "read_encoders", "read_statistics"]

#: old pSp, AGE and SAGE have so many styles whatever their generator takes
OLD_STYLES = 18
_WORDS = ("encoder", "decoder", "hypernet", "ax", "w_encoder")


def read_encoders(content: Any, where: str) -> PublishedFile | None:
    """A file of the family, or None where ``content`` is something else."""
    state = content.get("state_dict") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        return None
    networks = _networks(state, where)
    if not networks:
        return None
    options = content.get("opts") if isinstance(content.get("opts"), Mapping) else {}
    average, facts = content.get("latent_avg"), content.get(FACTS)
    encoder = {f"{word}.{name}": t for word in ("encoder", "hypernet") for name, t in networks.get(word, {}).items()}
    decoder, directions = networks.get("decoder"), networks.get("ax", {}).get("A")
    if directions is not None and directions.ndim != 3:
        raise InputError(f"{where} has directions 'ax.A' of shape {list(directions.shape)}, expected [6, 512, K].")
    known = {"state_dict", "opts", "latent_avg", FACTS}
    return PublishedFile(
        format=f"{_family(networks, options)} .pt",
        generator=None if not decoder else lambda: _decoder(decoder, average, options, facts, where),
        encoder=None if not encoder else lambda: _encoder(encoder, decoder, average, options, facts, where),
        has_latent_avg=average is not None,
        directions=directions,
        ignored=(
            *(str(name) for name in content if name not in known),
            *sorted({f"ax.{name.partition('.')[0]}" for name in networks.get("ax", {}) if name != "A"}),
            *(["w_encoder"] if "w_encoder" in networks else []),
        ),
    )


def read_statistics(content: Any, where: str) -> PublishedFile | None:
    """``class_embeddings.pt``, ``ns.pt`` or ``n_distribution.npy`` of AGE and SAGE, or None."""
    if not isinstance(content, Mapping) or not content or not all(isinstance(name, str) for name in content):
        return None
    if set(content) == {"mean", "mean_abs", "cov"}:
        statistics = {name: _statistic(name, value, where) for name, value in content.items()}
        return PublishedFile("AGE n_distribution.npy", statistics=statistics)
    values = list(content.values())
    if all(isinstance(value, Tensor) and value.ndim == 2 for value in values) and len({v.shape for v in values}) == 1:
        if not any("." in name for name in content):
            return PublishedFile("AGE class_embeddings.pt", embeddings={name: v.float() for name, v in content.items()})
    if all(isinstance(value, list) and all(_is_code(code) for code in value) for value in values) and any(values):
        return PublishedFile("SAGE ns.pt", codes=_codes(content, where))
    return None


def _codes(content: Mapping[str, list[Tensor]], where: str) -> dict[str, Tensor]:
    """Codes [n, 6, K] by category, all of one [6, K]."""
    first = next(code.shape for codes in content.values() for code in codes)
    for name, codes in content.items():
        wrong = next((list(code.shape) for code in codes if code.shape != first), None)
        if wrong is not None or not codes:
            got = f"a code of shape {wrong}" if wrong else "no codes"
            raise InputError(f"{where} has {got} in category {name!r:.60}, expected {list(first)}; it is damaged.")
    return {name: torch.stack([code.float() for code in codes]) for name, codes in content.items()}


def _networks(state: Mapping[Any, Any], where: str) -> dict[str, dict[str, Tensor]]:
    """Weights by the first word of their names, without prefixes of parallel training."""
    bare = floats({name: value for name, value in state.items() if isinstance(value, Tensor)}, where)
    found = {word: prefixed(bare, f"{word}.") for word in _WORDS}
    for word, weights in found.items():
        if weights and all(name.startswith("module.") for name in weights):
            found[word] = prefixed(weights, "module.")
    return {word: weights for word, weights in found.items() if weights}


def declared_size(options: Mapping[str, Any], where: str) -> int | None:
    """The resolution of the generator that a file's options speak of; None where they do not.

    Raises:
        InputError: two that differ, or no resolution of a StyleGAN2.
    """
    found = {name: options[name] for name in ("output_size", "stylegan_size") if options.get(name) is not None}
    sizes = list(found.values())
    known = [4 << i for i in range(9)]
    if any(not isinstance(size, int | float) or size not in known or size != sizes[0] for size in sizes):
        words = " and ".join(f"{name}={size!r:.40}" for name, size in found.items())
        raise InputError(
            f"{where} has {words} in its options, expected one power of two from 4 to 1024; it is damaged."
        )
    return int(sizes[0]) if sizes else None


def _decoder(state: Mapping[str, Tensor], average: Any, options: Mapping[str, Any], facts: Any, where: str) -> Part:
    part = generator_part(state, f"{where}, entries 'decoder.*',", average, **told(facts, "decoder"))
    found, size = part.arguments["resolution"], declared_size(options, where)
    if size not in (None, found):
        raise InputError(
            f"{where} has a decoder of {found} px ({n_latent_of(found)} styles), expected {size} px ({n_latent_of(size)} "
            "styles) from the size in its options; give the file as it was saved."
        )
    _check_rows(average_of(average, where), found, size is not None, where)
    return part


def _encoder(
    state: Mapping[str, Tensor],
    decoder: Mapping[str, Tensor] | None,
    average: Any,
    options: Mapping[str, Any],
    facts: Any,
    where: str,
) -> EncoderPart:
    size, average = declared_size(options, where), average_of(average, where)
    if size is not None:
        _check_rows(average, size, True, where)

    def mean() -> Tensor:
        assert decoder is not None
        return _decoder(decoder, average, options, facts, where).build().latent_avg

    return EncoderPart(state, options, average, where, None if decoder is None else mean)


def _check_rows(average: Tensor | None, size: int, declared: bool, where: str) -> None:
    """Raise InputError unless the mean latent has one row, or one a style; 18 will do where the options have the size too."""
    n_latent = n_latent_of(size)
    if average is None or average.ndim < 2 or average.shape[0] in (1, n_latent):
        return
    if average.shape[0] != OLD_STYLES or not declared:
        raise InputError(
            f"{where} has a latent_avg of shape {list(average.shape)}, expected 1 row or {n_latent} for a generator of "
            f"{size} px; give the file as it was saved."
        )


def _family(networks: Mapping[str, Mapping[str, Tensor]], options: Mapping[str, Any]) -> str:
    """Which code wrote the file."""
    if "ax" in networks:
        return "AGE / SAGE"
    if "hypernet" in networks:
        return "HyperStyle"
    kind, first = str(options.get("encoder_type", "")), networks.get("encoder", {}).get("input_layer.0.weight")
    if first is not None and first.shape[1] == 6 or "n_iters_per_batch" in options:
        return "ReStyle"
    return "e4e" if "stylegan_size" in options or kind == "Encoder4Editing" else "pSp"


def _is_code(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2


def _statistic(name: str, value: Any, where: str) -> Tensor:
    try:
        if isinstance(value, list):
            value = np.stack([np.asarray(part) for part in value])
        return torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{where} has a {name!r} that is no array of numbers, nor a list of some of one shape; it is damaged."
        ) from error
