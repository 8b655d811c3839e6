"""A hash of 64-bit integers: random numbers that depend on what they are for, and on no library's random stream."""

from __future__ import annotations

import numpy as np

__all__ = ["splitmix64"]


def splitmix64(key: np.ndarray) -> np.ndarray:
    """A uint64 hash of each uint64 of ``key``, one to one (Steele, Lea & Flood 2014)."""
    z = key + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
