"""The run folder that every trainer writes: config, JSONL log, atomic checkpoint, image grids, progress bar.

RUN/configs/<stage>.json       the resolved config
RUN/logs/<stage>.jsonl         one line per logged step
RUN/checkpoints/<stage>.pt     weights, optimizers, random state, step: resuming continues bit for bit
RUN/grids/<stage>_<name>.png   images
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from sage_fast.data.writers import atomic_write, contact_sheet, to_uint8
from sage_fast.errors import InputError

__all__ = ["PRECISIONS", "Run", "autocast", "draw_batch", "ema_update"]

#: arithmetic of the convolutions and products in a training step; weights, optimizers and averages are always float32
PRECISIONS = ("float32", "bfloat16")


class Run:
    """One stage of training in one folder.

    Args:
        folder: the run folder, made when absent.
        stage: ``"gan"``, ``"encoder"``, ``"dictionary"``, ...: the stem of every file.
        config: frozen dataclass; saved, and compared with the saved one on resume.
        resume: continue from the checkpoint if there is one.
    Raises:
        InputError: a checkpoint exists and ``resume`` is false, or it belongs to another config.
    """

    #: settings that may change between a run and its continuation
    MUTABLE = frozenset({"total_kimg", "total_steps", "log_every", "save_every", "grid_every"})

    def __init__(self, folder: str | Path, stage: str, config: Any, resume: bool = False) -> None:
        self.folder, self.stage, self.config = Path(folder), stage, config
        self.checkpoint = self.folder / "checkpoints" / f"{stage}.pt"
        if self.checkpoint.exists() and not resume:
            raise InputError(
                f"{self.folder} already holds a checkpoint of stage '{stage}'; pass --resume to continue it or choose another folder."
            )
        if self.checkpoint.exists():
            self._check_config()
        for name in ("configs", "logs", "checkpoints", "grids"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        with atomic_write(self._config_path) as file:
            file.write(json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True).encode())
        self._last_log = time.monotonic()
        self._status = ""

    @property
    def _config_path(self) -> Path:
        return self.folder / "configs" / f"{self.stage}.json"

    def _check_config(self) -> None:
        if not self._config_path.exists():
            return
        old = json.loads(self._config_path.read_text())
        new = json.loads(json.dumps(dataclasses.asdict(self.config)))
        old = json.loads(json.dumps(_defaults(self.config))) | old  # a run may be older than a setting
        changed = sorted(k for k in new if k not in self.MUTABLE and old.get(k) != new[k])
        if changed:
            was = ", ".join(f"{k} was {old.get(k)!r}, is {new[k]!r}" for k in changed)
            raise InputError(
                f"cannot resume stage '{self.stage}' in {self.folder} with other settings ({was}); use the old ones."
            )

    def log(self, step: int, **scalars: float | Tensor) -> None:
        """Append one JSON line; values are rounded to 6 digits. The last one is shown in the progress bar."""
        now = time.monotonic()
        numbers = {k: v.item() if isinstance(v, Tensor) else v for k, v in scalars.items()}
        values = {k: float(f"{v:.6g}") for k, v in numbers.items()}
        line = {"step": step, **values, "seconds": round(now - self._last_log, 3), "time": round(time.time(), 1)}
        self._last_log = now
        with open(self.folder / "logs" / f"{self.stage}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        self._status = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
        bad = [k for k, v in values.items() if not math.isfinite(v)]
        if bad:
            raise InputError(
                f"stage '{self.stage}' stopped at step {step}: {', '.join(bad)} is not finite; lower the learning rate and "
                f"resume from {self.checkpoint}."
            )

    def save(self, state: dict[str, Any]) -> None:
        """Write the checkpoint atomically: a kill or a full disk leaves the previous one."""
        with atomic_write(self.checkpoint) as file:
            torch.save(state, file)

    def load(self) -> dict[str, Any] | None:
        """The checkpoint (tensors and plain values only; no pickled code runs), or None when there is none."""
        if not self.checkpoint.exists():
            return None
        try:
            return torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:
            raise InputError(
                f"{self.checkpoint} is not a readable checkpoint ({type(error).__name__}); delete it to start this stage anew."
            ) from error

    def grid(self, name: str, images: Tensor, columns: int = 8) -> None:
        """Write images [N, C, H, W] in [-1, 1] as one PNG."""
        sheet = contact_sheet(to_uint8(images.detach().cpu()), columns=columns)
        with atomic_write(self.folder / "grids" / f"{self.stage}_{name}.png") as file:
            sheet.save(file, format="png")

    def track(self, start: int, total: int) -> Iterator[int]:
        """Yield ``start, ..., total - 1`` under a progress bar with ETA and the last logged values."""
        columns = (
            TextColumn(f"{self.stage:>10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, refresh_per_second=2) as bar:
            task = bar.add_task("", total=total, completed=start)
            for step in range(start, total):
                yield step
                bar.update(task, completed=step + 1, description=self._status)


def _defaults(config: Any) -> dict[str, Any]:
    """The fields of a config dataclass that have default values, with these."""
    values = {}
    for entry in dataclasses.fields(config):
        if entry.default is not dataclasses.MISSING:
            values[entry.name] = entry.default
        elif entry.default_factory is not dataclasses.MISSING:
            value = entry.default_factory()
            values[entry.name] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
    return values


def autocast(precision: str, device: str | torch.device) -> torch.autocast:
    """``torch.autocast`` for a training step: off for ``"float32"``; ``"bfloat16"`` halves the time of the convolutions."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16")


def draw_batch(n_images: int, batch: int, rng: torch.Generator) -> Tensor:
    """Indices [batch] drawn uniformly with replacement: a pure function of the state of ``rng``."""
    return torch.randint(n_images, (batch,), generator=rng)


@torch.no_grad()
def ema_update(average: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """``average <- decay * average + (1 - decay) * model`` for parameters; buffers are copied."""
    names, targets = zip(*average.named_parameters())
    sources = dict(model.named_parameters())
    torch._foreach_lerp_(list(targets), [sources[name] for name in names], 1 - decay)
    for target, source in zip(average.buffers(), model.buffers()):
        target.copy_(source)
