"""Killed at any moment, on one rank or two, and taken up again: the files are those of the unbroken run, byte for byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_thirty_killed_runs_end_in_the_files_of_the_unbroken_ones(tiny_bundle, tiny_shots, tmp_path):
    program = Path(__file__).with_name("killing.py")
    words = [sys.executable, str(program), str(tiny_bundle), str(tiny_shots), str(tmp_path), "30"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] >= 30 and found["wrong"] == []
