"""Which weight of ours is which of NVLabs' PyTorch code (stylegan2-ada-pytorch, and the StyleGAN2 of stylegan3).

The networks agree weight by weight; only dimensions of length 1 come and go, and filters differ by their gain.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

__all__ = [
    "FilterName",
    "discriminator_filters",
    "discriminator_names",
    "generator_filters",
    "generator_names",
    "theirs",
]

Names = Iterator[tuple[str, str]]
_BOTH = ("weight", "bias")


class FilterName(NamedTuple):
    """A resampling filter: our buffer (None: they have one where nothing reads it), theirs, and ours over theirs."""

    ours: str | None
    theirs: str
    gain: float


def generator_names(n_sizes: int, n_mapping: int, connections: str, conditional: bool) -> Names:
    """(ours, theirs) for every weight and noise map of a generator, ``latent_avg`` included."""
    yield from ((f"style.{i + 1}.{p}", f"mapping.fc{i}.{p}") for i in range(n_mapping) for p in _BOTH)
    if conditional:
        yield from ((f"style.embed.{p}", f"mapping.embed.{p}") for p in _BOTH)
    yield "latent_avg", "mapping.w_avg"
    yield "input.input", "synthesis.b4.const"
    for i in range(n_sizes):
        block = f"synthesis.b{4 << i}."
        layers = [("conv1", "conv1", 0)]
        if i > 0:
            layers = [(f"convs.{2 * i - 2}", "conv0", 2 * i - 1), (f"convs.{2 * i - 1}", "conv1", 2 * i)]
        for ours, name, number in layers:
            yield from ((f"{ours}.conv.modulation.{p}", f"{block}{name}.affine.{p}") for p in _BOTH)
            yield f"{ours}.conv.weight", f"{block}{name}.weight"
            yield f"{ours}.activate.bias", f"{block}{name}.bias"
            yield f"{ours}.noise.weight", f"{block}{name}.noise_strength"
            yield f"noises.noise_{number}", f"{block}{name}.noise_const"
        if connections == "skip" or i == n_sizes - 1:
            rgb = "to_rgb1" if i == 0 else f"to_rgbs.{i - 1 if connections == 'skip' else 0}"
            yield f"{rgb}.conv.weight", f"{block}torgb.weight"
            yield f"{rgb}.bias", f"{block}torgb.bias"
            yield from ((f"{rgb}.conv.modulation.{p}", f"{block}torgb.affine.{p}") for p in _BOTH)
        if connections == "resnet" and i > 0:
            yield f"skips.{i - 1}.conv.weight", f"{block}skip.weight"


def generator_filters(n_sizes: int, connections: str) -> Iterator[FilterName]:
    """Every resampling filter of a generator."""
    for i in range(n_sizes):
        block, skip = f"synthesis.b{4 << i}.", connections == "skip"
        yield FilterName(f"to_rgbs.{i - 1}.upsample.kernel" if skip and i > 0 else None, f"{block}resample_filter", 4.0)
        yield FilterName(None, f"{block}conv1.resample_filter", 4.0)
        if i > 0:
            yield FilterName(f"convs.{2 * i - 2}.conv.blur.kernel", f"{block}conv0.resample_filter", 4.0)
        if i > 0 and connections == "resnet":
            yield FilterName(f"skips.{i - 1}.upsample.kernel", f"{block}skip.resample_filter", 4.0)


def discriminator_names(n_sizes: int, n_mapping: int, connections: str, conditional: bool) -> Names:
    """(ours, theirs) for every weight of a discriminator."""
    sizes = [4 << i for i in reversed(range(n_sizes))]
    yield from _from_rgb("convs.0", sizes[0])
    for i, (size, half) in enumerate(zip(sizes, sizes[1:])):
        yield from ((f"convs.{i + 1}.conv1.{k}.{p}", f"b{size}.conv0.{p}") for k, p in enumerate(_BOTH))
        yield from ((f"convs.{i + 1}.conv2.{k}.{p}", f"b{size}.conv1.{p}") for k, p in enumerate(_BOTH, 1))
        if connections == "resnet":
            yield f"convs.{i + 1}.skip.1.weight", f"b{size}.skip.weight"
        if connections == "skip":
            yield from _from_rgb(f"from_rgbs.{i}", half)
    yield from ((f"final_conv.{k}.{p}", f"b4.conv.{p}") for k, p in enumerate(_BOTH))
    yield from ((f"final_linear.{k}.{p}", f"b4.{name}.{p}") for k, name in enumerate(("fc", "out")) for p in _BOTH)
    if conditional:
        yield from ((f"embed.0.{p}", f"mapping.embed.{p}") for p in _BOTH)
        yield from ((f"embed.1.{i + 1}.{p}", f"mapping.fc{i}.{p}") for i in range(n_mapping) for p in _BOTH)


def discriminator_filters(n_sizes: int, connections: str) -> Iterator[FilterName]:
    """Every resampling filter of a discriminator."""
    sizes = [4 << i for i in reversed(range(n_sizes))]
    for i, size in enumerate(sizes[:-1]):
        reads = connections == "skip" and i == 0  # ours has one filter for the images of all sizes
        yield FilterName("downsample.kernel" if reads else None, f"b{size}.resample_filter", 1.0)
        yield FilterName(None, f"b{size}.conv0.resample_filter", 1.0)
        yield FilterName(f"convs.{i + 1}.conv2.0.kernel", f"b{size}.conv1.resample_filter", 1.0)
        if connections == "resnet":
            yield FilterName(f"convs.{i + 1}.skip.0.kernel", f"b{size}.skip.resample_filter", 1.0)
        if connections == "skip" or i == 0:
            yield FilterName(None, f"b{size}.fromrgb.resample_filter", 1.0)
    if connections == "skip" or n_sizes == 1:
        yield FilterName(None, "b4.fromrgb.resample_filter", 1.0)
    yield FilterName(None, "b4.conv.resample_filter", 1.0)


def theirs(name: str, value: Tensor) -> Tensor:
    """A weight of ours in the shape that it has under their ``name``."""
    last = name.rpartition(".")[2]
    if last == "noise_strength":
        return value.reshape(())
    if last == "noise_const":
        return value[0, 0]
    if name.endswith("torgb.bias"):
        return value.flatten()
    return value[0] if last == "const" or value.ndim == 5 else value


def _from_rgb(ours: str, size: int) -> Names:
    yield from ((f"{ours}.{k}.{p}", f"b{size}.fromrgb.{p}") for k, p in enumerate(_BOTH))
