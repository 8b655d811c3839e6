"""A reader of pickles that runs nothing from them: a stack machine over plain values.

Python's own unpickler calls whatever a file names. This one knows values (numbers, text, bytes, containers) and, for
everything else, a table of rules given by the caller: a name without a rule is refused if it is called, and is recorded as
a :class:`Stub` if it is the class of an instance. No name is ever imported or looked up.
"""

from __future__ import annotations

import io
import pickle  # for the names of the opcodes; its unpickler is not used
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

__all__ = ["Budget", "Global", "PickleReader", "Refusal", "Span", "Stub", "check_plain", "open_span"]

MAX_STEPS = 4_000_000  # instructions of one file, nested pickles included
MAX_STACK = 1_000_000
MAX_NODES = 2_000_000  # values of the tree, each counted as often as it is reached
MAX_HEIGHT = 256
MAX_TEXT = 16 << 20  # bytes of one string
MAX_INLINE = 64 << 10  # bytes of one bytes object; longer ones stay in the file as a Span
MAX_INTEGER = 128  # bytes of one integer
MAX_NAME = 256


class Refusal(Exception):
    """Why a file is not read, as the rest of a sentence that begins with the file."""


@dataclass(frozen=True)
class Global:
    """A class or function that a pickle names; the name only, never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Stub:
    """An instance that was pickled, as a record: its class, arguments and state. Nothing was built."""

    module: str
    name: str
    args: tuple[Any, ...] = ()
    state: Any = None


@dataclass(frozen=True)
class Span:
    """Bytes ``start`` to ``stop`` of a file, not read yet."""

    raw: BinaryIO
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Budget:
    """What one file may still cost: instructions, bytes of new values, bytes that its tensors address."""

    def __init__(self, file_size: int) -> None:
        self.steps = MAX_STEPS
        self.bytes = file_size + (1 << 20)
        self.addressed = 4 * file_size + (64 << 20)

    def allocate(self, n_bytes: int) -> None:
        """Raises Refusal: values take more memory than the file has bytes."""
        self.bytes -= n_bytes
        if self.bytes < 0:
            raise Refusal("claims more data than it has bytes")

    def address(self, n_bytes: int) -> None:
        """Raises Refusal: tensors that share memory are together far larger than the file."""
        self.addressed -= n_bytes
        if self.addressed < 0:
            raise Refusal("holds tensors that share memory and are together far larger than the file")


class _Window(io.RawIOBase):
    """The bytes of a span as a file of their own."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._span)}[whence]
        self._position = min(max(origin + offset, 0), len(self._span))
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: len(self._span) - self._position]
        self._span.raw.seek(self._span.start + self._position)
        n_read = self._span.raw.readinto(view)  # type: ignore[attr-defined]
        self._position += n_read
        return n_read


def open_span(span: Span) -> io.BufferedReader:
    """The bytes of a span as a buffered file that ends where the span ends."""
    return io.BufferedReader(_Window(span))


Rule = Callable[["PickleReader", tuple[Any, ...]], Any]
BuildRule = Callable[["PickleReader", Stub, Any], Any]


class PickleReader:
    """One pickle, read from a span.

    Args:
        span: where it lies; reading stops at its STOP, whose end is :attr:`end`.
        budget: limits shared by all pickles of a file.
        rules: what calling a name gives.
        build_rules: what setting the state of an instance of a class gives; without a rule, a Stub with that state.
        persistent: what a persistent id stands for; None refuses them.

    Raises:
        Refusal: from :meth:`load`.
    """

    def __init__(
        self,
        span: Span,
        budget: Budget,
        rules: Mapping[tuple[str, str], Rule],
        build_rules: Mapping[tuple[str, str], BuildRule],
        persistent: Callable[[Any], Any] | None = None,
    ) -> None:
        self.span, self.budget = span, budget
        self.rules, self.build_rules, self.persistent = rules, build_rules, persistent
        self.file = open_span(span)
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.slots: dict[int, int] = {}  # id of a Stub -> its place in the memo

    @property
    def end(self) -> int:
        """Offset in the raw file just behind what was read."""
        return self.span.start + self.file.tell()

    def load(self) -> Any:
        """The value of the pickle, not yet checked by :func:`check_plain`."""
        read, steps = self.file.read, _STEPS
        for used in range(self.budget.steps):
            code = read(1)
            if code == pickle.STOP:
                self.budget.steps -= used
                return self.pop()
            step = steps.get(code)
            if step is None:
                raise Refusal(_unknown(code))
            step(self)
            if len(self.stack) > MAX_STACK or len(self.marks) > MAX_STACK:
                raise Refusal("is a pickle with too many values open at once")
        raise Refusal(f"is a pickle of more than {MAX_STEPS} instructions")

    # what instructions are made of

    def bytes(self, n_bytes: int) -> bytes:
        data = self.file.read(n_bytes)
        if len(data) != n_bytes:
            raise Refusal("ends in the middle of a pickle")
        return data

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.bytes(struct.calcsize(form)))[0]

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise Refusal("is a damaged pickle (it takes a value where there is none)")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise Refusal("is a damaged pickle (it takes a value where there is none)")
        return self.stack[-1]

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        if not self.marks:
            raise Refusal("is a damaged pickle (it looks for a mark where there is none)")
        values, self.stack = self.stack, self.marks.pop()
        return values

    # literals

    def text(self, form: str, encoding: str = "utf-8") -> None:
        n_bytes = self.number(form)
        if not 0 <= n_bytes <= MAX_TEXT:
            raise Refusal(f"holds a text of {n_bytes} bytes, more than {MAX_TEXT}")
        try:
            self.push(self.bytes(n_bytes).decode(encoding, "surrogatepass" if encoding == "utf-8" else "strict"))
        except UnicodeDecodeError as error:
            raise Refusal("is a damaged pickle (a text that is none)") from error

    def binary(self, form: str) -> None:
        n_bytes = self.number(form)
        if n_bytes <= MAX_INLINE:
            return self.push(self.bytes(n_bytes))
        start = self.file.tell()
        if n_bytes > len(self.span) - start:
            raise Refusal("ends in the middle of a pickle")
        self.push(Span(self.span.raw, self.span.start + start, self.span.start + start + n_bytes))
        self.file.seek(start + n_bytes)

    def integer(self, form: str) -> None:
        n_bytes = self.number(form)
        if not 0 <= n_bytes <= MAX_INTEGER:
            raise Refusal(f"holds an integer of {n_bytes} bytes")
        self.push(int.from_bytes(self.bytes(n_bytes), "little", signed=True))

    def frame(self) -> None:
        if self.number("<Q") > len(self.span) - self.file.tell():
            raise Refusal("ends in the middle of a pickle")

    def protocol(self) -> None:
        version = self.number("<B")
        if version > pickle.HIGHEST_PROTOCOL:
            raise Refusal(f"is a pickle of protocol {version}, which is not known")

    # containers

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if type(target) is not list:
            raise Refusal(f"appends to a {_kind(target)}")
        target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.top()
        if type(target) not in (dict, OrderedDict) or len(values) % 2:
            raise Refusal(f"sets items of a {_kind(target)}")
        for key, value in zip(values[::2], values[1::2]):
            target[checked_key(key)] = value

    def add_items(self) -> None:
        values = self.since_mark()
        target = self.top()
        if type(target) is not set:
            raise Refusal(f"adds to a {_kind(target)}")
        target.update(checked_key(value) for value in values)

    def make_tuple(self, n_values: int) -> None:
        if len(self.stack) < n_values:
            raise Refusal("is a damaged pickle (it takes a value where there is none)")
        values = tuple(self.stack[-n_values:])
        del self.stack[-n_values:]
        self.push(values)

    # memo

    def put(self, slot: int) -> None:
        value = self.top()
        self.memo[slot] = value
        if type(value) is Stub:
            self.slots[id(value)] = slot

    def get(self, slot: int) -> None:
        if slot not in self.memo:
            raise Refusal("is a damaged pickle (it refers to a value that is not there)")
        self.push(self.memo[slot])

    # names, calls and instances

    def named(self, module: Any, name: Any) -> None:
        self.push(checked_global(module, name, self.rules))

    def global_lines(self) -> None:
        module, name = (self.file.readline(MAX_NAME + 2) for _ in range(2))
        self.named(module.rstrip(b"\n").decode(errors="replace"), name.rstrip(b"\n").decode(errors="replace"))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.named(module, name)

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        self.push(self.call(function, args))

    def call(self, function: Any, args: Any) -> Any:
        """What the rule for ``function`` makes of ``args``."""
        if type(function) is not Global or type(args) is not tuple:
            raise Refusal(f"calls a {_kind(function)}")
        rule = self.rules.get((function.module, function.name))
        if rule is None:
            raise Refusal(f"asks to call {function}, which no file of weights needs and which is never run")
        try:
            return rule(self, args)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, OverflowError) as error:
            raise Refusal(f"calls {function} with arguments that do not fit") from error

    def new_object(self) -> None:
        args, cls = self.pop(), self.pop()
        self.push(self.instance(cls, args))

    def new_object_with_keywords(self) -> None:
        keywords = self.pop()
        if keywords != {}:
            raise Refusal("makes an instance with keyword arguments")
        self.new_object()

    def instance(self, cls: Any, args: Any) -> Any:
        """An instance of ``cls``: by its rule, else a Stub."""
        if type(cls) is not Global or type(args) is not tuple:
            raise Refusal(f"makes an instance of a {_kind(cls)}")
        if (cls.module, cls.name) in self.rules:
            return self.call(cls, args)
        return Stub(cls.module, cls.name, args)

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if type(target) is OrderedDict and type(state) in (dict, OrderedDict):
            return  # attributes of a state dict (_metadata): versions of modules, needed by nobody
        if type(target) is not Stub:
            raise Refusal(f"sets the state of a {_kind(target)}")
        self.stack[-1] = built = self._built(target, state)
        slot = self.slots.pop(id(target), None)
        if slot is not None and self.memo.get(slot) is target:
            self.memo[slot] = built
            if type(built) is Stub:
                self.slots[id(built)] = slot

    def _built(self, stub: Stub, state: Any) -> Any:
        rule = self.build_rules.get((stub.module, stub.name))
        if rule is None:
            return replace(stub, state=state)
        try:
            return rule(self, stub, state)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, OverflowError) as error:
            raise Refusal(f"sets a state of {stub.module}.{stub.name} that does not fit") from error

    def persistent_id(self) -> None:
        if self.persistent is None:
            raise Refusal("refers to data outside the pickle")
        self.push(self.persistent(self.pop()))


_STEPS: dict[bytes, Callable[[PickleReader], Any]] = {
    pickle.PROTO: PickleReader.protocol,
    pickle.FRAME: PickleReader.frame,
    pickle.MARK: PickleReader.mark,
    pickle.POP: PickleReader.pop,
    pickle.POP_MARK: PickleReader.since_mark,
    pickle.NONE: lambda r: r.push(None),
    pickle.NEWTRUE: lambda r: r.push(True),
    pickle.NEWFALSE: lambda r: r.push(False),
    pickle.BININT: lambda r: r.push(r.number("<i")),
    pickle.BININT1: lambda r: r.push(r.number("<B")),
    pickle.BININT2: lambda r: r.push(r.number("<H")),
    pickle.LONG1: lambda r: r.integer("<B"),
    pickle.LONG4: lambda r: r.integer("<i"),
    pickle.BINFLOAT: lambda r: r.push(r.number(">d")),
    pickle.SHORT_BINUNICODE: lambda r: r.text("<B"),
    pickle.BINUNICODE: lambda r: r.text("<I"),
    pickle.BINUNICODE8: lambda r: r.text("<Q"),
    pickle.SHORT_BINSTRING: lambda r: r.text("<B", "latin1"),  # Python 2: bytes
    pickle.BINSTRING: lambda r: r.text("<i", "latin1"),
    pickle.SHORT_BINBYTES: lambda r: r.binary("<B"),
    pickle.BINBYTES: lambda r: r.binary("<I"),
    pickle.BINBYTES8: lambda r: r.binary("<Q"),
    pickle.BYTEARRAY8: lambda r: r.binary("<Q"),
    pickle.EMPTY_LIST: lambda r: r.push([]),
    pickle.EMPTY_DICT: lambda r: r.push({}),
    pickle.EMPTY_SET: lambda r: r.push(set()),
    pickle.EMPTY_TUPLE: lambda r: r.push(()),
    pickle.TUPLE1: lambda r: r.make_tuple(1),
    pickle.TUPLE2: lambda r: r.make_tuple(2),
    pickle.TUPLE3: lambda r: r.make_tuple(3),
    pickle.TUPLE: lambda r: r.push(tuple(values)) if (values := r.since_mark()) else r.push(()),
    pickle.FROZENSET: lambda r: r.push(frozenset([checked_key(value) for value in r.since_mark()])),
    pickle.APPEND: lambda r: r.append([r.pop()]),
    pickle.APPENDS: lambda r: r.append(r.since_mark()),
    pickle.SETITEM: lambda r: r.set_items([r.pop(), r.pop()][::-1]),
    pickle.SETITEMS: lambda r: r.set_items(r.since_mark()),
    pickle.ADDITEMS: PickleReader.add_items,
    pickle.MEMOIZE: lambda r: r.put(len(r.memo)),
    pickle.BINPUT: lambda r: r.put(r.number("<B")),
    pickle.LONG_BINPUT: lambda r: r.put(r.number("<I")),
    pickle.BINGET: lambda r: r.get(r.number("<B")),
    pickle.LONG_BINGET: lambda r: r.get(r.number("<I")),
    pickle.GLOBAL: PickleReader.global_lines,
    pickle.STACK_GLOBAL: PickleReader.stack_global,
    pickle.REDUCE: PickleReader.reduce,
    pickle.NEWOBJ: PickleReader.new_object,
    pickle.NEWOBJ_EX: PickleReader.new_object_with_keywords,
    pickle.BUILD: PickleReader.build,
    pickle.BINPERSID: PickleReader.persistent_id,
}

_OPCODE_NAMES = {
    code: name for name in pickle.__all__ if name.isupper() and type(code := getattr(pickle, name)) is bytes
}


def _unknown(code: bytes) -> str:
    if not code:
        return "ends in the middle of a pickle"
    if code in _OPCODE_NAMES:
        return f"is a pickle with the instruction {_OPCODE_NAMES[code]}, which no file of weights needs"
    return "is a damaged pickle (it has an instruction that does not exist)"


# Top-level modules whose instances are never recorded: what runs code lives here. torch and numpy below count too.
_PYTHON_2 = {"__builtin__", "copy_reg", "commands", "popen2", "cPickle", "cStringIO", "urllib2", "exceptions", "dl"}
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_RECORDED = ("torch.nn.modules.", "torch.nn.parallel.", "torch.optim.")
_NOT_RECORDED = frozenset(sys.stdlib_module_names) | _PYTHON_2 | {"torch", "numpy"}


def checked_global(module: Any, name: Any, rules: Mapping[tuple[str, str], Rule]) -> Global:
    """The record of a name that a pickle may mention.

    Raises:
        Refusal: it is no name, or belongs to Python's library, torch or numpy and has no rule.
    """
    if type(module) is not str or type(name) is not str or len(module) + len(name) > MAX_NAME:
        raise Refusal("is a pickle that names a class by something other than two short texts")
    module = _RENAMED.get(module, module)
    if (module, name) in rules:
        return Global(module, name)
    if not all(part.isidentifier() for part in f"{module}.{name}".split(".")):
        raise Refusal("is a pickle with a class name that is none")
    if module.split(".")[0] in _NOT_RECORDED and not module.startswith(_RECORDED):
        raise Refusal(f"asks for {module}.{name}, which no file of weights needs and which is never run")
    return Global(module, name)


def checked_key(key: Any) -> Any:
    """A key that hashes in constant time without recursion: text, bytes, an integer of 64 bits, bool or None.

    Raises:
        Refusal: it is something else.
    """
    if type(key) in (str, bytes, bool, type(None)) or (type(key) is int and -(1 << 63) <= key < 1 << 63):
        return key
    raise Refusal(f"uses a {_kind(key)} as a key")


def _kind(value: Any) -> str:
    return str(value) if type(value) is Global else type(value).__name__


def check_plain(root: Any, leaves: tuple[type, ...]) -> None:
    """Sees to it that a walk of the tree ends soon: no cycle, no height or number of values beyond the limits.

    Values that are reached twice count twice, so that walkers need not look out for shared ones.

    Args:
        root: the tree of dict, list, tuple, set, Stub and leaves.
        leaves: the types of leaves.

    Raises:
        Refusal: it is not so, or holds something else.
    """
    measured: dict[int, tuple[int, int]] = {}  # id of a finished container -> its number of values, its height
    path = [_Open((root,))]
    open_ids = {id(path[0].value)}
    while path:
        here = path[-1]
        for child in here.children:  # goes on behind the child where it broke off
            if type(child) not in _CONTAINERS:
                if type(child) not in leaves:
                    raise Refusal(f"holds a {_kind(child)} where plain values are expected")
                here.size += 1
            elif id(child) in measured:
                here.add(*measured[id(child)])
            elif id(child) in open_ids:
                raise Refusal("holds a value that contains itself")
            else:
                path.append(_Open(child))
                open_ids.add(id(child))
                break
        else:
            path.pop()
            open_ids.discard(id(here.value))
            measured[id(here.value)] = (here.size, here.height)
            if path:
                path[-1].add(here.size, here.height)
        if here.size > MAX_NODES:
            raise Refusal(f"holds more than {MAX_NODES} values")
        if len(path) + here.height > MAX_HEIGHT:
            raise Refusal(f"nests values more than {MAX_HEIGHT} deep")


_CONTAINERS = (dict, OrderedDict, list, tuple, set, frozenset, Stub)


class _Open:
    """A container whose children are being counted."""

    def __init__(self, value: Any) -> None:
        children = (value.args, value.state) if type(value) is Stub else value
        self.value = value
        self.children = iter(children.values() if isinstance(children, dict) else children)
        self.size = self.height = 1

    def add(self, size: int, height: int) -> None:
        self.size += size
        self.height = max(self.height, height + 1)
