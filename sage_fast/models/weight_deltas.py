"""A generator with other convolution weights for each image: where HyperStyle's deltas reach synthesis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import functional_call

from sage_fast.errors import InputError
from sage_fast.models.image_encoder import WeightDeltas

if TYPE_CHECKING:
    from sage_fast.models.stylegan2 import Generator

__all__ = ["add_deltas", "layer_names", "select_deltas", "synthesize", "weight_shapes"]


def layer_names(generator: Generator) -> list[str]:
    """Names of the modulated convolutions in the order of synthesis: at 4 px one and its ToRGB, then two and a ToRGB each."""
    names = ["conv1.conv", "to_rgb1.conv"]
    for i in range(len(generator.to_rgbs)):
        names += [f"convs.{2 * i}.conv", f"convs.{2 * i + 1}.conv", f"to_rgbs.{i}.conv"]
    return names


def weight_shapes(generator: Generator) -> list[tuple[int, int, int]]:
    """C_out, C_in and k of every modulated convolution, in the order of :func:`layer_names`."""
    weights = [generator.get_parameter(f"{name}.weight") for name in layer_names(generator)]
    return [(w.shape[1], w.shape[2], w.shape[3]) for w in weights]


def synthesize(
    generator: Generator,
    w_plus: Tensor,
    weight_deltas: WeightDeltas | None,
    noise: str = "const",
    rng: torch.Generator | None = None,
) -> Tensor:
    """``generator(w_plus)`` with the weights theta (1 + delta) of each image (Eq. 4 of HyperStyle, Alaluf et al. 2022).

    Differentiable in latents, deltas and the generator's parameters. With deltas the layers run one by one, each as a grouped
    convolution; the fused kernels share one weight among the batch.

    Args:
        w_plus: absolute latents [N, L, D].
        weight_deltas: one entry a layer of :func:`layer_names`, None or [N, C_out, C_in, k, k], k 1 where one number
            serves a whole kernel. None: the generator as it is.
        noise, rng: as of ``Generator.synthesis``.
    Raises:
        InputError: another number of entries or other shapes than the generator has.
    """
    if weight_deltas is None or all(delta is None for delta in weight_deltas):
        return generator(w_plus, noise=noise, rng=rng)
    names = layer_names(generator)
    if len(weight_deltas) != len(names):
        raise InputError(
            f"this generator has {len(names)} modulated convolutions, got weight deltas for {len(weight_deltas)}; "
            "use the HyperStyle encoder that was trained with it."
        )
    changed = {}
    for name, delta in zip(names, weight_deltas):
        if delta is not None:
            weight = generator.get_parameter(f"{name}.weight")
            _check_delta(name, weight, delta, len(w_plus))
            changed[f"{name}.weight"] = weight * (1 + delta)
    return functional_call(generator, changed, (w_plus,), {"noise": noise, "rng": rng})


def add_deltas(a: WeightDeltas | None, b: WeightDeltas) -> WeightDeltas:
    """The sum of two sets of deltas; a layer that neither changes stays None."""
    if a is None:
        return b
    return tuple(y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True))


def select_deltas(weight_deltas: WeightDeltas | None, index: Tensor | Sequence[int] | slice) -> WeightDeltas | None:
    """The deltas of the images that ``index`` picks."""
    if weight_deltas is None:
        return None
    return tuple(None if delta is None else delta[index] for delta in weight_deltas)


def _check_delta(name: str, weight: Tensor, delta: Tensor, n: int) -> None:
    _, c_out, c_in, k, _ = weight.shape
    if delta.ndim != 5 or delta.shape[:3] != (n, c_out, c_in) or tuple(delta.shape[3:]) not in ((k, k), (1, 1)):
        raise InputError(
            f"weight deltas of {name} must have shape [{n}, {c_out}, {c_in}, {k}, {k}] or [{n}, {c_out}, {c_in}, 1, 1], "
            f"got {list(delta.shape)}; use the HyperStyle encoder that was trained with this generator."
        )
