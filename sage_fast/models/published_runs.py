"""A checkpoint of our own ``train-gan``: the averaged generator and the discriminator, with what they were built from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sage_fast.errors import InputError
from sage_fast.models.published_parts import Part, PublishedFile, floats, misfit, shapes_of
from sage_fast.models.stylegan2 import Discriminator, Generator

__all__ = ["read_run"]

_PARTS = {"average": ("architecture", Generator), "D": ("architecture_D", Discriminator)}


def read_run(content: Any, where: str) -> PublishedFile | None:
    """The networks of such a checkpoint; None where ``content`` is something else."""
    architectures = {name for name, _ in _PARTS.values()}
    if not isinstance(content, Mapping) or not architectures <= set(content) or not _PARTS.keys() & set(content):
        return None
    return PublishedFile(
        format="sage_fast train-gan checkpoint",
        generator=None if "average" not in content else lambda: _part(content, "average", where),
        discriminator=None if "D" not in content else lambda: _part(content, "D", where),
        has_latent_avg=True,
        ignored=tuple(str(name) for name in content if name not in {*_PARTS, *architectures}),
    )


def _part(content: Mapping[str, Any], key: str, where: str) -> Part:
    architecture, kind = _PARTS[key]
    state, arguments, entry = content[key], content[architecture], f"{where}, entry {key!r},"
    try:
        shapes_of(kind, arguments)
    except (InputError, TypeError, ValueError, RuntimeError) as error:
        raise misfit(entry, f"StyleGAN2 {kind.__name__.lower()}", error) from error
    return Part(kind, arguments, floats(state, entry), entry)
