"""A real dataset with generated images among its samples, drawn while training goes on.

A thread of the main process draws, into a cache in shared memory; a loader's workers only read there, so they need no
model, no GPU and no lock, whether they were forked or spawned.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import context
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sage_fast.errors import InputError
from sage_fast.generation.drawing import Prepared, draw_shard
from sage_fast.generation.plan import Plan
from sage_fast.generation.run import ranks

if TYPE_CHECKING:
    from sage_fast.augmenter import Augmenter

__all__ = ["MixedDataset", "MixedStream", "to_pil"]

_POLL = 0.001  # seconds between two looks for an image that is not drawn yet
_LOOK = 0.02  # seconds between two looks of a thread at rest for an epoch that another process has set
_RUNNING, _CLOSED, _FAILED = 0, 1, 2
_MESSAGE = 1000  # bytes of an error that workers can show

# Held while a micro-batch is drawn. A fork waits for it, so that no child finds torch in the middle of something.
_drawing = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_drawing.acquire, after_in_parent=_drawing.release, after_in_child=_drawing.release)


def to_pil(image: np.ndarray) -> Image.Image:
    """uint8 [C, R, R] as an image of Pillow."""
    return Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))


class MixedDataset(torch.utils.data.Dataset[Any]):
    """All real samples, then generated ones: (image, label) by index, for any sampler and any loader of PyTorch.

    Sample i is ``real[i]``; from ``len(real)`` on, it is an image that depends on nothing but the augmenter, ``seed``, the
    epoch, i and, where the environment names ``RANK``, the rank. Classes take turns. :meth:`set_epoch` between two epochs
    gives new images; without it all epochs are alike. A thread draws ahead, from the first moment until :meth:`close`, the
    end of a ``with`` block, or the end of the dataset's life.

    Args:
        augmenter: whose categories are drawn, all lines of its plan as often.
        real: (image, label) by index, with a length; its ``transform`` and ``target_transform``, if it has them, are applied to
            generated images and their labels too.
        ratio: share of generated samples, above 0 and below 1: there are round(len(real) * ratio / (1 - ratio)).
        classes: names of the labels, or name -> label; None: what ``real`` calls ``class_to_idx`` or ``classes``.
        transform: applied to the images of both; can be set later, as timm does.
        as_image: uint8 [C, R, R] to what ``real`` has as an image before its transform.
        seed: of the generated images.
        cache: most images that are kept, in shared memory; when there are more samples they share images. While
            they are in use up to ``cache / epochs_per_image`` of the next epoch are drawn.
        epochs_per_image: how many epochs an image is used for; then another takes its place.
    Raises:
        InputError: a setting; a category that is no class of ``real``; two transforms; or no shared memory for the cache.
    """

    def __init__(
        self,
        augmenter: Augmenter,
        real: Any,
        ratio: float = 0.5,
        classes: Sequence[str] | Mapping[str, int] | None = None,
        transform: Callable[[Any], Any] | None = None,
        as_image: Callable[[np.ndarray], Any] = to_pil,
        seed: int = 0,
        cache: int = 1024,
        epochs_per_image: int = 1,
    ) -> None:
        plan = augmenter.plan
        _check(plan, ratio, cache, epochs_per_image)
        self.real, self.as_image = real, as_image
        self.seed = seed
        self._transform: Callable[[Any], Any] | None = None
        self.transform = transform
        labels = _labels_of(real, classes)
        self.labels = [_label(labels, part.category) for part in plan.parts]
        self.n_generated = max(1, round(len(real) * ratio / (1 - ratio)))
        n_each = min(cache // len(plan.parts), -(-self.n_generated // len(plan.parts)))
        self._given = (augmenter, real, ratio, classes, transform, as_image, seed, cache, epochs_per_image)
        self._shown, thread = _start(augmenter, n_each, seed, epochs_per_image)
        self._close: Callable[[], Any] = weakref.finalize(self, thread.stop)
        self._wake: threading.Event | None = thread.wake

    def __len__(self) -> int:
        return len(self.real) + self.n_generated

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a dataset of {len(self)}")
        index %= len(self)
        if index < len(self.real):
            image, label = _pair(self.real[index], index)
            return (image if self.transform is None else self.transform(image)), label
        number, line = divmod(index - len(self.real), len(self.labels))
        n_each = len(self._shown.pixels) // len(self.labels)
        image = self.as_image(self._shown.read(line * n_each + number % n_each))
        transform, of_labels = (getattr(self.real, name, None) for name in ("transform", "target_transform"))
        transform, label = self.transform or transform, self.labels[line]
        return image if transform is None else transform(image), label if of_labels is None else of_labels(label)

    @property
    def transform(self) -> Callable[[Any], Any] | None:
        """Applied to the images of both."""
        return self._transform

    @transform.setter
    def transform(self, transform: Callable[[Any], Any] | None) -> None:
        if transform is not None and getattr(self.real, "transform", None) is not None:
            raise InputError(
                "The real dataset has a transform already, which both get; give a dataset without, or none here."
            )
        self._transform = transform

    @property
    def epoch(self) -> int:
        """Which epoch's samples these are."""
        return self._shown.epoch

    def set_epoch(self, epoch: int) -> None:
        """Samples are those of an epoch from now on, in a loader's workers too; call it between two epochs."""
        if epoch < 0:
            raise InputError(f"epoch must be at least 0, got {epoch}.")
        self._shown.check()
        self._shown.state[0] = epoch
        if self._wake is not None:
            self._wake.set()

    def close(self) -> None:
        """Stop the thread; returns when it has ended, after a micro-batch at most."""
        self._close()

    def __enter__(self) -> MixedDataset:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """For a process that is being started: the same cache. Else, a dataset of its own with the same samples."""
        if context.get_spawning_popen() is None:
            return _another, (self._given[:4] + (self._transform,) + self._given[5:], self.epoch)
        shared = ("real", "as_image", "labels", "n_generated", "seed", "_transform", "_shown")
        return _in_worker, ({name: self.__dict__[name] for name in shared},)


def _another(given: tuple[Any, ...], epoch: int) -> MixedDataset:
    made = MixedDataset(*given)
    made.set_epoch(epoch)
    return made


def _in_worker(shared: dict[str, Any]) -> MixedDataset:
    made = MixedDataset.__new__(MixedDataset)
    made.__dict__.update(shared, _close=lambda: None, _wake=None)
    return made


class MixedStream(torch.utils.data.IterableDataset[Any]):
    """The samples of a :class:`MixedDataset` one after another, each in one worker of one rank alone: for loaders without sampler.

    Their order is a function of the dataset's seed and the epoch. All ranks, which are those of the environment when the stream is
    read, get as many, so that up to one sample less than there are ranks is left out, in each epoch others.

    Args:
        dataset: with the same real samples on all ranks; its epoch is set, and it is closed, as without the stream.
        shuffle: False leaves the order as it is.
        batch_size: that of the loader. Its workers then take whole batches in turns, so its batches are those of a loader without
            workers and as many as its ``len`` says. Without it each worker ends with a part of a batch; whoever stops at the
            loader's length, as Lightning does, misses some.
    Raises:
        InputError: a batch size below 1.
    """

    def __init__(self, dataset: MixedDataset, shuffle: bool = True, batch_size: int | None = None) -> None:
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}; give that of the loader.")
        self.dataset, self.shuffle, self.batch_size = dataset, shuffle, batch_size
        ranks()  # named now if they cannot be

    def __len__(self) -> int:
        return len(self.dataset) // ranks()[1]

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        info = torch.utils.data.get_worker_info()
        worker, n_workers = (0, 1) if info is None else (info.id, info.num_workers)
        order = np.arange(len(self.dataset))
        if self.shuffle:
            order = np.random.default_rng([self.dataset.seed % 2**64, self.dataset.epoch]).permutation(order)
        rank, world_size = ranks()
        turns = np.arange(len(self)) // (self.batch_size or 1) % n_workers
        for index in order[rank::world_size][: len(self)][turns == worker]:
            yield self.dataset[int(index)]

    def set_epoch(self, epoch: int) -> None:
        """:meth:`MixedDataset.set_epoch`."""
        self.dataset.set_epoch(epoch)

    @property
    def transform(self) -> Callable[[Any], Any] | None:
        """That of the dataset."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Callable[[Any], Any] | None) -> None:
        self.dataset.transform = transform


@dataclass(frozen=True, eq=False)
class _Shown:
    """What all processes see of the cache, in shared memory. Its chunks of ``batch`` images are drawn together.

    ``pixels`` uint8 [K, C, R, R]; ``versions`` int64 [chunks], which version of a chunk is there, -1 while it is written;
    ``wanted`` bool [chunks]; ``state`` int64 [2]: the epoch, and whether the thread is at work; ``message`` of its error.
    """

    pixels: Tensor
    versions: Tensor
    wanted: Tensor
    state: Tensor
    message: Tensor
    batch: int
    epochs_per_image: int

    @property
    def epoch(self) -> int:
        return int(self.state[0])

    def version(self, chunk: int, epoch: int) -> int:
        """Which version of a chunk an epoch uses: chunks take turns in being renewed."""
        return (epoch + chunk % self.epochs_per_image) // self.epochs_per_image

    def read(self, slot: int) -> np.ndarray:
        """A copy of an image of the cache, uint8 [C, R, R], once it is there.

        The epoch is looked up again each time, so a read that began before ``set_epoch`` ends too.
        """
        chunk = slot // self.batch
        while True:
            version = self.version(chunk, self.epoch)
            if int(self.versions[chunk]) == version:
                image = self.pixels[slot].numpy().copy()
                if int(self.versions[chunk]) == version:
                    return image
            self.check()
            self.wanted[chunk] = True
            time.sleep(_POLL)

    def write(self, chunk: int, version: int, images: np.ndarray) -> None:
        self.versions[chunk] = -1
        self.pixels[chunk * self.batch : chunk * self.batch + len(images)] = torch.from_numpy(images)
        self.wanted[chunk] = False
        self.versions[chunk] = version

    def missing(self, epoch: int) -> int | None:
        """A chunk that is not that of the epoch, one that is waited for if there is one."""
        chunks = [k for k, is_there in enumerate(self.versions.tolist()) if is_there != self.version(k, epoch)]
        return next((k for k in chunks if self.wanted[k]), chunks[0] if chunks else None)

    def check(self) -> None:
        """Raise for a thread that draws no more, or whose process is gone."""
        status = int(self.state[1])
        if status == _FAILED:
            message = bytes(self.message.tolist()).rstrip(b"\0").decode("utf-8", "replace")
            raise InputError(f"Images cannot be generated any more: {message}")
        parent = multiprocessing.parent_process()
        if status == _CLOSED or (parent is not None and not parent.is_alive()):
            raise RuntimeError("The dataset was closed, and draws no more images.")


class _Thread:
    """Keeps the cache at the epoch that is asked for, then draws what the next one needs."""

    def __init__(self, shown: _Shown, prepared: Prepared, plan_of_version: Callable[[int], Plan]) -> None:
        self.shown, self.prepared, self.plan_of_version = shown, prepared, plan_of_version
        self.wake, self._ended, self._process = threading.Event(), threading.Event(), os.getpid()
        self.thread = threading.Thread(target=self._run, name="sage_fast-mixing", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """End the thread and wait for it; in a forked copy, nothing."""
        if os.getpid() != self._process:
            return
        self._ended.set()
        self.wake.set()
        if threading.current_thread() is not self.thread:
            self.thread.join()
        if int(self.shown.state[1]) == _RUNNING:
            self.shown.state[1] = _CLOSED

    def _run(self) -> None:
        device, stream = self.prepared.pipeline.device, None
        try:  # on a GPU beside the training, not in its queue, but behind what the pipeline was prepared by
            if device.type == "cuda":
                stream = torch.cuda.Stream(device)
                stream.wait_stream(torch.cuda.default_stream(device))
            with torch.cuda.stream(stream):
                for _ in self._steps():
                    if self._ended.is_set():
                        return
        except BaseException as error:  # workers, which would wait for ever, are told
            message = f"{type(error).__name__}: {error}".encode()[:_MESSAGE]
            self.shown.message[: len(message)] = torch.tensor(list(message), dtype=torch.uint8)
            self.shown.state[1] = _FAILED

    def _steps(self) -> Iterator[None]:
        """Draw or place one chunk after another; at most those that change in an epoch are kept ahead."""
        shown, ahead = self.shown, dict[tuple[int, int], np.ndarray]()
        while True:
            self.wake.clear()  # before looking: what is set from now on is not lost
            epoch = shown.epoch
            ahead = {
                k: v for k, v in ahead.items() if k[1] in (shown.version(k[0], epoch), shown.version(k[0], epoch + 1))
            }
            chunk = shown.missing(epoch)
            if chunk is not None:
                key = chunk, shown.version(chunk, epoch)
                images = ahead.pop(key, None)
                shown.write(*key, self._draw(*key) if images is None else images)
            else:
                coming = ((k, shown.version(k, epoch + 1)) for k in range(len(shown.versions)))
                later = next((k for k in coming if k[1] != shown.version(k[0], epoch) and k not in ahead), None)
                if later is not None:
                    ahead[later] = self._draw(*later)
                elif not self._ended.is_set():
                    self.wake.wait(_LOOK)
            yield

    def _draw(self, chunk: int, version: int) -> np.ndarray:
        with _drawing:
            self.prepared.plan = self.plan_of_version(version)  # the same parts, so what is prepared stays good
            return draw_shard(self.prepared.pipeline, self.prepared.plan, chunk, self.prepared)


def _start(augmenter: Augmenter, n_each: int, seed: int, epochs_per_image: int) -> tuple[_Shown, _Thread]:
    """The cache of ``n_each`` images a line of the plan, and the thread that fills it."""
    generator, (rank, world_size) = augmenter.pipeline.generator, ranks()
    parts = tuple(replace(part, n=n_each, seed=part.seed + seed) for part in augmenter.plan.parts)
    n_images = n_each * len(parts)
    batch = min(augmenter.plan.batch, n_images)
    plan = replace(augmenter.plan, parts=parts, batch=batch, shard=batch)

    def plan_of_version(version: int) -> Plan:
        """Images that no other version, line or rank has."""
        begin = (version * world_size + rank) * len(parts)
        return replace(
            plan, parts=tuple(replace(part, first=(begin + line) * n_each) for line, part in enumerate(parts))
        )

    shown = _Shown(
        torch.zeros(n_images, generator.n_channels, generator.resolution, generator.resolution, dtype=torch.uint8),
        torch.full((plan.n_shards,), -1),
        torch.zeros(plan.n_shards, dtype=torch.bool),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(_MESSAGE, dtype=torch.uint8),
        batch,
        epochs_per_image,
    )
    try:
        for tensor in (shown.pixels, shown.versions, shown.wanted, shown.state, shown.message):
            tensor.share_memory_()
    except RuntimeError as error:  # torch names a file that nobody knows
        raise InputError(
            f"A cache of {n_images} images takes {shown.pixels.nbytes / 2**20:.1f} MiB of shared memory, which there is not "
            f"({str(error).rpartition(': ')[2]}); make cache smaller, or /dev/shm larger (of a container: --shm-size)."
        ) from error
    return shown, _Thread(shown, Prepared(augmenter.pipeline, plan), plan_of_version)


def _check(plan: Plan, ratio: float, cache: int, epochs_per_image: int) -> None:
    if not 0 < ratio < 1:
        raise InputError(f"ratio, the share of generated samples, must be above 0 and below 1, got {ratio}.")
    if cache < len(plan.parts):
        raise InputError(f"cache must hold an image of each of the plan's {len(plan.parts)} lines, got {cache}.")
    if epochs_per_image < 1:
        raise InputError(f"epochs_per_image must be at least 1, got {epochs_per_image}.")


def _labels_of(real: Any, classes: Sequence[str] | Mapping[str, int] | None) -> dict[str, int]:
    """Name -> label of the real dataset's classes."""
    for holder in (real, getattr(real, "reader", None)):  # timm keeps them at its reader
        for name in ("class_to_idx", "classes"):
            classes = getattr(holder, name, None) if classes is None else classes
    if classes is None:
        raise InputError(
            f"{type(real).__name__} has neither 'class_to_idx' nor 'classes'; give classes, the names of its labels."
        )
    return dict(classes) if isinstance(classes, Mapping) else {name: label for label, name in enumerate(classes)}


def _pair(sample: Any, index: int) -> tuple[Any, Any]:
    """Image and label of a real sample."""
    try:
        image, label = sample[:2]
    except (TypeError, KeyError, ValueError) as error:  # a dictionary, a bare image
        raise InputError(
            f"real[{index}] must be (image, label), got {type(sample).__name__}; put a dataset around it that gives the two."
        ) from error
    return image, label


def _label(labels: dict[str, int], category: str) -> int:
    if category not in labels:
        raise InputError(
            f"Category {category!r} is no class of the real dataset, which has {', '.join(sorted(labels)):.200}; "
            "rename its folder of shots, or leave it out with categories in the config."
        )
    return labels[category]
