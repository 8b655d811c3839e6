"""A folder of shots, or a YAML, JSON or CSV file, to a plan.

A file holds defaults and a list of lines, ``categories``; a CSV file is that list::

    n: 1000                     # any setting of GenerateConfig that concerns single images
    shots: novel                # what the shots below are relative to, itself relative to this file; absent: this file's folder
    categories:
      - {category: rose}                          # shots in novel/rose
      - {category: lily, n: 50, alpha: 0.5}
      - {category: lily, n: 50, alpha: 2}         # goes on with lily's image number 50
      - {category: iris, shots: [iris/a.png, old/b.png], method: age}

All shots are relative to one folder, the root of the plan: ``shots_dir`` where it is given, else the file's ``shots``, else the
file's own folder.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import unicodedata
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from sage_fast.data.folders import ImageFolder, scan_image_folder
from sage_fast.data.images import UnreadableImage, decode
from sage_fast.data.splits import take_shots
from sage_fast.editing.editor import PRESETS
from sage_fast.errors import InputError, SageFastWarning
from sage_fast.generation.config import GenerateConfig
from sage_fast.generation.plan import Part, Plan, check_categories

__all__ = ["PLAN_SUFFIXES", "read_plan"]

PLAN_SUFFIXES = (".yaml", ".yml", ".json", ".csv")
_SHARD = {"folder": 512, "webdataset": 4096, "safetensors": 512}
_NUMBERS = {
    "n": int,
    "seed": int,
    "n_shots": int,
    "n_components": int,
    "n_similar": int,
    "n_directions": int,
    "alpha": float,
}
_WORDS = ("method", "fusion")
_MOST_IMAGES = 10**12
_MAX_BAD_SHARE = 0.05  # shots that cannot be read are left out while they are at most this share


@dataclass(frozen=True)
class _Line:
    """A category, where its shots are, and its settings."""

    category: str
    listing: ImageFolder
    config: GenerateConfig


def read_plan(
    file: str | os.PathLike[str] | None,
    shots_dir: str | os.PathLike[str] | None,
    config: GenerateConfig,
    n_channels: int,
    resolution: int,
) -> Plan:
    """The plan of a file, or of a folder of shots; every shot is read once, for its hash.

    Args:
        file: .yaml, .json or .csv; None: the categories are those of ``shots_dir``.
        shots_dir: ``<category>/<image>``, or one flat folder. With ``file``: what all its shots are relative to; None: the
            folder that the file names.
        config: the settings that the file does not give.
        n_channels, resolution: what the shots are to be readable as.
    Raises:
        InputError: a name, count, setting or shot that cannot be used.
    """
    if file is not None:
        root, lines = _lines_of_file(Path(file), config, shots_dir)
    elif shots_dir is not None:
        root, lines = Path(shots_dir), _lines_of_folder(Path(shots_dir), config)
    else:
        raise InputError("generate needs --shots, the folder of the given images, or --plan, a file that names them.")
    lines = _chosen(lines, config.categories)
    parts = _parts(root, lines, resolution, n_channels)
    return Plan(root, tuple(parts), config.batch or 1, config.shard or _SHARD[config.format])


def _lines_of_folder(folder: Path, config: GenerateConfig) -> list[_Line]:
    listing = scan_image_folder(folder, flat_ok=True)
    hidden = sorted(path.name for path in folder.iterdir() if path.name.startswith(".") and path.is_dir())
    if hidden:
        warnings.warn(
            f"Folders of {str(folder)!r} whose names start with a dot are passed over: {', '.join(hidden):.300}; rename those "
            "that are categories.", SageFastWarning, stacklevel=4,
        )  # fmt: skip
    check_categories(listing.categories)
    files: list[list[str]] = [[] for _ in listing.categories]
    for file, label in zip(listing.files, listing.labels):
        files[label].append(file)
    return [_line(name, _listing(folder, name, found), config) for name, found in zip(listing.categories, files)]


def _listing(root: Path, category: str, files: list[str]) -> ImageFolder:
    return ImageFolder(root, [category], files, [0] * len(files))


def _line(name: str, listing: ImageFolder, config: GenerateConfig) -> _Line:
    if config.n_shots is not None:
        listing, _ = take_shots(listing, config.n_shots, config.seed)
    return _Line(unicodedata.normalize("NFC", name), listing, config)


def _lines_of_file(
    path: Path, config: GenerateConfig, shots_dir: str | os.PathLike[str] | None
) -> tuple[Path, list[_Line]]:
    content = _parse(path)
    listed = content.pop("categories", None)
    if not isinstance(listed, list) or not listed:
        raise InputError(f"Plan {str(path)!r} must hold a list 'categories' with a line each; see docs/generation.md.")
    place = content.pop("shots", None)
    if not isinstance(place, str | None):
        raise InputError(
            f"Plan {str(path)!r} has shots {place!r:.60}, expected one folder, which all shots are relative to."
        )
    root = Path(shots_dir) if shots_dir is not None else path.parent / (place or ".")
    config = _with(config, content, f"Plan {str(path)!r}")
    lines = []
    for number, line in enumerate(listed, start=1):
        where = f"Plan {str(path)!r}, line {number} of its categories,"
        name = line.get("category") if isinstance(line, dict) else None
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise InputError(
                f"{where} must name a category, text or a whole number, got {line!r:.60}; {_named_how(path, line)}."
            )
        values = {key: value for key, value in line.items() if key not in ("category", "shots")}
        listing = _shots_of(root, str(name), line.get("shots"), where)
        lines.append(_line(str(name), listing, _with(config, values, where)))
    check_categories([str(line["category"]) for line in listed])
    return root, lines


def _named_how(path: Path, line: Any) -> str:
    """What to do about a line without a category."""
    if path.suffix.lower() == ".csv":
        return "the header must read category,n,... with commas"
    return "put the name in quotes" if isinstance(line, dict) and "category" in line else "write it as 'category: NAME'"


def _parse(path: Path) -> dict[str, Any]:
    """The content of a plan file; the rows of a CSV file as ``categories``."""
    if path.suffix.lower() not in PLAN_SUFFIXES:
        raise InputError(f"Plan {str(path)!r} must end in {', '.join(PLAN_SUFFIXES)}; rename it.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"Plan {str(path)!r} cannot be read ({getattr(error, 'strerror', 'not UTF-8')}); give another file."
        ) from error
    try:
        if path.suffix.lower() == ".csv":
            rows = list(
                csv.DictReader(io.StringIO(text), restkey="(more columns than the header)", skipinitialspace=True)
            )
            return {
                "categories": [
                    {str(key).strip(): value for key, value in row.items() if value not in ("", None)} for row in rows
                ]
            }
        content = json.loads(text, object_pairs_hook=_once) if path.suffix.lower() == ".json" else _parse_yaml(text)
    except (ValueError, csv.Error, RecursionError) as error:
        raise InputError(f"Plan {str(path)!r} cannot be parsed ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict):
        raise InputError(
            f"Plan {str(path)!r} must be a mapping with a list 'categories', got {type(content).__name__}."
        )
    return content


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """A mapping of a file, in which no name may stand twice: the later value would be taken without a word."""
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r:.60} stands twice in one mapping")
        found[key] = value
    return found


def _parse_yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise InputError("A plan in YAML needs PyYAML; pip install 'sage_fast[plans]', or write it as JSON.") from error
    try:
        _check_names_of(yaml.compose(text, yaml.SafeLoader), set())
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _check_names_of(node: Any, seen: set[int]) -> None:
    """Raise ValueError where a mapping of a YAML document has a name twice; aliases are looked at once."""
    if node is None or isinstance(node.value, str) or id(node) in seen:
        return
    seen.add(id(node))
    pairs = isinstance(node.value[0], tuple) if node.value else False
    if pairs:
        _once([(key.value, None) for key, _ in node.value if isinstance(key.value, str)])
    for inner in node.value:
        _check_names_of(inner[1] if pairs else inner, seen)


def _with(config: GenerateConfig, values: dict[str, Any], where: str) -> GenerateConfig:
    """``config`` with the settings that a plan gives."""
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if key in _NUMBERS:
            changes[key] = _number(value, _NUMBERS[key], f"{where} {key}")
        elif key in _WORDS:
            changes[key] = str(value)
        else:
            known = ", ".join(("category", "shots", *_NUMBERS, *_WORDS))
            raise InputError(f"{where} has no setting {key!r}; choose among {known}.")
    try:
        return replace(config, **changes)
    except InputError as error:
        raise InputError(f"{where} {error}") from error


def _number(value: Any, kind: type, where: str) -> Any:
    try:
        if isinstance(value, bool) or (isinstance(value, float) and kind is int and value != int(value)):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where} must be {'a whole ' if kind is int else 'a '}number, got {value!r:.60}.") from error


def _shots_of(root: Path, category: str, given: Any, where: str) -> ImageFolder:
    """The shot files of one line, relative to ``root``: those of a folder, or the ones listed."""
    if isinstance(given, list):
        files = [str(file) for file in given]
    elif isinstance(given, str) and (root / given).is_file():
        files = [given]
    else:
        if not isinstance(given, str | int | None) or isinstance(given, bool):
            raise InputError(f"{where} has shots {given!r:.60}; give a folder, an image or a list of images.")
        folder = root / (category if given is None else str(given))
        if not folder.is_dir():
            raise InputError(
                f"{where} has its shots in {str(folder)!r}, which is not there; give 'shots', a folder, an image or a list of "
                f"images, relative to {str(root)!r}."
            )
        found = scan_image_folder(folder, flat_ok=True)
        files = [os.path.relpath(folder / file, root).replace(os.sep, "/") for file in found.files]
    if not files:
        raise InputError(f"{where} lists no shots; give at least one.")
    return _listing(root, category, files)


def _chosen(lines: list[_Line], words: Sequence[str]) -> list[_Line]:
    """The lines of the categories that were named, with the counts that were given."""
    if not words:
        return lines
    by_name: dict[str, list[_Line]] = {}
    for line in lines:
        by_name.setdefault(line.category, []).append(line)
    chosen: list[_Line] = []
    for word in words:
        name, _, count = word.rpartition("=") if word not in by_name else (word, "", "")
        name = unicodedata.normalize("NFC", name or word)
        if name not in by_name:
            raise InputError(
                f"categories names {name!r:.60}, which is not there; choose among {', '.join(by_name):.300}."
            )
        found = by_name[name]
        if count:
            if len(found) > 1:
                raise InputError(
                    f"categories gives {name!r} a count, and the plan gives it several; leave out '={count}'."
                )
            found = [
                replace(found[0], config=replace(found[0].config, n=_number(count, int, f"The count of {name!r}")))
            ]
        chosen += found
    return chosen


def _parts(root: Path, lines: list[_Line], resolution: int, n_channels: int) -> list[Part]:
    if sum(line.config.n for line in lines) > _MOST_IMAGES:
        raise InputError(
            f"A plan has at most {_MOST_IMAGES:,} images, got {sum(line.config.n for line in lines):,}; ask for fewer."
        )
    hashes = _hash_shots(root, lines, resolution, n_channels)
    ends: dict[str, int] = {}
    parts: list[Part] = []
    known: set[Part] = set()
    for line in lines:
        config = line.config
        files = tuple(file for file in line.listing.files if file in hashes)
        if not files:
            raise InputError(
                f"No image can be read of {line.category!r} in {str(root)!r}; repair the images or leave the category out."
            )
        alpha = PRESETS[config.preset]["alpha"] if config.alpha is None else config.alpha
        part = Part(
            line.category, ends.get(line.category, 0), config.n, files, tuple(hashes[file] for file in files),
            config.seed, config.method, None if config.method == "inversion" else float(alpha), config.fusion,
            **{name: getattr(config, name) for name in ("n_components", "n_similar", "n_directions")},
        )  # fmt: skip
        if (settings := replace(part, n=0, first=0)) in known:
            raise InputError(
                f"Category {line.category!r} stands twice in the plan with the same settings; join its counts."
            )
        known.add(settings)
        ends[line.category] = part.first + part.n
        parts.append(part)
    return parts


def _hash_shots(root: Path, lines: list[_Line], resolution: int, n_channels: int) -> dict[str, str]:
    """SHA-256 by file of every shot that can be read."""

    def look(file: str) -> tuple[str, str | None]:
        try:
            decode(root / file, resolution, n_channels)
            return hashlib.sha256((root / file).read_bytes()).hexdigest(), None
        except UnreadableImage as error:
            return "", error.reason
        except OSError as error:
            return "", error.strerror or "cannot be opened"

    files = list(dict.fromkeys(file for line in lines for file in line.listing.files))
    with warnings.catch_warnings(), ThreadPoolExecutor(4) as pool:
        warnings.filterwarnings("ignore", module="PIL")  # each image is judged here, once and by name
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        looked = dict(zip(files, pool.map(look, files, chunksize=32)))
    bad = [f"{file}: {reason}" for file, (_, reason) in looked.items() if reason is not None]
    if bad:
        more = f", and {len(bad) - 3} more" if len(bad) > 3 else ""
        found = f"{len(bad)} of {len(files)} shots in {str(root)!r} cannot be read ({'; '.join(bad[:3])}{more})"
        if len(bad) > _MAX_BAD_SHARE * len(files):
            raise InputError(f"{found}, more than the {_MAX_BAD_SHARE:.0%} allowed; repair or remove them.")
        warnings.warn(f"{found} and are left out; repair or remove them.", SageFastWarning, stacklevel=4)
    return {file: digest for file, (digest, reason) in looked.items() if reason is None}
