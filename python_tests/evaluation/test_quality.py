"""Quality of a generator: against the functions it is made of, torchmetrics where it is there, and what must not change."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.linalg import sqrtm
from tiny_model import RESOLUTION, STYLE_DIM, tiny_networks

from sage_fast.cli import main
from sage_fast.data.flora import render
from sage_fast.data.folders import ImageSet, read_images, scan_image_folder
from sage_fast.data.writers import save_png
from sage_fast.errors import InputError
from sage_fast.evaluation.fid import kernel_distance
from sage_fast.evaluation.oracle import Oracle
from sage_fast.evaluation.precision_recall import precision_recall
from sage_fast.evaluation.protocol import as_written
from sage_fast.evaluation.quality import (
    Quality,
    QualityConfig,
    image_features,
    load_features,
    measure_folder,
    watched,
)
from sage_fast.models.perceptual import DiscriminatorFeatures, SqueezeFeatures
from sage_fast.models.stylegan2 import Discriminator, Generator
from sage_fast.training import gan, stages

GENERATOR, _, DISCRIMINATOR = tiny_networks()
CONFIG = QualityConfig(n_images=96, batch=32)


@pytest.fixture(scope="module")
def network():
    return DiscriminatorFeatures(DISCRIMINATOR)


@pytest.fixture(scope="module")
def reals():
    ids, numbers = np.arange(80) % 40, np.arange(80)
    return render(ids, numbers, RESOLUTION)[0]


@pytest.fixture(scope="module")
def generated():
    quality = Quality(CONFIG, torch.zeros(8, 3, RESOLUTION, RESOLUTION), DiscriminatorFeatures(DISCRIMINATOR))
    return torch.cat(list(quality.generate(GENERATOR)))


def test_the_scores_are_those_of_the_features(network, reals, generated):
    scores = Quality(CONFIG, reals, network)(GENERATOR)
    a, b = image_features(network, as_written(generated)).double(), image_features(network, as_written(reals)).double()
    root = np.real(sqrtm(np.cov(a.numpy(), rowvar=False) @ np.cov(b.numpy(), rowvar=False)))
    difference = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * np.trace(root)
    precision, recall = precision_recall(b, a, 3)
    assert list(scores) == ["fd_discriminator", "kd_discriminator", "precision_discriminator", "recall_discriminator"]
    assert scores["fd_discriminator"] == pytest.approx(float(difference), rel=1e-5)
    assert scores["kd_discriminator"] == pytest.approx(kernel_distance(a, b), rel=1e-9)
    assert (scores["precision_discriminator"], scores["recall_discriminator"]) == (precision, recall)


def test_frechet_and_kernel_distance_are_those_of_torchmetrics(network, reals, generated):
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed (extra 'metrics')")
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    class Pooled(torch.nn.Module):
        num_features = DISCRIMINATOR.channels[0]

        def forward(self, images):
            return image_features(network, images)

    fd = FrechetInceptionDistance(feature=Pooled(), input_img_size=(3, RESOLUTION, RESOLUTION)).set_dtype(torch.float64)
    kd = KernelInceptionDistance(feature=Pooled(), subsets=1, subset_size=80)
    for images, real in ((as_written(reals), True), (as_written(generated)[:80], False)):
        fd.update(images, real=real)
        kd.update(images, real=real)
    scores = Quality(QualityConfig(n_images=80, batch=32), reals, network)(GENERATOR)
    assert scores["fd_discriminator"] == pytest.approx(float(fd.compute()), rel=1e-4)
    assert scores["kd_discriminator"] == pytest.approx(float(kd.compute()[0]), rel=1e-3)


def test_a_measurement_repeats_and_does_not_depend_on_the_batch(network, reals):
    quality = Quality(CONFIG, reals, network)
    first = quality(GENERATOR)
    assert quality(GENERATOR) == first
    others = Quality(QualityConfig(n_images=96, batch=7), reals, network)(GENERATOR)
    assert others == pytest.approx(first, rel=1e-4)
    assert Quality(QualityConfig(n_images=96, seed=1), reals, network)(GENERATOR) != first


def test_a_measurement_leaves_random_state_mode_and_gradients_alone(network, reals):
    quality = Quality(CONFIG, reals, network)
    generator = tiny_networks()[0].train().requires_grad_(True)
    before = torch.get_rng_state()
    quality(generator)
    assert torch.equal(torch.get_rng_state(), before)
    assert generator.training and all(p.requires_grad and p.grad is None for p in generator.parameters())


def test_noise_is_a_setting(network, reals, generated):
    images = {
        noise: next(Quality(QualityConfig(n_images=8, noise=noise), reals, network).generate(GENERATOR))
        for noise in ("random", "const", "none")
    }
    assert torch.equal(images["random"], generated[:8])
    noisy = tiny_networks()[0]
    with torch.no_grad():
        noisy.conv1.noise.weight.fill_(1)
    parts = [
        next(Quality(QualityConfig(n_images=8, noise=n), reals, network).generate(noisy)) for n in ("random", "const")
    ]
    assert (parts[0] - parts[1]).abs().max() > 0.01


def test_reals_in_place_of_generated_images_score_better_than_a_generator_without_training(network, reals):
    quality = Quality(CONFIG, reals, network)
    others = render(np.arange(96) % 40, np.arange(1000, 1096), RESOLUTION)[0]
    hoped, got = quality.of_images(others), quality(GENERATOR)
    assert hoped["fd_discriminator"] < 0.3 * got["fd_discriminator"]
    assert hoped["kd_discriminator"] < 0.3 * got["kd_discriminator"]
    assert hoped["recall_discriminator"] > got["recall_discriminator"]
    assert quality.of_images(reals)["fd_discriminator"] == pytest.approx(0, abs=1e-6)


def test_of_more_images_as_many_as_are_generated_are_measured_from_all_categories(network, reals):
    quality = Quality(CONFIG, reals, network)
    by_category = render(np.arange(960) // 24, 1000 + np.arange(960) % 24, RESOLUTION)[0]
    assert quality.of_images(by_category) == quality.of_images(by_category[::10])
    assert (
        quality.of_images(by_category)["fd_discriminator"] < quality.of_images(by_category[:96])["fd_discriminator"] / 2
    )


def test_features_of_the_reals_are_made_once(reals):
    network = DiscriminatorFeatures(DISCRIMINATOR)
    seen = []
    network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    quality = Quality(CONFIG, reals, network)
    assert sum(seen) == len(reals)
    quality(GENERATOR)
    quality(GENERATOR)
    assert sum(seen) == len(reals) + 2 * CONFIG.n_images


def test_the_name_is_the_networks(reals):
    config = QualityConfig(n_images=16, batch=16)
    squeeze = Quality(config, reals[:16], SqueezeFeatures())(GENERATOR)
    assert list(squeeze)[0] == "fd_squeezenet1_1"
    big = Generator(16, STYLE_DIM, n_mapping=1, channel_base=64, channel_max=8)
    images = render(np.arange(16), np.arange(16), 16)[0]
    assert list(Quality(config, images, Oracle(16, 4).eval())(big))[0] == "fd_oracle"
    assert list(Quality(config, images, DiscriminatorFeatures(Discriminator(16, channel_max=8)))(big))[0] == (
        "fd_discriminator"
    )


def test_classes_come_as_often_as_among_the_reals(network, reals):
    generator = Generator(RESOLUTION, STYLE_DIM, n_mapping=1, channel_base=64, channel_max=8, c_dim=3)
    asked = []
    generator.style.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[1].argmax(1)))
    labels = torch.tensor([0] * 20 + [2] * 60)
    list(Quality(CONFIG, reals, network, labels).generate(generator))
    assert torch.cat(asked).bincount(minlength=3).tolist() == [24, 0, 72]
    asked.clear()
    list(Quality(CONFIG, reals, network).generate(generator))
    assert torch.cat(asked).bincount().tolist() == [32, 32, 32]


def test_kernel_distance_of_subsets_is_near_that_of_all_pairs(network, reals):
    one = Quality(CONFIG, reals, network)(GENERATOR)["kd_discriminator"]
    config = QualityConfig(n_images=96, batch=32, subset_size=40, n_subsets=200)
    assert Quality(config, reals, network)(GENERATOR)["kd_discriminator"] == pytest.approx(one, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_images": 4}, "n_images greater than neighbours"),
        ({"batch": 0}, "batch"),
        ({"noise": "much"}, "noise must be 'random', 'const' or 'none'"),
        ({"n_images": 50, "subset_size": 51}, "subset_size must be 2 to n_images 50"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(InputError, match=message):
        QualityConfig(**settings)


def test_reals_and_labels_are_checked(network, reals):
    with pytest.raises(InputError, match=r"reals must be more than 4 images .* got \[4, 3, 8, 8\]; hold out more"):
        Quality(CONFIG, reals[:4], network)
    with pytest.raises(InputError, match=r"labels must be int64 \[80\]"):
        Quality(CONFIG, reals, network, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(InputError, match="at most the 80 held-out images"):
        Quality(QualityConfig(n_images=96, subset_size=90), reals, network)
    broken = tiny_networks()[0]
    with torch.no_grad():
        broken.to_rgb1.bias.fill_(float("nan"))
    with pytest.raises(InputError):
        Quality(CONFIG, reals, network)(broken)


def test_the_network_is_named_by_a_word_or_a_file(tmp_path):
    assert isinstance(load_features("oracle"), Oracle)
    assert isinstance(load_features("discriminator", lambda: DISCRIMINATOR), DiscriminatorFeatures)
    save_file(SqueezeFeatures().state_dict(), tmp_path / "squeeze.safetensors")
    assert load_features(tmp_path / "squeeze.safetensors").name == "squeezenet1_1"
    for word in ("none", "discriminator", str(tmp_path / "absent.pt")):  # there is no discriminator to judge by
        with pytest.raises(
            InputError, match=f"features must be oracle, lpips-alex, .* file that is there, got '{word}'"
        ):
            load_features(word)
    with pytest.raises(InputError, match="features must be oracle, discriminator, lpips-alex, .* got 'none'"):
        load_features("none", lambda: DISCRIMINATOR)


def test_training_is_not_measured_by_its_own_discriminator(reals):
    images = ImageSet(reals, torch.zeros(len(reals), dtype=torch.int64), ["a"], [str(i) for i in range(len(reals))], [])
    with pytest.raises(InputError, match="measure must be oracle, lpips-alex, .* got 'discriminator'"):
        watched(images, "discriminator")


@pytest.fixture(scope="module")
def folder(reals, tmp_path_factory):
    """The reals as two categories of an ImageFolder."""
    root = tmp_path_factory.mktemp("real")
    for i, image in enumerate(reals):
        (root / f"c{i % 2}").mkdir(exist_ok=True)
        save_png(root / f"c{i % 2}" / f"{i:03d}.png", image)
    return root


@pytest.mark.parametrize("packed", [False, True])
def test_the_command_measures_a_model_against_a_folder(tiny_bundle, folder, network, reals, capsys, tmp_path, packed):
    real = shutil.make_archive(str(tmp_path / "real"), "zip", folder) if packed else str(folder)
    words = ["quality", "--model", str(tiny_bundle), "--real", real, "--features", "discriminator"]
    assert main([*words, "-n", "40"]) == 0
    said = dict(line.split() for line in capsys.readouterr().out.splitlines())
    order = torch.cat([torch.arange(0, 80, 2), torch.arange(1, 80, 2)])
    wanted = Quality(QualityConfig(n_images=40), reals[order], network)(GENERATOR)
    assert list(said) == list(wanted)
    assert [float(value) for value in said.values()] == pytest.approx(list(wanted.values()), rel=1e-3)


def test_a_conditional_model_needs_its_categories(folder, monkeypatch):
    generator = Generator(RESOLUTION, STYLE_DIM, n_mapping=1, channel_base=64, channel_max=8, c_dim=3)
    monkeypatch.setattr("sage_fast.evaluation.quality.load_generator", lambda path, device: generator)
    with pytest.raises(InputError, match="must have the 3 categories of the model, got 2"):
        measure_folder(None, folder, "oracle")


def test_what_can_be_hoped_for_on_flora():
    ids = np.arange(2000) % 200
    training, held_out = (render(ids, first + np.arange(2000) // 200, 32)[0] for first in (0, 200))
    hoped = Quality(QualityConfig(n_images=2000, batch=250), held_out, load_features("oracle")).of_images(training)
    assert hoped["fd_oracle"] == pytest.approx(0.84, abs=0.05)
    assert hoped["precision_oracle"] == pytest.approx(0.93, abs=0.01)
    assert hoped["recall_oracle"] == pytest.approx(0.94, abs=0.01)
    assert abs(hoped["kd_oracle"]) < 0.1


def test_training_measures_itself_against_images_it_does_not_see(folder, tmp_path, monkeypatch):
    save_file(SqueezeFeatures().state_dict(), tmp_path / "squeeze.safetensors")
    shown = []
    train = gan.train_gan
    monkeypatch.setattr(
        stages, "train_gan", lambda config, images, *rest: shown.extend(images.files) or train(config, images, *rest)
    )
    words = [
        "train-gan",
        f"--data={folder}",
        f"--out={tmp_path / 'run'}",
        f"--measure={tmp_path / 'squeeze.safetensors'}",
    ]
    words += ["--measure-images=16", "--held-out=0.2", "--measure-every-kimg=0.016", "--resolution=8", "--device=cpu"]
    words += [
        "--style-dim=8",
        "--n-mapping=1",
        "--channel-base=32",
        "--channel-max=8",
        "--batch=8",
        "--total-kimg=0.04",
    ]
    assert main(words) == 0
    training, measure, _ = watched(
        read_images(scan_image_folder(folder), 8), tmp_path / "squeeze.safetensors", QualityConfig(n_images=16), 0.2
    )
    assert len(training) == 64 and shown == training.files
    lines = [json.loads(line) for line in (tmp_path / "run" / "logs" / "gan.jsonl").read_text().splitlines()]
    measured = {line["step"]: line["fd_squeezenet1_1"] for line in lines if "fd_squeezenet1_1" in line}
    assert list(measured) == [2, 4, 5]  # every 16 images, and at the end
    average = stages._load_trained(tmp_path / "run", "encoder").generator
    assert measured[5] == pytest.approx(measure(average)["fd_squeezenet1_1"], rel=1e-4)
    assert main([*words, "--resume", "--total-kimg=0.064"]) == 0  # the same images are held out again


def test_a_measure_may_stand_on_a_folder_of_its_own(folder, tmp_path):
    save_file(SqueezeFeatures().state_dict(), tmp_path / "squeeze.safetensors")
    images = read_images(scan_image_folder(folder), 8)
    found = watched(images, tmp_path / "squeeze.safetensors", QualityConfig(n_images=16), against=folder)
    assert found.images is images and found.held_out.files == images.files
    shutil.copytree(folder, tmp_path / "others")
    (tmp_path / "others" / images.categories[1]).rename(tmp_path / "others" / "zebra")
    with pytest.raises(
        InputError, match="must have the categories of the training images; '.*' is in one of them only"
    ):
        watched(images, tmp_path / "squeeze.safetensors", QualityConfig(n_images=16), against=tmp_path / "others")


def test_of_one_category_the_name_does_not_matter(folder, tmp_path):
    save_file(SqueezeFeatures().state_dict(), tmp_path / "squeeze.safetensors")
    images = read_images(scan_image_folder(folder), 8)
    flat = shutil.copytree(folder / images.categories[0], tmp_path / "flat")
    weights, config = tmp_path / "squeeze.safetensors", QualityConfig(n_images=16)
    found = watched(images.select(images.categories[1:2]), weights, config, against=flat)
    assert found.held_out.categories == ["flat"]
    packed = shutil.make_archive(str(tmp_path / "flat"), "zip", flat)
    found = watched(images.select(images.categories[1:2]), weights, config, against=packed)
    assert found.held_out.images.shape[0] == len(list(flat.iterdir()))
    with pytest.raises(InputError, match="must have the categories of the training images"):
        watched(images, weights, config, against=flat)


def test_the_whole_road_measures_its_generator_and_shows_the_rest_every_image(folder, tmp_path, monkeypatch):
    save_file(SqueezeFeatures().state_dict(), tmp_path / "squeeze.safetensors")
    shown = {}
    for name in ("gan_stage", "encoder_stage", "embed_stage", "dictionary_stage", "bundle_stage"):
        monkeypatch.setattr(stages, name, lambda *words, name=name: shown.update({name: words}))
    words = ["train", f"--data={folder}", f"--out={tmp_path / 'run'}", f"--measure={tmp_path / 'squeeze.safetensors'}"]
    assert main([*words, "--measure-images=16", "--held-out=0.2", "--resolution=8", "--gan.patience=3"]) == 0
    *_, measure, held_out = shown["gan_stage"]
    assert len(shown["gan_stage"][1]) == 64 and len(held_out) == 16 and len(shown["encoder_stage"][1]) == 80
    generator = Generator(8, 8, 1, channel_base=32, channel_max=8).eval()
    assert measure(generator)["fd_squeezenet1_1"] > 0


@pytest.mark.parametrize(
    "option", ["--patience=3", "--measure-every-kimg=2", "--held-out=0.2", "--measure-images=64", "--measure-against=a"]
)
def test_settings_of_a_measurement_without_one_are_refused(folder, tmp_path, capsys, option):
    for command in ("train-gan", "train"):
        prefix = "--gan." if command == "train" and option.startswith(("--patience", "--measure-every")) else "--"
        words = [command, f"--data={folder}", f"--out={tmp_path / 'run'}", option.replace("--", prefix, 1)]
        assert main([*words, "--resolution=8"]) == 2
        said = capsys.readouterr().err
        assert option[2:].split("=")[0].replace("-", "_") in said and "has no effect without --measure" in said
        assert not (tmp_path / "run").exists()


def test_two_places_to_measure_against_are_refused(folder, tmp_path, capsys):
    words = ["train-gan", f"--data={folder}", f"--out={tmp_path / 'run'}", "--measure=oracle", "--held-out=0.2"]
    assert main([*words, f"--measure-against={folder}"]) == 2
    assert "--measure-against takes the place of --held-out" in capsys.readouterr().err


def test_too_few_images_to_measure_against_name_the_option(folder, network):
    images = read_images(scan_image_folder(folder), 8)
    with pytest.raises(
        InputError, match=r"more than 4 images .* got 3 of 80; give a larger --held-out, or --measure-ag"
    ):
        watched(images, "oracle", share=0.04)
    with pytest.raises(InputError, match=r"^--held-out 0.001 cannot be used: share must be between 0 and 1"):
        watched(images, "oracle", share=0.001)
