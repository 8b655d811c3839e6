"""What runs the CUDA kernels on the host: the rewriting, barriers, lanes, and that what a GPU leaves undefined is caught."""

from __future__ import annotations

import pytest
import torch
from kernels_on_host import CompileError, build, on_host

from sage_fast import _build

MISUSES = {
    "not all threads reach the barrier": 1,
    "a lane waits for others that never come": 2,
    "a lane has ended that others wait for": 3,
    "threads meet at the barriers": 4,
    "a write behind the end of a shared array of 32 bytes": 5,
    r"__trap\(\) at probe.cu": 6,
}


@pytest.fixture
def ops(library):
    return torch.ops.sage_fast_on_host


def test_launches_become_calls():
    got = on_host("  f<A, b<C, 4>><<<g(n, 1), dim3(k, 2), 0, s>>>(\n      x, {y});\nnext")
    assert (
        "::host_cuda::Config(g(n, 1), dim3(k, 2), 0, s), [&](auto... of) { f<A, b<C, 4>>(of...); }, \n      x, {y});\nnext"
        in got
    )
    assert '"f<A, b<C, 4>>"' in got and got.startswith("  ::sage_fast")


def test_shared_arrays_become_references_by_line():
    got = on_host("__shared__ Pack<T, 2> a[k][k + 1],\n    b[3], c;\nrest")
    for array in ("a_array = Pack<T, 2>[k][k + 1];", "b_array = Pack<T, 2>[3];", "c_array = Pack<T, 2>;"):
        assert f"using {array}" in got
    assert got.endswith("\nrest")
    got = on_host("extern __shared__ __align__(128) float memory[];")
    assert got.startswith("float* const memory = static_cast<float*>")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_shared_memory_and_barriers(library, ops, dtype):
    x = torch.arange(192).to(dtype)
    y = library.in_every_order(ops.probe_reverse, x, 3)
    assert torch.equal(y, x.view(2, 96).flip(1).flatten())


@pytest.mark.parametrize("barriers", [0, 1, 2])
def test_a_missing_barrier_is_caught(library, ops, barriers):
    """Before a read of what others write, and before a write of what others read."""
    with pytest.raises(AssertionError, match="other bits when threads run"):
        library.in_every_order(ops.probe_reverse, torch.arange(192.0), barriers)


def test_lanes(library, ops):
    y = library.in_every_order(ops.probe_lanes, torch.full((7 * 64,), -1.0)).view(7, 2, 32)
    i = torch.arange(64).view(2, 32)
    warp, half = i // 32 * 32, i // 16 * 16
    assert torch.equal(y[0], (warp + 5).float())
    assert torch.equal(y[1], (i ^ 6).float())
    assert torch.equal(y[2], torch.where(i + 3 < half + 16, i + 3, i).float())
    assert torch.equal(y[3], torch.where(i - 3 >= half, i - 3, i).float())
    assert [int(v) for v in y[4].unique()] == sorted(
        sum(1 << k for k in range(16) if (w + k) % 3 == 0) for w in (0, 32)
    )
    assert torch.equal(y[5, :, :8], (warp + 7)[:, :8].float()) and (y[5, :, 8:] == -1).all()
    assert torch.equal(y[6], i.flip(1).float())


@pytest.mark.parametrize("message", MISUSES)
def test_what_a_gpu_leaves_undefined_is_an_error(library, ops, message):
    if MISUSES[message] == 5 and _build._sanitize():
        pytest.skip("the sanitizer ends the process at it")
    with pytest.raises(RuntimeError, match=message):
        ops.probe_misuse(torch.zeros(64), MISUSES[message])
    assert ops.probe_misuse(torch.zeros(64), 0).isnan().all(), "shared memory that was never written is not a number"


def test_roundings_to_16_bits(ops):
    x = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 65504.0, 65520.0, 6e-8, 3e-8, torch.inf, torch.nan])])
    for half, dtype in ((True, torch.float16), (False, torch.bfloat16)):
        torch.testing.assert_close(ops.probe_round(x, half), x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_what_does_not_compile_is_told(library, tmp_path):
    (tmp_path / "bad.cu").write_text("__global__ void f() { __shared__ float a[2]; return a; }\n")
    with pytest.raises(CompileError, match=r"bad\.cu:1:.*error"):
        build(tmp_path / "out", [tmp_path / "bad.cu"])
