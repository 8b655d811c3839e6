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

__all__ = ["add_deltas", "join_deltas", "layer_names", "select_deltas", "synthesize", "weight_shapes"]


def layer_names(generator: Generator) -> list[str]:
    """Names of the modulated convolutions in HyperStyle's order: at 4 px one and its ToRGB, then two and a ToRGB each."""
    found = [name for name, module in generator.named_modules() if hasattr(module, "modulation")]
    return sorted(found, key=_place)


def _place(name: str) -> tuple[int, int]:
    """Resolution and place there of ``conv1.conv``, ``to_rgb1.conv``, ``convs.<i>.conv`` or ``to_rgbs.<i>.conv``."""
    part, *rest = name.split(".")
    if part in ("conv1", "to_rgb1"):
        return 0, 2 * (part == "to_rgb1")
    number = int(rest[0])
    return (1 + number // 2, number % 2) if part == "convs" else (1 + number, 2)


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

    Differentiable in latents, deltas and the generator's parameters. The layers run one by one, as grouped convolutions where
    each image has its own deltas; the fused kernels do not serve weights that change with every call.

    Args:
        w_plus: absolute latents [N, L, D].
        weight_deltas: one entry a layer of :func:`layer_names`, None or [N, C_out, C_in, k, k], N 1 where all images share
            them, k 1 where one number serves a whole kernel. None: the generator as it is.
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


def select_deltas(
    weight_deltas: WeightDeltas | None, index: Tensor | Sequence[int] | slice, device: str | torch.device | None = None
) -> WeightDeltas | None:
    """The deltas of the images that ``index`` picks, on ``device`` where one is given."""
    if weight_deltas is None:
        return None
    return tuple(None if delta is None else delta[index].to(device) for delta in weight_deltas)


def join_deltas(parts: Sequence[WeightDeltas | None]) -> WeightDeltas | None:
    """The deltas of several batches as those of one, float32 on the CPU; None when they have none."""
    given = [part for part in parts if part is not None]
    if not given:
        return None
    layers = zip(*given, strict=True)
    return tuple(
        None if layer[0] is None else torch.cat([x.float().cpu() for x in layer if x is not None]) for layer in layers
    )


def _check_delta(name: str, weight: Tensor, delta: Tensor, n: int) -> None:
    _, c_out, c_in, k, _ = weight.shape
    sizes = ((n, 1), (c_out,), (c_in,), (k, 1), (k, 1))
    if delta.ndim != 5 or any(size not in allowed for size, allowed in zip(delta.shape, sizes)):
        raise InputError(
            f"weight deltas of {name} must have shape [{n}, {c_out}, {c_in}, {k}, {k}] or [{n}, {c_out}, {c_in}, 1, 1], "
            f"got {list(delta.shape)}; use the HyperStyle encoder that was trained with this generator."
        )
