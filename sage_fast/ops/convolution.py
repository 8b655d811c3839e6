"""PyTorch's convolutions with second derivatives that are convolutions too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["conv2d", "conv_transpose2d", "second_derivatives"]

# Two products, each linear in both of its factors: of images with a filter, and of two images, which gives a filter. Every
# derivative of one is one of them again. PyTorch knows that for the first derivative; the second it makes with a
# convolution whose filter is a whole image, which takes cuDNN four fifths of an R1 step at 256 px on an H200. oneDNN is fast
# at it, so on a CPU PyTorch's stay (R1 takes 1.13 to 1.33 times as long by these). And they are Python's, which costs a small
# layer's time again: so only who wants a second derivative takes them.
_DEVICES = ("cuda",)
_wanted: ContextVar[bool] = ContextVar("second derivatives of convolutions", default=False)


@contextmanager
def second_derivatives() -> Iterator[None]:
    """On a GPU, convolutions computed inside have fast second derivatives; elsewhere they have PyTorch's, with the same values."""
    token = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(token)


@dataclass(frozen=True)
class _Layout:
    """A convolution of square strides, or its transpose, without dilation and groups."""

    stride: int
    padding: int
    transposed: bool = False
    output_padding: tuple[int, int] = (0, 0)

    def arguments(self) -> tuple:
        return ([self.stride] * 2, [self.padding] * 2, [1, 1], self.transposed, list(self.output_padding), 1)

    def back(self, images: Tensor, weight: Tensor) -> _Layout:
        """The layout that takes results back to the size of ``images``, with the same weight."""
        if self.transposed:
            return replace(self, transposed=False, output_padding=(0, 0))
        behind = [(side + 2 * self.padding - k) % self.stride for side, k in zip(images.shape[2:], weight.shape[2:])]
        return replace(self, transposed=True, output_padding=(behind[0], behind[1]))


class _Images(torch.autograd.Function):
    """images [N, C, H, W] with a filter -> images."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layout: _Layout) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layout = layout
        return torch.ops.aten.convolution.default(x, weight, None, *layout.arguments())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        grad_x = _Images.apply(grad, weight, ctx.layout.back(x, weight)) if needs_x else None
        return grad_x, _Filter.apply(x, grad, weight.detach(), ctx.layout) if needs_weight else None, None


class _Filter(torch.autograd.Function):
    """images and what became of them -> the filter between, of the shape of ``like``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, like: Tensor, layout: _Layout) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.layout = layout
        mask = [False, True, False]
        *rest, groups = layout.arguments()
        return torch.ops.aten.convolution_backward.default(y, x, like, None, *rest, groups, mask)[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        x, y = ctx.saved_tensors
        needs_x, needs_y, *_ = ctx.needs_input_grad
        grad_x = _Images.apply(y, grad, ctx.layout.back(x, grad)) if needs_x else None
        return grad_x, _Images.apply(x, grad, ctx.layout) if needs_y else None, None, None


def conv2d(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """``F.conv2d``; under :func:`second_derivatives` every derivative is as fast as the first.

    Args:
        x: [N, C_in, H, W].
        weight: [C_out, C_in, kh, kw], in the dtype of ``x``.
    Returns:
        [N, C_out, OH, OW].
    """
    if _plain(x):
        return F.conv2d(x, weight, stride=stride, padding=padding)
    return _Images.apply(x, weight, _Layout(stride, padding))


def conv_transpose2d(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """``F.conv_transpose2d``, likewise.

    Args:
        x: [N, C_in, H, W].
        weight: [C_in, C_out, kh, kw], in the dtype of ``x``.
    """
    if _plain(x):
        return F.conv_transpose2d(x, weight, stride=stride)
    return _Images.apply(x, weight, _Layout(stride, 0, True))


def _plain(x: Tensor) -> bool:
    """Also where a graph is captured that knows PyTorch's names alone, and for empty batches."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return not _wanted.get() or x.device.type not in _DEVICES or 0 in x.shape
