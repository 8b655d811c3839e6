"""The instructions of pickle protocols 0 and 1, whose arguments are lines of text, for :class:`PickleReader`."""

from __future__ import annotations

import codecs
import pickle  # for the names of the opcodes
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sage_fast.models.spans import Refusal

if TYPE_CHECKING:
    from sage_fast.models.unpickling import PickleReader

__all__ = ["TEXT_STEPS", "begins_text_pickle"]

MAX_DIGITS = 310  # of an integer of 128 bytes
_BEGINNINGS = re.compile(rb"c[A-Za-z_][\w.]*\n[A-Za-z_][\w.]*\n|\([(cdlpVSIFLNXUKMJG\]})]|[\]})][(q.]")
_INTEGER = re.compile(rb"-?[0-9]+")
_FLOAT = re.compile(rb"-?(?:[0-9]+(?:\.[0-9]*)?(?:e[-+]?[0-9]+)?|inf|nan)")


def begins_text_pickle(head: bytes, last: bytes) -> bool:
    """Whether a file of those first bytes (up to a few hundred) and that last one may be a pickle of protocol 0 or 1."""
    return last == pickle.STOP and _BEGINNINGS.match(head) is not None


def _line(reader: PickleReader, most: int) -> bytes:
    """The rest of a line of at most so many bytes."""
    line = reader.file.readline(most + 1)
    if not line.endswith(b"\n"):
        raise Refusal(
            f"holds a line of more than {most} bytes" if len(line) > most else "ends in the middle of a pickle"
        )
    return line[:-1]


def _integer(reader: PickleReader, line: bytes) -> int:
    if not _INTEGER.fullmatch(line):
        raise Refusal("is a damaged pickle (an integer that is none)")
    return int(line)


def _int(reader: PickleReader) -> None:
    line = _line(reader, MAX_DIGITS)
    reader.push({b"00": False, b"01": True}[line] if line in (b"00", b"01") else _integer(reader, line))


def _long(reader: PickleReader) -> None:
    reader.push(_integer(reader, _line(reader, MAX_DIGITS).removesuffix(b"L")))


def _float(reader: PickleReader) -> None:
    line = _line(reader, MAX_DIGITS)
    if not _FLOAT.fullmatch(line):
        raise Refusal("is a damaged pickle (a float that is none)")
    reader.push(float(line))


def _string(reader: PickleReader) -> None:
    """What Python 2 wrote for bytes: a literal in quotes; as text, byte by byte."""
    line = _line(reader, reader.max_text)
    if len(line) < 2 or line[:1] not in (b"'", b'"') or line[:1] != line[-1:]:
        raise Refusal("is a damaged pickle (a text that is none)")
    try:
        value, _ = codecs.escape_decode(line[1:-1])  # type: ignore[attr-defined]
    except (ValueError, DeprecationWarning) as error:
        raise Refusal("is a damaged pickle (a text that is none)") from error
    reader.push(value.decode("latin1"))


def _unicode(reader: PickleReader) -> None:
    line = _line(reader, reader.max_text)
    try:
        value, _ = codecs.raw_unicode_escape_decode(line)  # type: ignore[attr-defined]
    except UnicodeDecodeError as error:
        raise Refusal("is a damaged pickle (a text that is none)") from error
    reader.push(value)


def _dict(reader: PickleReader) -> None:
    values = reader.since_mark()
    reader.push({})
    reader.set_items(values)


def _instance(reader: PickleReader) -> None:
    """A class by two lines; its arguments are what lies behind the mark."""
    args = tuple(reader.since_mark())
    reader.global_lines()
    reader.push(reader.instance(reader.pop(), args))


def _object(reader: PickleReader) -> None:
    """A class and its arguments, both behind the mark."""
    cls, *args = reader.since_mark() or [None]
    reader.push(reader.instance(cls, tuple(args)))


TEXT_STEPS: dict[bytes, Callable[[PickleReader], Any]] = {
    pickle.INT: _int,
    pickle.LONG: _long,
    pickle.FLOAT: _float,
    pickle.STRING: _string,
    pickle.UNICODE: _unicode,
    pickle.GET: lambda r: r.get(_integer(r, _line(r, 10))),
    pickle.PUT: lambda r: r.put(_integer(r, _line(r, 10))),
    pickle.LIST: lambda r: r.push(r.since_mark()),
    pickle.DICT: _dict,
    pickle.INST: _instance,
    pickle.OBJ: _object,
    pickle.PERSID: lambda r: r.refer(_line(r, 256).decode(errors="replace")),
}
