"""Reports of scores, and scores of folders judged by the model's own networks."""

from __future__ import annotations

import json
import math
import re
import warnings

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.neighbors import NearestCentroid

from sage_fast.cli import main
from sage_fast.data.latent_table import LatentTable
from sage_fast.errors import InputError, SageFastWarning
from sage_fast.evaluation.protocol import Scores
from sage_fast.evaluation.report import (
    evaluate_folder,
    markdown_table,
    nearest_class_mean,
    table,
    write_page,
    write_report,
)
from sage_fast.generation import GenerateConfig, generate
from sage_fast.models.encoders import PyramidEncoder
from sage_fast.models.perceptual import SqueezeFeatures
from sage_fast.models.stylegan2 import Discriminator, Generator
from sage_fast.models.weights import save_bundle
from sage_fast.pipeline import FewShotPipeline

COLOURS = {"blue": (20, 40, 220), "green": (30, 200, 40), "red": (220, 30, 20)}


def scores(**changes):
    values = {
        "n_images": 6, "n_categories": 2, "network": "oracle", "retention": 0.625, "retention_interval": (0.5, 0.75),
        "retention_by_category": (0.5, 0.75), "retention_real": 0.98, "frechet": 1.2345, "kernel": -0.0012,
        "diversity": 2.5, "diversity_relative": 0.8, "spreads": {"light": 0.4, "turn": 0.6}, "categories": ("a", "b"),
    }  # fmt: skip
    return Scores(**(values | changes))


def write_images(folder, names, n, seed=0, noise=12):
    rng = torch.Generator().manual_seed(seed)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(n):
            pixels = torch.tensor(COLOURS[name.split("_")[0]]) + torch.randn(8, 8, 3, generator=rng) * noise
            Image.fromarray(pixels.clamp(0, 255).byte().numpy()).save(folder / name / f"{name}_{i:05d}.png")
    return folder


def make_bundle(folder, with_discriminator):
    torch.manual_seed(0)
    generator = Generator(8, style_dim=8, n_mapping=1, channel_max=8)
    n_latent = generator.n_latent
    codes = LatentTable(torch.randn(4, n_latent, 8), torch.tensor([0, 0, 1, 1]), ["a", "b"])
    return save_bundle(
        folder,
        generator=generator,
        encoder=PyramidEncoder(8, n_latent, 8, channel_max=8),
        directions=torch.randn(n_latent, 8, 3),
        codes=codes,
        discriminator=Discriminator(8, channel_max=8) if with_discriminator else None,
        about={},
    )


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    root = tmp_path_factory.mktemp("bundles")
    return {name: make_bundle(root / name, name == "discriminator") for name in ("discriminator", "encoder")}


@pytest.mark.parametrize("network", ["discriminator", "encoder"])
def test_folders_of_plain_colours_are_kept_and_told_apart(tmp_path, bundles, network):
    real = write_images(tmp_path / "real", COLOURS, 8, 1)
    generated = write_images(tmp_path / "out", ["green", "red"], 6, 2)
    got = evaluate_folder(bundles[network], generated, real)
    assert (got.network, got.categories, got.n_images) == (network, ("green", "red"), 12)
    assert got.retention == 1.0 and got.retention_real == 1.0 and got.spreads == {}
    assert f"FD-{network}" in table({"sage": got}) and "FID" not in table({"sage": got})


def test_a_network_from_outside_the_model_judges_when_it_is_given(tmp_path, bundles, capsys):
    torch.manual_seed(1)
    save_file(SqueezeFeatures().state_dict(), tmp_path / "squeeze.safetensors")
    real = write_images(tmp_path / "real", COLOURS, 8, 1)
    generated = write_images(tmp_path / "out", ["green", "red"], 6, 2)
    words = ["evaluate", f"--model={bundles['discriminator']}", f"--generated={generated}", f"--real={real}"]
    assert main([*words, f"--features={tmp_path / 'squeeze.safetensors'}"]) == 0
    assert "FD-squeezenet1_1" in capsys.readouterr().out
    rows = json.loads((generated / "report.json").read_text())["rows"]
    assert rows["generated"]["retention"] == 1.0
    assert main([*words, "--features=nowhere"]) == 2 and "nowhere" in capsys.readouterr().err


def test_the_discriminator_judges_by_name_too(tmp_path, bundles):
    real = write_images(tmp_path / "real", COLOURS, 4, 1)
    generated = write_images(tmp_path / "out", ["green", "red"], 4, 2)
    named, left = (
        evaluate_folder(bundles["discriminator"], generated, real, features=features)
        for features in ("discriminator", None)
    )
    assert named.as_dict() == left.as_dict() and named.network == "discriminator"
    with pytest.raises(InputError, match="discriminator"):
        evaluate_folder(bundles["encoder"], generated, real, features="discriminator")


def test_a_damaged_discriminator_is_refused_and_not_replaced_by_the_encoder(tmp_path):
    real = write_images(tmp_path / "real", COLOURS, 4, 1)
    generated = write_images(tmp_path / "out", ["green", "red"], 4, 2)
    damaged = make_bundle(tmp_path / "model", True) / "discriminator.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"discriminator\.safetensors' is truncated"):
        evaluate_folder(tmp_path / "model", generated, real)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--features=none"], "features must be oracle, discriminator, lpips-alex,"),
        (["--features=oracle"], "The oracle judges RGB images of flora's categories alone"),
    ],
)
def test_features_that_cannot_judge_are_refused(tmp_path, bundles, capsys, words, complaint):
    real = write_images(tmp_path / "real", COLOURS, 2, 1)
    made = write_images(tmp_path / "made", COLOURS, 2, 1)
    given = ["evaluate", f"--model={bundles['discriminator']}", f"--generated={made}", f"--real={real}", *words]
    assert main(given) == 2
    assert complaint in capsys.readouterr().err
    given[2] = f"--generated={real}"
    assert main(given) == 2
    assert "are both" in capsys.readouterr().err


@pytest.mark.parametrize("poor", ["Generated", "Real"])
def test_single_images_are_refused_by_the_folder_that_has_them(tmp_path, bundles, poor):
    real = write_images(tmp_path / "real", COLOURS, 1 if poor == "Real" else 4, 1)
    generated = write_images(tmp_path / "out", ["green", "red"], 1 if poor == "Generated" else 4, 2)
    with pytest.raises(InputError, match=f"{poor} folder '.*/{'real' if poor == 'Real' else 'out'}' must have two"):
        evaluate_folder(bundles["discriminator"], generated, real)


@pytest.mark.parametrize("image", ["png", "jpg"])
def test_outputs_of_every_format_are_judged_alike(tmp_path, tiny_bundle, tiny_shots, image):
    pipeline, found = FewShotPipeline.from_bundle(tiny_bundle), {}
    for format in ("folder", "webdataset", *(("safetensors",) if image == "png" else ())):
        config = GenerateConfig(n=4, shard=3, format=format, image=image)
        generate(pipeline, tiny_shots, tmp_path / format, config)
        found[format] = evaluate_folder(tiny_bundle, tmp_path / format, tiny_shots)
    assert found["folder"].categories == ("lily", "rose") and found["folder"].n_images == 8
    assert all(one.as_dict() == found["folder"].as_dict() for one in found.values())


def test_what_another_model_drew_is_not_judged_in_silence(tmp_path, tiny_bundle, tiny_shots, bundles):
    generate(tiny_bundle, tiny_shots, tmp_path / "out", GenerateConfig(n=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error", SageFastWarning)
        evaluate_folder(tiny_bundle, tmp_path / "out", tiny_shots)
    for other, name in ((None, "comes with the package"), (bundles["discriminator"], str(bundles["discriminator"]))):
        with pytest.warns(SageFastWarning, match=f"drawn by another model than .*{re.escape(name)}"):
            evaluate_folder(other, tmp_path / "out", tiny_shots)


def test_a_report_of_what_is_no_folder_needs_a_place(tmp_path, tiny_bundle, tiny_shots, capsys):
    generate(tiny_bundle, tiny_shots, tmp_path / "out", GenerateConfig(n=2, format="webdataset"))
    words = ["evaluate", f"--model={tiny_bundle}", f"--generated={tmp_path / 'out' / 'shard-*.tar'}"]
    words.append(f"--real={tiny_shots}")
    assert main(words) == 2 and "--generated must be a folder, which gets the report" in capsys.readouterr().err
    assert main([*words, f"--out={tmp_path / 'report'}"]) == 0
    assert (tmp_path / "report" / "report.md").exists()


def test_images_in_the_wrong_folder_are_not_kept_and_lie_further_away(tmp_path, bundles):
    real = write_images(tmp_path / "real", COLOURS, 8, 1)
    right = write_images(tmp_path / "right", ["green", "red"], 6, 2)
    wrong = write_images(tmp_path / "wrong", ["green"], 6, 2)
    (write_images(tmp_path / "blue", ["blue"], 6, 2) / "blue").rename(wrong / "red")
    good, bad = (evaluate_folder(bundles["discriminator"], folder, real) for folder in (right, wrong))
    assert bad.retention_by_category == (1.0, 0.0)
    assert bad.frechet > 2 * good.frechet and bad.kernel > good.kernel


def test_one_real_category_leaves_retention_open(tmp_path, bundles):
    real, generated = (write_images(tmp_path / name, ["red"], 5, seed) for seed, name in enumerate(("real", "out")))
    got = evaluate_folder(bundles["encoder"], generated, real)
    assert got.retention is None and got.frechet >= 0
    assert "| generated | – |" in write_report(tmp_path / "report", got).read_text(encoding="utf-8")


def test_floras_categories_are_judged_by_the_oracle(tmp_path, bundles):
    class Oracle:
        factor_names, resolution = ("light",), 16

        def predict(self, images):  # green images are flora_201, all others flora_007
            return torch.where(images[:, 1].mean((1, 2)) > 0, 201, 7)

        def features(self, images):
            assert images.shape[1:] == (3, 16, 16)
            return images.mean((2, 3))

        def factors(self, images):
            return images.mean((1, 2, 3))[:, None]

    folders = []
    for seed, name in enumerate(("out", "real")):
        plain = write_images(tmp_path / f"plain_{name}", ["green", "red"], 5, seed)
        (tmp_path / name).mkdir()
        (plain / "red").rename(tmp_path / name / "flora_007")
        (plain / "green").rename(tmp_path / name / "flora_201")
        folders.append(tmp_path / name)
    got = evaluate_folder(bundles["encoder"], *folders, oracle=Oracle())
    assert got.network == "oracle" and got.retention == 1.0 and got.categories == ("flora_007", "flora_201")
    assert got.spreads.keys() == {"light"}


def test_a_generated_category_without_real_images_is_refused(tmp_path, bundles):
    real = write_images(tmp_path / "real", ["blue", "red"], 3)
    generated = write_images(tmp_path / "out", ["green"], 3)
    with pytest.raises(InputError, match="has no images of 'green'; add"):
        evaluate_folder(bundles["encoder"], generated, real)


def test_nearest_class_mean_is_scikit_learns_nearest_centroid():
    rng = torch.Generator().manual_seed(1)
    labels = torch.arange(40) % 4
    features = torch.randn(40, 5, generator=rng) + torch.randn(4, 5, generator=rng)[labels]
    means = torch.stack([features[labels == k].mean(0) for k in range(4)])
    other = torch.randn(30, 5, generator=rng)
    want = NearestCentroid().fit(features.numpy(), labels.numpy()).predict(other.numpy())
    assert nearest_class_mean(other, means).tolist() == want.tolist()


def test_leaving_an_image_out_of_its_mean_equals_refitting_without_it():
    rng = torch.Generator().manual_seed(2)
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3])  # category 3 has one image: without it there is none
    features = torch.randn(10, 3, generator=rng) * 0.8 + torch.randn(4, 3, generator=rng)[labels]
    means = torch.stack([features[labels == k].mean(0) for k in range(4)])
    got = nearest_class_mean(features, means, torch.bincount(labels), labels)
    for i in range(10):
        rest = torch.arange(10) != i
        refitted = NearestCentroid().fit(features[rest].numpy(), labels[rest].numpy())
        assert got[i] == refitted.predict(features[i : i + 1].numpy())[0]


def test_the_report_holds_every_number_and_says_what_each_means(tmp_path):
    rows = {"age": scores(retention=0.5), "sage": scores(kernel=math.nan)}
    text = write_report(tmp_path / "new" / "folder", rows).read_text(encoding="utf-8")
    for part in (
        "62.5 % (50.0 to 75.0)",
        "1.234",
        "-0.0012",
        "2.500 (80 %)",
        "50 %",
        "98.0 %",
        "| turn | 60 % | 60 % |",
    ):
        assert part in text
    for name in ("Category retention", "FD-oracle", "KD-oracle", "Diversity", "Spread"):
        assert f"- **{name}**: " in text
    content = json.loads((tmp_path / "new" / "folder" / "report.json").read_text())
    assert content["network"] == "oracle" and content["rows"]["sage"]["kernel"] is None
    assert content["rows"]["age"]["retention"] == 0.5 and content["rows"]["age"]["spread"] == 0.5


def test_a_report_without_factors_does_not_explain_their_spread(tmp_path):
    text = write_report(tmp_path, scores(spreads={})).read_text(encoding="utf-8")
    assert "Spread" not in text and "**Diversity**" in text


def test_rows_of_two_networks_make_no_table():
    with pytest.raises(InputError, match="one network"):
        table({"a": scores(), "b": scores(network="encoder")})
    with pytest.raises(InputError, match="one network"):
        table({})


def test_a_markdown_table_has_as_many_cells_in_every_line():
    lines = markdown_table(["", "x", "y"], [["a", "1", "2"], ["b", "3", "4"]]).splitlines()
    assert [line.count("|") for line in lines] == [4, 4, 4, 4]
    assert lines[1] == "| :-- | --: | --: |"


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be made"):
        write_report(tmp_path / "file" / "report", scores())


@pytest.mark.parametrize("ending", ["", ".md", ".json"])
def test_a_page_makes_its_folder_and_may_be_named_by_either_file(tmp_path, ending):
    assert write_page(tmp_path / "new" / f"v1.2{ending}", "text\n", {"a": 1}) == tmp_path / "new" / "v1.2.md"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["v1.2.json", "v1.2.md"]
