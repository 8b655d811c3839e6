"""What a file of networks or a bundle folder holds, and what can be done with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sage_fast.conversion.carrying import TARGETS, Carried, StrPath, from_bundle, from_published, refusal
from sage_fast.data.latent_table import LatentTable
from sage_fast.editing.mapping import usual_components
from sage_fast.errors import InputError, SageFastWarning, counted
from sage_fast.factorization.category_relevant import CategoryRelevantDictionary
from sage_fast.factorization.held_shares import mean_held_share
from sage_fast.models.checkpoints import read_checkpoint, source_of
from sage_fast.models.inspection import describe as describe_tensors
from sage_fast.models.published import build_encoder_part, read_published
from sage_fast.models.published_parts import PublishedFile
from sage_fast.models.stylegan2 import Discriminator, Generator, n_latent_of

__all__ = ["describe"]


def describe(path: StrPath) -> dict[str, Any]:
    """What a file or a bundle folder holds, in words and numbers that JSON can hold.

    Raises:
        InputError: it is missing, damaged or of no known format.
    """
    path = source_of(path)
    if path.is_dir():
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
    carried = _quietly(lambda: from_published(found))
    report["converts to"] = [target for target in TARGETS if carried and refusal(target, carried) is None]
    return report | {"ignored": list(found.ignored)}


def _describe_bundle(path: StrPath) -> dict[str, Any]:
    carried = from_bundle(path)
    assert carried.generator is not None
    networks: dict[str, Any] = {"generator": _generator_words(carried.generator)}
    if carried.discriminator is not None:
        networks["discriminator"] = _discriminator_words(carried.discriminator)
    if carried.encoder is not None:
        networks["encoder"] = _encoder_words(carried.encoder)
    shapes: dict[str, Any] = {}
    if carried.directions is not None:
        shapes["directions"] = list(carried.directions.directions.shape)
    if carried.codes is not None:
        shapes["codes"] = list(carried.codes.w_plus.shape)
        if len(carried.codes):
            shapes["kept by class embedding mapping"] = _kept_words(carried.codes)
    return {
        "format": "sage_fast bundle",
        "bytes": sum(file.stat().st_size for file in Path(path).glob("*.safetensors")),
        "networks": networks,
        "latent_avg": "stored",
        **shapes,
        "loads": [*networks, *(["directions"] if "directions" in shapes else [])],
        "converts to": [target for target in TARGETS if refusal(target, carried) is None],
        "ignored": [],
    }


def _kept_words(codes: LatentTable) -> dict[str, float]:
    """Shares of a new category that Eq. 17 keeps, by as many components as the methods take, and by all."""
    present, labels = codes.labels.unique(return_inverse=True)
    S, D = len(present), codes.w_plus.shape[2]
    relevant = CategoryRelevantDictionary(1).fit(codes.w_plus, labels)
    words = {}
    for n_components in sorted({usual_components(relevant, codes.w_plus, labels), min(S, D)}):
        image = mean_held_share(relevant, codes.w_plus, labels, n_components)
        embedding = mean_held_share(relevant, relevant.class_embeddings_, torch.arange(S), n_components)
        words[f"of an image by {counted(n_components, 'component')}"] = round(image, 3)
        words[f"of a class embedding by {counted(n_components, 'component')}"] = round(embedding, 3)
    return words


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


def _quietly(make: Callable[[], Carried]) -> Carried | None:
    """The networks, or None where they are refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SageFastWarning)
            return make()
    except InputError:
        return None
