"""The checkpoints of one stage: written whole, checked when read, the last few kept and the best one too.

``<stage>.pt``          the newest
``<stage>_<step>.pt``   older ones: the last ``keep`` in all
``<stage>_best.pt``     the one with the lowest score, where scores are given

A file is what ``torch.save`` writes, followed by a SHA-256 of it; ``torch.load`` reads it too. Files without one (of older
versions) are read as well. Tensors and plain values only: reading runs no pickled code.
"""

from __future__ import annotations

import hashlib
import os
import platform
import random
import re
import secrets
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch

from sage_fast import __version__, _native
from sage_fast.data.writers import TEMPORARY, atomic_write
from sage_fast.errors import InputError, SageFastWarning

__all__ = ["Checkpoints", "random_state", "read_state", "set_random_state", "versions"]

_MARK = b"sage_fast.sha256"  # 16 bytes; 32 of digest follow


class Checkpoints:
    """Save and load the checkpoints of ``stage`` in ``folder``.

    Attributes:
        newest: the path of the newest.
        best_score: the lowest score given to :meth:`save` so far, or None; it is kept in the checkpoint, with whether that is
            its own.
    """

    def __init__(self, folder: str | Path, stage: str, keep: int = 2) -> None:
        if keep < 1:
            raise InputError(f"keep must be at least 1 checkpoint, got {keep}.")
        self.folder, self.stage, self.keep = Path(folder), stage, keep
        self.newest = self.folder / f"{stage}.pt"
        self.best = self.folder / f"{stage}_best.pt"
        self.best_score: float | None = None
        self._newest_step: int | None = None  # of a whole newest file

    def latest(self) -> Path | None:
        """The newest file that is there; None: there is none to go on from."""
        return self.newest if self.newest.exists() else next(iter(self._older()), None)

    def save(self, state: Mapping[str, Any], score: float | None = None) -> None:
        """Write ``state``, which has its ``step``; a kill or a full disk at any moment leaves the previous ones.

        Args:
            score: how good it is, lower is better; the best is kept as ``<stage>_best.pt``.
        """
        is_best = score is not None and (self.best_score is None or score < self.best_score)
        best_score = score if is_best else self.best_score
        with atomic_write(self.newest, resumable=True) as file:
            hashing = _Hashing(file)
            torch.save({**state, "best_score": best_score, "is_best": is_best}, cast(BinaryIO, hashing))
            file.write(_MARK + hashing.digest())
            file.flush()
            self._keep_newest()
        self.best_score, self._newest_step = best_score, int(state["step"])
        if is_best:
            _link(self.newest, self.best)
        for path in self._older()[self.keep - 1 :]:
            path.unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """The newest checkpoint that is whole, with one warning when that is not the last one written; None: there is none.

        Raises:
            InputError: there are checkpoints, and none can be read.
        """
        damaged: list[str] = []
        for path in [self.newest, *self._older()]:
            try:
                state = read_state(path)
            except FileNotFoundError:
                continue
            except InputError as error:
                damaged.append(str(error))
                continue
            if damaged:
                head = damaged[0].split("; delete it")[0]
                message = f"{head}; going on from step {state['step']} in {path.name} instead."
                warnings.warn(message, SageFastWarning, stacklevel=3)
            self.best_score = state.get("best_score")
            self._newest_step = None if damaged else int(state["step"])
            if state.get("is_best"):  # a kill right after it was written left the best of before under that name
                _link(path, self.best)
            return state
        if damaged:
            raise InputError(damaged[0])
        return None

    def remove_remains(self) -> None:
        """Delete half-written files that a killed process left."""
        for path in self.folder.glob(f".*{TEMPORARY}"):
            with suppress(OSError):
                path.unlink()

    def _keep_newest(self) -> None:
        """Give the newest file, about to be replaced, the name of its step too."""
        if self.keep > 1 and self._newest_step is not None and self.newest.exists():
            _link(self.newest, self.folder / f"{self.stage}_{self._newest_step:08d}.pt")

    def _older(self) -> list[Path]:
        """Kept checkpoints before the newest, the latest first."""
        pattern = re.compile(re.escape(self.stage) + r"_\d{8,}\.pt")
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        found = [self.folder / name for name in names if pattern.fullmatch(name)]
        return sorted(found, key=lambda path: int(path.stem.rsplit("_", 1)[1]), reverse=True)


def read_state(path: str | Path) -> dict[str, Any]:
    """The content of one file, once its checksum is found right; tensors on the CPU.

    Raises:
        InputError: it is torn, damaged or no checkpoint.
        FileNotFoundError: there is none.
    """
    try:
        problem = _check_digest(Path(path))
        state = None if problem else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        problem = type(error).__name__
    if problem is None and not isinstance(state, dict):
        problem = type(state).__name__
    if problem is not None:
        raise InputError(
            f"{path} is not a readable checkpoint ({problem}); delete it to start this stage anew, or go on from an older one."
        )
    assert isinstance(state, dict)
    return state


def random_state(device: torch.device, generators: Mapping[str, torch.Generator]) -> dict[str, Any]:
    """The state of every source of random numbers of this process, as tensors and plain values.

    Args:
        device: with CUDA its own generator too.
        generators: those that the trainer made.
    """
    _, key, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, integers, normal = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [torch.from_numpy(np.asarray(key, np.int64)), position, has_gauss, gauss],
        "python": [version, torch.tensor(integers), normal],
        "generators": {name: generator.get_state() for name, generator in generators.items()},
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device, generators: Mapping[str, torch.Generator]) -> None:
    """Put back what :func:`random_state` gave; generators that it does not know stay as they are."""
    torch.set_rng_state(state["torch"])
    key, pos, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", key.numpy().astype(np.uint32), pos, has_gauss, gauss))
    version, integers, normal = state["python"]
    random.setstate((version, tuple(integers.tolist()), normal))
    for name, saved in state["generators"].items():
        if name in generators:
            generators[name].set_state(saved)
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def versions() -> dict[str, Any]:
    """What the bits of a training step depend on beside the settings: libraries, kernels, threads."""
    native = _native.load()
    kernels = ", ".join(native.devices) or "none"
    if native.host is not None:
        kernels += f" ({native.host.build_report()['instruction_set']})"
    return {
        "sage_fast": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "kernels": kernels,
        "threads": torch.get_num_threads(),
    }


class _Hashing:
    """A file that remembers the SHA-256 of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sha = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self._sha.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def digest(self) -> bytes:
        return self._sha.digest()


def _check_digest(path: Path) -> str | None:
    """What is wrong with the checksum at a file's end; None when it is right, or the file has none."""
    left = path.stat().st_size - len(_MARK) - 32
    if left < 0:
        return "too short"
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(left)
        tail = file.read()
        if not tail.startswith(_MARK):
            return None
        file.seek(0)
        while left and (part := file.read(min(left, 1 << 20))):
            sha.update(part)
            left -= len(part)
    return None if tail[len(_MARK) :] == sha.digest() else "its checksum is wrong"


def _link(source: Path, target: Path) -> None:
    """Give ``source`` a second name; where the file system has no links, copy it."""
    between = target.parent / f".{secrets.token_hex(8)}{TEMPORARY}"
    try:
        os.link(source, between)
    except OSError:
        with open(source, "rb") as file, atomic_write(target, resumable=True) as copy:
            shutil.copyfileobj(file, copy, 1 << 20)
        return
    try:
        os.replace(between, target)
    finally:
        between.unlink(missing_ok=True)  # it is still there when both were the same file
