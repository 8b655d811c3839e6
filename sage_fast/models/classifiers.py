"""Classifiers of images, small enough to train on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sage_fast.errors import InputError

__all__ = ["SmallResNet"]

_STRIDE = 8  # image pixels per pixel of the last maps


class SmallResNet(nn.Module):
    """A residual network (He et al. 2016) of seven 3 x 3 convolutions for images of 16 to 128 pixels.

    Blocks of 2 x 2 pixels are first folded into channels, which loses nothing and spares the costly full-size maps;
    then come three residual blocks at a half, a quarter and an eighth of the size, with batch normalisation. With the
    default width and 32 px images: 25 million multiplications an image, 0.48 million parameters for 240 classes.

    Args:
        n_classes: number of logits.
        n_channels: image channels.
        width: channels W of the first block; the others have 2 W and 8 W / 3.
    """

    def __init__(self, n_classes: int, n_channels: int = 3, width: int = 48) -> None:
        super().__init__()
        if min(n_classes, n_channels, width) < 1:
            raise InputError(
                f"n_classes, n_channels and width must be positive, got {n_classes}, {n_channels} and {width}."
            )
        self.n_classes, self.n_channels, self.width = n_classes, n_channels, width
        self.n_features = -(-8 * width // 3)
        self.stem = _ConvNorm(4 * n_channels, width, 3)
        self.blocks = nn.Sequential(
            _ResidualBlock(width, width, stride=1),
            _ResidualBlock(width, 2 * width, stride=2),
            _ResidualBlock(2 * width, self.n_features, stride=2),
        )
        self.head = nn.Linear(self.n_features, n_classes)

    def architecture(self) -> dict[str, int]:
        """The constructor's arguments, as plain numbers, that rebuild this network."""
        return {"n_classes": self.n_classes, "n_channels": self.n_channels, "width": self.width}

    def maps(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] in [-1, 1] -> last maps [N, F, H / 8, W / 8], none negative.

        Raises:
            InputError: another number of channels, or a size that is no multiple of 8.
        """
        if (
            images.ndim != 4
            or images.shape[1] != self.n_channels
            or any(n % _STRIDE or n == 0 for n in images.shape[2:])
        ):
            raise InputError(
                f"images must have shape [N, {self.n_channels}, H, W] with H and W multiples of {_STRIDE} for this "
                f"classifier, got {list(images.shape)}; resize them when reading."
            )
        n, c, h, w = images.shape  # F.pixel_unshuffle does the same, but not for an empty batch
        folded = images.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, 4 * c, h // 2, w // 2)
        return self.blocks(F.relu(self.stem(folded.contiguous(memory_format=torch.channels_last))))

    def features(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] in [-1, 1] -> [N, F]: the means of the last maps, which the logits are linear in."""
        return self.maps(images).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] in [-1, 1] -> logits [N, n_classes]."""
        return self.head(self.features(images))


class _ConvNorm(nn.Sequential):
    """Convolution without bias, then batch normalisation that starts with the given gain."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, gain: float = 1.0) -> None:
        conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        norm = nn.BatchNorm2d(c_out)
        nn.init.constant_(norm.weight, gain)
        super().__init__(conv, norm)


class _ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a skip (average pooling and 1 x 1 where the shape changes).

    The second normalisation starts at zero, so that training starts from the skip alone (Goyal et al. 2017).
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = _ConvNorm(c_in, c_out, 3, stride)
        self.conv2 = _ConvNorm(c_out, c_out, 3, gain=0.0)
        self.skip = nn.Identity() if c_in == c_out else _ConvNorm(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x)))
        return F.relu(y + self.skip(F.avg_pool2d(x, self.stride)))
