"""Whether a line of the manifest says what the plan does."""

from __future__ import annotations

import json
from typing import Any

from sage_fast.errors import InputError
from sage_fast.generation.committing import line_of
from sage_fast.generation.drawing import about_image, about_part
from sage_fast.generation.formats import Format, Stored
from sage_fast.generation.plan import Part

__all__ = ["against_plan", "parsed_line"]


def parsed_line(number: int, raw: bytes) -> dict[str, Any]:
    """A line of the manifest.

    Raises:
        InputError: it is no JSON object.
    """
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        line = None
    if not isinstance(line, dict):
        raise InputError(f"Line {number} of the manifest is no JSON object; 'verify --repair' takes its shard back.")
    return line


def against_plan(
    format: Format, settings: dict[str, Any], position: int, part: Part, index: int, line: dict[str, Any], raw: bytes
) -> str | None:
    """What a line says otherwise than the plan does.

    Sizes and digests are those of the files, the similar categories and the version functions of more than the plan.
    """
    shared = about_part(
        part, settings["preset"], settings["model"], line.get("similar"), line.get("version", ""), settings["precision"]
    )
    about = about_image(part, index, shared)
    file = format.listed(position, part.category, index)
    wanted = line_of(Stored(position, file, line.get("bytes", 0), line.get("sha256", ""), b"", about))
    if raw == wanted:
        return None
    planned = json.loads(wanted)
    for key in [*planned, *line]:
        if (key in line) != (key in planned) or line.get(key) != planned.get(key):
            return f"has {key} {line.get(key)!r:.80}, and by the plan it is {planned.get(key)!r:.80}"
    return "is not written as generate writes it"
