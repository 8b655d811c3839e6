"""Standard normal numbers that depend on a counter and on nothing else."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sage_fast import _native
from sage_fast.errors import InputError
from sage_fast.ops.inputs import require_tensor

__all__ = ["counter_normal", "counter_normal_reference", "counter_words"]


def counter_normal(samples: Tensor, seed: int, stream: int, numel: int) -> Tensor:
    """Standard normal numbers, a pure function of (seed, stream, sample, position).

    Philox4x32-10 ([Salmon et al. 2011], a block cipher of four words) encrypts the counter
    (position // 4, stream, sample) under the key ``seed``; Box and Muller make its words normal. So a sample's numbers
    depend neither on its batch nor on the order of calls; devices agree to 1e-6.

    Args:
        samples: int64 [N], the number of each sample, on the device of the result. Read on that device: a captured CUDA
            graph draws anew for whatever it holds at a replay.
        seed: any 64 bits.
        stream: which of the independent sequences of a sample, 0 to 2^32 - 1; a layer, say.
        numel: how many numbers a sample takes, at most 2^34.
    Returns:
        [N, numel] float32.
    Raises:
        InputError: samples of another form, or a number out of range.
    """
    require_tensor("samples", samples)
    if samples.ndim != 1 or samples.dtype != torch.int64:
        raise InputError(f"samples must be int64 [N], got {samples.dtype} {list(samples.shape)}.")
    for name, value in (("seed", seed), ("stream", stream), ("numel", numel)):
        if not isinstance(value, int):
            raise InputError(f"{name} must be an integer, got {value!r:.60}.")
    if not 0 <= stream < 2**32 or not 0 <= numel <= 2**34:
        raise InputError(f"stream must have 32 bits and numel be at most 2^34, got {stream} and {numel}.")
    seed = (seed + 2**63) % 2**64 - 2**63  # the same 64 bits, with a sign
    # on the CPU the op is the reference: as one op it can stand in a captured graph, where NumPy cannot
    on_cpu = samples.device.type == "cpu" and _native.has_schemas()
    if on_cpu or _native.has_kernel("counter_normal", samples.device.type):
        return torch.ops.sage_fast.counter_normal(samples, seed, stream, numel)
    return counter_normal_reference(samples, seed, stream, numel)


def counter_normal_reference(samples: Tensor, seed: int, stream: int, numel: int) -> Tensor:
    """The same in NumPy, float64 behind the words: the definition."""
    words = counter_words(samples.cpu().numpy(), seed, stream, (numel + 3) // 4)
    u, v = (words[..., 0::2] + 0.5) / 2**32, (words[..., 1::2] + 0.5) / 2**32  # [N, blocks, 2]
    radius = np.sqrt(-2 * np.log(u))
    pairs = np.stack([radius * np.cos(2 * np.pi * v), radius * np.sin(2 * np.pi * v)], axis=-1)
    return torch.from_numpy(pairs.reshape(len(words), 4 * words.shape[1])[:, :numel].astype(np.float32)).to(
        samples.device
    )


def counter_words(samples: np.ndarray, seed: int, stream: int, blocks: int) -> np.ndarray:
    """uint32 [N, blocks, 4]: Philox4x32-10 of the counters (block, stream, sample's two words) under the key ``seed``."""
    sample = samples.astype(np.int64).view(np.uint64)[:, None]
    counter = [np.arange(blocks, dtype=np.uint64)[None], np.uint64(stream), sample & _LOW, sample >> _HALF]
    words = philox(counter, seed % 2**64)
    return np.stack(np.broadcast_arrays(*words), axis=-1).astype(np.uint32)


_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(counter: list, key: int) -> list:
    """Four words (uint64 arrays below 2^32 that broadcast) encrypted under 64 bits of key by ten rounds."""
    a, b, c, d = counter
    key0, key1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        first, third = np.uint64(0xD2511F53) * a, np.uint64(0xCD9E8D57) * c
        a, b, c, d = (
            (third >> _HALF) ^ b ^ np.uint64(key0),
            third & _LOW,
            (first >> _HALF) ^ d ^ np.uint64(key1),
            first & _LOW,
        )
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return [a, b, c, d]


@_native.when_loaded
def _register() -> None:
    def fake(samples: Tensor, seed: int, stream: int, numel: int) -> Tensor:
        return samples.new_empty((samples.shape[0], numel), dtype=torch.float32)

    torch.library.register_fake("sage_fast::counter_normal", fake)
    torch.library.register_kernel("sage_fast::counter_normal", "cpu", counter_normal_reference)
