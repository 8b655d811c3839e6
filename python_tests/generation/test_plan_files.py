"""Folders and files to plans, and one clear sentence for those that are none."""

from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path

import pytest

from sage_fast.errors import InputError, SageFastWarning
from sage_fast.generation.config import GenerateConfig
from sage_fast.generation.plan_files import read_plan


@pytest.fixture
def shots(tiny_shots, tmp_path):
    return Path(shutil.copytree(tiny_shots, tmp_path / "novel"))


def plan_of(file, shots_dir=None, **settings):
    return read_plan(file, shots_dir, GenerateConfig(**settings), 3, 8)


def brief(plan):
    return [(part.category, part.first, part.n, part.alpha, part.method, len(part.shots)) for part in plan.parts]


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_one_image_is_shots_too_and_spaces_of_a_table_do_not_count(shots):
    table = write(shots / "p.csv", "category, n, shots\nrose, 2, lily/0.png\n")
    assert brief(plan_of(table)) == [("rose", 0, 2, 1.0, "sage", 1)]
    empty = write(shots / "p.json", {"shots": None, "categories": [{"category": "rose"}]})
    assert plan_of(empty).root == shots


LINES = {
    "n": 4,
    "shots": "novel",
    "categories": [
        {"category": "rose", "alpha": 0.5},
        {"category": "lily", "n": 2, "method": "inversion"},
        {"category": "rose", "alpha": 2, "n": 3},
        {"category": "tulip", "shots": ["lily/0.png"]},
        {"category": "iris", "shots": "lily", "n_shots": 2},
    ],
}
EXPECTED = [
    ("rose", 0, 4, 0.5, "sage", 2),
    ("lily", 0, 2, None, "inversion", 3),
    ("rose", 4, 3, 2.0, "sage", 2),
    ("tulip", 0, 4, 1.0, "sage", 1),
    ("iris", 0, 4, 1.0, "sage", 2),
]


def test_json(shots, tmp_path):
    assert brief(plan_of(write(tmp_path / "plan.json", LINES))) == EXPECTED


def test_yaml(shots, tmp_path):
    yaml = pytest.importorskip("yaml")
    assert brief(plan_of(write(tmp_path / "plan.yaml", yaml.safe_dump(LINES)))) == EXPECTED


def test_csv_with_the_shots_elsewhere(shots, tmp_path):
    (tmp_path / "plans").mkdir()
    rows = "category,n,alpha,method,shots\nrose,4,0.5,,\nlily,2,,inversion,\nrose,3,2,,\niris,,,,lily\n"
    plan = plan_of(write(tmp_path / "plans" / "plan.csv", rows), shots, n=5)
    assert brief(plan) == [*EXPECTED[:3], ("iris", 0, 5, 1.0, "sage", 3)]


def test_shots_lie_beside_the_file_unless_it_says_otherwise(shots, tmp_path):
    plan = plan_of(write(shots / "plan.json", {"categories": [{"category": "rose"}]}), n=1)
    assert plan.root == shots and plan.parts[0].shots == ("rose/0.png", "rose/1.png")


def test_all_shots_are_relative_to_one_folder(shots, tmp_path):
    (tmp_path / "plans" / "novel").mkdir(parents=True)
    shutil.copytree(shots / "rose", tmp_path / "plans" / "rose")
    lines = {"categories": [{"category": "rose"}, {"category": "iris", "shots": ["rose/1.png"]}]}
    for content, given, root in (
        (lines, None, tmp_path / "plans"),
        (lines | {"shots": "../novel"}, None, tmp_path / "plans" / ".." / "novel"),
        (lines | {"shots": "nowhere"}, shots, shots),
    ):
        plan = plan_of(write(tmp_path / "plans" / "plan.json", content), given)
        assert plan.root == root
        assert [part.shots for part in plan.parts] == [("rose/0.png", "rose/1.png"), ("rose/1.png",)]


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_whole_numbers_name_categories_too(shots, tmp_path, kind):
    pytest.importorskip("yaml")
    (shots / "rose").rename(shots / "7")
    path = write(tmp_path / f"plan.{kind}", json.dumps({"shots": "novel", "categories": [{"category": 7, "n": 1}]}))
    assert brief(plan_of(path)) == [("7", 0, 1, 1.0, "sage", 2)]


def test_named_categories_with_counts(shots):
    plan = plan_of(None, shots, n=7, categories=("rose=2", "lily"))
    assert [(part.category, part.n) for part in plan.parts] == [("rose", 2), ("lily", 7)]
    for words, found in (
        ("tulip", "tulip.*choose among lily, rose"),
        ("rose=0", "n must be at least 1"),
        ("rose=x", "x"),
    ):
        with pytest.raises(InputError, match=found):
            plan_of(None, shots, categories=(words,))


def test_a_decomposed_name_is_composed(shots):
    (shots / "rose").rename(shots / unicodedata.normalize("NFD", "rosé"))
    assert plan_of(None, shots).parts[1].category == "rosé"
    (shots / "lily").rename(shots / "rosé")
    with pytest.raises(InputError, match="are one folder"):
        plan_of(None, shots)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.json", "{", "cannot be parsed"),
        ("p.json", "[1]", "must be a mapping"),
        ("p.json", {}, "must hold a list 'categories'"),
        ("p.json", {"categories": []}, "must hold a list 'categories'"),
        ("p.json", {"categories": ["rose"]}, "line 1 of its categories, must name a category"),
        ("p.json", {"categories": [{"category": "rose", "n": 0}]}, "line 1.*n must be at least 1, got 0"),
        ("p.json", {"categories": [{"category": "rose", "n": -3}]}, "n must be at least 1, got -3"),
        ("p.json", {"categories": [{"category": "rose", "n": "many"}]}, "n must be a whole number, got 'many'"),
        ("p.json", {"categories": [{"category": "rose", "n": 1.5}]}, "n must be a whole number, got 1.5"),
        ("p.json", {"categories": [{"category": "rose", "n": True}]}, "n must be a whole number"),
        ("p.json", {"categories": [{"category": "rose", "number": 3}]}, "no setting 'number'; choose among category"),
        ("p.json", {"categories": [{"category": "rose", "method": "magic"}]}, "method must be one of"),
        (
            "p.json",
            {"categories": [{"category": "tulip"}]},
            "which is not there; give 'shots', .* relative to '.*/novel'",
        ),
        ("p.json", {"shots": ["rose"], "categories": [{"category": "rose"}]}, "expected one folder"),
        ("p.json", {"categories": [{"category": "rose", "shots": {"a": "b"}}]}, "give a folder, an image or a list"),
        ("p.json", {"categories": ["rose"]}, "write it as 'category: NAME'"),
        ("p.json", "[" * 100_000, "cannot be parsed"),
        ("p.json", '{"n": 2, "categories": [{"category": "rose"}], "n": 3}', "'n' stands twice in one mapping"),
        ("p.yaml", "categories: [{category: rose, n: 2, n: 5}]", "'n' stands twice in one mapping"),
        ("p.csv", "category;n\nrose;3\n", "header must read category,n,... with commas"),
        ("p.json", {"categories": [{"category": True}]}, "must name a category, text or a whole number, got"),
        ("p.json", {"categories": [{"category": 7.5}]}, "must name a category, text or a whole number, got"),
        ("p.json", {"categories": [{"category": "rose", "shots": []}]}, "lists no shots"),
        ("p.json", {"categories": [{"category": "rose", "shots": ["gone.png"]}]}, "gone.png: no such file"),
        ("p.json", {"categories": [{"category": "rose"}, {"category": "rose"}]}, "stands twice"),
        ("p.json", {"categories": [{"category": "../novel/rose", "shots": "rose"}]}, "cannot be a folder's"),
        ("p.csv", "name,n\nrose,3\n", "must name a category"),
        ("p.csv", "category,n\nrose,3,4\n", "more columns than the header"),
        ("p.txt", "x", "must end in .yaml"),
        ("gone.json", None, "cannot be read"),
    ],
)
def test_plans_that_cannot_be_used(shots, tmp_path, name, content, words):
    path = shots / name
    if content is not None:
        write(path, content)
    with pytest.raises(InputError, match=words) as error:
        plan_of(path)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_yaml_that_is_damaged(tmp_path):
    pytest.importorskip("yaml")
    with pytest.raises(InputError, match="cannot be parsed"):
        plan_of(write(tmp_path / "p.yaml", "a: [b"))


def test_neither_folder_nor_file():
    with pytest.raises(InputError, match="needs --shots"):
        plan_of(None)


def test_a_category_without_a_readable_shot(shots):
    for number in range(60):
        shutil.copy(shots / "lily" / "0.png", shots / "lily" / f"more_{number}.png")
    (shots / "rose" / "0.png").write_bytes(b"no image")
    with pytest.warns(SageFastWarning, match="1 of 65 shots"):
        assert plan_of(None, shots).parts[1].shots == ("rose/1.png",)
    (shots / "rose" / "1.png").write_bytes(b"")
    with pytest.warns(SageFastWarning), pytest.raises(InputError, match="No image can be read of 'rose'"):
        plan_of(None, shots)


def test_a_folder_whose_name_starts_with_a_dot_is_named(shots):
    (shots / "rose").rename(shots / ".rose")
    with pytest.warns(SageFastWarning, match=r"start with a dot are passed over: \.rose; rename those"):
        assert brief(plan_of(None, shots)) == [("lily", 0, 128, 1.0, "sage", 3)]
