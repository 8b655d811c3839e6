"""Start functions as the ranks of a run, each in a process forked from one that has imported torch already."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PRELOAD = ["torch", "torch._dynamo", "torch.distributed", "rank_processes", "sage_fast.training.stages"]


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Child:
    """A started process and what it prints."""

    process: Any
    log: Path

    def wait(self, seconds: float = 60) -> int:
        """Its exit code; negative: the signal that ended it. One that does not end is killed and fails the test."""
        self.process.join(seconds)
        if self.process.is_alive():
            os.kill(self.process.pid, 9)
            self.process.join()
            raise AssertionError(f"still running after {seconds} s:\n{self.text()}")
        return self.process.exitcode

    def text(self) -> str:
        """Everything printed so far."""
        return self.log.read_text() if self.log.exists() else ""


def start(do: Callable[..., Any], *args: Any, log: Path, env: dict[str, str] | None = None) -> Child:
    """Run ``do(*args)``, a function of an importable module, in a process with one thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    process = context.Process(target=_run, args=(do, args, str(log), env or {}))
    process.start()
    return Child(process, log)


def start_ranks(do: Callable[..., Any], world: int, folder: Path, *args: Any, **env: str) -> list[Child]:
    """Run ``do(*args)`` as ``world`` ranks of one run; ``folder`` gets what they print."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)} | env
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"rank_{rank}.txt" for rank in range(world)]
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    return [start(do, *args, log=log, env=shared | place) for log, place in zip(logs, places)]


def finish(children: list[Child], seconds: float = 60) -> None:
    """Wait for all; the test fails with their words unless each ends well."""
    codes = [child.wait(seconds) for child in children]
    assert not any(codes), f"exit codes {codes}:\n" + "\n".join(child.text() for child in children)


def _run(do: Callable[..., Any], args: tuple[Any, ...], log: str, env: dict[str, str]) -> None:
    import torch

    from sage_fast.errors import InputError

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(env)
    torch.set_num_threads(1)
    try:
        do(*args)
    except InputError as error:
        print(f"sage-fast: {error}")
        sys.exit(2)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
