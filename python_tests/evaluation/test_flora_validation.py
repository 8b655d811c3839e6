"""Settings are compared on held-out seen categories: who is held out, and what the page shows."""

from __future__ import annotations

import json

import pytest
import torch

from sage_fast.data.latent_table import LatentTable
from sage_fast.errors import InputError
from sage_fast.evaluation import flora_validation
from sage_fast.evaluation.flora_validation import FloraValidationConfig, hold_out, main


def test_held_out_categories_leave_no_code_behind():
    labels = torch.arange(5).repeat_interleave(3)
    table = LatentTable(labels.view(-1, 1, 1).float(), labels, list("abcde"))
    kept, names = hold_out(table, 2, seed=3)
    assert len(names) == 2 and sorted(names + kept.categories) == list("abcde")
    for row, label in zip(kept.w_plus.flatten().tolist(), kept.labels.tolist(), strict=True):
        assert "abcde"[int(row)] == kept.categories[label]
    assert len(kept) == 9 and kept.labels.unique().tolist() == [0, 1, 2]
    assert hold_out(table, 2, seed=3)[1] == names


def test_one_setting_changes_at_a_time():
    config = FloraValidationConfig(n_components=(3, 2), n_similar=(4, 2), n_directions=(5,))
    settings = flora_validation._settings(config)
    base = {"n_components": 3, "n_similar": 4, "n_directions": 5}
    assert ("sage", "sage", base) in settings and ("age", "age", {}) in settings
    assert ("sage-q", "sage-q", {"n_components": 3}) in settings
    for name, method, options in settings:
        if method == "sage":
            changed = {key for key, value in options.items() if base.get(key) != value}
            assert len(changed) == (name != "sage"), name


def test_what_cannot_be_measured_is_refused_at_once(tiny_bundle, tmp_path, capsys):
    for name in ("alphas", "methods", "n_components", "n_similar", "n_directions"):
        with pytest.raises(InputError, match=f"{name} must hold at least one value"):
            FloraValidationConfig(**{name: ()})
    assert main(["--model", str(tiny_bundle), "--out", str(tmp_path / "page")]) == 2
    assert "trained on flora" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_the_command_measures_every_setting_and_prints_the_page(tmp_path, capsys):
    words = ["--n-categories", "2", "--n", "2", "--n-shots", "1", "--alphas", "1", "2", "--methods", "sage", "age"]
    words += ["--n-components", "40", "--n-similar", "20", "--n-directions", "16"]
    assert main([*words, "--out", str(tmp_path / "new" / "page.md")]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(tmp_path / "new" / "page.md") and "sage, diagonal: " in printed.err
    rows = json.loads((tmp_path / "new" / "page.json").read_text())
    assert len(rows["sage"]) == len(rows["age"]) == 2 and len(rows["inversion"]) == 1
    assert "against 'sage'" in (tmp_path / "new" / "page.md").read_text(encoding="utf-8")
