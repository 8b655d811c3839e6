"""The pipeline from shots to images: reproducible whatever the batch, and the sum of its parts."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_model import RESOLUTION, tiny_codes, tiny_encoder, tiny_networks

from sage_fast.data.folders import read_images, scan_image_folder
from sage_fast.data.latent_table import LatentTable
from sage_fast.data.writers import to_uint8
from sage_fast.editing.editor import METHODS as EDITOR_METHODS
from sage_fast.editing.editor import unused_settings
from sage_fast.errors import InputError, SageFastWarning
from sage_fast.factorization.category_irrelevant import CategoryIrrelevantDictionary
from sage_fast.fusion import fuse_frequencies, fuse_pixels
from sage_fast.generation import GenerateConfig, generate
from sage_fast.models.encoder_kinds import KINDS
from sage_fast.models.encoders import PyramidEncoder
from sage_fast.models.weight_deltas import select_deltas, synthesize
from sage_fast.models.weights import save_bundle
from sage_fast.pipeline import METHODS, FewShotPipeline, load_dictionary, normals


@pytest.fixture(scope="module")
def pipeline(tiny_bundle):
    return FewShotPipeline.from_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def shots(tiny_shots):
    """Three images of one category, uint8 [3, C, R, R]."""
    return read_images(scan_image_folder(tiny_shots).select(["lily"]), RESOLUTION).images


def grey_levels_apart(a, b):
    return int((to_uint8(a).int() - to_uint8(b).int()).abs().max())


# --- random numbers ---


def test_normals_are_normal_and_independent_between_samples():
    draws = torch.stack([normals(0, "rose", number, 500) for number in range(40)])
    assert draws.dtype == torch.float32
    assert stats.kstest(draws.flatten().numpy(), "norm").pvalue > 0.001
    correlation = np.corrcoef(draws.numpy()) - np.eye(40)
    assert np.abs(correlation).max() < 5 / 500**0.5


def test_normals_are_a_function_of_every_argument():
    base = normals(0, "rose", 1, 8)
    assert torch.equal(base, normals(0, "rose", 1, 8))
    assert torch.equal(base[:5], normals(0, "rose", 1, 5))
    others = [normals(1, "rose", 1, 8), normals(0, "lily", 1, 8), normals(0, "rose", 2, 8)]
    assert not any(torch.equal(base, other) for other in others)
    assert not torch.equal(normals(1, "1", 11, 8), normals(11, "1", 1, 8))


# --- reproducibility ---


@pytest.mark.parametrize("method", [*EDITOR_METHODS, "inversion"])
@pytest.mark.parametrize("fusion", ["none", "both"])
def test_the_batch_does_not_show(pipeline, shots, method, fusion):
    one = pipeline(shots, n=70, method=method, fusion=fusion, seed=3, category="lily", batch=1)
    for batch in (7, 64, 70, 1000):
        other = pipeline(shots, n=70, method=method, fusion=fusion, seed=3, category="lily", batch=batch)
        assert torch.equal(one.w_plus, other.w_plus)
        assert grey_levels_apart(one.images, other.images) <= 1
        assert all(grey_levels_apart(one.fused[name], other.fused[name]) <= 1 for name in one.fused)


@pytest.mark.parametrize("method", ["sage", "inversion"])
def test_no_numbers_are_no_images(pipeline, shots, method):
    none = pipeline.draw(pipeline.prepare(shots, method), [], fusion=["pixel", "frequency", "both"])
    assert none.w_plus.shape == (0, *pipeline.codes.w_plus.shape[1:]) and none.sources.shape == (0,)
    assert {images.shape for images in (none.images, *none.fused.values())} == {(0, *shots.shape[1:])}


def test_a_sample_depends_on_its_number_and_not_on_its_company(pipeline, shots):
    novel = pipeline.prepare(shots)
    all_of_them = pipeline.draw(novel, range(150), seed=1, category="lily")
    numbers = [3, 149, 64, 65, 63, 0]
    few = pipeline.draw(novel, numbers, seed=1, category="lily")
    assert torch.equal(few.w_plus, all_of_them.w_plus[numbers])
    assert torch.equal(few.sources, all_of_them.sources[numbers])
    assert grey_levels_apart(few.images, all_of_them.images[numbers]) <= 1


def test_seed_and_category_change_the_samples(pipeline, shots):
    base = pipeline(shots, n=4, seed=0, category="a").w_plus
    for seed, category in ((1, "a"), (0, "b")):
        assert (pipeline(shots, n=4, seed=seed, category=category).w_plus - base).abs().amin(0).max() > 1e-3


def test_a_code_does_not_depend_on_the_images_embedded_with_it(pipeline, shots):
    together = pipeline.embed(shots)
    assert torch.equal(together, torch.cat([pipeline.embed(shots[i : i + 1]) for i in range(len(shots))]))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_other_weights_show_in_the_next_code(tiny_bundle, shots, monkeypatch, device):
    """Of networks on a GPU copies invert; the device of this pipeline is said to be one."""
    pipeline = FewShotPipeline.from_bundle(tiny_bundle)
    monkeypatch.setattr(FewShotPipeline, "device", torch.device(device))
    code = pipeline.embed(shots)
    assert torch.equal(pipeline.embed(shots), code)
    other = copy.deepcopy(pipeline.encoder)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.1)
    first, pipeline.encoder = pipeline.encoder, other
    changed = pipeline.embed(shots)
    assert not torch.equal(changed, code)
    other.load_state_dict(first.state_dict())
    assert torch.equal(pipeline.embed(shots), code) and torch.equal(copy.deepcopy(pipeline).embed(shots), code)


def test_a_pipeline_that_was_pickled_before_it_had_a_precision(pipeline, shots):
    state = {k: v for k, v in vars(pipeline).items() if k not in ("precision", "inversion_device", "_copies")}
    old = FewShotPipeline.__new__(FewShotPipeline)
    old.__dict__.update(state)
    assert torch.equal(old(shots, 2).images, pipeline(shots, 2).images) and old.precision == "float32"


def test_torchs_own_random_state_is_neither_read_nor_moved(pipeline, shots):
    torch.manual_seed(0)
    first, state = pipeline(shots, n=3), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(first.w_plus, pipeline(shots, n=3).w_plus)
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())


# --- the sum of its parts ---


def test_images_are_the_generators_at_absolute_latents(pipeline, shots):
    result = pipeline(shots, n=5)
    G = pipeline.generator
    with torch.no_grad():
        expected = G(result.w_plus + G.latent_avg, noise="none").clamp(-1, 1)
    assert torch.allclose(result.images, expected, atol=1e-5)
    assert result.images.shape == (5, 3, RESOLUTION, RESOLUTION)


@pytest.mark.parametrize("noise", ["none", "const"])
def test_the_models_noise_is_used(tiny_bundle, pipeline, shots, noise):
    G, E, _ = tiny_networks()
    with torch.no_grad():
        G.conv1.noise.weight.fill_(0.5)
    p = FewShotPipeline(G, E, pipeline.relevant, pipeline.irrelevant, pipeline.codes, noise=noise)
    result = p(shots, n=2, method="inversion")
    with torch.no_grad():
        images = {kind: G(result.w_plus + G.latent_avg, noise=kind).clamp(-1, 1) for kind in ("none", "const")}
    assert torch.allclose(result.images, images[noise], atol=1e-5)
    assert not torch.allclose(images["none"], images["const"], atol=1e-2)


def test_uint8_and_float_shots_are_the_same(pipeline, shots):
    assert torch.equal(pipeline.embed(shots), pipeline.embed(shots.float() / 127.5 - 1))


def test_alpha_zero_gives_the_bases_and_alpha_scales_the_edit(pipeline, shots):
    bases = pipeline.adapt(shots).bases
    bases = bases[torch.arange(4) % len(bases)]
    edits = [pipeline(shots, n=4, alpha=alpha).w_plus - bases for alpha in (0.0, 1.0, 2.0)]
    assert edits[0].abs().max() < 1e-6
    assert torch.allclose(2 * edits[1], edits[2], atol=1e-5) and edits[1].abs().max() > 1e-2


def test_alpha_is_the_presets_unless_given(tiny_bundle, shots):
    for preset, alpha in (("paper", 2.0), ("released", 1.0), ("default", 1.0)):
        p = FewShotPipeline.from_bundle(tiny_bundle, preset=preset)
        assert torch.equal(p(shots, n=3).w_plus, p(shots, n=3, alpha=alpha).w_plus)


def test_inversion_reconstructs_the_shots_in_turn(pipeline, shots):
    result = pipeline(shots, n=7, method="inversion")
    codes = pipeline.embed(shots)
    assert torch.equal(result.w_plus, codes[[0, 1, 2, 0, 1, 2, 0]])
    assert result.sources.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_age_edits_each_shot_in_turn_and_fuses_it_with_that_shot(pipeline, shots):
    result = pipeline(shots, n=6, method="age", alpha=0.0)
    assert torch.allclose(result.w_plus, pipeline.embed(shots)[result.sources], atol=1e-6)


def test_fusion_is_with_the_shot_that_the_sample_came_from(pipeline, shots):
    result = pipeline(shots, n=5, fusion=("pixel", "frequency", "both"))
    real = (shots.float() / 127.5 - 1)[result.sources]
    inverted = pipeline(shots, n=3, method="inversion").images[result.sources]
    by_frequency = fuse_frequencies(real, inverted, result.images).clamp(-1, 1)
    assert torch.allclose(result.fused["pixel"], fuse_pixels(real, inverted, result.images).clamp(-1, 1), atol=1e-5)
    assert torch.allclose(result.fused["frequency"], by_frequency, atol=1e-5)
    assert torch.allclose(result.fused["both"], fuse_pixels(real, inverted, by_frequency).clamp(-1, 1), atol=1e-5)
    assert set(result.fused) == {"pixel", "frequency", "both"}
    assert all(images.abs().max() <= 1 for images in result.fused.values())


def test_a_lossless_inversion_leaves_nothing_to_fuse(pipeline, shots):
    novel = pipeline.prepare(shots)
    novel.shots.copy_(novel.inverted)
    result = pipeline.draw(novel, range(4), fusion=("frequency", "pixel"))
    for images in result.fused.values():
        assert torch.allclose(images, result.images, atol=1e-5)


@pytest.mark.parametrize("preset", ["paper", "released", "default"])
@pytest.mark.parametrize("n_shots", [1, 3])
def test_every_preset_draws_every_method(tiny_bundle, shots, preset, n_shots):
    p = FewShotPipeline.from_bundle(tiny_bundle, preset=preset)
    drawn = {m: p(shots[:n_shots], n=3, method=m, fusion="both") for m in (*EDITOR_METHODS, "inversion")}
    assert all(r.images.isfinite().all() and r.fused["both"].abs().max() <= 1 for r in drawn.values())
    assert not torch.equal(drawn["sage"].w_plus, drawn["age"].w_plus)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n_shots", [1, 3])
def test_the_editor_s_settings_are_those_that_it_draws_with(pipeline, shots, method, n_shots):
    found = pipeline.editor_settings(method, n_shots)
    assert set(found) == {"n_components", "n_similar", "n_directions"} - set(unused_settings(method))
    assert found.get("n_similar", 6) == 6  # all that there are, in place of 20 or 30
    given, left = (pipeline(shots[:n_shots], n=2, method=method, **options) for options in (found, {}))
    assert torch.equal(given.w_plus, left.w_plus)


def test_a_pipeline_warns_once_where_the_mapping_would_lose_new_categories(bundle_of_few, shots):
    pipeline = FewShotPipeline.from_bundle(bundle_of_few)
    for method in ("age", "sage-i", "inversion"):
        pipeline(shots, 1, method=method)
    with pytest.warns(
        SageFastWarning, match=r"6 seen categories, 6 components of 16 dimensions.* take --method sage-i"
    ):
        pipeline(shots, 1)
    pipeline(shots, 1, method="sage-q")
    with pytest.warns(SageFastWarning, match="2 components of 16"):
        pipeline(shots, 1, n_components=(4, 2))


def test_options_reach_the_editor(pipeline, shots):
    assert len(pipeline.adapt(shots, n_similar=2).similar_categories) == 2
    assert pipeline.adapt(shots, n_directions=1).direction_mask.sum(1).max() == 1
    assert len(pipeline.adapt(shots).similar_categories) > 2


def test_the_dictionary_of_a_bundle_loads_alone(tiny_bundle, pipeline):
    alone = load_dictionary(tiny_bundle)
    assert torch.equal(alone.directions, pipeline.irrelevant.directions) and alone.groups == pipeline.irrelevant.groups


# --- bad input ---


def test_shots_of_another_resolution_are_refused(pipeline, shots):
    with pytest.raises(InputError, match=r"\[N, 3, 8, 8\].*got \[.*16, 16\]"):
        pipeline(shots.repeat(1, 1, 2, 2), n=1)
    with pytest.raises(InputError, match=r"\[N, 3, 8, 8\]"):
        pipeline(shots[:, :1], n=1)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda s: s[:0], "at least 1"),
        (lambda s: s[0], "batch"),
        (lambda s: s.float(), r"\[-1, 1\]"),
        (lambda s: s.float() * float("nan"), r"\[-1, 1\]"),
        (lambda s: s.long(), "uint8"),
        (lambda s: s.numpy(), r"must be a tensor \[N, C, R, R\], got ndarray; torch.from_numpy converts"),
    ],
)
def test_shots_that_are_no_images_are_refused(pipeline, shots, bad, words):
    with pytest.raises(InputError, match=words):
        pipeline(bad(shots), n=1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n": 0}, "n must be"),
        ({"batch": 0}, "batch must be"),
        ({"method": "magic"}, "method must be one of"),
        ({"fusion": "magic"}, "fusion must be one of"),
        ({"fusion": ("pixel", "magic")}, "fusion must be one of"),
        ({"fusion": None}, "fusion must be one of .* got 'None'"),
        ({"n_components": 7}, "n_components must be 1 to 6"),
        ({"n_similar": 500}, "n_similar must be 1 to 6"),
        ({"alpha": float("nan")}, "alpha must be a finite number, got nan"),
        ({"alpha": float("inf")}, "alpha must be a finite number, got inf"),
        ({"method": "inversion", "alpha": 1.0}, "makes no use of alpha"),
        ({"method": "inversion", "n_similar": 3}, "makes no use of n_similar"),
        ({"method": "age", "n_similar": 3}, "makes no use of n_similar"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(pipeline, shots, settings, words):
    with pytest.raises(InputError, match=words):
        pipeline(shots, **{"n": 2, **settings})


def test_an_unknown_preset_or_noise_is_refused(tiny_bundle, pipeline):
    with pytest.raises(InputError, match="preset must be one of"):
        FewShotPipeline.from_bundle(tiny_bundle, preset="magic")
    with pytest.raises(InputError, match="noise must be"):
        FewShotPipeline(
            pipeline.generator, pipeline.encoder, pipeline.relevant, pipeline.irrelevant, pipeline.codes, noise="random"
        )


# --- encoders of every kind ---


@pytest.fixture(scope="module", params=KINDS)
def bundle_of_kind(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "model"
    generator, _, _ = tiny_networks()
    codes, directions = tiny_codes(generator.n_latent)
    encoder = tiny_encoder(request.param, generator)
    return save_bundle(folder, generator=generator, encoder=encoder, directions=directions, codes=codes)


def test_every_kind_of_encoder_edits_its_shots(bundle_of_kind, shots):
    pipeline = FewShotPipeline.from_bundle(bundle_of_kind)
    novel = pipeline.prepare(shots)
    together, one = (pipeline(shots, n=7, seed=1, category="lily", batch=batch) for batch in (64, 1))
    assert together.images.isfinite().all() and together.images.flatten(1).std(0).mean() > 0
    assert torch.equal(together.w_plus, one.w_plus) and grey_levels_apart(together.images, one.images) <= 1
    few = pipeline.draw(novel, [5, 2], seed=1, category="lily")
    assert grey_levels_apart(few.images, together.images[[5, 2]]) <= 1
    inverted = pipeline(shots, n=5, method="inversion")
    assert grey_levels_apart(inverted.images, novel.inverted[[0, 1, 2, 0, 1]]) <= 1


def test_what_is_drawn_from_a_shot_is_drawn_with_its_weights(shots, tmp_path):
    generator, _, _ = tiny_networks()
    codes, directions = tiny_codes(generator.n_latent)
    encoder = tiny_encoder("hyperstyle", generator)
    save_bundle(tmp_path / "b", generator=generator, encoder=encoder, directions=directions, codes=codes)
    pipeline = FewShotPipeline.from_bundle(tmp_path / "b")
    result, found = pipeline(shots, n=6, seed=1), pipeline.invert(shots)
    assert any(delta is not None for delta in found.weight_deltas)
    for j in range(6):
        deltas = select_deltas(found.weight_deltas, [j % 3])
        with torch.no_grad():
            drawn = synthesize(generator, result.w_plus[j : j + 1] + generator.latent_avg, deltas, "none")
            plain = generator(result.w_plus[j : j + 1] + generator.latent_avg, noise="none")
        assert grey_levels_apart(result.images[j : j + 1], drawn) <= 1
        assert grey_levels_apart(result.images[j : j + 1], plain) > 1


def test_every_kind_of_encoder_generates_to_disk(bundle_of_kind, tiny_shots, tmp_path):
    summary = generate(bundle_of_kind, tiny_shots, tmp_path / "out", GenerateConfig(n=2))
    assert summary.n_new == 2 * len(summary.categories) and (tmp_path / "out" / "contact_sheet.png").exists()


@pytest.mark.parametrize("shape", [(2, 18, 16), (2, 4, 1), (2, 4, 8), (4, 16)], ids=str)
def test_latents_of_another_generator_are_refused_in_one_sentence(pipeline, shape):
    for call in (pipeline.render, pipeline.synthesize):
        with pytest.raises(InputError, match=r"w_plus must have shape \[N, 4, 16\] for this 8 px generator") as error:
            call(torch.zeros(shape))
        assert "\n" not in str(error.value) and ". " not in str(error.value)


@pytest.mark.parametrize("change", ["encoder", "irrelevant", "codes"])
def test_parts_of_another_generator_are_refused_in_one_sentence(pipeline, change):
    names = ("generator", "encoder", "relevant", "irrelevant", "codes")
    parts = {name: getattr(pipeline, name) for name in names}
    codes = LatentTable(torch.zeros(2, 6, 16), torch.tensor([0, 1]), ["a", "b"])
    other = {
        "encoder": PyramidEncoder(8, 6, 16, channel_base=64, channel_max=8, head_width=4),
        "irrelevant": CategoryIrrelevantDictionary(torch.zeros(4, 8, 3)),
        "codes": codes,
    }
    with pytest.raises(InputError, match="The parts of the pipeline") as error:
        FewShotPipeline(**parts | {change: other[change]})
    assert "\n" not in str(error.value) and ". " not in str(error.value)
