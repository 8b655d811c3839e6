"""What is in a checkpoint, as words and numbers: its networks, their tensors and settings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from sage_fast.models.checkpoints import (
    Checkpoint,
    Stub,
    is_module,
    is_tensorflow_network,
    state_dict_of,
    tensorflow_arrays_of,
)

__all__ = ["TensorEntry", "TensorGroup", "describe", "settings_of"]


@dataclass(frozen=True)
class TensorEntry:
    """Name, shape and type of one tensor or array."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that lie together: a network, a state dict, or a list.

    Attributes:
        place: where, by the keys that lead there and dots between; empty for the whole file.
        class_name: of a pickled network; empty when the tensors are in a dict or list.
        tensors: in the order of the file.
        settings: numbers, texts and short lists beside the tensors, by dotted name.
    """

    place: str
    class_name: str
    tensors: tuple[TensorEntry, ...]
    settings: dict[str, Any]

    @property
    def n_elements(self) -> int:
        """How many numbers the tensors have together."""
        return sum(entry.n_elements for entry in self.tensors)


def describe(checkpoint: Checkpoint) -> list[TensorGroup]:
    """The groups of tensors and settings of a checkpoint, in the order of the file.

    A network is a group, and so is a dict with the tensors that are its own values. A list, or a dict with keys that are
    no names (an optimizer's state), is one group with everything below it.
    """
    return [group for group in _groups(checkpoint.content, "") if group.tensors or group.settings]


def settings_of(value: Any) -> dict[str, Any]:
    """The numbers, texts and short lists of plain values in a tree, by dotted name; of a network, what it was made with."""
    if isinstance(value, Stub):
        state = value.state if isinstance(value.state, dict) else {}
        made_with = state.get("_init_kwargs", state.get("static_kwargs", {}))
        own = {name: entry for name, entry in state.items() if _is_setting(entry) and not str(name).startswith("_")}
        return {**own, **settings_of(made_with)} if isinstance(made_with, dict) else own
    return dict(_settings(value, ""))


def _settings(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if _is_setting(value):
        yield prefix, value
    elif isinstance(value, dict):
        for name, child in value.items():
            yield from _settings(child, _join(prefix, name))


def _is_setting(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= 16 and all(isinstance(child, bool | int | float | str | None) for child in value)
    return value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 200)


def _groups(value: Any, place: str) -> Iterator[TensorGroup]:
    if is_module(value):
        yield TensorGroup(place, value.name, _entries(state_dict_of(value)), settings_of(value))
    elif is_tensorflow_network(value):
        yield TensorGroup(place, value.name, _entries(tensorflow_arrays_of(value)), settings_of(value))
    elif isinstance(value, Tensor | np.ndarray):
        yield TensorGroup(place, "", _entries({"": value}), {})
    elif isinstance(value, dict | list | tuple):
        children = value if isinstance(value, dict) else dict(enumerate(value))
        if not all(isinstance(name, str) for name in children) and not _holds_stub(children):
            yield TensorGroup(place, "", _entries(dict(_flat(children, ""))), settings_of(children))
            return
        direct = {str(name): child for name, child in children.items() if isinstance(child, Tensor | np.ndarray)}
        settings = settings_of({name: child for name, child in children.items() if _is_setting(child)})
        yield TensorGroup(place, "", _entries(direct), settings)
        for name, child in children.items():
            if not (isinstance(child, Tensor | np.ndarray) or _is_setting(child)):
                yield from _groups(child, _join(place, name))
    elif isinstance(value, Stub):
        yield from _groups(value.state, place)


def _holds_stub(children: dict[Any, Any]) -> bool:
    return any(isinstance(child, Stub) for child in children.values())


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Every tensor in dicts and lists, by dotted name."""
    if isinstance(value, Tensor | np.ndarray):
        yield prefix, value
    elif isinstance(value, dict | list | tuple):
        for name, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(child, _join(prefix, name))


def _entries(tensors: dict[str, Any]) -> tuple[TensorEntry, ...]:
    return tuple(
        TensorEntry(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in tensors.items()
    )


def _join(place: str, name: Any) -> str:
    return f"{place}.{name}" if place else str(name)
