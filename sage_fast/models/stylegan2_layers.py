"""The layers of StyleGAN2, with the parameter names of the common PyTorch port ([StyleGAN2], Fig. 2 (d) and appendix B).

Weights are stored at unit variance and scaled at run time (equalised learning rate).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sage_fast.errors import InputError
from sage_fast.ops import bias_act, upfirdn2d
from sage_fast.ops.conv3x3 import conv3x3
from sage_fast.ops.convolution import conv2d
from sage_fast.ops.inputs import require_floats, require_same_device, seen
from sage_fast.ops.modulated_conv2d import unscaled_conv2d
from sage_fast.ops.scaled_bias_act import scaled_bias_act

__all__ = [
    "CONNECTIONS", "GENERATOR_LAYERS", "BiasAct", "ConstantInput", "Conv", "DownBlock", "Linear", "MappingNetwork", "Resample",
    "StyledConv", "ToRGB", "UpSkip", "channel_list", "channels_last", "check_channels", "check_choice", "check_label",
    "check_positive", "check_resolution", "exact", "normal", "sparing", "wide",
]  # fmt: skip

CONNECTIONS = ("skip", "resnet", "orig")  # [StyleGAN2], Fig. 7: what joins the resolutions
_FIR = (1.0, 3.0, 3.0, 1.0)  # the resampling filter of [StyleGAN2], appendix B
_LARGE = 1 << 18  # numbers in a kernel: 256 x 128 x 3 x 3 has more
_HALVES = (torch.bfloat16, torch.float16)
_MIN_RESOLUTION, _MAX_RESOLUTION = 4, 1024


class MappingNetwork(nn.Sequential):
    """z (and label) -> w: normalisation, then ``n_layers`` fully connected layers with leaky ReLU.

    Keys are ``1.weight``, ``1.bias``, ... (index 0 is the normalisation); a conditional network has ``embed`` beside them.

    Args:
        style_dim: D, width of w.
        n_layers: fully connected layers; none only where z is as wide as w.
        c_dim: length of the label (0: none), embedded in ``embed_dim`` numbers (default D) that are normalised and put
            behind z.
        lr_mul: learning-rate multiplier.
        z_dim: width of z (default D).
        width: of the layers between (default D).
    """

    def __init__(
        self,
        style_dim: int,
        n_layers: int,
        c_dim: int = 0,
        lr_mul: float = 0.01,
        z_dim: int | None = None,
        embed_dim: int | None = None,
        width: int | None = None,
    ) -> None:
        z_dim, embed_dim = style_dim if z_dim is None else z_dim, style_dim if embed_dim is None else embed_dim
        inner = style_dim if width is None else width
        widths = [z_dim + (embed_dim if c_dim else 0)] + [inner] * (n_layers - 1) + [style_dim] * (n_layers > 0)
        layers = [Linear(a, b, lr_mul=lr_mul, act="lrelu") for a, b in zip(widths, widths[1:])]
        super().__init__(_Normalize(), *layers)
        self.n_layers, self.c_dim, self.style_dim, self.z_dim = n_layers, c_dim, style_dim, z_dim
        self.embed = Linear(c_dim, embed_dim) if c_dim else None

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:  # type: ignore[override]
        require_floats("z", z, 2, f"[N, {self.z_dim}]")
        if z.shape[1] != self.z_dim:
            raise InputError(f"z must have shape [N, {self.z_dim}], got {list(z.shape)}.")
        if (weight := next(self.parameters(), None)) is not None:
            require_same_device("z", z, weight, "the network")
        check_label(c, self.c_dim, z)
        with exact(z.device.type):
            x = self[0](wide(z))
            if self.embed is not None:
                assert c is not None
                x = torch.cat([x, self[0](self.embed(c.to(x.dtype)))], dim=1)
            for i in range(1, self.n_layers + 1):
                x = self[i](x)
        return x.to(z.dtype) if x.dtype == torch.float32 else x


class StyledConv(nn.Module):
    """Modulated 3 x 3 convolution, noise, bias and leaky ReLU times sqrt(2); ``up=2`` doubles the size."""

    def __init__(self, c_in: int, c_out: int, style_dim: int, up: int = 1, clamp: float | None = None) -> None:
        super().__init__()
        self.conv = _ModulatedConv(c_in, c_out, 3, style_dim, demodulate=True, up=up)
        self.noise = _NoiseStrength()
        self.activate = BiasAct(c_out, clamp)

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        """x [N, C_in, H, W], w [N, D], noise [N or 1, 1, up H, up W] or None -> [N, C_out, up H, up W]."""
        x, scale = self.conv(x, w)
        strength = None if noise is None else self.noise.weight
        return scaled_bias_act(x, scale, noise, strength, self.activate.bias, clamp=self.activate.clamp)


class ToRGB(nn.Module):
    """Modulated 1 x 1 convolution to image channels, added to the upsampled image of the previous resolution.

    ``clamp`` bounds what is added, not the sum.
    """

    def __init__(
        self, c_in: int, n_channels: int, style_dim: int, upsample: bool = True, clamp: float | None = None
    ) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, n_channels, 1, 1))
        self.conv = _ModulatedConv(c_in, n_channels, 1, style_dim, demodulate=False)
        self.clamp = clamp
        if upsample:
            self.upsample = Resample(up=2, padding=(2, 1, 2, 1))

    def forward(self, x: Tensor, w: Tensor, skip: Tensor | None = None) -> Tensor:
        """x [N, C, H, W], w [N, D], skip [N, n_channels, H / 2, W / 2] or None -> [N, n_channels, H, W]."""
        image = self.conv(x, w)[0] + self.bias  # without demodulation there is no factor
        image = image if self.clamp is None else image.clamp(-self.clamp, self.clamp)
        return image if skip is None else image + self.upsample(skip)


class UpSkip(nn.Module):
    """The residual path of a generator's block: 1 x 1 convolution without bias, then the size doubled."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = Conv(c_in, c_out, 1)
        self.upsample = Resample(up=2, padding=(2, 1, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, C_out, 2 H, 2 W]."""
        return self.upsample(self.conv(x))


class DownBlock(nn.Module):
    """Two convolutions, the second with stride 2 behind a blur; if ``residual``, a 1 x 1 skip too: (a + b) / sqrt(2)."""

    def __init__(self, c_in: int, c_out: int, residual: bool = True, clamp: float | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(Conv(c_in, c_in, 3), BiasAct(c_in, clamp))
        gain = math.sqrt(0.5) if residual else 1.0  # on either branch instead of their sum: a pass less
        self.conv2 = nn.Sequential(
            Resample(padding=(2, 2, 2, 2)), Conv(c_in, c_out, 3, stride=2), BiasAct(c_out, clamp, gain)
        )
        down = Resample(down=2, padding=(1, 1, 1, 1))
        self.skip = nn.Sequential(down, Conv(c_in, c_out, 1, gain=gain)) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, C_out, H / 2, W / 2]."""
        y = self.conv2(self.conv1(x))
        return y if self.skip is None else y + self.skip(x)


class Linear(nn.Module):
    """Fully connected layer; ``lr_mul`` is its learning-rate multiplier, ``act`` "linear" or "lrelu" times sqrt(2)."""

    def __init__(self, d_in: int, d_out: int, bias_init: float = 0.0, lr_mul: float = 1.0, act: str = "linear") -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(d_out, d_in, divisor=lr_mul))
        self.bias = nn.Parameter(torch.full([d_out], float(bias_init)))
        self.scale, self.lr_mul, self.act = lr_mul / math.sqrt(d_in), lr_mul, act

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if _in_float16(x):  # too narrow for x times the scale, and for its gradient before the scale
            weight = weight * self.scale
        else:
            x = x * self.scale  # most often the smaller of the two
        bias = bias * self.lr_mul if self.lr_mul != 1 else bias
        if self.act == "linear":
            return F.linear(x, weight, bias)
        return bias_act(F.linear(x, weight), bias, act=self.act)


def _in_float16(x: Tensor) -> bool:
    """Whether PyTorch makes products with ``x`` in float16."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type) == torch.float16
    return x.dtype == torch.float16


class Conv(nn.Module):
    """Convolution without bias, times ``gain``; odd kernels, padded only at stride 1."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(c_out, c_in, kernel, kernel))
        self.scale, self.stride = gain / math.sqrt(c_in * kernel**2), stride
        self.padding = kernel // 2 if stride == 1 else 0

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(torch.promote_types(self.weight.dtype, x.dtype))
        if weight.shape[2] == 3:
            return conv3x3(x, weight, self.stride, self.scale)
        return conv2d(x, (weight * self.scale).to(x.dtype), stride=self.stride, padding=self.padding)


class Resample(nn.Module):
    """FIR filter [1, 3, 3, 1] x [1, 3, 3, 1], up- or downsampling; ``kernel`` [4, 4] includes the gain up^2."""

    kernel: Tensor

    def __init__(self, up: int = 1, down: int = 1, padding: tuple[int, int, int, int] = (0, 0, 0, 0)) -> None:
        super().__init__()
        total = sum(_FIR) ** 2
        self.register_buffer("kernel", torch.tensor([[a * b / total * up**2 for b in _FIR] for a in _FIR]))
        self.up, self.down, self.padding = up, down, padding

    def forward(self, x: Tensor) -> Tensor:
        return upfirdn2d(x, self.kernel, up=self.up, down=self.down, padding=self.padding)


class BiasAct(nn.Module):
    """Bias and leaky ReLU times sqrt(2), in [-``clamp``, ``clamp``] where one is given, then times ``gain``."""

    def __init__(self, n: int, clamp: float | None = None, gain: float = 1.0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(n))
        self.clamp, self.gain = clamp, gain

    def forward(self, x: Tensor) -> Tensor:
        clamp = None if self.clamp is None else self.clamp * self.gain
        return bias_act(x, self.bias, act="lrelu", gain=math.sqrt(2) * self.gain, clamp=clamp)


class ConstantInput(nn.Module):
    """The learned 4 x 4 input of the synthesis network."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.input = nn.Parameter(normal(1, channels, 4, 4))

    def forward(self, n: int) -> Tensor:
        # channels last from here on: a fifth faster on a CPU, and what tensor cores want
        return channels_last(self.input.expand(n, -1, -1, -1))


class _ModulatedConv(nn.Module):
    """Weight [1, C_out, C_in, k, k] and the affine map from w to the style."""

    def __init__(self, c_in: int, c_out: int, kernel: int, style_dim: int, demodulate: bool, up: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(1, c_out, c_in, kernel, kernel))
        self.modulation = Linear(style_dim, c_in, bias_init=1.0)
        self.scale, self.demodulate, self.up = 1 / math.sqrt(c_in * kernel**2), demodulate, up
        if up == 2:
            self.blur = Resample(up=2)

    def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """The result but for the factor [N, C_out] that demodulates it, and that factor; None: nothing is left to do."""
        style = self.modulation(w)
        # the op applies the gain up^2 itself; the stored kernel has it folded in, as the common port's files do
        fir = self.blur.kernel / 4 if self.up == 2 else None
        weight = self.weight.to(torch.promote_types(self.weight.dtype, x.dtype))
        # [N, ...] where each sample has its own (models.weight_deltas); one that all share is a good deal faster
        if weight.shape[0] == 1:
            weight = weight.squeeze(0)  # a view, and so is its gradient
        elif weight.shape[0] != x.shape[0]:
            weight = weight[0]
        return unscaled_conv2d(
            x, weight, style, demodulate=self.demodulate, up=self.up, resample_filter=fir, scale=self.scale
        )


class _NoiseStrength(nn.Module):
    """The factor of a layer's noise, learned, zero at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


class _Normalize(nn.Module):
    """Scale each row to unit mean square."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


#: what a generator's synthesis is made of, but for residual connections
GENERATOR_LAYERS = frozenset(
    (nn.ModuleList, ConstantInput, StyledConv, ToRGB, Linear, BiasAct, Resample, _ModulatedConv, _NoiseStrength)
)


def normal(*shape: int, divisor: float = 1.0) -> Tensor:
    """Standard normal numbers over ``divisor``; on the meta device, where drawing imports torch's compiler, just the shape."""
    x = torch.empty(*shape)
    return x if x.is_meta else x.normal_().div_(divisor)


def channels_last(x: Tensor) -> Tensor:
    """Images in that memory format; as they lie under ``torch.func``, whose ``vmap`` knows no formats."""
    return x if torch._C._are_functorch_transforms_active() else x.contiguous(memory_format=torch.channels_last)


def wide(x: Tensor) -> Tensor:
    """``x``, in float32 where it has 16 bits and no gradients are recorded: activations between layers keep their bits."""
    return x.float() if x.dtype in _HALVES and not torch.is_grad_enabled() else x


def sparing(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn`` as ``nn.Module._apply`` gets it, a move or another dtype; to 16 bits it takes the large 3 x 3 kernels alone.

    They are nearly all bytes of a network of full width. The rest (mapping, styles, noise, biases, small kernels) stays float32:
    in 16 bits it would cost images more than the large kernels do.
    """

    def applied(tensor: Tensor) -> Tensor:
        made = fn(tensor)
        is_large = tensor.ndim >= 4 and tensor.shape[-1] == 3 and tensor.numel() >= _LARGE
        return made if is_large or made.dtype not in _HALVES else tensor.to(made.device, torch.float32)

    return applied


def exact(device_type: str) -> AbstractContextManager[object]:
    """Products in the dtype of their factors where no gradients are recorded; training keeps its autocast."""
    if torch.is_grad_enabled() or device_type == "meta":
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def channel_list(resolution: int, base: int, most: int, channels: Sequence[int] | None) -> list[int]:
    """Feature maps at 4, 8, ..., ``resolution``: ``channels`` itself, or ``min(base // r, most)`` at r."""
    sizes = [4 << i for i in range(resolution.bit_length() - 2)]
    if channels is None:
        return [max(1, min(base // size, most)) for size in sizes]
    if len(channels) != len(sizes) or min(channels) < 1:
        raise InputError(f"channels must be {len(sizes)} positive numbers, for {sizes} px, got {list(channels)}.")
    return [int(c) for c in channels]


def check_resolution(resolution: int) -> int:
    if not _MIN_RESOLUTION <= resolution <= _MAX_RESOLUTION or resolution & (resolution - 1):
        raise InputError(
            f"resolution must be a power of two from 4 to 1024, got {resolution}; choose e.g. 32, 64 or 256."
        )
    return int(resolution)


def check_channels(n_channels: int) -> int:
    if not 1 <= n_channels <= 4:
        raise InputError(f"n_channels must be 1 to 4, got {n_channels}.")
    return n_channels


def check_positive(name: str, value: int) -> int:
    if value < 1:
        raise InputError(f"{name} must be at least 1, got {value}.")
    return value


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
    return value


def check_label(c: Tensor | None, c_dim: int, like: Tensor) -> None:
    """``like``: [N, ...], what the labels belong to."""
    if c_dim == 0 and c is None:
        return
    n = like.shape[0]
    if not isinstance(c, Tensor) or c.ndim != 2 or c.shape[0] != n or c.shape[1] != c_dim or c.is_complex():
        raise InputError(f"c must have shape [{n}, {c_dim}] for this network, got {seen(c)}.")
    require_same_device("c", c, like, "the rest")
