"""A run of train-gan alone is a model: for every reader of a generator, for conversion, and to begin from."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from sage_fast import cli
from sage_fast.conversion.describing import describe
from sage_fast.errors import InputError
from sage_fast.models.weights import load_discriminator, load_encoder, load_generator
from sage_fast.training.gan import GANConfig, train_gan

TINY = GANConfig(style_dim=8, n_mapping=2, channel_base=64, channel_max=8, mbstd_group=2, batch=4, resolution=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run's folder, and the networks that training gave back."""
    folder = tmp_path_factory.mktemp("run")
    pixels = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    config = GANConfig(**{**vars(TINY), "total_kimg": 0.02, "save_every": 2, "grid_every": 100})
    return folder, *train_gan(config, pixels, folder)


def test_its_folder_and_its_checkpoint_load(run):
    folder, G, D = run
    for source in (folder, folder / "checkpoints" / "gan.pt"):
        for network, loaded in ((G, load_generator(source)), (D, load_discriminator(source))):
            ours, theirs = network.state_dict(), loaded.state_dict()
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(InputError, match="encoder"):
        load_encoder(folder)


def test_inspect_and_convert(run, tmp_path):
    folder, G, _ = run
    report = describe(folder)
    assert report["format"] == "sage_fast train-gan checkpoint" and report["latent_avg"] == "stored"
    assert report["loads"] == ["generator", "discriminator"] and "rosinality" in report["converts to"]
    json.dumps(report)
    for to, name in (("rosinality", "r.pt"), ("sage_fast", "s.safetensors"), ("nvlabs", "n.safetensors")):
        assert cli.main(["convert", str(folder), str(tmp_path / name), "--to", to]) == 0
        w = G.mapping(torch.randn(2, 8, generator=torch.Generator().manual_seed(2)))
        again = load_generator(tmp_path / name)
        with torch.no_grad():
            assert torch.equal(again.synthesis(w, noise="const"), G.eval().synthesis(w, noise="const"))
    with pytest.raises(InputError, match="another place than what is read"):
        from sage_fast.conversion.writing import convert

        convert(folder, folder / "checkpoints" / "gan.pt", "rosinality", overwrite=True)


def test_another_run_begins_from_it(run, tmp_path, capsys):
    folder, *_ = run
    assert load_generator(folder).resolution == 8
    pixels = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
    config = GANConfig(**{**vars(TINY), "total_kimg": 0.004, "transfer_from": str(folder)})
    train_gan(config, pixels, tmp_path / "second")
    assert "G took 100 % of its weights; D took 100 %" in capsys.readouterr().out


def test_once_the_encoder_is_trained_the_run_is_to_be_finished(run, tmp_path):
    """Its generator may have been tuned since."""
    folder = tmp_path / "copy"
    shutil.copytree(run[0], folder)
    (folder / "checkpoints" / "encoder.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"has no bundle.json; finish its training, train-dictionary last"):
        load_generator(folder)


def test_damage_is_one_sentence(run, tmp_path):
    folder, *_ = run
    content = torch.load(folder / "checkpoints" / "gan.pt", weights_only=False)
    for change, message in (
        (lambda c: c["architecture"].update(resolution=16), "does not hold the weights"),
        (lambda c: c["architecture"].update(colour=3), "does not hold the weights of a StyleGAN2 generator"),
        (lambda c: c.update(average={"weight": 3}), "is no network"),
    ):
        damaged = {**content, "architecture": dict(content["architecture"])}
        change(damaged)
        torch.save(damaged, tmp_path / "gan.pt")
        with pytest.raises(InputError, match=message):
            load_generator(tmp_path / "gan.pt")
