"""Is an output what its plan says, to the last byte."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from typing import Any

from sage_fast.data.writers import LOCK, MARKER, SETUP_LOCK, SHELL_FILES
from sage_fast.errors import InputError, counted
from sage_fast.generation.agreeing import digest_of_lost_config, format_of, read_settings
from sage_fast.generation.checksums import CARD, CONFIG, MANIFEST, PARQUET, SHEET, SUMS, digest_of, read_sums
from sage_fast.generation.committing import committed, is_complete, lines_of, part_lines, reopen
from sage_fast.generation.formats import Format, ImageFolders, Stored
from sage_fast.generation.lines import against_plan, parsed_line
from sage_fast.generation.locks import alone, joined
from sage_fast.generation.stores import STATE, Store, make_state, open_store
from sage_fast.generation.writing import ahead

__all__ = ["Verification", "verify"]

_OTHER = {CARD, CONFIG, MANIFEST, PARQUET, SHEET, SUMS, MARKER, LOCK, SETUP_LOCK, STATE, "report.md", "report.json"}
_BLOCK = 10_000  # rows of Parquet that are in memory
_WHOLE = re.compile(r"_(\d{5,})\Z")


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found: ``n_images`` of ``n_categories`` looked at, one sentence for each of the ``problems``.

    ``missing``: how many shards are not written. ``damaged``: numbers of those that are not as recorded. ``files``: names of
    other files that are gone or not as recorded. ``notes``: sentences on what could not be compared. ``strays``: how many files
    are there that belong to no image.
    """

    n_images: int
    n_categories: int
    problems: list[str]
    missing: int
    damaged: list[int]
    files: list[str]
    notes: list[str]
    strays: int = 0

    def remedy(self, repaired: bool = False) -> str:
        """What to do about the problems, one sentence."""
        if CONFIG in self.files:
            return "'generate --resume' with the settings, model and version of the first run puts it back."
        away = ["Move away what does not belong."] if self.strays else []
        if (self.damaged or self.files) and not repaired:
            away += ["'verify --repair', then 'generate --resume', make what is damaged again."]
        elif self.damaged or self.files or self.missing:
            away += ["'generate --resume' goes on."]
        return " ".join(away)

    def __str__(self) -> str:
        if not self.problems:
            of = f"{counted(self.n_images, 'image')} of {counted(self.n_categories, 'category')}"
            whole = f"{of}: all there, whole and as recorded."
            return " ".join([whole, *self.notes])
        more = f" And {len(self.problems) - 10} more." if len(self.problems) > 10 else ""
        return " ".join(self.problems[:10]) + more


def verify(out: str | os.PathLike[str], repair: bool = False, workers: int = 4) -> Verification:
    """Compare an output with its plan, manifest and checksums; every image is decoded.

    Args:
        out: the output of :func:`generate`, complete or not.
        repair: take damaged shards back and delete other files that are not as recorded, so that ``generate --resume``
            makes them again.
    Raises:
        InputError: it is no output of generate; or, with ``repair``, another run is at work on it.
    """
    store = open_store(out)
    if digest_of_lost_config(store) is not None:
        problem = (
            "'config.json' is gone or not the file that was recorded, so there is no plan to compare the rest with."
        )
        return Verification(0, 0, [problem], 0, [], [CONFIG], [])
    format, settings = format_of(out, writing=False), read_settings(store)
    assert settings is not None
    plan, done = format.plan, committed(store, format.plan)
    missing = plan.n_shards - len(done)
    problems = [] if is_complete(store) else [f"{missing} of {plan.n_shards} shards are not written."]
    strays = list(_strays(format))
    problems += [f"{name!r} does not belong to the plan." for name in strays]
    files, notes = _check_files(store, settings) if is_complete(store) else ({}, [])
    problems += [f"{name!r} {what}." for name, what in files.items()]
    damaged = []
    with ThreadPoolExecutor(workers) as pool:
        for shard, found in ahead(
            pool, lambda one: _check_shard(format, settings, *one), _records(format, done), workers
        ):
            problems += found
            damaged += [shard] if found else []
    if MANIFEST in files and not damaged:
        damaged = sorted(done)  # of which line it is cannot be told
    if repair and (damaged or files):
        _take_back(format, damaged, files)
    n_images = sum(len(plan.positions(shard)) for shard in done)
    return Verification(n_images, len(plan.categories), problems, missing, damaged, list(files), notes, len(strays))


def _take_back(format: Format, damaged: Collection[int], files: Collection[str]) -> None:
    """Let ``generate --resume`` make shards and files again."""
    store = format.target
    file, folder, setup = store.locks
    with joined(str(store), file, folder, 0, 1), alone(setup):
        make_state(store)
        if damaged:
            reopen(format, damaged)
        for name in files:
            store.remove(name)


def _check_files(store: Store, settings: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    """What is wrong with the files beside the images of a complete output, by name; and what cannot be told."""
    recorded, found, notes = read_sums(store), {}, []
    if recorded is None and "checksums" in settings:
        found[SUMS] = "is gone"
    elif recorded is None:
        notes = [f"Digests of {CONFIG}, {CARD}, {SHEET} and {MANIFEST} were not recorded when it was made."]
    elif not recorded:
        found[SUMS] = "is damaged"
    sums = recorded or {}
    for name in sorted({CARD, SHEET, MANIFEST} | sums.keys()):
        if store.size(name) is None:
            found[name] = "is gone"
        elif name in sums and digest_of(store, name) != sums[name]:
            found[name] = "is not the file that was recorded"
    if PARQUET not in sums and store.size(PARQUET) is not None:
        if find_spec("pyarrow") is None:
            notes.append(f"{PARQUET} was not compared: that needs pyarrow, pip install 'sage_fast[parquet]'.")
        elif not _is_of_manifest(store):
            found[PARQUET] = "is not the manifest as Parquet"
    return found, notes


def _is_of_manifest(store: Store) -> bool:
    """Whether the rows of the Parquet file are the lines of the manifest."""
    import pyarrow.parquet as pq

    def given(values: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if value is not None}

    lines = lines_of(store)
    try:
        with store.reader(PARQUET) as file:
            for batch in pq.ParquetFile(file).iter_batches(_BLOCK):
                listed = [given(json.loads(line)) for line in islice(lines, batch.num_rows)]
                if [given(row) for row in batch.to_pylist()] != listed:
                    return False
    except Exception:  # pyarrow meets damaged files with almost any exception type
        return False
    return next(lines, None) is None


def _records(format: Format, done: set[int]) -> Iterator[tuple[int, list[bytes]]]:
    """The lines of each committed shard; of the last one all that are left, but not more than one too many."""
    store, plan = format.target, format.plan
    lines = lines_of(store) if is_complete(store) else None
    for shard in sorted(done):
        if lines is None:
            yield shard, part_lines(store, shard)
        else:
            yield shard, list(islice(lines, len(plan.positions(shard)) + (shard == plan.n_shards - 1)))


def _check_shard(format: Format, settings: dict[str, Any], shard: int, raw: list[bytes]) -> tuple[int, list[str]]:
    """What is wrong with a shard: at most a sentence, the first."""
    positions = format.plan.positions(shard)
    if len(raw) != len(positions):
        return shard, [f"Shard {shard} has {len(raw)} lines in the manifest and {len(positions)} images in the plan."]
    try:
        lines = [parsed_line(position, line) for position, line in zip(positions, raw)]
        problem = _check_lines(format, settings, positions, lines, raw) or _check_images(format, shard, lines)
    except InputError as error:
        problem = str(error)
    except Exception as error:  # decoders and tar readers meet damaged files with almost any exception type
        problem = f"Shard {shard} is damaged ({' '.join(str(error).split()) or type(error).__name__})."
    return shard, [problem] if problem else []


def _check_lines(
    format: Format, settings: dict[str, Any], positions: range, lines: list[dict[str, Any]], raw: list[bytes]
) -> str | None:
    """What is wrong with the lines of a shard beside sizes and digests."""
    similar: dict[int, Any] = {}
    for position, (part, index), line, given in zip(positions, format.plan.images(positions), lines, raw):
        wrong = against_plan(format, settings, position, part, index, line, given)
        if wrong is None and line.get("similar") != similar.setdefault(id(part), line.get("similar")):
            wrong = "has other similar categories than the others of its kind"
        if wrong is None and line["version"] != lines[0]["version"]:
            wrong = "names another version than the others of its shard"
        if wrong is not None:
            return f"Line {position} of the manifest {wrong}."
    return None


def _check_images(format: Format, shard: int, lines: list[dict[str, Any]]) -> str | None:
    """What is wrong with the files of a shard."""
    positions = format.plan.positions(shard)
    if not format.holds(shard, _recorded(format, shard, lines)):
        return f"{_file(lines[0])!r} is not the file that was recorded."
    read = 0
    for position, data in format.read(shard):
        line = lines[read]
        name = f"{line['file']!r}, image {position},"
        if position != positions[read]:
            return f"{name} is out of its place in shard {shard}."
        if len(data) != line["bytes"] or hashlib.sha256(data).hexdigest() != line["sha256"]:
            return f"{name} is not the file that was recorded."
        if format.decode(data).shape != format.shape:
            return f"{name} is not of shape {list(format.shape)}."
        read += 1
    if read != len(positions):
        return f"Shard {shard} holds {read} images in place of {len(positions)}."
    return None


def _file(line: dict[str, Any]) -> str:
    """The file of a format that keeps many images in one."""
    return str(line["file"]).partition("/")[0]


def _recorded(format: Format, shard: int, lines: list[dict[str, Any]]) -> Iterator[Stored]:
    """The stored images of a shard with what the manifest says of them."""
    images = iter(format.read(shard))
    for n, line in enumerate(lines):
        if (stored := next(images, None)) is None:
            raise InputError(f"Shard {shard} is cut off or damaged: {n} of its {len(lines)} images can be read.")
        position, data = stored
        about = {key: value for key, value in line.items() if key not in ("file", "bytes", "sha256")}
        yield Stored(position, line["file"], line["bytes"], line["sha256"], data, about)
    if next(images, None) is not None:
        raise InputError(f"Shard {shard} holds more images than the {len(lines)} of its lines.")


def _strays(format: Format) -> Iterator[str]:
    """Names in the output that no image of the plan has."""
    known = set(format.files())
    for name in format.target.names(""):
        if name not in known | _OTHER and name.lower() not in SHELL_FILES:
            yield name
    if isinstance(format, ImageFolders):
        yield from _strays_in_folders(format)


def _strays_in_folders(format: ImageFolders) -> Iterator[str]:
    counts: dict[str, int] = {}
    for part in format.plan.parts:
        counts[part.category] = counts.get(part.category, 0) + part.n
    for category, n in counts.items():
        for name in format.target.names(category):
            if name.lower() in SHELL_FILES:
                continue
            number = _WHOLE.search(name.removesuffix(f".{format.encoder.image}"))
            index = int(number[1]) if number else n
            if index >= n or f"{category}/{name}" != format.file(category, index):
                yield f"{category}/{name}"
