"""Networks made, run and pickled by their own code, from local clones: a matrix of architectures, loaded and compared.

``SAGE_FAST_PEERS`` names folders of stylegan2-ada-pytorch, stylegan3 or rosinality's stylegan2-pytorch, between colons.
Their code runs in this process, on its CPU roads.
"""

from __future__ import annotations

import copy
import importlib
import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from sage_fast import _native
from sage_fast.models.inference import choose_road
from sage_fast.models.stylegan2 import truncate
from sage_fast.models.weights import load_discriminator, load_generator

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from peers import _imports_from  # noqa: E402

CLONES = {
    name: Path(folder)
    for folder in os.environ.get("SAGE_FAST_PEERS", "").split(":")
    for name in ("stylegan2-ada-pytorch", "stylegan3")
    if Path(folder).name == name
}
pytestmark = pytest.mark.skipif(not CLONES, reason="SAGE_FAST_PEERS names no clone of the networks' own code")

SHAPES = {  # resolution, channels, w, mapping layers, label, G, D, clamp, base, max, z
    "4 px": dict(res=4, G="skip", D=None),
    "8 px gray": dict(res=8, colours=1, layers=1, G="skip", D="resnet"),
    "16 px orig": dict(res=16, colours=2, layers=2, G="orig", D="orig", clamp=256),
    "16 px resnet": dict(res=16, colours=4, layers=3, G="resnet", D="skip", clamp=0.7),
    "16 px skip, clamped": dict(res=16, G="skip", D="resnet", clamp=0.5),
    "32 px labels": dict(res=32, c=5, layers=8, G="skip", D="resnet", clamp=256),
    "32 px labels, orig": dict(res=32, c=3, layers=2, G="orig", D="skip"),
    "32 px labels, resnet": dict(res=32, c=3, layers=4, G="resnet", D="orig", clamp=1.5),
    "64 px z": dict(res=64, z=24, layers=2, G="skip", D="resnet"),
    "mapping widths": dict(
        res=8, c=4, layers=3, G="skip", D="resnet", mapping=dict(layer_features=20, embed_features=9)
    ),
    "256 px": dict(res=256, base=1024, layers=2, G="skip", D="resnet", clamp=256),
    "1024 px": dict(res=1024, base=2048, most=12, layers=2, G="skip", D="resnet"),
}


def make(clone: str, res, G, D, colours=3, layers=4, c=0, clamp=None, base=512, most=24, z=32, mapping=None, w=32):
    """Their networks with random weights in which everything counts."""
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
        for key, value in net.named_parameters():
            if key.endswith("bias") or key.endswith("noise_strength"):
                value.data.add_(torch.randn_like(value) * 0.3)
        net.eval().requires_grad_(False)
    nets["G_ema"].mapping.w_avg.copy_(torch.randn(w) * 0.2)
    return nets


@contextmanager
def imported(clone: str) -> Iterator[None]:
    with _imports_from(CLONES[clone]):
        yield


def agrees(ours: torch.Tensor, other: torch.Tensor, share: float = 1e-4) -> None:
    assert ours.shape == other.shape
    assert float((ours.float() - other).abs().max()) <= share * float(other.abs().max())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("clone", CLONES)
@torch.no_grad()
def test_every_array_is_what_their_own_code_gives(clone, shape, tmp_path, monkeypatch):
    with imported(clone):
        nets = make(clone, **shape)
        with open(tmp_path / "network.pkl", "wb") as file:
            pickle.dump(nets | {"augment_pipe": None, "training_set_kwargs": {"path": "x"}}, file)
        theirs, D = nets["G_ema"], nets.get("D")
        n = 4 if shape["res"] < 1024 else 2
        z = torch.randn(n, theirs.z_dim)
        c = torch.eye(theirs.c_dim)[torch.arange(n) % theirs.c_dim] if theirs.c_dim else None
        w = theirs.mapping(z, c)
        psi = theirs.mapping(z, c, truncation_psi=0.7)
        wplus = w + torch.randn_like(w) * 0.3
        run = dict(force_fp32=True)
        images = {mode: theirs.synthesis(psi, noise_mode=mode, **run) for mode in ("const", "none")} | {
            "wplus": theirs.synthesis(wplus, noise_mode="none", **run)
        }
        d_in = torch.randn(n, theirs.img_channels, shape["res"], shape["res"])
        logits = None if D is None else D(d_in, c, **run)

    ours = load_generator(tmp_path / "network.pkl")
    roads = set()
    for native in (True, False):
        if not native:
            monkeypatch.setattr(_native, "has_kernel", lambda op, device: False)
        roads.add(choose_road(ours, wplus)[0])
        agrees(ours.mapping(z, c), w[:, 0])
        short = truncate(ours.mapping(z, c), ours.latent_avg, 0.7)
        agrees(ours(short), images["const"])
        agrees(ours(short, noise="none"), images["none"])
        agrees(ours(wplus, noise="none"), images["wplus"])
        if logits is not None:
            agrees(load_discriminator(tmp_path / "network.pkl")(d_in, c), logits)
        with torch.autocast("cpu", torch.bfloat16):
            agrees(ours(wplus, noise="none"), images["wplus"], 2e-2)
    assert roads == {"differentiable" if shape["G"] == "resnet" and shape["res"] > 4 else "fused", "reference"}
