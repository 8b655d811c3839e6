"""StyleGAN2 weights as others publish them: the ``.pt`` of the common PyTorch port.

Such a file is a dictionary of state dicts ``g_ema``, ``g``, ``d`` and a tensor ``latent_avg``. It is read without
running pickled code, and the architecture follows from the names and shapes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sage_fast.errors import InputError
from sage_fast.models.stylegan2 import Discriminator, Generator

__all__ = ["fill_network", "published_discriminator", "published_generator", "reason_of"]

Network = TypeVar("Network", bound=nn.Module)


def published_generator(path: str | os.PathLike[str]) -> Generator:
    """The averaged generator ``g_ema`` of a published file (else ``g``), float32 on the CPU.

    Without ``latent_avg`` in the file the mean of the mapping over 10,000 prior samples stands in for it.

    Raises:
        InputError: the file is missing, truncated, foreign, or holds no generator.
    """
    content = _read(Path(path))
    key = "g_ema" if "g_ema" in content else "g"
    state = _state(content, key, path)
    if torch.is_tensor(content.get("latent_avg")):
        state["latent_avg"] = content["latent_avg"].float().flatten()
    return fill_network(lambda: Generator(**_generator_shape(state)), state, f"File {str(path)!r}, entry {key!r},")


def published_discriminator(path: str | os.PathLike[str]) -> Discriminator:
    """The discriminator ``d`` of a published file, float32 on the CPU. Raises as :func:`published_generator`."""
    state = _state(_read(Path(path)), "d", path)
    return fill_network(lambda: Discriminator(**_discriminator_shape(state)), state, f"File {str(path)!r}, entry 'd',")


def fill_network(build: Callable[[], Network], state: Mapping[str, Tensor], where: str) -> Network:
    """The network that ``build`` makes, with the weights of ``state``, in eval mode; leaves torch's random state alone.

    Raises:
        InputError: ``build`` fails or the weights do not fit; ``where`` names their file.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            network = build()
        network.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise InputError(
            f"{where} does not hold the weights expected ({reason_of(error)}); give another file."
        ) from error
    return network.eval()


def reason_of(error: BaseException) -> str:
    """What went wrong, in a few words without a full stop."""
    if isinstance(error, KeyError):
        return f"no {error.args[0]!r}"
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    first = " ".join(str(error).split()).split(". ")[0]
    return first.rstrip(".")[:200] or type(error).__name__


def _read(path: Path) -> dict[str, Any]:
    if path.suffix.lower() == ".pkl":
        raise InputError(
            f"File {str(path)!r} is a pickle that holds code, which is not read; "
            "give the .pt of the common PyTorch port or the folder of a bundle."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch on pickle protocols
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged archives and foreign files raise almost any exception type
        raise InputError(
            f"File {str(path)!r} is truncated or no file of weights ({reason_of(error)}); "
            "give a published .pt or the folder of a bundle."
        ) from error
    if not isinstance(content, dict) or not {"g_ema", "g", "d"} & set(content):
        raise InputError(f"File {str(path)!r} holds none of g_ema, g and d; give a StyleGAN2 .pt of the PyTorch port.")
    return content


def _state(content: Mapping[str, Any], key: str, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict under ``key``, without the prefix that data-parallel training puts before its names."""
    state = content.get(key)
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise InputError(f"File {str(path)!r} holds no network {key!r}; give a file that was saved with it.")
    return {str(name).removeprefix("module."): value.float() for name, value in state.items()}


def _generator_shape(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of :class:`Generator` that its weights tell."""
    n_blocks = _count(state, "convs.", ".conv.weight") // 2
    channels = [state["input.input"].shape[1]] + [state[f"convs.{2 * i}.conv.weight"].shape[1] for i in range(n_blocks)]
    style_dim = state["conv1.conv.modulation.weight"].shape[1]
    embed = state.get("style.embed.weight")
    return {
        "resolution": 4 << n_blocks,
        "style_dim": style_dim,
        "n_mapping": _count(state, "style.", ".weight"),
        "n_channels": state["to_rgb1.bias"].shape[1],
        "channels": channels,
        "c_dim": 0 if embed is None else embed.shape[1],
    }


def _discriminator_shape(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of :class:`Discriminator` that its weights tell."""
    n_blocks = _count(state, "convs.", ".skip.1.weight")
    first = state["convs.0.0.weight"]
    widths = [first.shape[0]] + [state[f"convs.{i + 1}.conv2.1.weight"].shape[0] for i in range(n_blocks)]
    shape = {"resolution": 4 << n_blocks, "n_channels": first.shape[1], "channels": widths[::-1]}
    if "embed.0.weight" in state:
        shape |= {"c_dim": state["embed.0.weight"].shape[1], "n_mapping": _count(state, "embed.1.", ".weight")}
    return shape


def _count(state: Mapping[str, Tensor], prefix: str, suffix: str) -> int:
    """How many names read prefix, a number, suffix."""
    middles = (name[len(prefix) : -len(suffix)] for name in state if name.startswith(prefix) and name.endswith(suffix))
    return sum(middle.isdecimal() for middle in middles)
