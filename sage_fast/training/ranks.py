"""The processes that train one network together, as ``torchrun`` starts them; or one process, which then waits for nobody.

Each rank holds the whole network and takes its share of every batch. Gradients are averaged by hand, one flat all-reduce an
optimizer's step, in place of ``DistributedDataParallel``: that one hooks into the first backward pass, while R1 and path
length differentiate twice and a step of a GAN takes several passes over the same weights.
"""

from __future__ import annotations

import atexit
import ctypes
import io
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from sage_fast.errors import InputError
from sage_fast.training.heartbeat import Heartbeat

__all__ = ["Ranks", "first_then_all", "join_ranks", "restarted", "seed_of_rank"]

Value = TypeVar("Value")

_POLL = timedelta(seconds=1)
_LONGEST = timedelta(
    days=1
)  # of one collective, such as the wait for rank 0 to embed a data set; a dead rank is noticed long before

_joined: Ranks | None = None


class Ranks:
    """The ranks of this run, seen from one of them; made by :func:`join_ranks`.

    Attributes:
        rank, world: number of this process, and of all.
        device: where this rank computes: with CUDA one device a local rank.
    Every method but :meth:`share` must be called by all ranks in the same order, and returns at once when there is one.
    A rank that died makes it raise ``InputError`` in all others, which names the dead one.
    """

    def __init__(self, device: torch.device, rank: int = 0, world: int = 1, heartbeat: Heartbeat | None = None) -> None:
        self.device, self.rank, self.world = device, rank, world
        self._heartbeat = heartbeat

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the files, draws the bar and validates."""
        return self.rank == 0

    def share(self, n: int) -> Tensor:
        """Indices [n / world] of this rank's part of a batch of ``n``: every ``world``-th, from ``rank`` on.

        What is random is drawn for the whole batch, from generators that are equal on all ranks, and then indexed: two
        ranks with half a batch each are one rank with the whole of it.

        Raises:
            InputError: ``n`` is not a multiple of ``world``.
        """
        if n % self.world:
            raise InputError(
                f"batch {n} cannot be shared equally by {self.world} ranks; give a multiple of {self.world}."
            )
        return torch.arange(self.rank, n, self.world)

    def average_gradients(self, parameters: Iterable[Tensor], buffers: Iterable[Tensor] = ()) -> None:
        """Replace each ``grad`` by its mean over the ranks, with the same bits on all of them: one all-reduce.

        A gradient that is None on every rank stays None; on some, it counts as zero there.

        Args:
            buffers: tensors that are averaged themselves in the same call (running statistics).
        """
        if self.world == 1:
            return
        learned, also = list(parameters), list(buffers)
        values = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in learned] + [b.detach() for b in also]
        if not values:
            return
        device = values[0].device
        present = torch.tensor(
            [p.grad is not None for p in learned], dtype=torch.float32, pin_memory=device.type == "cuda"
        ).to(device, non_blocking=True)  # any other copy to a GPU waits for what it has to do
        dtype = reduce(torch.promote_types, {v.dtype for v in values}, torch.float32)
        flat = torch.cat([v.reshape(-1).to(dtype) for v in [*values, present]])
        self._all_reduce(flat)
        *means, counts = flat.split([v.numel() for v in [*values, present]])
        missing = any(p.grad is None for p in learned)
        anywhere = counts.tolist() if missing else [1.0] * len(learned)  # looking waits for a GPU
        for p, mean, count in zip(learned, means, anywhere):
            if count:
                grad = mean.view(p.shape).div(self.world).to(p.dtype)
                p.grad = grad if p.grad is None else p.grad.copy_(grad)
        with torch.no_grad():
            for buffer, mean in zip(also, means[len(learned) :]):
                buffer.copy_(mean.view(buffer.shape) / self.world)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a floating-point tensor over the ranks, without gradient; the tensor itself when there is one."""
        if self.world == 1:
            return value.detach()
        total = value.detach().clone()
        self._all_reduce(total)
        return total / self.world

    def total(self, value: Tensor) -> Tensor:
        """The sum of a floating-point tensor over the ranks, with the same bits on each; its gradient is that of all their losses.

        So a loss that is averaged over the ranks may use what others hold: call it, and go backward, on all of them alike.
        """
        return value if self.world == 1 else _Total.apply(value, self)  # type: ignore[no-any-return,no-untyped-call]

    def whole(self, part: Tensor, n: int) -> Tensor:
        """The rows [n, ...] of a batch of which each rank holds its :meth:`share` [n / world, ...], differentiable as :meth:`total`."""
        if self.world == 1:
            return part
        return self.total(part.new_zeros(n, *part.shape[1:]).index_copy(0, self.share(n).to(part.device), part))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; waits for no GPU."""
        if self.world == 1:
            return flag
        total = torch.tensor([float(flag)])
        self._all_reduce(total)
        return total.item() > 0

    def gather(self, value: Any) -> list[Any]:
        """What each rank gave, in their order, on every rank: numbers, text, tensors on the CPU, lists and dicts of these."""
        if self.world == 1:
            return [value]
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return [torch.load(io.BytesIO(part), weights_only=True) for part in self._exchange(buffer.getvalue())]

    def once(self, do: Callable[[], Any]) -> Any:
        """The plain result of ``do``, which rank 0 alone runs; its ``InputError`` is raised on every rank."""
        if self.world == 1:
            return do()
        result: Any = None
        if self.is_first:
            try:
                result = {"result": do()}
            except InputError as error:
                result = {"error": str(error)}
        answer = self.gather(result)[0]
        if "error" in answer:
            raise InputError(answer["error"])
        return answer["result"]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any(False)

    def generator(self, seed: int) -> torch.Generator:
        """Random numbers of this rank's own (CPU); those of rank 0 are ``torch.Generator().manual_seed(seed)``."""
        return torch.Generator().manual_seed(seed_of_rank(seed, self.rank))

    def close(self, error: BaseException | None = None) -> None:
        """Leave together; with an ``error`` at once, and the others are told why."""
        global _joined
        if self._heartbeat is None:
            return
        heartbeat, self._heartbeat = self._heartbeat, None
        if error is None:
            self._all_reduce(torch.zeros(1))
        elif heartbeat.verdict is None:
            heartbeat.announce(" ".join(str(error).split()).rstrip(".") or type(error).__name__)
        if error is not None and self.is_first:
            time.sleep(3)  # the store may lie in this process: the others read the reason in it
        heartbeat.end()
        _joined = None
        if error is None:
            dist.destroy_process_group()
        else:  # its destructor would wait for the collective that a lost rank left open
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        together = error is None or isinstance(error, KeyboardInterrupt) and getattr(error, "signal", None) is not None
        self.close(None if together else error)

    def _all_reduce(self, tensor: Tensor) -> None:
        """Sum in place."""
        self._wait(tensor, lambda: dist.all_reduce(tensor, async_op=True))

    def _exchange(self, payload: bytes) -> list[bytes]:
        """The bytes of every rank."""
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        length = torch.tensor([len(payload)])
        self._wait(length, lambda: dist.all_gather(lengths, length, async_op=True))
        longest = int(max(lengths))
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world)]
        mine = torch.zeros(longest, dtype=torch.uint8)
        mine[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        self._wait(mine, lambda: dist.all_gather(parts, mine, async_op=True))
        return [part[: int(n)].numpy().tobytes() for part, n in zip(parts, lengths)]

    def _wait(self, tensor: Tensor, start: Callable[[], dist.Work | None]) -> None:
        """Run a collective on ``tensor``; while it takes, look whether a rank was lost."""
        try:
            work = start()
            assert work is not None
            if tensor.is_cuda:
                work.wait()  # queues behind the work of the GPU; the heartbeat watches meanwhile
                return
            while not _ended(work):
                if self._heartbeat is not None and self._heartbeat.verdict is not None:
                    raise InputError(self._heartbeat.verdict)
        except RuntimeError as error:
            verdict = self._heartbeat.find_lost() if self._heartbeat is not None else None
            if verdict is None:
                raise
            raise InputError(verdict) from error


class _Total(torch.autograd.Function):
    """Sum over the ranks, whose gradient is the sum over the ranks of the gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        total = value.clone(memory_format=torch.contiguous_format)
        ranks._all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.total(grads[0]), None


def join_ranks(device: str | torch.device = "cpu", join_seconds: float = 300.0, lost_seconds: float = 30.0) -> Ranks:
    """The ranks that this process trains with: those of ``torchrun``'s environment, else itself alone.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; gloo on the CPU, NCCL with CUDA. A second call returns the
    same object, so a program may join first (``with join_ranks("cuda") as ranks:``) and call trainers, which join too.

    Args:
        join_seconds: how long to wait for the others.
        lost_seconds: silence after which a rank counts as dead; a killed one is noticed sooner.
    Raises:
        InputError: the environment is incomplete, the port is in use, a rank does not come or comes twice, or there is no GPU
            for it.
    """
    global _joined
    world = _number("WORLD_SIZE", 1) if "WORLD_SIZE" in os.environ else 1
    if world == 1:
        return Ranks(torch.device(device))
    if _joined is not None:
        _joined.device = _device_of_rank(torch.device(device))
        return _joined
    rank = _number("RANK", 0)
    if rank >= world:
        raise InputError(f"RANK must be 0 to WORLD_SIZE - 1 = {world - 1}, got {rank}; let torchrun set both.")
    place = _device_of_rank(torch.device(device))
    store = _rendezvous(rank, join_seconds)
    _call_the_roll(store, rank, world, join_seconds)
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_LONGEST)
    heartbeat = Heartbeat(_connect(False, join_seconds), rank, world, lost_seconds)
    ranks = Ranks(place, rank, world, heartbeat)
    ranks.barrier()  # every rank has beaten once
    heartbeat.start()
    atexit.register(lambda: ranks.close(getattr(sys, "last_value", None)))  # nothing is left to do after close
    _joined = ranks
    return ranks


def first_then_all(ranks: Ranks, read: Callable[[], Value]) -> Value:
    """What ``read`` gives on each rank; rank 0 reads before the others, so it alone fills a cache."""
    mine: list[Value] = []
    ranks.once(lambda: mine.append(read()))
    return mine[0] if mine else read()


def restarted() -> bool:
    """Whether ``torchrun --max-restarts`` started this process in place of one that failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def seed_of_rank(seed: int, rank: int) -> int:
    """A seed for each rank; rank 0 keeps ``seed``."""
    return (seed + rank * 0x9E3779B97F4A7C15) % 2**63


def _ended(work: dist.Work) -> bool:
    """Whether a collective has ended within a second; raises what it failed with."""
    try:
        work.wait(_POLL)
    except RuntimeError:
        if not work.is_completed():
            return False
        work.wait()  # ended meanwhile, or failed: then it raises, and not that it took longer
    return True


def _number(name: str, least: int) -> int:
    text = os.environ.get(name)
    if text is None or not text.isdecimal() or int(text) < least:
        raise InputError(
            f"environment variable {name} must be a whole number from {least} up with several ranks, got {text!r}; "
            "start them with torchrun, or unset WORLD_SIZE."
        )
    return int(text)


def _device_of_rank(device: torch.device) -> torch.device:
    """The device of this local rank; with CUDA it is made the current one."""
    if device.type != "cuda":
        return device
    local = _number("LOCAL_RANK", 0)
    if not torch.cuda.is_available():
        raise InputError("NCCL needs a GPU and torch sees none here; give --device cpu, which uses gloo.")
    if local >= torch.cuda.device_count():
        raise InputError(
            f"local rank {local} has no GPU of its own, torch sees {torch.cuda.device_count()}; "
            "start at most one rank a GPU (torchrun --nproc-per-node)."
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _address() -> tuple[str, int]:
    host = os.environ.get("MASTER_ADDR")
    if not host:
        raise InputError("environment variable MASTER_ADDR is not set; start the ranks with torchrun.")
    return host, _number("MASTER_PORT", 1)


def _rendezvous(rank: int, seconds: float) -> dist.Store:
    """The store of the run: rank 0 holds it, unless the launcher does."""
    holds = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    host, port = _address()
    if holds:
        _check_free(port)
    else:
        _await_listener(host, port, seconds)
    return _connect(holds, seconds)


def _connect(holds: bool, seconds: float) -> dist.Store:
    host, port = _address()
    try:
        store = dist.TCPStore(host, port, None, holds, timeout=timedelta(seconds=seconds), wait_for_workers=False)
    except RuntimeError as error:
        raise InputError(
            f"the ranks cannot meet at {host}:{port} (MASTER_ADDR, MASTER_PORT: {str(error).splitlines()[0]:.120}); "
            "choose another port with torchrun --master-port."
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"sage_fast/{attempt}", store)


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise InputError(
                f"port {port} (MASTER_PORT) cannot be used ({error.strerror}); "
                "choose another with torchrun --master-port."
            ) from error


def _await_listener(host: str, port: int, seconds: float) -> None:
    """Wait quietly until somebody listens: torch's own waiting prints a stack of C++ calls when it ends in vain."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=2).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise InputError(
                    f"rank 0 did not open {host}:{port} (MASTER_ADDR, MASTER_PORT) within {seconds:.0f} s "
                    f"({error.strerror or error}); start it, or check the address."
                ) from error
        time.sleep(0.2)


def _call_the_roll(store: dist.Store, rank: int, world: int, seconds: float) -> None:
    """Wait for every rank; each must come once, and expect as many as the others."""
    deadline, missing = time.monotonic() + seconds, list(range(world))
    try:
        if store.add(f"came/{rank}", 1) > 1:
            raise InputError(f"two processes came as rank {rank} of {world}; give each its own RANK, as torchrun does.")
        store.set(f"world/{rank}", str(world))
        while missing and time.monotonic() < deadline:
            here = [other for other in missing if store.check([f"world/{other}"])]
            _check_sizes(world, {other: int(store.get(f"world/{other}")) for other in here})
            missing = [other for other in missing if other not in here]
            time.sleep(0.05 if missing else 0)
    except RuntimeError as error:
        raise InputError("rank 0 left while the ranks were gathering; its own message says why.") from error
    if missing:
        raise InputError(
            f"{world - len(missing)} of {world} ranks (WORLD_SIZE) came within {seconds:.0f} s, without {_named(missing)}; "
            "start as many processes as WORLD_SIZE says."
        )


def _check_sizes(world: int, sizes: dict[int, int]) -> None:
    for other, size in sizes.items():
        if size != world:
            raise InputError(
                f"WORLD_SIZE is {world} in this process and {size} in that of rank {other}; give all the same, as torchrun does."
            )


def _named(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return "rank " + ", ".join(map(str, ranks[:4])) + more
