"""The inversion table: its numbers on made-up encoders, and the whole command on tiny models."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_model import tiny_codes, tiny_encoder, tiny_networks

from sage_fast.data.writers import save_png
from sage_fast.errors import InputError
from sage_fast.evaluation.inversion_table import InversionTableConfig, _rebuild, inversion_table, main
from sage_fast.evaluation.projecting import projecting
from sage_fast.models.encoder_kinds import KINDS
from sage_fast.models.perceptual import DiscriminatorFeatures
from sage_fast.models.weights import save_bundle
from sage_fast.pipeline import FewShotPipeline


class ColourJudge:
    """Category of flora from the mean colour."""

    factor_names = ()

    def predict(self, images):
        return 200 + (images.mean((1, 2, 3)) > 0).long()

    def features(self, images):
        return images.flatten(2)[:, :, ::9].flatten(1)

    def factors(self, images):
        return images.new_zeros(len(images), 0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A bundle of each kind on one generator."""
    root = tmp_path_factory.mktemp("models")
    generator, _, _ = tiny_networks()
    codes, directions = tiny_codes(generator.n_latent)
    for kind in KINDS:
        encoder = tiny_encoder(kind, generator)
        save_bundle(root / kind, generator=generator, encoder=encoder, directions=directions, codes=codes)
    return [root / kind for kind in KINDS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two categories of seven images each, dark and light."""
    root, rng = tmp_path_factory.mktemp("data"), torch.Generator().manual_seed(0)
    for name, base in (("dark", 40), ("light", 180)):
        (root / name).mkdir()
        for i in range(7):
            image = base + torch.randint(0, 40, (3, 8, 8), generator=rng)
            save_png(root / name / f"{i}.png", image.to(torch.uint8))
    return root


def test_optimisation_takes_its_feature_network_to_the_networks(models):
    pipeline, images = FewShotPipeline.from_bundle(models[0]), torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    features = DiscriminatorFeatures(tiny_networks()[2])
    pipeline.generator.double()  # stands in for another device, which the features must follow just so
    pipeline.encoder.double()
    found = projecting(pipeline, features, steps=1).encoder.invert(images, pipeline.generator)
    assert found.offsets.dtype == torch.float64 and next(features.parameters()).dtype == torch.float32


QUICK = {"n_train": 4, "n_test": 3, "n_edits": 2, "n_seeds": 2, "classifier_steps": 30, "classifier_width": 8}


def test_a_row_for_every_kind_and_for_optimisation(models, folder, tmp_path):
    lines = []
    config = InversionTableConfig(tuple(models), tmp_path / "t" / "table", folder, projection_steps=20, **QUICK)
    page = inversion_table(config, progress=lines.append)
    content = json.loads((tmp_path / "t" / "table.json").read_text())
    rows = {row["name"]: row for row in content["rows"]}
    assert list(rows) == ["real images", *KINDS, "optimisation from psp"] and len(lines) == 5
    assert rows["real images"]["accuracy"] > 0.9 and rows["real images"]["mse"] is None
    for kind in KINDS:
        row = rows[kind]
        assert row["kind"] == kind and row["mse"] > 0 and -1 <= row["ssim"] <= 1 and row["seconds"] > 0
        assert 0 <= row["edits"]["retention"] <= 1 and row["edits"]["n_images"] == 4
        assert row["perceptual"] is None and row["intra"] is None
        low, high = row["accuracy_interval"]
        assert 0 <= low <= row["accuracy"] <= high <= 1
    optimised = rows["optimisation from psp"]
    assert optimised["mse"] < rows["psp"]["mse"] and optimised["seconds"] > rows["psp"]["seconds"]
    text = page.read_text()
    assert text.count("\n| ") == 8 and "classifier of the real images" in text
    assert str(folder) not in text + json.dumps(content)


def test_reconstructions_are_those_of_the_pipeline(models):
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    for path in models:
        pipeline = FewShotPipeline.from_bundle(path)
        rebuilt, _ = _rebuild(pipeline, images, batch=2)
        assert (rebuilt - pipeline.prepare(images, "inversion").inverted).abs().max() < 0.01


def test_flora_is_drawn(models, tmp_path):
    config = InversionTableConfig(
        (models[0],), tmp_path / "table.md", n_categories=2, projection_steps=0, **QUICK | {"n_seeds": 1}
    )
    page = inversion_table(config, judge=ColourJudge())
    assert page == tmp_path / "table.md" and "word of the judge" in page.read_text()
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["real images", "psp"]


def test_two_of_a_kind_are_named_by_their_folders(models, folder, tmp_path):
    import shutil

    other = shutil.copytree(models[0], tmp_path / "other")
    config = InversionTableConfig(
        (models[0], other), tmp_path / "table", folder, projection_steps=0, **QUICK | {"n_seeds": 1}
    )
    rows = json.loads(inversion_table(config).with_suffix(".json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["real images", "psp (psp)", "psp (other)"]
    assert rows[1]["mse"] == rows[2]["mse"] and rows[1]["accuracy"] == rows[2]["accuracy"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"models": ()}, "at least one"),
        ({"n_test": 1}, "at least 2"),
        ({"n_shots": 9, "n_train": 4}, "at most n_train"),
    ],
)
def test_refuses_settings(setting, message, models):
    with pytest.raises(InputError, match=message):
        InversionTableConfig(**{"models": tuple(models)} | setting)


def test_the_command(models, folder, tmp_path, capsys):
    words = [f"--{key.replace('_', '-')}={value}" for key, value in (QUICK | {"n_seeds": 1}).items()]
    out = ["--out", str(tmp_path / "table"), "--projection-steps", "0", "--data", str(folder)]
    assert main(["--models", str(models[0]), *out, *words]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "table.md")
    assert main(["--models", str(tmp_path / "nothing"), *out]) == 2
    assert "does not exist" in capsys.readouterr().err
