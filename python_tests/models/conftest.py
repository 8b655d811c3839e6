"""Both roads of a network."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sage_fast import _native


@pytest.fixture(params=[True, False], ids=["native", "reference"])
def native(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether the kernels are taken: the test runs once with them and once without."""
    if request.param:
        yield True
    else:
        with _native.without_kernels():
            yield False
