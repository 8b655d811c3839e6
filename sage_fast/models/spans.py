"""Parts of a file that are read where they lie, and what one file may cost.

A checkpoint holds files within files: an archive's entries, torch files within a pickle. Each is a :class:`Span` of the one
open file, so that nothing is copied before it reaches the memory of its tensor.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import torch
from torch import Tensor

__all__ = ["Budget", "Refusal", "Span", "Window", "fill_from", "open_span", "read_into"]


class Refusal(Exception):
    """Why a file is not read, as the rest of a sentence that begins with the file."""


@dataclass(frozen=True)
class Span:
    """Bytes ``start`` to ``stop`` of a file, not read yet."""

    raw: BinaryIO
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Budget:
    """What one file may still cost: instructions, bytes of new values, bytes that its tensors address.

    Attributes:
        unread: what reads the elements of a tensor's memory, by its address; memory that nobody asks for is never touched.
    """

    def __init__(self, file_size: int) -> None:
        self.steps = min(500_000 + file_size // 8, 10_000_000)  # a tensor of any use has 8 bytes an instruction
        self.bytes = 2 * file_size + (1 << 20)  # up to protocol 2 a tensor is bytes made of text, then a storage
        self.addressed = 4 * file_size + (64 << 20)
        self.unread: dict[int, Callable[[], None]] = {}
        self._once: set[Hashable] = set()

    def allocate(self, n_bytes: int) -> None:
        """Raises Refusal: values take more memory than the file has bytes."""
        self.bytes -= n_bytes
        if self.bytes < 0:
            raise Refusal("claims more data than it has bytes")

    def reserve(self, n_bytes: int, read: Callable[[Tensor], None]) -> Tensor:
        """Memory [n_bytes] uint8 that ``read`` will fill once a tensor in it is needed."""
        raw = torch.empty(n_bytes, dtype=torch.uint8)
        if n_bytes:
            self.unread[raw.data_ptr()] = partial(read, raw)
        return raw

    def address(self, n_bytes: int, same: Hashable = None) -> None:
        """Raises Refusal: tensors that share memory are together far larger than the file.

        Args:
            same: what tensors that are one and the same have alike: these count once (HyperStyle's file has its largest matrix
                under the names of all layers that share it). None: it counts.
        """
        if same is not None and same in self._once:
            return
        self._once |= set() if same is None else {same}
        self.addressed -= n_bytes
        if self.addressed < 0:
            raise Refusal("holds tensors that share memory and are together far larger than the file")


class Window(io.RawIOBase):
    """The bytes of a span as a file of their own."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._span)}[whence]
        self._position = min(max(origin + offset, 0), len(self._span))
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: len(self._span) - self._position]
        self._span.raw.seek(self._span.start + self._position)
        n_read = self._span.raw.readinto(view)  # type: ignore[attr-defined]
        self._position += n_read
        return n_read


def open_span(span: Span) -> io.BufferedReader:
    """The bytes of a span as a buffered file that ends where the span ends."""
    return io.BufferedReader(Window(span))


def read_into(span: Span) -> Tensor:
    """The bytes of a span as a uint8 tensor, read without a second copy.

    Raises:
        Refusal: the file is shorter.
    """
    raw = torch.empty(len(span), dtype=torch.uint8)
    fill_from(span, raw)
    return raw


def fill_from(span: Span, raw: Tensor) -> None:
    """The bytes of a span, read into memory uint8 of that size. Raises as :func:`read_into`."""
    if len(span) and open_span(span).readinto(raw.numpy().data) != len(span):
        raise Refusal("ends in the middle of its data")
