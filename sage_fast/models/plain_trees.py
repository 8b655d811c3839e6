"""The plain values that a checkpoint becomes: the records of what was pickled, and the limits of the tree."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sage_fast.models.spans import Refusal

__all__ = ["Global", "Stub", "check_plain", "kind_of", "tensors_in"]

MAX_NODES = 2_000_000  # values of the tree, each counted as often as it is reached
MAX_HEIGHT = 256


@dataclass(frozen=True)
class Global:
    """A class or function that a pickle names; the name only, never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Stub:
    """An instance that was pickled, as a record: its class, arguments and state. Nothing was built."""

    module: str
    name: str
    args: tuple[Any, ...] = ()
    state: Any = None


def kind_of(value: Any) -> str:
    """What a value is, for a message."""
    return str(value) if type(value) is Global else type(value).__name__


def check_plain(root: Any, leaves: tuple[type, ...]) -> None:
    """Sees to it that a walk of the tree ends soon: no cycle, no height or number of values beyond the limits.

    Values that are reached twice count twice, so that walkers need not look out for shared ones.

    Args:
        root: the tree of dict, list, tuple, set, Stub and leaves.
        leaves: the types of leaves.

    Raises:
        Refusal: it is not so, or holds something else.
    """
    measured: dict[int, tuple[int, int]] = {}  # id of a finished container -> its number of values, its height
    path = [_Open((root,))]
    open_ids = {id(path[0].value)}
    while path:
        here = path[-1]
        for child in here.children:  # goes on behind the child where it broke off
            if type(child) not in _CONTAINERS:
                if type(child) not in leaves:
                    raise Refusal(f"holds a {kind_of(child)} where plain values are expected")
                here.size += 1
            elif id(child) in measured:
                here.add(*measured[id(child)])
            elif id(child) in open_ids:
                raise Refusal("holds a value that contains itself")
            else:
                path.append(_Open(child))
                open_ids.add(id(child))
                break
        else:
            path.pop()
            open_ids.discard(id(here.value))
            measured[id(here.value)] = (here.size, here.height)
            if path:
                path[-1].add(here.size, here.height)
        if here.size > MAX_NODES:
            raise Refusal(f"holds more than {MAX_NODES} values")
        if len(path) + here.height > MAX_HEIGHT:
            raise Refusal(f"nests values more than {MAX_HEIGHT} deep")


def tensors_in(root: Any) -> Iterator[Tensor]:
    """Every tensor of a tree that :func:`check_plain` has passed, as often as it is reached."""
    if isinstance(root, Tensor):
        yield root
    elif isinstance(root, _CONTAINERS):
        for child in _children(root):
            yield from tensors_in(child)


def _children(container: Any) -> Iterator[Any]:
    children = (container.args, container.state) if type(container) is Stub else container
    return iter(children.values() if isinstance(children, dict) else children)


_CONTAINERS = (dict, OrderedDict, list, tuple, set, frozenset, Stub)


class _Open:
    """A container whose children are being counted."""

    def __init__(self, value: Any) -> None:
        self.value, self.children = value, _children(value)
        self.size = self.height = 1

    def add(self, size: int, height: int) -> None:
        self.size += size
        self.height = max(self.height, height + 1)
