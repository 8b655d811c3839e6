"""The example that trains a classifier with generated images runs, with timm where it is installed."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
import train_with_generated

from sage_fast.errors import InputError


def arguments(bundle, shots, *more):
    folders = ["--real", str(shots), "--shots", str(shots), "--model", str(bundle)]
    return [*folders, "--net", "test_resnet", "--epochs", "2", "--batch", "2", "--ratio", "0.6", *more]


@pytest.mark.parametrize("workers", [0, 2])
def test_it_trains_on_real_and_generated_images(tiny_bundle, tiny_shots, capsys, workers):
    losses = train_with_generated.main(arguments(tiny_bundle, tiny_shots, "--workers", str(workers)))
    assert len(losses) == 2 and np.isfinite(losses).all()
    printed = capsys.readouterr().out
    assert "epoch 1: loss" in printed and "over 13 samples, 8 generated" in printed
    assert ("timm is not installed" in printed) == (find_spec("timm") is None)


def test_without_timm_it_says_so_and_trains(tiny_bundle, tiny_shots, capsys, monkeypatch):
    monkeypatch.setattr(train_with_generated, "find_spec", lambda name: None)
    losses = train_with_generated.main(arguments(tiny_bundle, tiny_shots, "--workers", "0", "--lr", "0.1"))
    assert np.isfinite(losses).all()
    assert "timm is not installed" in capsys.readouterr().out


def test_a_batch_of_more_than_all_samples_is_refused(tiny_bundle, tiny_shots, monkeypatch):
    def of_whole_batches(dataset, net, n_classes, size, batch, workers, seed):
        return torch.nn.Linear(1, n_classes), torch.utils.data.DataLoader(dataset, batch, drop_last=True)

    monkeypatch.setattr(train_with_generated, "network_and_loader", of_whole_batches)
    with pytest.raises(InputError, match="--batch must be at most the 13 samples of an epoch, got 64"):
        train_with_generated.main([*arguments(tiny_bundle, tiny_shots), "--batch", "64"])
