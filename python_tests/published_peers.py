"""Networks made, run and saved by their own code, from local clones; and the program that recorded some of them.

``python python_tests/published_peers.py CLONE...`` makes the files of golden/published anew from clones of
NVlabs/stylegan2-ada-pytorch, NVlabs/stylegan3 and rosinality/stylegan2-pytorch. Weights are random numbers, and the source
text that NVlabs' code puts into its pickles is replaced before they are written.
"""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from peers import _imports_from  # noqa: E402

RECORDS = Path(__file__).parent / "golden" / "published"
NARROW = dict(base=96, most=6, z=8, w=8)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "ada_skip_resnet": ("stylegan2-ada-pytorch", dict(res=16, layers=2, G="skip", D="resnet", clamp=256)),
    "ada_gray_orig": ("stylegan2-ada-pytorch", dict(res=16, colours=1, layers=8, G="orig", D="orig")),
    "ada_four_resnet_skip": ("stylegan2-ada-pytorch", dict(res=8, colours=4, layers=2, G="resnet", D="skip", clamp=0.7)),
    "ada_labels": ("stylegan2-ada-pytorch", dict(res=8, c=3, layers=8, G="skip", D="resnet", clamp=0.5)),
    "sg3_labels": ("stylegan3", dict(res=8, c=2, layers=2, G="skip", D="orig", z=5)),
}  # fmt: skip
STAND_IN = "the source text of the published file stood here"


def make(clone: str, res, G, D, colours=3, layers=4, c=0, clamp=None, base=512, most=24, z=32, mapping=None, w=32):
    """NVlabs' networks with random weights in which everything counts."""
    name = "training.networks_stylegan2" if clone == "stylegan3" else "training.networks"
    sizes = dict(channel_base=base, channel_max=most, num_fp16_res=3, conv_clamp=clamp)
    maps = dict(num_layers=layers, **(mapping or {}))
    synthesis = dict(sizes, architecture=G)
    common = dict(z_dim=z, c_dim=c, w_dim=w, img_resolution=res, img_channels=colours, mapping_kwargs=maps)
    networks = importlib.import_module(name)
    torch.manual_seed(res + layers)
    if clone == "stylegan3":
        net = networks.Generator(**common, **synthesis)
    else:
        net = networks.Generator(**common, synthesis_kwargs=synthesis)
    nets = {"G": copy.deepcopy(net), "G_ema": net}
    if D is not None:
        extra = dict(mapping_kwargs=dict(num_layers=2), epilogue_kwargs=dict(mbstd_group_size=2, mbstd_num_channels=2))
        nets["D"] = networks.Discriminator(
            c_dim=c, img_resolution=res, img_channels=colours, architecture=D, **sizes, **extra
        )
    for net in nets.values():
        _shake(net)
    nets["G_ema"].mapping.w_avg.copy_(torch.randn(w) * 0.2)
    return nets


@contextmanager
def imported(clone: Path) -> Iterator[None]:
    with _imports_from(clone):
        yield


@torch.no_grad()
def outputs(nets: dict[str, Any], n: int) -> dict[str, torch.Tensor | None]:
    """What NVlabs' code computes with ``nets``, in float32: names as in the files of golden/published."""
    G, D = nets["G_ema"], nets.get("D")
    z = torch.randn(n, G.z_dim)
    c = torch.eye(G.c_dim)[torch.arange(n) % G.c_dim] if G.c_dim else None
    w = G.mapping(z, c)
    psi, wplus = G.mapping(z, c, truncation_psi=0.7), _short(w + torch.randn_like(w) * 0.3)
    d_in = _short(torch.randn(n, G.img_channels, G.img_resolution, G.img_resolution))
    run = dict(force_fp32=True)
    return {
        "z": z,
        "c": c,
        "w": w[:, 0],
        "psi": psi[:, 0],
        "wplus": wplus,
        "img_const": G.synthesis(psi, noise_mode="const", **run),
        "img_none": G.synthesis(psi, noise_mode="none", **run),
        "img_wplus": G.synthesis(wplus, noise_mode="none", **run),
        "d_in": d_in,
        "d_logits": None if D is None else D(d_in, c, **run),
    }


def _shake(net: torch.nn.Module) -> None:
    for key, value in net.named_parameters():
        if key.endswith(("bias", "noise_strength", "noise.weight")):
            value.data.add_(torch.randn_like(value) * 0.3)
    net.eval().requires_grad_(False)


def _short(values: torch.Tensor) -> torch.Tensor:
    """Numbers of 8 significant bits, which pack well."""
    return values.bfloat16().float()


def _rounded(net: torch.nn.Module) -> None:
    for value in (*net.parameters(), *net.buffers()):
        value.data.copy_(_short(value))


def _record_nvlabs(clone: Path, shape: dict[str, Any]) -> dict[str, Any]:
    with imported(clone):
        nets = make(clone.name, **(NARROW | shape))
        del nets["G"]
        for net in nets.values():
            _rounded(net)
            for module in net.modules():
                if hasattr(module, "_orig_module_src"):
                    type(module)._orig_module_src = STAND_IN
        content = nets | {"augment_pipe": None, "training_set_kwargs": {"path": "x"}}
        return {"saved": pickle.dumps(content)} | outputs(nets, 2)


@torch.no_grad()
def _record_rosinality(clone: Path) -> dict[str, Any]:
    """Their networks at 8 px with 6 channels, in place of the 512 that their text has as numbers."""
    model = _rosinality_module(clone)
    torch.manual_seed(5)
    G, D = model.Generator(8, 8, 3), model.Discriminator(8)
    for net in (G, D):
        _shake(net)
        _rounded(net)
    average = _short(G.mean_latent(1000)[0])
    buffer = io.BytesIO()
    torch.save({"g_ema": G.state_dict(), "d": D.state_dict(), "latent_avg": average}, buffer)
    z, d_in = torch.randn(2, 8), _short(torch.randn(4, 3, 8, 8))
    w = G.style(z)
    psi, wplus = average + 0.7 * (w - average), _short(w[:, None] + torch.randn(2, 4, 8) * 0.3)
    none = [torch.zeros(1)] * G.num_layers
    run = dict(truncation=0.7, truncation_latent=average[None])
    return {
        "saved": buffer.getvalue(),
        "z": z,
        "w": w,
        "psi": psi,
        "wplus": wplus,
        "img_const": G([z], randomize_noise=False, **run)[0],
        "img_none": G([z], noise=none, **run)[0],
        "img_wplus": G([wplus], input_is_latent=True, noise=none)[0],
        "d_in": d_in,
        "d_logits": D(d_in),
    }


def _rosinality_module(clone: Path) -> types.ModuleType:
    import torch.utils.cpp_extension as extension

    text = (clone / "model.py").read_text()
    for size in (4, 8):
        assert text.count(f" {size}: 512,") == 2
        text = text.replace(f" {size}: 512,", f" {size}: 6,")
    model, load = types.ModuleType("model"), extension.load
    extension.load = lambda *args, **kwargs: types.SimpleNamespace()  # CUDA code that the CPU road never calls
    try:
        with imported(clone):
            exec(compile(text, "model.py", "exec"), model.__dict__)
    finally:
        extension.load = load
    return model


def main(folders: list[str]) -> None:
    clones = {Path(folder).name: Path(folder) for folder in folders}
    found = {name: _record_nvlabs(clones[clone], shape) for name, (clone, shape) in SHAPES.items()}
    found["rosinality"] = _record_rosinality(clones["stylegan2-pytorch"])
    RECORDS.mkdir(exist_ok=True)
    for name, content in found.items():
        saved = np.frombuffer(content.pop("saved"), dtype=np.uint8)
        arrays = {key: value.numpy() for key, value in content.items() if value is not None}
        np.savez_compressed(RECORDS / f"{name}.npz", saved=saved, **arrays)


if __name__ == "__main__":
    main(sys.argv[1:])
