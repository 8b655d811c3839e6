"""A pytest plugin: benchmarks with ``--bench-device cuda:0`` where there is no GPU.

Tensors are fake: they have a device, a shape and no values, and an op on tensors of two devices fails as it would on a GPU. The
ops run as plain PyTorch. Neither parity nor time is looked at, only that every call gives a tensor on the GPU.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sage_fast import _native


def pytest_configure(config: pytest.Config) -> None:
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "guard.so")
        command = ["c++", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder / 'include'}"]
        command += [str(Path(__file__).with_suffix(".cpp")), "-o", str(library), f"-L{torch_folder / 'lib'}", "-lc10"]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(library))


@pytest.fixture(autouse=True)
def on_a_fake_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    native = _native.load()
    monkeypatch.setattr(_native, "load", lambda: _native.Native(native.folder, ("cpu", "cuda")))
    monkeypatch.setattr(_native, "has_kernel", lambda op, device: False)
    compare = request.getfixturevalue("compare")
    monkeypatch.setattr(type(compare), "__call__", each_gives_a_tensor_on_the_gpu)
    with FakeTensorMode(allow_non_fake_inputs=True):  # the constants of a file are real
        yield


def each_gives_a_tensor_on_the_gpu(compare, case, ours, rivals, *_, **__) -> None:
    shape = ours().shape
    for name, call in {"ours": ours, **rivals}.items():
        if name == "kornia":
            continue  # looks at values
        result = call()
        assert result.device.type == "cuda" and result.shape == shape, f"{case}, {name}: {result.device} {result.shape}"
