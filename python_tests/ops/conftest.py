"""What the tests of ops share: devices with kernels, memory layouts, and the rule for low precision."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import kernels_on_host
import pytest
import torch
from torch import Tensor

from sage_fast import _native

#: also CPU tensors through the CUDA kernels, which takes a few minutes: `make cuda-on-host`
ON_HOST = ["cuda_on_host"] if os.environ.get("SAGE_FAST_CUDA_ON_HOST") == "1" else []


@pytest.fixture(params=["cpu", "cuda", *ON_HOST])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """A device with kernels; the test is skipped, saying why, where there are none.

    On a GPU cuDNN would round float32 to the 10 bits of TF32, in the references too; not during a test.
    """
    native = _native.load()
    if request.param in ON_HOST:
        kernels_on_host.load()
        with kernels_on_host.routed():
            yield "cpu"
        return
    if request.param not in native.devices:
        pytest.skip(f"no kernels on '{request.param}': {native.reasons[request.param]}")
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield request.param
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def on_reference(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and for the rest of the test every op takes its plain-PyTorch road."""
    return lambda: monkeypatch.setattr(_native, "has_kernel", lambda op, device_type: False)


@pytest.fixture(params=["contiguous", "channels_last", "every_second", "transposed", "expanded"])
def laid_out(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    """A function that gives a tensor another memory layout; values may repeat but the shape stays."""

    def lay_out(x: Tensor) -> Tensor:
        if request.param == "channels_last":
            return x.movedim(1, -1).contiguous().movedim(-1, 1)
        if request.param == "every_second":
            wide = x.new_full((*x.shape, 2), float("nan"))
            wide[..., 0] = x
            return wide[..., 0]
        if request.param == "transposed":
            return x.transpose(-1, -2).contiguous().transpose(-1, -2)
        return x[:1].expand_as(x) if request.param == "expanded" else x.contiguous()

    return lay_out


@pytest.fixture
def same_bits_for_all_thread_counts() -> Iterator[Callable[[Callable[[], Tensor]], None]]:
    """A function that asserts that ``compute()`` gives the same bits on 1, 2 and 3 threads."""
    before = torch.get_num_threads()

    def check(compute: Callable[[], Tensor]) -> None:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(compute())
        assert all(torch.equal(results[0], other) for other in results[1:])

    yield check
    torch.set_num_threads(before)


@pytest.fixture
def no_worse_than_plain() -> Callable[[Tensor, Tensor, Tensor], None]:
    """A function that asserts the rule for low precision: at most twice the error of plain PyTorch in the same dtype."""

    def check(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
        assert ours.dtype == plain.dtype != exact.dtype
        error, allowed = ((y.double() - exact).abs().max() for y in (ours, plain))
        assert allowed > 0, "the plain form is exact: the rule says nothing here"
        assert error <= 2 * allowed, f"error {error:.3g}, plain PyTorch has {allowed:.3g}"

    return check


@pytest.fixture(scope="session")
def host_twin(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """What CUDA kernels take from headers that any compiler takes: counter-based words, the places of a patch: ``host_twin.cpp``."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    here, library = Path(__file__).parent, tmp_path_factory.mktemp("twin") / "host_twin.so"
    command = [compiler, "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    command += [f"-I{here.parents[1] / 'csrc'}", str(here / "host_twin.cpp"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return ctypes.CDLL(str(library))
