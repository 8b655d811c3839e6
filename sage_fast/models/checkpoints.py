"""Checkpoints of others, read without running anything in them."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sage_fast.errors import InputError, reason_of
from sage_fast.models.containers import DAMAGE, read_container
from sage_fast.models.plain_trees import Global, Stub
from sage_fast.models.spans import Refusal

__all__ = [
    "Checkpoint",
    "Global",
    "Stub",
    "is_module",
    "is_tensorflow_network",
    "read_checkpoint",
    "source_of",
    "state_dict_of",
    "tensorflow_arrays_of",
]


@dataclass(frozen=True)
class Checkpoint:
    """What a file of weights holds.

    Attributes:
        path: the file.
        container: "pickle", "torch-zip", "torch-legacy", "safetensors", "npy" or "npz".
        content: a tree of dict, list, tuple, set, numbers, text, ``Tensor`` (CPU) and ``ndarray``, with a
            :class:`~sage_fast.models.unpickling.Stub` for each instance of a class and a
            :class:`~sage_fast.models.unpickling.Global` for each class or function that is only named.
        metadata: of a safetensors file.
    """

    path: Path
    container: str
    content: Any
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_checkpoint(path: str | os.PathLike[str], choose: Callable[[Any], Any] = lambda content: content) -> Checkpoint:
    """The content of a file of weights; its kind follows from its first bytes, and no code in it runs.

    Args:
        choose: of the content of a pickle or torch file, with tensors that have no elements yet, what is wanted: the elements
            of the rest are not read.
    Raises:
        InputError: it is missing, truncated, no file of weights, or holds what no such file needs.
    """
    path = path_of(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise Refusal("is a directory" if path.is_dir() else "is no regular file")
        with open(path, "rb", buffering=0) as raw:
            return Checkpoint(path, *read_container(raw, path, os.fstat(raw.fileno()).st_size, choose))
    except Refusal as error:
        raise InputError(f"File {str(path)!r} {error}; give a published file of weights.") from error
    except OSError as error:
        raise InputError(
            f"File {str(path)!r} cannot be read ({reason_of(error)}); give a published file of weights."
        ) from error
    except DAMAGE as error:
        raise InputError(
            f"File {str(path)!r} is truncated or damaged ({reason_of(error)}); give a published file of weights."
        ) from error


def path_of(path: Any) -> Path:
    """What the caller gave as the name of a file or folder, as a path.

    Raises:
        InputError: it is no name.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"path must be the name of a file or folder, got {path!r:.40} ({type(path).__name__}).")
    return Path(path)


def source_of(path: Any) -> Path:
    """The file or folder of networks that is meant.

    A run that is no bundle yet means the newest checkpoint of its GAN, unless the encoder tuned the generator since.
    """
    path = path_of(path)
    checkpoint = path / "checkpoints" / "gan.pt"
    if not checkpoint.is_file() or (path / "bundle.json").exists():
        return path
    return path if (path / "checkpoints" / "encoder.pt").exists() and _tunes_generator(path) else checkpoint


def _tunes_generator(run: Path) -> bool:
    try:
        return bool(json.loads((run / "configs" / "encoder.json").read_text(encoding="utf-8"))["tune_generator"])
    except (OSError, ValueError, KeyError, TypeError):
        return True


def state_dict_of(module: Stub) -> dict[str, Tensor]:
    """Parameters and buffers of a pickled ``nn.Module``, by their dotted names.

    Raises:
        InputError: ``module`` is the record of something else.
    """
    if not is_module(module):
        raise InputError(f"Record {module.name!r} is no network: it lacks the parameters, buffers or modules of one.")
    return dict(_named_tensors(module.state, ""))


def _named_tensors(state: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*state["_parameters"].items(), *state["_buffers"].items()):
        if isinstance(tensor, Tensor):
            yield f"{prefix}{name}", tensor
    for name, child in state["_modules"].items():
        if child is not None:
            yield from _named_tensors(child.state, f"{prefix}{name}.")


def is_module(value: Any) -> bool:
    """Whether a value is the record of a pickled ``nn.Module``, whose modules are records of modules too."""
    if not (isinstance(value, Stub) and isinstance(value.state, dict)):
        return False
    tables = [value.state.get(name) for name in ("_parameters", "_buffers", "_modules")]
    named = all(isinstance(table, dict) and all(isinstance(name, str) for name in table) for table in tables)
    return named and all(child is None or is_module(child) for child in value.state["_modules"].values())


def is_tensorflow_network(value: Any) -> bool:
    """Whether a value is the record of a pickled ``dnnlib.tflib.Network``, whose components are such records too."""
    if not (isinstance(value, Stub) and value.name == "Network" and isinstance(value.state, dict)):
        return False
    variables, components = value.state.get("variables"), value.state.get("components") or {}
    if not (isinstance(variables, list) and isinstance(components, dict)):
        return False
    return all(map(_is_variable, variables)) and all(map(is_tensorflow_network, components.values()))


def _is_variable(value: Any) -> bool:
    pair = isinstance(value, tuple | list) and len(value) == 2
    if not pair or not isinstance(value[0], str):
        return False
    return (
        isinstance(value[1], int | float | np.number)
        or isinstance(value[1], np.ndarray)
        and value[1].dtype.kind in "fiub"
    )


def tensorflow_arrays_of(network: Stub) -> dict[str, np.ndarray]:
    """Variables of a pickled TensorFlow network and, each behind its name and a slash, of its components.

    Raises:
        InputError: ``network`` is the record of something else.
    """
    if not is_tensorflow_network(network):
        raise InputError(
            f"Record {network.name!r} is no TensorFlow network: it lacks the variables or components of one."
        )
    arrays = {name: np.asarray(value) for name, value in network.state["variables"]}
    for component, inner in (network.state.get("components") or {}).items():
        arrays |= {f"{component}/{name}": value for name, value in tensorflow_arrays_of(inner).items()}
    return arrays
