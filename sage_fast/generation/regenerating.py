"""One image of an output again, from its line in the manifest."""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sage_fast import __version__
from sage_fast.arithmetic import float32_products
from sage_fast.data.writers import atomic_write
from sage_fast.errors import InputError
from sage_fast.generation.agreeing import format_of, read_settings
from sage_fast.generation.checksums import CONFIG, MANIFEST, PARQUET
from sage_fast.generation.committing import lines_of
from sage_fast.generation.config import IMAGES, GenerateConfig
from sage_fast.generation.drawing import Prepared, draw_images, draw_latents
from sage_fast.generation.encoding import choose_encoder
from sage_fast.generation.formats import Format, ImageFolders
from sage_fast.generation.lines import against_plan, parsed_line
from sage_fast.generation.plan import Part, Plan, check_categories
from sage_fast.generation.run import load_pipeline
from sage_fast.generation.stores import Store, open_store
from sage_fast.pipeline import FewShotPipeline

__all__ = ["Regenerated", "regenerate"]

_TYPES = {
    "category": str, "index": int, "file": str, "sha256": str, "shots": list, "seed": int, "method": str, "fusion": str,
    "preset": str, "model": str,
}  # fmt: skip


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

    Beside a manifest lies the output's ``config.json``, which says how its files are encoded, and against whose plan the line is
    checked. Where it does not, as of a ``manifest.jsonl`` or ``manifest.parquet`` that was copied, line and shots are enough for the
    image; it is then drawn in a micro-batch of its own.

    Args:
        manifest: ``manifest.jsonl`` or ``manifest.parquet`` of an output, or a copy under any name with these endings.
        number: which line, from 0.
        out: the file to write; None: the image's name, in the current folder.
        model: as for :func:`generate`; its hash must be the recorded one. Without a GPU it draws in float32 what was drawn in TF32.
        shots_dir: where the shots lie now; None: where they lay, by ``config.json``.
    Raises:
        InputError: no such line, one that contradicts the plan, another model, or shots that are not there or not the same.
    """
    record = _recorded(os.fspath(manifest), number, shots_dir)
    settings, line = record.settings, record.line
    precision = settings["precision"]
    if precision == "tf32" and not torch.cuda.is_available():
        precision = "float32"
    given = GenerateConfig(preset=line["preset"], precision=precision, inversion_device=settings["inversion_device"])
    pipeline = load_pipeline(model, given)
    if pipeline.hash != line["model"]:
        raise InputError(
            f"The image was made by model {line['model']}, and this is {pipeline.hash}; give that with --model."
        )
    plan = Plan(Path(shots_dir or settings["shots_dir"]), (record.part,), settings["batch"], 1)
    with float32_products(pipeline.precision):
        latents = draw_latents(Prepared(pipeline, plan), range(1))
        image = draw_images(pipeline, latents)
    return _keep(image, next(iter(latents.about())), record, number, out)


@dataclass(frozen=True, eq=False)
class _Record:
    """What is written down of an image: its line, its part of the plan, the output's settings; ``format`` None: it was copied."""

    line: dict[str, Any]
    part: Part
    settings: dict[str, Any]
    format: Format | None


def _recorded(manifest: str, number: int, shots_dir: str | os.PathLike[str] | None) -> _Record:
    folder, _, name = manifest.rpartition("/")
    store = open_store(folder or ".")
    whole = name in (MANIFEST, PARQUET) and all(store.size(file) is not None for file in (MANIFEST, CONFIG))
    settings = read_settings(store) if whole else None
    if settings is not None:
        format = format_of(folder or ".", writing=False)
        return _Record(*_line(format, settings, number), settings, format)
    if store.size(name) is None or not name.endswith((".jsonl", ".parquet")):
        raise InputError(f"{manifest!r} is no manifest.jsonl or manifest.parquet of an output of generate; give one.")
    if shots_dir is None:
        raise InputError(
            f"Beside {manifest!r} is no config.json, which says where the shots lay; give their folder with --shots."
        )
    line = _parquet_line(store, name, number) if name.endswith(".parquet") else _json_line(store, name, number)
    part = _part_of(line)
    if part is None:
        raise InputError(f"Line {number} of {manifest!r} is none of generate's; give a manifest as generate wrote it.")
    kind = line["file"].rpartition(".")[2]
    settings = {
        "batch": 1,
        "encoder": "auto",
        "format": "safetensors" if kind == "safetensors" else "folder",
        "image": kind if kind in IMAGES else None,
        "inversion_device": "cpu",
        "precision": line.get("precision", "float32"),
        "quality": None,
    }
    return _Record(line, part, settings, None)


def _part_of(line: dict[str, Any]) -> Part | None:
    """The part of a plan that a line's image alone is; None: the line is none of generate's."""
    try:
        if not all(isinstance(line[name], kind) for name, kind in _TYPES.items()) or not 0 <= line["index"] < 1 << 62:
            return None
        shots = [(shot["file"], shot["sha256"]) for shot in line["shots"]]
        if not all(isinstance(word, str) and "\0" not in word for shot in shots for word in shot):
            return None
        own: dict[str, Any] = {name: line[name] for name in ("seed", "method", "alpha", "fusion", "preset")}
        editor: dict[str, Any] = {name: line.get(name) for name in ("n_components", "n_similar", "n_directions")}
        GenerateConfig(**own, **editor, precision=line.get("precision", "float32"))
        check_categories([line["category"]])
        if not shots or (own["alpha"] is None) != (own["method"] == "inversion"):
            return None
        del own["preset"]
        files, hashes = zip(*shots)
        return Part(category=line["category"], first=line["index"], n=1, shots=files, hashes=hashes, **own, **editor)
    except (KeyError, TypeError, ValueError, InputError):
        return None


def _json_line(store: Store, name: str, number: int) -> dict[str, Any]:
    with store.reader(name) as file:
        raw = next(islice(file, number, None), None) if 0 <= number <= sys.maxsize else None
    if raw is None:
        raise _no_line(number)
    return parsed_line(number, raw)


def _parquet_line(store: Store, name: str, number: int) -> dict[str, Any]:
    if find_spec("pyarrow") is None:
        raise InputError(
            "manifest.parquet is read by pyarrow; pip install 'sage_fast[parquet]', or give manifest.jsonl."
        )
    import pyarrow as pa
    import pyarrow.parquet as pq

    with store.reader(name) as file:
        try:
            table, first = pq.ParquetFile(file), 0
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                if first <= number < first + rows:
                    (line,) = table.read_row_group(group).slice(number - first, 1).to_pylist()
                    return {key: value for key, value in line.items() if value is not None or key == "alpha"}
                first += rows
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{name} in {str(store)!r} is no Parquet file, or damaged; give manifest.jsonl."
            ) from error
    raise _no_line(number)


def _no_line(number: int) -> InputError:
    return InputError(f"The manifest has no line {number}; its lines are numbered from 0.")


def _line(format: Format, settings: dict[str, Any], number: int) -> tuple[dict[str, Any], Part]:
    """A line that agrees with the plan, and the part of its image alone.

    Raises:
        InputError: there is none.
    """
    raw = next(islice(lines_of(format.target), number, None), None) if 0 <= number < len(format.plan) + 1 else None
    if raw is None:
        raise _no_line(number)
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
    image: Tensor, about: dict[str, Any], record: _Record, number: int, out: str | os.PathLike[str] | None
) -> Regenerated:
    """Write the image as the output has it; plain arrays become a PNG."""
    settings, line, format = record.settings, record.line, record.format
    kind = settings["image"] or "png"
    library = (settings["encoder"] or "pillow").split()[0]
    encoder = choose_encoder(library, kind, settings["quality"], image.shape[1], image.device)
    path = Path(out or f"{about['category']}_{about['index']:05d}.{kind}")
    _check_target(path, kind, format)
    plan = Plan(Path(), (record.part,), 1, 1)
    files = ImageFolders(open_store(path.parent), plan, encoder, (image.shape[1], image.shape[2], image.shape[3]))
    data = files.encoded(files.contents(image)[0], about)
    compared = image.cpu().numpy().tobytes() if settings["format"] == "safetensors" else data
    with atomic_write(path) as file:
        file.write(data)
    if hashlib.sha256(compared).hexdigest() == line["sha256"]:
        return Regenerated(path, True, 0, 0.0, [])
    now = {"version": __version__, "similar": about.get("similar"), "precision": about.get("precision")}
    other = [key for key, value in now.items() if line.get(key) != value]
    if format is None:
        return Regenerated(
            path, False, None, 0.0, [*other, "perhaps what config.json names: encoder, inversion_device"]
        )
    now = {"device": image.device.type, "encoder": encoder.name if settings["encoder"] else None}
    other += [key for key, value in now.items() if settings[key] != value]
    stored = _stored(format, number, line)
    if stored is None:
        return Regenerated(path, False, None, 0.0, other)
    apart = np.abs(format.decode(stored).astype(int) - format.decode(compared))
    return Regenerated(path, False, int(apart.max()), float((apart > 0).mean()), other)


def _check_target(path: Path, kind: str, format: Format | None) -> None:
    """Raise InputError for a name of another kind of image, or a file of the output itself."""
    endings = {"jpg": (".jpg", ".jpeg")}.get(kind, (f".{kind}",))
    if path.suffix.lower() not in endings:
        raise InputError(
            f"The image is written as {kind}, so out must end in {' or '.join(endings)}, got {str(path)!r}."
        )
    if format is not None and format.target.local and Path(str(format.target)).resolve() in path.resolve().parents:
        raise InputError(f"{str(path)!r} lies in the output itself, whose files are as recorded; give another file.")


def _stored(format: Format, number: int, line: dict[str, Any]) -> bytes | None:
    """The stored image of a line, if it is there as recorded."""
    try:
        _, data = next(iter(format.read(number // format.plan.shard, {number})))
    except Exception:  # decoders and tar readers meet damaged files with almost any exception type
        return None
    return data if hashlib.sha256(data).hexdigest() == line["sha256"] else None
