"""A trainer of a few lines for ``training/test_runtime.py``, and what processes run with it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sage_fast.errors import Stopped
from sage_fast.training.ranks import Ranks, join_ranks
from sage_fast.training.runtime import Run
from sage_fast.training.updates import load_optimizer


@dataclass(frozen=True)
class ToyConfig:
    """Settings of :func:`train_toy`."""

    total_steps: int = 8
    lr: float = 0.1
    seed: int = 5
    save_every: int = 3
    keep: int = 2
    tensorboard: bool = False


def train_toy(
    config: ToyConfig,
    folder: Path,
    resume: bool = False,
    ranks: Ranks | None = None,
    facts: dict[str, Any] | None = None,
    each_step: Callable[[int], None] = lambda step: None,
) -> torch.Tensor:
    """Follow random numbers of all kinds."""
    ranks = ranks or join_ranks()
    own = ranks.generator(config.seed)
    run = Run(folder, "toy", config, resume, ranks, facts, {"own": own})
    torch.manual_seed(0)
    w, first = torch.nn.Parameter(torch.zeros(3)), 0
    optim = torch.optim.Adam([w], lr=config.lr)
    if state := run.load():
        w.data.copy_(state["w"])
        load_optimizer(optim, state["optim"])
        first = state["step"]
    for step in run.track(first, config.total_steps):
        loss = ((w - torch.randn(3) - torch.randn(3, generator=own)) ** 2).sum()
        optim.zero_grad()
        loss.backward()
        ranks.average_gradients([w])
        optim.step()
        each_step(step)
        done = step + 1
        run.log(done, loss=loss)
        if run.save_due(done, config.total_steps):
            run.save({"w": w.detach(), "optim": optim.state_dict(), "step": done}, score=loss.item())
    return w.detach()


def toy_of_ranks(folder: Path, out: Path, stop_rank: int = -1) -> None:
    """Train with all ranks; one of them gets SIGTERM in its fifth step."""
    with join_ranks() as ranks:

        def each_step(step: int) -> None:
            if step == 4 and ranks.rank == stop_rank:
                os.kill(os.getpid(), signal.SIGTERM)

        try:
            w = train_toy(ToyConfig(), folder, resume=True, ranks=ranks, each_step=each_step)
        except Stopped as stop:
            print(stop)
            sys.exit(128 + stop.signal)
        torch.save(w, out / f"w_{ranks.rank}.pt")


def toy_in_folders_of_their_own(folder: Path) -> None:
    """Each rank has a folder that the others do not see; rank 0's holds a checkpoint."""
    with join_ranks() as ranks:
        train_toy(ToyConfig(), folder / str(ranks.rank), resume=True, ranks=ranks)


def elastic_toy(folder: Path) -> None:
    """Under torchrun: in its first life rank 1 kills itself in the sixth step."""
    with join_ranks() as ranks:
        restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])

        def each_step(step: int) -> None:
            if restarts == 0 and step == 5 and ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        w = train_toy(ToyConfig(), folder, ranks=ranks, each_step=each_step)
        if ranks.is_first:
            torch.save({"w": w, "restarts": restarts}, folder / "end.pt")


if __name__ == "__main__":
    elastic_toy(Path(sys.argv[1]))
