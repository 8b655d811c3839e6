"""Encoders from the state dicts of published pSp, e4e, ReStyle and HyperStyle files.

The architecture follows from names and shapes, but for one thing: e4e's networks have the same names and shapes as pSp's and
differ in what their outputs mean, so the class that the file was made with has to be named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sage_fast.errors import InputError, reason_of
from sage_fast.models.hypernets import ResNetHypernet
from sage_fast.models.hyperstyle import HyperStyle
from sage_fast.models.image_encoder import ImageEncoder
from sage_fast.models.psp import GradualStyleEncoder, WEncoder, WPlusEncoder

__all__ = ["ENCODER_TYPES", "encoder_from_state", "encoder_type_of", "from_absolute"]

_PROGRESSIVE = {"Encoder4Editing", "ProgressiveBackboneEncoder", "ResNetProgressiveBackboneEncoder"}
_HYPERNETS = {"SharedWeightsHyperNetResNet", "SharedWeightsHyperNetResNetSeparable"}
ENCODER_TYPES = (
    *("GradualStyleEncoder", "BackboneEncoderUsingLastLayerIntoW", "BackboneEncoderUsingLastLayerIntoWPlus"),  # pSp
    *("Encoder4Editing", "SingleStyleCodeEncoder"),  # e4e
    *("ResNetGradualStyleEncoder", "BackboneEncoder", "ResNetBackboneEncoder"),  # ReStyle on pSp
    *("ProgressiveBackboneEncoder", "ResNetProgressiveBackboneEncoder"),  # ReStyle on e4e
    *("WEncoder", "SharedWeightsHyperNetResNet", "SharedWeightsHyperNetResNetSeparable"),  # HyperStyle
)
"""What published files call ``encoder_type`` in their ``opts``."""
_ALIASES = {"psp": "GradualStyleEncoder", "e4e": "Encoder4Editing", "hyperstyle": "SharedWeightsHyperNetResNet"}
_CHANNELS = 3  # of the images of all published files
_N_ITERATIONS, _MOST_ITERATIONS = 5, 100


def encoder_from_state(
    kind: str | Mapping[str, Any], state: Mapping[str, Tensor], n_latent: int | None = None
) -> ImageEncoder:
    """The encoder that a published state dict holds, float32, in eval mode; it shares memory with float32 tensors given.

    Args:
        kind: the file's ``opts``, or its ``encoder_type`` (one of ``ENCODER_TYPES``), or ``"psp"``, ``"e4e"``, ``"hyperstyle"``.
        state: names as in the file without ``encoder.``; for HyperStyle ``hypernet.*`` and, of its separate file,
            ``w_encoder.*``.
        n_latent: L of the generator; old pSp files have 18 styles whatever it takes. None: all there are.
    Raises:
        InputError: an unknown kind, or names and shapes of another network.
    """
    opts = {"encoder_type": _ALIASES.get(kind, kind)} if isinstance(kind, str) else dict(kind)
    encoder_type = opts.get("encoder_type")
    if encoder_type not in ENCODER_TYPES:
        raise InputError(f"encoder_type must be one of {', '.join(ENCODER_TYPES)}, got {encoder_type!r}.")
    if n_latent is None:
        n_latent = _latents_of(opts.get("output_size", opts.get("stylegan_size")))
    try:
        with torch.device("meta"):
            if encoder_type in _HYPERNETS:
                encoder = _hyperstyle(opts, state, n_latent)
            else:
                encoder = _one_encoder(encoder_type, opts, state, n_latent)
        weights = {name: x.float() if x.is_floating_point() else x for name, x in state.items()}
        encoder.load_state_dict(weights, assign=True)
    except (KeyError, IndexError, RuntimeError, TypeError) as error:
        raise InputError(
            f"the {len(state)} tensors given are not those of {encoder_type} ({reason_of(error)}); give another file or type."
        ) from error
    return encoder.requires_grad_(True).eval()


def encoder_type_of(encoder: ImageEncoder) -> str | None:
    """What a published file would call an encoder of one network; None where none has such names and shapes."""
    if isinstance(encoder, WEncoder):
        return "BackboneEncoderUsingLastLayerIntoW"
    if isinstance(encoder, WPlusEncoder):
        return "BackboneEncoderUsingLastLayerIntoWPlus"
    if not isinstance(encoder, GradualStyleEncoder):
        return None
    name = "ResNet" if encoder.trunk == "resnet34" else ""
    if not encoder.pyramid:
        return f"{name}{'Progressive' if encoder.progressive else ''}BackboneEncoder"
    if encoder.progressive:
        return None if name or encoder.n_iterations else "Encoder4Editing"
    return f"{name}GradualStyleEncoder"


def from_absolute(encoder: ImageEncoder, latent_avg: Tensor) -> None:
    """Turn an encoder whose outputs are latents (no ``start_from_latent_avg``) into one of offsets, by its last biases.

    Args:
        latent_avg: [D] or [L, D].
    """
    average = latent_avg.detach().expand(encoder.n_latent, -1)
    with torch.no_grad():
        if isinstance(encoder, GradualStyleEncoder):
            first = average[:1] if encoder.progressive else average.new_zeros(1, average.shape[1])
            for i, (head, row) in enumerate(zip(encoder.styles, average)):
                _linear(head).bias.sub_(row - first[0] if i else row)
        elif isinstance(encoder, WPlusEncoder):
            encoder.linear.bias[: average.numel()].sub_(average.flatten())
        elif isinstance(encoder, WEncoder) and bool((average == average[:1]).all()):
            encoder.linear.bias.sub_(average[0])
        else:
            raise InputError(f"latent_avg must be one vector for {encoder.network}, got one for each layer.")


def _one_encoder(encoder_type: str, opts: dict[str, Any], state: Mapping[str, Tensor], n_latent: int | None) -> Any:
    trunk = "resnet34" if "conv1.weight" in state else "irse50"
    n_inputs = state["conv1.weight" if trunk == "resnet34" else "input_layer.0.weight"].shape[1]
    if "output_layer_2.3.weight" in state:
        return WPlusEncoder(
            state["linear.weight"].shape[0] // state["linear.weight"].shape[1], n_latent, trunk, n_inputs
        )
    if "linear.weight" in state:
        if n_latent is None:
            raise InputError(f"{encoder_type} does not say how many layers its generator has; give n_latent.")
        return WEncoder(n_latent, trunk, n_inputs)
    n_styles = sum(name.startswith("styles.") and name.endswith(".linear.weight") for name in state)
    iterated = n_inputs == 2 * _CHANNELS
    return GradualStyleEncoder(
        n_styles,
        n_latent,
        trunk,
        pyramid="latlayer1.weight" in state,
        progressive=encoder_type in _PROGRESSIVE,
        n_iterations=_n_iterations(opts) if iterated else 0,
        n_channels=n_inputs // 2 if iterated else n_inputs,
    )


def _hyperstyle(opts: dict[str, Any], state: Mapping[str, Tensor], n_latent: int | None) -> HyperStyle:
    w_state = {name.removeprefix("w_encoder."): x for name, x in state.items() if name.startswith("w_encoder.")}
    if not w_state:
        raise InputError(
            "HyperStyle needs its W encoder, which is a file of its own; give load_encoder that too, as w_encoder."
        )
    names = [name.split(".") for name in state if name.startswith("hypernet.refinement_blocks.")]
    layers = sorted({int(parts[2]) for parts in names})
    n_outputs = 5 + 3 * ((layers[-1] - 2) // 3) if n_latent is None else 2 + 3 * (n_latent // 2 - 1)
    separable = any("kernel_linear_in" in parts for parts in names)
    hypernet = ResNetHypernet(n_outputs, layers, separable, state["hypernet.conv1.weight"].shape[1] // 2)
    n_latent = 2 * (n_outputs - 2) // 3 + 2
    w_encoder = _one_encoder(str(opts.get("w_encoder_type", "WEncoder")), opts, w_state, n_latent)
    return HyperStyle(w_encoder, hypernet, _n_iterations(opts))


def _n_iterations(opts: Mapping[str, Any]) -> int:
    value = opts.get("n_iters_per_batch")
    if value is None:
        return _N_ITERATIONS
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST_ITERATIONS:
        raise InputError(
            f"n_iters_per_batch is {value!r:.40} in the options, expected a whole number from 1 to {_MOST_ITERATIONS}."
        )
    return value


def _latents_of(size: Any) -> int | None:
    """L of a generator of ``size`` px."""
    return 2 * (int(size).bit_length() - 1) - 2 if isinstance(size, int) and size >= 4 else None


def _linear(head: nn.Module) -> Any:
    return head.linear
