"""Bundles and published files: what was saved comes back, published networks compute what they did, and nothing
damaged or foreign gets in."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import tiny_codes, tiny_encoder, tiny_networks

from sage_fast import load_dictionary
from sage_fast.data.latent_table import LatentTable
from sage_fast.errors import InputError, SageFastWarning
from sage_fast.models.published_parts import fill_network, own_state
from sage_fast.models.stylegan2 import Discriminator, Generator, truncate
from sage_fast.models.weights import (
    load_bundle,
    load_directions,
    load_discriminator,
    load_encoder,
    load_generator,
    read_bundle_file,
    save_bundle,
)

FIXTURES = Path(__file__).parents[2].parent / "shared" / "fixtures"
PUBLISHED = FIXTURES / "rosinality_32px.pt"
needs_fixture = pytest.mark.skipif(not PUBLISHED.exists(), reason=f"{PUBLISHED.name} is not beside the repository")


def one_sentence(error) -> bool:
    """A message of one line that ends once and holds no traceback."""
    text = str(error.value)
    return "\n" not in text and text.endswith(".") and len(text) < 600 and ". " not in text


def close(ours: torch.Tensor, theirs: np.ndarray, share: float = 1e-4) -> bool:
    """Equal to a share of the largest value."""
    return bool(np.abs(ours.detach().float().numpy() - theirs).max() <= share * np.abs(theirs).max())


# --- published files ---


@pytest.fixture(scope="module")
def expected():
    with np.load(FIXTURES / "rosinality_32px_expected.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


@needs_fixture
@torch.no_grad()
def test_published_generator_computes_what_its_own_code_did(expected, native):
    G = load_generator(PUBLISHED)
    w = G.mapping(torch.from_numpy(expected["z"]))
    assert close(w, expected["w"])
    assert close(G.latent_avg, expected["latent_avg"])
    assert close(G(truncate(w, G.latent_avg, 0.7), noise="const"), expected["img_psi07"])
    assert close(G(torch.from_numpy(expected["wplus"])), expected["img_wplus"])


@needs_fixture
@torch.no_grad()
def test_published_discriminator_computes_what_its_own_code_did(expected, native):
    images = torch.from_numpy(expected["d_in"])
    assert close(load_discriminator(PUBLISHED)(images), expected["d_logits"])
    low = load_discriminator(PUBLISHED, dtype=torch.bfloat16)
    assert close(low(images.bfloat16()), expected["d_logits"], 2e-2)


@needs_fixture
@torch.no_grad()
def test_published_generator_stays_close_in_sixteen_bits(expected, native):
    G, low = load_generator(PUBLISHED), load_generator(PUBLISHED, dtype=torch.bfloat16)
    short = truncate(torch.from_numpy(expected["w"]), G.latent_avg, 0.7)
    for name, latents in {"img_psi07": short, "img_wplus": torch.from_numpy(expected["wplus"])}.items():
        assert close(low(latents.bfloat16()), expected[name], 2e-2), name
        with torch.autocast("cpu", torch.bfloat16):
            assert close(G(latents), expected[name], 2e-2), name


@needs_fixture
def test_a_truncated_published_file_is_refused(tmp_path):
    data = PUBLISHED.read_bytes()
    for length in (0, 1, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.pt").write_bytes(data[:length])
        with pytest.raises(InputError, match="truncated") as error:
            load_generator(tmp_path / "cut.pt")
        assert one_sentence(error)


def published(path, g, d=None, **entries):
    """Write a file as the common port does."""
    content = {"g": g.state_dict(), "g_ema": g.state_dict()} | ({"d": d.state_dict()} if d else {})
    torch.save(content | {"latent_avg": g.latent_avg} | entries, path)
    return path


@pytest.mark.parametrize(
    "shape",
    [
        {"resolution": 4, "style_dim": 6, "n_mapping": 1},
        {"resolution": 16, "style_dim": 12, "n_mapping": 3, "n_channels": 1, "channels": [9, 7, 5]},
        {"resolution": 8, "style_dim": 8, "n_mapping": 2, "n_channels": 4, "channels": [4, 6], "c_dim": 3},
    ],
)
def test_the_architecture_of_a_published_generator_follows_from_its_shapes(tmp_path, shape):
    G = Generator(**{"channel_max": 8, **shape})
    G.latent_avg.copy_(torch.randn(G.style_dim))
    back = load_generator(published(tmp_path / "g.pt", G))
    assert back.architecture() == G.architecture() and not back.training
    w_plus = torch.randn(2, G.n_latent, G.style_dim)
    assert torch.equal(back(w_plus), G(w_plus))
    assert torch.equal(back.latent_avg, G.latent_avg)


@pytest.mark.parametrize(
    "shape",
    [
        {"resolution": 4, "channels": [6]},
        {"resolution": 16, "n_channels": 1, "channels": [9, 7, 5]},
        {"resolution": 8, "n_channels": 4, "channels": [4, 6], "c_dim": 3, "n_mapping": 2},
    ],
)
def test_the_architecture_of_a_published_discriminator_follows_from_its_shapes(tmp_path, shape):
    D = Discriminator(**shape)
    back = load_discriminator(published(tmp_path / "d.pt", Generator(8, 8, 1, channel_max=4), D))
    known = D.architecture() if D.c_dim else {**D.architecture(), "n_mapping": back.n_mapping}
    assert back.architecture() == known
    images = torch.randn(4, D.n_channels, D.resolution, D.resolution)
    label = torch.eye(4)[:, :3] if D.c_dim else None
    assert torch.equal(back(images, label), D(images, label))


def test_the_average_is_preferred_and_a_missing_one_is_no_hindrance(tmp_path):
    plain, average = Generator(8, 8, 1, channel_max=4), Generator(8, 8, 1, channel_max=4)
    torch.save({"g": plain.state_dict(), "g_ema": average.state_dict()}, tmp_path / "both.pt")
    torch.save({"g": {f"module.{k}": v for k, v in plain.state_dict().items()}}, tmp_path / "plain.pt")
    assert torch.equal(load_generator(tmp_path / "both.pt").input.input, average.input.input)
    assert torch.equal(load_generator(tmp_path / "plain.pt").input.input, plain.input.input)


def test_without_latent_avg_the_mean_of_the_mapping_stands_in(tmp_path):
    G = Generator(8, 8, 1, channel_max=4)
    state = {k: v for k, v in G.state_dict().items() if k != "latent_avg"}
    torch.save({"g_ema": state}, tmp_path / "g.pt")
    with pytest.warns(SageFastWarning, match="no latent_avg"):
        assert torch.equal(load_generator(tmp_path / "g.pt").latent_avg, G.mean_latent())


class _Code:
    """Runs when it is unpickled without care."""

    def __reduce__(self):
        return os.mkdir, ("code_ran",)


def test_pickled_code_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"g_ema": _Code()}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"g_ema": _Code()}))
    for name in ("evil.pt", "plain.pt"):
        with pytest.raises(InputError) as error:
            load_generator(tmp_path / name)
        assert one_sentence(error)
    assert not (tmp_path / "code_ran").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "holds a list, none of the networks"),
        ({"state_dict": {}}, "holds a table of state_dict, none of the networks"),
        ({"g_ema": torch.zeros(3)}, "entry 'g_ema', is no network"),
        ({"g_ema": {}}, "weights of a StyleGAN2 generator"),
        ({"g_ema": {"input.input": torch.zeros(1, 4, 4, 4)}}, "weights of a StyleGAN2 generator"),
    ],
)
def test_foreign_content_is_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match=words) as error:
        load_generator(tmp_path / "x.pt")
    assert one_sentence(error)


def test_a_published_network_with_a_missing_or_misshapen_weight_is_refused(tmp_path):
    G = Generator(8, 8, 2, channel_max=4)
    for change in ("missing", "misshapen", "extra"):
        state = G.state_dict()
        if change == "missing":
            del state["convs.1.activate.bias"]
        elif change == "misshapen":
            state["convs.1.activate.bias"] = torch.zeros(5)
        else:
            state["convs.1.activate.gain"] = torch.zeros(5)
        torch.save({"g_ema": state}, tmp_path / "g.pt")
        with pytest.raises(
            InputError, match="convs.1.activate.*weights expected|weights expected.*convs.1.activate"
        ) as error:
            load_generator(tmp_path / "g.pt")
        assert one_sentence(error)


def test_what_a_published_file_lacks_is_named(tmp_path):
    path = published(tmp_path / "g.pt", Generator(8, 8, 1, channel_max=4))
    with pytest.raises(InputError, match="holds no discriminator, but generator"):
        load_discriminator(path)
    with pytest.raises(InputError, match="holds no encoder, but generator"):
        load_encoder(path)
    (tmp_path / "g.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match="g.pkl") as error:
        load_generator(tmp_path / "g.pkl")
    assert one_sentence(error)


# --- bundles ---


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    """A copy to change."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def parts(**changes):
    generator, encoder, discriminator = tiny_networks()
    codes, directions = tiny_codes(generator.n_latent)
    given = {"generator": generator, "encoder": encoder, "discriminator": discriminator}
    return given | {"codes": codes, "directions": directions} | changes


def equal_states(a, b):
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def test_a_bundle_gives_back_every_part(tmp_path):
    given = parts()
    save_bundle(tmp_path / "b", **given, groups=[[0, 1], [3]], noise="const", about={"steps": 3})
    back = load_bundle(tmp_path / "b")
    assert equal_states(given["generator"], back.generator) and not back.generator.training
    assert equal_states(given["encoder"], back.encoder) and not back.encoder.training
    assert torch.equal(back.dictionary.directions, given["directions"]) and back.dictionary.groups == ((0, 1), (3,))
    assert torch.equal(back.codes.w_plus, given["codes"].w_plus)
    assert torch.equal(back.codes.labels, given["codes"].labels)
    assert back.codes.categories == given["codes"].categories
    assert back.noise == "const" and back.about == {"steps": 3}
    assert equal_states(given["generator"], load_generator(tmp_path / "b"))
    assert equal_states(given["discriminator"], load_discriminator(tmp_path / "b"))
    assert equal_states(given["encoder"], load_encoder(tmp_path / "b"))
    assert torch.equal(load_directions(tmp_path / "b").directions, given["directions"])


def test_equal_parts_give_equal_bytes_and_the_codes_may_be_a_file(tmp_path):
    given = parts()
    save_bundle(tmp_path / "a", **given)
    given["codes"].save(tmp_path / "codes.safetensors")
    save_bundle(tmp_path / "b", **given | {"codes": tmp_path / "codes.safetensors"})
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir()) and len(names) == 6
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


@pytest.mark.parametrize("kind", ["psp", "e4e", "restyle", "hyperstyle"])
def test_an_encoder_of_every_kind_comes_back(tmp_path, kind):
    given = parts()
    given["encoder"] = tiny_encoder(kind, given["generator"])
    save_bundle(tmp_path / "b", **given)
    back = load_bundle(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "bundle.json").read_text())["networks"]["encoder"]["kind"] == kind
    assert back.encoder.kind == kind and equal_states(given["encoder"], back.encoder)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        ours, theirs = (
            e.invert(images, back.generator).offsets for e in (given["encoder"], load_encoder(tmp_path / "b"))
        )
    assert torch.equal(ours, theirs)


def test_an_encoder_without_a_kind_is_psp(tmp_path):
    given = parts()
    save_bundle(tmp_path / "b", **given)
    index = json.loads((tmp_path / "b" / "bundle.json").read_text())
    for name in ("kind", "network", "progressive", "n_iterations", "n_styles"):
        del index["networks"]["encoder"][name]
    (tmp_path / "b" / "bundle.json").write_text(json.dumps(index))
    back = load_bundle(tmp_path / "b").encoder
    assert back.kind == "psp" and equal_states(given["encoder"], back)


def test_the_hash_follows_what_shapes_an_image_and_nothing_else(tmp_path):
    given, hashes = parts(), {}
    changed = Generator(**given["generator"].architecture())
    changed.load_state_dict(given["generator"].state_dict())
    changed.noises.noise_0[0, 0, 0, 0] += 1e-3
    variants = {
        "same": {},
        "about": {"about": {"x": 1}},
        "no_d": {"discriminator": None},
        "noise": {"noise": "const"},
        "directions": {"directions": given["directions"] * 1.001},
        "generator": {"generator": changed},
    }
    for name, change in variants.items():
        save_bundle(tmp_path / name, **given | change)
        hashes[name] = load_bundle(tmp_path / name).hash
    assert hashes["same"] == hashes["about"] == hashes["no_d"]
    assert len(set(hashes.values())) == 4


def test_half_precision_halves_the_files_and_keeps_latent_avg(tmp_path):
    given = parts()
    save_bundle(tmp_path / "full", **given)
    save_bundle(tmp_path / "half", **given, dtype=torch.float16)
    size = {n: sum(p.stat().st_size for p in (tmp_path / n).glob("*.safetensors")) for n in ("full", "half")}
    assert size["half"] < 0.6 * size["full"]
    back = load_bundle(tmp_path / "half")
    assert torch.equal(back.generator.latent_avg, given["generator"].latent_avg)
    assert {p.dtype for p in back.generator.parameters()} == {torch.float32}
    w_plus = back.codes.w_plus[:4] + back.generator.latent_avg
    assert (back.generator(w_plus) - given["generator"](w_plus)).abs().max() < 0.02


def test_a_weight_too_large_for_half_precision_is_refused_before_anything_is_written(tmp_path):
    given = parts()
    with torch.no_grad():
        given["generator"].style[1].weight[0, 0] = 1e5
    with pytest.raises(InputError, match="style.1.weight"):
        save_bundle(tmp_path / "b", **given, dtype=torch.float16)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("load", [load_generator, load_discriminator, load_encoder])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(dtype=torch.int8), "dtype must be torch.float32, float64, float16 or bfloat16, got torch.int8"),
        (dict(dtype=torch.float8_e4m3fn), "dtype must be"),
        (dict(dtype="float32"), "dtype must be .* got 'float32'"),
        (dict(dtype=None), "dtype must be .* got None"),
        (dict(path=5), "path must be the name of a file or folder, got 5 .int"),
        (dict(path=b"model"), "path must be the name of a file or folder"),
        (dict(path=["model"]), "path must be the name of a file or folder"),
        (dict(device=1.5), "device '1.5' cannot be used"),
    ],
    ids=str,
)
def test_loaders_refuse_what_is_no_name_dtype_or_device_in_one_sentence(tiny_bundle, load, given, words):
    with pytest.raises(InputError, match=words) as error:
        load(**{"path": tiny_bundle} | given)
    assert one_sentence(error)


@pytest.mark.parametrize(
    "load", [load_bundle, load_directions, load_dictionary, lambda path: read_bundle_file(path, "x")]
)
def test_readers_of_bundles_refuse_what_is_no_name(load):
    with pytest.raises(InputError, match="path must be the name of a file or folder, got 5 .int") as error:
        load(5)
    assert one_sentence(error)


def test_weights_come_in_the_dtype_asked_for(tiny_bundle):
    assert {p.dtype for p in load_generator(tiny_bundle, dtype=torch.float64).parameters()} == {torch.float64}


def test_loading_leaves_the_random_state_alone(tiny_bundle):
    before = torch.get_rng_state()
    load_bundle(tiny_bundle)
    assert torch.equal(before, torch.get_rng_state())


FILES = ("bundle.json", "generator.safetensors", "encoder.safetensors", "dictionary.safetensors", "codes.safetensors")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "changed"])
def test_a_damaged_file_of_a_bundle_is_refused(bundle, name, damage):
    path = bundle / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "changed":
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    else:
        path.write_bytes(b"" if damage == "empty" else data[: len(data) // 2])
    with pytest.raises(InputError, match=name) as error:
        load_bundle(bundle)
    assert one_sentence(error)


def replace_file(bundle, name, data):
    """Put a file into a bundle with its sha256 in the index: damage that a checksum does not show."""
    (bundle / name).write_bytes(data)
    index = json.loads((bundle / "bundle.json").read_text())
    index["files"][name] = hashlib.sha256(data).hexdigest()
    (bundle / "bundle.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", FILES[1:])
def test_a_foreign_file_with_the_right_checksum_is_refused(bundle, tmp_path, name):
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    for data in (b"not a file of tensors", (tmp_path / "x.safetensors").read_bytes()):
        replace_file(bundle, name, data)
        with pytest.raises(InputError, match=name) as error:
            load_bundle(bundle)
        assert one_sentence(error)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "other"), ("version", 99), ("files", None), ("files", []), ("networks", {}), ("noise", "random"),
        ("networks", {"generator": {"resolution": 7}, "encoder": {}}), ("groups", "x"), ("about", 3),
    ],
)  # fmt: skip
def test_an_index_with_a_foreign_entry_is_refused(bundle, key, value):
    index = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps(index | {key: value}))
    with pytest.raises(InputError) as error:
        load_bundle(bundle)
    assert one_sentence(error) and str(bundle) in str(error.value)


def test_a_path_that_is_no_bundle_is_refused(tmp_path):
    (tmp_path / "file.txt").write_text("hello")
    for path, words in (("nowhere", "does not exist"), ("file.txt", "is a file"), (".", "has no bundle.json")):
        with pytest.raises(InputError, match=words) as error:
            load_bundle(tmp_path / path)
        assert one_sentence(error)


def test_what_a_folder_lacks_has_a_remedy(tiny_bundle, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="has no bundle.json; finish its training, train-dictionary last"):
        load_bundle(tmp_path)
    bare = shutil.copytree(tiny_bundle, tmp_path / "bare")
    index = json.loads((bare / "bundle.json").read_text())
    for part in ("files", "networks"):
        index[part] = {name: value for name, value in index[part].items() if not name.startswith("discriminator")}
    (bare / "bundle.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"keep with --bundle.discriminator \(--resume adds it"):
        load_discriminator(bare)


def test_a_file_without_permission_is_not_to_be_copied_again(tiny_bundle, monkeypatch):
    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    index = (tiny_bundle / "bundle.json").read_bytes()
    monkeypatch.setattr(Path, "read_bytes", lambda path: index if path.suffix == ".json" else denied(path))
    with pytest.raises(
        InputError, match=r"generator.safetensors' cannot be read \(Permission denied\); check its perm"
    ):
        load_generator(tiny_bundle)


def test_an_unusable_device_is_refused(tiny_bundle):
    for device in ("cuda:99", "nonsense"):
        with pytest.raises(InputError, match=device) as error:
            load_generator(tiny_bundle, device)
        assert one_sentence(error)


def test_parts_of_another_resolution_are_refused(tmp_path):
    other = Generator(16, 16, n_mapping=2, channel_base=64, channel_max=8)
    table, _ = tiny_codes(other.n_latent)
    wrong = [{"generator": other}, {"codes": table}, {"directions": torch.zeros(other.n_latent, 16, 3)}]
    for change in wrong:
        with pytest.raises(InputError, match=r"px|styles") as error:
            save_bundle(tmp_path / "b", **parts(**change))
        assert one_sentence(error)
    assert not (tmp_path / "b").exists()


def test_codes_for_another_resolution_in_the_folder_are_refused(bundle, tmp_path):
    table, _ = tiny_codes(10)
    table.save(tmp_path / "codes.safetensors")
    replace_file(bundle, "codes.safetensors", (tmp_path / "codes.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"codes are for styles \[10, 16\]") as error:
        load_bundle(bundle)
    assert one_sentence(error)


def test_a_full_disk_leaves_the_older_bundle_whole(bundle, monkeypatch):
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    given, real_write = parts(), os.write
    given["directions"] = given["directions"] * 2
    total = sum(map(len, before.values())) + len(before["codes.safetensors"])  # the codes pass through a scratch file
    for budget in (0, 500, total // 3, total // 2, total - len(before["codes.safetensors"]) // 2):
        left = [budget]

        def write(descriptor, data, left=left):
            if len(data) > left[0]:
                raise OSError(28, "No space left on device")
            left[0] -= len(data)
            return real_write(descriptor, data)

        monkeypatch.setattr(os, "write", write)
        with pytest.raises(InputError, match="No space left") as error:
            save_bundle(bundle, **given)
        monkeypatch.setattr(os, "write", real_write)
        assert one_sentence(error)
        assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
    save_bundle(bundle, **given)
    assert torch.equal(load_bundle(bundle).dictionary.directions, given["directions"])


def test_a_bundle_gives_the_files_that_it_lists(bundle):
    assert read_bundle_file(bundle, "generator.safetensors") == (bundle / "generator.safetensors").read_bytes()
    (bundle / "oracle.safetensors").write_bytes(b"weights")
    with pytest.raises(InputError, match="has no oracle.safetensors"):
        read_bundle_file(bundle, "oracle.safetensors")


def test_a_file_of_a_bundle_is_plain_safetensors(tiny_bundle):
    state = load_file(tiny_bundle / "generator.safetensors")
    assert torch.equal(state["latent_avg"], load_generator(tiny_bundle).latent_avg)
    assert dataclasses.is_dataclass(LatentTable.load(tiny_bundle / "codes.safetensors"))


class _Sharing(torch.nn.Module):
    """Two blocks with one layer, as those of HyperStyle's hypernetworks are."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(3, 3)
        self.blocks = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(3, 3), self.first) for _ in range(2)])


def test_what_modules_share_is_stored_once_and_read_under_every_name():
    network = _Sharing()
    state = own_state(network)
    assert list(state) == [
        "first.weight", "first.bias", "blocks.0.0.weight", "blocks.0.0.bias", "blocks.1.0.weight", "blocks.1.0.bias"
    ]  # fmt: skip
    for given in (state, {name: tensor.clone() for name, tensor in network.state_dict().items()}):
        read = fill_network(_Sharing, given, "The file")
        assert read.blocks[0][1] is read.first and own_state(read).keys() == state.keys()
        assert all(torch.equal(read.state_dict()[name], tensor) for name, tensor in network.state_dict().items())
    state.pop("blocks.1.0.bias")
    with pytest.raises(InputError, match="The file does not hold the weights"):
        fill_network(_Sharing, state, "The file")
