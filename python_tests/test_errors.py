"""Counts and reasons as sentences say them."""

from __future__ import annotations

import pytest

from sage_fast.errors import counted, reason_of


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


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("name"), "no 'name'"),
        (KeyError(), "KeyError"),
        (OSError(28, "No space left on device", "file"), "No space left on device"),
        (OSError("cannot read\n  the file."), "cannot read the file"),
        (ValueError("Too long. And more of it."), "Too long"),
        (EOFError(), "EOFError"),
    ],
)
def test_a_reason_is_a_few_words_on_one_line(error, said):
    assert reason_of(error) == said
