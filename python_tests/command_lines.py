"""Whether a line of the documentation is a command that the command line takes."""

from __future__ import annotations

import shlex

import pytest
import tyro

from sage_fast import cli


class _Parsed(Exception):
    """The words of a command were understood."""


def parses(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail unless the words of ``line`` are understood; nothing of the command runs."""
    parse = tyro.cli

    def stop(*arguments, **named):
        parse(*arguments, **named)
        raise _Parsed

    monkeypatch.setattr(tyro, "cli", stop)
    with pytest.raises(_Parsed):
        cli.main(shlex.split(line)[1:])
