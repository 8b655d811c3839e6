"""The W+ codes of a labelled set of images, in memory and in one file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from sage_fast.data.writers import atomic_write
from sage_fast.errors import InputError, reason_of

_FORMAT = "sage_fast.latent_table"
_KEY = "sage_fast"  # one metadata entry: several would come in an order that changes from run to run
_STORAGE = (torch.float32, torch.float16)


@dataclass(frozen=True, eq=False)
class LatentTable:
    """Latents (offsets from ``latent_avg``) with their categories.

    Attributes:
        w_plus: float32 [N, L, D].
        labels: int64 [N], indices into ``categories``.
        categories: S names, each once.
        files: N names of the images, or None.

    Raises:
        TypeError: a tensor or a list of another type.
        InputError: shapes, labels or names that do not fit together, or a latent that is not finite.
    """

    w_plus: torch.Tensor
    labels: torch.Tensor
    categories: list[str]
    files: list[str] | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        n = len(self.w_plus)
        if self.w_plus.ndim != 3 or self.labels.shape != (n,):
            raise InputError(
                "w_plus and labels must have shapes [N, L, D] and [N], "
                f"got {list(self.w_plus.shape)} and {list(self.labels.shape)}."
            )
        if len(set(self.categories)) != len(self.categories):
            raise InputError("categories must name each category once; remove the repeated names.")
        if n and not (0 <= int(self.labels.min()) and int(self.labels.max()) < len(self.categories)):
            raise InputError(f"labels must be 0 to {len(self.categories) - 1}, one per category name, got others.")
        if self.files is not None and len(self.files) != n:
            raise InputError(f"files must name each of the {n} latents, got {len(self.files)} names.")
        if not bool(torch.isfinite(self.w_plus).all()):
            raise InputError("w_plus holds values that are not finite; embed the images again.")

    def __len__(self) -> int:
        return len(self.w_plus)

    def subset(self, indices: torch.Tensor | Sequence[int]) -> LatentTable:
        """The rows at ``indices`` (numbers, or a mask), in that order; ``categories`` and labels keep their numbers."""
        index = torch.arange(len(self))[indices if torch.is_tensor(indices) else list(indices)]
        files = None if self.files is None else [self.files[i] for i in index.tolist()]
        return LatentTable(self.w_plus[index], self.labels[index], self.categories, files)

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
        """Write a safetensors file, atomically; equal tables give equal bytes.

        Args:
            path: the file.
            dtype: how the latents are stored, ``torch.float32`` or ``torch.float16`` (half the size).

        Raises:
            InputError: another ``dtype``, a latent above float16's range, or a file that cannot be written.
        """
        if dtype not in _STORAGE:
            raise InputError(f"dtype must be torch.float32 or torch.float16, got {dtype}.")
        stored = self.w_plus.detach().cpu().to(dtype).contiguous()
        if not bool(torch.isfinite(stored).all()):
            raise InputError("w_plus holds values above float16's largest (65504); store it as torch.float32.")
        about = {"format": _FORMAT, "version": 1, "categories": self.categories, "files": self.files}
        tensors = {"labels": self.labels.detach().cpu().contiguous(), "w_plus": stored}
        content = to_bytes(tensors, metadata={_KEY: json.dumps(about)})
        with atomic_write(path) as file:
            file.write(content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatentTable:
        """Read what ``save`` wrote; the latents come back as float32.

        Raises:
            InputError: the file is missing, truncated, or no latent table.
        """
        tensors, about = _read(Path(path))
        try:
            if about["format"] != _FORMAT or about["version"] != 1:
                raise InputError(f"format {about['format']!r}, version {about['version']!r}")
            return cls(tensors["w_plus"].float(), tensors["labels"], about["categories"], about["files"])
        except (KeyError, TypeError, InputError) as error:
            raise InputError(
                f"File {str(path)!r} is not a table of latents of this version ({reason_of(error)}); "
                "write it again with the embed step."
            ) from error


def _check_types(table: LatentTable) -> None:
    if not torch.is_tensor(table.w_plus) or table.w_plus.dtype != torch.float32:
        raise TypeError(f"w_plus must be a float32 tensor, got {getattr(table.w_plus, 'dtype', type(table.w_plus))}.")
    if not torch.is_tensor(table.labels) or table.labels.dtype != torch.int64:
        raise TypeError(f"labels must be an int64 tensor, got {getattr(table.labels, 'dtype', type(table.labels))}.")
    for name, value in (("categories", table.categories), ("files", table.files)):
        if value is None and name == "files":
            continue
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise TypeError(f"{name} must be a list of str, got {type(value).__name__}.")


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors (copied out of the file's mapping) and our metadata."""
    if not path.is_file():
        raise InputError(f"Table of latents {str(path)!r} does not exist; write it with the embed step.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if _KEY not in metadata:
                raise InputError(f"File {str(path)!r} is not a table of latents of sage_fast; give codes.safetensors.")
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(metadata[_KEY])
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"Table of latents {str(path)!r} is truncated or damaged ({reason_of(error)}); write it again with the embed step."
        ) from error
