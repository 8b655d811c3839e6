"""Where each image of a plan stands, what may name a category, and which plan is more of another."""

from __future__ import annotations

import resource
import time
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest

from sage_fast.errors import InputError
from sage_fast.generation.plan import Part, Plan, Span, check_categories, check_grown


def part(category, n, first=0, **settings):
    return Part(category, first, n, (f"{category}/0.png",), ("0" * 64,), 0, "sage", 1.0, "none", **settings)


def plan(*parts, batch=4, shard=10):
    return Plan(Path("shots"), parts, batch, shard)


def test_shards_and_micro_batches_cover_every_image_once():
    made = plan(part("a", 7), part("b", 1), part("c", 30), part("a", 5, first=7))
    assert (len(made), made.n_shards, made.categories) == (43, 5, ["a", "b", "c"])
    seen = []
    for shard in range(made.n_shards):
        batches = made.batches(shard)
        assert [p for b in batches for p in b] == list(made.positions(shard))
        assert all(len(b) <= 4 for b in batches)
        seen += [(part.category, index) for b in batches for part, index in made.images(b)]
    assert seen == [(c, i) for c, n in (("a", 7), ("b", 1), ("c", 30)) for i in range(n)] + [
        ("a", i) for i in range(7, 12)
    ]


def test_a_micro_batch_holds_stretches_of_several_parts():
    made = plan(part("a", 7), part("b", 1), part("a", 5, first=7))
    assert made.spans(range(5, 10)) == [Span(0, 5, 2), Span(1, 0, 1), Span(2, 7, 2)]


def test_a_plan_is_read_back():
    made = plan(part("a", 7), replace(part("b", 2), n_similar=3, alpha=None))
    assert Plan.read({"plan": made.describe(), "shots_dir": "shots", "batch": 4, "shard": 10}) == made
    with pytest.raises(InputError, match="no plan"):
        Plan.read({"plan": [{"category": "a"}], "shots_dir": "x", "batch": 1, "shard": 1})


def test_ten_million_images_take_neither_time_nor_memory():
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    made = plan(*(part(f"c{i}", 100_000) for i in range(100)), batch=64, shard=512)
    last = made.positions(made.n_shards - 1)
    assert len(made) == 10**7 and made.spans(last)[-1].first + made.spans(last)[-1].n == 100_000
    assert time.monotonic() - start < 1 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "cannot be a folder's"),
        (".hidden", "cannot be a folder's"),
        ("..", "cannot be a folder's"),
        ("a/b", "cannot be a folder's"),
        ("a\\b", "cannot be a folder's"),
        ("a\nb", "cannot be a folder's"),
        ("a\0b", "cannot be a folder's"),
        ("ReadMe.md", "is that of a file or folder of our own"),
        ("x" * 300, "300 bytes long, at most 230"),
        ("é" * 120, "240 bytes long, at most 230"),
    ],
)
def test_names_that_cannot_be_folders(name, words):
    with pytest.raises(InputError, match=words) as error:
        check_categories(["rose", name])
    assert "\n" not in str(error.value)


ONE_FOLDER = [
    ("Rose", "rose"), ("Straße", "STRASSE"), ("é", unicodedata.normalize("NFD", "é")), ("rose ", "rose"), (" rose", "rose"),
    ("rose.", "rose"), ("rose . ", "Rose"), ("rose\u3000", "rose"), ("ro\u200bse", "rose"), ("\ufeffrose", "rose"),
    ("ro\u00adse\u200d ", "ROSE"),
]  # fmt: skip


@pytest.mark.parametrize("pair", ONE_FOLDER)
def test_names_that_are_one_folder_somewhere(pair):
    with pytest.raises(InputError, match="are one folder") as error:
        check_categories(pair)
    text = str(error.value)
    assert all(repr(name) in text for name in pair) and "\n" not in text and text.endswith("rename one of them.")


def test_names_of_any_language_pass():
    check_categories(
        ["St. John's wort", "薔薇", "роза", "a.b..c", "lily ", "x" * 230, "rose", "rose", "St. Johns wort"]
    )


def test_a_plan_may_grow_and_nothing_else():
    old = plan(part("a", 7), part("b", 3))
    check_grown(old, plan(part("b", 3), part("a", 9), part("c", 1)))
    for other, words in (
        (plan(part("a", 7)), "category 'b' was in the plan, is not"),
        (plan(part("a", 6), part("b", 3)), "n of 'a' was 7, is 6"),
        (plan(part("a", 7), replace(part("b", 3), seed=4)), "seed of 'b' was 0, is 4"),
        (plan(part("a", 7), replace(part("b", 3), hashes=("1" * 64,))), "shot 'b/0.png' is another image"),
    ):
        with pytest.raises(InputError, match=words):
            check_grown(old, other)
