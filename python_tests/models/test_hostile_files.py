"""Files made to do harm: each is refused by one sentence, with no side effect, in little time and memory.

They are read in a process of their own, whose memory is capped and whose imports are watched.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile_containers import HOSTILE_FILES
from hostile_pickles import CANARY, HOSTILE, PICKLES, SYSTEM, TOUCH
from pickle_words import Persistent, module_state, persistent_pickle, torch_file
from safetensors.torch import save as safetensors_bytes

from sage_fast.errors import InputError
from sage_fast.models.checkpoints import Stub, read_checkpoint, state_dict_of
from sage_fast.models.inspection import describe
from sage_fast.models.pickled_values import LEAVES

SECONDS, BYTES = 1.0, 1 << 30

WORKER = """
import encodings.cp437, json, resource, sys, time
import torch
from sage_fast.models.checkpoints import read_checkpoint
from sage_fast.models.inspection import describe

def kib(field):
    lines = open("/proc/self/status").read().splitlines() if sys.platform == "linux" else []
    return next((int(line.split()[1]) for line in lines if line.startswith(field)), 0)

try:
    read_checkpoint(sys.argv[1])  # whatever is imported late is there afterwards
except ValueError:
    pass
cap = kib("VmSize:") * 1024 + (2 << 30)
if kib("VmSize:"):
    resource.setrlimit(resource.RLIMIT_AS, (cap, cap))
for line in sys.stdin:
    modules, before, start = set(sys.modules), kib("VmHWM:"), time.process_time()
    try:
        checkpoint = read_checkpoint(json.loads(line))
        describe(checkpoint)
        answer = {"kind": "read", "message": checkpoint.container}
    except Exception as error:
        answer = {"kind": type(error).__name__, "message": str(error)}
    answer["seconds"] = time.process_time() - start
    answer["bytes"] = (kib("VmHWM:") - before) * 1024
    answer["imported"] = sorted(set(sys.modules) - modules)
    print(json.dumps(answer), flush=True)
"""


class Reader:
    """The reading process: asked by path, it answers what came of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        first = folder / "first"
        first.write_bytes(torch_file({"a": torch.zeros(1)}))
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", WORKER, str(first)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=env
        )

    def ask(self, path: Path) -> dict:
        self.process.stdin.write(json.dumps(str(path)) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    reader = Reader(tmp_path_factory.mktemp("hostile"))
    yield reader
    reader.process.stdin.close()
    reader.process.wait(10)


def refused(reader: Reader, path: Path, reason: str) -> None:
    """Sees to it that the file is refused for that reason, and that nothing else happened."""
    files = set(os.listdir(reader.folder))
    answer = reader.ask(path)
    message = answer["message"]
    assert answer["kind"] == "InputError", answer
    assert message.startswith(f"File {str(path)!r} ") and message.endswith(".") and ". " not in message
    assert reason in message and "\n" not in message
    assert answer["seconds"] < SECONDS and answer["bytes"] < BYTES
    assert set(os.listdir(reader.folder)) == files and not answer["imported"]


ALL_FILES = {**{f"pickle: {what}": case for what, case in PICKLES.items()}, **HOSTILE_FILES}


@pytest.mark.parametrize("what", ALL_FILES)
def test_a_hostile_file_is_refused(reader, tmp_path, what):
    content, reason = ALL_FILES[what]
    path = tmp_path / "file.pkl"
    path.write_bytes(content)
    refused(reader, path, reason)


def test_source_text_in_an_nvlabs_pickle_does_not_run(reader, tmp_path):
    network = Persistent("Generator", module_state({"const": torch.ones(2)}), source=TOUCH)
    path = tmp_path / "network.pkl"
    path.write_bytes(persistent_pickle({"G_ema": network}))
    answer = reader.ask(path)
    assert (answer["kind"], answer["message"]) == ("read", "pickle") and not answer["imported"]
    assert not (reader.folder / CANARY).exists()
    assert torch.equal(state_dict_of(read_checkpoint(path).content["G_ema"])["const"], torch.ones(2))


def test_the_canary_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(HOSTILE)
    assert (tmp_path / CANARY).exists()


def test_a_folder_is_refused(reader, tmp_path):
    refused(reader, tmp_path, "is a directory")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
def test_a_pipe_is_refused_and_not_waited_for(reader, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(reader, tmp_path / "pipe", "is no regular file")


def small_files() -> dict[str, bytes]:
    """A valid file of each kind."""
    weights = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(3).half()}
    tree = {"g_ema": weights, "args": argparse.Namespace(size=32), "array": np.arange(6.0), "n": [1, 2.5, None, "x"]}
    layer = Persistent("Layer", module_state(weights, _init_kwargs={"z_dim": 4}))
    arrays, npy_file, object_file = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez_compressed(arrays, x=np.arange(5.0), y=np.eye(3, dtype=np.float32))
    np.save(npy_file, np.arange(40, dtype=np.int32))
    np.save(object_file, {"mean": np.arange(20.0), "n": 3})
    return {
        "archive": torch_file(tree),
        "stream": torch_file(tree, archive=False),
        "pickle": persistent_pickle({"G": Persistent("Generator", module_state(weights, {"l": layer})), **tree}),
        "pickle of protocol 2": pickle.dumps(tree, protocol=2),
        "module": torch_file(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))),
        "safetensors": safetensors_bytes(weights, {"made_by": "tests"}),
        "npz": arrays.getvalue(),
        "npy": npy_file.getvalue(),
        "npy of objects": object_file.getvalue(),
    }


FILES = small_files()


@pytest.mark.parametrize("kind", FILES)
def test_a_truncated_file_is_refused(reader, tmp_path, kind):
    path = tmp_path / "file.pt"
    for tenth in range(10):
        path.write_bytes(FILES[kind][: len(FILES[kind]) * tenth // 10])
        refused(reader, path, "")
    path.write_bytes(FILES[kind])
    assert reader.ask(path)["kind"] == "read"


PLAIN = (dict, collections.OrderedDict, list, tuple, set, frozenset, Stub, *LEAVES)


def plain_values(value) -> None:
    """Walks a tree as any caller would, and touches every element of it."""
    assert type(value) in PLAIN
    if isinstance(value, torch.Tensor):
        value.double().sum() if not value.is_complex() else value.sum()
    elif isinstance(value, np.ndarray):
        value.sum()
    elif isinstance(value, dict | list | tuple | set | frozenset):
        for child in value.values() if isinstance(value, dict) else value:
            plain_values(child)
    elif isinstance(value, Stub):
        plain_values(value.args)
        plain_values(value.state)


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The bytes with one to four places changed, put in, taken out, or repeated."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(data)), rng.randint(1, 8)
        change = rng.randrange(6)
        if change == 0:
            data[at] = rng.randrange(256)
        elif change == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif change == 2:
            data[at:at] = rng.choice(WORDS)
        elif change == 3 and len(data) > length:
            del data[at : at + length]
        elif change == 4:
            data[at:at] = data[at : at + length]
        else:
            data[at : at + 4] = struct.pack("<i", rng.choice(EXTREMES))
    return bytes(data)


WORDS = [bytes([code]) for code in b"NR()]}tbaeusQ0q\x81\x85\x86\x87\x88\x93\x94"] + [
    b"h\0",
    b"h\5",
    b"\x8c\2os",
    SYSTEM,
]
EXTREMES = [0, 1, -1, 127, 1 << 16, (1 << 31) - 1, -(1 << 31)]
N_MUTATIONS = int(os.environ.get("SAGE_FAST_MUTATIONS", 600))


@pytest.mark.parametrize("kind", FILES)
def test_mutations_are_read_or_refused(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    rng, path = random.Random(f"mutations of {kind}"), tmp_path / "file.pt"
    outcomes = collections.Counter()
    for _ in range(N_MUTATIONS):
        path.write_bytes(mutated(FILES[kind], rng))
        try:
            checkpoint = read_checkpoint(path)
        except InputError as error:
            assert str(error).endswith(".") and str(error).startswith(f"File {str(path)!r} ")
            outcomes["refused"] += 1
        else:
            plain_values(checkpoint.content)
            describe(checkpoint)
            outcomes["read"] += 1
    assert outcomes["refused"] > N_MUTATIONS // 10 and outcomes["read"] > 0, outcomes
    assert os.listdir(tmp_path) == ["file.pt"]
