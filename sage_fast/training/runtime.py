"""The run folder that every trainer writes: config, JSONL log, checkpoints, image grids, progress bar.

RUN/configs/<stage>.json       the resolved config
RUN/logs/<stage>.jsonl         one line per logged step; RUN/logs/<stage>/ holds TensorBoard's events on request
RUN/checkpoints/<stage>.pt     weights, optimizers, random state, step: resuming continues bit for bit; see ``checkpoints``
RUN/grids/<stage>_<name>.png   images

docs/runtime.md says what is guaranteed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sage_fast.arithmetic import substitution
from sage_fast.data.locks import fcntl, opened, taken
from sage_fast.data.writers import (
    LOCK,
    atomic_write,
    check_apart,
    check_output,
    contact_sheet,
    make_output,
    prepare_output,
    to_uint8,
    write_json,
)
from sage_fast.errors import InputError, SageFastWarning, Stopped
from sage_fast.training.checkpoints import Checkpoints, random_state, set_random_state, versions
from sage_fast.training.logs import TrainingLog, check_tensorboard
from sage_fast.training.progress import StageProgress
from sage_fast.training.ranks import Ranks, restarted
from sage_fast.training.signals import StopWish

__all__ = ["Run", "check_run_folder", "ema_update", "holding", "open_run_folder", "total_steps"]


class Run:
    """One stage of training in one folder, which all ranks see. Every method is called by all of them; rank 0 writes.

    Args:
        folder: the run folder, made when absent.
        stage: ``"gan"``, ``"encoder"``, ``"dictionary"``, ...: the stem of every file.
        config: frozen dataclass with ``save_every``; saved, and compared with the saved one on resume. ``keep`` (how many
            checkpoints stay; default 2) and ``tensorboard`` are looked for in it.
        resume: continue from the checkpoint if there is one; so does a process that torchrun restarted.
        ranks: default: this process alone, on the CPU.
        facts: plain values that must be the same on resume (the data set, the architecture of a network that is given).
        generators: random numbers whose state is this rank's own; saved and put back here.
    Raises:
        InputError: a checkpoint exists and ``resume`` is false, or it belongs to another config.
    """

    #: settings that may change between a run and its continuation
    MUTABLE = frozenset(
        ("total_kimg", "total_steps", "log_every", "save_every", "grid_every", "keep", "tensorboard")
        + ("measure_every_kimg", "patience")
    )
    #: settings that may change too, which makes it another run: neither what is drawn nor any shape depends on them
    ADJUSTABLE = frozenset(("lr", "lr_end", "tune_lr", "r1_gamma", "precision", "e4e.discriminator_lr", "e4e.r1_gamma"))

    def __init__(
        self,
        folder: str | Path,
        stage: str,
        config: Any,
        resume: bool = False,
        ranks: Ranks | None = None,
        facts: Mapping[str, Any] | None = None,
        generators: Mapping[str, torch.Generator] | None = None,
    ) -> None:
        self.folder, self.stage, self.config = Path(folder), stage, config
        self.ranks = ranks or Ranks(torch.device("cpu"))
        self.facts, self.generators = json.loads(json.dumps(facts or {})), generators or {}
        self.checkpoints = Checkpoints(self.folder / "checkpoints", stage, getattr(config, "keep", 2))
        self._resume = resume or restarted()
        self.ranks.once(lambda: self._prepare(self._resume))
        self._log = TrainingLog(
            self.folder / "logs", stage, self.ranks.is_first and getattr(config, "tensorboard", False)
        )
        self._wish, self._saved_step = StopWish(), 0
        self._asked = self._stopping = False  # this step: whether to save, and whether to stop then
        self._progress: StageProgress | None = None

    def _prepare(self, resume: bool) -> None:
        check_tensorboard(getattr(self.config, "tensorboard", False))
        if self.checkpoints.latest() is not None:
            if not resume:
                raise InputError(
                    f"{self.folder} already holds a checkpoint of stage '{self.stage}'; "
                    "pass --resume to continue it or choose another folder."
                )
            self._check_config()
        for name in ("configs", "logs", "checkpoints", "grids"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.checkpoints.remove_remains()

    @property
    def _precision(self) -> str:
        return getattr(self.config, "precision", "float32")

    @property
    def _config_path(self) -> Path:
        return self.folder / "configs" / f"{self.stage}.json"

    def _check_config(self) -> None:
        if not self._config_path.exists():
            return
        defaults = json.loads(json.dumps(_defaults(self.config)))  # a run may be older than a setting
        old = _flat(defaults) | _flat(json.loads(self._config_path.read_text()))
        changed = {
            name: values
            for name, values in _changes(old, _plain(self.config)).items()
            if name not in self.MUTABLE and (name not in self.ADJUSTABLE or "float64" in values)
        }
        if changed:
            raise InputError(
                f"cannot resume stage '{self.stage}' in {self.folder} with other settings ({_told(changed)}); use the old ones."
            )

    def log(self, step: int, **scalars: float | Tensor) -> None:
        """Append one JSON line with the means over the ranks, to 6 digits; it is shown too."""
        plain = [v.item() if isinstance(v, Tensor) else float(v) for v in scalars.values()]
        numbers = torch.tensor(plain, dtype=torch.float64)
        values = dict(zip(scalars, self.ranks.mean(numbers).tolist()))
        if self.ranks.is_first:
            values = self._log.write(step, values)
        if self._progress is not None:
            self._progress.show(step, values)
        bad = [k for k, v in values.items() if not math.isfinite(v)]
        if bad:
            raise InputError(
                f"stage '{self.stage}' stopped at step {step}: {', '.join(bad)} is not finite; {self.remedy()}."
            )

    def remedy(self, *changes: str) -> str:
        """What to do about numbers that are not finite: settings to change, and where to go on from; ends a sentence.

        Args:
            changes: of the settings, such as "a lower lr", which is the default.
        """
        low = self._precision == "bfloat16" and not substitution(self._precision, self.ranks.device)
        tries = " or ".join([*(changes or ("a lower lr",)), *(["precision float32"] if low else [])])
        latest = self.checkpoints.latest()
        if latest is None:
            return f"try {tries}, and begin anew: there is no checkpoint yet"
        return f"try {tries}, and resume from {latest}"

    def save_due(self, done: int, total: int) -> bool:
        """Whether to save after ``done`` steps: every ``save_every``, at the last, and when a signal asks any rank to stop."""
        self._asked, self._stopping = True, self.ranks.any(self._wish.signal != 0)
        return self._stopping or done % self.config.save_every == 0 or done == total

    def save(self, state: Mapping[str, Any], score: float | None = None) -> None:
        """Write the checkpoint, with the random state of every rank, the config, facts and versions.

        Args:
            state: tensors and plain values, with ``step``.
            score: lower is better; the best checkpoint is kept beside the last ones.
        """
        about = {"config": _plain(self.config), "facts": self.facts, "versions": versions(), "world": self.ranks.world}
        everyone = self.ranks.gather(random_state(self.ranks.device, self.generators))
        self.ranks.once(lambda: self.checkpoints.save({**state, **about, "random": everyone}, score))
        self._saved_step = state["step"]
        self._log.flush()

    def load(self) -> dict[str, Any] | None:
        """The checkpoint (tensors and plain values only; no pickled code runs), or None when there is none.

        Random states are put back, the log is cut where the checkpoint was saved, and the config is written. One line says
        which of the adjustable settings are others from here on.

        Raises:
            InputError: no checkpoint is readable, it is of other facts, or it is the last one and the settings are others.
        """
        with warnings.catch_warnings():
            if not self.ranks.is_first:
                warnings.simplefilter("ignore", SageFastWarning)
            state = self.checkpoints.load()
        step = 0 if state is None else int(state["step"])
        if self.ranks.is_first and self._resume:
            self._say_where(state, step)
        if len(set(self.ranks.gather(step))) > 1:
            raise InputError(
                f"the ranks find different checkpoints in {self.folder}; give a folder that all of them share."
            )
        if state is not None:
            self._check_facts(state.get("facts", {}))
            self._say_adjusted(state)
            self._put_back(state)
        said = substitution(self._precision, self.ranks.device)
        if said and self.ranks.is_first:
            print(f"Stage '{self.stage}': {said}.")
        self.ranks.once(lambda: self._begin(step))
        self._saved_step = step
        return state

    def grid(self, name: str, images: Tensor, columns: int = 8) -> None:
        """Write images [N, C, H, W] in [-1, 1] as one PNG."""
        if self.ranks.is_first:
            sheet = contact_sheet(to_uint8(images.detach().cpu()), columns=columns)
            with atomic_write(self.folder / "grids" / f"{self.stage}_{name}.png", resumable=True) as file:
                sheet.save(file, format="png")

    def track(self, start: int, total: int) -> Iterator[int]:
        """Yield ``start, ..., total - 1`` under a progress bar with ETA, speed, memory and the last logged values.

        Raises:
            Stopped: SIGTERM or SIGINT came; at the end of the step, and on all ranks after the same one.
        """
        self._progress = StageProgress(self.stage, start, total, self.ranks.device, quiet=not self.ranks.is_first)
        with self._wish, closing(iter(self._progress)) as steps:
            for step in steps:
                self._asked = False
                yield step
                if self._stopping or (self._wish.signal and not self._asked):
                    self._stop()

    def _stop(self) -> None:
        number = max(self.ranks.gather(self._wish.signal))
        raise Stopped(
            f"stage '{self.stage}' was stopped by {signal.Signals(number).name}; its checkpoint is of step "
            f"{self._saved_step}, and the same command with --resume goes on from there.",
            number,
        )

    def _say_where(self, state: Mapping[str, Any] | None, step: int) -> None:
        """What a resumed stage does, where it is not to go on."""
        log, total = self.folder / "logs" / f"{self.stage}.jsonl", total_steps(_plain(self.config))
        if state is None and log.exists() and log.stat().st_size:
            print(f"Stage '{self.stage}' begins anew: it was begun in {self.folder}, but there is no checkpoint of it.")
        elif state is not None and total is not None and step >= total:
            print(f"Stage '{self.stage}' has taken all its {total} steps.")

    def _begin(self, step: int) -> None:
        write_json(self._config_path, dataclasses.asdict(self.config))
        self._log.cut(step)

    def _say_adjusted(self, state: Mapping[str, Any]) -> None:
        config = _plain(self.config)
        changed = {k: v for k, v in _changes(state.get("config", {}), config).items() if k in self.ADJUSTABLE}
        if not changed:
            return
        total = total_steps(config)
        if total is not None and state["step"] >= total:
            raise InputError(
                f"stage '{self.stage}' in {self.folder} has taken all its {total} steps, which other settings "
                f"({_told(changed)}) cannot change; use the old ones, or let it take more steps."
            )
        if self.ranks.is_first:
            print(
                f"Stage '{self.stage}' goes on from step {state['step']} with other settings ({_told(changed)}): from here on "
                "it is not the run that it would have been."
            )

    def _put_back(self, state: Mapping[str, Any]) -> None:
        """The random state of this rank, if the checkpoint has it; one warning where bits will differ."""
        now = versions() | {"ranks": self.ranks.world}
        then = state.get("versions", {}) | {"ranks": state.get("world", self.ranks.world)}
        if then["ranks"] == self.ranks.world and "random" in state:
            set_random_state(state["random"][self.ranks.rank], self.ranks.device, self.generators)
        changed = [f"{key} {then[key]}, now {now[key]}" for key in now if then.get(key, now[key]) != now[key]]
        total = total_steps(_plain(self.config))
        if changed and self.ranks.is_first and (total is None or state["step"] < total):
            warnings.warn(
                f"stage '{self.stage}' goes on from step {state['step']}, but not to the last bit: it was begun with "
                f"{'; '.join(changed)}.",
                SageFastWarning,
                stacklevel=3,
            )

    def _check_facts(self, old: Mapping[str, Any]) -> None:
        if changed := _changes(old, self.facts):
            raise InputError(
                f"cannot resume stage '{self.stage}' in {self.folder}, which was begun with something else "
                f"({_told(changed)}); give what it was begun with, or another folder."
            )


def check_run_folder(
    out: str | Path,
    ranks: Ranks,
    resume: bool = False,
    overwrite: bool = False,
    models: Iterable[str | Path | None] = (),
) -> None:
    """:func:`sage_fast.data.writers.check_output` for all ranks: what :func:`open_run_folder` will refuse, with nothing touched.

    A finished model without its checkpoints is not to be resumed either: that would train it anew and replace it.

    Args:
        models: files or folders that the run begins with, which emptying ``out`` must not delete; None is passed over.
    """
    again = restarted()
    if overwrite and not again:
        check_apart(out, {}, models)
    ranks.once(lambda: check_output(out, resume or again, overwrite and not again))
    if resume and (Path(out) / "bundle.json").exists() and not any((Path(out) / "checkpoints").glob("gan*.pt")):
        raise InputError(
            f"Run folder {str(out)!r} holds a finished model and no checkpoints to go on from; give another folder, or "
            "--overwrite to train it anew."
        )


def open_run_folder(out: str | Path, ranks: Ranks, resume: bool = False, overwrite: bool = False) -> Path:
    """:func:`sage_fast.data.writers.prepare_output` for all ranks; a process that torchrun restarted resumes, whatever is given."""
    again = restarted()
    ranks.once(lambda: str(prepare_output(out, resume or again, overwrite and not again)))
    return Path(out)


#: the run folders that this process is at work in
_held: set[Path] = set()


@contextmanager
def holding(out: str | Path, ranks: Ranks) -> Iterator[None]:
    """No other process trains in ``out`` while the block runs. Rank 0 holds the lock for all; blocks may lie in each other.

    Raises:
        InputError: another process does.
    """
    with ExitStack() as stack:
        ranks.once(lambda: stack.enter_context(_lock_on(Path(out))))
        yield


@contextmanager
def _lock_on(out: Path) -> Iterator[None]:
    folder = out.resolve()
    if folder in _held or fcntl is None:
        yield
        return
    make_output(folder)
    with opened(folder / LOCK) as descriptor:
        if not taken(descriptor, fcntl.LOCK_EX):
            raise InputError(f"Another process trains in {str(out)!r}; wait for its end or give another folder.")
        _held.add(folder)
        try:
            yield
        finally:
            _held.remove(folder)


def _plain(config: Any) -> dict[str, Any]:
    """A config dataclass as what JSON keeps of it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def total_steps(config: Mapping[str, Any]) -> int | None:
    """Steps that a stage with these settings takes; None where they do not tell."""
    if "total_steps" in config:
        return int(config["total_steps"])
    if "total_kimg" in config and config.get("batch"):
        return max(1, round(config["total_kimg"] * 1000 / config["batch"]))
    return None


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (old value, new value) of what is in both and differs."""
    was, now = _flat(old), _flat(new)
    return {name: (was[name], now[name]) for name in sorted(now) if name in was and was[name] != now[name]}


def _told(changes: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name} was {was!r}, is {now!r}" for name, (was, now) in changes.items())


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


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


@torch.no_grad()
def ema_update(average: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """``average <- decay * average + (1 - decay) * model`` for parameters; buffers are copied."""
    names, targets = zip(*average.named_parameters())
    sources = dict(model.named_parameters())
    torch._foreach_lerp_(list(targets), [sources[name] for name in names], 1 - decay)
    if copies := list(average.buffers()):
        torch._foreach_copy_(copies, list(model.buffers()))
