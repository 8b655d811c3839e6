"""The oracle of flora: its targets are what can be seen, its scores are measured rightly, its files are checked."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sage_fast.data.flora import FACTORS, N_SEEN, categories, irrelevant_factors, render
from sage_fast.data.images import to_float
from sage_fast.errors import InputError
from sage_fast.evaluation import oracle as module
from sage_fast.evaluation.oracle import (
    TARGETS,
    Oracle,
    OracleConfig,
    factor_targets,
    load_oracle,
    measure_oracle,
    save_oracle,
    train_oracle,
)

TINY = OracleConfig(total_steps=4, batch=8, width=3, warmup=0, resolution=16, n_test=2, log_every=1, save_every=3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("oracle")
    train_oracle(TINY, folder)
    return folder


def many_factors(n: int = 6000) -> tuple[Tensor, Tensor]:
    ids = np.arange(n) % 240
    return torch.from_numpy(ids), torch.from_numpy(irrelevant_factors(ids, np.arange(n)))


def test_targets_fill_their_ranges_and_are_standardised() -> None:
    targets = factor_targets(*many_factors())
    low, high = torch.tensor(list(TARGETS.values())).T
    assert (targets >= low - 1e-6).all() and (targets <= high + 1e-6).all()
    assert ((targets.amax(0) - targets.amin(0)) > 0.9 * (high - low)).all()
    mean, scale = module._standard("cpu")
    standard = (targets - mean) / scale
    exact = torch.tensor([name != "size" for name in TARGETS])  # a product of two uniform numbers is not uniform
    assert standard.mean(0).abs().max() < 0.1
    assert (standard.std(0)[exact] - 1).abs().max() < 0.05 and 0.5 < standard.std(0)[~exact] < 1


def test_targets_are_the_factors_themselves_or_their_cosine_and_sine() -> None:
    ids, factors = many_factors(50)
    shown = dict(zip(TARGETS, factor_targets(ids, factors).T))
    value = dict(zip(FACTORS, factors.T))
    for name in ("tilt_x", "tilt_y", "x", "y", "brightness", "warmth", "background_light", "blur"):
        assert torch.equal(shown[name], value[name])
    angle = torch.atan2(shown["background_hue_sin"], shown["background_hue_cos"]) / (2 * math.pi)
    assert torch.allclose(angle.remainder(1), value["background_hue"], atol=1e-5)
    for name in ("light", "background_slope"):
        assert torch.allclose(
            torch.atan2(shown[f"{name}_sin"], shown[f"{name}_cos"]).remainder(2 * math.pi), value[name], atol=1e-5
        )


def test_a_turn_by_the_angle_between_petals_has_the_same_targets() -> None:
    ids, factors = many_factors(240)
    petals = torch.tensor([category.traits["petals"] for category in categories()])
    turned, half = factors.clone(), factors.clone()
    turned[:, 0] += 2 * math.pi / petals
    half[:, 0] += math.pi / petals
    assert torch.allclose(factor_targets(ids, turned), factor_targets(ids, factors), atol=1e-4)
    phase = factor_targets(ids, factors)[:, :2]
    assert torch.allclose(factor_targets(ids, half)[:, :2], -phase, atol=1e-4)


class Scripted:
    """Stands for an oracle that answers what it is told, in the order in which it is asked."""

    resolution = 16

    def __init__(self, predictions: Tensor, factors: Tensor) -> None:
        self.answers = {"predict": predictions, "factors": factors}

    def _next(self, name: str, n: int) -> Tensor:
        answer, self.answers[name] = self.answers[name][:n], self.answers[name][n:]
        return answer

    def predict(self, images: Tensor) -> Tensor:
        return self._next("predict", len(images))

    def factors(self, images: Tensor) -> Tensor:
        return self._next("factors", len(images))


def test_scores_are_right_for_known_answers() -> None:
    ids = torch.arange(240).repeat_interleave(3)
    indices = module._FIRST_TESTED + torch.arange(3).repeat(240)
    truth = factor_targets(ids, render(ids, indices, 16)[1])
    scores = measure_oracle(Scripted(ids.clone(), truth.clone()), 3)  # type: ignore[arg-type]
    assert scores["top1"] == scores["top1_seen"] == scores["top1_unseen"] == scores["top1_worst"] == 1
    assert scores["n_images"] == 720 and all(value == 1 for value in scores["r2"].values())

    wrong = ids.clone()
    wrong[3 * N_SEEN] = 0  # one image of the first unseen category
    halfway = truth.mean(0) + 0.5 * (truth - truth.mean(0))
    scores = measure_oracle(Scripted(wrong, halfway), 3)  # type: ignore[arg-type]
    assert scores["top1"] == round(719 / 720, 5) and scores["top1_unseen"] == round(119 / 120, 5)
    assert scores["top1_seen"] == 1 and scores["top1_worst"] == round(2 / 3, 5)
    assert all(abs(value - 0.75) < 1e-3 for value in scores["r2"].values())


def test_training_writes_what_it_returns(tiny: Path) -> None:
    oracle = load_oracle(tiny)
    assert not oracle.training and not any(p.requires_grad for p in oracle.parameters())
    about = json.loads((tiny / "oracle.json").read_text())
    assert about["scores"] == measure_oracle(oracle, TINY.n_test)
    assert about["training"]["total_steps"] == 4 and set(about["scores"]["r2"]) == set(TARGETS)
    for value in oracle.state_dict().values():
        if value.is_floating_point():
            assert torch.equal(value, value.half().float())  # what was measured is what is stored


def test_training_is_deterministic_and_moves(tiny: Path, tmp_path: Path) -> None:
    train_oracle(TINY, tmp_path)
    assert (tmp_path / "oracle.safetensors").read_bytes() == (tiny / "oracle.safetensors").read_bytes()
    fresh = module.seeded(TINY.seed, lambda: Oracle(16, 3))
    moved = dict(load_oracle(tiny).named_parameters())
    assert all((value.half() != moved[name]).any() for name, value in fresh.named_parameters())


def test_answers_agree_with_each_other_and_do_not_depend_on_the_batch(tiny: Path) -> None:
    oracle = load_oracle(tiny / "oracle.safetensors")
    images = to_float(render(torch.arange(300) % 240, torch.arange(300), 16)[0])
    logits, standard, features = oracle(images)
    assert torch.equal(oracle.predict(images), oracle.logits(images).argmax(1))
    assert torch.allclose(oracle.logits(images), logits, atol=1e-4)
    assert torch.allclose(oracle.features(images), features, atol=1e-4)
    assert torch.allclose(oracle.classifier.head(oracle.features(images)), logits, atol=1e-4)
    mean, scale = module._standard("cpu")
    assert torch.allclose((oracle.factors(images) - mean) / scale, standard, atol=1e-3)
    assert oracle.factors(images).shape == (300, len(TARGETS)) and oracle.predict(images[:0]).shape == (0,)
    with pytest.raises(InputError, match="oracle of their resolution"):
        oracle.predict(torch.zeros(1, 3, 32, 32))


def test_damaged_files_are_named(tiny: Path, tmp_path: Path) -> None:
    weights, about = (tiny / "oracle.safetensors").read_bytes(), (tiny / "oracle.json").read_text()
    flipped = weights[:-1] + bytes([weights[-1] ^ 1])
    for content, text, message in (
        (flipped, about, "SHA-256"),
        (weights[:100], about, "SHA-256"),
        (weights, about[:50], "no JSON"),
        (weights, about.replace("sage_fast.oracle", "other"), "no oracle"),
        (weights, about.replace('"version": 1', '"version": 2'), "no oracle"),
        (weights, about.replace('"tilt_x",', ""), "other targets"),
        (weights, about.replace('"width": 3', '"width": 4'), "do not fit"),
    ):
        (tmp_path / "oracle.safetensors").write_bytes(content)
        (tmp_path / "oracle.json").write_text(text)
        with pytest.raises(InputError, match=message):
            load_oracle(tmp_path)
    with pytest.raises(InputError, match="missing"):
        load_oracle(tmp_path / "nowhere")
    (tmp_path / "oracle.safetensors").unlink()
    (tmp_path / "oracle.json").write_text(about)
    with pytest.raises(InputError, match="No such file"):
        load_oracle(tmp_path)


def test_a_stored_oracle_of_the_default_size_is_small(tmp_path: Path) -> None:
    save_oracle(tmp_path / "oracle.safetensors", Oracle(), OracleConfig(), {})
    assert (tmp_path / "oracle.safetensors").stat().st_size <= 1_500_000
    assert load_oracle(tmp_path).resolution == 32


@pytest.mark.parametrize(
    "change", [{"resolution": 24}, {"resolution": 8}, {"n_test": 1}, {"factor_weight": -1.0}, {"batch": 1}]
)
def test_bad_settings_are_refused(change: dict) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        OracleConfig(**change)


def test_the_command_trains_and_reports_bad_input_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path / "o"), "--total-steps", "1", "--batch", "4", "--width", "3", "--n-test", "2"]
    assert module.main([*arguments, "--resolution", "16"]) == 0
    assert '"top1"' in capsys.readouterr().out and load_oracle(tmp_path / "o").resolution == 16
    assert module.main([*arguments, "--resolution", "16"]) == 2
    assert "already holds a checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        module.main([*arguments, "--resolution", "24"])
    assert stopped.value.code == 2 and "resolution must be a power of two" in capsys.readouterr().err


def test_the_shipped_oracle_knows_new_drawings() -> None:
    if not module._SHIPPED.exists():
        pytest.skip("no oracle is shipped with this checkout")
    oracle = load_oracle()
    scores = measure_oracle(oracle, 4)
    assert scores["top1"] >= 0.965  # 0.97 of many more images; 960 of them scatter by 0.005
    stored = json.loads(module._SHIPPED.with_suffix(".json").read_text())["scores"]
    assert stored["top1"] >= 0.97
    for name, value in stored["r2"].items():
        assert abs(scores["r2"][name] - value) < 0.1
