"""What runs lie below a folder, and how far each stage of them is: read from their configs and logs, nothing is loaded."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.table import Table

from sage_fast.errors import InputError
from sage_fast.training.logs import read_log
from sage_fast.training.runtime import total_steps

__all__ = ["StageOfRun", "as_json", "find_runs", "table_of_runs"]

_UNSEEN = ("step", "kimg", "seconds", "time", "lr", "stage")  # no loss and no score
_LOWER = ("val_", "fd_", "fid", "kd_", "kid")  # scores that are better when lower, by the beginning of their name
_HIGHER = ("precision", "recall", "top1")


@dataclass(frozen=True)
class StageOfRun:
    """One stage of one run.

    Attributes:
        run: its folder, relative to where was looked.
        step, total: last step logged, and steps to take; None where nothing tells.
        last: every loss with its last value; None for one that is not finite.
        best: every score (``val_mse``, ``fid_...``, ...) with its best value.
        seconds: time that the logged steps took.
        time: when the last line was written, in seconds since 1970; None without a line.
        size: bytes of the stage's checkpoints; files with two names count once.
    """

    run: str
    stage: str
    step: int
    total: int | None
    last: dict[str, float | None]
    best: dict[str, float]
    seconds: float
    time: float | None
    size: int


def find_runs(folder: str | Path) -> list[StageOfRun]:
    """The stages of every run in or below ``folder``, by folder and by when they began; links are not followed.

    Raises:
        InputError: no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{str(folder)!r} is no folder; give the one that the runs lie in.")
    found: list[StageOfRun] = []
    for place, names, _ in os.walk(folder):
        names[:] = sorted(name for name in names if not name.startswith("."))
        run = Path(place)
        if "configs" in names and ("logs" in names or "checkpoints" in names):
            stages = [_read_stage(run, path, folder) for path in (run / "configs").glob("*.json")]
            found += sorted((stage for stage in stages if stage is not None), key=_age)
            names[:] = [name for name in names if name not in ("configs", "logs", "checkpoints", "grids", "cache")]
    return found


def table_of_runs(stages: Iterable[StageOfRun]) -> Table:
    """The same for people: one row a stage, with two of its losses."""
    table = Table(box=None, pad_edge=False)
    for name in ("run", "stage", "steps", "last", "best", "h:mm", "size"):
        table.add_column(name, justify="right" if name in ("steps", "h:mm", "size") else "left", overflow="fold")
    for stage in stages:
        steps = f"{stage.step} / {'?' if stage.total is None else stage.total}"
        hours, minutes = divmod(round(stage.seconds / 60), 60)
        last, best = dict(islice(stage.last.items(), 2)), stage.best
        cells = (stage.run, stage.stage, steps, _words(last), _words(best), f"{hours}:{minutes:02d}")
        table.add_row(*cells, f"{stage.size / 1e6:.1f} MB")
    return table


def as_json(stages: Iterable[StageOfRun]) -> str:
    """The same for programs: a list of objects."""
    return json.dumps([asdict(stage) for stage in stages], indent=2)


def _read_stage(run: Path, config_path: Path, base: Path) -> StageOfRun | None:
    """The stage that a config belongs to; None for files of another kind."""
    stage = config_path.stem
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    log = run / "logs" / f"{stage}.jsonl"
    if not isinstance(config, dict) or not (log.exists() or (run / "checkpoints" / f"{stage}.pt").exists()):
        return None
    lines = read_log(log) if log.exists() else []
    values = _columns(lines)
    scores = {name: column for name, column in values.items() if name.startswith(_LOWER + _HIGHER)}
    return StageOfRun(
        run=run.relative_to(base).as_posix(),
        stage=stage,
        step=max((line["step"] for line in lines), default=0),
        total=total_steps(config),
        last={
            k: v[-1] if math.isfinite(v[-1]) else None
            for k, v in values.items()
            if k not in scores and k not in _UNSEEN
        },
        best={k: min(v) if k.startswith(_LOWER) else max(v) for k, v in scores.items()},
        seconds=round(sum(values.get("seconds", [])), 1),
        time=max(values.get("time", []), default=None),
        size=_size(run / "checkpoints", stage),
    )


def _columns(lines: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Everything logged, with its values; scores that are not finite are left out."""
    columns: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.items():
            is_score = name.startswith(_LOWER + _HIGHER)
            if isinstance(value, int | float) and (math.isfinite(value) or not is_score):
                columns.setdefault(name, []).append(value)
    return columns


def _size(folder: Path, stage: str) -> int:
    files = [path.stat() for pattern in ("", "_best", "_[0-9]*") for path in folder.glob(f"{stage}{pattern}.pt")]
    return sum({(status.st_dev, status.st_ino): status.st_size for status in files}.values())


def _age(stage: StageOfRun) -> float:
    return 0.0 if stage.time is None else stage.time - stage.seconds


def _words(values: Mapping[str, float | None]) -> str:
    return "  ".join(f"{name} {'not finite' if value is None else f'{value:.4g}'}" for name, value in values.items())
