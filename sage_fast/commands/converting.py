"""The commands that write networks in another form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sage_fast.commands.parsing import parse


@dataclass(frozen=True)
class ConvertPaths:
    """What ``convert`` reads and writes."""

    positional: ClassVar[bool] = True
    source: Path  # a file of any published format, or a bundle folder
    out: Path  # the file to write


@dataclass(frozen=True)
class ConvertOptions:
    """Options of ``convert``."""

    to: str | None = None  # rosinality, psp, nvlabs, sage_fast or bundle; None: by the ending, .pt or .safetensors
    overwrite: bool = False  # replace an older file OUT


@dataclass(frozen=True)
class ExportSource:
    """What ``export`` reads."""

    positional: ClassVar[bool] = True
    source: Path | None = None  # run folder, bundle or a file of any published format; None: the model of the package


@dataclass(frozen=True)
class ExportOut:
    """Where ``export`` writes."""

    out: Path  # gets mapping, synthesis and encoder, each a file, and export.json


def convert(argv: Sequence[str]) -> None:
    """Write the networks of a file in another format."""
    paths, options = parse("convert", argv, ConvertPaths, ConvertOptions())
    from sage_fast import conversion

    print(f"The networks are in {conversion.convert(paths.source, paths.out, options.to, options.overwrite)}.")


def export(argv: Sequence[str]) -> None:
    """Write the networks as graphs and print how they were checked."""
    from sage_fast.export import ExportConfig
    from sage_fast.export import export as export_networks

    target, found, config = parse("export", argv, ExportOut, ExportSource(), ExportConfig())
    about = export_networks(found.source, target.out, config)
    for name, file in about["files"].items():
        words = [f"{key} [{', '.join(map(str, shape))}]" for key, shape in {**file["inputs"], **file["output"]}.items()]
        print(f"{name}: {', '.join(words[:-1])} -> {words[-1]}; largest difference {file['largest_difference']:.1e}")
    print(
        f"Read back and compared with the networks (tolerance {about['tolerance']:g}); export.json beside them says more."
    )
