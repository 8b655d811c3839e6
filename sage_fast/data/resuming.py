"""Whether a run may be continued: its settings and its data against those of the next."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sage_fast.data.folders import ImageSet
from sage_fast.errors import InputError

__all__ = ["check_resumed", "data_fingerprint"]

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


def data_fingerprint(images: ImageSet | Tensor) -> dict[str, Any]:
    """What tells two data sets apart: plain values, the same wherever the folder lies.

    Returns:
        Numbers of ``images`` and ``categories`` and a hash of their ``names``; for bare uint8 images [N, C, R, R], whose names
        are not known, their number and a hash of the ``pixels`` of at most 64 of them.
    """
    if isinstance(images, ImageSet):
        names = "\n".join([*images.categories, "", *images.files])
        return {"images": len(images), "categories": len(images.categories), "names": _hash(names.encode())}
    n_some = min(64, len(images))
    some = [images[i * len(images) // n_some] for i in range(n_some)]
    return {"images": len(images), "pixels": _hash(b"".join(image.numpy().tobytes() for image in some))}


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
