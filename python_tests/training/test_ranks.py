"""Ranks: what their collectives compute, what happens when one is lost, and what they say to a wrong environment."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
import rank_programs
import torch
from rank_processes import finish, free_port, start, start_ranks
from torch import distributed as dist

from sage_fast.errors import InputError
from sage_fast.training import ranks as module
from sage_fast.training.ranks import Ranks, join_ranks, restarted, seed_of_rank

ADDRESS = {"MASTER_ADDR": "127.0.0.1"}


def test_collectives_of_three_ranks(tmp_path):
    finish(start_ranks(rank_programs.collectives, 3, tmp_path))


def test_alone_nothing_is_communicated():
    ranks = join_ranks("cpu")
    assert (ranks.rank, ranks.world, ranks.is_first) == (0, 1, True) and not dist.is_initialized()
    value, p = torch.tensor(2.0), torch.nn.Parameter(torch.zeros(2))
    p.grad = grad = torch.ones(2)
    ranks.average_gradients([p])
    assert p.grad is grad and ranks.mean(value).data_ptr() == value.data_ptr()
    assert ranks.gather(value)[0] is value and ranks.any(True) and ranks.once(lambda: 3) == 3
    assert ranks.share(4).tolist() == [0, 1, 2, 3] and ranks.generator(5).initial_seed() == 5
    ranks.barrier()
    ranks.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="whether a GPU is waited for shows on one")
def test_averages_do_not_wait_for_cuda(monkeypatch):
    ranks = Ranks(torch.device("cuda"), 0, 2)
    monkeypatch.setattr(Ranks, "_all_reduce", lambda self, tensor: tensor.add_(tensor))
    p, statistics = torch.nn.Parameter(torch.zeros(3, device="cuda")), torch.ones(2, device="cuda")
    p.grad = torch.full_like(p, 5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ranks.average_gradients([p], [statistics])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert p.grad.tolist() == [5, 5, 5] and statistics.tolist() == [1, 1]


class _EndsAsItsTimeIsOver:
    """A collective that ends, or fails, between the end of a wait and the look whether it has."""

    def __init__(self, failure: str | None) -> None:
        self.failure = failure

    def wait(self, *timeout: object) -> None:
        if timeout:
            raise RuntimeError("Operation timed out!")
        if self.failure:
            raise RuntimeError(self.failure)

    def is_completed(self) -> bool:
        return True


def test_a_collective_that_ends_just_after_a_wait_has_not_failed():
    assert module._ended(_EndsAsItsTimeIsOver(None))
    with pytest.raises(RuntimeError, match="Connection closed"):
        module._ended(_EndsAsItsTimeIsOver("Connection closed"))


def test_seeds_differ_by_rank():
    seeds = [seed_of_rank(3, rank) for rank in range(1000)]
    assert seeds[0] == 3 and len(set(seeds)) == 1000 and all(0 <= seed < 2**63 for seed in seeds)


def test_a_program_that_ends_closes_its_ranks(tmp_path):
    finish(start_ranks(rank_programs.ends_without_closing, 2, tmp_path, tmp_path))
    assert (tmp_path / "0").exists() and (tmp_path / "1").exists()


_ENDS_WHILE_THE_STORE_IS_SLOW = """
import time
from datetime import timedelta
from torch import distributed as dist
from sage_fast.training.heartbeat import Heartbeat

class Slow(Heartbeat):
    def _round(self):
        print("calls the store", flush=True)
        self._store.wait(["a key that nobody sets"], timedelta(seconds=3.5))

heartbeat = Slow(dist.HashStore(), 0, 1, lost_seconds=5)
heartbeat.start()
time.sleep(1.2)
heartbeat.end()
"""


def test_a_slow_store_does_not_abort_a_process_that_ends():
    ended = subprocess.run([sys.executable, "-c", _ENDS_WHILE_THE_STORE_IS_SLOW], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "calls the store\n"), ended.stderr


def test_a_port_in_use(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        env = ADDRESS | {"MASTER_PORT": port, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
        child = start(rank_programs.join, 5, log=tmp_path / "log", env=env)
        assert child.wait() == 2
    assert child.text().strip() == (
        f"sage-fast: port {port} (MASTER_PORT) cannot be used (Address already in use); "
        "choose another with torchrun --master-port."
    )


def test_a_rank_that_does_not_come(tmp_path):
    env = ADDRESS | {"MASTER_PORT": str(free_port()), "WORLD_SIZE": "3"}
    first = start(rank_programs.join, 1.5, log=tmp_path / "0", env=env | {"RANK": "0", "LOCAL_RANK": "0"})
    lonely = start(
        rank_programs.join, 0.5, log=tmp_path / "1", env=env | {"RANK": "1", "MASTER_PORT": str(free_port())}
    )
    assert first.wait() == 2 and "1 of 3 ranks (WORLD_SIZE) came within 2 s, without rank 1, 2;" in first.text()
    assert lonely.wait() == 2 and "rank 0 did not open 127.0.0.1:" in lonely.text()


def test_ranks_that_do_not_fit_together(tmp_path):
    env = ADDRESS | {"MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    first = start(rank_programs.join, 20, log=tmp_path / "0", env=env | {"RANK": "0"})
    other = start(rank_programs.join, 20, log=tmp_path / "1", env=env | {"RANK": "1", "WORLD_SIZE": "4"})
    assert {first.wait(), other.wait()} == {2}
    assert "WORLD_SIZE is 2 in this process and 4 in that of rank 1" in first.text()


def test_a_rank_that_comes_twice(tmp_path):
    """Of three ranks the last never comes, so that nobody leaves before both twins are here."""
    env = ADDRESS | {"MASTER_PORT": str(free_port()), "WORLD_SIZE": "3"}
    ranks = (0, 1, 1)
    children = [
        start(rank_programs.join, 8, log=tmp_path / str(i), env=env | {"RANK": str(rank)})
        for i, rank in enumerate(ranks)
    ]
    assert [child.wait() for child in children] == [2, 2, 2]
    assert sum("two processes came as rank 1 of 3" in child.text() for child in children[1:]) == 1


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number from 1 up with several ranks, got 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be"),
        ({"WORLD_SIZE": "2"}, "RANK must be a whole number from 0 up with several ranks, got None"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK must be 0 to WORLD_SIZE - 1 = 1, got 2"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT must be"),
    ],
)
def test_a_wrong_environment(monkeypatch, env, message):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        join_ranks("cpu", join_seconds=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_nccl_without_a_gpu(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="NCCL needs a GPU and torch sees none here; give --device cpu"):
        join_ranks("cuda")


def test_more_ranks_than_gpus(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="local rank 1 has no GPU of its own, torch sees 1"):
        join_ranks("cuda")


def test_a_batch_that_cannot_be_shared():
    ranks = join_ranks("cpu")
    ranks.world = 3
    with pytest.raises(InputError, match="batch 8 cannot be shared equally by 3 ranks"):
        ranks.share(8)


def test_a_restart_of_torchrun(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    assert not restarted()
    for count, expected in (("0", False), ("2", True)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        assert restarted() == expected
