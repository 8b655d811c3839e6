"""WebDataset shards: plain .tar files whose members belong together by name up to the first dot.

A sample is ``KEY.png`` (or another image type) with its label in ``KEY.cls``, or as ``label`` or ``cls`` in ``KEY.json``:
an integer or the name of a class. Integers are given names by ``KEY.txt``, where all texts of a class are the same, by
``classnames.txt`` beside the shards (line i is class i), or by ``category`` in ``KEY.json``, as ``generate`` writes it, where
all of a class are the same; else the number itself is the name.
"""

from __future__ import annotations

import itertools
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from glob import glob
from pathlib import Path
from typing import NamedTuple

from sage_fast.data.archives import Member
from sage_fast.data.images import IMAGE_SUFFIXES
from sage_fast.errors import InputError, SageFastWarning

__all__ = ["Sample", "TEXTS", "class_names", "expand_pattern", "samples_of"]

TEXTS = (".cls", ".json", ".txt")
_MAX_SHARDS = 100_000
_BRACES = re.compile(r"\{([^{}]*)\}")


class Sample(NamedTuple):
    """One labelled image: its class as written, its member, and its text and category, if any."""

    label: str
    image: Member
    text: str
    category: str


def expand_pattern(pattern: str) -> list[Path]:
    """The files that ``shards-{0000..0003}.tar``, ``{a,b}.tar`` or ``shards-*.tar`` stand for, in their order.

    Raises:
        InputError: one of them is not there, or there are too many.
    """
    found: list[Path] = []
    for name in itertools.islice(_expand(pattern), _MAX_SHARDS + 1):
        files = sorted(glob(name)) if any(c in name for c in "*?[") else [name] if Path(name).is_file() else []
        if not files:
            raise InputError(f"Data {pattern!r}: there is no file {name!r}; give shards that are there.")
        found += map(Path, files)
    if not found:
        raise InputError(f"Data {pattern!r} stands for no file; count upwards, as in {{0000..0003}}.")
    if len(found) > _MAX_SHARDS:
        raise InputError(f"Data {pattern!r} stands for more than {_MAX_SHARDS} files; give fewer, larger shards.")
    return list(dict.fromkeys(found))


def samples_of(path: Path, members: Iterable[Member]) -> list[Sample]:
    """The images of the shard ``path`` with their labels, from what ``list_members(path, TEXTS)`` found.

    Raises:
        InputError: no images, two of one sample, or an image without a label.
    """
    texts: dict[tuple[str, str], str] = {}
    images: dict[str, Member] = {}
    for member in members:
        if member.suffix in IMAGE_SUFFIXES:
            if member.key in images:
                raise InputError(f"Shard {str(path)!r} holds two images of the sample {member.key!r}; remove one.")
            images[member.key] = member
        elif member.suffix in TEXTS:
            texts[member.key, member.suffix] = member.text
    if not images:
        raise InputError(f"Shard {str(path)!r} holds no images; remove it or make it again.")
    return [_sample(path, key, image, texts) for key, image in images.items()]


def class_names(samples: Sequence[Sample], folder: Path) -> dict[str, str]:
    """label -> name of the class, for every label of all shards, which lie in ``folder``."""
    own = {sample.label: sample.label for sample in samples}
    from_file = partial(_names_from_file, folder / "classnames.txt")
    return _names_from_texts(samples) or from_file(samples) or _names_from_categories(samples) or own


def _sample(path: Path, key: str, image: Member, texts: dict[tuple[str, str], str]) -> Sample:
    try:
        content = json.loads(texts.get((key, ".json"), "{}"))
    except (ValueError, RecursionError):
        content = None
    fields = content if isinstance(content, dict) else {}
    category = fields.get("category")
    label = _label(path, key, texts, fields)
    text = texts.get((key, ".txt"), "").strip()
    return Sample(label, image, text, category.strip() if isinstance(category, str) else "")


def _label(path: Path, key: str, texts: dict[tuple[str, str], str], fields: dict[str, object]) -> str:
    label: object = texts.get((key, ".cls"))
    if label is None:
        label = fields.get("label", fields.get("cls"))
    if isinstance(label, bool) or not isinstance(label, int | str) or not str(label).strip():
        raise InputError(
            f"Sample {key!r} in {str(path)!r} has no label; expected {key}.cls with a class, or {key}.json with 'label'."
        )
    return str(label).strip()


def _names_from_texts(samples: Sequence[Sample]) -> dict[str, str]:
    if not any(sample.text for sample in samples):
        return {}
    names: dict[str, set[str]] = {}
    for sample in samples:
        names.setdefault(sample.label, set()).add(sample.text)
    if any(len(texts) > 1 for texts in names.values()):
        message = "The .txt files of one class differ, so they are taken for captions and passed over."
        warnings.warn(message, SageFastWarning, stacklevel=4)
        return {}
    return {label: texts.pop() or label for label, texts in names.items()}


def _names_from_categories(samples: Sequence[Sample]) -> dict[str, str]:
    """The one category of each label; none where a label has several, or none."""
    names: dict[str, str] = {}
    one_each = all(names.setdefault(sample.label, sample.category) == sample.category for sample in samples)
    return names if one_each and all(names.values()) else {}


def _names_from_file(path: Path, samples: Sequence[Sample]) -> dict[str, str]:
    if not path.is_file():
        return {}
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    unnamed = sorted({s.label for s in samples if not s.label.isdecimal() or int(s.label) >= len(lines)})
    if unnamed:
        raise InputError(f"{str(path)!r} names {len(lines)} classes and lacks class {unnamed[0]!r}; add its line.")
    return {s.label: lines[int(s.label)] for s in samples}


def _expand(pattern: str) -> Iterable[str]:
    """The pattern with its first braces written out, and so on."""
    for match in _BRACES.finditer(pattern):
        words = _words(match[1])
        if words is not None:
            before, after = pattern[: match.start()], pattern[match.end() :]
            return (full for word in words for full in _expand(before + word + after))
    return iter([pattern])


def _words(inside: str) -> Iterable[str] | None:
    """What braces stand for: ``0000..0003`` (as wide as written), ``a,b``, or None for other braces."""
    match = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if match is None:
        return inside.split(",") if "," in inside else None
    width = len(match[1]) if match[1].startswith("0") else 1
    return (f"{i:0{width}d}" for i in range(int(match[1]), int(match[2]) + 1))
