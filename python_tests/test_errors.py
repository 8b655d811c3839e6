"""Counts as sentences say them."""

from __future__ import annotations

import pytest

from sage_fast.errors import counted


@pytest.mark.parametrize(
    ("n", "noun", "said"),
    [
        (1, "image", "1 image"),
        (0, "shard", "0 shards"),
        (1, "category", "1 category"),
        (2, "category", "2 categories"),
        (1200, "rank", "1,200 ranks"),
    ],
)
def test_one_is_not_many(n, noun, said):
    assert counted(n, noun) == said
