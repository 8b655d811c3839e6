"""What the processes of ``training/test_ranks.py`` run."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import distributed as dist

from sage_fast.errors import InputError
from sage_fast.training import heartbeat
from sage_fast.training.classifier import _normalised_by_all
from sage_fast.training.ranks import join_ranks


def collectives() -> None:
    """Every method against what it promises, on three ranks."""
    with join_ranks() as ranks:
        assert join_ranks() is ranks and ranks.world == 3 and ranks.is_first == (ranks.rank == 0)
        _gradients(ranks)
        assert ranks.mean(torch.tensor([1.0, 2.0]) * ranks.rank).tolist() == [1.0, 2.0]
        _totals(ranks)
        _normalisation(ranks)
        assert ranks.any(ranks.rank == 2) and not ranks.any(False)
        told = ranks.gather({"rank": ranks.rank, "state": torch.arange(ranks.rank)})
        assert [x["rank"] for x in told] == [0, 1, 2] and [len(x["state"]) for x in told] == [0, 1, 2]
        ran = []
        assert ranks.once(lambda: ran.append(1) or "done") == "done" and len(ran) == (ranks.rank == 0)
        _once_fails(ranks)
        parts = ranks.gather(ranks.share(9))
        assert [x.tolist() for x in parts] == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
        seeds = {
            g.initial_seed()
            for g in map(torch.Generator().manual_seed, ranks.gather(ranks.generator(7).initial_seed()))
        }
        assert len(seeds) == 3 and 7 in seeds
        ranks.barrier()
    assert not dist.is_initialized()


def _gradients(ranks) -> None:
    rng = torch.Generator().manual_seed(0)
    given = [[torch.randn(shape, generator=rng) for shape in ((), (7,), (33, 65), (1, 1))] for _ in range(3)]
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in given[0]]
    nowhere, somewhere = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))
    for p, g in zip(parameters, given[ranks.rank]):
        p.grad = g.clone()
    if ranks.rank == 1:
        somewhere.grad = torch.tensor([3.0, 6.0])
    double = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    double.grad = torch.tensor([1 / 3], dtype=torch.float64)
    statistics = torch.tensor([float(ranks.rank)])
    ranks.average_gradients([*parameters, nowhere, somewhere, double], buffers=[statistics])
    for i, p in enumerate(parameters):
        torch.testing.assert_close(p.grad, (given[0][i] + given[1][i] + given[2][i]) / 3)
        first, *others = ranks.gather(p.grad)
        assert all(torch.equal(first, other) for other in others), "the same bits on each rank"
    assert nowhere.grad is None and somewhere.grad.tolist() == [1.0, 2.0] and statistics.item() == 1.0
    assert double.grad.dtype == torch.float64 and abs(double.grad.item() - 1 / 3) < 1e-15


def _totals(ranks) -> None:
    """A loss that is averaged over the ranks and uses the rows of all has the gradient that one rank with all rows has."""
    rows, weights = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), torch.arange(12.0).view(6, 2)
    whole = rows.clone().requires_grad_()
    loss = (whole.cumsum(0).sin() * weights).mean()
    loss.backward()
    part = rows[ranks.share(6)].clone().requires_grad_()
    seen = ranks.whole(part, 6)
    assert torch.equal(seen, rows)
    ((seen.cumsum(0).sin() * weights)[ranks.share(6)].mean()).backward()
    torch.testing.assert_close(part.grad / ranks.world, whole.grad[ranks.share(6)])
    first, *others = ranks.gather(ranks.total(torch.tensor([0.1]) * ranks.rank))
    assert all(torch.equal(first, other) for other in others)


def _normalisation(ranks) -> None:
    """Batch normalisation of a share is that of the whole batch: values, gradients, running statistics."""
    layers = [torch.nn.Sequential(torch.nn.BatchNorm2d(3)).double() for _ in range(2)]
    rows = torch.randn(6, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3 + 1
    whole, part = rows.clone().requires_grad_(), rows[ranks.share(6)].clone().requires_grad_()
    seen = layers[0](whole)
    seen.sin().mean().backward()
    with _normalised_by_all(layers[1], ranks):
        own = layers[1](part)
        own.sin().mean().backward()
    torch.testing.assert_close(own, seen[ranks.share(6)])
    torch.testing.assert_close(part.grad / ranks.world, whole.grad[ranks.share(6)])
    for one, other in zip(layers[0].state_dict().values(), layers[1].state_dict().values()):
        torch.testing.assert_close(one, other)
    assert "forward" not in vars(layers[1][0])


def _once_fails(ranks) -> None:
    def refuse():
        raise InputError("the folder is full.")

    try:
        ranks.once(refuse)
    except InputError as error:
        assert str(error) == "the folder is full."
    else:
        raise AssertionError("the error of rank 0 did not come out")


def one_is_lost(victim: int, how: int) -> None:
    """Average without end; after a while one rank gets a signal."""
    with join_ranks(lost_seconds=3) as ranks:
        p = torch.nn.Parameter(torch.zeros(1000))
        for step in range(10**9):
            p.grad = torch.ones(1000)
            ranks.average_gradients([p])
            if step == 20 and ranks.rank == victim:
                os.kill(os.getpid(), how)


def all_stand_still(out: Path) -> None:
    """Average until ``out/end`` is there; ``out/<rank>`` says that this rank has begun."""
    with join_ranks(lost_seconds=6) as ranks:
        p = torch.nn.Parameter(torch.zeros(1000))
        while not ranks.any((out / "end").exists()):
            p.grad = torch.ones(1000)
            ranks.average_gradients([p])
            (out / str(ranks.rank)).touch()
            time.sleep(0.05)


def one_is_lost_and_a_call_hangs() -> None:
    """Rank 1 stands still while rank 0 is in a call that cannot look around."""
    heartbeat._GRACE = 1.0
    with join_ranks(lost_seconds=2) as ranks:
        ranks.barrier()
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.all_reduce(torch.zeros(1))
        dist.all_reduce(torch.zeros(1))


def one_refuses() -> None:
    """Rank 0 stops with a reason; rank 1 of three waits for it, rank 2 waits for rank 1."""
    with join_ranks() as ranks:
        if ranks.is_first:
            raise InputError("File 'x' cannot be written (disk full); free some space.")
        ranks.barrier()


def slow_first_rank() -> None:
    """Rank 0 works longer than the silence that counts as death, and lives."""
    with join_ranks(lost_seconds=2) as ranks:
        assert ranks.once(lambda: time.sleep(4) or 3) == 3


def join(seconds: float, device: str = "cpu") -> None:
    """Join, say so, leave."""
    with join_ranks(device, join_seconds=seconds) as ranks:
        print("joined", ranks.rank, ranks.world)


def ends_without_closing(out: Path) -> None:
    """A program that knows nothing of ranks beyond a trainer that joins: its end closes them."""
    ranks = join_ranks()
    ranks.barrier()
    if ranks.is_first:
        time.sleep(1)
    (out / f"{ranks.rank}").touch()


def command(commands: list[list[str]]) -> None:
    """Words of the shell, one command after the other, as each rank hears them."""
    from sage_fast import cli

    for words in commands:
        code = cli.main(words)
        if code:
            sys.exit(code)
