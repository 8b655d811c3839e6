"""Files that others' code wrote, beside what that code computed from them: loaded and compared, with nothing else at hand.

Each file of golden/published is one architecture: ``saved``, the bytes of a ``.pkl`` that the classes of stylegan2-ada-pytorch
(d72cc7d) or of stylegan3 (c233a91) pickled, or of a ``.pt`` of rosinality's networks (bef283a); and arrays that the same networks
computed in float32 on a CPU. ``python_tests/published_peers.py`` made them from clones. The weights are random numbers of ours, of 8
significant bits so that they pack, and the source text that NVlabs' classes put into their pickles was replaced by a sentence;
rosinality's channels, which are numbers in its text, were set to 6. Networks of more sizes and widths are compared in
``test_published_peers.py``, where clones are at hand.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sage_fast.models.inference import choose_road
from sage_fast.models.stylegan2 import truncate
from sage_fast.models.weights import load_discriminator, load_generator

RECORDS = sorted((Path(__file__).parents[1] / "golden" / "published").glob("*.npz"))
ARCHITECTURES = {  # connections of G and D, image channels, label width, mapping layers, clamp
    "ada_skip_resnet": ("skip", "resnet", 3, 0, 2, 256.0),
    "ada_gray_orig": ("orig", "orig", 1, 0, 8, None),
    "ada_four_resnet_skip": ("resnet", "skip", 4, 0, 2, 0.7),
    "ada_labels": ("skip", "resnet", 3, 3, 8, 0.5),
    "sg3_labels": ("skip", "orig", 3, 2, 2, None),
    "rosinality": ("skip", "resnet", 3, 0, 3, None),
}


def agrees(ours: torch.Tensor, theirs: torch.Tensor, share: float = 1e-4) -> bool:
    """Equal to a share of the array's largest value."""
    return ours.shape == theirs.shape and float((ours.float() - theirs).abs().max()) <= share * float(
        theirs.abs().max()
    )


@pytest.fixture(params=RECORDS, ids=lambda path: path.stem)
def record(request, tmp_path):
    """The file, and the arrays by name."""
    with np.load(request.param) as arrays:
        found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    path = tmp_path / request.param.stem
    path.write_bytes(found.pop("saved").numpy().tobytes())
    return path, {"c": None} | found


def test_every_architecture_is_there_and_recognised(record):
    path, _ = record
    G, D = load_generator(path), load_discriminator(path)
    assert (G.connections, D.connections, G.n_channels, G.c_dim, G.n_mapping, G.clamp) == ARCHITECTURES[path.name]
    assert len(RECORDS) == len(ARCHITECTURES) and D.clamp == G.clamp


@torch.no_grad()
def test_every_array_is_what_their_own_code_gave(record, native):
    path, theirs = record
    G, D = load_generator(path), load_discriminator(path)
    w = G.mapping(theirs["z"], theirs["c"])
    short = truncate(w, G.latent_avg, 0.7)
    assert agrees(w, theirs["w"]) and agrees(short, theirs["psi"])
    assert agrees(G(short), theirs["img_const"]) and agrees(G(short, noise="none"), theirs["img_none"])
    assert agrees(G(theirs["wplus"], noise="none"), theirs["img_wplus"])
    assert agrees(D(theirs["d_in"], theirs["c"]), theirs["d_logits"])
    road = choose_road(G, theirs["wplus"])[0]
    assert road == ("reference" if not native else "differentiable" if G.connections == "resnet" else "fused")


@torch.no_grad()
def test_sixteen_bits_stay_close_to_what_their_own_code_gave(record, native):
    path, theirs = record
    G, low = load_generator(path), load_generator(path, dtype=torch.bfloat16)
    short = truncate(G.mapping(theirs["z"], theirs["c"]), G.latent_avg, 0.7)
    drawn = {"img_const": (short, "const"), "img_none": (short, "none"), "img_wplus": (theirs["wplus"], "none")}
    for name, (latents, noise) in drawn.items():
        assert agrees(low(latents.bfloat16(), noise=noise), theirs[name], 2e-2)
        with torch.autocast("cpu", torch.bfloat16):
            assert agrees(G(latents, noise=noise), theirs[name], 2e-2)
    D = load_discriminator(path, dtype=torch.bfloat16)
    labels = None if theirs["c"] is None else theirs["c"].bfloat16()
    assert agrees(D(theirs["d_in"].bfloat16(), labels), theirs["d_logits"], 2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert agrees(load_discriminator(path)(theirs["d_in"], theirs["c"]), theirs["d_logits"], 2e-2)
