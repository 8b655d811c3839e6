"""A folder projected to disk: what lies there afterwards, whatever interrupted it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_model import RESOLUTION

from sage_fast import cli, reconstruction
from sage_fast.data.images import load_image, to_float
from sage_fast.data.latent_table import LatentTable
from sage_fast.data.writers import read_manifest, save_png, to_uint8
from sage_fast.errors import InputError
from sage_fast.inversion import ProjectionConfig
from sage_fast.models.stylegan2 import Generator
from sage_fast.models.weights import load_bundle, save_bundle
from sage_fast.reconstruction import InvertConfig, invert

SHIPPED = Path(reconstruction.__file__).parent / "model"
SHORT = ProjectionConfig(steps=4)
NAMES = ["lily/0", "lily/1", "lily/2", "rose/0", "rose/1"]


@pytest.fixture
def shots(tiny_shots, tmp_path):
    """A copy to change: ``lily`` with three images, ``rose`` with two."""
    return Path(shutil.copytree(tiny_shots, tmp_path / "given"))


@pytest.fixture
def masks(tmp_path):
    for name in NAMES:
        mask = torch.full((1, RESOLUTION, RESOLUTION), 255, dtype=torch.uint8)
        mask[:, :3] = 0
        (tmp_path / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
        save_png(tmp_path / "masks" / f"{name}.png", mask)
    return tmp_path / "masks"


def results(folder):
    """Images, latents and codes, byte by byte; and the manifest without its times."""
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*") if p.suffix != ".jsonl"}
    files = {name: data for name, data in files.items() if not name.endswith(".json")}
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in read_manifest(folder / "manifest.jsonl")]
    return files, lines


def one_sentence(error):
    text = str(error.value)
    return "\n" not in text and text.endswith(".") and ". " not in text


def test_the_folder_holds_images_latents_codes_manifest_and_config(tiny_bundle, tiny_shots, tmp_path):
    out = tmp_path / "out"
    summary = invert(tiny_bundle, tiny_shots, out, InvertConfig(batch=2), SHORT)
    assert (summary.n_new, summary.n_kept) == (5, 0) and str(out) in str(summary)
    bundle = load_bundle(tiny_bundle)
    G = bundle.generator
    lines = read_manifest(out / "manifest.jsonl")
    assert [line["file"] for line in lines] == [f"{name}.png" for name in NAMES]
    codes = LatentTable.load(out / "codes.safetensors")
    assert codes.categories == ["lily", "rose"] and codes.labels.tolist() == [0, 0, 0, 1, 1]
    for line, code in zip(lines, codes.w_plus, strict=True):
        w_plus = load_file(out / line["latent"])["w_plus"]
        torch.testing.assert_close(w_plus - G.latent_avg, code)
        with torch.no_grad():
            drawn = G(w_plus[None], noise=bundle.noise).clamp(-1, 1)
        image = torch.from_numpy(np.asarray(Image.open(out / line["file"])).copy()).permute(2, 0, 1)
        assert (image.int() - to_uint8(drawn)[0].int()).abs().max() <= 1
        error = (drawn[0] - to_float(load_image(tiny_shots / line["source"], RESOLUTION))).square().mean()
        assert line["mse"] == pytest.approx(error.item(), rel=1e-3)
        assert line["steps"] == 4 and line["evaluations"] >= 5 and line["seconds"] > 0 and line["loss"] > 0
    config = json.loads((out / "config.json").read_text())
    assert config["steps"] == 4 and config["noise"] == "none"
    assert not list(out.rglob("*.tmp"))
    assert summary.loss == pytest.approx(sum(line["loss"] for line in lines) / 5)


def test_a_flat_folder_and_a_published_generator(tiny_shots, tmp_path):
    from tiny_model import tiny_networks

    state = tiny_networks()[0].state_dict()
    torch.save({"g_ema": state, "latent_avg": state["latent_avg"]}, tmp_path / "g.pt")
    invert(tmp_path / "g.pt", tiny_shots / "lily", tmp_path / "out", projection=SHORT)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == ["0.png", "1.png", "2.png"]
    assert (tmp_path / "out" / "latents" / "2.safetensors").is_file()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["noise"] == "const"


def test_an_encoder_can_come_from_elsewhere(tiny_bundle, tiny_shots, tmp_path):
    from tiny_model import tiny_networks

    torch.save({"g_ema": tiny_networks()[0].state_dict()}, tmp_path / "g.pt")
    config = ProjectionConfig(steps=4, noise="none")
    invert(tiny_bundle, tiny_shots, tmp_path / "own", projection=config)
    invert(tmp_path / "g.pt", tiny_shots, tmp_path / "given", projection=config, encoder=tiny_bundle)
    own, given = (LatentTable.load(tmp_path / n / "codes.safetensors").w_plus for n in ("own", "given"))
    torch.testing.assert_close(own, given)


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4])
def test_killed_and_resumed_is_the_same(tiny_bundle, tiny_shots, tmp_path, monkeypatch, stop_at):
    """Killed before any file of a batch, and in the middle of writing one."""
    config = InvertConfig(batch=2)
    invert(tiny_bundle, tiny_shots, tmp_path / "whole", config, SHORT)
    write, calls = reconstruction._write, []

    def killed(*args):
        calls.append(args)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(reconstruction, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            invert(tiny_bundle, tiny_shots, tmp_path / "out", config, SHORT)
    assert len(read_manifest(tmp_path / "out" / "manifest.jsonl")) == stop_at - 1
    summary = invert(tiny_bundle, tiny_shots, tmp_path / "out", InvertConfig(batch=2, resume=True), SHORT)
    assert summary.n_kept == 2 * ((stop_at - 1) // 2) and summary.n_new == 5 - summary.n_kept
    assert results(tmp_path / "out") == results(tmp_path / "whole")


def test_what_is_done_is_not_done_again(tiny_bundle, tiny_shots, tmp_path, monkeypatch):
    invert(tiny_bundle, tiny_shots, tmp_path / "out", projection=SHORT)
    before = results(tmp_path / "out")
    monkeypatch.setattr(reconstruction, "project", None)
    summary = invert(tiny_bundle, tiny_shots, tmp_path / "out", InvertConfig(resume=True), SHORT)
    assert (summary.n_new, summary.n_kept) == (0, 5)
    assert results(tmp_path / "out") == before


def test_a_lost_file_is_made_again(tiny_bundle, tiny_shots, tmp_path):
    invert(tiny_bundle, tiny_shots, tmp_path / "out", projection=SHORT)
    before = results(tmp_path / "out")
    (tmp_path / "out" / "lily" / "1.png").unlink()
    (tmp_path / "out" / "latents" / "rose" / "0.safetensors").write_bytes(b"")
    invert(tiny_bundle, tiny_shots, tmp_path / "out", InvertConfig(resume=True), SHORT)
    assert results(tmp_path / "out") == before


def test_other_settings_or_images_are_not_resumed(tiny_bundle, shots, tmp_path):
    out = tmp_path / "out"
    invert(tiny_bundle, shots, out, projection=SHORT)
    with pytest.raises(InputError, match="not empty"):
        invert(tiny_bundle, shots, out, projection=SHORT)
    for config, projection in (
        (InvertConfig(resume=True), ProjectionConfig(steps=5)),
        (InvertConfig(resume=True, batch=3), SHORT),
    ):
        with pytest.raises(InputError, match=r"other settings \((steps was 4, is 5|batch was 8, is 3)\)") as error:
            invert(tiny_bundle, shots, out, config, projection)
        assert one_sentence(error)
    save_png(shots / "rose" / "2.png", torch.zeros(3, 8, 8, dtype=torch.uint8))
    with pytest.raises(InputError, match="other settings"):
        invert(tiny_bundle, shots, out, InvertConfig(resume=True), SHORT)
    assert invert(tiny_bundle, shots, out, InvertConfig(overwrite=True), SHORT).n_new == 6


def test_what_a_mask_hides_changes_nothing(tiny_bundle, shots, masks, tmp_path):
    invert(tiny_bundle, shots, tmp_path / "first", projection=SHORT, mask_dir=masks)
    for name in NAMES[3:4]:
        pixels = np.asarray(Image.open(shots / f"{name}.png")).copy()
        pixels[:3] = 255 - pixels[:3]
        Image.fromarray(pixels).save(shots / f"{name}.png")
    invert(tiny_bundle, shots, tmp_path / "second", projection=SHORT, mask_dir=masks)
    first, second = (results(tmp_path / name)[0] for name in ("first", "second"))
    assert first == second


def test_masks_that_do_not_fit_are_refused_before_anything_is_written(tiny_bundle, shots, masks, tmp_path):
    def refused(match):
        with pytest.raises(InputError, match=match) as error:
            invert(tiny_bundle, shots, tmp_path / "out", projection=SHORT, mask_dir=masks)
        assert one_sentence(error) and not (tmp_path / "out").exists()

    save_png(masks / "lily" / "1.png", torch.zeros(1, 8, 8, dtype=torch.uint8))
    refused("is black")
    (masks / "lily" / "1.png").unlink()
    refused("no mask for image 'lily/1'")


def test_images_that_would_share_a_name_are_refused(tiny_bundle, shots, tmp_path):
    Image.open(shots / "lily" / "0.png").save(shots / "lily" / "0.bmp")
    with pytest.raises(InputError, match="lily/0.bmp' and 'lily/0.png'") as error:
        invert(tiny_bundle, shots, tmp_path / "out", projection=SHORT)
    assert one_sentence(error) and not (tmp_path / "out").exists()


def test_settings_without_effect_are_refused_before_anything_is_written(tiny_bundle, shots, tmp_path):
    with pytest.raises(InputError, match="perceptual_weight = 2.0 has no effect without a perceptual network"):
        invert(tiny_bundle, shots, tmp_path / "out", projection=ProjectionConfig(perceptual_weight=2.0))
    with pytest.raises(InputError, match="n_candidates has no effect where an encoder"):
        invert(tiny_bundle, shots, tmp_path / "out", projection=ProjectionConfig(n_candidates=2))
    assert not (tmp_path / "out").exists()


def test_settings_that_were_not_given_are_recorded(tiny_bundle, tiny_shots, tmp_path):
    invert(tiny_bundle, tiny_shots, tmp_path / "out", projection=SHORT)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [settings[name] for name in ("history", "perceptual_weight", "noise_weight")] == [10, 1.0, 1e5]


def test_folders_must_not_overlap(tiny_bundle, shots, masks):
    with pytest.raises(InputError, match="the images in"):
        invert(tiny_bundle, shots, shots / "out", projection=SHORT)
    with pytest.raises(InputError, match="the masks in"):
        invert(tiny_bundle, shots, masks, projection=SHORT, mask_dir=masks)


def test_a_bundle_of_networks_alone_will_do(tiny_bundle, tiny_shots, tmp_path):
    parts = load_bundle(tiny_bundle)
    alone = save_bundle(tmp_path / "b", generator=parts.generator, encoder=parts.encoder, noise=parts.noise)
    one, other = (
        invert(model, tiny_shots, tmp_path / name, InvertConfig(), SHORT)
        for name, model in (("x", alone), ("y", tiny_bundle))
    )
    assert results(tmp_path / "x") == results(tmp_path / "y") and one.loss == other.loss


def test_an_encoder_of_another_generator_is_refused_before_anything_is_written(tiny_shots, tmp_path, capsys):
    G = Generator(RESOLUTION, 32, n_mapping=1, channels=[4, 4])
    weights = {name: value for name, value in G.state_dict().items() if name != "latent_avg"}
    torch.save({"g_ema": weights, "latent_avg": G.latent_avg}, tmp_path / "generator.pt")
    given = dict(model=tmp_path / "generator.pt", encoder=SHIPPED, images=tiny_shots, out=tmp_path / "out")
    assert cli.main(["invert", *(f"--{name}={value}" for name, value in given.items())]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "the encoder gives latents [8, 64]" in message and "takes [4, 32]" in message
    assert not (tmp_path / "out").exists()


def test_perceptual_network_of_the_model(tiny_bundle, tiny_shots, tmp_path):
    invert(tiny_bundle, tiny_shots, tmp_path / "out", InvertConfig(perceptual="discriminator"), SHORT)
    plain = invert(tiny_bundle, tiny_shots, tmp_path / "plain", projection=SHORT)
    lines = read_manifest(tmp_path / "out" / "manifest.jsonl")
    assert sum(line["loss"] for line in lines) / 5 != pytest.approx(plain.loss)


def test_optimised_noise_is_kept_with_the_latent(tiny_bundle, tiny_shots, tmp_path):
    config = ProjectionConfig(steps=3, noise="optimize")
    invert(tiny_bundle, tiny_shots, tmp_path / "out", projection=config)
    stored = load_file(tmp_path / "out" / "latents" / "lily" / "0.safetensors")
    assert set(stored) == {"w_plus", "noise_0", "noise_1", "noise_2"} and stored["noise_2"].shape == (1, 8, 8)


def test_progress_rises_to_the_whole(tiny_bundle, tiny_shots, tmp_path):
    seen = []
    invert(
        tiny_bundle,
        tiny_shots,
        tmp_path / "out",
        InvertConfig(batch=2),
        SHORT,
        progress=lambda *now: seen.append(now),
    )
    assert seen[-1] == (20, 20) and seen == sorted(seen)


def test_settings_are_checked():
    for settings in (dict(batch=0), dict(resume=True, overwrite=True)):
        with pytest.raises(InputError) as error:
            InvertConfig(**settings)
        assert one_sentence(error)
