"""Pickles made to do harm, each with a part of the sentence that refuses it."""

from __future__ import annotations

import pickle
import struct

import torch
from pickle_words import (
    call,
    data,
    instance,
    name,
    number,
    pickled,
    text,
    torch_archive,
    torch_file,
    torch_stream,
    with_state,
    word,
)

CANARY = "canary"  # hostile code would make this file, in the working directory of the process that reads
TOUCH = f"open({CANARY!r}, 'w')"
SYSTEM = call(name("os", "system"), f"touch {CANARY}")

NEVER = "never run"
DAMAGED = "damaged"


def rebuilt(storage: bytes, size, stride, offset=0) -> bytes:
    hooks = call(name("collections", "OrderedDict"))
    return call(name("torch._utils", "_rebuild_tensor_v2"), storage, offset, size, stride, False, hooks)


def loaded(inner: bytes) -> bytes:
    """Pickled words for a storage of those inner bytes."""
    return call(name("torch.storage", "_load_from_bytes"), data(inner))


def array_of(dtype: bytes, shape, content) -> bytes:
    empty = call(name("numpy._core.multiarray", "_reconstruct"), name("numpy", "ndarray"), (0,), data(b"b"))
    return with_state(empty, (1, shape, dtype, False, content))


def dtype_of(code: str, *state) -> bytes:
    state = state or (3, "<", None, None, None, -1, -1, 0)
    return with_state(call(name("numpy", "dtype"), code, False, True), state)


def laughs(opening: bytes, between: bytes, closing: bytes) -> bytes:
    """Forty levels, each holding the one below twice: a walk would visit 2 ** 40 values."""
    levels = [text("ha") + pickle.MEMOIZE]
    for level in range(40):
        get = pickle.BINGET + bytes([level])
        levels.append(opening + get + between + get + closing + pickle.MEMOIZE)
    return b"".join(levels)


NESTED = pickle.dumps(call(b"", 1))  # harmless bytes within bytes
HOSTILE = pickled(SYSTEM)
LIST, DICT = pickle.EMPTY_LIST + pickle.MEMOIZE, pickle.EMPTY_DICT + pickle.MEMOIZE
ITSELF = pickle.BINGET + b"\0"
ZERO, ONE = pickle.BININT1 + b"\0", pickle.BININT1 + b"\1"

PICKLES: dict[str, tuple[bytes, str]] = {
    # functions that do something
    "os.system": (HOSTILE, "os.system"),
    "posix.system by a line of text": (pickled(b"cposix\nsystem\n", word(("true",)), b"R", protocol=2), "posix.system"),
    "nt.system": (pickled(call(name("nt", "system"), "x")), "nt.system"),
    "protocol 0": (f"cos\nsystem\n(S'touch {CANARY}'\ntR.".encode(), "os.system"),
    "protocol 0, by a mark": (f"(S'touch {CANARY}'\nios\nsystem\n.".encode(), "os.system"),
    "protocol 1, by a mark": (f"(cos\nsystem\nS'touch {CANARY}'\no.".encode(), "os.system"),
    "protocol 0, eval of Python 2": (f"c__builtin__\neval\n(S'{TOUCH[:4]}'\ntR.".encode(), "builtins.eval"),
    "an instance of no class": (b"(S'x'\no.", "makes an instance of a str"),
    "an instance of nothing": (b"((ot.", "makes an instance of a NoneType"),
    "a name of two megabytes": (b"((ia" + b"a" * (2 << 20) + b"\nb\n.", "class"),
    "an integer of a million digits": (b"(I" + b"9" * 1_000_000 + b"\nt.", "a line of more than"),
    "a long of a million digits": (b"(L" + b"9" * 1_000_000 + b"L\nt.", "a line of more than"),
    "an integer with underscores": (b"(I1_0\nt.", "an integer that is none"),
    "a float that is code": (b"(Fexit()\nt.", "a float that is none"),
    "a string without quotes": (b"(Sexit()\nt.", "a text that is none"),
    "a string with half an escape": (b"(S'\\x4'\nt.", "a text that is none"),
    "a unicode line with half an escape": (b"(V\\u12\nt.", "a text that is none"),
    "a line without an end": (b"(S'abc.", "in the middle"),
    "a memo of text that is not there": (b"(I1\ng7\nt.", "not there"),
    "a memo below zero": (b"(I1\ng-1\nt.", "not there"),
    "a memo that is no number": (b"(lpx\n.", "an integer that is none"),
    "data outside, by a line": (b"(I1\nPstorage\nt.", "outside the pickle"),
    "an old dict without a mark": (b"]q\x00d.", DAMAGED),
    "an old dict of three": (b"(I1\nI2\nI3\nd.", "sets items"),
    "an old dict with a list as a key": (b"((lI1\nd.", "list as a key"),
    "an old list that contains itself": (b"(lp0\ng0\na.", "contains itself"),
    "protocol 0 in a frame of 2": (pickled(f"cos\nsystem\n(S'touch {CANARY}'\ntR".encode(), protocol=2), "os.system"),
    "eval": (pickled(call(name("builtins", "eval"), TOUCH)), "builtins.eval"),
    "exec": (pickled(call(name("builtins", "exec"), TOUCH)), "builtins.exec"),
    "compile": (pickled(call(name("builtins", "compile"), TOUCH, "x", "exec")), "builtins.compile"),
    "open": (pickled(call(name("builtins", "open"), CANARY, "w")), "builtins.open"),
    "print": (pickled(call(name("builtins", "print"), "x")), "builtins.print"),
    "__import__": (pickled(call(name("builtins", "__import__"), "antigravity")), "builtins.__import__"),
    "eval of Python 2": (pickled(b"c__builtin__\neval\n", word((TOUCH,)), b"R", protocol=2), "builtins.eval"),
    "map": (pickled(call(name("builtins", "map"), name("os", "system"), ["x"])), "builtins.map"),
    "type with three arguments": (pickled(call(name("builtins", "type"), "X", (), {})), "builtins.type"),
    "subprocess.Popen": (pickled(instance(name("subprocess", "Popen"), ["touch", CANARY])), "subprocess.Popen"),
    "commands.getoutput": (pickled(call(name("commands", "getoutput"), "x")), "commands.getoutput"),
    "shutil.rmtree": (pickled(call(name("shutil", "rmtree"), ".")), "shutil.rmtree"),
    "runpy.run_path": (pickled(call(name("runpy", "run_path"), "x.py")), "runpy.run_path"),
    "ctypes.CDLL": (pickled(call(name("ctypes", "CDLL"), "x.so")), "ctypes.CDLL"),
    "socket": (pickled(instance(name("socket", "socket"))), "socket.socket"),
    "a bound method by partial": (
        pickled(call(name("functools", "partial"), name("os", "system"))),
        "functools.partial",
    ),
    "weakref": (pickled(call(name("weakref", "finalize"), "x")), "weakref.finalize"),
    "torch.load": (pickled(call(name("torch", "load"), CANARY)), "torch.load"),
    "torch.hub": (pickled(call(name("torch.hub", "load"), "x/y", "z")), "torch.hub.load"),
    "torch.jit": (pickled(call(name("torch.jit", "load"), "x")), "torch.jit.load"),
    "torch.ops library": (pickled(call(name("torch._ops", "load_library"), "x")), "torch._ops.load_library"),
    "numpy.load": (pickled(call(name("numpy", "load"), "x", None, True)), "numpy.load"),
    "numpy testing runstring": (
        pickled(call(name("numpy.testing._private.utils", "runstring"), TOUCH, {})),
        "runstring",
    ),
    "a function of an installed package": (pickled(call(name("pip._internal", "main"), ["install", "x"])), NEVER),
    "a function of this package": (pickled(call(name("sage_fast.cli", "main"))), NEVER),
    "a function of __main__": (pickled(call(name("__main__", "main"))), NEVER),
    "a torch.nn class, called": (pickled(call(name("torch.nn.modules.linear", "Linear"), 10**6, 10**6)), NEVER),
    # ways to reach one
    "getattr chain": (pickled(call(name("builtins", "getattr"), name("os", "path"), "os")), "builtins.getattr"),
    "operator.attrgetter": (pickled(call(name("operator", "attrgetter"), "system")), "operator.attrgetter"),
    "operator.methodcaller": (pickled(call(name("operator", "methodcaller"), "system", "x")), "operator.methodcaller"),
    "dotted attribute": (pickled(call(name("torch", "storage._load_from_bytes"), data(HOSTILE))), NEVER),
    "globals of an allowed function": (pickled(name("torch._utils", "_rebuild_tensor_v2.__globals__")), NEVER),
    "globals of an allowed class": (pickled(name("collections", "OrderedDict.__init__.__globals__")), NEVER),
    "dotted attribute of another package": (pickled(call(name("pip", "os.system"), "x")), NEVER),
    "module found through another": (pickled(call(name("torch.nn.modules.linear", "math.os.system"), "x")), NEVER),
    "allowed name of another module": (pickled(call(name("os", "OrderedDict"))), "os.OrderedDict"),
    "module as bytes": (pickled(data(b"os") + text("system") + pickle.STACK_GLOBAL), "two short texts"),
    "module as a list": (pickled(word(["os"]) + text("system") + pickle.STACK_GLOBAL), "two short texts"),
    "module from a name": (pickled(name("os.path", "os") + text("system") + pickle.STACK_GLOBAL), "os.path.os"),
    "module from the memo": (
        pickled(
            text("os") + pickle.MEMOIZE + pickle.POP + ITSELF + text("system") + pickle.STACK_GLOBAL, word(("x",)), b"R"
        ),
        "os.system",
    ),
    "module with a line in it": (pickled(name("os\nsystem", "x")), "class name that is none"),
    "module without a name": (pickled(name("", "system")), "class name that is none"),
    "name without letters": (pickled(name("a", "b; import os")), "class name that is none"),
    "name in letters that look alike": (pickled(call(name("\u043es", "system"), "x")), NEVER),
    "long module": (pickled(name("a." * 5000 + "a", "b")), "two short texts"),
    "long line": (pickled(b"c" + b"a" * 100_000 + b"\nb\n", protocol=2), "two short texts"),
    "extension codes 1": (pickled(pickle.EXT1 + b"\1"), "EXT1"),
    "extension codes 2": (pickled(pickle.EXT2 + b"\1\0"), "EXT2"),
    "extension codes 4": (pickled(pickle.EXT4 + b"\1\0\0\0"), "EXT4"),
    "register an extension": (
        pickled(call(name("copyreg", "add_extension"), "os", "system", 1)),
        "copyreg.add_extension",
    ),
    "register a reducer": (pickled(call(name("copyreg", "pickle"), name("builtins", "int"))), "copyreg.pickle"),
    "INST": (pickled(b"(" + text("x") + b"ios\nsystem\n", protocol=2), "os.system"),
    "OBJ": (pickled(b"(cos\nsystem\n" + text("x") + b"o", protocol=2), "os.system"),
    "OBJ of a class that is none": (pickled(b"(cnumpy\nndarray\no", protocol=2), "has none in a file"),
    "persistent id as text": (pickled(b"P0\n", protocol=2), "outside the pickle"),
    "persistent id in a plain pickle": (pickled(word(("storage",)) + pickle.BINPERSID), "outside the pickle"),
    "next buffer": (pickled(pickle.NEXT_BUFFER, protocol=5), "NEXT_BUFFER"),
    "readonly buffer": (pickled(data(b"x") + pickle.READONLY_BUFFER, protocol=5), "READONLY_BUFFER"),
    # pickles within
    "pickle.loads": (pickled(call(name("pickle", "loads"), data(HOSTILE))), "pickle.loads"),
    "_pickle.loads": (pickled(call(name("_pickle", "loads"), data(HOSTILE))), "_pickle.loads"),
    "marshal.loads": (pickled(call(name("marshal", "loads"), data(b"x"))), "marshal.loads"),
    "a hostile pickle as a storage": (pickled(loaded(HOSTILE)), "no torch file"),
    "a hostile archive as a storage": (pickled(loaded(torch_archive(HOSTILE))), "os.system"),
    "a hostile stream as a storage": (pickled(loaded(torch_stream(HOSTILE))), "os.system"),
    "a storage in a storage": (pickled(loaded(torch_archive(pickled(loaded(b"x"))))), "_load_from_bytes"),
    "a harmless archive that is no storage": (pickled(loaded(torch_file([1]))), "no storage"),
    "a harmless stream that is no storage": (pickled(loaded(torch_file([1], archive=False))), "no storage"),
    "bytes within bytes": (pickled(loaded(torch_file(NESTED, archive=False))), "no storage"),
    "a storage from text": (pickled(call(name("torch.storage", "_load_from_bytes"), "x")), "no bytes"),
    "an object array's scalar": (
        pickled(call(name("numpy._core.multiarray", "scalar"), dtype_of("O8"), data(HOSTILE))),
        "type '|O'",
    ),
    "an object array in raw bytes": (
        pickled(call(name("numpy._core.numeric", "_frombuffer"), data(b"\0" * 8), dtype_of("O8"), (1,), "C")),
        "type '|O'",
    ),
    "os.system in an object array": (pickled(array_of(dtype_of("O8"), (1,), [SYSTEM])), "os.system"),
    # state set on what must not have any
    "state of a function": (
        pickled(with_state(name("torch._utils", "_rebuild_parameter"), {"__code__": 1})),
        "state of a",
    ),
    "state of a class": (pickled(with_state(name("collections", "OrderedDict"), {"__reduce__": 1})), "state of a"),
    "state of a class by slots": (
        pickled(with_state(name("collections", "OrderedDict"), (None, {"__setstate__": 1}))),
        "state of a",
    ),
    "state of a dict": (pickled(with_state(pickle.EMPTY_DICT, {"a": 1})), "state of a dict"),
    "state of a list": (pickled(with_state(pickle.EMPTY_LIST, {"__class__": 1})), "state of a list"),
    "slots of an ordered dict": (
        pickled(with_state(call(name("collections", "OrderedDict")), (None, {"__class__": 1}))),
        "state of a OrderedDict",
    ),
    "state of a namespace that is no dict": (
        pickled(with_state(instance(name("argparse", "Namespace")), [1])),
        "without a dict",
    ),
    "items of a class": (
        pickled(name("collections", "OrderedDict") + text("a") + ONE + pickle.SETITEM),
        "sets items of",
    ),
    "items of an instance": (pickled(instance(name("a", "B")) + text("a") + ONE + pickle.SETITEM), "sets items of"),
    "appends to a tuple": (pickled(pickle.EMPTY_TUPLE + ONE + pickle.APPEND), "appends to a tuple"),
    "appends to an instance": (pickled(instance(name("a", "B")) + ONE + pickle.APPEND), "appends to a Stub"),
    "adds to a dict": (pickled(pickle.EMPTY_DICT + pickle.MARK + ONE + pickle.ADDITEMS), "adds to a dict"),
    "keywords": (pickled(name("a", "B"), word(()), word({"x": 1}), pickle.NEWOBJ_EX), "keyword"),
    "keywords that are no dict": (pickled(name("a", "B"), word(()), word([1]), pickle.NEWOBJ_EX), "keyword"),
    "instance of a function": (pickled(instance(name("torch._utils", "_rebuild_tensor_v2"), "x")), "do not fit"),
    "instance of a text": (pickled(instance(text("os.system"))), "instance of a str"),
    "call of a text": (pickled(call(text("os.system"), "x")), "calls a str"),
    "call without a tuple": (pickled(name("collections", "OrderedDict") + word([]) + pickle.REDUCE), "calls a"),
    "_reconstructor of a dict": (
        pickled(call(name("copyreg", "_reconstructor"), name("a", "B"), name("builtins", "dict"), {})),
        "no plain one",
    ),
    "_reconstructor of os.system": (
        pickled(call(name("copyreg", "_reconstructor"), name("os", "system"), name("builtins", "object"), None)),
        "os.system",
    ),
    "__newobj__": (pickled(call(name("copyreg", "__newobj__"), name("os", "system"))), "copyreg.__newobj__"),
    "a tensor by os.system": (
        pickled(call(name("torch._tensor", "_rebuild_from_type_v2"), name("os", "system"), None, ("x",), {})),
        "os.system",
    ),
    "a tensor by a class": (
        pickled(call(name("torch._tensor", "_rebuild_from_type_v2"), name("a", "B"), None, ("x",), {})),
        "makes none",
    ),
    "a persistent object of nothing": (
        pickled(call(name("torch_utils.persistence", "_reconstruct_persistent_obj"), "x")),
        "persistent object",
    ),
    "a persistent object of another type": (
        pickled(call(name("torch_utils.persistence", "_reconstruct_persistent_obj"), {"type": "module"})),
        "persistent object",
    ),
    # allowed names, wrong arguments
    "a tensor of nothing": (pickled(call(name("torch._utils", "_rebuild_tensor_v2"))), "do not fit"),
    "a tensor of a text": (pickled(rebuilt(text("x"), (1,), (1,))), "no storage"),
    "a parameter of a text": (pickled(call(name("torch._utils", "_rebuild_parameter"), "x", True, None)), "no tensor"),
    "a storage by its class": (pickled(call(name("torch", "FloatStorage"), 1 << 40)), "not in the file"),
    "an ordered dict of a number": (pickled(call(name("collections", "OrderedDict"), 5)), "no list"),
    "an ordered dict of triples": (pickled(call(name("collections", "OrderedDict"), [[1, 2, 3]])), "do not fit"),
    "a set of a text": (pickled(call(name("builtins", "set"), "abc")), "no list"),
    "bytes of a number": (pickled(call(name("builtins", "bytes"), 1 << 40)), "bytes of something else"),
    "text encoded by a codec": (pickled(call(name("_codecs", "encode"), "x", "zip")), "encodes a text"),
    "a path of numbers": (pickled(call(name("pathlib", "PosixPath"), 1)), "path that is none"),
    "an array of a huge shape": (pickled(array_of(dtype_of("f4"), (1 << 40,), data(b"abcd"))), "shape"),
    "an array of a negative shape": (pickled(array_of(dtype_of("f4"), (-1, -1), data(b"abcd"))), "shape"),
    "an array of records": (
        pickled(array_of(dtype_of("V8", 3, "|", None, ("a",), {"a": 1}, 8, 1, 0), (1,), data(b"12345678"))),
        "type 'V8'",
    ),
    "an array of a type that is code": (
        pickled(call(name("numpy", "dtype"), "f4,(1000,1000,1000)f8")),
        "which is not read",
    ),
    "an array of text": (pickled(array_of(dtype_of("U4"), (1,), data(b"\xff" * 16))), "which is not read"),
    "an array of another class": (
        pickled(call(name("numpy._core.multiarray", "_reconstruct"), name("a", "B"), (0,), data(b"b"))),
        "class that is none",
    ),
    "an object array of no list": (pickled(array_of(dtype_of("O8"), (1 << 40,), [1])), "no list"),
    # size, depth and shape of the tree
    "a list in itself": (pickled(LIST + ITSELF + pickle.APPEND), "contains itself"),
    "a dict in itself": (pickled(DICT + text("a") + ITSELF + pickle.SETITEM), "contains itself"),
    "a list in an instance in the list": (
        pickled(LIST + with_state(instance(name("a", "B")), {"x": ITSELF}) + pickle.APPEND),
        "contains itself",
    ),
    "billion laughs of lists": (pickled(laughs(b"](", b"", b"e")), "values"),
    "billion laughs of tuples": (pickled(laughs(b"", b"", pickle.TUPLE2)), "values"),
    "billion laughs of dicts": (pickled(laughs(b"}(" + ZERO, ONE, b"u")), "values"),
    "billion laughs as a key": (pickled(laughs(b"", b"", pickle.TUPLE2), b"}h\x28", ONE, pickle.SETITEM), "as a key"),
    "billion laughs in a set": (pickled(pickle.MARK, laughs(b"", b"", pickle.TUPLE2), pickle.FROZENSET), "as a key"),
    "100,000 lists deep": (pickled(b"]" * 100_000 + b"a" * 99_999), "deep"),
    "100,000 tuples deep": (pickled(b")" + pickle.TUPLE1 * 100_000), "deep"),
    "100,000 tuples deep as a key": (pickled(b"})" + pickle.TUPLE1 * 100_000 + b"Ns"), "as a key"),
    "90,000 dicts deep": (pickled(b"}" + (ZERO + b"}") * 90_000 + b"s" * 90_000), "deep"),
    "100,000 instances deep": (
        pickled(name("a", "B") + pickle.MEMOIZE + pickle.POP + (ITSELF + b")\x81") * 50_000 + b"b" * 49_999),
        "deep",
    ),
    "a list below as deep as allowed, shared": (
        pickled(b"]" * 200 + b"a" * 199 + pickle.MEMOIZE + b"]" * 200 + ITSELF + b"a" * 200 + pickle.TUPLE2),
        "deep",
    ),
    "two million marks": (pickled(b"(" * 2_000_000), "open at once"),
    "a tuple of three million values": (pickled(b"(" + b"N" * 3_000_000 + b"t"), "open at once"),
    "a flood of instructions": (pickled(b"N0" * 2_000_000), "than weights"),
    "a flood of values": (pickled(b"]" * 3_000_000), "open at once"),
    "a flood of sets in the memo": (pickled((b"\x8f" + pickle.MEMOIZE + b"0") * 1_000_000), "claims more data"),
    "a set copied a million times": (
        pickled(
            word([*range(2000)]) + pickle.MEMOIZE + b"0",
            (name("builtins", "set") + ITSELF + pickle.TUPLE1 + pickle.REDUCE) * 30_000,
        ),
        "more data than it has bytes",
    ),
    "an array made a thousand times of one text": (
        pickled(
            data(b"x" * (8 << 20)) + pickle.MEMOIZE + b"0",
            array_of(dtype_of("u1"), (8 << 20,), ITSELF) * 1000,
        ),
        "more data than it has bytes",
    ),
    "a storage loaded a thousand times": (
        pickled(
            data(torch_file(torch.zeros(1 << 20).untyped_storage(), archive=False)) + pickle.MEMOIZE + b"0",
            (name("torch.storage", "_load_from_bytes") + ITSELF + pickle.TUPLE1 + pickle.REDUCE) * 1000,
        ),
        "more data than it has bytes",
    ),
    "bytes outside an array": (pickled(data(b"x" * 100_000)), "holds a Span"),
    "an integer of 10 MB": (pickled(pickle.LONG4 + struct.pack("<i", 10 << 20) + b"\1" * (10 << 20)), "integer of"),
    "an integer of -1 bytes": (pickled(pickle.LONG4 + struct.pack("<i", -1)), "integer of"),
    "a text of 4 GB": (pickled(pickle.BINUNICODE + b"\xff\xff\xff\xff"), "text of"),
    "a text of 10 MB that is not there": (pickled(pickle.BINUNICODE + struct.pack("<I", 10 << 20)), "in the middle"),
    "bytes of 8 EB": (pickled(pickle.BINBYTES8 + b"\xff" * 7 + b"\x7f"), "in the middle"),
    "a frame of 8 EB": (pickled(pickle.FRAME + b"\xff" * 7 + b"\x7f"), "in the middle"),
    "a text that is none": (pickled(pickle.SHORT_BINUNICODE + b"\2\xff\xfe"), DAMAGED),
    "a list as a key": (pickled(b"}" + b"]" + b"Ns"), "list as a key"),
    "a float as a key": (pickled(b"}" + pickle.BINFLOAT + b"\0" * 8 + b"Ns"), "float as a key"),
    "a huge integer as a key": (pickled(b"}" + number(1 << 100) + b"Ns"), "int as a key"),
    "a tensor as a key": (pickled(b"}" + loaded(torch_file([1])) + b"Ns"), "no storage"),
    "a list in a set": (pickled(b"\x8f(]\x90"), "list as a key"),
    "a key without a value": (pickled(b"}(Nu"), "sets items"),
    # damage
    "nothing to take": (pickled(), DAMAGED),
    "no mark": (pickled(b"e"), DAMAGED),
    "no memo": (pickled(pickle.BINGET + b"\5"), DAMAGED),
    "nothing to remember": (pickled(pickle.MEMOIZE), DAMAGED),
    "too few for a tuple": (pickled(b"N" + pickle.TUPLE3), DAMAGED),
    "no such instruction": (pickled(b"\xff"), DAMAGED),
    "protocol 255": (b"\x80\x05\x80\xff.", "protocol 255"),
    "DUP": (pickled(b"N2"), "DUP"),
}
