"""Files of others, read as plain trees: against what wrote them, and against Python's own unpickler."""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pickle_words import (
    Persistent,
    call,
    importable,
    instance,
    module_state,
    name,
    persistent_pickle,
    pickled,
    torch_file,
    with_state,
)
from pickle_words import data as byte_word
from safetensors.torch import save_file
from torch import nn

from sage_fast.errors import InputError
from sage_fast.models.checkpoints import Global, Stub, read_checkpoint, state_dict_of, tensorflow_arrays_of

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="the folder of published checkpoints is not there")


@pytest.fixture()
def read(tmp_path):
    """Reads bytes as a file, and sees to its kind."""

    def read_bytes(data: bytes, container: str):
        path = tmp_path / "file"
        path.write_bytes(data)
        checkpoint = read_checkpoint(path)
        assert checkpoint.container == container
        return checkpoint.content

    return read_bytes


def same(a, b) -> bool:
    """Whether two trees are equal, tensors and arrays by type and bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


scalars = st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats(allow_nan=False) | st.text()
plain = st.recursive(
    scalars | st.binary(max_size=300) | st.sets(st.text(max_size=3)),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner, inner, inner),
    max_leaves=30,
)


@settings(deadline=None, max_examples=150)
@given(tree=plain, protocol=st.integers(2, pickle.HIGHEST_PROTOCOL))
def test_a_plain_tree_is_read_as_python_reads_it(tmp_path_factory, tree, protocol):
    path = tmp_path_factory.getbasetemp() / "plain.pkl"
    path.write_bytes(pickle.dumps([tree, tree], protocol=protocol))
    assert same(read_checkpoint(path).content, [tree, tree])


CHECKPOINT = {
    "g_ema": collections.OrderedDict(
        weight=torch.randn(3, 4), half=torch.randn(5).half(), bf16=torch.randn(2).bfloat16()
    ),
    "transposed": torch.randn(6, 4).T,
    "part": torch.arange(20)[3:17:2],
    "expanded": torch.randn(1, 8).expand(18, 8),
    "empty": torch.empty(0, 5),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "flags": torch.tensor([True, False]),
    "numbers": [1, -2, 1 << 80, 0.5, None, True],
    "parameter": nn.Parameter(torch.randn(2, 2)),
    "array": np.arange(12, dtype=np.float32).reshape(3, 4),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big_endian": np.arange(3, dtype=">i4"),
    "number": np.float64(1.25),
    "nothing": np.zeros((0, 3), np.float32),
}


def plain_checkpoint() -> dict:
    """The checkpoint as its plain tree."""
    big_endian = np.arange(3, dtype=np.int32)
    return {**CHECKPOINT, "parameter": CHECKPOINT["parameter"].detach(), "big_endian": big_endian, "number": 1.25}


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_torch_files(read, tmp_path, archive, protocol):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch on protocols
        torch.save(CHECKPOINT, tmp_path / "x", _use_new_zipfile_serialization=archive, pickle_protocol=protocol)
    content = (tmp_path / "x").read_bytes()
    if archive or protocol == 2:  # the older stream is told by its magic number, pickled by protocol 2
        assert same(read(content, "torch-zip" if archive else "torch-legacy"), plain_checkpoint())


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_with_tensors_and_arrays(read, protocol):
    assert same(read(pickle.dumps(CHECKPOINT, protocol=protocol), "pickle"), plain_checkpoint())


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_large_tensors(read, protocol):
    content = {"weights": torch.randn(1 << 20), "zeros": torch.zeros(1 << 18), "array": np.ones(1 << 18, np.float32)}
    assert same(read(pickle.dumps(content, protocol=protocol), "pickle"), content)


def test_tensors_that_share_memory_still_do(read):
    base = torch.randn(10)
    content = read(torch_file({"all": base, "part": base[2:5]}), "torch-zip")
    content["all"][3] = 7
    assert content["part"][1] == 7


def test_values_of_command_lines(read):
    args = argparse.Namespace(size=256, path=Path("a/b"), device=torch.device("cuda:1"), shape=torch.Size([2, 3]))
    counts = collections.defaultdict(list, {"a": [1]})
    content = read(torch_file({"args": args, "counts": counts, "dtype": torch.float16, "sets": {1, 2}}), "torch-zip")
    plain = {"size": 256, "path": "a/b", "device": "cuda:1", "shape": (2, 3)}
    assert content == {"args": plain, "counts": {"a": [1]}, "dtype": Global("torch", "float16"), "sets": {1, 2}}


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_paths_as_every_python_writes_them(read, module):
    """3.13 names a module of its own."""
    assert read(f"c{module}\nPosixPath\n(Va\nVb\ntR.".encode(), "pickle") == "a/b"


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b"(lp0\nI01\naI00\naI-7\naL123456789012345678901234567890L\naF-1.5e-3\naFinf\na.",
         [True, False, -7, 123456789012345678901234567890, -1.5e-3, float("inf")]),
        (b"(dp0\nS'a\\n\\x41\\''\np1\nVb\\u00e9\np2\nsg2\ng1\ns.", {"a\nA'": "b\xe9", "b\xe9": "a\nA'"}),
        (b"}q\x00(U\x01ak\x00U\x01bK\x07u.".replace(b"k\x00", b"N"), {"a": None, "b": 7}),
    ],
    ids=["numbers", "texts", "protocol 1"],
)  # fmt: skip
def test_lines_as_python_2_wrote_them(read, content, value):
    assert read(content, "pickle") == value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_easy_dict_is_a_dict(read, protocol):
    EasyDict = type("EasyDict", (dict,), {})
    with importable(dnnlib__util={"EasyDict": EasyDict}):
        content = pickle.dumps(EasyDict(a=1, b=EasyDict(c=2)), protocol=protocol)
    assert read(content, "pickle") == {"a": 1, "b": {"c": 2}}


def test_optimizer_states(read):
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert same(read(torch_file(optimizer.state_dict()), "torch-zip"), optimizer.state_dict())


class Block(nn.Module):
    """A module of a user's own, pickled whole."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1)
        self.layers = nn.Sequential(nn.BatchNorm2d(3), nn.LeakyReLU(0.2))
        self.activation = nn.functional.relu
        self.register_buffer("kernel", torch.ones(2))
        self.size = 256


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
def test_whole_modules_are_records(read, archive):
    block = Block()
    with importable(some__package={"Block": Block}):
        content = torch_file({"model": block}, archive)
    model = read(content, "torch-zip" if archive else "torch-legacy")["model"]
    assert type(model) is Stub and (model.module, model.name) == ("some.package", "Block")
    assert model.state["size"] == 256 and model.state["activation"] == Global("torch.nn.functional", "relu")
    states = state_dict_of(model)
    assert {**states} == {} or same({k: states[k] for k in block.state_dict()}, dict(block.state_dict()))
    assert set(states) == set(block.state_dict())


def test_persistent_networks_are_records_and_their_source_is_left_out(read):
    inner = Persistent("Layer", module_state({"weight": torch.randn(2, 3)}))
    network = Persistent(
        "Generator", module_state({"const": torch.randn(4)}, {"conv": inner}, _init_kwargs={"z_dim": 8})
    )
    record = read(persistent_pickle({"G_ema": network}), "pickle")["G_ema"]
    assert type(record) is Stub and record.name == "Generator" and record.state["_init_kwargs"] == {"z_dim": 8}
    assert same(state_dict_of(record), {"const": network.meta["state"]["_parameters"]["const"],
                                        "conv.weight": inner.meta["state"]["_parameters"]["weight"]})  # fmt: skip
    assert "SystemExit" not in repr(record)


class Network:
    """A TensorFlow network as dnnlib pickles it."""

    def __init__(self, **state) -> None:
        self.state = state

    def __getstate__(self):
        return self.state


def test_tensorflow_networks_are_records(read):
    def make():
        shared = {"version": 4, "build_module_src": "raise SystemExit", "build_func_name": "G_main"}
        mapping = Network(
            name="G_mapping", components={}, variables=[("Dense0/weight", np.eye(2, dtype=np.float32))], **shared
        )
        return Network(
            name="G",
            static_kwargs={"resolution": 64},
            components={"mapping": mapping},
            variables=[("dlatent_avg", np.ones(2, np.float32)), ("lod", np.float32(0))],
            **shared,
        )

    with importable(dnnlib__tflib__network={"Network": Network}):
        content = pickle.dumps((make(), make(), make()), protocol=4)
    networks = read(content, "pickle")
    assert len(networks) == 3 and networks[2].module == "dnnlib.tflib.network"
    arrays = tensorflow_arrays_of(networks[2])
    assert list(arrays) == ["dlatent_avg", "lod", "mapping/Dense0/weight"]
    assert np.array_equal(arrays["mapping/Dense0/weight"], np.eye(2)) and arrays["lod"] == 0


@pytest.mark.parametrize(
    "state",
    [
        None,
        {"x": 1},
        {**module_state({}), "_buffers": [1]},
        module_state({}, {"a": 1}),
        module_state({}, {"a": Stub("c", "D")}),
    ],
)
def test_what_is_no_network_says_so(state):
    record = Stub("a", "B", (), state)
    with pytest.raises(InputError, match="Record 'B' is no network"):
        state_dict_of(record)
    with pytest.raises(InputError, match="Record 'B' is no TensorFlow network"):
        tensorflow_arrays_of(record)


def test_pickles_of_python_2(read):
    """Text is bytes there, and an array's bytes are text."""
    dtype = with_state(call(name("numpy", "dtype"), "f4", 0, 1), (3, "<", None, None, None, -1, -1, 0))
    array = call(name("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray"), (0,), byte_word(b"b"))
    values = np.array([1.5, -2], np.float32)
    short = b"U" + bytes([values.nbytes]) + values.tobytes()
    ordered = call(b"ccollections\nOrderedDict\n", [["a", 1]])
    old = instance(b"c__builtin__\nset\n", ["x"])
    content = read(
        pickled(b"(", with_state(array, (1, (2,), dtype, False, short)), ordered, old, b"t", protocol=2), "pickle"
    )
    assert same(content[0], values) and content[1:] == (collections.OrderedDict(a=1), {"x"})


def test_tensors_of_the_newest_and_oldest_torch(read):
    base, kinds = torch.randn(4), torch.randn(2).to(torch.uint8)
    base.note = "an attribute makes torch write _rebuild_from_type_v2"
    content = read(torch_file({"a": base, "b": kinds}), "torch-zip")
    assert same(content, {"a": base.detach().clone(), "b": kinds})


def test_safetensors(tmp_path):
    tensors = {"b": torch.randn(3, 2), "a": torch.arange(4), "h": torch.randn(2).bfloat16()}
    save_file(tensors, tmp_path / "x.pt", metadata={"made_by": "tests"})
    checkpoint = read_checkpoint(tmp_path / "x.pt")
    assert (checkpoint.container, checkpoint.metadata) == ("safetensors", {"made_by": "tests"})
    assert all(same(checkpoint.content[key], tensors[key]) for key in tensors) and len(checkpoint.content) == 3


@pytest.mark.parametrize(
    "write", [lambda path, tensors: save_file(tensors, path), lambda path, tensors: torch.save(tensors, path)]
)
def test_the_file_may_change_once_it_is_read(tmp_path, write):
    write(tmp_path / "x", {"a": torch.ones(1 << 18)})
    content = read_checkpoint(tmp_path / "x").content
    os.truncate(tmp_path / "x", 0)
    assert content["a"].sum() == 1 << 18


def test_numpy_files(tmp_path):
    array = np.asfortranarray(np.arange(12.0).reshape(3, 4))
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "b.npz", x=array, y=np.int64(3))
    np.savez_compressed(tmp_path / "c.npz", x=array)
    assert same(read_checkpoint(tmp_path / "a.npy").content, array)
    assert same(read_checkpoint(tmp_path / "b.npz").content, {"x": array, "y": np.array(3)})
    checkpoint = read_checkpoint(tmp_path / "c.npz")
    assert checkpoint.container == "npz" and same(checkpoint.content, {"x": array})


@pytest.mark.parametrize("pack", [lambda value: value, lambda value: [value]], ids=["alone", "in a list"])
def test_a_pickled_dict_in_an_npy_file(tmp_path, pack):
    """As AGE keeps its distribution of codes."""
    value = {"mean": np.random.rand(2, 5), "mean_abs": np.random.rand(2, 5), "cov": np.random.rand(2, 5, 5), "n": 3}
    np.save(tmp_path / "n_distribution.npy", pack(value))
    assert same(read_checkpoint(tmp_path / "n_distribution.npy").content, pack(value))


@needs_fixtures
def test_the_published_files():
    pkl = read_checkpoint(FIXTURES / "stylegan2ada_32px_uncond.pkl")
    assert pkl.container == "pickle" and list(pkl.content) == ["G", "D", "G_ema", "augment_pipe", "training_set_kwargs"]
    states = state_dict_of(pkl.content["G_ema"])
    assert states["synthesis.b4.const"].shape == (32, 4, 4) and len(states) == 79
    expected = torch.load(FIXTURES / "rosinality_32px.pt", weights_only=True)
    assert same(read_checkpoint(FIXTURES / "rosinality_32px.pt").content, expected)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"^File '.*nothing.pkl' .*No such file.*\.$"):
        read_checkpoint(tmp_path / "nothing.pkl")


# memory and time


def peak_above_now(action) -> tuple[float, float]:
    """Largest resident memory above that of now, in bytes, and seconds, of an action. Read by a thread every millisecond."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    highest, done = resident(), threading.Event()
    start_memory = highest

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    kept = action()
    seconds = time.perf_counter() - start
    highest = max(highest, resident())
    done.set()
    watcher.join()
    del kept
    return highest - start_memory, seconds


def free_memory() -> int:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 0
    return next(
        int(line.split()[1]) << 10 for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable")
    )


def write_network(path: Path, n_bytes: int) -> int:
    """An NVLabs pickle of about so many bytes, in eight tensors (malloc keeps no freed block that large); its size."""
    layers = {
        f"b{i}": Persistent("Layer", module_state({"weight": torch.full((n_bytes // 32,), float(i))})) for i in range(8)
    }
    path.write_bytes(persistent_pickle({"G_ema": Persistent("Generator", module_state({}, layers))}))
    return path.stat().st_size


@pytest.mark.skipif(free_memory() < 1 << 28, reason="less than 256 MB of memory are free, or nothing tells")
def test_memory_of_a_pickle(tmp_path):
    size = write_network(tmp_path / "x.pkl", 48 << 20)
    peak, _ = peak_above_now(lambda: read_checkpoint(tmp_path / "x.pkl"))
    assert peak < 1.5 * size


@pytest.mark.skipif(free_memory() < 2 << 30, reason="less than 2 GB of memory are free, or nothing tells")
def test_memory_and_time_of_a_pickle_as_large_as_those_of_1024_px(tmp_path):
    size = write_network(tmp_path / "x.pkl", 364_000_000)
    times, peaks = [], []
    for _ in range(3):
        reading = peak_above_now(lambda: (tmp_path / "x.pkl").read_bytes())[1]
        peak, loading = peak_above_now(lambda: read_checkpoint(tmp_path / "x.pkl"))
        times.append((loading, reading))
        peaks.append(peak)
    assert max(peaks) < 2.2 * size
    assert min(loading / reading for loading, reading in times) < 2, times  # of a pair: other work passes by both


def test_the_same_elements_under_many_names_count_once(tmp_path):
    """HyperStyle's largest matrix stands under the names of all layers that share it: together they are larger than the file."""
    shared = torch.arange(2.0**18)
    torch.save({f"layer_{i}": shared.view(512, 512) for i in range(100)}, tmp_path / "a.pt")
    content = read_checkpoint(tmp_path / "a.pt").content
    assert len({tensor.data_ptr() for tensor in content.values()}) == 1 and content["layer_99"].equal(
        shared.view(512, 512)
    )
    torch.save({f"layer_{i}": shared.double() for i in range(2)}, tmp_path / "b.pt")
    assert read_checkpoint(tmp_path / "b.pt").content["layer_1"].equal(shared.double())
    halves = shared.half().view(512, 512)  # these would be copied to float32, each by itself
    torch.save({f"layer_{i}": halves.view(512, 512) for i in range(200)}, tmp_path / "c.pt")
    with pytest.raises(InputError, match="far larger than the file"):
        read_checkpoint(tmp_path / "c.pt")
