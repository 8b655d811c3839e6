"""Checkpoints: whole or absent, checked, the last and the best kept, and everything random put back."""

from __future__ import annotations

import errno
import os
import random

import numpy as np
import pytest
import torch

from sage_fast.data import writers
from sage_fast.errors import InputError, SageFastWarning
from sage_fast.training import checkpoints
from sage_fast.training.checkpoints import Checkpoints, random_state, read_state, set_random_state, versions

CPU = torch.device("cpu")


def _state(step):
    return {"step": step, "w": torch.full((1000,), float(step)), "about": {"name": "x", "sizes": [1, 2.5, None]}}


def _steps(kept, n, **arguments):
    for step in range(1, n + 1):
        kept.save(_state(step), **arguments)


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_is_loaded(tmp_path):
    assert Checkpoints(tmp_path, "gan").load() is None and Checkpoints(tmp_path, "gan").latest() is None
    Checkpoints(tmp_path, "gan").save(_state(7))
    state = Checkpoints(tmp_path, "gan").load()
    assert Checkpoints(tmp_path, "gan").latest() == tmp_path / "gan.pt"
    assert state["step"] == 7 and state["about"] == _state(7)["about"]
    assert torch.equal(state["w"], _state(7)["w"])
    assert torch.load(tmp_path / "gan.pt", weights_only=True)["step"] == 7  # by anybody who has torch


@pytest.mark.parametrize(("keep", "older"), [(1, []), (2, [4]), (3, [3, 4])])
def test_the_last_k_are_kept(tmp_path, keep, older):
    other = tmp_path / "gan_tuned_00000001.pt"
    other.touch()
    kept = Checkpoints(tmp_path, "gan", keep)
    _steps(kept, 3)
    kept = Checkpoints(tmp_path, "gan", keep)  # as a resumed run does
    assert kept.load()["step"] == 3
    for step in (4, 5):
        kept.save(_state(step))
    assert _names(tmp_path) == sorted(["gan.pt", other.name, *(f"gan_{step:08d}.pt" for step in older)])
    assert [read_state(tmp_path / f"gan_{step:08d}.pt")["step"] for step in older] == older


def test_the_best_is_kept(tmp_path):
    kept = Checkpoints(tmp_path, "gan", keep=1)
    for step, score in enumerate((3.0, 1.0, None, 2.0)):
        kept.save(_state(step), score)
    kept = Checkpoints(tmp_path, "gan", keep=1)
    kept.load()
    assert kept.best_score == 1.0
    kept.save(_state(4), 1.5)
    assert read_state(tmp_path / "gan_best.pt")["step"] == 1 and kept.load()["step"] == 4
    kept.save(_state(5), 0.5)
    assert read_state(tmp_path / "gan_best.pt")["step"] == 5 and _names(tmp_path) == ["gan.pt", "gan_best.pt"]


def _tear(path):
    path.write_bytes(path.read_bytes()[:-100])


def _cut_short(path):
    path.write_bytes(path.read_bytes()[:10])


def _rot(path):
    """One bit of the weights turns over."""
    content = bytearray(path.read_bytes())
    content[content.index(torch.tensor([5.0] * 8).numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [_tear, _cut_short, _rot])
def test_a_damaged_file_is_named_and_the_one_before_is_used(tmp_path, harm):
    _steps(Checkpoints(tmp_path, "gan"), 5)
    harm(tmp_path / "gan.pt")
    kept = Checkpoints(tmp_path, "gan")
    with pytest.warns(
        SageFastWarning, match=r"gan\.pt is not a readable.*going on from step 4 in gan_00000004\.pt"
    ) as seen:
        assert kept.load()["step"] == 4
    assert len(seen) == 1
    kept.save(_state(5))  # the damaged one is not kept
    assert _names(tmp_path) == ["gan.pt", "gan_00000004.pt"] and Checkpoints(tmp_path, "gan").load()["step"] == 5


def test_a_lost_newest_file_is_no_reason_to_begin_anew(tmp_path):
    _steps(Checkpoints(tmp_path, "gan"), 5)
    (tmp_path / "gan.pt").unlink()
    kept = Checkpoints(tmp_path, "gan")
    assert kept.latest() is not None and kept.load()["step"] == 4


def test_nothing_whole_is_left(tmp_path):
    _steps(Checkpoints(tmp_path, "gan"), 2)
    for path in tmp_path.iterdir():
        _tear(path)
    with pytest.raises(InputError, match=r"gan\.pt is not a readable checkpoint .*; delete it"):
        Checkpoints(tmp_path, "gan").load()


def test_rot_anywhere_is_noticed_or_harmless(tmp_path):
    """Every byte of the file in turn, but those of the checksum's own mark, without which a file is one of old."""
    Checkpoints(tmp_path, "gan").save({"step": 1, "w": torch.arange(4.0)})
    path = tmp_path / "gan.pt"
    whole = path.read_bytes()
    for place in range(0, len(whole) - 48, 7):
        content = bytearray(whole)
        content[place] ^= 0x40
        path.write_bytes(content)
        with pytest.raises(InputError, match="checksum is wrong"):
            read_state(path)


def test_a_file_of_an_older_version_is_read(tmp_path):
    torch.save(_state(3), tmp_path / "gan.pt")
    kept = Checkpoints(tmp_path, "gan")
    assert kept.load()["step"] == 3 and kept.best_score is None
    kept.save(_state(4))
    assert read_state(tmp_path / "gan_00000003.pt")["step"] == 3


def test_no_pickled_code_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"step": 1, "evil": Evil()}, tmp_path / "gan.pt")
    with pytest.raises(InputError, match="not a readable checkpoint"):
        Checkpoints(tmp_path, "gan").load()
    assert not (tmp_path / "ran").exists()


def test_a_file_that_is_no_checkpoint(tmp_path):
    torch.save([1, 2], tmp_path / "gan.pt")
    with pytest.raises(InputError, match=r"not a readable checkpoint \(list\)"):
        read_state(tmp_path / "gan.pt")


def test_a_full_disk_leaves_the_previous_one(tmp_path, monkeypatch):
    kept = Checkpoints(tmp_path, "gan")
    _steps(kept, 2)
    write = os.write

    def full(descriptor, data):
        if len(data) > 1000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    with monkeypatch.context() as patch, pytest.raises(InputError) as caught:
        patch.setattr(writers.os, "write", full)
        kept.save(_state(3))
    assert str(caught.value) == (
        f"File '{tmp_path / 'gan.pt'}' cannot be written (No space left on device); free some space, and the same command with "
        "--resume goes on."
    )
    assert Checkpoints(tmp_path, "gan").load()["step"] == 2
    kept.save(_state(3))  # once there is room
    assert kept.load()["step"] == 3 and len(_names(tmp_path)) == 2


def test_without_links_files_are_copied(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(checkpoints.os, "link", no_links)
    kept = Checkpoints(tmp_path, "gan")
    for step in (1, 2):
        kept.save(_state(step), score=float(-step))
    assert _names(tmp_path) == ["gan.pt", "gan_00000001.pt", "gan_best.pt"]
    assert read_state(tmp_path / "gan_00000001.pt")["step"] == 1 and read_state(tmp_path / "gan_best.pt")["step"] == 2


@pytest.mark.parametrize("call", ["link", "replace", "unlink"])
@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_an_end_at_any_call_leaves_a_whole_newest_file(tmp_path, monkeypatch, call, number):
    """The process ends before one of the calls that change names; afterwards everything goes on as if it had not."""

    class Killed(BaseException):
        pass

    kept = Checkpoints(tmp_path, "gan")
    for step in (1, 2):
        kept.save(_state(step), score=float(-step))
    real, calls = getattr(os, call), iter(range(100))

    def until(*args, **named):
        if next(calls) >= number:
            raise Killed
        return real(*args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, until)
        try:
            kept.save(_state(3), score=-3.0)
        except Killed:
            pass
    kept = Checkpoints(tmp_path, "gan")
    kept.remove_remains()
    step = kept.load()["step"]
    assert step in (2, 3) and kept.best_score == -step
    kept.save(_state(4), score=1.0)
    assert kept.load()["step"] == 4 and read_state(tmp_path / "gan_best.pt")["step"] == step
    kept.save(_state(5), score=-5.0)
    assert read_state(tmp_path / "gan_best.pt")["step"] == 5
    assert len(_names(tmp_path)) == 3


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(InputError, match="keep must be at least 1"):
        Checkpoints(tmp_path, "gan", keep=0)


def test_remains_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / f".0123{writers.TEMPORARY}").touch()
    (tmp_path / "mine.txt").touch()
    Checkpoints(tmp_path, "gan").remove_remains()
    assert _names(tmp_path) == ["mine.txt"]


def test_everything_random_is_put_back(tmp_path):
    generators = {"a": torch.Generator().manual_seed(1), "b": torch.Generator().manual_seed(2)}

    def draw():
        own = [torch.rand(2, generator=g).tolist() for g in generators.values()]
        return [
            torch.rand(2).tolist(),
            np.random.rand(2).tolist(),
            np.random.randn(),
            random.random(),
            random.gauss(0, 1),
            own,
        ]

    draw()  # leaves a spare normal number in NumPy's and in Python's
    Checkpoints(tmp_path, "gan").save({"step": 1, "random": random_state(CPU, generators)})
    first, second = draw(), draw()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    set_random_state(Checkpoints(tmp_path, "gan").load()["random"], CPU, generators)
    assert [draw(), draw()] == [first, second] and first != second


def test_versions_are_plain():
    found = versions()
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert set(found) == {"sage_fast", "torch", "python", "kernels", "threads"}
    assert all(isinstance(value, str | int) for value in found.values())
