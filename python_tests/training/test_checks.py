"""What a later stage would refuse is said before the first one begins, and the corrected command runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sage_fast import cli
from sage_fast.data.writers import save_png
from sage_fast.errors import InputError
from sage_fast.models.identity import ArcFace
from sage_fast.models.weights import load_bundle, load_discriminator
from sage_fast.training import checks, stages
from sage_fast.training.encoder import EncoderConfig
from sage_fast.training.gan import GANConfig, new_networks
from sage_fast.training.ranks import Ranks

GAN = ["--style-dim=8", "--n-mapping=2", "--channel-base=64", "--channel-max=8", "--total-kimg=0.016", "--batch=4"]
ENCODER = ["--total-steps=2", "--batch=4", "--channel-base=64", "--channel-max=16", "--head-width=4"]
DICTIONARY = ["--total-steps=2", "--batch=4", "--n-directions=6"]
PARTS = {"gan": GAN, "encoder": ENCODER, "dictionary": DICTIONARY}
ALL = [word.replace("--", f"--{part}.", 1) for part, words in PARTS.items() for word in words]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("seen"), torch.Generator().manual_seed(0)
    for label in ("a", "b"):
        (folder / label).mkdir()
        for i in range(8):
            save_png(
                folder / label / f"{i}.png",
                torch.randint(0, 256, (3, 8, 8), generator=rng).to(torch.uint8),
                durable=False,
            )
    return folder


@pytest.fixture(scope="module")
def singly(seen, tmp_path_factory):
    """A run of the four commands, whose bundle has no discriminator."""
    out = tmp_path_factory.mktemp("run") / "run"
    words = [f"--data={seen}", f"--out={out}"]
    assert cli.main(["train-gan", *words, "--resolution=8", *GAN]) == 0
    assert cli.main(["train-encoder", *words, *ENCODER]) == 0
    assert cli.main(["embed", *words]) == 0
    assert cli.main(["train-dictionary", *words, *DICTIONARY]) == 0
    return out


@pytest.fixture
def refused(capsys):
    def run(argv: list[str], *named: str) -> None:
        capsys.readouterr()
        assert cli.main(argv) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if "reading" not in line]
        assert len(said) == 1 and all(name in said[0] for name in named), said

    return run


def visible(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if not path.name.startswith(".")] if folder.exists() else []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--encoder.perceptual=nofile"], "nofile"),
        (["--encoder.identity=nofile"], "nofile"),
        (["--encoder.kind=hyperstyle", "--encoder.hyperstyle.w-encoder=nofile"], "nofile"),
        (["--gan.transfer-from=nofile"], "nofile"),
        (["--gan.conditional", "--encoder.tune-generator"], "without labels"),
        (["--gan.conditional", "--preset-encoder=small"], "--encoder.no-tune-generator"),
        (["--gan.conditional", "--encoder.kind=e4e"], "encoder.kind 'psp'"),
        (["--gan.graphs"], "graphs needs a GPU"),
        (["--gan.batch=64"], "one batch of 64 images, got 16"),
        (["--encoder.perceptual-weight=0", "--encoder.perceptual=nofile"], "nofile"),  # the dictionary reads it
    ],
)
def test_train_refuses_before_it_trains(seen, tmp_path, refused, monkeypatch, words, named):
    monkeypatch.chdir(tmp_path)
    refused(["train", f"--data={seen}", "--out=run", "--resolution=8", *ALL, *words], named)
    assert not Path("run").exists()


@pytest.mark.parametrize("part", ["gan", "encoder", "dictionary"])
def test_tensorboard_that_is_not_there_is_missed_first(seen, tmp_path, refused, monkeypatch, part):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    words = ["train", f"--data={seen}", f"--out={tmp_path / 'run'}", "--resolution=8", *ALL]
    refused([*words, f"--{part}.tensorboard"], "sage_fast[logs]")
    assert not (tmp_path / "run").exists()


def test_an_old_run_is_not_emptied_for_settings_that_cannot_be_used(seen, singly, tmp_path, refused):
    before = sorted(visible(singly))
    for words, named in (
        (["train", *ALL, "--resolution=8", "--encoder.identity=nofile"], "nofile"),
        (["train-gan", *GAN, "--resolution=8", "--transfer-from=nofile"], "nofile"),
        (["train-encoder", *ENCODER, f"--generator={singly}"], "holds the model"),
    ):
        refused([*words, f"--data={seen}", f"--out={singly}", "--overwrite"], named)
    assert sorted(visible(singly)) == before


def test_the_corrected_command_runs_where_the_first_was_refused(seen, singly, tmp_path, refused, monkeypatch):
    words = [f"--data={seen}", f"--out={tmp_path / 'gan'}", "--resolution=8", *GAN]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        refused(["train-gan", *words, "--tensorboard"], "sage_fast[logs]")
    assert cli.main(["train-gan", *words]) == 0
    words = [f"--data={seen}", f"--out={tmp_path / 'run'}", f"--generator={singly}", *ENCODER]
    refused(["train-encoder", *words, "--perceptual=nofile"], "nofile")
    refused(["train-encoder", *words, "--batch=4", "--kind=hyperstyle", "--hyperstyle.w-encoder=nofile"], "nofile")
    assert visible(tmp_path / "run") == []
    assert cli.main(["train-encoder", *words, "--perceptual=none"]) == 0


def test_a_stage_that_names_a_missing_file_leaves_its_run_as_it_was(seen, singly, refused):
    before = {path: path.read_bytes() for path in singly.rglob("*") if path.is_file()}
    refused(["train-encoder", f"--data={seen}", f"--out={singly}", "--resume", *ENCODER, "--identity=nofile"], "nofile")
    assert {path: path.read_bytes() for path in singly.rglob("*") if path.is_file()} == before


def test_a_run_lends_its_discriminator_with_its_generator(seen, singly, tmp_path, refused, tiny_bundle):
    with pytest.raises(InputError, match=r"has no discriminator.safetensors"):
        load_discriminator(singly)
    out = tmp_path / "run"
    words = [f"--data={seen}", f"--out={out}"]
    assert cli.main(["train-encoder", *words, *ENCODER, f"--generator={singly}"]) == 0  # features of the discriminator
    theirs = stages._load_trained(singly, "embed").discriminator.state_dict()
    ours = stages._load_trained(out, "embed").discriminator.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    alone = tmp_path / "alone.safetensors"
    assert cli.main(["convert", str(singly), str(alone)]) == 0
    words = [f"--data={seen}", f"--out={tmp_path / 'other'}", *ENCODER, f"--generator={alone}"]
    refused(["train-encoder", *words], "--perceptual FILE", "'none'")
    refused(["train-encoder", *words, "--perceptual=none", "--tune-generator"], "leave tune_generator out")
    assert visible(tmp_path / "other") == []


def test_train_dictionary_keeps_the_discriminator_when_asked(seen, singly, tmp_path, refused, capsys):
    words = [f"--data={seen}", f"--out={singly}"]
    assert cli.main(["train-dictionary", *words, *DICTIONARY, "--resume", "--bundle.discriminator"]) == 0
    kept = load_discriminator(singly).state_dict()
    trained = stages._load_trained(singly, "embed").discriminator.state_dict()
    assert all(torch.equal(kept[name], trained[name]) for name in trained)
    words_of_quality = [f"--model={singly}", f"--real={seen}", "--features=discriminator", "-n", "16"]
    assert cli.main(["quality", *words_of_quality]) == 0 and "fd_discriminator" in capsys.readouterr().out
    assert cli.main(["train-dictionary", *words, *DICTIONARY, "--resume"]) == 0  # as it was
    assert load_bundle(singly).generator.resolution == 8

    bare = tmp_path / "bare"
    assert cli.main(["convert", str(singly), str(tmp_path / "g.safetensors")]) == 0
    begin = ["train-encoder", f"--data={seen}", f"--out={bare}", f"--generator={tmp_path / 'g.safetensors'}"]
    assert cli.main([*begin, "--perceptual=none", *ENCODER]) == 0
    refused(
        ["train-dictionary", f"--data={seen}", f"--out={bare}", *DICTIONARY, "--bundle.discriminator"], "came without"
    )


def test_an_arcface_needs_colours(tmp_path):
    save_file(ArcFace().state_dict(), tmp_path / "arcface.safetensors")
    G, D = new_networks(GANConfig(8, 1, style_dim=8, n_mapping=1, channel_base=32), 0, "cpu")
    config = EncoderConfig(identity=str(tmp_path / "arcface.safetensors"), channel_base=32)
    with pytest.raises(InputError, match="is an ArcFace, for images of 3 channels, got a generator of 1; give another"):
        checks.check_encoder(config, G, D, Ranks(torch.device("cpu")))


def test_e4e_needs_an_unconditional_generator():
    G, D = new_networks(GANConfig(resolution=8, style_dim=8, n_mapping=2, channel_base=64, channel_max=8), 2, "cpu")
    with pytest.raises(InputError, match="unconditional generator"):
        checks.check_encoder(EncoderConfig(kind="e4e"), G, D, Ranks("cpu"))
