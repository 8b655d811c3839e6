"""Shards to an output: one after another (:func:`write_shard`), or many with every stage at work at the same time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sage_fast.generation.committing import commit
from sage_fast.generation.drawing import Latents, Prepared, draw_images, draw_latents
from sage_fast.generation.encoding import Encoder, to_host
from sage_fast.generation.formats import Format, OpenShard, Stored
from sage_fast.generation.memory import room_for
from sage_fast.generation.watching import Meter

__all__ = ["ahead", "write_shard", "write_shards"]

A = TypeVar("A")
B = TypeVar("B")


def write_shard(format: Format, shard: int, images: np.ndarray, about: Iterable[dict[str, Any]]) -> None:
    """Store and commit the images of a shard, uint8 [n, C, R, R], with what :meth:`Latents.about` says of each."""
    task = _Task(format.plan.positions(shard), torch.from_numpy(images), list(about))
    for number, open_shard, stored in _whole_shards(format, [task.store(format)], Meter(), None):
        _commit(format, number, open_shard, stored, Meter())


def write_shards(
    format: Format,
    shards: Iterable[int],
    prepared: Prepared,
    workers: int,
    meter: Meter,
    written: Callable[[int], None] | None = None,
    committed: Callable[[], None] | None = None,
) -> None:
    """Draw, store and commit shards: latents, networks, files (on ``workers`` threads) and commits on threads of their own.

    Queues are short, by :func:`sage_fast.generation.memory.room_for`, so memory does not grow with the plan, and a stage that is
    behind holds up those before it.

    Args:
        written: called with the number of images of each stretch that is stored.
        committed: called when a shard is committed.
    """
    plan, pipeline = format.plan, prepared.pipeline
    size = max(1, min(16, plan.batch // workers))
    room = room_for(pipeline, plan, torch.get_num_threads())
    meter.start_stages(drawing=room.drawers, encoding=workers)

    def sample(positions: range) -> Latents:
        with meter.timed("sampling"):
            return draw_latents(prepared, positions)

    def draw(latents: Latents) -> _Task:
        with meter.timed("drawing"):
            images, copied = _on_host(format.encoder, draw_images(pipeline, latents))
            return _Task(latents.positions, images, list(latents.about()), copied)

    def store(task: _Task) -> list[Stored]:
        with meter.timed("encoding"):
            return task.store(format)

    def queue(name: str) -> Callable[[float], None]:
        return lambda share: meter.queued.update({name: share})

    with _pools((1, 1), (room.drawers, room.threads), (workers, 1), (1, 1)) as (sampler, drawers, encoders, committer):
        ranges = (positions for shard in shards for positions in plan.batches(shard))
        latents = ahead(sampler, sample, ranges, room.drawers + 1, queue("latents"))
        # one more than are drawn at a time: it is begun while this thread hands on the images of the last
        drawn = ahead(drawers, draw, latents, room.drawers + 1, queue("drawings"))
        tasks = (task for whole in drawn for task in whole.cut(size))
        stored = ahead(encoders, store, tasks, room.ahead * -(-plan.batch // size), queue("files"))
        commits: deque[Future[None]] = deque()
        for shard, open_shard, images in _whole_shards(format, stored, meter, written):
            commits.append(committer.submit(_commit, format, shard, open_shard, images, meter))
            _reap(commits, room.commits, committed)
        _reap(commits, 0, committed)


@dataclass(frozen=True, eq=False)
class _Task:
    """Some drawn images on the host, [n, C, R, R] once ``copied`` has come to pass or as files, and what is said of each."""

    positions: range
    images: Tensor | list[bytes]
    about: list[dict[str, Any]]
    copied: torch.cuda.Event | None = None

    def cut(self, size: int) -> Iterator[_Task]:
        """The same in tasks of ``size`` images."""
        for start in range(0, len(self.about), size):
            part = slice(start, start + size)
            yield _Task(self.positions[part], self.images[part], self.about[part], self.copied)

    def store(self, format: Format) -> list[Stored]:
        """Encode the images, unless they are files, and store them."""
        if self.copied is not None:
            self.copied.synchronize()
        contents = format.contents(self.images)
        return [format.store(*one) for one in zip(self.positions, contents, self.about, strict=True)]


def _on_host(encoder: Encoder | None, images: Tensor) -> tuple[Tensor | list[bytes], torch.cuda.Event | None]:
    """:func:`to_host`, and when: a copy of images from a GPU goes on while the next micro-batch is drawn."""
    if images.device.type != "cuda" or (encoder is not None and encoder.encode_batch is not None):
        return to_host(encoder, images), None
    host = torch.empty(images.shape, dtype=images.dtype, pin_memory=True)
    host.copy_(images, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(images.device))
    return host, event


def _whole_shards(
    format: Format, stored: Iterable[list[Stored]], meter: Meter, written: Callable[[int], None] | None
) -> Iterator[tuple[int, OpenShard, list[Stored]]]:
    """Put what was stored, which comes in its order, into its shards; yields those that have all their images."""
    open_shard, images = None, []
    try:
        for part in stored:
            shard = part[0].position // format.plan.shard
            open_shard = open_shard or format.open(shard)
            for image in part:
                open_shard.add(image)
            images += [replace(image, data=b"") for image in part]
            meter.done += len(part)
            if written is not None:
                written(len(part))
            if len(images) == len(format.plan.positions(shard)):
                whole, open_shard = open_shard, None
                yield shard, whole, images
                images = []
    except BaseException as error:
        if open_shard is not None:
            open_shard.abort(error)
        raise


def _commit(format: Format, shard: int, open_shard: OpenShard, images: list[Stored], meter: Meter) -> None:
    with meter.timed("committing"):
        open_shard.close()
        commit(format.target, shard, images)


def _reap(commits: deque[Future[None]], most: int, committed: Callable[[], None] | None) -> None:
    """Wait until at most ``most`` commits are under way; raises what went wrong in one."""
    while commits and (len(commits) > most or commits[0].done()):
        commits.popleft().result()
        if committed is not None:
            committed()


def ahead(
    pool: ThreadPoolExecutor,
    function: Callable[[A], B],
    items: Iterable[A],
    depth: int,
    note: Callable[[float], None] | None = None,
) -> Iterator[B]:
    """``map(function, items)`` on a pool, in order, at most ``depth`` items ahead of who takes the results.

    ``note`` gets the share of the depth that waits or is worked on.
    """
    pending: deque[Future[B]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if note is not None:
            note(sum(not future.done() for future in pending) / (depth + 1))
        if len(pending) > depth:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


@contextmanager
def _pools(*sizes: tuple[int, int]) -> Iterator[list[ThreadPoolExecutor]]:
    """Pools of so many threads with so many of torch's own each; after an error waiting tasks are dropped, but commits."""
    before = torch.get_num_threads()
    name = "sage_fast-generate"
    pools = [ThreadPoolExecutor(size, name, torch.set_num_threads, (threads,)) for size, threads in sizes]
    try:
        yield pools
    finally:
        for pool in pools[:-1]:
            pool.shutdown(cancel_futures=True)
        pools[-1].shutdown()
        torch.set_num_threads(before)
