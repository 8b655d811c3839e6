"""What is to be drawn: parts of a plan, and where each image stands in it.

Image number p of a plan is one image of one part; a shard is a range of p that is committed together, a micro-batch a
range of p that is drawn together. All of it is computed from the counts: nothing is listed image by image.
"""

from __future__ import annotations

import os
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from sage_fast.errors import InputError

__all__ = ["Part", "Plan", "Span", "check_categories", "check_grown"]

_LONGEST = 230  # bytes of a category's name: "_0000000000.webp" follows it in a file's name of at most 255
_TAKEN = ("config.json", "manifest.jsonl", "manifest.parquet", "readme.md", "contact_sheet.png", "sha256sums", "cache")
_SHOWN = 90  # characters of a setting in a message


@dataclass(frozen=True)
class Part:
    """Images of one category with the same settings: its images ``first`` to ``first + n - 1``.

    ``shots`` are files, relative to the plan's root, ``hashes`` the SHA-256 of their bytes.
    """

    category: str
    first: int
    n: int
    shots: tuple[str, ...]
    hashes: tuple[str, ...]
    seed: int
    method: str
    alpha: float | None  # None: the method edits nothing
    fusion: str
    n_components: int | None = None
    n_similar: int | None = None
    n_directions: int | None = None

    def editor_options(self) -> dict[str, int]:
        """The editor's settings that were given."""
        values = {name: getattr(self, name) for name in ("n_components", "n_similar", "n_directions")}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Span:
    """Images ``first`` to ``first + n - 1`` of the category of part number ``part``."""

    part: int
    first: int
    n: int


@dataclass(frozen=True)
class Plan:
    """Parts in their order, cut into shards of ``shard`` images and micro-batches of ``batch``."""

    root: Path
    parts: tuple[Part, ...]
    batch: int
    shard: int

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(part.n for part in self.parts))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def n_shards(self) -> int:
        """How many shards there are."""
        return -(-len(self) // self.shard)

    @cached_property
    def categories(self) -> list[str]:
        """Names, sorted; a label is an index into them."""
        return sorted({part.category for part in self.parts})

    @cached_property
    def labels(self) -> dict[str, int]:
        """Label of each category."""
        return {name: label for label, name in enumerate(self.categories)}

    def positions(self, shard: int) -> range:
        """The images of a shard."""
        return range(shard * self.shard, min((shard + 1) * self.shard, len(self)))

    def batches(self, shard: int) -> list[range]:
        """The micro-batches of a shard."""
        images = self.positions(shard)
        return [images[start : start + self.batch] for start in range(0, len(images), self.batch)]

    def spans(self, positions: range) -> list[Span]:
        """Neighbouring images as stretches of one part each."""
        spans, at = [], positions.start
        while at < positions.stop:
            number = bisect_right(self._ends, at)
            part, end = self.parts[number], min(self._ends[number], positions.stop)
            spans.append(Span(number, part.first + at - (self._ends[number] - part.n), end - at))
            at = end
        return spans

    def images(self, positions: range) -> Iterable[tuple[Part, int]]:
        """Part and index in its category of each image."""
        for span in self.spans(positions):
            for index in range(span.first, span.first + span.n):
                yield self.parts[span.part], index

    def describe(self) -> list[dict[str, Any]]:
        """The parts as plain values; :meth:`read` undoes it."""
        return [asdict(part) | {"shots": list(part.shots), "hashes": list(part.hashes)} for part in self.parts]

    @classmethod
    def read(cls, settings: dict[str, Any]) -> Plan:
        """The plan of a ``config.json``.

        Raises:
            InputError: it holds none.
        """
        try:
            listed = [
                {**part, "shots": tuple(part["shots"]), "hashes": tuple(part["hashes"])} for part in settings["plan"]
            ]
            parts = tuple(Part(**part) for part in listed)
            batch, shard = int(settings["batch"]), int(settings["shard"])
            if min(batch, shard, *(part.n for part in parts)) < 1:
                raise ValueError
            return cls(Path(settings["shots_dir"]), parts, batch, shard)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError("config.json holds no plan of generate; give the output folder of generate.") from error


def check_categories(names: Sequence[str]) -> None:
    """Raise InputError for a name that cannot be a folder's, or two that are one on some file system."""
    known: dict[str, str] = {}
    for name in names:
        if not name or name.startswith(".") or any(sign in name for sign in "/\\") or not _printable(name):
            raise InputError(
                f"Category name {name!r:.{_SHOWN}} cannot be a folder's: it must not be empty, start with a dot or "
                "hold slashes or control characters; rename it."
            )
        if name.casefold() in _TAKEN:
            raise InputError(
                f"Category name {name!r} is that of a file or folder of our own in outputs; rename the category."
            )
        if len(os.fsencode(name)) > _LONGEST:
            raise InputError(
                f"Category name {name[:40]!r} and on is {len(os.fsencode(name))} bytes long, at most {_LONGEST} fit a "
                "file's name; shorten it."
            )
        same = known.setdefault(_folder_of(name), name)
        if same != name:
            raise InputError(
                f"Categories {same!r} and {name!r} are one folder where upper case, composed letters, invisible signs, or "
                "spaces and dots at the ends do not count; rename one of them."
            )


def check_grown(old: Plan, new: Plan) -> None:
    """Raise InputError unless every image of ``old`` is one of ``new``, drawn with the same settings."""
    known = {(part.category, part.first): asdict(part) for part in new.parts}
    for part in old.parts:
        now = known.get((part.category, part.first))
        if now is None:
            raise _other(f"category {part.category!r} was in the plan, is not")
        for file, was, digest in zip(part.shots, part.hashes, now["hashes"]):
            if part.shots == now["shots"] and was != digest:
                raise _other(f"shot {file!r} is another image than it was")
        for key, was in asdict(part).items():
            if key == "n" and now["n"] < was:
                raise _other(f"n of {part.category!r} was {was}, is {now['n']}; ask for as many or more")
            if key != "n" and now[key] != was:
                raise _other(f"{key} of {part.category!r} was {was!r:.{_SHOWN}}, is {now[key]!r:.{_SHOWN}}")


def _other(difference: str) -> InputError:
    return InputError(f"The output was made with another plan ({difference}); repeat that plan or give another folder.")


def _folder_of(name: str) -> str:
    """What is left of a name where file systems drop or ignore the most."""
    visible = "".join(sign for sign in unicodedata.normalize("NFC", name) if unicodedata.category(sign) != "Cf")
    return unicodedata.normalize("NFC", visible.casefold()).strip().rstrip(". ")


def _printable(name: str) -> bool:
    return not any(unicodedata.category(sign) == "Cc" for sign in name)
