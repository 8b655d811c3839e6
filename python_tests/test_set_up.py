"""What ``make demo`` and ``make test`` set up first, without doing it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[1] / "Makefile"
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
#: writes down what it is called with; programs given by -c run
PYTHON = """#!/bin/sh
echo "$@" >> {log}
if [ "$1" = -c ]; then PYTHONPATH={known} exec {python} "$@"; fi
"""


def make(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["env", "-u", "VIRTUAL_ENV", *(f"{name}={value}" for name, value in variables.items())]
    command += ["make", "-f", str(MAKEFILE), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100)


def test_the_torch_that_is_there_is_named_as_pip_knows_it(tmp_path):
    """The index's torch 2.13.0 calls itself 2.13.0+cu130."""
    known, log, python = tmp_path / "known", tmp_path / "log", tmp_path / "venv" / "bin" / "python"
    (known / "torch-2.13.0.dist-info").mkdir(parents=True)
    (known / "torch-2.13.0.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.13.0\n")
    (known / "torch.py").write_text("__version__ = '2.13.0+cu130'\n")
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON.format(log=log, known=known, python=sys.executable))
    python.chmod(0o755)
    done = make(tmp_path, "setup", "SOURCES=", VIRTUAL_ENV=str(python.parents[1]))
    assert done.returncode == 0, done.stderr
    installs = [line for line in log.read_text().splitlines() if line.startswith("-m pip install")]
    assert len(installs) == 2 and all(line.endswith(" torch==2.13.0") for line in installs)
