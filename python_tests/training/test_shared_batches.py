"""Two ranks with half a batch each train as one with the whole of it: encoder and dictionary, in float64."""

from __future__ import annotations

import dataclasses

import pytest
import tiny_training
import torch
from rank_processes import finish, start_ranks
from tiny_training import CLASSIFIER, DICTIONARY, ENCODER, TUNED

from sage_fast.errors import InputError
from sage_fast.training.latent_critic import E4EConfig
from sage_fast.training.logs import read_log
from sage_fast.training.ranks import Ranks
from sage_fast.training.tuning import check_tunable

SHORT = {"total_steps": 20, "log_every": 1, "save_every": 20}
CASES = {
    "psp": ("encoder", dataclasses.replace(ENCODER, batch=8, perceptual_share=0.5, **SHORT)),
    "e4e": ("encoder", dataclasses.replace(ENCODER, batch=8, kind="e4e", e4e=E4EConfig(r1_every=2), **SHORT)),
    "restyle": ("encoder", dataclasses.replace(ENCODER, batch=8, kind="restyle", n_iterations=2, **SHORT)),
    "hyperstyle": ("encoder", dataclasses.replace(ENCODER, batch=8, kind="hyperstyle", n_iterations=2, **SHORT)),
    "tuned": ("encoder", dataclasses.replace(TUNED, batch=8, **SHORT)),
    "tuned e4e": ("encoder", dataclasses.replace(TUNED, batch=16, kind="e4e", tune_mapping=True, **SHORT)),
    "classifier": ("classifier", dataclasses.replace(CLASSIFIER, **SHORT)),
    "dictionary": ("dictionary", dataclasses.replace(DICTIONARY, **SHORT)),
}


def _losses(folder, stage):
    return {
        key: [line[key] for line in read_log(folder / f"logs/{stage}.jsonl") if key in line]
        for key in ("loss", "val_mse", "latent_d_loss", "g_loss", "d_loss", "top1")
    }


@pytest.mark.parametrize("case", list(CASES))
def test_losses_of_two_ranks_are_those_of_one(tmp_path, case):
    stage, config = CASES[case]
    children = []
    for world in (1, 2):
        children += start_ranks(
            tiny_training.train_with_ranks,
            world,
            tmp_path / f"words_{world}",
            stage,
            tmp_path / str(world),
            config,
            torch.float64,
        )
    finish(children)
    one, two = (_losses(tmp_path / str(world), stage) for world in (1, 2))
    assert len(one["loss"]) == 20 and one["loss"][0] != one["loss"][-1]
    for key in one:
        assert two[key] == pytest.approx(one[key], rel=1e-4), key


@pytest.mark.parametrize("case", ["tuned", "classifier"])
def test_weights_are_the_same_on_all_ranks(tmp_path, case):
    stage, config = CASES[case]
    finish(start_ranks(tiny_training.equal_on_all_ranks, 2, tmp_path, stage, tmp_path / "run", config))
    losses = _losses(tmp_path / "run", stage)["loss"]
    assert len(losses) == 20 and all(loss == loss for loss in losses)


def test_a_batch_that_ranks_cannot_share_is_refused(monkeypatch):
    G, D = tiny_training.networks()
    with pytest.raises(InputError, match="batch must be a multiple of 8 .*, got 4; give batch 8, or mbstd_group 2"):
        check_tunable(G, D, 4, Ranks(torch.device("cpu"), 0, 2))
    check_tunable(G, D, 8, Ranks(torch.device("cpu"), 1, 2))
    check_tunable(G, D, 6, Ranks(torch.device("cpu")))
