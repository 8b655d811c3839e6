"""Pickles as NVLabs' PyTorch and TensorFlow code writes them, made from networks of ours without that code."""

from __future__ import annotations

import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sage_fast.models.published_nvlabs import to_nvlabs
from sage_fast.models.stylegan2 import Discriminator, Generator


class _Persistent:
    """Pickles as ``torch_utils.persistence`` has it: a function, and a table with the module's source text."""

    def __init__(self, class_name: str, state: dict[str, Any]) -> None:
        self.meta = dict(type="class", version=6, module_src="raise SystemExit", class_name=class_name, state=state)

    def __reduce__(self) -> tuple[Any, ...]:
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


class _Network:
    """Pickles as ``dnnlib.tflib.network.Network``."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


@contextmanager
def _their_modules() -> Iterator[None]:
    """The names that their pickles speak of, while one is written."""

    def _reconstruct_persistent_obj(meta: Any) -> None:
        raise AssertionError("code of the file ran")

    made = {name: types.ModuleType(name) for name in ("torch_utils", "torch_utils.persistence")}
    made |= {name: types.ModuleType(name) for name in ("dnnlib", "dnnlib.tflib", "dnnlib.tflib.network")}
    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    made["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    made["dnnlib.tflib.network"].Network = _Network
    _Network.__module__, _Network.__qualname__ = "dnnlib.tflib.network", "Network"
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


def persistent(network: Generator | Discriminator, **changes: Any) -> _Persistent:
    """A network as the tree of modules that NVLabs' code pickles; ``changes`` to the attributes of every layer."""
    tree: dict[str, Any] = {}
    for name, value in to_nvlabs(network).items():
        *path, leaf = name.split(".")
        inner = tree
        for part in path:
            inner = inner.setdefault(part, {})
        inner[leaf] = value
    if isinstance(network, Discriminator):
        tree["b4"].setdefault("mbstd", {})
    return _module("Generator" if isinstance(network, Generator) else "Discriminator", "", tree, network, changes)


def _module(class_name: str, name: str, tree: dict[str, Any], network: Any, changes: dict[str, Any]) -> _Persistent:
    last = name.rpartition(".")[2]
    tensors = {key: value for key, value in tree.items() if torch.is_tensor(value)}
    buffers = {key: tensors.pop(key) for key in list(tensors) if key in ("resample_filter", "noise_const", "w_avg")}
    children = {
        key: _module("Layer", f"{name}.{key}".lstrip("."), value, network, changes)
        for key, value in tree.items()
        if isinstance(value, dict)
    }
    state = dict(
        training=False,
        _parameters=OrderedDict((key, torch.nn.Parameter(value)) for key, value in tensors.items()),
        _buffers=OrderedDict(buffers),
        _modules=OrderedDict(children),
        _init_args=(),
        _init_kwargs={},
    )
    if last in ("conv0", "conv1", "conv", "fromrgb", "torgb", "skip"):
        state["conv_clamp"] = None if last == "skip" or name == "b4.fromrgb" else network.clamp
    if last.startswith("fc") or last in ("affine", "embed", "out"):
        state["bias_gain"] = network.mapping_lr_mul if name.startswith("mapping.fc") else 1
    if last in ("conv0", "conv1", "conv", "fromrgb") or last.startswith("fc"):
        state["activation"] = "lrelu"
    if last == "mbstd":
        state |= {"group_size": network.mbstd_group, "num_channels": network.mbstd_channels}
    return _Persistent(class_name, state | {key: value for key, value in changes.items() if key in state})


def write_nvlabs(path: Path, G: Generator | None, D: Discriminator | None = None, **changes: Any) -> Path:
    """A snapshot ``.pkl`` of NVLabs' PyTorch code."""
    content: dict[str, Any] = {"training_set_kwargs": {"path": "data.zip"}, "augment_pipe": None}
    if G is not None:
        content |= {"G": persistent(G), "G_ema": persistent(G, **changes)}
    if D is not None:
        content["D"] = persistent(D, **changes)
    return write_object(path, content)


def write_object(path: Path, content: Any) -> Path:
    """Anything as their code would pickle it, a network by itself among others."""
    with _their_modules():
        path.write_bytes(pickle.dumps(content))
    return path


def write_tensorflow(path: Path, G: Generator, D: Discriminator, **settings: Any) -> Path:
    """A snapshot ``.pkl`` of NVLabs' TensorFlow code: G, D, Gs.

    ``settings`` of both, or ``variables``, ``components`` and ``static_kwargs`` in place of what they have.
    """
    with _their_modules():
        Gs = _tensorflow_generator(G, settings)
        path.write_bytes(pickle.dumps((Gs, _tensorflow_discriminator(D, settings), Gs)))
    return path


def _array(name: str, value: torch.Tensor, mirrored: bool = False) -> np.ndarray:
    """From [out, in, k, k] or [out, in] to [k, k, in, out] or [in, out]."""
    array = value.detach().numpy()
    if array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
        return array[::-1, ::-1].copy() if mirrored else array.copy()
    return array.T.copy() if name.endswith("weight") else array


def _tensorflow_generator(G: Generator, settings: dict[str, Any]) -> _Network:
    mapping, synthesis, top = [], [("lod", np.float32(0))], []
    for name, value in to_nvlabs(G).items():
        parts = name.split(".")
        if name.endswith("resample_filter"):
            continue
        if name == "mapping.w_avg":
            top.append(("dlatent_avg", value.numpy()))
        elif parts[0] == "mapping":
            word = "LabelEmbed" if parts[1] == "embed" else f"Dense{parts[1][2:]}"
            mapping.append((f"{word}/{parts[2]}", _array(name, value)))
        elif parts[-1] == "const":
            synthesis.append(("4x4/Const/const", value.numpy()[None]))
        else:
            synthesis.append(_tensorflow_layer(int(parts[1][1:]), parts[2], ".".join(parts[3:]), value))
    static = dict(label_size=G.c_dim, conv_clamp=G.clamp, mapping_lrmul=G.mapping_lr_mul) | settings
    inner = {
        name: _Network(dict(version=5, name=name, static_kwargs=static, components={}, variables=variables))
        for name, variables in (("mapping", mapping), ("synthesis", synthesis))
    }
    return _Network(
        dict(
            version=5,
            name="G",
            static_kwargs=static,
            components=inner,
            variables=top,
            build_module_src="raise SystemExit",
        )
        | _parts_of(settings)
    )


def _tensorflow_layer(size: int, layer: str, part: str, value: torch.Tensor) -> tuple[str, np.ndarray]:
    if part == "noise_const":
        number = 2 * (size.bit_length() - 1) - (5 if layer == "conv0" else 4)
        return f"noise{number}", value.numpy()[None, None]
    words = {"conv0": "Conv0_up", "conv1": "Conv" if size == 4 else "Conv1", "torgb": "ToRGB", "skip": "Skip"}
    word = f"{size}x{size}/{words[layer]}/{part.replace('affine.', 'mod_')}"
    if part == "affine.bias":
        return word, value.detach().numpy() - 1
    return word, _array(part, value, mirrored=layer in ("conv0", "skip"))


def _tensorflow_discriminator(D: Discriminator, settings: dict[str, Any]) -> _Network:
    words = {
        "fromrgb": "FromRGB",
        "conv0": "Conv0",
        "conv1": "Conv1_down",
        "skip": "Skip",
        "conv": "Conv",
        "fc": "Dense0",
    }
    variables = []
    for name, value in to_nvlabs(D).items():
        if name.endswith("resample_filter"):
            continue
        block, layer, part = name.split(".")
        if block == "mapping":
            word = "LabelEmbed" if layer == "embed" else f"Mapping{layer[2:]}"
        else:
            word = "Output" if layer == "out" else f"{block[1:]}x{block[1:]}/{words[layer]}"
        variables.append((f"{word}/{part}", _array(name, value)))
    static = dict(
        resolution=D.resolution,
        conv_clamp=D.clamp,
        mapping_lrmul=D.mapping_lr_mul,
        mbstd_group_size=D.mbstd_group,
    )
    state = dict(version=5, name="D", static_kwargs=static | settings, components={}, variables=variables)
    return _Network(state | _parts_of(settings))


def _parts_of(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: settings[name] for name in ("variables", "components", "static_kwargs") if name in settings}
