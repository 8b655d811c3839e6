"""Files of pSp's family and of AGE and SAGE: the generator inside, prefixes, mean latents of every shape, dictionaries."""

from __future__ import annotations

import argparse
import copy

import numpy as np
import pytest
import torch
from nvlabs_pickles import write_nvlabs
from published_weights import filled
from safetensors.torch import save_file

from sage_fast import load_dictionary
from sage_fast.conversion import convert, describe
from sage_fast.errors import InputError, SageFastWarning
from sage_fast.factorization.category_irrelevant import CategoryIrrelevantDictionary
from sage_fast.factorization.category_relevant import CategoryRelevantDictionary
from sage_fast.inversion import project
from sage_fast.models import published
from sage_fast.models.checkpoints import Checkpoint
from sage_fast.models.psp import GradualStyleEncoder, WEncoder
from sage_fast.models.published import read_published
from sage_fast.models.published_nvlabs import to_nvlabs
from sage_fast.models.stylegan2 import Generator
from sage_fast.models.weights import load_discriminator, load_encoder, load_generator


@pytest.fixture(scope="module")
def G() -> Generator:
    torch.manual_seed(3)
    G = Generator(16, 12, 2, channels=[4, 4, 4])
    G.latent_avg.copy_(torch.randn(12))
    return G.eval()


def decoder(G: Generator, prefix: str = "decoder.") -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in G.state_dict().items() if name != "latent_avg"}


def write(path, state, **entries):
    torch.save({"state_dict": state} | entries, path)
    return path


def same(a, b) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize("shape", [(12,), (1, 12), (6, 12), (18, 12)])
@pytest.mark.parametrize("prefix", ["decoder.", "decoder.module.", "module.decoder."])
def test_the_decoder_is_a_generator_whatever_the_prefix(tmp_path, G, prefix, shape):
    average = G.latent_avg.expand(shape).clone()
    path = write(tmp_path / "x", decoder(G, prefix), latent_avg=average, opts=argparse.Namespace(output_size=16))
    assert same(load_generator(path), G)


def test_rows_that_differ_give_their_mean_and_a_wrong_width_is_refused(tmp_path, G):
    rows = torch.randn(6, 12)
    torch.testing.assert_close(
        load_generator(write(tmp_path / "x", decoder(G), latent_avg=rows)).latent_avg, rows.mean(0)
    )
    with pytest.raises(InputError, match=r"latent_avg of shape \[6, 9\], expected \[12\]"):
        load_generator(write(tmp_path / "x", decoder(G), latent_avg=rows[:, :9]))


def test_without_a_mean_latent_the_mapping_gives_one(tmp_path, G):
    with pytest.warns(SageFastWarning, match="no latent_avg"):
        assert torch.equal(load_generator(write(tmp_path / "x", decoder(G))).latent_avg, G.mean_latent())


@pytest.mark.parametrize(
    ("state", "opts", "name"),
    [
        ({}, {}, "pSp .pt"),
        ({}, {"stylegan_size": 16}, "e4e .pt"),
        ({"encoder.input_layer.0.weight": torch.zeros(1, 6, 3, 3)}, {}, "ReStyle .pt"),
        ({"hypernet.x": torch.zeros(1)}, {}, "HyperStyle .pt"),
        ({"ax.A": torch.zeros(6, 12, 3)}, {}, "AGE / SAGE .pt"),
    ],
)
def test_the_family_follows_from_the_content(tmp_path, G, state, opts, name):
    path = write(tmp_path / "x", decoder(G) | state, opts=opts, latent_avg=G.latent_avg)
    assert read_published(path).format == name


def test_an_encoder_beside_the_decoder_is_loaded(tmp_path):
    torch.manual_seed(4)
    G = Generator(4, 512, 1, channels=[2]).eval()
    with torch.device("meta"):
        encoder = GradualStyleEncoder(2, 2)
    state = {f"encoder.module.{n}": torch.zeros(t.shape, dtype=t.dtype) for n, t in encoder.state_dict().items()}
    opts = argparse.Namespace(output_size=4, encoder_type="GradualStyleEncoder", start_from_latent_avg=True)
    path = write(tmp_path / "x", decoder(G) | state, opts=opts, latent_avg=G.latent_avg)
    found = load_encoder(path)
    assert (found.n_latent, found.style_dim, found.kind) == (2, 512, "psp")
    assert describe(path)["loads"] == ["generator", "encoder"]


@pytest.mark.parametrize("name", ["GradualStyleEncoder", "BackboneEncoderUsingLastLayerIntoW"])
@pytest.mark.filterwarnings("ignore:the weights have no latent_avg")
def test_an_encoder_of_latents_has_no_mean_latent_beside_it_and_its_generator_gives_one(tmp_path, name):
    """``start_from_latent_avg`` False, the default of their training: their coaches store ``latent_avg`` only where it is True."""
    torch.manual_seed(4)
    G = Generator(4, 512, 1, channels=[2]).eval()
    with torch.device("meta"):
        shapes = (WEncoder(2) if name.endswith("IntoW") else GradualStyleEncoder(2, 2)).state_dict()
    weights = filled(shapes)
    state = {f"encoder.{name}": value for name, value in weights.items()}
    opts = {"output_size": 4, "encoder_type": name, "learn_in_w": name.endswith("IntoW")}
    started = write(tmp_path / "a", decoder(G) | state, opts=opts | {"start_from_latent_avg": True})
    path = write(tmp_path / "b", decoder(G) | state, opts=opts | {"start_from_latent_avg": False})
    x = (torch.arange(3 * 64 * 64) % 251).float().reshape(1, 3, 64, 64) / 125 - 1
    with torch.no_grad():
        latents, offsets = load_encoder(started)(x), load_encoder(path)(x)
        torch.testing.assert_close(offsets + load_generator(path).latent_avg, latents, rtol=1e-4, atol=1e-5)
        bundle = convert(path, tmp_path / "bundle", "bundle")
        back = convert(bundle, tmp_path / "c.pt", "psp")
        for again in (bundle, back, convert(path, tmp_path / "d.pt", "psp")):
            found = load_encoder(again)(x) + load_generator(again).latent_avg
            torch.testing.assert_close(found, latents, rtol=1e-4, atol=1e-5)
    kept = torch.load(back, weights_only=True)
    assert kept["latent_avg"].shape == (1 if name.endswith("IntoW") else 2, 512)  # what pSp's code adds to its codes
    assert kept["opts"]["learn_in_w"] is name.endswith("IntoW")
    alone = write(tmp_path / "e", state, opts=opts | {"start_from_latent_avg": False})
    assert "has an encoder of latents (start_from_latent_avg is False), and no latent_avg or generator" in refused(
        load_encoder, alone
    )


def spoiled(value):
    """A mean latent with one number replaced."""
    average = torch.zeros(6, 12)
    average[2, 3] = value
    return average


@pytest.mark.parametrize(
    ("average", "words"),
    [
        (spoiled(torch.nan), "has a latent_avg that is not finite, expected an array of finite numbers"),
        (spoiled(torch.inf), "has a latent_avg that is not finite"),
        (torch.zeros(12, dtype=torch.complex64), "has numbers of torch.complex64 as latent_avg"),
        (torch.zeros(12, dtype=torch.bool), "has numbers of torch.bool as latent_avg"),
        ("average", "has a value of type str as latent_avg"),
        ([0.0] * 12, "has a value of type list as latent_avg"),
    ],
    ids=str,
)
def test_a_mean_latent_that_is_none_is_refused_by_every_door(tmp_path, G, average, words):
    state = decoder(G) | {"encoder.input_layer.0.weight": torch.zeros(1, 3, 3, 3)}
    path = write(tmp_path / "x.pt", state, latent_avg=average, opts={"output_size": 16})
    told = [refused(load_generator, path), refused(load_encoder, path)]
    told += [describe(path)["networks"][name]["refused"] for name in ("generator", "encoder")]
    assert all(str(path) in text and words in text for text in told)
    port = tmp_path / "y.pt"
    torch.save({"g_ema": decoder(G, ""), "latent_avg": average}, port)
    assert str(port) in refused(load_generator, port) and words in refused(load_generator, port)


def test_a_mean_latent_in_any_numbers_is_read(tmp_path, G):
    for average in (np.ones((6, 12)), np.ones(12, dtype=np.float16), torch.ones(12, dtype=torch.int64)):
        assert load_generator(write(tmp_path / "x", decoder(G), latent_avg=average)).latent_avg.equal(torch.ones(12))


def test_a_mean_latent_beside_other_names_is_checked_too(tmp_path, G):
    with torch.no_grad():
        broken = copy.deepcopy(G)
        broken.latent_avg[1] = torch.nan
    save_file({f"G_ema.{name}": value for name, value in to_nvlabs(broken).items()}, tmp_path / "a.safetensors")
    torch.save({"g_ema": broken.state_dict()}, tmp_path / "b.pt")
    for path in (write_nvlabs(tmp_path / "c.pkl", broken), tmp_path / "a.safetensors", tmp_path / "b.pt"):
        assert "has a latent_avg that is not finite" in refused(load_generator, path)


# --- sizes that do not agree ---


def encoder_state(n_styles: int, prefix: str = "encoder.") -> dict[str, torch.Tensor]:
    """The weights of a pSp encoder with a head a style: zeros that take no memory, and so fit into no file."""
    with torch.device("meta"):
        state = GradualStyleEncoder(n_styles).state_dict()
    return {prefix + name: torch.zeros((), dtype=value.dtype).expand(value.shape) for name, value in state.items()}


@pytest.fixture
def keep(monkeypatch, tmp_path):
    """Stand in for reading a file: names one, whose content is what was given."""
    files = {}

    def read(path, *_):
        return Checkpoint(path, "torch-zip", files[path], {})

    def named(name, state, **entries):
        (tmp_path / name).touch()
        files[tmp_path / name] = {"state_dict": state} | entries
        return tmp_path / name

    monkeypatch.setattr(published, "read_checkpoint", read)
    return named


def small(resolution: int, width: int = 512) -> Generator:
    torch.manual_seed(4)
    return Generator(resolution, width, 1, channels=[2] * (resolution.bit_length() - 2)).eval()


def refused(call, *args) -> str:
    with pytest.raises(InputError) as error:
        call(*args)
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and ". " not in text
    return text


@pytest.mark.parametrize(
    ("opts", "rows", "words"),
    [
        ({"output_size": 1024}, 18, ("a decoder of 32 px (8 styles)", "expected 1024 px (18 styles)")),
        ({"output_size": 1024}, 8, ("a decoder of 32 px (8 styles)", "expected 1024 px (18 styles)")),
        ({"stylegan_size": 256}, 1, ("a decoder of 32 px (8 styles)", "expected 256 px (14 styles)")),
        (
            {"output_size": 32, "stylegan_size": 64},
            1,
            ("output_size=32 and stylegan_size=64", "expected one power of two"),
        ),
        ({"output_size": "large"}, 1, ("output_size='large'", "expected one power of two from 4 to 1024")),
        ({"output_size": 1000}, 1, ("output_size=1000", "expected one power of two from 4 to 1024")),
        ({"output_size": 32}, 14, ("latent_avg of shape [14, 512]", "expected 1 row or 8 for a generator of 32 px")),
        ({}, 18, ("latent_avg of shape [18, 512]", "expected 1 row or 8 for a generator of 32 px")),
    ],
    ids=str,
)
def test_a_file_whose_sizes_contradict_each_other_is_refused_by_every_door(tmp_path, opts, rows, words):
    state = decoder(small(32)) | {"encoder.input_layer.0.weight": torch.zeros(1, 3, 3, 3)}
    path = write(tmp_path / "x.pt", state, opts=opts, latent_avg=torch.zeros(rows, 512))
    found = describe(path)
    told = [refused(load_generator, path), refused(load_encoder, path)]
    told += [found["networks"][name]["refused"] for name in ("generator", "encoder")]
    assert all(str(path) in text and all(word in text for word in words) for text in told)
    assert found["loads"] == found["converts to"] == []
    assert refused(convert, path, tmp_path / "y.pt") and not (tmp_path / "y.pt").exists()


def test_eighteen_styles_of_old_files_are_cut_where_the_file_says_so_or_the_caller(keep):
    state, average = decoder(small(16)) | encoder_state(18), torch.zeros(18, 512)
    path = keep("x.pt", state, opts={"output_size": 16}, latent_avg=average)
    with pytest.warns(SageFastWarning, match="of the encoder's 18 styles the generator of 16 px takes the first 6"):
        assert load_encoder(path).n_latent == 6
    assert load_encoder(path, n_latent=6).n_latent == 6
    assert "n_latent must be 6, as the generator of the file takes, got 8" in refused(
        lambda: load_encoder(path, n_latent=8)
    )
    silent = keep("y.pt", state, latent_avg=average[:6])
    text = refused(load_encoder, silent)
    assert "an encoder of 18 styles, expected 6 as its generator takes" in text and "n_latent=6" in text
    assert describe(silent)["networks"]["encoder"] == {"refused": text}
    assert load_encoder(silent, n_latent=6).n_latent == 6
    other = keep("z.pt", decoder(small(16)) | encoder_state(8), opts={"output_size": 16})
    assert "an encoder of 8 styles, expected 6" in refused(load_encoder, other)
    few = keep("v.pt", decoder(small(16)) | encoder_state(4), opts={"output_size": 16})
    assert "the encoder has 4 styles, the generator takes 6" in refused(load_encoder, few)


def test_an_encoder_alone_has_the_styles_that_it_has_unless_told(keep):
    path = keep("x.pt", encoder_state(18))
    assert load_encoder(path).n_latent == 18 and load_encoder(path, n_latent=14).n_latent == 14
    assert "the encoder has 18 styles, the generator takes 20" in refused(lambda: load_encoder(path, n_latent=20))
    assert "n_latent must be a whole number" in refused(lambda: load_encoder(path, n_latent="14"))
    assert "n_latent is for a published file" in refused(lambda: load_encoder(None, n_latent=8))
    old = keep("y.pt", encoder_state(18), opts={"output_size": 256}, latent_avg=torch.zeros(8, 512))
    assert "expected 1 row or 14 for a generator of 256 px" in refused(load_encoder, old)


def test_eighteen_styles_enter_no_generator_of_fewer(keep):
    G, E = small(32), load_encoder(keep("x.pt", encoder_state(18)))
    images = torch.zeros(1, 3, 32, 32)
    told = "the encoder gives latents [18, 512] of images with 3 channels, the generator of 32 px takes [8, 512]"
    assert told in refused(lambda: E.invert(images, G)) and told in refused(lambda: project(images, G, E))
    assert "[1, 8, 512]" in refused(lambda: project(images, G, start=torch.zeros(1, 18, 512)))
    for call in (G.synthesis, G):
        assert "[N, 8, 512] for this 32 px generator, got [1, 18, 512]" in refused(call, torch.zeros(1, 18, 512))
    assert "[N, 8, 512] for this 32 px generator, got [18, 8, 64]" in refused(G.synthesis, torch.zeros(18, 64))
    assert "w_plus must be a tensor of latents, got ndarray" in refused(G.synthesis, np.zeros((1, 8, 512)))


def test_what_is_asked_for_and_not_there(tmp_path, G):
    path = write(tmp_path / "x", decoder(G), latent_avg=G.latent_avg)
    for load, wanted in (
        (load_encoder, "encoder"),
        (load_discriminator, "discriminator"),
        (load_dictionary, "directions"),
    ):
        with pytest.raises(InputError, match=f"holds no {wanted}, but generator"):
            load(path)
    encoder = write(tmp_path / "y", {"encoder.input_layer.0.weight": torch.zeros(1, 3, 3, 3)})
    with pytest.raises(InputError, match="holds no generator, but encoder"):
        load_generator(encoder)
    with pytest.raises(InputError, match="the encoder has 0 styles"):
        load_encoder(encoder)


def test_the_directions_of_age_are_a_dictionary_of_all_styles(tmp_path, G):
    A = torch.randn(6, 12, 5)
    state = {
        f"module.{name}": value for name, value in ({"ax.A": A, "ax.encoder0.fc1.weight": A[0]} | decoder(G)).items()
    }
    path = write(tmp_path / "x", state, latent_avg=G.latent_avg, opts={"device": torch.device("cpu")})
    found = load_dictionary(path)
    assert isinstance(found, CategoryIrrelevantDictionary) and found.groups == ((0, 1, 2), (3, 4, 5))
    assert torch.equal(found.directions[:6], A) and len(found.directions) == G.n_latent
    assert read_published(path).ignored == ("ax.encoder0",)
    big = write(tmp_path / "y", {"ax.A": A} | decoder(Generator(32, 12, 1, channels=[2] * 4)), latent_avg=G.latent_avg)
    assert load_dictionary(big).directions[6:].eq(0).all() and len(load_dictionary(big).directions) == 8


def test_class_embeddings_codes_and_statistics(tmp_path):
    means = {f"n0{i}": torch.randn(18, 12) for i in (2, 1, 3)}
    torch.save(means, tmp_path / "e.pt")
    found = load_dictionary(tmp_path / "e.pt")
    assert isinstance(found, CategoryRelevantDictionary) and found.n_components == 3
    assert torch.equal(found.class_embeddings_[0], means["n01"])
    torch.save({"n01": [torch.randn(6, 5)] * 4}, tmp_path / "ns.pt")
    assert load_dictionary(tmp_path / "ns.pt")["n01"].shape == (4, 6, 5)
    arrays = {"mean": np.zeros((2, 5)), "mean_abs": np.ones((2, 5)), "cov": np.ones((2, 5, 5))}
    np.save(tmp_path / "n_distribution.npy", arrays)
    assert load_dictionary(tmp_path / "n_distribution.npy")["cov"].shape == (2, 5, 5)
    assert describe(tmp_path / "e.pt")["loads"] == ["class embeddings"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"mean": None, "mean_abs": [1], "cov": ["x"]}, "has a 'mean' that is no array of numbers"),
        ({"mean": [np.zeros(5), np.zeros(4)], "mean_abs": [], "cov": []}, "nor a list of some of one shape"),
        ({"mean": [], "mean_abs": [], "cov": []}, "has a 'mean' that is no array of numbers"),
        ({"a": [torch.ones(6, 5), torch.ones(6, 4)]}, "has a code of shape [6, 4] in category 'a', expected [6, 5]"),
        ({"a": [torch.ones(6, 5)], "b": [torch.ones(6, 4)]}, "has a code of shape [6, 4] in category 'b'"),
        ({"a": [torch.ones(6, 5)], "b": []}, "has no codes in category 'b', expected [6, 5]"),
    ],
    ids=str,
)
def test_damaged_statistics_are_refused_in_one_sentence(tmp_path, content, words):
    np.save(tmp_path / "a.npy", content) if "mean" in content else torch.save(content, tmp_path / "a.npy")
    text = refused(load_dictionary, tmp_path / "a.npy")
    assert words in text and str(tmp_path / "a.npy") in text


@pytest.mark.parametrize("number", ["x", float("nan"), float("inf"), -1, 0, 10**9, 2.5, [1], True])
def test_passes_of_restyle_that_are_no_number_are_refused(tmp_path, number):
    with torch.device("meta"):
        state = GradualStyleEncoder(2, pyramid=False, n_iterations=5).state_dict()
    opts = {"encoder_type": "BackboneEncoder", "output_size": 4, "n_iters_per_batch": number}
    path = write(tmp_path / "a", {f"encoder.{name}": value for name, value in filled(state).items()}, opts=opts)
    assert "expected a whole number from 1 to 100" in refused(load_encoder, path)


def test_a_size_that_is_no_number_is_refused(tmp_path, G):
    path = write(tmp_path / "a", decoder(G), latent_avg=G.latent_avg, opts={"output_size": torch.tensor([16, 16])})
    assert "expected one power of two from 4 to 1024" in refused(load_generator, path)


def test_restyle_begins_at_the_mean_latent_whatever_its_options_say(tmp_path):
    """Its training's default is False, its networks never read it, and its coach always stores latent_avg."""
    with torch.device("meta"):
        state = GradualStyleEncoder(2, pyramid=False, n_iterations=2).state_dict()
    weights = {f"encoder.{name}": value for name, value in filled(state).items()}
    opts = {"encoder_type": "BackboneEncoder", "output_size": 4, "n_iters_per_batch": 2}
    found = [
        load_encoder(
            write(tmp_path / "a", weights, opts=opts | {"start_from_latent_avg": start}, latent_avg=torch.ones(2, 512))
        )
        for start in (True, False)
    ]
    assert same(*found) and found[0].n_iterations == 2


def test_restyle_sees_small_reconstructions_as_its_own_code_does():
    """AdaptiveAvgPool2d, which repeats the pixels of images below 256 px."""
    encoder = GradualStyleEncoder(2, pyramid=False, n_iterations=2)
    seen = []
    encoder.forward = lambda x: seen.append(x) or x
    images, rendered = torch.randn(1, 3, 256, 256), torch.randn(1, 3, 128, 128)
    encoder.correction(images, rendered)
    assert torch.equal(seen[0], torch.cat([images, rendered.repeat_interleave(2, 2).repeat_interleave(2, 3)], 1))


def test_an_encoder_of_cars_is_read_with_a_warning(tmp_path):
    with torch.device("meta"):
        state = GradualStyleEncoder(2).state_dict()
    weights = {f"encoder.{name}": value for name, value in filled(state).items()}
    opts = {"encoder_type": "GradualStyleEncoder", "output_size": 4, "dataset_type": "cars_encode"}
    with pytest.warns(SageFastWarning, match="images of 192 x 256 .*'cars_encode'.*, which are not read"):
        load_encoder(write(tmp_path / "a", weights, opts=opts, latent_avg=torch.ones(2, 512)))
