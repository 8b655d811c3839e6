"""Published encoders: their names and shapes, the numbers their own code gives, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from published_weights import filled

from sage_fast.errors import InputError
from sage_fast.models.encoder_kinds import build_encoder, encoder_architecture
from sage_fast.models.hypernets import ResNetHypernet
from sage_fast.models.psp import GradualStyleEncoder, WEncoder, WPlusEncoder
from sage_fast.models.published_encoders import ENCODER_TYPES, encoder_from_state, from_absolute
from sage_fast.models.weights import load_encoder

# What the published programs compute with the weights of ``filled``, run at commits 5cfff38 (pSp), 99ea505 (e4e),
# 5e80276 (ReStyle) and a723c73 (HyperStyle): elements 0, 7 and 511 of each style; of each layer's deltas two corners.
RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "published_encoders.json").read_text())
ONE_PASS = {
    "GradualStyleEncoder": lambda: GradualStyleEncoder(8),
    "Encoder4Editing": lambda: GradualStyleEncoder(8, progressive=True),
    "BackboneEncoder": lambda: GradualStyleEncoder(4, pyramid=False, n_iterations=5),
    "ResNetProgressiveBackboneEncoder": lambda: GradualStyleEncoder(4, None, "resnet34", False, True, 5),
    "BackboneEncoderUsingLastLayerIntoW": lambda: WEncoder(8),
    "BackboneEncoderUsingLastLayerIntoWPlus": lambda: WPlusEncoder(8),
}


def _shapes(build):
    with torch.device("meta"):
        return {name: list(x.shape) for name, x in build().state_dict().items()}


def _state(build):
    with torch.device("meta"):
        state = build().state_dict()
    return filled(state)


def _ramp(*shape):
    return (torch.arange(torch.Size(shape).numel()) % 251).float().reshape(shape) / 125 - 1


@pytest.fixture(scope="module")
def w_state():
    return _state(lambda: WEncoder(8))


def test_gradual_style_encoder_has_the_published_names_and_shapes():
    shapes = _shapes(lambda: GradualStyleEncoder(18))
    assert len(shapes) == 621
    assert shapes["input_layer.0.weight"] == [64, 3, 3, 3] and shapes["input_layer.2.weight"] == [64]
    assert shapes["latlayer1.weight"] == [512, 256, 1, 1] and shapes["latlayer2.weight"] == [512, 128, 1, 1]
    assert shapes["latlayer1.bias"] == shapes["latlayer2.bias"] == [512]
    assert len({name.split(".")[1] for name in shapes if name.startswith("body.")}) == 24
    for block, c_in, c_out in ((3, 64, 128), (7, 128, 256), (21, 256, 512)):
        assert shapes[f"body.{block}.shortcut_layer.0.weight"] == [c_out, c_in, 1, 1]
        assert shapes[f"body.{block}.res_layer.1.weight"] == [c_out, c_in, 3, 3]
        assert shapes[f"body.{block}.res_layer.5.fc1.weight"] == [c_out // 16, c_out, 1, 1]
        assert f"body.{block + 1}.shortcut_layer.0.weight" not in shapes
    for i in range(18):
        convs = {name for name in shapes if name.startswith(f"styles.{i}.convs.") and name.endswith("weight")}
        depth = 4 if i < 3 else 5 if i < 7 else 6
        assert convs == {f"styles.{i}.convs.{2 * j}.weight" for j in range(depth)}
        assert shapes[f"styles.{i}.linear.weight"] == [512, 512] and shapes[f"styles.{i}.linear.bias"] == [512]


def test_restyle_reads_six_channels_and_every_style_from_the_last_map():
    for trunk, first, n_names in (("irse50", "input_layer.0.weight", 525), ("resnet34", "conv1.weight", 357)):
        shapes = _shapes(lambda trunk=trunk: GradualStyleEncoder(14, None, trunk, False, False, 5))
        assert shapes[first][1] == 6 and len(shapes) == n_names
        assert "latlayer1.weight" not in shapes and "styles.13.convs.8.weight" not in shapes
    assert shapes["body.3.downsample.0.weight"] == [128, 64, 1, 1] and shapes["relu.weight"] == [64]


@pytest.mark.parametrize("n_outputs", [20, 23, 26])
@pytest.mark.parametrize("separable", [False, True])
def test_hypernetworks_have_the_published_names_and_shapes(n_outputs, separable):
    shapes = _shapes(lambda: ResNetHypernet(n_outputs, separable=separable))
    assert shapes["conv1.weight"] == [64, 6, 7, 7] and shapes["body.15.conv2.weight"] == [512, 512, 3, 3]
    assert shapes["shared_weight_hypernet.w1"] == [512, 4608] and shapes["shared_weight_hypernet.b2"] == [262144]
    assert shapes["refinement_blocks.12.hypernet.w2"] == [512, 262144]
    assert shapes["refinement_blocks.12.linear.weight"] == [512, 512]
    assert shapes["refinement_blocks.1.output.0.weight"] == [1536, 512, 1, 1]
    if separable:
        assert shapes["refinement_blocks.14.output.0.make_kernel_out.weight"] == [9 * 256, 512]
        assert shapes["refinement_blocks.14.output.0.kernel_linear_in.weight"] == [512, 512]
    else:
        assert shapes["refinement_blocks.14.output.1.weight"] == [512 * 256, 512, 1, 1]
    blocks = {name.split(".")[1] for name in shapes if name.startswith("refinement_blocks.")}
    assert blocks == {str(i) for i in range(n_outputs)}


@pytest.mark.parametrize("name", ONE_PASS)
def test_encoders_compute_what_the_published_programs_do(name):
    state = _state(ONE_PASS[name])
    encoder = encoder_from_state(name, state, n_latent=len(RECORDED[name]) if "IntoW" not in name else 8)
    assert not encoder.training and set(encoder.state_dict()) == set(state)
    with torch.no_grad():
        offsets = encoder(_ramp(1, encoder.n_inputs, 64, 64))[0]
    expected = torch.tensor(RECORDED[name])
    torch.testing.assert_close(offsets[:, [0, 7, 511]], expected.expand(len(offsets), 3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("separable", [False, True])
def test_hypernetworks_compute_what_the_published_programs_do(separable, w_state):
    name = "SharedWeightsHyperNetResNet" + ("Separable" if separable else "")
    state = _state(lambda: ResNetHypernet(20, [0, 1, 15], separable))
    state = {f"hypernet.{key}": x for key, x in state.items()} | {f"w_encoder.{key}": x for key, x in w_state.items()}
    encoder = encoder_from_state({"encoder_type": name, "output_size": 256}, state)
    assert encoder.kind == "hyperstyle" and encoder.n_latent == 14
    with torch.no_grad():
        deltas = encoder(_ramp(1, 6, 256, 256))
    assert {str(i) for i, delta in enumerate(deltas) if delta is not None} == set(RECORDED[name])
    for layer, expected in RECORDED[name].items():
        delta = deltas[int(layer)][0]
        found = [*delta[:3, 5, -1, 0].tolist(), *delta[-1, -3:, 0, -1].tolist()]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("opts", "kind", "n_iterations"),
    [
        ({"encoder_type": "GradualStyleEncoder"}, "psp", 0),
        ({"encoder_type": "Encoder4Editing", "stylegan_size": 16}, "e4e", 0),
        ({"encoder_type": "ProgressiveBackboneEncoder", "n_iters_per_batch": 3}, "restyle", 3),
    ],
)
def test_opts_say_what_the_names_do_not(opts, kind, n_iterations):
    n_styles = 6 if kind == "e4e" else 2
    state = _state(lambda: GradualStyleEncoder(n_styles, pyramid=kind != "restyle", n_iterations=n_iterations))
    encoder = encoder_from_state(opts, state)
    assert (encoder.kind, encoder.n_iterations, encoder.n_latent) == (kind, n_iterations, n_styles)
    again = build_encoder(encoder_architecture(encoder))
    assert _shapes(lambda: again) == {key: list(x.shape) for key, x in state.items()}


def test_an_old_file_has_more_styles_than_the_generator():
    state = _state(lambda: GradualStyleEncoder(4))
    with torch.no_grad():
        whole, cut = (encoder_from_state("psp", state, n)(_ramp(1, 3, 64, 64)) for n in (None, 3))
    assert cut.shape == (1, 3, 512) and torch.equal(whole[:, :3], cut)
    with pytest.raises(InputError, match="has 4 styles, the generator takes 8"):
        encoder_from_state("psp", state, 8)


@pytest.mark.parametrize("name", ["GradualStyleEncoder", "Encoder4Editing", "BackboneEncoderUsingLastLayerIntoWPlus"])
def test_latents_become_offsets(name):
    build = {"GradualStyleEncoder": lambda: GradualStyleEncoder(3), "Encoder4Editing": lambda: GradualStyleEncoder(3)}
    encoder = encoder_from_state(name, _state(build.get(name, lambda: WPlusEncoder(3))))
    images, average = _ramp(1, 3, 64, 64), torch.randn(3, 512)
    with torch.no_grad():
        before = encoder(images)
        from_absolute(encoder, average)
        torch.testing.assert_close(encoder(images) + average, before, rtol=1e-4, atol=1e-5)


def test_latents_in_w_become_offsets(w_state):
    encoder = encoder_from_state("WEncoder", w_state, 8)
    images, average = _ramp(1, 3, 64, 64), torch.randn(512)
    with torch.no_grad():
        before = encoder(images)
        from_absolute(encoder, average)
        torch.testing.assert_close(encoder(images) + average, before, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="one vector"):
        from_absolute(encoder, torch.randn(8, 512))


def test_refuses_what_is_not_an_encoder(w_state):
    with pytest.raises(InputError, match="encoder_type must be one of GradualStyleEncoder.*got 'vgg'"):
        encoder_from_state("vgg", {})
    for kind in ENCODER_TYPES:
        with pytest.raises(InputError):
            encoder_from_state(kind, {"style.1.weight": torch.zeros(4, 4)}, 8)
    with pytest.raises(InputError, match="give n_latent"):
        encoder_from_state("WEncoder", w_state)
    with pytest.raises(InputError, match="W encoder, which is a file of its own"):
        encoder_from_state("hyperstyle", {"hypernet.conv1.weight": torch.zeros(64, 6, 7, 7)})
    with pytest.raises(InputError, match="not those of WEncoder"):
        encoder_from_state("WEncoder", {**w_state, "linear.weight": torch.zeros(4, 4)}, 8)


def test_hyperstyle_is_joined_from_its_two_files(tmp_path, w_state):
    hypernet = _state(lambda: ResNetHypernet(20, [0, 1, 15], False))
    torch.save(
        {"state_dict": {f"hypernet.{key}": x for key, x in hypernet.items()}, "opts": {"output_size": 256}},
        tmp_path / "h",
    )
    torch.save(
        {"state_dict": {f"encoder.{key}": x for key, x in w_state.items()}, "opts": {"encoder_type": "WEncoder"}},
        tmp_path / "w",
    )
    encoder = load_encoder(tmp_path / "h", w_encoder=tmp_path / "w")
    assert encoder.kind == "hyperstyle" and encoder.n_latent == 14
    for part, state in ((encoder.hypernet, hypernet), (encoder.w_encoder, w_state)):
        assert all(torch.equal(value, state[name]) for name, value in part.state_dict().items())
    with pytest.raises(InputError, match="give load_encoder that too, as w_encoder"):
        load_encoder(tmp_path / "h")
    with pytest.raises(InputError, match="w_encoder is for HyperStyle"):
        load_encoder(tmp_path / "w", w_encoder=tmp_path / "w")
    with pytest.raises(InputError, match="a bundle holds its own"):
        load_encoder(w_encoder=tmp_path / "w")
