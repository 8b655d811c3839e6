"""What a published file comes apart into: networks as constructor arguments and weights under our names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from sage_fast.errors import InputError, reason_of

__all__ = [
    "EncoderPart", "Part", "PublishedFile", "average_of", "check_filter", "count", "fill_network", "fitted", "floats",
    "is_usual_filter", "misfit", "number_of", "own_state", "prefixed", "shapes_of",
]  # fmt: skip

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Part:
    """A network of ours that has not been made yet.

    Attributes:
        kind: its class.
        arguments: of its constructor.
        state: its weights.
        where: the file and the entry in it, for messages.
        n_fp16: how many resolutions its own code computes in float16; recorded, not imitated.
    """

    kind: type[nn.Module]
    arguments: Mapping[str, Any]
    state: Mapping[str, Tensor]
    where: str
    n_fp16: int = 0

    def build(self) -> Any:
        """The network, float32, in eval mode. Raises :class:`InputError` as :func:`fill_network`, or for its mean latent."""
        average_of(self.state.get("latent_avg"), self.where)
        return fill_network(lambda: self.kind(**self.arguments), self.state, self.where)


@dataclass(frozen=True)
class EncoderPart:
    """Weights (under names of their own network, without prefixes) and options of an encoder, as stored.

    Attributes:
        state: ``encoder.*``, ``hypernet.*``: float32.
        options: what its training was called with.
        latent_avg: [D], [1, D] or [n, D]; None where the file has none.
        mean_of_generator: gives the mean latent [D] of the generator beside it; None where there is no generator.
    """

    state: Mapping[str, Tensor]
    options: Mapping[str, Any]
    latent_avg: Tensor | None
    where: str
    mean_of_generator: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class PublishedFile:
    """A file whose format was recognised; networks are taken apart when they are asked for.

    Attributes:
        format: its name, for people.
        generator, discriminator, encoder: functions that give the part, None where the file has none.
        has_latent_avg: whether a mean latent is stored.
        directions: A [6, D, K] of AGE or SAGE.
        embeddings: class embeddings by category, each [L, D].
        codes: codes of the images of each category, each [n, 6, K].
        statistics: ``mean``, ``mean_abs`` and ``cov`` of codes.
        ignored: what else is in the file.
    """

    format: str
    generator: Callable[[], Part] | None = None
    discriminator: Callable[[], Part] | None = None
    encoder: Callable[[], EncoderPart] | None = None
    has_latent_avg: bool = False
    directions: Tensor | None = None
    embeddings: Mapping[str, Tensor] | None = None
    codes: Mapping[str, Tensor] | None = None
    statistics: Mapping[str, Tensor] | None = None
    ignored: tuple[str, ...] = field(default=())

    def holds(self) -> list[str]:
        """What can be loaded from it, in words."""
        words = {
            "generator": "generator", "discriminator": "discriminator", "encoder": "encoder", "directions": "directions",
            "embeddings": "class embeddings", "codes": "codes", "statistics": "statistics of codes",
        }  # fmt: skip
        return [word for name, word in words.items() if getattr(self, name) is not None]


def average_of(value: Any, where: str) -> Tensor | None:
    """A mean latent as a file keeps it, as a tensor; None where there is none.

    Raises:
        InputError: it is no array of finite numbers.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        value = torch.as_tensor(value.astype(np.float32))
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.is_complex() or value.dtype == torch.bool:
        got = (
            f"numbers of {value.dtype}"
            if isinstance(value, Tensor | np.ndarray)
            else f"a value of type {type(value).__name__}"
        )
        raise InputError(f"{where} has {got} as latent_avg, expected an array of finite numbers; it is damaged.")
    if not bool(torch.isfinite(value).all()):
        raise InputError(
            f"{where} has a latent_avg that is not finite, expected an array of finite numbers; it is damaged."
        )
    return value


def fill_network(build: Callable[[], Network], state: Mapping[str, Tensor], where: str) -> Network:
    """The network that ``build`` makes, with the tensors of ``state`` themselves, in eval mode.

    Nothing is drawn or copied: the network is made without memory and takes over the tensors. A tensor that modules of it share
    may stand in ``state`` under one of its names, as :func:`own_state` leaves it, or under all.

    Raises:
        InputError: ``build`` fails or the weights do not fit; ``where`` names their file.
    """
    try:
        with torch.device("meta"):
            network = build()
        named = network.state_dict(keep_vars=True)
        held = {id(tensor): state[name] for name, tensor in named.items() if name in state}
        shared = {name: held[id(tensor)] for name, tensor in named.items() if id(tensor) in held}
        network.load_state_dict({**shared, **state}, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise InputError(
            f"{where} does not hold the weights expected ({reason_of(error)}); give another file."
        ) from error
    return network.eval()


def own_state(network: nn.Module) -> dict[str, Tensor]:
    """The weights and buffers of ``network.state_dict()``, those that modules share under their first name alone."""
    first: dict[int, str] = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        first.setdefault(id(tensor), name)
    state = network.state_dict()
    return {name: state[name] for name in first.values()}


def shapes_of(kind: type[nn.Module], arguments: Mapping[str, Any]) -> dict[str, torch.Size]:
    """The shape of every weight of a network, without making it."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in kind(**arguments).state_dict().items()}


def fitted(value: Tensor, shape: Iterable[int], name: str, where: str) -> Tensor:
    """``value`` in ``shape``, from which it may differ by dimensions of length 1.

    Raises:
        InputError: it differs by more.
    """
    shape = tuple(shape)
    if [n for n in value.shape if n != 1] != [n for n in shape if n != 1]:
        raise InputError(
            f"{where} has {name!r} of shape {list(value.shape)}, expected {list(shape)} from the other weights; "
            "it is damaged or of another network."
        )
    return value.reshape(shape).contiguous()


def check_filter(value: Tensor, where: str) -> Tensor:
    """A resampling filter [4, 4], the same from both ends.

    Raises:
        InputError: another one.
    """
    if not is_usual_filter(value):
        got = f"of shape {list(value.shape)}" if value.shape != (4, 4) else "that differs from its mirror image"
        raise InputError(
            f"{where} has a resampling filter {got}, expected 4 symmetric taps a side, as [1, 3, 3, 1]; other filters "
            "are not supported."
        )
    return value


def is_usual_filter(value: Tensor) -> bool:
    """Whether a resampling filter has [4, 4] taps, the same from both ends."""
    return value.shape == (4, 4) and torch.equal(value, value.flip(0, 1))


def number_of(name: str, value: Any, where: str, whole: bool = False) -> Any:
    """A number that a file tells of a network, an int where it is to be whole; None where it tells none.

    Raises:
        InputError: something else.
    """
    if value is None:
        return None
    if isinstance(value, Integral if whole else Real) and not isinstance(value, bool) and isfinite(value):
        return value if isinstance(value, int | float) else int(value) if isinstance(value, Integral) else float(value)
    raise InputError(
        f"{where} has {name}={value!r:.40}, expected {'a whole' if whole else 'one finite'} number; it is damaged."
    )


def misfit(where: str, what: str, error: BaseException) -> InputError:
    """The error for weights that do not make the network expected."""
    return InputError(f"{where} does not hold the weights of a {what} ({reason_of(error)}); give another file.")


def floats(state: Any, where: str) -> dict[str, Tensor]:
    """``state`` with floating tensors as float32, without the prefix that data-parallel training puts before all its names.

    Raises:
        InputError: ``state`` is no mapping of names to tensors.
    """
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{where} is no network: expected names and tensors; give a file that was saved with it.")
    bare = {str(name): value for name, value in state.items()}
    if bare and all(name.startswith("module.") for name in bare):
        bare = prefixed(bare, "module.")
    return {name: value.float() if value.is_floating_point() else value for name, value in bare.items()}


def prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose name begins with ``prefix``, without it."""
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def count(state: Iterable[str], prefix: str, suffix: str) -> int:
    """How many names read prefix, a number, suffix."""
    middles = (name[len(prefix) : -len(suffix)] for name in state if name.startswith(prefix) and name.endswith(suffix))
    return sum(middle.isdecimal() for middle in middles)
