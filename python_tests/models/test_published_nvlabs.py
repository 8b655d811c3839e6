"""Pickles of NVLabs' code, written here without it: what was saved comes back, and what cannot be held is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from nvlabs_pickles import persistent, write_nvlabs, write_object, write_tensorflow
from safetensors.torch import load_file, save_file

from sage_fast.conversion import convert
from sage_fast.errors import InputError, SageFastWarning
from sage_fast.models.published import read_published
from sage_fast.models.published_nvlabs import to_nvlabs
from sage_fast.models.stylegan2 import Discriminator, Generator, truncate
from sage_fast.models.weights import load_discriminator, load_generator

GENERATORS = {
    "4 px": dict(resolution=4, style_dim=6, n_mapping=1, channels=[5]),
    "skip": dict(resolution=16, style_dim=12, n_mapping=3, n_channels=1, channels=[9, 7, 5], clamp=2.0),
    "resnet": dict(resolution=16, style_dim=8, n_mapping=2, n_channels=4, channels=[4, 6, 3], connections="resnet"),
    "orig": dict(resolution=8, style_dim=8, n_mapping=2, channels=[4, 6], connections="orig", clamp=256.0),
    "labels": dict(resolution=8, style_dim=8, n_mapping=2, channels=[4, 6], c_dim=3, mapping_lr_mul=0.1),
    "widths": dict(
        resolution=8, style_dim=8, n_mapping=3, channels=[4, 6], c_dim=3, z_dim=5, mapping_width=7, embed_dim=6
    ),
}
DISCRIMINATORS = {
    "resnet": dict(resolution=16, n_channels=1, channels=[9, 7, 5], clamp=2.0),
    "skip": dict(resolution=16, n_channels=4, channels=[4, 6, 3], connections="skip", mbstd_group=None, clamp=0.5),
    "orig": dict(resolution=8, channels=[4, 6], connections="orig", mbstd_channels=2, mbstd_group=2),
    "no deviation": dict(resolution=8, channels=[4, 6], mbstd_channels=0),
    "labels": dict(resolution=8, channels=[4, 6], c_dim=3, n_mapping=2, mapping_lr_mul=0.1),
    "no mapping": dict(resolution=8, channels=[4, 6], c_dim=3, n_mapping=0, cmap_dim=5),
}


def one_sentence(error) -> bool:
    text = str(error.value)
    return "\n" not in text and text.endswith(".") and ". " not in text and len(text) < 600


def generator(shape) -> Generator:
    """Random weights in which everything counts."""
    torch.manual_seed(1)
    G = Generator(**shape)
    with torch.no_grad():
        for name, p in G.named_parameters():
            if name.endswith(("bias", "noise.weight")):
                p.add_(torch.randn_like(p) * 0.3)
    G.latent_avg.copy_(torch.randn(G.style_dim))
    return G.eval()


def same(a, b) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("shape", GENERATORS.values(), ids=GENERATORS)
@pytest.mark.parametrize("write", [write_nvlabs, write_tensorflow], ids=["pytorch", "tensorflow"])
def test_a_pickled_generator_comes_back_bit_for_bit(tmp_path, write, shape):
    G, D = generator(shape), Discriminator(8, channels=[3, 4])
    back = load_generator(write(tmp_path / "file.bin", G, D))
    assert back.architecture() == G.architecture() and not back.training
    if write is write_nvlabs:
        assert same(back, G)
    else:  # the 1 of a style is taken off its bias and put back
        for name, value in G.state_dict().items():
            torch.testing.assert_close(back.state_dict()[name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", DISCRIMINATORS.values(), ids=DISCRIMINATORS)
@pytest.mark.parametrize("write", [write_nvlabs, write_tensorflow], ids=["pytorch", "tensorflow"])
def test_a_pickled_discriminator_comes_back_bit_for_bit(tmp_path, write, shape):
    D = Discriminator(**shape)
    if write is write_tensorflow and D.mapping_lr_mul == 0.01:
        D.mapping_lr_mul = 0.1  # what their code has where nothing is said
    back = load_discriminator(write(tmp_path / "file.bin", generator(GENERATORS["4 px"]), D))
    expected = D.architecture()
    assert {k: v for k, v in back.architecture().items() if D.c_dim or k not in ("n_mapping", "mapping_lr_mul")} == {
        k: v for k, v in expected.items() if D.c_dim or k not in ("n_mapping", "mapping_lr_mul")
    }
    assert same(back, D)
    images = torch.randn(4, D.n_channels, D.resolution, D.resolution)
    c = torch.eye(4)[:, :3] if D.c_dim else None
    if D.mapping_lr_mul == 0.01 or not D.c_dim:
        torch.testing.assert_close(back(images, c), D(images, c))


def test_the_average_is_preferred_and_what_is_not_read_is_named(tmp_path):
    G = generator(GENERATORS["skip"])
    found = read_published(write_nvlabs(tmp_path / "x", G))
    assert found.format == "NVLabs StyleGAN2 .pkl" and found.ignored == ("training_set_kwargs", "G")
    assert found.holds() == ["generator"] and found.has_latent_avg


def test_names_without_prefix_and_metadata_are_read(tmp_path):
    G, D = generator(GENERATORS["resnet"]), Discriminator(**DISCRIMINATORS["skip"])
    save_file(to_nvlabs(G), tmp_path / "g.safetensors")
    save_file({f"D.{name}": value for name, value in to_nvlabs(D).items()}, tmp_path / "d.safetensors")
    assert same(load_generator(tmp_path / "g.safetensors"), G)
    assert same(load_discriminator(tmp_path / "d.safetensors"), D)


def test_without_a_mean_latent_it_is_computed_and_said(tmp_path):
    G = generator(GENERATORS["labels"])
    save_file({k: v for k, v in to_nvlabs(G).items() if k != "mapping.w_avg"}, tmp_path / "g.safetensors")
    with pytest.warns(SageFastWarning, match="no latent_avg"):
        back = load_generator(tmp_path / "g.safetensors")
    assert back.mapping_lr_mul == 0.01  # nothing says otherwise
    assert torch.equal(back.latent_avg, back.mean_latent()) and back.latent_avg.abs().max() > 0


def test_networks_without_noise_have_none(tmp_path):
    G = generator(GENERATORS["skip"])
    state = {k: v for k, v in to_nvlabs(G).items() if "noise" not in k}
    save_file(state, tmp_path / "g.safetensors")
    back = load_generator(tmp_path / "g.safetensors")
    w_plus = torch.randn(2, G.n_latent, G.style_dim)
    assert torch.equal(back(w_plus, noise="const"), back(w_plus, noise="none"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation": "relu"}, "activation 'relu'.*expected 'lrelu'"),
        ({"resample": torch.ones(12, 12) / 144}, r"resampling filter of shape \[12, 12\]"),
        ({"missing": "synthesis.b8.conv0.weight"}, "lacks 'synthesis.b8.conv0.weight'"),
        ({"missing": "synthesis.b8.conv1.weight"}, r"blocks of \[4, 16\] px"),
        ({"extra": "synthesis.b8.gate.weight"}, "unexpected 'synthesis.b8.gate.weight'"),
        ({"misshapen": "synthesis.b8.conv0.weight"}, r"of shape \[7, 4, 3, 3\], expected"),
    ],
    ids=str,
)
def test_what_is_no_plain_stylegan2_is_refused_in_one_sentence(tmp_path, monkeypatch, change, words):
    G = generator(GENERATORS["skip"])
    if "activation" in change:
        path = write_nvlabs(tmp_path / "x", G, **change)
    else:
        path, state = tmp_path / "x.safetensors", to_nvlabs(G)
        if "resample" in change:
            state["synthesis.b8.conv0.resample_filter"] = change["resample"]
        if "missing" in change:
            del state[change["missing"]]
        if "extra" in change:
            state[change["extra"]] = torch.zeros(2)
        if "misshapen" in change:
            state[change["misshapen"]] = torch.zeros(7, 4, 3, 3)
        save_file(state, path)
    with pytest.raises(InputError, match=words) as error:
        load_generator(path)
    assert one_sentence(error) and str(path) in str(error.value)


def test_a_stylegan3_generator_is_refused_by_name_and_its_discriminator_is_not(tmp_path):
    D = Discriminator(**DISCRIMINATORS["resnet"])
    state = {
        "G_ema.synthesis.input.freqs": torch.zeros(4, 2),
        "G_ema.synthesis.L0_36_4.weight": torch.zeros(4, 4, 3, 3),
    }
    save_file(state | {f"D.{k}": v for k, v in to_nvlabs(D).items()}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="StyleGAN3 .alias-free., which is not supported") as error:
        load_generator(tmp_path / "x.safetensors")
    assert one_sentence(error)
    assert same(load_discriminator(tmp_path / "x.safetensors"), D)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"resample_kernel": None}, "resample_kernel=None"), ({"nonlinearity": "relu"}, "nonlinearity='relu'")],
)
def test_tensorflow_networks_of_other_kinds_are_refused(tmp_path, settings, words):
    path = write_tensorflow(
        tmp_path / "x", generator(GENERATORS["4 px"]), Discriminator(8, channels=[3, 4]), **settings
    )
    with pytest.raises(InputError, match=words) as error:
        load_generator(path)
    assert one_sentence(error)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dicts_are_read_as_well_as_networks(tmp_path, nested, prefix):
    G, D = generator(GENERATORS["skip"]), Discriminator(**DISCRIMINATORS["resnet"])
    states = [{prefix + name: value for name, value in to_nvlabs(network).items()} for network in (G, D)]
    if nested:
        torch.save({"G": states[0], "D": states[1], "G_ema": states[0], "step": 3}, tmp_path / "a")
        assert same(load_generator(tmp_path / "a"), G) and same(load_discriminator(tmp_path / "a"), D)
        assert read_published(tmp_path / "a").ignored == ("G", "step")
        return
    for network, state, load in zip((G, D), states, (load_generator, load_discriminator)):
        torch.save(state, tmp_path / "a.pt")
        save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "b.safetensors")
        assert same(load(tmp_path / "a.pt"), network) and same(load(tmp_path / "b.safetensors"), network)


def test_a_network_pickled_by_itself_is_read(tmp_path):
    G, D = generator(GENERATORS["skip"]), Discriminator(**DISCRIMINATORS["resnet"])
    for network, load in ((G, load_generator), (D, load_discriminator)):
        found = load(write_object(tmp_path / "a.pkl", persistent(network)))
        assert same(found, network) and found.clamp == network.clamp


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conv_clamp": [1]}, r"conv_clamp=\[1\], expected one finite number"),
        ({"conv_clamp": "x"}, "conv_clamp='x', expected one finite number"),
        ({"bias_gain": "x"}, "bias_gain='x', expected one finite number"),
        ({"group_size": 2.5}, "group_size=2.5, expected a whole number"),
        ({"_modules": b"x"}, "lacks the parameters, buffers or modules of one"),
    ],
    ids=str,
)
def test_damaged_attributes_are_refused_in_one_sentence(tmp_path, change, words):
    G, D = generator(GENERATORS["skip"]), Discriminator(**DISCRIMINATORS["resnet"])
    path = write_nvlabs(tmp_path / "x", G, D, **change)
    load = load_generator if "bias_gain" in change else load_discriminator
    with pytest.raises(InputError, match=words) as error:
        load(path)
    assert one_sentence(error) and str(path) in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"resample_kernel": 5}, {"conv_clamp": "x"}, {"mapping_lrmul": "x"}, {"num_fp16_res": "x"}, {"mbstd_group_size": "x"},
        {"variables": None}, {"variables": ["ab"]}, {"variables": [("lod", [[1], [1, 2]])]}, {"components": [1]},
        {"components": {"synthesis": 3}}, {"static_kwargs": None},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_tensorflow_networks_are_refused_in_one_sentence(tmp_path, settings):
    G, D = generator(GENERATORS["4 px"]), Discriminator(8, channels=[3, 4])
    path = write_tensorflow(tmp_path / "x", G, D, **settings)
    with pytest.raises(InputError, match="number|not supported|lacks the variables, components or settings") as error:
        load_discriminator(path)
    assert one_sentence(error) and str(path) in str(error.value)


@pytest.mark.filterwarnings("ignore:a nvlabs file does not keep")
def test_a_generator_without_noise_is_written_without_its_names(tmp_path):
    G = generator(GENERATORS["skip"])
    state = {name: value for name, value in to_nvlabs(G).items() if "noise" not in name}
    save_file(state, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "nvlabs")
    assert {f"G_ema.{name}" for name in state} == set(load_file(tmp_path / "b.safetensors"))
    assert same(load_generator(tmp_path / "a.safetensors"), load_generator(tmp_path / "b.safetensors"))


def test_a_filter_that_nvlabs_names_cannot_hold_is_not_written(tmp_path):
    G = generator(GENERATORS["skip"])
    G.convs[0].conv.blur.kernel[0, 0] += 1
    torch.save({"g_ema": G.state_dict()}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="resampling filters differ from their mirror images") as error:
        convert(tmp_path / "a.pt", tmp_path / "b.safetensors", "nvlabs")
    assert one_sentence(error) and not (tmp_path / "b.safetensors").exists()


def test_one_kind_of_network_where_another_is_meant(tmp_path):
    path = write_nvlabs(tmp_path / "x", None, Discriminator(**DISCRIMINATORS["orig"]))
    with pytest.raises(InputError, match=r"NVLabs StyleGAN2 .pkl. holds no generator, but discriminator") as error:
        load_generator(path)
    assert one_sentence(error)


# --- fixtures with the outputs of their own code ---

FIXTURE = Path(__file__).parents[2].parent / "shared" / "fixtures" / "stylegan2ada_32px_uncond.pkl"


@pytest.mark.skipif(not FIXTURE.exists(), reason=f"{FIXTURE.name} is not beside the repository")
@torch.no_grad()
def test_a_published_pickle_computes_what_its_own_code_did(native):
    with np.load(FIXTURE.with_name("stylegan2ada_32px_uncond_expected.npz")) as arrays:
        expected = {name: torch.from_numpy(arrays[name]) for name in arrays.files}

    def close(ours, name, share=1e-4):
        theirs = expected[name]
        assert ours.shape == theirs.shape
        assert (ours.float() - theirs).abs().max() <= share * theirs.abs().max(), name

    G, D = load_generator(FIXTURE), load_discriminator(FIXTURE)
    short = G.broadcast(truncate(G.mapping(expected["z"]), G.latent_avg, 0.7))
    close(short, "ws_psi07")
    close(D(expected["d_in"]), "d_logits")
    arrays = {"img_const": (short, "const"), "img_none": (short, "none"), "img_wplus_none": (expected["wplus"], "none")}
    low = load_generator(FIXTURE, dtype=torch.bfloat16)
    for name, (w_plus, noise) in arrays.items():
        close(G(w_plus, noise=noise), name)
        close(low(w_plus.bfloat16(), noise=noise), name, 2e-2)
        with torch.autocast("cpu", torch.bfloat16):
            close(G(w_plus, noise=noise), name, 2e-2)
    close(load_discriminator(FIXTURE, dtype=torch.bfloat16)(expected["d_in"].bfloat16()), "d_logits", 2e-2)
