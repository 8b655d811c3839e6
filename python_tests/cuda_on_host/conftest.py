"""The library of the CUDA kernels on the host, and the ops routed to it."""

from __future__ import annotations

from collections.abc import Iterator

import kernels_on_host
import pytest


@pytest.fixture(scope="session")
def library() -> kernels_on_host.Library:
    return kernels_on_host.load()


@pytest.fixture
def routed(library: kernels_on_host.Library) -> Iterator[kernels_on_host.Library]:
    """During the test, ``sage_fast.ops`` take CPU tensors to the CUDA kernels."""
    with kernels_on_host.routed():
        yield library
