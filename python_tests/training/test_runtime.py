"""Run folders: signals, resuming to the last bit, what is refused, and all of it with several ranks."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import run_programs
import torch
from rank_processes import finish, free_port, start_ranks
from run_programs import ToyConfig, train_toy

from sage_fast.errors import InputError, SageFastWarning, Stopped
from sage_fast.training import runtime
from sage_fast.training.checkpoints import read_state
from sage_fast.training.gan import GANConfig
from sage_fast.training.logs import read_log
from sage_fast.training.ranks import join_ranks
from sage_fast.training.runtime import Run, check_run_folder, open_run_folder

CONFIG = ToyConfig()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder and result of a run that nothing broke."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train_toy(CONFIG, folder)


def _log(folder):
    return [(line["step"], line["loss"]) for line in read_log(folder / "logs/toy.jsonl")]


def _at(step, do):
    return lambda now: do() if now == step else None


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")])
def test_a_signal_saves_at_the_end_of_the_step(tmp_path, whole, number, name):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped) as caught:
        train_toy(CONFIG, tmp_path, each_step=_at(4, lambda: os.kill(os.getpid(), number)))
    assert caught.value.signal == number and isinstance(caught.value, KeyboardInterrupt)
    assert str(caught.value) == (
        f"stage 'toy' was stopped by {name}; its checkpoint is of step 5, and the same command with --resume goes on from there."
    )
    assert signal.getsignal(signal.SIGINT) is before
    assert read_state(tmp_path / "checkpoints/toy.pt")["step"] == 5
    assert torch.equal(train_toy(CONFIG, tmp_path, resume=True), whole[1])
    assert _log(tmp_path) == _log(whole[0])


def test_a_loop_that_does_not_ask_when_to_save_still_stops(tmp_path):
    run = Run(tmp_path, "toy", CONFIG)
    with pytest.raises(Stopped, match="its checkpoint is of step 0"):
        for step in run.track(0, 5):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
    assert step == 2


def test_outside_the_main_thread_training_works_without_signals(tmp_path, whole):
    results = []
    thread = threading.Thread(target=lambda: results.append(train_toy(CONFIG, tmp_path)))
    thread.start()
    thread.join()
    assert torch.equal(results[0], whole[1])


def test_a_broken_run_continues_to_the_last_bit(tmp_path, whole):
    """An exception after step 7, whose lines the log has; the checkpoint is of step 6."""

    class Broken(Exception):
        pass

    def fail():
        raise Broken

    with pytest.raises(Broken):
        train_toy(CONFIG, tmp_path, each_step=_at(7, fail))
    assert len(_log(tmp_path)) == 7
    torch.manual_seed(99)
    assert torch.equal(train_toy(CONFIG, tmp_path, resume=True), whole[1])
    assert _log(tmp_path) == _log(whole[0])


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(tmp_path, whole):
    with pytest.raises(ZeroDivisionError):
        train_toy(CONFIG, tmp_path, each_step=_at(2, lambda: 1 / 0))
    assert len(_log(tmp_path)) == 2 and torch.equal(train_toy(CONFIG, tmp_path, resume=True), whole[1])
    assert _log(tmp_path) == _log(whole[0])


def test_a_checkpoint_holds_everything(whole):
    state = read_state(whole[0] / "checkpoints/toy.pt")
    assert state["config"] == dataclasses.asdict(CONFIG) and state["world"] == 1 and state["step"] == 8
    assert state["versions"]["torch"] == torch.__version__
    (mine,) = state["random"]
    assert {"torch", "numpy", "python", "generators"} <= set(mine) and set(mine["generators"]) == {"own"}
    kept = sorted(path.name for path in (whole[0] / "checkpoints").iterdir())
    assert kept == ["toy.pt", "toy_00000006.pt", "toy_best.pt"]
    best = read_state(whole[0] / "checkpoints/toy_best.pt")
    losses = dict(_log(whole[0]))
    assert best["step"] == min((3, 6, 8), key=losses.__getitem__) and best["best_score"] == state["best_score"]


def test_other_facts_are_refused_in_one_sentence(tmp_path):
    facts = {"data": {"images": 40, "names": "0a"}, "generator": {"resolution": 8}}
    train_toy(CONFIG, tmp_path, facts=facts)
    train_toy(CONFIG, tmp_path, resume=True, facts=facts)
    other = {"data": {"images": 41, "names": "0a"}, "generator": {"resolution": 16}}
    with pytest.raises(InputError) as caught:
        train_toy(CONFIG, tmp_path, resume=True, facts=other)
    assert str(caught.value) == (
        f"cannot resume stage 'toy' in {tmp_path}, which was begun with something else (data.images was 40, is 41, "
        "generator.resolution was 8, is 16); give what it was begun with, or another folder."
    )


def test_settings(tmp_path):
    train_toy(CONFIG, tmp_path)
    with pytest.raises(InputError, match="already holds a checkpoint of stage 'toy'; pass --resume"):
        train_toy(CONFIG, tmp_path)
    with pytest.raises(InputError, match=r"with other settings \(seed was 5, is 6\); use the old ones"):
        train_toy(dataclasses.replace(CONFIG, seed=6, lr=0.2), tmp_path, resume=True)
    assert json.loads((tmp_path / "configs/toy.json").read_text())["lr"] == 0.1
    train_toy(dataclasses.replace(CONFIG, total_steps=9, save_every=1, keep=5), tmp_path, resume=True)
    assert json.loads((tmp_path / "configs/toy.json").read_text())["keep"] == 5


def test_a_run_goes_on_with_another_learning_rate_and_says_so(tmp_path, whole, capsys):
    longer = dataclasses.replace(CONFIG, total_steps=9, lr=1e-12)
    train_toy(CONFIG, tmp_path)
    with pytest.raises(InputError) as caught:
        train_toy(dataclasses.replace(CONFIG, lr=0.2), tmp_path, resume=True)
    assert str(caught.value) == (
        f"stage 'toy' in {tmp_path} has taken all its 8 steps, which other settings (lr was 0.1, is 0.2) cannot change; use the "
        "old ones, or let it take more steps."
    )
    assert json.loads((tmp_path / "configs/toy.json").read_text())["lr"] == 0.1
    capsys.readouterr()
    torch.testing.assert_close(train_toy(longer, tmp_path, resume=True), whole[1], rtol=0, atol=1e-9)
    assert capsys.readouterr().out.splitlines()[0] == (
        "Stage 'toy' goes on from step 8 with other settings (lr was 0.1, is 1e-12): from here on it is not the run that it would "
        "have been."
    )
    train_toy(longer, tmp_path, resume=True)
    assert "other settings" not in capsys.readouterr().out


def test_float64_is_no_other_arithmetic_for_the_same_run(tmp_path):
    for before, after in (("float32", "float64"), ("float64", "float32")):
        folder = tmp_path / before
        Run(folder, "gan", GANConfig(precision=before)).load()
        (folder / "checkpoints/gan.pt").touch()
        with pytest.raises(InputError, match=f"precision was '{before}', is '{after}'"):
            Run(folder, "gan", GANConfig(precision=after), resume=True)
    Run(tmp_path / "float32", "gan", GANConfig(precision="bfloat16"), resume=True)


def test_a_checkpoint_of_before_has_no_facts_and_no_random_state(tmp_path, whole):
    train_toy(CONFIG, tmp_path)
    path = tmp_path / "checkpoints/toy.pt"
    old = {key: value for key, value in read_state(path).items() if key in ("w", "optim", "step")}
    torch.save(old, path)
    assert torch.equal(train_toy(CONFIG, tmp_path, resume=True, facts={"data": {"images": 1}}), whole[1])


def test_other_threads_or_versions_are_told_once(tmp_path, monkeypatch):
    train_toy(CONFIG, tmp_path)
    found = runtime.versions()
    monkeypatch.setattr(runtime, "versions", lambda: found | {"threads": 99, "torch": "9.9"})
    with pytest.warns(SageFastWarning) as seen:
        train_toy(dataclasses.replace(CONFIG, total_steps=9), tmp_path, resume=True)
    (warning,) = seen
    assert str(warning.message) == (
        "stage 'toy' goes on from step 8, but not to the last bit: it was begun with "
        f"torch {torch.__version__}, now 9.9; threads {found['threads']}, now 99."
    )


def test_a_restarted_process_empties_nothing(tmp_path, monkeypatch):
    alone = join_ranks()
    folder = open_run_folder(tmp_path / "run", alone)
    (folder / "configs").mkdir()
    with pytest.raises(InputError, match="is not empty"):
        check_run_folder(folder, alone)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for overwrite in (False, True):
        check_run_folder(folder, alone, overwrite=overwrite)
        assert open_run_folder(folder, alone, overwrite=overwrite) == folder and (folder / "configs").is_dir()
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    open_run_folder(folder, alone, overwrite=True)
    assert not (folder / "configs").exists()


def test_emptying_a_run_may_not_delete_the_model_that_it_begins_with(tmp_path):
    alone = join_ranks()
    folder = open_run_folder(tmp_path / "run", alone)
    for model in (folder, folder / "checkpoints" / "gan.pt"):
        with pytest.raises(InputError, match="holds the model"):
            check_run_folder(folder, alone, overwrite=True, models=[None, model])
    check_run_folder(folder, alone, overwrite=True, models=[tmp_path / "other"])


def test_tensorboard_on_request(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra 'logs' is not installed")
    train_toy(dataclasses.replace(CONFIG, tensorboard=True), tmp_path)
    assert [path.suffix for path in (tmp_path / "logs/toy").iterdir()] == [".tfevents"]


def test_tensorboard_that_is_not_installed_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="tensorboard is asked for and not installed"):
        train_toy(dataclasses.replace(CONFIG, tensorboard=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_remains_of_a_killed_write_are_removed(tmp_path):
    train_toy(CONFIG, tmp_path)
    (tmp_path / "checkpoints/.0011.sage_fast.tmp").touch()
    train_toy(CONFIG, tmp_path, resume=True)
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_two_ranks_stop_together_and_go_on_to_the_last_bit(tmp_path):
    """Each draws its own numbers, which are in the checkpoint; the signal reaches rank 1 alone."""
    for name, stop_rank in (("whole", -1), ("broken", 1), ("broken", -1)):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        children = start_ranks(
            run_programs.toy_of_ranks, 2, tmp_path / f"{name}_{stop_rank}", folder, folder, stop_rank
        )
        if stop_rank < 0:
            finish(children)
        else:
            assert [child.wait() for child in children] == [143, 143], children[0].text() + children[1].text()
            assert all("stopped by SIGTERM; its checkpoint is of step 5" in child.text() for child in children)
    results = [torch.load(tmp_path / name / f"w_{rank}.pt") for name in ("whole", "broken") for rank in (0, 1)]
    assert all(torch.equal(results[0], other) for other in results)
    assert _log(tmp_path / "whole") == _log(tmp_path / "broken")
    assert len(read_state(tmp_path / "whole/checkpoints/toy.pt")["random"]) == 2
    with pytest.warns(SageFastWarning, match="not to the last bit: it was begun with ranks 2, now 1"):
        train_toy(dataclasses.replace(CONFIG, total_steps=9), tmp_path / "whole", resume=True)


def test_ranks_must_share_the_folder(tmp_path):
    train_toy(CONFIG, tmp_path / "0")
    (tmp_path / "1").mkdir()
    children = start_ranks(run_programs.toy_in_folders_of_their_own, 2, tmp_path / "logs", tmp_path)
    assert [child.wait() for child in children] == [2, 2]
    assert all("the ranks find different checkpoints" in child.text() for child in children)


def test_torchrun_restarts_from_the_checkpoint(tmp_path):
    """A rank is killed; torchrun starts both again, and they go on without a word of --resume."""
    path = os.pathsep.join([str(Path(run_programs.__file__).parent), *sys.path])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    command += [f"--master-port={free_port()}", run_programs.__file__, str(tmp_path)]
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert torch.load(tmp_path / "end.pt")["restarts"] == 1
    assert [step for step, _ in _log(tmp_path)] == list(range(1, 9))
