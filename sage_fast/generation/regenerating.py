"""One image of an output again, from its line in the manifest."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sage_fast import __version__
from sage_fast.data.writers import atomic_write
from sage_fast.errors import InputError
from sage_fast.generation.agreeing import format_of, read_settings
from sage_fast.generation.checksums import MANIFEST
from sage_fast.generation.committing import lines_of
from sage_fast.generation.config import GenerateConfig
from sage_fast.generation.drawing import Prepared, draw_images, draw_latents
from sage_fast.generation.encoding import choose_encoder
from sage_fast.generation.formats import Format, ImageFolders
from sage_fast.generation.lines import against_plan, parsed_line
from sage_fast.generation.plan import Part, Plan
from sage_fast.generation.run import load_pipeline
from sage_fast.generation.stores import open_store
from sage_fast.pipeline import FewShotPipeline

__all__ = ["Regenerated", "regenerate"]


@dataclass(frozen=True)
class Regenerated:
    """An image that was made again: its file, whether its bytes are those of the first time, and how far it is from them.

    ``levels``: the most by which a value differs from the stored image's, of 255, and ``share`` of values that differ; None: the
    stored image is not there, or not as recorded. ``other``: what is known to differ from the first time.
    """

    file: Path
    same: bool
    levels: int | None
    share: float
    other: list[str]

    def __str__(self) -> str:
        if self.same:
            return f"{self.file} has the recorded bytes."
        why = f"; other than the first time: {', '.join(self.other)}" if self.other else ""
        if self.levels is None:
            return (
                f"{self.file} has other bytes than recorded, and the stored image is not there as recorded, so how far the "
                f"pixels are apart is not known{why}."
            )
        if self.levels == 0:
            return f"{self.file} has the pixels of the stored image in other bytes{why}."
        return (
            f"{self.file} is not the stored image to the last pixel: {self.share:.2%} of its values differ, by "
            f"{self.levels} of 255 at most{why}."
        )


def regenerate(
    manifest: str | os.PathLike[str],
    number: int,
    out: str | os.PathLike[str] | None = None,
    model: FewShotPipeline | str | os.PathLike[str] | None = None,
    shots_dir: str | os.PathLike[str] | None = None,
) -> Regenerated:
    """Make one image of a manifest again.

    Args:
        manifest: ``manifest.jsonl`` of an output, beside its ``config.json``.
        number: which line, from 0.
        out: the file to write; None: the image's name, in the current folder.
        model: as for :func:`generate`; its hash must be the recorded one.
        shots_dir: where the shots lie now; None: where they lay.
    Raises:
        InputError: no such line, one that contradicts the plan, another model, or shots that are not there or not the same.
    """
    folder, _, name = os.fspath(manifest).rpartition("/")
    store = open_store(folder or ".")
    settings = read_settings(store) if name == MANIFEST else None
    if settings is None:
        raise InputError(f"{os.fspath(manifest)!r} is no manifest.jsonl beside a config.json; give that of an output.")
    format = format_of(folder or ".", writing=False)
    line, part = _line(format, settings, number)
    pipeline = load_pipeline(model, GenerateConfig(preset=line["preset"]))
    if pipeline.hash != line["model"]:
        raise InputError(
            f"The image was made by model {line['model']}, and this is {pipeline.hash}; give that with --model."
        )
    plan = Plan(Path(shots_dir or settings["shots_dir"]), (part,), settings["batch"], 1)
    latents = draw_latents(Prepared(pipeline, plan), range(1))
    image = draw_images(pipeline, latents)
    return _keep(image, next(iter(latents.about())), line, settings, format, number, out)


def _line(format: Format, settings: dict[str, Any], number: int) -> tuple[dict[str, Any], Part]:
    """A line that agrees with the plan, and the part of its image alone.

    Raises:
        InputError: there is none.
    """
    raw = next(islice(lines_of(format.target), number, None), None) if 0 <= number < len(format.plan) + 1 else None
    if raw is None:
        raise InputError(f"The manifest has no line {number}; its lines are numbered from 0.")
    line = parsed_line(number, raw)
    if number >= len(format.plan):
        raise InputError(
            f"The manifest has a line {number}, and the plan {len(format.plan)} images; see 'sage-fast verify'."
        )
    ((part, index),) = format.plan.images(range(number, number + 1))
    wrong = against_plan(format, settings, number, part, index, line, raw)
    if wrong is not None:
        raise InputError(
            f"Line {number} of the manifest {wrong}; 'verify --repair', then 'generate --resume', put the manifest right."
        )
    return line, replace(part, first=index, n=1)


def _keep(
    image: Tensor,
    about: dict[str, Any],
    line: dict[str, Any],
    settings: dict[str, Any],
    format: Format,
    number: int,
    out: str | os.PathLike[str] | None,
) -> Regenerated:
    """Write the image as the output has it; plain arrays become a PNG."""
    kind = settings["image"] or "png"
    library = (settings["encoder"] or "pillow").split()[0]
    encoder = choose_encoder(library, kind, settings["quality"], image.shape[1], image.device)
    path = Path(out or f"{about['category']}_{about['index']:05d}.{kind}")
    _check_target(path, kind, format)
    files = ImageFolders(open_store(path.parent), format.plan, encoder, format.shape)
    data = files.encoded(files.contents(image)[0], about)
    compared = image.cpu().numpy().tobytes() if settings["format"] == "safetensors" else data
    with atomic_write(path) as file:
        file.write(data)
    if hashlib.sha256(compared).hexdigest() == line["sha256"]:
        return Regenerated(path, True, 0, 0.0, [])
    now = {"version": __version__, "similar": about.get("similar")}
    other = [key for key, value in now.items() if line.get(key) != value]
    now = {"device": image.device.type, "encoder": encoder.name if settings["encoder"] else None}
    other += [key for key, value in now.items() if settings[key] != value]
    stored = _stored(format, number, line)
    if stored is None:
        return Regenerated(path, False, None, 0.0, other)
    apart = np.abs(format.decode(stored).astype(int) - format.decode(compared))
    return Regenerated(path, False, int(apart.max()), float((apart > 0).mean()), other)


def _check_target(path: Path, kind: str, format: Format) -> None:
    """Raise InputError for a name of another kind of image, or a file of the output itself."""
    endings = {"jpg": (".jpg", ".jpeg")}.get(kind, (f".{kind}",))
    if path.suffix.lower() not in endings:
        raise InputError(
            f"The image is written as {kind}, so out must end in {' or '.join(endings)}, got {str(path)!r}."
        )
    if format.target.local and Path(str(format.target)).resolve() in path.resolve().parents:
        raise InputError(f"{str(path)!r} lies in the output itself, whose files are as recorded; give another file.")


def _stored(format: Format, number: int, line: dict[str, Any]) -> bytes | None:
    """The stored image of a line, if it is there as recorded."""
    try:
        _, data = next(iter(format.read(number // format.plan.shard, {number})))
    except Exception:  # decoders and tar readers meet damaged files with almost any exception type
        return None
    return data if hashlib.sha256(data).hexdigest() == line["sha256"] else None
