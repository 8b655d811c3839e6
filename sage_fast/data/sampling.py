"""Which images a training step sees: an order that is a pure function of (seed, epoch), and a place in it.

**The order.** Without ``balance`` an epoch is every image once, in an order of its own. With ``balance`` it is
``ceil(n / S)`` rounds over the S classes that have images; a round shows every class once, in an order of its own, and a
class shows its own images one after the other, each once before any comes again, going on where the last round (or
epoch) left off. So each class appears exactly ``ceil(n / S)`` times an epoch, and in any run of draws two classes
differ by two at most.

**Batches** are cut from the endless stream of epochs without a gap: a batch may hold the end of one epoch and the start
of the next, no image is dropped, and a batch larger than an epoch holds several.

Orders are sorted hashes (``splitmix64``), not a library's random stream: they are the same on every machine and with
every version of NumPy and PyTorch.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sage_fast.data.splitmix64 import splitmix64
from sage_fast.errors import InputError

__all__ = ["EpochSampler"]


class EpochSampler:
    """Batches of image numbers without end; :meth:`state_dict` (two integers) is all that a checkpoint needs.

    With several processes each makes the same sampler of the global batch and takes its share, e.g.
    ``sampler.next()[rank::n_ranks]``.

    Attributes:
        epoch: number of the epoch that the next image comes from.
        position: images of it drawn so far.
        epoch_length: images in an epoch: n, or with ``balance`` the next multiple of the number of classes.
    """

    def __init__(
        self, n: int, batch: int, seed: int = 0, labels: Tensor | Sequence[int] | None = None, balance: bool = False
    ):
        """A sampler at the start of epoch 0.

        Args:
            n: number of images, at least 1.
            batch: images of a step over all processes, at least 1; may exceed ``n``.
            seed: any integer; the same one gives the same order on every machine.
            labels: class of each image, n integers; used with ``balance`` only.
            balance: show every class equally often.

        Raises:
            InputError: a number out of range, or ``balance`` without one label per image.
        """
        if n < 1 or batch < 1:
            raise InputError(f"A sampler needs at least one image and a batch of at least 1, got {n} and {batch}.")
        self.n, self.batch, self.seed = n, batch, operator.index(seed)
        self._members = _images_of_classes(n, labels) if balance else None
        rounds = 0 if self._members is None else -(-n // len(self._members))
        self.epoch_length = n if self._members is None else rounds * len(self._members)
        self.epoch = self.position = 0
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))  # an epoch and its order

    def next(self) -> Tensor:
        """The image numbers of the next batch: int64 [batch], each 0 to n - 1."""
        parts, missing = [], self.batch
        while missing:
            part = self._epoch_order()[self.position : self.position + missing]
            parts.append(part)
            missing -= len(part)
            self._advance(len(part))
        return torch.from_numpy(np.concatenate(parts))

    def skip(self, n_batches: int) -> None:
        """Pass over ``n_batches`` batches, in no more time than it takes to say so; InputError where they are negative."""
        if n_batches < 0:
            raise InputError(f"n_batches must be at least 0, got {n_batches}.")
        self._advance(n_batches * self.batch)

    def state_dict(self) -> dict[str, int]:
        """Where the next batch begins: ``epoch`` and ``position``, plain integers."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a :meth:`state_dict` of a sampler with the same n, seed, labels and ``balance``.

        Raises:
            InputError: the state is not one of such a sampler.
        """
        epoch, position = (state.get(key) for key in ("epoch", "position"))
        whole = all(isinstance(v, int) and v >= 0 for v in (epoch, position))
        if not whole or position >= self.epoch_length:  # type: ignore[operator]
            raise InputError(
                f"the state of the sampler must be an epoch and a position below {self.epoch_length}, got {dict(state)}; "
                "resume with the images that the run was started with."
            )
        self.epoch, self.position = epoch, position  # type: ignore[assignment]

    def _advance(self, n_images: int) -> None:
        epochs, self.position = divmod(self.position + n_images, self.epoch_length)
        self.epoch += epochs

    def _epoch_order(self) -> np.ndarray:
        """The image numbers of the present epoch: int64 [epoch_length]; kept until the next epoch."""
        if self._order[0] != self.epoch:
            if self._members is None:
                order = _orders(_key(self.seed, self.epoch), self.n)[0]
            else:
                order = _balanced_order(self._members, self.epoch_length, self.seed, self.epoch)
            self._order = self.epoch, order
        return self._order[1]


def _images_of_classes(n: int, labels: Tensor | Sequence[int] | None) -> list[np.ndarray]:
    """The image numbers of each class that has images."""
    found = None if labels is None else np.asarray(labels)
    if found is None or found.shape != (n,) or not np.issubdtype(found.dtype, np.integer):
        came = "none" if found is None else f"{found.dtype} {list(found.shape)}"
        raise InputError(f"balance needs one integer label for each of the {n} images, got {came}; give labels.")
    by_class = np.argsort(found, kind="stable")
    _, starts = np.unique(found[by_class], return_index=True)
    return np.split(by_class.astype(np.int64), starts[1:])


def _balanced_order(members: list[np.ndarray], length: int, seed: int, epoch: int) -> np.ndarray:
    """The image numbers of one epoch, round after round: int64 [length]."""
    n_rounds = length // len(members)
    rounds = epoch * n_rounds + np.arange(n_rounds)
    shown = np.stack([_walk(images, rounds, seed, i) for i, images in enumerate(members)], axis=1)  # [rounds, S]
    classes = _orders(_key(seed, -1, rounds), len(members))  # [rounds, S]
    return np.take_along_axis(shown, classes, axis=1).reshape(-1)


def _walk(images: np.ndarray, rounds: np.ndarray, seed: int, number: int) -> np.ndarray:
    """The image that class ``number`` shows in each of ``rounds`` (ascending by one)."""
    passes, places = np.divmod(rounds, len(images))
    orders = _orders(_key(seed, number, np.arange(passes[0], passes[-1] + 1)), len(images))
    return images[orders[passes - passes[0], places]]


def _key(seed: int, *path: int | np.ndarray) -> np.ndarray:
    """A uint64 hash of the seed and what it is used for: [K], where an array of K stands in ``path``."""
    key = np.array([seed % 2**64], np.uint64)
    for part in path:
        numbers = np.atleast_1d(part % 2**64 if isinstance(part, int) else part).astype(np.uint64)
        key = splitmix64(splitmix64(key) + numbers)
    return splitmix64(key)


def _orders(keys: np.ndarray, n: int) -> np.ndarray:
    """A permutation of 0 ... n - 1 for each key: int64 [K, n]. The hash is one to one, so no two ranks are equal."""
    return np.argsort(splitmix64(keys[:, None] + np.arange(n, dtype=np.uint64)), axis=1)
