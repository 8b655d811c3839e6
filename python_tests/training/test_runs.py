"""The list of runs below a folder: what it says of each stage, and what it passes over."""

from __future__ import annotations

import json
import os

import pytest
import torch
from run_programs import ToyConfig, train_toy

from sage_fast import cli
from sage_fast.errors import InputError
from sage_fast.training.runs import as_json, find_runs


def _stage(run, stage, config, lines, size=0):
    for name in ("configs", "logs", "checkpoints"):
        (run / name).mkdir(parents=True, exist_ok=True)
    (run / "configs" / f"{stage}.json").write_text(json.dumps(config))
    (run / "logs" / f"{stage}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "checkpoints" / f"{stage}.pt").write_bytes(bytes(size))


@pytest.fixture
def runs(tmp_path):
    """Two runs, one of them two folders down and with two stages; and folders that are none."""
    gan = [{"step": 50 * i, "kimg": i, "g_loss": 1.0 / i, "seconds": 60.0, "time": 1000.0 + i} for i in (1, 2)]
    gan += [
        {"step": 100, "fd_oracle": 9.0, "precision_oracle": 0.5},
        {"step": 110, "fd_oracle": 7.0, "precision_oracle": 0.4},
    ]
    encoder = [{"step": 1, "loss": 3.0, "lr": 0.1, "val_mse": 0.5, "seconds": 5.0, "time": 2000.0}]
    encoder += [{"step": 2, "loss": float("nan"), "val_mse": float("nan"), "seconds": 5.0, "time": 2005.0}]
    _stage(tmp_path / "deep" / "a", "gan", {"total_kimg": 2.0, "batch": 4}, gan, 1000)
    _stage(tmp_path / "deep" / "a", "encoder", {"total_steps": 10}, encoder)
    (tmp_path / "deep" / "a" / "configs" / "lineage.json").write_text("{}")
    (tmp_path / "deep" / "a" / "configs" / "torn.json").write_text("{")
    _stage(tmp_path / "b", "dictionary", {"source": "x"}, [])
    (tmp_path / "configs_only" / "configs").mkdir(parents=True)
    os.symlink(tmp_path / "b", tmp_path / "link")
    return tmp_path


def test_what_is_said_of_a_stage(runs):
    b, gan, encoder = find_runs(runs)
    assert (b.run, b.stage, b.step, b.total, b.last, b.time) == ("b", "dictionary", 0, None, {}, None)
    assert (gan.run, gan.stage, gan.step, gan.total) == ("deep/a", "gan", 110, 500)
    assert gan.last == {"g_loss": 0.5} and gan.best == {"fd_oracle": 7.0, "precision_oracle": 0.5}
    assert (gan.seconds, gan.time, gan.size) == (120.0, 1002.0, 1000)
    assert encoder.stage == "encoder" and encoder.last == {"loss": None} and encoder.best == {"val_mse": 0.5}
    assert [stage.run for stage in find_runs(runs / "b")] == ["."]


def test_links_of_one_file_count_once(tmp_path):
    train_toy(ToyConfig(total_steps=6), tmp_path)  # steps 3 and 6; the better of them has two names
    (stage,) = find_runs(tmp_path)
    files = {path.stat().st_ino: path.stat().st_size for path in (tmp_path / "checkpoints").iterdir()}
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3 and len(files) == 2
    assert stage.size == sum(files.values()) and (stage.step, stage.total) == (6, 6)


def test_for_programs_and_for_people(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["runs", str(runs), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed == json.loads(as_json(find_runs(runs))) and listed[1]["best"]["fd_oracle"] == 7.0
    assert cli.main(["runs", str(runs)]) == 0
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if "gan" in line)
    for word in ("deep/a", "110 / 500", "g_loss 0.5", "fd_oracle 7", "0:02", "0.0 MB"):
        assert word in row, row
    assert "loss not finite" in text and "0 / ?" in text and "h:mm" in text.splitlines()[0]


def test_no_runs(tmp_path, capsys):
    assert find_runs(tmp_path) == [] and cli.main(["runs", str(tmp_path)]) == 0
    assert "No runs lie in" in capsys.readouterr().out
    with pytest.raises(InputError, match="is no folder; give the one that the runs lie in"):
        find_runs(tmp_path / "nowhere")


def test_nothing_is_loaded(runs, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a checkpoint was loaded"))
    assert len(find_runs(runs)) == 3
