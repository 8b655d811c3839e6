"""Whether an output folder may be continued: the settings of its run against those of the next."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sage_fast.errors import InputError

__all__ = ["check_resumed"]

_SHOWN = 90  # characters of a setting in a message


def check_resumed(
    folder: Path, resolved: Mapping[str, Any], *, command: str, mark: str, free: Collection[str]
) -> dict[str, Any] | None:
    """The settings in ``folder / "config.json"``, once they are found to be those of ``resolved``; None: no run lies there.

    Args:
        command: whose runs may be continued.
        mark: a setting that only they have.
        free: settings that may differ.
    Raises:
        InputError: the file is damaged or another command's, or settings differ.
    """
    path = folder / "config.json"
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        old = None
    except (OSError, ValueError) as error:
        raise InputError(f"File {str(path)!r} is damaged; use --overwrite or another output folder.") from error
    if old is None and not (folder / "manifest.jsonl").exists():
        return None
    if not isinstance(old, dict) or mark not in old:
        raise InputError(f"Output folder {str(folder)!r} holds no run of {command} to resume; give another folder.")
    changed = [key for key in resolved if key not in free and old.get(key) != resolved[key]]
    if changed:
        was = ", ".join(f"{key} was {old.get(key)!r:.{_SHOWN}}, is {resolved[key]!r:.{_SHOWN}}" for key in changed)
        raise InputError(f"Output folder {str(folder)!r} was made with other settings ({was}); give another folder.")
    return old
