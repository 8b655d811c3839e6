"""Peak memory of a call, in MiB above what was held before it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def peak_mib(call: Callable[[], object], device: torch.device) -> float:
    """On a GPU by torch's allocator; on a CPU that of the whole process, which should have done little else before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 1024


def printed_by_a_process(file: str, *words: object) -> float:
    """The number that ``file`` prints last."""
    command = [sys.executable, file, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def _status(name: str) -> int:
    """kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])
