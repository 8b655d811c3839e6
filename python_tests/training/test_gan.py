"""GAN training: it learns, it resumes bit for bit, it refuses what it cannot use."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import gan_programs
import pytest
import torch

from sage_fast.data.folders import ImageSet
from sage_fast.errors import InputError
from sage_fast.models.stylegan2 import Discriminator
from sage_fast.training import gan
from sage_fast.training.augment import AugmentConfig
from sage_fast.training.gan import GANConfig, train_gan

GOLDEN = Path(__file__).parents[1] / "golden" / "gan.json"
TINY = GANConfig(
    resolution=8,
    style_dim=8,
    n_mapping=2,
    channel_base=64,
    channel_max=8,
    batch=4,
    total_kimg=0.04,
    r1_every=2,
    pl_weight=2.0,
    pl_every=2,
    log_every=2,
    save_every=5,
    grid_every=5,
)


@pytest.fixture
def images():
    return torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def logged(folder):
    return [json.loads(line) for line in (folder / "logs/gan.jsonl").read_text().splitlines()]


def labelled(images, n_classes=2):
    labels = torch.arange(len(images)) * n_classes // len(images)
    names = [f"{chr(97 + label)}/{i}.png" for i, label in enumerate(labels.tolist())]
    return ImageSet(images, labels, [chr(97 + k) for k in range(n_classes)], names, [])


def test_resume_continues_bit_for_bit(tmp_path, images):
    whole, _ = train_gan(TINY, images, tmp_path / "a")
    train_gan(dataclasses.replace(TINY, total_kimg=0.02), images, tmp_path / "b")
    resumed, _ = train_gan(TINY, images, tmp_path / "b", resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_golden_run(tmp_path, images):
    """The first losses are those of the recorded run: a change of the arithmetic shows here.

    Recorded anew when the reals came to be drawn by epochs, the noise of the path length by the run's own generator, and the
    path length to be held against the mean before it enters; with the reals as before and no path length the losses were
    the old ones to six digits. And again when the discriminator came to see new fakes, not the generator's.
    """
    config = dataclasses.replace(TINY, total_kimg=0.024, log_every=1)
    train_gan(config, images, tmp_path)
    lines = logged(tmp_path)
    for key, values in json.loads(GOLDEN.read_text()).items():
        assert [line[key] for line in lines] == pytest.approx(values, rel=1e-3, abs=1e-5), key


def test_run_folder(tmp_path, images):
    train_gan(TINY, images, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "logs/gan.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5, 6, 8, 10] and "diversity" in lines[2]  # a grid every 5
    assert {"g_loss", "d_loss", "r1", "kimg", "seconds"} <= set(lines[0])
    assert json.loads((tmp_path / "configs/gan.json").read_text())["batch"] == 4
    assert (tmp_path / "grids/gan_fakes_000010.png").exists() and (tmp_path / "grids/gan_reals.png").exists()


def test_a_finished_folder_is_not_overwritten(tmp_path, images):
    train_gan(TINY, images, tmp_path)
    with pytest.raises(InputError, match="--resume"):
        train_gan(TINY, images, tmp_path)
    with pytest.raises(InputError, match="batch was 4, is 8"):
        train_gan(dataclasses.replace(TINY, batch=8), images, tmp_path, resume=True)


def test_a_truncated_checkpoint_is_named(tmp_path, images):
    config = dataclasses.replace(TINY, save_every=100)  # one checkpoint
    train_gan(config, images, tmp_path)
    path = tmp_path / "checkpoints/gan.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="gan.pt is not a readable checkpoint"):
        train_gan(config, images, tmp_path, resume=True)


def test_it_learns_a_colour(tmp_path):
    """Two-colour data: after a short run the fakes' mean colour moved most of the way to the data's."""
    images = torch.randint(0, 20, (64, 3, 1, 1), dtype=torch.uint8).repeat(1, 1, 8, 8)
    images[:, 0] += 235
    config = dataclasses.replace(
        TINY, batch=8, total_kimg=2.0, pl_weight=0.0, ema_kimg=0.2, save_every=1000, grid_every=1000
    )
    g, _ = train_gan(config, images, tmp_path)
    with torch.no_grad():
        colour = g(g.mapping(torch.randn(16, 8))).mean([0, 2, 3])
    assert colour[0] > 0.3 and colour[1] < -0.3 and colour[2] < -0.3, colour


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(batch=1), "batch must be"),
        (dict(lr=0.0), "lr must be"),
        (dict(style_mixing=2.0), "0 to 1"),
        (dict(r1_gamma=-1.0), "r1_gamma must not be negative"),
        (dict(pl_weight=-2.0), "pl_weight must not be negative"),
        (dict(ema_rampup=-1.0), "ema_rampup must not be negative"),
        (dict(patience=-1), "patience must not be negative"),
        (dict(latent_avg_decay=2.0), "latent_avg_decay is a share, expected 0 to 1"),
        (dict(pl_decay=7.0), "pl_decay is a share, expected 0 to 1"),
        (dict(channel_max=0), "channel_max must be at least 1"),
        (dict(channel_base=-5), "channel_base must be at least 1"),
        (dict(style_dim=0), "style_dim must be at least 1"),
        (dict(n_mapping=0), "n_mapping must be at least 1"),
        (dict(n_channels=5), "n_channels must be 1 to 4"),
        (dict(measure_every_kimg=0.0), "measure_every_kimg must be positive"),
    ],
)
def test_bad_settings(bad, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(TINY, **bad)


def test_bad_images(tmp_path, images):
    with pytest.raises(InputError, match=r"images must be uint8 \[M, 3, 8, 8\]"):
        train_gan(TINY, images.float(), tmp_path)
    with pytest.raises(InputError, match="at least one batch of 4 images, got 2"):
        train_gan(TINY, images[:2], tmp_path)


@pytest.mark.usefixtures("multiplied_bfloat16")
def test_bfloat16_steps_follow_float32(tmp_path, images):
    """The same first losses to bfloat16's three digits, weights in float32 all along."""
    losses = {}
    for precision in ("float32", "bfloat16"):
        config = dataclasses.replace(TINY, precision=precision, total_kimg=0.016, log_every=1)
        generator, _ = train_gan(config, images, tmp_path / precision)
        lines = (tmp_path / precision / "logs/gan.jsonl").read_text().splitlines()
        losses[precision] = [json.loads(line)["d_loss"] for line in lines]
        assert {p.dtype for p in generator.parameters()} == {torch.float32}
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)


def test_unknown_precision():
    with pytest.raises(InputError, match="precision must be float32, bfloat16 or float64, got 'half'"):
        dataclasses.replace(TINY, precision="half")


EXACT = dataclasses.replace(TINY, batch=8, mbstd_group=2, total_kimg=0.064, precision="float64", log_every=1)


@pytest.mark.parametrize("settings", [dict(), dict(loss="hinge", conditional=True)], ids=["plain", "hinge, classes"])
def test_micro_batches_give_what_the_batch_gives(tmp_path, images, settings):
    """Losses of eight steps and the weights after them, in float64."""
    results = []
    for accumulate in (1, 2, 4):
        config = dataclasses.replace(EXACT, accumulate=accumulate, **settings)
        results.append(train_gan(config, labelled(images), tmp_path / str(accumulate)))
    one = logged(tmp_path / "1")
    for i, accumulate in enumerate((2, 4), 1):
        for a, b in zip(one, logged(tmp_path / str(accumulate)), strict=True):
            assert {k: a[k] for k in a if k not in ("seconds", "time")} == pytest.approx(
                {k: b[k] for k in b if k not in ("seconds", "time")}, rel=1e-5, abs=1e-9
            )
        for whole, cut in zip(results[0], results[i]):
            for (name, x), y in zip(whole.state_dict().items(), cut.state_dict().values()):
                torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def test_hinge_loss_is_what_it_is_trained_with(tmp_path, images):
    train_gan(dataclasses.replace(TINY, loss="hinge", log_every=1), images, tmp_path)
    first = logged(tmp_path)[0]
    assert first["d_loss"] == pytest.approx(2.0, abs=0.3) and abs(first["g_loss"]) < 0.5  # logits begin near zero


def test_classes_reach_both_networks_and_are_learned(tmp_path):
    """One class red, the other blue: after a short run the generator obeys its label."""
    images = torch.zeros(64, 3, 8, 8, dtype=torch.uint8)
    images[:32, 0], images[32:, 2] = 255, 255
    config = dataclasses.replace(
        TINY, conditional=True, batch=8, total_kimg=1.2, pl_weight=0.0, ema_kimg=0.2, save_every=1000, grid_every=1000
    )
    G, D = train_gan(config, labelled(images), tmp_path)
    assert G.c_dim == D.c_dim == 2
    with torch.no_grad():
        colours = [G(G.mapping(torch.randn(16, 8), c.expand(16, 2))).mean([0, 2, 3]) for c in torch.eye(2)]
    assert colours[0][0] > colours[1][0] + 0.5 and colours[1][2] > colours[0][2] + 0.5, colours


def test_classes_need_labels(tmp_path, images):
    config = dataclasses.replace(TINY, conditional=True)
    with pytest.raises(InputError, match="conditional training needs labels, got images alone"):
        train_gan(config, images, tmp_path)
    with pytest.raises(InputError, match="at least two categories, got 1; leave out --conditional"):
        train_gan(config, labelled(images, 1), tmp_path)
    assert not (tmp_path / "configs").exists()


def test_another_data_set_is_not_resumed(tmp_path, images):
    train_gan(TINY, labelled(images), tmp_path)
    more = dataclasses.replace(TINY, total_kimg=0.08)
    with pytest.raises(InputError, match="data.categories was 2, is 3, data.names was"):
        train_gan(more, labelled(images, 3), tmp_path, resume=True)
    renamed = dataclasses.replace(labelled(images), files=[f"other/{i}.png" for i in range(16)])
    with pytest.raises(InputError, match="something else .data.names was"):
        train_gan(more, renamed, tmp_path, resume=True)
    train_gan(more, labelled(images), tmp_path, resume=True)


def test_frozen_layers_of_the_discriminator_stay(tmp_path, images, monkeypatch):
    monkeypatch.setattr(gan, "transfer", lambda *_: "nothing was taken")
    fresh, learned = (train_gan(TINY, images, tmp_path / "a")[1], None)
    config = dataclasses.replace(TINY, transfer_from="source.pt", freeze_d=1)
    torch.manual_seed(TINY.seed)
    _, start = gan.new_networks(config, 0, "cpu")
    _, learned = train_gan(config, images, tmp_path / "b")
    for name, value in learned.named_parameters():
        same = torch.equal(value, start.get_parameter(name))
        assert same == name.startswith("convs.0."), name
    assert not torch.equal(fresh.convs[0][0].weight, start.convs[0][0].weight)
    with pytest.raises(InputError, match="freeze_d must be 0 to 2, the layers of a 8 px discriminator, got 3"):
        dataclasses.replace(TINY, freeze_d=3)
    with pytest.raises(InputError, match="freeze_d = 1 would keep layers that nothing has trained; give transfer_from"):
        dataclasses.replace(TINY, freeze_d=1)


def test_a_measure_decides_which_is_best_and_when_to_stop(tmp_path, images):
    """Scores of four measurements; the third brings no new best, nor the fourth, and two are as many as it may be."""
    scores, seen = iter([2.0, 1.0, 3.0, 1.5, 0.5]), []

    def measure(generator):
        seen.append(generator.training)
        return {"distance": next(scores)}

    config = dataclasses.replace(TINY, total_kimg=0.1, measure_every_kimg=0.012, patience=2, save_every=100)
    train_gan(config, images, tmp_path, measure=measure)
    assert seen == [False] * 4
    lines = [(line["step"], line["distance"]) for line in logged(tmp_path) if "distance" in line]
    assert lines == [(3, 2.0), (6, 1.0), (9, 3.0), (12, 1.5)] and logged(tmp_path)[-1]["step"] == 12
    read = [torch.load(tmp_path / f"checkpoints/{name}.pt", weights_only=True) for name in ("gan_best", "gan")]
    assert [(state["step"], state["stopped_early"]) for state in read] == [(6, False), (12, True)]
    train_gan(config, images, tmp_path, True, measure=measure)
    assert seen == [False] * 4  # nothing is left to do
    train_gan(
        dataclasses.replace(config, patience=0), images, tmp_path, True, measure=lambda generator: {"distance": 9.0}
    )
    assert logged(tmp_path)[-1]["step"] == 25


def test_held_out_images_are_watched_and_change_nothing(tmp_path, images):
    config = dataclasses.replace(TINY, augment=AugmentConfig("ada", p=0.5))
    plain, _ = train_gan(config, images, tmp_path / "plain")
    watched, D = train_gan(config, images, tmp_path / "watched", held_out=labelled(images[:3]))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
    assert "held_out_gap" not in logged(tmp_path / "plain")[-1]
    gaps = [line["held_out_gap"] for line in logged(tmp_path / "watched") if "held_out_gap" in line]
    assert gaps and all(-1 <= gap <= 1 for gap in gaps)
    with pytest.raises(InputError, match="images must be uint8"):
        train_gan(config, images, tmp_path / "other", held_out=labelled(images[:, :1]))


def test_images_learnt_by_heart_are_told_from_held_out_ones(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(gan.CollapseDetector, "discriminator", lambda self, kimg, *logits: seen.append(logits) or {})
    pixels = torch.randint(0, 256, (36, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    config = dataclasses.replace(
        TINY, total_kimg=0.8, channel_base=256, channel_max=32, pl_weight=0.0, lr=0.005, flip=False
    )
    train_gan(config, pixels[:4], tmp_path / "run", held_out=labelled(pixels[4:]))
    reals, fakes, held_out = (torch.stack([x.float().mean() for x in logits[-10:]]) for logits in zip(*seen))
    assert (reals > fakes).all() and (reals - held_out).mean() > 0.3 * (reals - fakes).mean()


def test_balance_shows_the_categories_evenly(tmp_path, images, monkeypatch):
    """Fifteen images of one category, one of the other: half of what is shown is that one."""
    few = labelled(images)
    few.labels[:] = torch.tensor([0] * 15 + [1])
    shown, original = [], gan.Guard.begin
    monkeypatch.setattr(
        gan.Guard, "begin", lambda self, step, index: shown.append(index) or original(self, step, index)
    )
    train_gan(dataclasses.replace(TINY, balance=True), few, tmp_path)
    assert few.labels[torch.cat(shown)].float().mean() == 0.5
    with pytest.raises(InputError, match="balance training needs labels"):
        train_gan(dataclasses.replace(TINY, balance=True), images, tmp_path / "b")


def test_a_run_of_before_goes_on(tmp_path, images):
    """A checkpoint without places, facts and fused optimizers, as earlier versions wrote them."""
    train_gan(dataclasses.replace(TINY, total_kimg=0.02), images, tmp_path)
    path = tmp_path / "checkpoints/gan.pt"
    kept = ("G", "D", "average", "g_optim", "d_optim", "rng", "path_mean", "step")
    state = {name: value for name, value in torch.load(path, weights_only=True).items() if name in kept}
    for optim in (state["g_optim"], state["d_optim"]):
        optim["param_groups"][0].update(fused=None, foreach=None)
    torch.save(state | {"torch_rng": torch.get_rng_state()}, path)
    train_gan(TINY, images, tmp_path, resume=True)
    assert logged(tmp_path)[-1]["step"] == 10


def test_augmentation_is_applied_and_its_strength_saved(tmp_path):
    config = gan_programs.config(total_kimg=0.04)
    train_gan(config, gan_programs.images(), tmp_path)
    strengths = [line["augment_p"] for line in logged(tmp_path)]
    assert strengths[:4] == [0, 0, 0, 0.32] and strengths[4] == 0.32  # 32 images of 100, after four steps
    state = torch.load(tmp_path / "checkpoints/gan.pt", weights_only=True)
    assert state["augment"]["p"] == 0.32 and state["augment"]["steps"] == 1
    fixed = dataclasses.replace(config, augment=AugmentConfig("ada", p=0.0))
    train_gan(fixed, gan_programs.images(), tmp_path / "none")
    adaptive, none = ([line["d_loss"] for line in logged(folder)] for folder in (tmp_path, tmp_path / "none"))
    assert none[:4] == adaptive[:4] and none[4] != adaptive[4]


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path, images, monkeypatch):
    train_gan(dataclasses.replace(TINY, total_kimg=0.02), images, tmp_path)
    kept, forward, calls = (tmp_path / "checkpoints/gan.pt").read_bytes(), Discriminator.forward, []

    def spoiled(self, *args):
        calls.append(1)
        return forward(self, *args) * (math.nan if len(calls) == 8 else 1)

    monkeypatch.setattr(Discriminator, "forward", spoiled)
    with pytest.raises(InputError, match=r"stopped at step \d+: \w+ is nan.*gan_diagnosis.json.*lower lr"):
        train_gan(TINY, images, tmp_path, resume=True)
    assert (tmp_path / "checkpoints/gan.pt").read_bytes() == kept
    report = json.loads((tmp_path / "logs/gan_diagnosis.json").read_text())
    assert report["step"] >= 5 and len(report["images"]) == 4 and len(report["last_losses"]) >= 2
    assert all(math.isfinite(block["weights"]) for block in report["norms"]["D"].values())
    monkeypatch.undo()
    train_gan(TINY, images, tmp_path, resume=True)


def test_a_run_from_before_optimizers_were_fused_goes_on(tmp_path, images):
    train_gan(dataclasses.replace(TINY, total_kimg=0.02), images, tmp_path)
    path = tmp_path / "checkpoints/gan.pt"
    state = torch.load(path, weights_only=True)
    for name in ("g_optim", "d_optim"):
        for group in state[name]["param_groups"]:
            group["fused"] = None
    old = ("G", "D", "average", "g_optim", "d_optim", "rng", "path_mean", "step")
    torch.save({name: state[name] for name in old}, path)
    train_gan(TINY, images, tmp_path, resume=True)
    assert torch.load(path, weights_only=True)["step"] == 10
