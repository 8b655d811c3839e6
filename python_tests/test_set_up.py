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


@pytest.mark.parametrize("environment", ["venv", "my venv"])
def test_the_torch_that_is_there_is_named_as_pip_knows_it(environment, tmp_path):
    """The index's torch 2.13.0 calls itself 2.13.0+cu130."""
    known, log, python = tmp_path / "known", tmp_path / "log", tmp_path / environment / "bin" / "python"
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


@pytest.mark.parametrize("left", ["nothing", "a link to a Python that is gone"])
def test_an_environment_that_is_gone_is_made_anew(left, tmp_path):
    """Though the set-up was done once."""
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (tmp_path / "build").mkdir()
    python.touch()
    assert make(tmp_path, "setup", "SOURCES=", "--touch").returncode == 0
    assert "pip" not in make(tmp_path, "setup", "SOURCES=", "--dry-run").stdout
    python.unlink()
    if left != "nothing":
        python.symlink_to(tmp_path / "gone")
    planned = make(tmp_path, "setup", "SOURCES=", "--dry-run").stdout
    assert "python3 -m venv --clear" in planned and planned.count("-m pip install") == 3


def test_an_environment_without_pip_is_said_to_be_so(tmp_path):
    """As uv makes them, or one whose Python was replaced by the next."""
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho No module named pip >&2; exit 1\n")
    python.chmod(0o755)
    done = make(tmp_path, "setup", "SOURCES=")
    assert done.returncode == 2 and "environment of .venv/bin/python has no pip" in done.stdout
