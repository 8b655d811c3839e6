"""Feature networks for the perceptual term of the losses: frozen, images in [-1, 1] in, list of maps out.

Each has a ``name`` for logs, ``channel_weights`` (one tensor a layer, or None for equal weights) and ``forward``; the distance of
Zhang et al. 2018 [LPIPS] is one function for all of them: :func:`perceptual_distance`. Scores of different networks are
not comparable: report them by name.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sage_fast.errors import InputError
from sage_fast.models.stylegan2 import Discriminator

__all__ = [
    "LPIPS",
    "ChainFeatures",
    "DiscriminatorFeatures",
    "FeatureNetwork",
    "LpipsFeatures",
    "SqueezeFeatures",
    "distance_maps",
    "load_perceptual",
    "normalised_features",
    "perceptual_distance",
    "read_weights",
]

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB in [0, 1]
_LPIPS_FILES = {"alex": "alexnet-*.pth", "vgg": "vgg16-*.pth", "squeeze": "squeezenet1_1-*.pth"}
LPIPS = tuple(f"lpips-{backbone}" for backbone in _LPIPS_FILES)
"""Names of the networks of the ``lpips`` package, where it is installed."""
_MIN_SIDE = 64  # smaller images are enlarged: an ImageNet network halves the maps four to five times


class DiscriminatorFeatures(nn.Module):
    """Maps of a frozen copy of a discriminator: the one feature network that needs no weights from elsewhere."""

    name = "discriminator"
    channel_weights: Sequence[Tensor] | None = None

    def __init__(self, discriminator: Discriminator) -> None:
        super().__init__()
        self.discriminator = copy.deepcopy(discriminator).eval().requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [N, C, R, R] in [-1, 1] -> maps [N, C_r, r, r] for r = R, R/2, ..., 4."""
        return self.discriminator.features(images)


class SqueezeFeatures(nn.Module):
    """SqueezeNet 1.1 (Iandola et al. 2016), the seven maps that LPIPS reads; weights by torchvision's names ``features.N...``."""

    name = "squeezenet1_1"
    channel_weights: Sequence[Tensor] | None = None
    _taps = (1, 4, 7, 9, 10, 11, 12)
    _fires = {3: (64, 16, 64), 4: (128, 16, 64), 6: (128, 32, 128), 7: (256, 32, 128)} | {
        9: (256, 48, 192), 10: (384, 48, 192), 11: (384, 64, 256), 12: (512, 64, 256),
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, stride=2), nn.ReLU()]
        layers += [_Fire(*self._fires[i]) if i in self._fires else pool for i in range(2, 13)]
        self.features = nn.Sequential(*layers)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [N, C, H, W] in [-1, 1] -> seven maps; see :func:`_imagenet_input` for the preparation."""
        return _tapped(self.features, _imagenet_input(images), self._taps)


class ChainFeatures(nn.Module):
    """VGG-like chain of 3 x 3 convolutions, ReLUs and 2 x 2 max-pools; the map before each pool and the last one.

    Args:
        layout: for each convolution (index in the file, channels in, channels out): index + 1 is its ReLU and a gap
            of one more index is a pool, as in torchvision's ``vgg16().features``.
    """

    channel_weights: Sequence[Tensor] | None = None

    def __init__(self, layout: Sequence[tuple[int, int, int]]) -> None:
        super().__init__()
        self.features, taps = nn.ModuleDict(), []
        for (i, c_in, c_out), following in zip(layout, [*layout[1:], None]):
            self.features[str(i)] = nn.Conv2d(c_in, c_out, 3, padding=1)
            self.features[str(i + 1)] = nn.ReLU()
            if following is None or following[0] == i + 3:
                taps.append(i + 1)
                self.features[str(i + 2)] = nn.MaxPool2d(2)
        self._taps = tuple(taps)
        self.name = f"vgg{len(layout) + 3}" if layout[0][0] == 0 else f"chain{len(layout)}"
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [N, C, H, W] in [-1, 1] -> one map per stage."""
        layers = [self.features[str(i)] for i in range(self._taps[-1] + 1)]
        return _tapped(layers, _imagenet_input(images), self._taps)


class LpipsFeatures(nn.Module):
    """Backbone and calibrated channel weights of the ``lpips`` package, when it and its backbone's weights are on this machine."""

    def __init__(self, backbone: str) -> None:
        super().__init__()
        try:
            import lpips
        except ImportError as error:
            raise InputError(
                f"perceptual network lpips-{backbone} needs the lpips package; pip install lpips."
            ) from error
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        if not any(cache.glob(_LPIPS_FILES[backbone])):
            raise InputError(
                f"perceptual network lpips-{backbone} needs torchvision's {_LPIPS_FILES[backbone]} in {cache}, which is not "
                "there and is not downloaded during training; put it there or choose 'discriminator'."
            )
        self.name = f"lpips-{backbone}"
        self.lpips = lpips.LPIPS(net=backbone, verbose=False).eval().requires_grad_(False)
        self.channel_weights = [layer.model[-1].weight.detach().flatten() for layer in self.lpips.lins]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [N, C, H, W] in [-1, 1] -> the backbone's maps."""
        return list(self.lpips.net(self.lpips.scaling_layer(_enlarged(_as_rgb(images)))))


FeatureNetwork = DiscriminatorFeatures | SqueezeFeatures | ChainFeatures | LpipsFeatures


def perceptual_distance(network: FeatureNetwork, a: Tensor, b: Tensor | Sequence[Tensor]) -> Tensor:
    """Sum over layers of the mean squared distance of channel-normalised features, mean over the batch: a scalar.

    Implements Eq. 1 of [LPIPS]: features are scaled to unit length over channels at every position; the squared distance there
    (0 to 4) is averaged over positions. Zero for equal images; does not change when features are scaled.

    Args:
        network: a feature network; ``channel_weights``, where it has them, weigh the squared differences.
        a: images [N, C, H, W] in [-1, 1].
        b: images of the same shape, or the list ``normalised_features(network, b)`` when it is used more than once.
    """
    target = normalised_features(network, b) if isinstance(b, Tensor) else b
    maps = distance_maps(network, normalised_features(network, a), target)
    return torch.stack([distance.mean() for distance in maps]).sum()


def distance_maps(network: FeatureNetwork, a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """The squared distances of :func:`perceptual_distance` where they arise: a map [N, h_i, w_i] a layer.

    Args:
        network: whose features ``a`` and ``b`` are, both as from :func:`normalised_features`.
    """
    weights = network.channel_weights or [None] * len(b)
    squares = [(x - y).square() for x, y in zip(a, b)]
    return [s.sum(1) if w is None else (s * w.to(s).view(1, -1, 1, 1)).sum(1) for s, w in zip(squares, weights)]


def normalised_features(network: FeatureNetwork, images: Tensor) -> list[Tensor]:
    """Feature maps [N, C_i, h_i, w_i] of unit length over channels (positions without any response stay zero)."""
    maps = [x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in network(images)]
    return [x * torch.rsqrt(x.square().sum(1, keepdim=True) + 1e-8) for x in maps]


def load_perceptual(spec: str | Path, discriminator: Discriminator | None = None) -> FeatureNetwork | None:
    """The feature network named by ``spec``, frozen, on the CPU (``.to`` moves it).

    Args:
        spec: ``"none"`` (returns None), ``"discriminator"``, ``"lpips-alex" | "lpips-vgg" | "lpips-squeeze"``, or a weights
            file (.safetensors, .pt, .pth; no pickled code runs) of SqueezeNet 1.1 or a VGG by torchvision's names.
        discriminator: needed by ``"discriminator"``; copied.
    Raises:
        InputError: unknown name, missing file or package, or a file of another network.
    """
    name = str(spec)
    if name == "none":
        return None
    if name == "discriminator":
        if discriminator is None:
            raise InputError(
                "perceptual network 'discriminator' needs a discriminator, got a model without one; name a weights file in place of "
                "'discriminator' (--perceptual FILE), or 'none'."
            )
        return DiscriminatorFeatures(discriminator)
    if name in LPIPS:
        return LpipsFeatures(name.removeprefix("lpips-"))
    if not Path(name).is_file():
        raise InputError(
            f"perceptual network must be 'none', 'discriminator', {', '.join(map(repr, LPIPS))} or a weights file, got "
            f"'{name}', which is not a file."
        )
    return _from_file(Path(name))


def _from_file(path: Path) -> FeatureNetwork:
    weights = {k: v for k, v in read_weights(path).items() if k.startswith("features.")}
    weights = {k.replace(".squeeze1x1.", ".squeeze."): v for k, v in weights.items()}  # both names are about
    squeeze = "features.3.squeeze.weight" in weights
    try:
        network = SqueezeFeatures() if squeeze else ChainFeatures(_chain_layout(weights))
        network.load_state_dict(weights)
    except (RuntimeError, ValueError, IndexError) as error:
        raise InputError(
            f"{path} must hold the weights features.N... of SqueezeNet 1.1 or of a VGG without batch normalisation, got "
            f"{len(weights)} such tensors of another network; choose another file or 'discriminator'."
        ) from error
    return network


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pt or .pth file; no pickled code runs. InputError when it is none."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"{path} is no weights file, or truncated or damaged; fetch it again, or give another."
        ) from error


def _chain_layout(weights: dict[str, Tensor]) -> list[tuple[int, int, int]]:
    convs = sorted((int(key.split(".")[1]), w) for key, w in weights.items() if key.endswith(".weight"))
    if any(w.ndim != 4 or w.shape[2:] != (3, 3) for _, w in convs):
        raise ValueError("not a chain of 3 x 3 convolutions")
    return [(i, w.shape[1], w.shape[0]) for i, w in convs]


class _Fire(nn.Module):
    """SqueezeNet's block: 1 x 1 squeeze, then 1 x 1 and 3 x 3 expansions side by side; ReLU after each."""

    def __init__(self, c_in: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(c_in, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1))


def _tapped(layers: Sequence[nn.Module] | nn.Sequential, x: Tensor, taps: Sequence[int]) -> list[Tensor]:
    maps = []
    for i, layer in enumerate(layers):
        x = layer(x)
        if i in taps:
            maps.append(x)
    return maps


def _imagenet_input(images: Tensor) -> Tensor:
    """Images in [-1, 1] as RGB, sides enlarged to 64 px when smaller, normalised with ImageNet's mean and deviation."""
    x = (_enlarged(_as_rgb(images)) + 1) / 2
    return (x - x.new_tensor(_MEAN).view(1, 3, 1, 1)) / x.new_tensor(_STD).view(1, 3, 1, 1)


def _as_rgb(images: Tensor) -> Tensor:
    """One channel is repeated; of four (RGBA) the first three count; of two (grey and alpha) the first."""
    channels = images.shape[1]
    return images[:, :3] if channels >= 3 else images[:, :1].expand(-1, 3, -1, -1)


def _enlarged(images: Tensor) -> Tensor:
    side = min(images.shape[2:])
    if side >= _MIN_SIDE:
        return images
    return F.interpolate(images, scale_factor=_MIN_SIDE / side, mode="bilinear", align_corners=False)
