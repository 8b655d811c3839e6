"""The ``.pkl`` of StyleGAN2's TensorFlow code (stylegan2, stylegan2-ada): three pickled networks G, D, Gs.

Their variables become weights under the names of NVLabs' PyTorch code. Kernels are [k, k, in, out] there, matrices
[in, out]; those of upsampling convolutions are mirrored, and the 1 of a style is not part of its bias.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sage_fast.errors import InputError
from sage_fast.models.checkpoints import Stub, is_tensorflow_network
from sage_fast.models.published_nvlabs import discriminator_part, generator_part
from sage_fast.models.published_parts import Part, PublishedFile, number_of

__all__ = ["read_tensorflow"]

_G_LAYERS = {"Conv": "conv1", "Conv0_up": "conv0", "Conv1": "conv1", "ToRGB": "torgb", "Skip": "skip"}
_D_LAYERS = {
    "FromRGB": "fromrgb", "Conv0": "conv0", "Conv1_down": "conv1", "Skip": "skip", "Conv": "conv", "Dense0": "fc",
}  # fmt: skip
_PARTS = {
    "weight": "weight", "bias": "bias", "mod_weight": "affine.weight", "mod_bias": "affine.bias",
    "noise_strength": "noise_strength",
}  # fmt: skip
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "nonlinearity": ("lrelu",),
    "mapping_nonlinearity": ("lrelu",),
    "normalize_latents": (True,),
    "use_wscale": (True,),
    "fmap_decay": (1, 1.0),
}
_GROUPS = {"D_stylegan2": 4}  # default of the discriminator's function in StyleGAN2; None in stylegan2-ada


def read_tensorflow(content: Any, where: str) -> PublishedFile | None:
    """The networks of a TensorFlow ``.pkl``, or None where ``content`` is something else."""
    if not isinstance(content, list | tuple) or not content or not all(map(_is_network, content)):
        return None
    if len(content) != 3:
        raise InputError(
            f"{where} holds {len(content)} TensorFlow networks, expected G, D and Gs; give a whole snapshot."
        )
    _, D, G = content
    for name, network in (("D", D), ("Gs", G)):
        if not (is_tensorflow_network(network) and isinstance(network.state["static_kwargs"], Mapping)):
            raise InputError(
                f"{where}, network {name}, lacks the variables, components or settings of one; it is damaged."
            )
    return PublishedFile(
        format="StyleGAN2 TensorFlow .pkl",
        generator=lambda: _generator(G, f"{where}, network Gs,"),
        discriminator=lambda: _discriminator(D, f"{where}, network D,"),
        has_latent_avg="dlatent_avg" in dict(_variables(G, "")),
        ignored=("G",),
    )


def _is_network(value: Any) -> bool:
    if not isinstance(value, Stub) or not isinstance(value.state, Mapping):
        return False
    return value.name == "Network" and {"variables", "static_kwargs"} <= set(value.state)


def _generator(G: Stub, where: str) -> Part:
    settings = _settings(G, where)
    facts = _facts(settings, 0.01, where)
    state: dict[str, Tensor] = {}
    for name, value in _variables(G, ""):
        new = _generator_name(name)
        if new is None and re.fullmatch(r"(synthesis/)?lod|mapping/LabelConcat/.*", name):
            if "LabelConcat" in name:
                raise InputError(
                    f"{where} takes labels as the first StyleGAN2 did (LabelConcat), which is not supported; give a "
                    "network of stylegan2-ada."
                )
            continue
        if new is None:
            raise _unknown(name, where)
        state[new] = _tensor(name, value, mirrored=name.endswith(("Conv0_up/weight", "Skip/weight")))
    return generator_part(state, where, **facts)


def _discriminator(D: Stub, where: str) -> Part:
    settings = _settings(D, where)
    group = settings.get("mbstd_group_size", _GROUPS.get(str(D.state.get("build_func_name"))))
    facts = _facts(settings, 0.1, where) | {"mbstd_group": number_of("mbstd_group_size", group, where, whole=True)}
    resolution = settings.get("resolution", 1024)
    state: dict[str, Tensor] = {}
    for name, value in _variables(D, ""):
        if re.fullmatch(r"lod|FromRGB_lod[1-9]\d*/.*", name):
            continue  # a fade between resolutions that ended with training
        new = _discriminator_name(name.replace("FromRGB_lod0/", f"{resolution}x{resolution}/FromRGB/"))
        if new is None:
            raise _unknown(name, where)
        state[new] = _tensor(name, value)
    return discriminator_part(state, where, **facts)


def _generator_name(name: str) -> str | None:
    """Under what name NVLabs' PyTorch code has a variable of the generator."""
    if name == "dlatent_avg":
        return "mapping.w_avg"
    if match := re.fullmatch(r"mapping/(Dense(\d+)|LabelEmbed)/(weight|bias)", name):
        return f"mapping.{'embed' if match[2] is None else 'fc' + match[2]}.{match[3]}"
    if match := re.fullmatch(r"synthesis/noise(\d+)", name):
        number = int(match[1])
        return f"synthesis.b{4 << ((number + 1) // 2)}.conv{0 if number % 2 else 1}.noise_const"
    if name == "synthesis/4x4/Const/const":
        return "synthesis.b4.const"
    match = re.fullmatch(r"synthesis/(\d+)x\1/(\w+)/(\w+)", name)
    if match is None or match[2] not in _G_LAYERS or match[3] not in _PARTS:
        return None
    return f"synthesis.b{match[1]}.{_G_LAYERS[match[2]]}.{_PARTS[match[3]]}"


def _discriminator_name(name: str) -> str | None:
    """The same for the discriminator."""
    if match := re.fullmatch(r"(Mapping(\d+)|LabelEmbed)/(weight|bias)", name):
        return f"mapping.{'embed' if match[2] is None else 'fc' + match[2]}.{match[3]}"
    if match := re.fullmatch(r"(?:4x4/)?(Output|Dense1)/(weight|bias)", name):
        return f"b4.out.{match[2]}"
    match = re.fullmatch(r"(\d+)x\1/(\w+)/(weight|bias)", name)
    if match is None or match[2] not in _D_LAYERS:
        return None
    return f"b{match[1]}.{_D_LAYERS[match[2]]}.{match[3]}"


def _tensor(name: str, value: Any, mirrored: bool = False) -> Tensor:
    """A variable in the layout of PyTorch, float32."""
    array = np.array(value, dtype=np.float32)
    if name.endswith("mod_bias"):
        array = array + 1
    if name.endswith("weight") and array.ndim == 4:
        array = (array[::-1, ::-1] if mirrored else array).transpose(3, 2, 0, 1)
    elif name.endswith("weight"):
        array = array.T
    return torch.from_numpy(np.ascontiguousarray(array))


def _variables(network: Stub, prefix: str) -> Iterator[tuple[str, Any]]:
    """(name, value) of a network and of its components."""
    for name, value in network.state["variables"]:
        yield f"{prefix}{name}", value
    for name, component in (network.state.get("components") or {}).items():
        if _is_network(component):
            yield from _variables(component, f"{prefix}{name}/")


def _settings(network: Stub, where: str) -> dict[str, Any]:
    """The arguments that the network was built with.

    Raises:
        InputError: one of them asks for what is not supported.
    """
    settings = dict(network.state["static_kwargs"])
    kernel = settings.get("resample_kernel", [1, 3, 3, 1])
    wrong = {name: settings[name] for name, fine in _SUPPORTED.items() if settings.get(name, fine[0]) not in fine}
    if not isinstance(kernel, list | tuple | np.ndarray) or list(kernel) != [1, 3, 3, 1]:
        wrong["resample_kernel"] = kernel
    if wrong:
        name, value = next(iter(wrong.items()))
        raise InputError(
            f"{where} was built with {name}={value!r}, which is not supported; give a plain StyleGAN2 network."
        )
    return settings


def _facts(settings: Mapping[str, Any], lr_mul: float, where: str) -> dict[str, Any]:
    """What weights do not tell; ``lr_mul`` where the settings have no learning-rate multiplier."""
    found = number_of("mapping_lrmul", settings.get("mapping_lrmul"), where)
    return {
        "clamp": number_of("conv_clamp", settings.get("conv_clamp"), where),
        "mapping_lr_mul": lr_mul if found is None else found,
        "n_fp16": number_of("num_fp16_res", settings.get("num_fp16_res"), where, whole=True) or 0,
    }


def _unknown(name: str, where: str) -> InputError:
    return InputError(f"{where} has a variable {name!r}, which StyleGAN2 does not have; give a StyleGAN2 network.")
