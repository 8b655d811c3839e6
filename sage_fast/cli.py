"""The words of the shell: ``sage-fast <command> [options]``.

Options are derived from the frozen dataclasses that the commands' functions take. What a user's data, settings or files
cause is one sentence on stderr and exit code 2 (``SAGE_FAST_DEBUG=1`` shows the traceback). Only the command that runs
imports what it needs.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from sage_fast.commands import SUMMARIES, converting, generating, looking, training
from sage_fast.errors import InputError, SageFastWarning, Stopped

__all__ = ["COMMANDS", "main"]

COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    name: (function, SUMMARIES[name])
    for name, function in {
        "train": training.train,
        "train-gan": training.train_gan,
        "train-encoder": training.train_encoder,
        "embed": training.embed,
        "train-dictionary": training.train_dictionary,
        "generate": generating.generate,
        "verify": generating.verify,
        "regenerate": generating.regenerate,
        "invert": generating.invert,
        "evaluate": looking.evaluate,
        "inspect": looking.inspect,
        "convert": converting.convert,
        "quality": looking.quality,
        "curves": looking.curves,
        "runs": looking.runs,
        "export": converting.export,
        "info": looking.info,
        "profile": looking.profile,
        "data": generating.data,
        "demo": generating.demo,
    }.items()
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a mistake in what was given, 130 or 143 when SIGINT or SIGTERM ended it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        from sage_fast import __version__

        print(f"sage-fast {__version__}")
        return 0
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.simplefilter("default", SageFastWarning)
        return _run(argv)


def _run(argv: Sequence[str]) -> int:
    try:
        if argv[0] not in COMMANDS:
            raise InputError(f"sage-fast has no command {argv[0]!r}; choose one of {', '.join(COMMANDS)}.")
        COMMANDS[argv[0]][0](argv[1:])
    except BrokenPipeError:  # the reader, say ``head``, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (InputError, OSError) as error:
        if os.environ.get("SAGE_FAST_DEBUG"):
            traceback.print_exc()
        print(f"sage-fast: {_sentence(error)}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # --help, or options that the parser refused
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
    except Stopped as stop:
        print(f"sage-fast: {stop}", file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        print("sage-fast: stopped; the same command with --resume goes on.", file=sys.stderr)
        return 130
    return 0


def _overview() -> str:
    lines = [f"  {name:<18}{summary}" for name, (_, summary) in COMMANDS.items()]
    head = "usage: sage-fast <command> [options]\n\ncommands:\n"
    return (
        head
        + "\n".join(lines)
        + "\n\n'sage-fast <command> --help' lists its options; 'sage-fast --version' the version."
    )


def _sentence(error: Exception) -> str:
    """One line: an ``InputError``'s own words; for an ``OSError`` the file and the system's reason."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{str(error.filename)!r} cannot be used" if error.filename else "a file cannot be used"
        return f"{where} ({error.strerror}); check the path, its permissions and the free space."
    return " ".join(str(error).split())


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
    """Our warnings as one line without a source line; others as Python shows them."""
    if issubclass(category, SageFastWarning):
        print(f"sage-fast: warning: {' '.join(str(message).split())}", file=sys.stderr)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, *rest[:2]))


if __name__ == "__main__":
    sys.exit(main())
