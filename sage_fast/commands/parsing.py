"""From the words of a command to the dataclasses that its functions take."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import field, make_dataclass
from itertools import groupby
from typing import Annotated, Any, get_type_hints

from sage_fast.commands import SUMMARIES
from sage_fast.errors import InputError

_WRONG_VALUES = (
    (r"Error parsing (\S+): invalid literal for int\(\) with base 10: (.*)", "a whole number"),
    (r"Error parsing (\S+): could not convert string to float: (.*)", "a number"),
    (
        r"Error parsing (\S+): no type matching \{None\}\|INT could be instantiated from \[(.*?)\].*",
        "a whole number or None",
    ),
    (
        r"Error parsing (\S+): no type matching \{None\}\|FLOAT could be instantiated from \[(.*?)\].*",
        "a number or None",
    ),
)


def parse(command: str, argv: Sequence[str], *parts: Any) -> tuple[Any, ...]:
    """Fill dataclasses from the words of a command; each part is a class, or an instance that gives the defaults.

    An ``InputError`` of a dataclass's own checks comes out as it is, without the parser's frame around it.
    """
    import tyro

    inline = tyro.conf.arg(name="")  # options of a part bear no prefix
    fields: list[Any] = []
    for number, part in enumerate(parts):
        kind = part if isinstance(part, type) else type(part)
        default = () if isinstance(part, type) else (field(default=part),)
        marked = Annotated[_words(kind), tyro.conf.Positional] if getattr(kind, "positional", False) else kind
        fields.append((f"part_{number}", Annotated[marked, inline], *default))
    printed, helped = io.StringIO(), io.TextIOWrapper(io.BytesIO(), (sys.stdout.encoding or "utf-8").lower())
    try:
        asks = {"-h", "--help"} & set(argv)
        with (
            contextlib.redirect_stderr(printed),
            contextlib.redirect_stdout(helped),
            contextlib.nullcontext() if asks else _unwrapped(),
        ):
            filled: Any = tyro.cli(
                make_dataclass("Options", fields),
                prog=f"sage-fast {command}",
                description=SUMMARIES[command],
                args=list(argv),
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if (error := _cause(stop)) is not None:
            raise error from None
        if stop.code and (complaint := _sentence_of_box(printed.getvalue(), command)) is not None:
            raise InputError(complaint) from None
        helped.seek(0)
        sys.stdout.write("".join(map(_unmarked, helped.read().splitlines(keepends=True))))
        sys.stderr.write(printed.getvalue())
        raise
    return tuple(getattr(filled, f"part_{number}") for number in range(len(parts)))


def _words(kind: type) -> type:
    """A positional part, whose words now bear the names of its fields where the parser speaks of them."""
    import tyro

    for name, hint in get_type_hints(kind).items():
        if name != "positional":  # in place: the parser finds the fields' comments by the class
            metavar = f"[{name.upper()}]" if hasattr(kind, name) else name.upper()
            kind.__annotations__[name] = Annotated[hint, tyro.conf.arg(metavar=metavar)]
    return kind


def _plain(text: str) -> str:
    return re.sub(r":\w+:`~?([^`]*)`", r"\1", text).replace("``", "")


def _unmarked(line: str) -> str:
    """A line of the help without a docstring's marks; a switch that turns something off shows that it is not given."""
    plain, width = _plain(line), len(line.rstrip()) - 1
    if re.search(r"--(?:[\w-]+\.)*no-[\w-]+ .*\(default: True\)", plain):
        plain = plain.replace("(default: True)", "(default: False)")
        negated = re.sub(r"(--(?:[\w-]+\.)*no-[\w-]+ +)(?=[a-z])", r"\1do not ", plain)
        fits = len(negated.rstrip().removesuffix("│").rstrip()) <= width
        plain = negated if fits else negated.replace(" (default: False)", "")
    if not line.startswith("│"):
        return plain
    return f"{plain.rstrip().removesuffix('│').rstrip():<{width}}│\n"


def _sentence_of_box(printed: str, command: str) -> str | None:
    """What the parser drew a frame around, as a sentence; None where it drew none."""
    lines = [line.strip("│ ") for line in printed.splitlines() if line.strip() and line[0] in "│ "]
    ruled = groupby(lines, lambda line: set(line) <= {"─", "-"})
    blocks = [list(block) for is_rule, block in ruled if not is_rule][0 if printed.startswith("╭") else 1 :]  # a title
    if not blocks:
        return None
    said, *others = blocks
    listed = {block[0].split()[0]: block[1:] for block in others}
    if said[0].startswith("Missing from"):
        needs: list[str] = []
        for line in said[1:]:  # an option and what it is, or a word's kind and what it is
            if line.startswith("--") or line.isupper() or not needs:
                needs.append(line.split()[0])
            elif not needs[-1].startswith("--"):
                needs[-1] = line.removesuffix(" (required)")
        unknown = f" and does not know {' '.join(listed['Unrecognized'])}" if "Unrecognized" in listed else ""
        text = f"{command} needs {' and '.join(needs)}{unknown}"
    else:
        text = _complaint(" ".join(said).rstrip("."))
    meant = [line.split()[0] for name in ("Perhaps", "Arguments") for line in listed.get(name, ()) if line[:2] == "--"]
    given = tuple(f".{word.removeprefix('--')}" for word in re.findall(r"--[\w-]+", said[0]))
    meant.sort(key=lambda option: not option.endswith(given))  # of all stages: the option of that very name first
    perhaps = f"; perhaps you meant {' or '.join(meant[:3])}" if meant else ""
    return f"{text}{perhaps}; see sage-fast {command} --help."


def _complaint(text: str) -> str:
    """The parser's complaint of one word, in words that need no Python."""
    for pattern, kind in _WRONG_VALUES:
        if found := re.fullmatch(pattern, text):
            return f"{found[1]} must be {kind}, got {found[2]}"
    if found := re.fullmatch(r"invalid choice (.*) for argument '(\S+)'\. Expected one of \((.*)\)", text):
        return f"{found[2]} must be one of {found[3].replace(chr(39), '')}, got {found[1]}"
    if found := re.fullmatch(r"Missing value for argument '(\S+)'\. Expected 1 values", text):
        return f"{found[1]} needs a value"
    return text


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """The parser's lines are not broken."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000"
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def _cause(error: BaseException | None) -> InputError | None:
    """The ``InputError`` that led to an exception, if one did."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def value_of(argv: Sequence[str], *options: str) -> str | None:
    """The word behind one of ``options`` (``--name word`` or ``--name=word``), or None."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    return next((words[i + 1] for i, word in enumerate(words[:-1]) if word in options), None)


def usable_device(name: str) -> str:
    """``name``, with "auto" resolved; refuses a device that is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device must be 'auto', 'cpu' or a device that torch can use here, got {name!r}.") from error
    return name
