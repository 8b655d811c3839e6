"""A reader of pickles that runs nothing from them: a stack machine over plain values.

Python's own unpickler calls whatever a file names. This one knows values (numbers, text, bytes, containers) and, for
everything else, a table of rules given by the caller: a name without a rule is refused if it is called, and is recorded as
a :class:`Stub` if it is the class of an instance. No name is ever imported or looked up.
"""

from __future__ import annotations

import pickle  # for the names of the opcodes; its unpickler is not used
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sage_fast.models.plain_trees import Global, Stub, kind_of
from sage_fast.models.spans import Budget, Refusal, Span, open_span
from sage_fast.models.text_pickles import TEXT_STEPS

__all__ = ["PickleReader", "Vocabulary", "checked_key"]

MAX_STACK = 200_000  # values that no container holds yet; picklers write containers in pieces of 1000
MAX_MARKS = 10_000
MAX_TEXT = 64 << 20  # bytes of one string; protocols up to 2 write the bytes of a tensor as text
MAX_INLINE = 64 << 10  # bytes of one bytes object; longer ones stay in the file as a Span
MAX_INTEGER = 128  # bytes of one integer
MAX_NAME = 256

# what the code of a rule raises for arguments that do not fit
MISFIT = (TypeError, ValueError, LookupError, AttributeError, RuntimeError, ArithmeticError)


@dataclass(frozen=True)
class Vocabulary:
    """What the names in a pickle stand for, by module and name.

    Attributes:
        calls: what calling a name with a tuple of arguments gives.
        states: what setting the state of a Stub of that class gives; without a rule, a Stub with the state.
        records: whether names of foreign packages, torch.nn and torch.optim may be mentioned, and instances of such classes
            recorded; names of Python's library, and of torch and NumPy else, never are without a rule in ``calls``.
    """

    calls: Mapping[tuple[str, str], Callable[[PickleReader, tuple[Any, ...]], Any]] = field(default_factory=dict)
    states: Mapping[tuple[str, str], Callable[[PickleReader, Stub, Any], Any]] = field(default_factory=dict)
    records: bool = False


class PickleReader:
    """One pickle, read from a span.

    Args:
        span: where it lies; reading stops at its STOP, whose end is :attr:`end`.
        budget: limits shared by all pickles of a file.
        vocabulary: what names stand for.
        persistent: what a persistent id stands for; None refuses them.

    Raises:
        Refusal: from :meth:`load`.
    """

    def __init__(
        self,
        span: Span,
        budget: Budget,
        vocabulary: Vocabulary,
        persistent: Callable[[Any], Any] | None = None,
    ) -> None:
        self.span, self.budget, self.vocabulary, self.persistent = span, budget, vocabulary, persistent
        self.file, self.max_text = open_span(span), MAX_TEXT
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
            if len(self.stack) > MAX_STACK or len(self.marks) > MAX_MARKS:
                raise Refusal("is a pickle with too many values open at once")
        raise Refusal("is a pickle of more instructions than weights of its size need")

    # what instructions are made of

    def take(self, n_bytes: int) -> bytes:
        data = self.file.read(n_bytes)
        if len(data) != n_bytes:
            raise Refusal("ends in the middle of a pickle")
        return data

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

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
            self.push(self.take(n_bytes).decode(encoding, "surrogatepass" if encoding == "utf-8" else "strict"))
        except UnicodeDecodeError as error:
            raise Refusal("is a damaged pickle (a text that is none)") from error

    def binary(self, form: str) -> None:
        n_bytes = self.number(form)
        if n_bytes <= MAX_INLINE:
            return self.push(self.take(n_bytes))
        start = self.file.tell()
        if n_bytes > len(self.span) - start:
            raise Refusal("ends in the middle of a pickle")
        self.push(Span(self.span.raw, self.span.start + start, self.span.start + start + n_bytes))
        self.file.seek(start + n_bytes)

    def integer(self, form: str) -> None:
        n_bytes = self.number(form)
        if not 0 <= n_bytes <= MAX_INTEGER:
            raise Refusal(f"holds an integer of {n_bytes} bytes")
        self.push(int.from_bytes(self.take(n_bytes), "little", signed=True))

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
            raise Refusal(f"appends to a {kind_of(target)}")
        target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.top()
        if type(target) not in (dict, OrderedDict) or len(values) % 2:
            raise Refusal(f"sets items of a {kind_of(target)}")
        for key, value in zip(values[::2], values[1::2]):
            target[checked_key(key)] = value

    def empty_set(self) -> None:
        self.budget.allocate(sys.getsizeof(set()))  # three to four times a list or dict, for one byte of a file
        self.push(set())

    def add_items(self) -> None:
        values = self.since_mark()
        target = self.top()
        if type(target) is not set:
            raise Refusal(f"adds to a {kind_of(target)}")
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
        self.push(_checked_global(module, name, self.vocabulary))

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
            raise Refusal(f"calls a {kind_of(function)}")
        rule = self.vocabulary.calls.get((function.module, function.name))
        if rule is None:
            raise Refusal(f"asks to call {function}, which no file of weights needs and which is never run")
        try:
            return rule(self, args)
        except MISFIT as error:
            raise Refusal(f"calls {function} with arguments that do not fit") from error

    def new_object(self) -> None:
        args, cls = self.pop(), self.pop()
        self.push(self.instance(cls, args))

    def new_object_with_keywords(self) -> None:
        keywords = self.pop()
        if type(keywords) is not dict or keywords:
            raise Refusal("makes an instance with keyword arguments")
        self.new_object()

    def instance(self, cls: Any, args: Any) -> Any:
        """An instance of ``cls``: by its rule, else a Stub."""
        if type(cls) is not Global or type(args) is not tuple:
            raise Refusal(f"makes an instance of a {kind_of(cls)}")
        if (cls.module, cls.name) in self.vocabulary.calls:
            return self.call(cls, args)
        return Stub(cls.module, cls.name, args)

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if type(target) is OrderedDict and type(state) in (dict, OrderedDict):
            return  # attributes of a state dict (_metadata): versions of modules, needed by nobody
        if type(target) is not Stub:
            raise Refusal(f"sets the state of a {kind_of(target)}")
        self.stack[-1] = built = self._built(target, state)
        slot = self.slots.pop(id(target), None)
        if slot is not None and self.memo.get(slot) is target:
            self.memo[slot] = built
            if type(built) is Stub:
                self.slots[id(built)] = slot

    def _built(self, stub: Stub, state: Any) -> Any:
        rule = self.vocabulary.states.get((stub.module, stub.name))
        if rule is None:
            return replace(stub, state=state)
        try:
            return rule(self, stub, state)
        except MISFIT as error:
            raise Refusal(f"sets a state of {stub.module}.{stub.name} that does not fit") from error

    def persistent_id(self) -> None:
        self.refer(self.pop())

    def refer(self, identifier: Any) -> None:
        """Push what an identifier stands for."""
        if self.persistent is None:
            raise Refusal("refers to data outside the pickle")
        try:
            self.push(self.persistent(identifier))
        except MISFIT as error:
            raise Refusal("refers to data outside the pickle that does not fit") from error


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
    pickle.EMPTY_SET: PickleReader.empty_set,
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
    **TEXT_STEPS,
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


_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg", "pathlib._local": "pathlib"}  # Python 2, and 3.13 alone
_RECORDED = ("torch.nn.modules.", "torch.nn.parallel.", "torch.nn.functional.", "torch.optim.")
_PYTHON_2 = {"commands", "popen2", "cPickle", "cStringIO", "StringIO", "urllib2", "exceptions", "dl", "thread"}
_NOT_RECORDED = frozenset(sys.stdlib_module_names) | _PYTHON_2 | {"torch", "numpy"}


def _checked_global(module: Any, name: Any, vocabulary: Vocabulary) -> Global:
    """The record of a name that a pickle may mention.

    Raises:
        Refusal: it is no name, or not of the vocabulary.
    """
    if type(module) is not str or type(name) is not str or len(module) + len(name) > MAX_NAME:
        raise Refusal("is a pickle that names a class by something other than two short texts")
    module = _RENAMED.get(module, module)
    if (module, name) in vocabulary.calls:
        return Global(module, name)
    if not all(part.isidentifier() for part in f"{module}.{name}".split(".")):
        raise Refusal("is a pickle with a class name that is none")
    foreign = module.split(".")[0] not in _NOT_RECORDED or f"{module}.".startswith(_RECORDED)
    if not (vocabulary.records and foreign):
        raise Refusal(f"asks for {module}.{name}, which no such file needs and which is never run")
    return Global(module, name)


def checked_key(key: Any) -> Any:
    """A key that hashes in constant time without recursion: text, bytes, an integer of 64 bits, bool or None.

    Raises:
        Refusal: it is something else.
    """
    if type(key) in (str, bytes, bool, type(None)) or (type(key) is int and -(1 << 63) <= key < 1 << 63):
        return key
    raise Refusal(f"uses a {kind_of(key)} as a key")
