"""Published encoders that read every style from an image: pSp, e4e and ReStyle, by their names and shapes.

pSp is Richardson et al. 2021 ("Encoding in Style"), e4e Tov et al. 2021 ("Designing an Encoder for StyleGAN Image Manipulation"),
ReStyle Alaluf et al. 2021 ("ReStyle: A Residual-Based StyleGAN Encoder"). They are one design with three switches: whether
styles are read from a pyramid or from the last map alone, whether style 0 is the base that the others are deltas of, and
whether the network is applied once or corrects a reconstruction.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sage_fast.errors import InputError
from sage_fast.models.image_encoder import ImageEncoder, on_base
from sage_fast.models.irse import WIDTH, EqualLinear, StyleHead, Trunk

__all__ = ["GradualStyleEncoder", "WEncoder", "WPlusEncoder"]

_COARSE, _MIDDLE = 3, 7  # styles 0-2 are read at R / 16, 3-6 at R / 8, the rest at R / 4


class GradualStyleEncoder(Trunk, ImageEncoder):
    """One head a style.

    Published as ``GradualStyleEncoder``, ``Encoder4Editing``, ``BackboneEncoder``, ``ProgressiveBackboneEncoder``, and the
    same with ``ResNet`` before them.

    Args:
        n_styles: heads; old pSp files have 18 whatever the resolution.
        n_latent: L, how many of them the generator takes; the others are not computed. None: all.
        trunk: ``"irse50"`` or ``"resnet34"``.
        pyramid: read styles 3-6 and 7 on from finer maps (pSp, e4e), or all from the last one (ReStyle).
        progressive: style 0 is the base, the others are added to it (e4e).
        n_iterations: 0, or how often ReStyle corrects.
        n_channels: of the images.

    Attributes:
        stage: of a progressive encoder, the last style that adds its delta; 0 leaves the same ``w`` in all.
    """

    network = "GradualStyleEncoder"

    def __init__(
        self,
        n_styles: int = 18,
        n_latent: int | None = None,
        trunk: str = "irse50",
        pyramid: bool = True,
        progressive: bool = False,
        n_iterations: int = 0,
        n_channels: int = 3,
    ) -> None:
        super().__init__(trunk, 2 * n_channels if n_iterations else n_channels)
        self.n_styles, self.n_latent = n_styles, n_styles if n_latent is None else n_latent
        if not 1 <= self.n_latent <= n_styles:
            raise InputError(f"the encoder has {n_styles} styles, the generator takes {n_latent}; give matching files.")
        self.pyramid, self.progressive, self.n_iterations = pyramid, progressive, n_iterations
        self.n_channels, self.style_dim, self.stage = n_channels, WIDTH, n_styles - 1
        n_down = [4 if i < _COARSE or not pyramid else 5 if i < _MIDDLE else 6 for i in range(n_styles)]
        self.styles = nn.ModuleList(StyleHead(n) for n in n_down)
        if pyramid:
            self.latlayer1, self.latlayer2 = nn.Conv2d(256, WIDTH, 1), nn.Conv2d(128, WIDTH, 1)

    @property
    def kind(self) -> str:
        """``"restyle"``, ``"e4e"`` or ``"psp"``."""
        return "restyle" if self.n_iterations else "e4e" if self.progressive else "psp"

    def architecture(self) -> dict[str, object]:
        """The constructor's arguments, as plain values, that rebuild this network."""
        names = ("n_styles", "n_latent", "trunk", "pyramid", "progressive", "n_iterations", "n_channels")
        return {name: getattr(self, name) for name in names}

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, C, 256, 256], with their reconstructions [N, 2 C, 256, 256] for ReStyle -> offsets [N, L, 512]."""
        fine, middle, coarse = self.maps(x)
        levels = [coarse]
        if self.pyramid:
            levels += [_top_down(coarse, self.latlayer1(middle))]
            levels += [_top_down(levels[1], self.latlayer2(fine))]
        n_used = min(self.n_latent, self.stage + 1) if self.progressive else self.n_latent
        level = [0 if i < _COARSE or not self.pyramid else 1 if i < _MIDDLE else 2 for i in range(n_used)]
        styles = torch.stack([self.styles[i](levels[at]) for i, at in enumerate(level)], dim=1)
        return on_base(styles, self.n_latent) if self.progressive else styles


class WEncoder(Trunk, ImageEncoder):
    """One style for all layers from the mean of the last map: an encoder into W.

    Published as ``BackboneEncoderUsingLastLayerIntoW`` (pSp), ``SingleStyleCodeEncoder`` (e4e) and ``WEncoder`` (HyperStyle).

    Args:
        n_latent: L of the generator.
    """

    network = "WEncoder"

    def __init__(self, n_latent: int, trunk: str = "irse50", n_channels: int = 3) -> None:
        super().__init__(trunk, n_channels)
        self.n_latent, self.n_channels, self.style_dim = n_latent, n_channels, WIDTH
        self.linear = EqualLinear(WIDTH, WIDTH)

    @property
    def kind(self) -> str:
        """``"psp"``."""
        return "psp"

    def architecture(self) -> dict[str, object]:
        """The constructor's arguments, as plain values, that rebuild this network."""
        return {name: getattr(self, name) for name in ("n_latent", "trunk", "n_channels")}

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, 256, 256] -> offsets [N, L, 512], the same in all layers."""
        w = self.linear(self.maps(images)[2].mean((2, 3)))
        return w.unsqueeze(1).expand(-1, self.n_latent, -1)


class WPlusEncoder(Trunk, ImageEncoder):
    """All styles by one linear layer from a code of the last map. Published as ``BackboneEncoderUsingLastLayerIntoWPlus``.

    Args:
        n_styles, n_latent: as of :class:`GradualStyleEncoder`.
    """

    network = "WPlusEncoder"

    def __init__(
        self, n_styles: int = 18, n_latent: int | None = None, trunk: str = "irse50", n_channels: int = 3
    ) -> None:
        super().__init__(trunk, n_channels)
        self.n_styles, self.n_latent = n_styles, n_styles if n_latent is None else n_latent
        if not 1 <= self.n_latent <= n_styles:
            raise InputError(f"the encoder has {n_styles} styles, the generator takes {n_latent}; give matching files.")
        self.n_channels, self.style_dim = n_channels, WIDTH
        pooled = (nn.BatchNorm2d(WIDTH), nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(WIDTH * 49, WIDTH))
        self.output_layer_2 = nn.Sequential(*pooled)
        self.linear = EqualLinear(WIDTH, WIDTH * n_styles)

    @property
    def kind(self) -> str:
        """``"psp"``."""
        return "psp"

    def architecture(self) -> dict[str, object]:
        """The constructor's arguments, as plain values, that rebuild this network."""
        return {name: getattr(self, name) for name in ("n_styles", "n_latent", "trunk", "n_channels")}

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, 256, 256] -> offsets [N, L, 512]."""
        styles = self.linear(self.output_layer_2(self.maps(images)[2]))
        return styles.unflatten(1, (self.n_styles, WIDTH))[:, : self.n_latent]


def _top_down(coarse: Tensor, fine: Tensor) -> Tensor:
    """The coarser map enlarged to the finer one's size and added to it."""
    return F.interpolate(coarse, size=fine.shape[2:], mode="bilinear", align_corners=True) + fine
