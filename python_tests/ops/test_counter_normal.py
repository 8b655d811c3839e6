"""Counter-based normals: Philox against its published vectors, the kernel's arithmetic against NumPy, and statistics."""

from __future__ import annotations

import ctypes

import kernels_on_host
import numpy as np
import pytest
import torch
from scipy import stats

from sage_fast.errors import InputError
from sage_fast.ops.counter_normal import counter_normal, counter_normal_reference, counter_words, philox

# counter, key, encrypted: the known answers that Salmon et al. publish with Random123 for philox4x32-10
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def pointer(x: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.ctypes.data)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_words(host_twin, counter, key, expected):
    assert [int(w) for w in philox([np.uint64(c) for c in counter], key[0] | key[1] << 32)] == expected
    out = np.zeros(4, np.uint32)
    host_twin.twin_philox(pointer(np.array(counter, np.uint32)), pointer(np.array(key, np.uint32)), pointer(out))
    assert out.tolist() == expected


@pytest.mark.parametrize(("seed", "stream", "sample"), [(0, 0, 0), (2**64 - 3, 17, 5), (12345, 2**32 - 1, 2**40 + 1)])
def test_the_kernels_arithmetic_gives_the_same_words_and_normals(host_twin, seed, stream, sample):
    blocks = 20_000
    words, normals = np.zeros((blocks, 4), np.uint32), np.zeros((blocks, 4), np.float32)
    arguments = (ctypes.c_uint64(seed), ctypes.c_uint32(stream), ctypes.c_uint64(sample), ctypes.c_int64(blocks))
    host_twin.twin_words(*arguments, pointer(words), pointer(normals))
    assert np.array_equal(words, counter_words(np.array([sample]), seed, stream, blocks)[0])
    expected = counter_normal(torch.tensor([sample]), seed, stream, 4 * blocks)[0]
    torch.testing.assert_close(torch.from_numpy(normals).flatten(), expected, atol=1e-6, rtol=0)


def test_the_cuda_kernel_gives_these_bits(host_twin):
    """Run on the host, where no compiler makes other products of the same lines."""
    kernels_on_host.load()
    samples, seed, stream, blocks = [5, 2**40 + 1], 2**63 - 9, 17, 300
    ours = torch.ops.sage_fast_on_host.counter_normal(torch.tensor(samples), seed, stream, 4 * blocks - 1)
    for sample, row in zip(samples, ours):
        words, normals = np.zeros((blocks, 4), np.uint32), np.zeros((blocks, 4), np.float32)
        arguments = (ctypes.c_uint64(seed), ctypes.c_uint32(stream), ctypes.c_uint64(sample), ctypes.c_int64(blocks))
        host_twin.twin_words(*arguments, pointer(words), pointer(normals))
        assert np.array_equal(row.numpy(), normals.flatten()[:-1])


def test_the_ends_of_the_range_keep_their_digits(host_twin):
    """Words near 0, near 2^32, around sqrt(1/2) and around each eighth of a turn."""
    centres = [0, 2**32 - 1, 0xB504F334, *(i << 29 for i in range(8)), *(1 << i for i in range(32))]
    words = np.unique([(c + d) % 2**32 for c in centres for d in range(-70, 70)]).astype(np.uint32)
    radius, cosine, sine = (np.zeros(len(words), np.float32) for _ in range(3))
    host_twin.twin_box_muller(pointer(words), ctypes.c_int64(len(words)), *map(pointer, (radius, cosine, sine)))
    u = (words.astype(np.float64) + 0.5) / 2**32
    np.testing.assert_allclose(radius, np.sqrt(-2 * np.log1p(u - 1)), atol=1e-9, rtol=3e-7)
    np.testing.assert_allclose(cosine, np.cos(2 * np.pi * u), atol=1.5e-7)
    np.testing.assert_allclose(sine, np.sin(2 * np.pi * u), atol=1.5e-7)


def test_a_sample_depends_on_its_number_alone():
    samples = torch.tensor([7, 0, 2**40, 7])
    together = counter_normal(samples, 3, 5, 101)
    assert torch.equal(together[0], together[3])
    for i in (0, 1, 2):
        assert torch.equal(counter_normal(samples[i : i + 1], 3, 5, 101)[0], together[i])
        assert torch.equal(counter_normal(samples[i : i + 1], 3, 5, 64)[0], together[i, :64])
    for seed, stream in ((4, 5), (3, 6), (3 + 2**32, 5)):
        assert not torch.isclose(counter_normal(samples, seed, stream, 101), together).any(1).all()


def test_normal_and_independent():
    x = counter_normal(torch.arange(4), 11, 2, 50_000).double()
    assert stats.kstest(x.flatten().numpy(), "norm").pvalue > 1e-3
    assert (torch.corrcoef(x) - torch.eye(4)).abs().max() < 0.025
    for lag in (1, 2, 3, 4):  # within a block and across
        assert abs((x[:, lag:] * x[:, :-lag]).mean()) < 0.01


def test_kernel_against_reference(device):
    for n, numel in ((1, 16), (3, 1001), (5, 4096), (0, 7), (2, 0)):
        samples = torch.arange(n, device=device) * 2**33 - 1
        ours, plain = (f(samples, -5, 3, numel) for f in (counter_normal, counter_normal_reference))
        assert ours.shape == (n, numel) and ours.device == samples.device
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=0)


def test_fake_kernel(device):
    args = (torch.arange(3, device=device), 1, 2, 10)
    torch.library.opcheck(torch.ops.sage_fast.counter_normal, args, test_utils=("test_schema", "test_faketensor"))


def test_bad_input():
    with pytest.raises(InputError, match=r"samples must be int64 \[N\]"):
        counter_normal(torch.zeros(3), 0, 0, 4)
    with pytest.raises(InputError, match="stream must have 32 bits"):
        counter_normal(torch.arange(3), 0, 2**32, 4)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_and_exported(device, dynamic):
    torch.compiler.reset()
    op = lambda samples: 2 * counter_normal(samples, -5, 3, 10)  # noqa: E731
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (3, 7):
        samples = torch.arange(n, device=device)
        assert torch.equal(compiled(samples), op(samples))

    class Draw(torch.nn.Module):
        def forward(self, samples: torch.Tensor) -> torch.Tensor:
            return op(samples)

    sizes = ({0: torch.export.Dim("n", min=2)},) if dynamic else None
    program = torch.export.export(Draw(), (torch.arange(4, device=device),), dynamic_shapes=sizes, strict=False)
    samples = torch.arange(9 if dynamic else 4, device=device)
    assert torch.equal(program.module()(samples), op(samples))
