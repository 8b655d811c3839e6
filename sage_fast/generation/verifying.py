"""Is an output what its plan says, to the last byte; and one image of it again, from its line."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from sage_fast.data.writers import LOCK, MARKER, SETUP_LOCK, atomic_write
from sage_fast.errors import InputError
from sage_fast.generation.agreeing import format_of, read_settings
from sage_fast.generation.committing import committed, is_complete, lines_of, part_lines, reopen
from sage_fast.generation.config import GenerateConfig
from sage_fast.generation.drawing import Prepared, draw_images, draw_latents
from sage_fast.generation.encoding import choose_encoder
from sage_fast.generation.formats import Format, ImageFolders, Stored, TarFiles
from sage_fast.generation.locks import alone, joined
from sage_fast.generation.plan import Part, Plan
from sage_fast.generation.run import load_pipeline
from sage_fast.generation.stores import STATE, Store, make_state, open_store
from sage_fast.generation.writing import ahead
from sage_fast.pipeline import FewShotPipeline

__all__ = ["Regenerated", "Verification", "regenerate", "verify"]

_OTHER = {
    "README.md", "config.json", "manifest.jsonl", "manifest.parquet", "contact_sheet.png", MARKER, LOCK, SETUP_LOCK, STATE,
    "report.md", "report.json",
}  # fmt: skip
_WHOLE = re.compile(r"_(\d{5,})\Z")


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found: ``n_images`` of ``n_categories`` looked at, one sentence for each of the ``problems``.

    ``missing``: how many shards are not written. ``damaged``: numbers of those that are not as recorded.
    """

    n_images: int
    n_categories: int
    problems: list[str]
    missing: int
    damaged: list[int]

    def remedy(self, repaired: bool = False) -> str:
        """What to do about the problems, one sentence."""
        if self.damaged and not repaired:
            return "'verify --repair', then 'generate --resume', draw the damaged shards again."
        if self.damaged or self.missing:
            return "'generate --resume' goes on."
        return "Move away what does not belong."

    def __str__(self) -> str:
        if not self.problems:
            return f"{self.n_images} images of {self.n_categories} categories: all there, whole and as recorded."
        more = f" And {len(self.problems) - 10} more." if len(self.problems) > 10 else ""
        return " ".join(self.problems[:10]) + more


def verify(out: str | os.PathLike[str], repair: bool = False, workers: int = 4) -> Verification:
    """Compare an output with its plan and manifest: counts, order, sizes, hashes; every image is decoded.

    Args:
        out: the output of :func:`generate`, complete or not.
        repair: take damaged shards back, so that ``generate --resume`` draws them again.
    Raises:
        InputError: it is no output of generate; or, with ``repair``, another run is at work on it.
    """
    store = open_store(out)
    format = format_of(out, writing=False)
    plan, shape = format.plan, format.shape
    done = committed(store, plan)
    missing = plan.n_shards - len(done)
    problems = [] if is_complete(store) else [f"{missing} of {plan.n_shards} shards are not written."]
    problems += [f"{name!r} does not belong to the plan." for name in _strays(format)]
    damaged = []
    with ThreadPoolExecutor(workers) as pool:
        for shard, found in ahead(pool, lambda one: _check_shard(format, shape, *one), _records(format, done), workers):
            problems += found
            damaged += [shard] if found else []
    if repair and damaged:
        file, folder, setup = store.locks
        with joined(str(store), file, folder, 0, 1), alone(setup):
            make_state(store)
            reopen(format, damaged)
    return Verification(
        sum(len(plan.positions(shard)) for shard in done), len(plan.categories), problems, missing, damaged
    )


def _records(format: Format, done: set[int]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """The lines of each committed shard."""
    store, plan = format.target, format.plan
    lines = lines_of(store) if is_complete(store) else None
    for shard in sorted(done):
        if lines is None:
            yield shard, part_lines(store, shard)
        else:
            yield shard, [json.loads(line) for line in islice(lines, len(plan.positions(shard)))]


def _check_shard(
    format: Format, shape: tuple[int, int, int], shard: int, lines: list[dict[str, Any]]
) -> tuple[int, list[str]]:
    """What is wrong with a shard: at most a sentence, the first."""
    positions = format.plan.positions(shard)
    if len(lines) != len(positions):
        return shard, [f"Shard {shard} has {len(lines)} lines in the manifest and {len(positions)} images in the plan."]
    listed = iter(zip(lines, positions, format.plan.images(positions)))
    try:
        if isinstance(format, TarFiles) and not format.holds(shard, _recorded(format, shard, lines)):
            return shard, [f"{format.file(shard)!r} is not the file that was recorded."]
        read = 0
        for position, data in format.read(shard):
            line, wanted, (part, index) = next(listed)
            name = f"{line['file']!r}, image {position},"
            if position != wanted or (line["category"], line["index"]) != (part.category, index):
                return shard, [f"{name} is out of its place in shard {shard}."]
            if len(data) != line["bytes"] or hashlib.sha256(data).hexdigest() != line["sha256"]:
                return shard, [f"{name} is not the file that was recorded."]
            if format.decode(data).shape != shape:
                return shard, [f"{name} is not of shape {list(shape)}."]
            read += 1
        if read != len(positions):
            return shard, [f"Shard {shard} holds {read} images in place of {len(positions)}."]
    except InputError as error:
        return shard, [str(error)]
    except Exception as error:  # decoders and tar readers meet damaged files with almost any exception type
        return shard, [f"Shard {shard} is damaged ({' '.join(str(error).split()) or type(error).__name__})."]
    return shard, []


def _recorded(format: TarFiles, shard: int, lines: list[dict[str, Any]]) -> Iterator[Stored]:
    """The images of a tar file with what the manifest says of them."""
    for (position, data), line in zip(format.read(shard), lines, strict=True):
        about = {key: value for key, value in line.items() if key not in ("file", "bytes", "sha256")}
        yield Stored(position, line["file"], line["bytes"], line["sha256"], data, about)


def _strays(format: Format) -> Iterator[str]:
    """Names in the output that no image of the plan has."""
    known = set(format.files())
    for name in format.target.names(""):
        if name not in known | _OTHER:
            yield name
    if isinstance(format, ImageFolders):
        yield from _strays_in_folders(format)


def _strays_in_folders(format: ImageFolders) -> Iterator[str]:
    counts: dict[str, int] = {}
    for part in format.plan.parts:
        counts[part.category] = counts.get(part.category, 0) + part.n
    for category, n in counts.items():
        for name in format.target.names(category):
            number = _WHOLE.search(name.removesuffix(f".{format.encoder.image}"))
            index = int(number[1]) if number else n
            if index >= n or f"{category}/{name}" != format.file(category, index):
                yield f"{category}/{name}"


@dataclass(frozen=True)
class Regenerated:
    """An image that was made again: its file, and whether its bytes are those of the first time."""

    file: Path
    same: bool

    def __str__(self) -> str:
        if self.same:
            return f"{self.file} has the recorded bytes."
        return f"{self.file} has other bytes than recorded: another encoder, device or batch; pixels differ by a level at most."


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
        InputError: no such line, another model, or shots that are not there or not the same.
    """
    folder, _, name = os.fspath(manifest).rpartition("/")
    store = open_store(folder or ".")
    settings = read_settings(store) if name == "manifest.jsonl" else None
    if settings is None:
        raise InputError(f"{os.fspath(manifest)!r} is no manifest.jsonl beside a config.json; give that of an output.")
    line = _line(store, number)
    pipeline = load_pipeline(model, GenerateConfig(preset=line["preset"]))
    if pipeline.hash != line["model"]:
        raise InputError(
            f"The image was made by model {line['model']}, and this is {pipeline.hash}; give that with --model."
        )
    values: dict[str, Any] = {key: line.get(key) for key in Part.__dataclass_fields__}
    values |= {"first": line["index"], "n": 1, "shots": tuple(shot["file"] for shot in line["shots"])}
    part = Part(**(values | {"hashes": tuple(shot["sha256"] for shot in line["shots"])}))
    plan = Plan(Path(shots_dir or settings["shots_dir"]), (part,), settings["batch"], 1)
    latents = draw_latents(Prepared(pipeline, plan), range(1))
    image = draw_images(pipeline, latents)
    return _keep(image, next(iter(latents.about())), line, settings, plan, out)


def _line(store: Store, number: int) -> dict[str, Any]:
    line = next(islice(lines_of(store), number, None), None) if number >= 0 else None
    if line is None:
        raise InputError(f"The manifest has no line {number}; its lines are numbered from 0.")
    return dict(json.loads(line))


def _keep(
    image: Tensor,
    about: dict[str, Any],
    line: dict[str, Any],
    settings: dict[str, Any],
    plan: Plan,
    out: str | os.PathLike[str] | None,
) -> Regenerated:
    """Write the image as the output has it; plain arrays become a PNG."""
    kind = settings["image"] or "png"
    library = (settings["encoder"] or "pillow").split()[0]
    encoder = choose_encoder(library, kind, settings["quality"], image.shape[1], image.device)
    path = Path(out or f"{about['category']}_{about['index']:05d}.{kind}")
    format = ImageFolders(open_store(path.parent), plan, encoder, (image.shape[1], image.shape[2], image.shape[3]))
    data = format.encoded(format.contents(image)[0], about)
    compared = image.cpu().numpy().tobytes() if settings["format"] == "safetensors" else data
    with atomic_write(path) as file:
        file.write(data)
    return Regenerated(path, hashlib.sha256(compared).hexdigest() == line["sha256"])
