"""The flora table: comparison at equal diversity on made-up sweeps, and the whole command on a tiny model."""

from __future__ import annotations

import json

import pytest
import torch

from sage_fast.errors import InputError
from sage_fast.evaluation.flora_table import (
    FloraTableConfig,
    Row,
    flora_table,
    main,
    matched_retention,
    mean_difference,
    measure_rows,
)
from sage_fast.evaluation.oracle import Oracle, OracleConfig, save_oracle
from sage_fast.evaluation.protocol import Scores
from sage_fast.pipeline import FewShotPipeline


class ColourJudge:
    """Category from the mean colour; brightness as the only factor."""

    factor_names = ("brightness",)

    def predict(self, images):
        return 200 + (images.mean((1, 2, 3)) > 0).long()

    def features(self, images):
        return images.flatten(2)[:, :, ::9].flatten(1)

    def factors(self, images):
        return images.mean((1, 2, 3))[:, None]


def sweep(method, diversity_of, retention_of, alphas=(0.5, 1.0, 2.0, 4.0), preset="default"):
    """Rows whose diversity and retention (of three categories) are given functions of alpha."""
    rows = []
    for alpha in alphas:
        kept = tuple(retention_of(alpha, category) for category in range(3))
        mean = sum(kept) / 3
        x = diversity_of(alpha)
        scores = Scores(
            n_images=9, n_categories=3, network="oracle", retention=mean, retention_interval=(mean, mean),
            retention_by_category=kept, retention_real=1.0, frechet=1.0, kernel=0.1, diversity=x,
            diversity_relative=x / 8, spreads={"light": x / 4},
        )  # fmt: skip
        rows.append(Row(1, method, preset, alpha, "none", scores))
    return rows


def test_matched_retention_finds_the_known_difference_of_two_straight_curves():
    # AGE loses 0.2, the other 0.1 per unit of diversity, on either axis and whatever alpha means to each
    age = sweep("age", lambda a: a, lambda a, c: 1 - 0.2 * a)
    sage = sweep("sage", lambda a: 0.5 * a, lambda a, c: 1 - 0.05 * a)
    matches = matched_retention(age, sage)
    assert len(matches) == 5
    for match in matches:
        assert 0.5 < match.target < 2.0
        assert match.alphas == pytest.approx((match.target, 2 * match.target))
        assert match.retentions == pytest.approx((1 - 0.2 * match.target, 1 - 0.1 * match.target))
        assert match.difference == pytest.approx(0.1 * match.target)
    spread = matched_retention(age, sage, "spread")
    assert [m.target for m in spread] == pytest.approx([m.target / 4 for m in matches])
    assert [m.difference for m in spread] == pytest.approx([m.difference for m in matches])


def test_a_method_matched_with_itself_at_other_alphas_differs_by_nothing():
    age = sweep("age", lambda a: a, lambda a, c: 1 - 0.1 * a)
    other = sweep("age", lambda a: a, lambda a, c: 1 - 0.1 * a, alphas=(0.7, 1.3, 3.9))
    assert all(match.difference == pytest.approx(0, abs=1e-12) for match in matched_retention(age, other))


def test_the_interval_is_paired_over_categories():
    # categories differ much among themselves, but the methods differ by 0.1 in every one: the interval has no width
    level = (0.9, 0.5, 0.2)
    age = sweep("age", lambda a: a, lambda a, c: level[c])
    sage = sweep("sage", lambda a: a, lambda a, c: level[c] + 0.1)
    mean, (low, high) = mean_difference(matched_retention(age, sage))
    assert (mean, low, high) == pytest.approx((0.1, 0.1, 0.1))
    uneven = sweep("sage", lambda a: a, lambda a, c: level[c] + 0.3 * (c == 0))
    mean, (low, high) = mean_difference(matched_retention(age, uneven))
    assert mean == pytest.approx(0.1) and low == pytest.approx(0.0) and 0.2 < high <= 0.3 + 1e-9


def test_rows_in_any_order_and_a_sweep_that_turns_back_take_the_smallest_alpha():
    age = sweep("age", lambda a: a, lambda a, c: 1.0)
    turning = sweep("sage", lambda a: {0.5: 1.0, 1.0: 3.0, 2.0: 1.0, 4.0: 0.5}[a], lambda a, c: a / 4)
    for match in matched_retention(age, turning[::-1]):
        if match.target > 1:
            assert 0.5 <= match.alphas[1] <= 1.0


def test_sweeps_without_a_common_diversity_have_no_match():
    age = sweep("age", lambda a: 10 + a, lambda a, c: 0.5)
    assert matched_retention(age, sweep("sage", lambda a: a, lambda a, c: 0.5)) == []
    assert matched_retention(age, age[:1]) == []


@pytest.fixture(scope="module")
def small(tiny_bundle, tmp_path_factory):
    out = tmp_path_factory.mktemp("table") / "new" / "flora.md"
    config = FloraTableConfig(tiny_bundle, out, n=4, shots=(1, 2), alphas=(0.5, 2.0), n_categories=2, batch=4)
    said: list[str] = []
    path = flora_table(config, ColourJudge(), said.append)
    return config, path, json.loads(path.with_suffix(".json").read_text()), said


def test_the_table_has_every_row_it_promises(small):
    _, _, content, said = small
    for n_shots in (1, 2):
        names = [row["name"] for row in content["rows"] if row["n_shots"] == n_shots]
        sweeps = [f"{m}, α = {a}" for m in ("AGE", "SAGE-Q", "SAGE-I", "SAGE") for a in ("0.5", "1", "2")]
        presets = ["SAGE (paper), α = 0.5", "SAGE (paper), α = 2"]
        presets += [f"SAGE (released), α = {a}" for a in ("0.5", "1", "2")]  # its own alpha is added
        fused = [f"SAGE + {fusion}, α = 1" for fusion in ("pixel", "frequency", "both")]
        assert sorted(names) == sorted(["real drawings", "inversion", *sweeps, *presets, *fused])
    assert len(said) == 2 * 8
    assert {(m["n_shots"], m["method"]) for m in content["at_equal_diversity_to_age"]} == {
        (k, m) for k in (1, 2) for m in ("SAGE-Q", "SAGE-I", "SAGE", "SAGE (paper)", "SAGE (released)")
    }


def test_rows_say_what_they_must_of_a_model_that_never_saw_the_categories(small):
    rows = {(r["n_shots"], r["name"]): r["scores"] for r in small[2]["rows"]}
    assert rows[1, "real drawings"] == rows[2, "real drawings"]
    assert rows[1, "inversion"]["diversity"] == 0 and rows[2, "inversion"]["diversity"] > 0
    assert rows[1, "inversion"]["spread"] == 0
    assert rows[1, "AGE, α = 2"]["diversity"] > rows[1, "AGE, α = 0.5"]["diversity"] > 0
    # with six seen categories every one is similar and every direction is used: SAGE-I is AGE, SAGE-Q is SAGE
    names = ("SAGE", "SAGE (released)", "AGE", "SAGE + pixel", "SAGE + frequency", "SAGE + both")
    assert len({rows[1, f"{name}, α = 1"]["frechet"] for name in names}) == len(names)


def test_the_page_shows_every_main_row_and_no_path(small, tmp_path_factory):
    config, path, content, _ = small
    page = path.read_text(encoding="utf-8")
    assert path.name == "flora.md" and "## 1 given image\n" in page and "## 2 given images\n" in page
    for name in ("real drawings", "SAGE (released), α = 1", "SAGE + pixel, α = 1"):
        assert page.count(f"| {name} |") == 4  # scores and factors, for one and for two shots
    assert content["model"][:12] in page and str(config.model) not in page + json.dumps(content)


def test_another_batch_size_changes_the_table_by_rounding_alone(tiny_bundle):
    pipeline = FewShotPipeline.from_bundle(tiny_bundle)
    settings = {"model": tiny_bundle, "n": 3, "shots": (1,), "alphas": (2.0,), "n_categories": 2}
    one, other = (measure_rows(pipeline, ColourJudge(), FloraTableConfig(batch=b, **settings)) for b in (1, 64))
    for a, b in zip(one, other, strict=True):
        assert a.name == b.name
        assert a.scores.diversity == pytest.approx(b.scores.diversity, rel=2e-2, abs=1e-6)


def test_shots_reference_and_other_drawings_are_different_images(tiny_bundle, monkeypatch):
    asked = []

    def render(ids, indices, resolution):
        asked.append((int(ids[0]), set(indices.tolist())))
        rng = torch.Generator().manual_seed(int(indices[0]) + int(ids[0]))
        return torch.randint(256, (len(ids), 3, resolution, resolution), generator=rng, dtype=torch.uint8), None

    monkeypatch.setattr("sage_fast.data.flora.render", render)
    config = FloraTableConfig(tiny_bundle, n=5, shots=(3,), alphas=(2.0,), n_categories=2)
    measure_rows(FewShotPipeline.from_bundle(tiny_bundle), ColourJudge(), config)
    for category in (200, 201):
        sets = [indices for label, indices in asked if label == category]
        assert sorted(map(len, sets)) == [3, 5, 5]
        assert len(set.union(*sets)) == 13
    assert {label for label, _ in asked} == {200, 201}


@pytest.mark.parametrize(
    "wrong", [{"n": 1}, {"n_categories": 41}, {"n_categories": 1}, {"shots": ()}, {"alphas": (0.0,)}, {"batch": 0}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(InputError, match="must be"):
        FloraTableConfig(**wrong)


def test_a_missing_model_is_one_sentence_and_exit_code_2(tmp_path, capsys):
    assert main(["--model", str(tmp_path / "none"), "--out", str(tmp_path / "table")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_command_with_an_oracle_from_a_folder(tiny_bundle, tmp_path, capsys):
    oracles = {}
    for resolution in (8, 16):
        oracles[resolution] = tmp_path / f"oracle{resolution}"
        oracles[resolution].mkdir()
        save_oracle(oracles[resolution] / "oracle.safetensors", Oracle(resolution, 4), OracleConfig(), {})
    words = ["--model", str(tiny_bundle), "--out", str(tmp_path / "table"), "--n", "3", "--n-categories", "2"]
    words += ["--shots", "1", "--alphas", "2"]
    assert main([*words, "--oracle", str(oracles[16])]) == 2
    assert "use an oracle of their resolution" in capsys.readouterr().err
    assert not (tmp_path / "table.md").exists()
    assert main([*words, "--oracle", str(oracles[8])]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(tmp_path / "table.md") and "1 shot, SAGE + both: " in printed.err
    assert "petal phase" in (tmp_path / "table.md").read_text(encoding="utf-8")
