"""Files of networks in other formats: bits that come back, what a target cannot hold, and what inspect says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from nvlabs_pickles import write_nvlabs

from sage_fast import cli, load_dictionary
from sage_fast.conversion import TARGETS, convert, describe
from sage_fast.errors import InputError, SageFastWarning
from sage_fast.models.psp import GradualStyleEncoder
from sage_fast.models.stylegan2 import Discriminator, Generator
from sage_fast.models.weights import load_bundle, load_directions, load_discriminator, load_encoder, load_generator


def networks(**changes) -> tuple[Generator, Discriminator]:
    torch.manual_seed(2)
    G = Generator(**{"resolution": 16, "style_dim": 8, "n_mapping": 2, "channels": [6, 5, 4], **changes})
    G.latent_avg.copy_(torch.randn(8))
    return G.eval(), Discriminator(16, channels=[6, 5, 4]).eval()


def same(a, b) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def one_sentence(error) -> bool:
    text = str(error.value)
    return "\n" not in text and text.endswith(".") and ". " not in text


def ending(target: str) -> str:
    return ".pt" if target in ("rosinality", "psp") else ".safetensors"


FILES = [target for target in TARGETS if target != "bundle"]


@pytest.mark.parametrize("first", FILES)
@pytest.mark.parametrize("second", FILES)
@pytest.mark.filterwarnings("ignore:a psp file does not keep")
def test_every_way_there_and_on_keeps_every_bit(tmp_path, first, second):
    G, D = networks()
    path = write_nvlabs(tmp_path / "a.pkl", G, D)
    for i, target in enumerate((first, second)):
        path = convert(path, tmp_path / f"{i}{ending(target)}", target)
    back = load_generator(path)
    assert back.architecture() == G.architecture() and same(back, G)
    if "psp" not in (first, second):
        assert same(load_discriminator(path), D)


@pytest.mark.parametrize("target", ["nvlabs", "sage_fast"])
@pytest.mark.parametrize(
    "shape",
    [
        dict(connections="resnet", clamp=2.0, n_channels=4),
        dict(connections="orig", c_dim=3, mapping_lr_mul=0.1),
        dict(c_dim=2, z_dim=5, mapping_width=7, embed_dim=6),
    ],
    ids=str,
)
def test_what_our_own_and_nvlabs_names_can_hold(tmp_path, target, shape):
    G, _ = networks(**shape)
    D = Discriminator(
        16,
        4,
        channels=[6, 5, 4],
        connections="skip",
        clamp=0.5,
        mbstd_group=None,
        mbstd_channels=2,
        c_dim=3,
        n_mapping=2,
    )
    path = convert(write_nvlabs(tmp_path / "a.pkl", G, D), tmp_path / "b.safetensors", target)
    back, judge = load_generator(path), load_discriminator(path)
    assert back.architecture() == G.architecture() and same(back, G)
    assert judge.architecture() == D.architecture() and same(judge, D)


def test_the_clamp_is_kept_for_this_package_and_the_loss_for_others_said(tmp_path):
    G, D = networks(clamp=256.0)
    path = write_nvlabs(tmp_path / "a.pkl", G, D)
    for target in ("rosinality", "psp"):
        with pytest.warns(SageFastWarning, match="does not keep .*the clamp 256.0 for its own code"):
            out = convert(path, tmp_path / f"{target}.pt", target)
        assert load_generator(out).clamp == 256.0


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (dict(connections="resnet"), "connections='skip' only, this one has 'resnet'"),
        (dict(n_channels=1), "n_channels=3 only, this one has 1"),
        (dict(c_dim=2), "c_dim=0 only, this one has 2"),
    ],
)
@pytest.mark.parametrize("target", ["rosinality", "psp"])
def test_what_the_common_port_cannot_hold_is_refused_and_nothing_written(tmp_path, target, shape, words):
    path = write_nvlabs(tmp_path / "a.pkl", networks(**shape)[0])
    with pytest.raises(InputError, match=words) as error:
        convert(path, tmp_path / "b.pt", target)
    assert one_sentence(error) and os.listdir(tmp_path) == ["a.pkl"]
    assert target not in describe(path)["converts to"]


@pytest.mark.parametrize(
    ("out", "to", "words"),
    [
        ("b.pkl", None, "no pickle"),
        ("b.pt", "bundle", "holds no encoder, which a bundle has; use --to sage_fast"),
        (".", "bundle", "a bundle is a folder, new or empty"),
        ("a.pkl", "bundle", "no pickle"),
        ("b.bin", None, "--to must be one of"),
        ("b.safetensors", "psp", "ends in .pt"),
        ("b.pt", "nvlabs", "ends in .safetensors"),
        ("nowhere/b.pt", None, "nowhere"),
    ],
)
def test_targets_that_are_none(tmp_path, out, to, words):
    path = write_nvlabs(tmp_path / "a.pkl", networks()[0])
    with pytest.raises(InputError, match=words):
        convert(path, tmp_path / out, to)
    assert os.listdir(tmp_path) == ["a.pkl"]


def test_what_is_read_is_never_replaced(tmp_path, tiny_bundle):
    path = convert(write_nvlabs(tmp_path / "a.pkl", *networks()), tmp_path / "a.pt")
    (tmp_path / "link.pt").symlink_to(path)
    (tmp_path / "hard.pt").hardlink_to(path)
    (tmp_path / "dir").symlink_to(tmp_path)
    before = path.read_bytes()
    names = ("a.pt", "link.pt", "hard.pt", "dir/a.pt")
    for given, out in [(path, tmp_path / name) for name in names] + [(tmp_path / "link.pt", path)]:
        with pytest.raises(InputError, match="out must be another place than what is read") as error:
            convert(given, out, "psp")
        assert one_sentence(error) and path.read_bytes() == before
    weights = tiny_bundle / "generator.safetensors"
    before = weights.read_bytes()
    for given in (tiny_bundle, weights):
        with pytest.raises(InputError, match="out must be another place"):
            convert(given, weights)
    assert weights.read_bytes() == before and (tmp_path / "link.pt").is_symlink()


@pytest.mark.parametrize("call", [describe, lambda path: convert(path, "b.pt"), lambda path: convert("a.pt", path)])
@pytest.mark.parametrize("path", [5, None, b"a.pt", ["a.pt"]], ids=str)
def test_a_name_must_be_one(path, call):
    with pytest.raises(InputError, match="path must be the name of a file or folder, got") as error:
        call(path)
    assert one_sentence(error)


def test_a_bundle_is_a_source_too(tiny_bundle, tmp_path):
    with pytest.warns(SageFastWarning, match="does not keep the encoder"):
        out = convert(tiny_bundle, tmp_path / "b.safetensors")
    assert same(load_generator(out), load_generator(tiny_bundle))
    assert same(load_discriminator(out), load_discriminator(tiny_bundle))
    report = describe(tiny_bundle)
    assert report["format"] == "sage_fast bundle" and set(report["networks"]) == {
        "generator",
        "discriminator",
        "encoder",
    }


def test_inspect_says_how_much_of_a_new_category_the_mapping_keeps(tiny_bundle, bundle_of_few):
    kinds = ("of an image by 6 components", "of a class embedding by 6 components")
    enough, few = (describe(path)["kept by class embedding mapping"] for path in (tiny_bundle, bundle_of_few))
    assert tuple(enough) == tuple(few) == kinds  # t_B of 40 is above 6, which are all
    assert all(0.9 < enough[kind] <= 1 and 0 < few[kind] < 0.6 for kind in kinds)


# --- encoders ---


def psp_file(path, n_styles=2, average_rows=2, directions=None, **opts):
    """A file of pSp's family: a generator of 16 px or 4 px and a ReStyle encoder on a ResNet-34."""
    torch.manual_seed(7)
    G = Generator(16 if n_styles > 2 else 4, 512, 1, channels=[2] * (3 if n_styles > 2 else 1))
    E = GradualStyleEncoder(n_styles, None, "resnet34", pyramid=False, n_iterations=2)
    state = {f"encoder.{name}": value for name, value in E.state_dict().items()}
    state |= {f"decoder.{name}": value for name, value in G.state_dict().items() if name != "latent_avg"}
    if directions is not None:
        state["ax.A"] = directions
    options = {"encoder_type": "ResNetBackboneEncoder", "output_size": G.resolution, "n_iters_per_batch": 2, **opts}
    average = torch.randn(512).repeat(average_rows, 1)
    torch.save({"state_dict": state, "latent_avg": average, "opts": options}, path)
    return path


def weights_of(path):
    return torch.load(path, weights_only=True)


def test_an_encoder_goes_into_a_bundle_and_back_with_every_bit(tmp_path):
    path = psp_file(tmp_path / "a.pt", device="cpu", w_norm_lambda=0.5, checkpoint=None)
    bundle = convert(path, tmp_path / "bundle", "bundle")
    back = convert(bundle, tmp_path / "b.pt", "psp")
    again = convert(bundle, tmp_path / "copy", "bundle")
    first, second = weights_of(path), weights_of(back)
    assert first["state_dict"].keys() == second["state_dict"].keys()
    assert all(torch.equal(value, second["state_dict"][name]) for name, value in first["state_dict"].items())
    assert torch.equal(first["latent_avg"], second["latent_avg"])
    assert {name: second["opts"][name] for name in first["opts"]} == first["opts"]
    for load in (load_generator, load_encoder):
        assert same(load(path), load(bundle)) and load(path).architecture() == load(bundle).architecture()
        assert same(load(path), load(back)) and load(path).architecture() == load(back).architecture()
    assert [(again / name).read_bytes() for name in os.listdir(bundle)] == [p.read_bytes() for p in bundle.iterdir()]
    report = describe(bundle)
    assert report["loads"] == ["generator", "encoder"] and report["converts to"] == list(TARGETS)
    assert report["networks"]["encoder"] == describe(path)["networks"]["encoder"]
    for load in (load_bundle, load_directions):
        with pytest.raises(InputError, match="has no dictionary.safetensors; train that part") as error:
            load(bundle)
        assert one_sentence(error)


def test_directions_of_age_go_along_and_come_back(tmp_path):
    path = psp_file(tmp_path / "a.pt", n_styles=6, average_rows=6, directions=torch.randn(6, 512, 3))
    bundle = convert(path, tmp_path / "bundle", "bundle")
    back = convert(bundle, tmp_path / "b.pt", "psp")
    for found in (bundle, back):
        directions, expected = load_dictionary(found), load_dictionary(path)
        assert torch.equal(directions.directions, expected.directions) and directions.groups == expected.groups
    assert torch.equal(weights_of(path)["state_dict"]["ax.A"], weights_of(back)["state_dict"]["ax.A"])
    with pytest.warns(SageFastWarning, match="does not keep the encoder, directions$"):
        convert(bundle, tmp_path / "c.safetensors")


def test_encoders_that_another_format_cannot_hold(tmp_path, tiny_bundle):
    with pytest.warns(
        SageFastWarning, match="a psp file does not keep the encoder, directions, codes, the discriminator"
    ):
        convert(tiny_bundle, tmp_path / "a.pt", "psp")
    state = {f"decoder.{name}": value for name, value in networks()[0].state_dict().items() if name != "latent_avg"}
    torch.save({"state_dict": state | {"hypernet.x": torch.zeros(1)}, "latent_avg": torch.zeros(8)}, tmp_path / "b.pt")
    with pytest.raises(InputError, match="the W encoder of its HyperStyle is in another file") as error:
        convert(tmp_path / "b.pt", tmp_path / "bundle", "bundle")
    assert one_sentence(error) and not (tmp_path / "bundle").exists()
    assert "bundle" not in describe(tmp_path / "b.pt")["converts to"]


def test_a_whole_bundle_is_copied_with_all_that_it_has(tmp_path, tiny_bundle):
    copy = convert(tiny_bundle, tmp_path / "copy", "bundle")
    assert load_bundle(copy).hash == load_bundle(tiny_bundle).hash
    with pytest.raises(InputError, match="a bundle is a folder, new or empty"):
        convert(tiny_bundle, copy, "bundle")


def test_a_full_disk_leaves_the_older_file(tmp_path, monkeypatch):
    path = write_nvlabs(tmp_path / "a.pkl", *networks())
    (tmp_path / "b.pt").write_bytes(b"older")

    def write(descriptor, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(InputError, match="No space left"):
        convert(path, tmp_path / "b.pt", overwrite=True)
    assert (tmp_path / "b.pt").read_bytes() == b"older" and len(os.listdir(tmp_path)) == 2


def test_inspect_and_convert_in_the_shell(tmp_path, capsys):
    G, D = networks(clamp=256.0)
    path = write_nvlabs(tmp_path / "a.pkl", G, D)
    assert cli.main(["inspect", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = report["networks"]["generator"]
    assert (found["resolution"], found["styles"], found["mapping layers"], found["clamp"]) == (16, 6, 2, 256.0)
    assert found["parameters"] == sum(p.numel() for p in G.parameters())
    assert report["loads"] == ["generator", "discriminator"] and report["latent_avg"] == "stored"
    assert report["converts to"] == FILES
    assert cli.main(["convert", str(path), str(tmp_path / "b.safetensors"), "--to", "nvlabs"]) == 0
    assert cli.main(["inspect", str(tmp_path / "b.safetensors")]) == 0
    assert "NVLabs names in safetensors" in capsys.readouterr().out
    again = ["convert", str(path), str(tmp_path / "b.safetensors"), "--to", "nvlabs"]
    (tmp_path / "b.safetensors").write_bytes(b"older")
    assert cli.main(again) == 2 and "is there already; add --overwrite" in capsys.readouterr().err
    assert (tmp_path / "b.safetensors").read_bytes() == b"older"
    assert cli.main([*again, "--overwrite"]) == 0 and len((tmp_path / "b.safetensors").read_bytes()) > 5
    for words in (["inspect", str(tmp_path / "none")], ["convert", str(path), str(tmp_path / "b.pkl")]):
        assert cli.main(words) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_inspect_names_what_is_refused(tmp_path):
    path = write_nvlabs(tmp_path / "a.pkl", *networks(), activation="relu")
    report = describe(path)
    assert "activation 'relu'" in report["networks"]["generator"]["refused"]
    assert report["loads"] == [] and report["converts to"] == []


def test_a_file_of_other_tensors_is_listed_and_cannot_be_converted(tmp_path):
    torch.save({"model": {"layer.weight": torch.zeros(2, 3), "layer.bias": torch.zeros(2)}}, tmp_path / "x.pt")
    report = describe(tmp_path / "x.pt")
    assert report["tensors"] == {"model": {"tensors": 2, "numbers": 8, "first": "layer.weight"}}
    assert report["format"] == "not recognised" and report["loads"] == report["converts to"] == []
    with pytest.raises(InputError, match="a table of model, none of the networks of a published format"):
        convert(tmp_path / "x.pt", tmp_path / "y.pt")


@pytest.mark.parametrize("data", [b"", b"hello", b"\x80\x04N.", b"PK\x03\x04"], ids=str)
def test_files_that_are_none(tmp_path, data):
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(InputError, match="x.pt") as error:
        describe(tmp_path / "x.pt")
    assert one_sentence(error) and Path(tmp_path / "x.pt").exists()
