"""Networks made, run and pickled by their own code, from local clones: a matrix of architectures, loaded and compared.

``SAGE_FAST_PEERS`` names folders of stylegan2-ada-pytorch, stylegan3 or rosinality's stylegan2-pytorch, between colons.
Their code runs in this process, on its CPU roads.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from peers import _discriminator_state, _generator_state, load_trainers
from published_peers import imported, make, outputs

from sage_fast import _native
from sage_fast.models.inference import choose_road
from sage_fast.models.stylegan2 import Discriminator, Generator, truncate
from sage_fast.models.weights import load_discriminator, load_generator
from sage_fast.training.losses import logistic_d, nonsaturating_g, r1_penalty

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


def agrees(ours: torch.Tensor, other: torch.Tensor, share: float = 1e-4) -> None:
    assert ours.shape == other.shape
    assert float((ours.float() - other).abs().max()) <= share * float(other.abs().max())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("clone", CLONES)
@torch.no_grad()
def test_every_array_is_what_their_own_code_gives(clone, shape, tmp_path, monkeypatch):
    with imported(CLONES[clone]):
        nets = make(clone, **shape)
        with open(tmp_path / "network.pkl", "wb") as file:
            pickle.dump(nets | {"augment_pipe": None, "training_set_kwargs": {"path": "x"}}, file)
        theirs = outputs(nets, 4 if shape["res"] < 1024 else 2)
    z, c, wplus = theirs["z"], theirs["c"], theirs["wplus"]

    ours = load_generator(tmp_path / "network.pkl")
    roads = set()
    for native in (True, False):
        if not native:
            monkeypatch.setattr(_native, "has_kernel", lambda op, device: False)
        roads.add(choose_road(ours, wplus)[0])
        agrees(ours.mapping(z, c), theirs["w"])
        short = truncate(ours.mapping(z, c), ours.latent_avg, 0.7)
        agrees(short, theirs["psi"])
        agrees(ours(short), theirs["img_const"])
        agrees(ours(short, noise="none"), theirs["img_none"])
        agrees(ours(wplus, noise="none"), theirs["img_wplus"])
        if theirs["d_logits"] is not None:
            agrees(load_discriminator(tmp_path / "network.pkl")(theirs["d_in"], c), theirs["d_logits"])
        with torch.autocast("cpu", torch.bfloat16):
            agrees(ours(wplus, noise="none"), theirs["img_wplus"], 2e-2)
    assert roads == {"differentiable" if shape["G"] == "resnet" and shape["res"] > 4 else "fused", "reference"}


@pytest.mark.parametrize("clone", CLONES)
def test_a_training_step_has_the_gradients_of_their_own_code(clone):
    """Of the generator's loss, and of the discriminator's with R1, with respect to every weight.

    In some draws rounding puts an activation on the other side of zero, on either side's, and gradients differ by its share;
    so the closest of eight draws shows whether the arithmetic is the same.
    """
    differences = [gradient_differences(CLONES[clone], seed) for seed in range(8)]
    for of_network in zip(*differences):
        assert min(of_network) < 1e-5 and max(of_network) < 0.1


def gradient_differences(clone, seed):
    """Of generator and of discriminator: the norm of the difference of all weights' gradients, as a share of theirs."""
    torch.manual_seed(seed)
    sizes = dict(channel_base=1024, channel_max=96)
    G, D = Generator(32, 64, **sizes), Discriminator(32, **sizes)
    for layer in (G.conv1, *G.convs):
        torch.nn.init.normal_(layer.noise.weight, std=0.3)
    ((net, draw, their_D, judge),) = load_trainers([str(clone)], G, D).values()
    w_plus, real = torch.randn(16, G.n_latent, 64), torch.rand(16, 3, 32, 32) * 2 - 1
    for network in (net.train(), their_D.train()):
        network.requires_grad_(True)
    nonsaturating_g(D(G.synthesis(w_plus))).backward()
    nonsaturating_g(judge(draw(w_plus))).backward()
    of_G = difference(_generator_state, G, net)

    for network, logits_of in ((D, D), (their_D, judge)):
        network.zero_grad(set_to_none=True)
        shown = real.clone().requires_grad_()
        logits = logits_of(shown)
        (logistic_d(logits, logits.flip(0) / 2) + 0.1 * r1_penalty(logits, shown)).backward()
    return of_G, difference(_discriminator_state, D, their_D)


@torch.no_grad()
def difference(state_of, ours, theirs):
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for p in ours.parameters():  # so that the state, which has their names, is one of gradients
        p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    found = state_of(ours)
    assert len(expected) > 15
    one, other = (torch.cat([state[name].flatten() for name in expected]) for state in (found, expected))
    return float((one - other).norm() / other.norm())
