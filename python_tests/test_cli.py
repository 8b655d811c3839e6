"""The command line: what it imports, how it reads options, what it says, and the road of training through it."""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_model import codes_that_do_not_span, tiny_codes

from sage_fast import cli
from sage_fast.data.latent_table import LatentTable
from sage_fast.errors import Stopped
from sage_fast.training import stages

TINY_GAN = ["--style-dim=8", "--n-mapping=2", "--channel-base=64", "--channel-max=8", "--total-kimg=0.016", "--batch=4"]
TINY_ENCODER = ["--total-steps=4", "--batch=4", "--channel-base=64", "--channel-max=16", "--head-width=4"]
TINY_DICTIONARY = ["--total-steps=4", "--batch=4", "--n-directions=6"]


def prefixed(stage: str, options: list[str]) -> list[str]:
    return [option.replace("--", f"--{stage}.", 1) for option in options]


TINY = prefixed("gan", TINY_GAN) + prefixed("encoder", TINY_ENCODER) + prefixed("dictionary", TINY_DICTIONARY)


def write_images(folder: Path, n_categories: int = 3, n: int = 8, side: int = 8) -> Path:
    """An ImageFolder of noisy single-coloured images."""
    rng = torch.Generator().manual_seed(0)
    for category in range(n_categories):
        colour = torch.randint(0, 200, (1, 1, 3), generator=rng)
        (folder / f"category_{category}").mkdir(parents=True)
        for number in range(n):
            pixels = (colour + torch.randint(0, 55, (side, side, 3), generator=rng)).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"category_{category}" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("seen"))


@pytest.fixture(scope="module")
def run(seen, tmp_path_factory):
    """A run folder of the whole road, at 8 px and for a few steps."""
    out = tmp_path_factory.mktemp("run")
    assert cli.main(["train", f"--data={seen}", f"--out={out}", "--resolution=8", *TINY]) == 0
    return out


def bundle_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


# --- words ------------------------------------------------------------------------------------------------------------


def test_overview_and_import_load_neither_torch_nor_the_parser():
    code = "import sys, sage_fast, sage_fast.cli as c; assert c.main(['--help']) == 0; print(sorted(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    modules = printed.splitlines()[-1]
    assert not any(f"'{heavy}'" in modules for heavy in ("torch", "numpy", "PIL", "tyro", "rich"))
    for name in cli.COMMANDS:
        assert f"  {name} " in printed


@pytest.mark.parametrize("name", [*cli.COMMANDS, "data flora", "data split"])
def test_every_command_explains_itself(name, capsys):
    assert cli.main([*name.split(), "--help"]) == 0
    assert f"usage: sage-fast {name}" in capsys.readouterr().out


def test_version(capsys):
    import sage_fast

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"sage-fast {sage_fast.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["trian"], "trian"),
        (["data", "fauna"], "fauna"),
        (["train-gan", "--data=a", "--out=b", "--batch=1"], "batch"),
        (["train", "--data=a", "--out=b", "--encoder.lr=0"], "lr"),
        (["train", "--data=a", "--out=b", "--dictionary.lambda1=nan"], "lambda1"),
        (["train", "--data=a", "--out=b", "--dictionary.n-directions=500"], "n_directions"),
        (
            ["train", "--data=a", "--out=b", "--encoder.perceptual=none", "--dictionary.perceptual-weight=3"],
            "no effect",
        ),
        (["train-dictionary", "--data=a", "--out=b", "--rec-weight=0", "--perceptual-weight=3"], "perceptual_weight"),
        (["train-dictionary", "--data=a", "--out=b", "--rec-weight=0", "--precision=bfloat16"], "precision"),
        (["train-gan", "--data=a", "--out=b", "--total-kimg=inf"], "total_kimg"),
        (["train-gan", "--data=a", "--out=b", "--freeze-d=2"], "transfer_from"),
        (["train-encoder", "--data=a", "--out=b", "--norm-weight=nan"], "norm_weight"),
        (["train-encoder", "--data=a", "--out=b", "--tune-lr=0.1"], "tune_generator"),
        (["embed", "--data=a", "--out=b", "--batch=0"], "batch"),
        (["train", "--data=a", "--out=b", "--resolution=8", "--gan.resolution=16"], "gan.resolution"),
        (["train", "--data=a", "--out=b", "--encoder.noise=const"], "noise"),
        (["train-gan", "--data=a", "--out=b", "--device=abacus"], "abacus"),
        (["train-encoder", "--data=a", "--out=b"], "train-gan"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(argv, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "a", n_categories=2, n=2, side=4)
    assert cli.main(argv) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("sage-fast: ") and said.endswith(".\n")
    assert named in said
    assert not (tmp_path / "b").exists()


def test_no_words_at_all_is_a_mistake(capsys):
    assert cli.main([]) == 2
    assert "usage: sage-fast" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["train-gan", "--data=a"], ["train-gan", "--data=a", "--out=b", "--batch=many"]])
def test_options_that_do_not_parse_are_code_2(argv, capsys):
    assert cli.main(argv) == 2
    assert ("--out" in (said := capsys.readouterr().err)) or ("--batch" in said)


def test_debug_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv("SAGE_FAST_DEBUG", "1")
    assert cli.main(["trian"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_system_error_is_a_sentence_too(capsys, monkeypatch):
    def fail(argv):
        raise PermissionError(13, "Permission denied", "some/file")

    monkeypatch.setitem(cli.COMMANDS, "info", (fail, ""))
    assert cli.main(["info"]) == 2
    said = capsys.readouterr().err
    assert "'some/file'" in said and "Permission denied" in said and said.count("\n") == 1


def test_an_interrupt_ends_with_130(capsys, monkeypatch):
    def stop(argv):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "info", (stop, ""))
    assert cli.main(["info"]) == 130
    assert "--resume" in capsys.readouterr().err


def test_a_fault_of_the_package_is_not_dressed_as_a_mistake_of_the_user(monkeypatch):
    def fail(argv):
        raise ZeroDivisionError

    monkeypatch.setitem(cli.COMMANDS, "info", (fail, ""))
    with pytest.raises(ZeroDivisionError):
        cli.main(["info"])


def test_warnings_of_the_package_are_one_line(capsys, monkeypatch):
    import warnings

    from sage_fast.errors import SageFastWarning

    def warn(argv):
        warnings.warn("Slow path\nhere.", SageFastWarning, stacklevel=1)

    monkeypatch.setitem(cli.COMMANDS, "info", (warn, ""))
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().err == "sage-fast: warning: Slow path here.\n"


def test_options_reach_the_config_of_their_stage(monkeypatch):
    from sage_fast.training.dictionary import DictionaryConfig
    from sage_fast.training.encoder import EncoderConfig
    from sage_fast.training.gan import GANConfig

    given = {}
    monkeypatch.setattr(
        stages, "train_all", lambda config, *rest: given.update(config=config, rest=rest) or Path("out")
    )
    words = ["train", "--data=in", "--out=out", "--resolution=16", "--resume", "--device=cpu", "--preset=paper"]
    words += ["--cache=c", "--upscale"]
    assert cli.main([*words, "--gan.lr=0.5", "--encoder.no-flip", "--dictionary.lambda1=0.25"]) == 0
    config = given["config"]
    assert config.resolved_gan == GANConfig(resolution=16, lr=0.5)
    assert config.encoder == EncoderConfig(flip=False)
    assert config.dictionary == DictionaryConfig.preset("paper", lambda1=0.25)
    assert given["rest"][:-1] == (Path("in"), Path("out"), True, False, "cpu", Path("c"), True)


def test_a_preset_of_the_generator_gives_the_defaults_of_its_options(monkeypatch, seen, tmp_path):
    from sage_fast.training import presets

    given = []
    monkeypatch.setattr(stages, "gan_stage", lambda config, *rest: given.append(config))
    words = ["train-gan", f"--data={seen}", "--device=cpu"]
    for number, more in enumerate((["--preset-gan=small"], ["--preset-gan", "auto", "--batch=4"])):
        assert cli.main([*words, f"--out={tmp_path / str(number)}", "--resolution=8", *more]) == 0
    assert given == [presets.small(8), dataclasses.replace(presets.auto(8, 24, 0), batch=4)]


def test_a_preset_of_the_generator_for_the_whole_road(monkeypatch):
    from sage_fast.training import presets

    given = []
    monkeypatch.setattr(stages, "train_all", lambda config, *rest: given.append(config.resolved_gan) or Path("out"))
    words = ["train", "--data=in", "--out=out", "--preset-gan=config_f", "--gan.lr=0.5"]
    assert cli.main([*words, "--resolution=64"]) == 0 and cli.main(words) == 0
    assert given == [dataclasses.replace(presets.config_f(size), lr=0.5) for size in (64, 1024)]


def test_a_preset_of_the_encoder_gives_the_defaults_of_its_options(monkeypatch):
    from sage_fast.training import presets
    from sage_fast.training.encoder import EncoderConfig

    given = []
    monkeypatch.setattr(stages, "train_all", lambda config, *rest: given.append(config.encoder) or Path("out"))
    monkeypatch.setattr(stages, "read_seen_of_run", lambda *rest: None)
    monkeypatch.setattr(stages, "encoder_stage", lambda config, *rest: given.append(config))
    words = ["--data=in", "--out=out", "--device=cpu"]
    assert cli.main(["train", *words, "--preset-encoder=small", "--encoder.total-steps=7"]) == 0
    assert cli.main(["train-encoder", *words, "--preset-encoder", "small", "--batch=8"]) == 0
    assert cli.main(["train-encoder", *words]) == 0
    assert cli.main(["train", *words, "--preset-encoder=small", "--encoder.no-tune-generator"]) == 0
    assert (
        cli.main(["train-encoder", *words, "--preset-encoder=small", "--perceptual=none", "--no-tune-generator"]) == 0
    )
    small = presets.small_encoder()
    expected = [dataclasses.replace(small, total_steps=7), dataclasses.replace(small, batch=8), EncoderConfig()]
    expected += [presets.small_encoder(tune_generator=False), presets.small_encoder(False, "none")]
    assert given == expected


# --- the road of training ---------------------------------------------------------------------------------------------


def test_train_leaves_a_model_that_loads(run, seen):
    from sage_fast.models.weights import load_bundle

    bundle = load_bundle(run)
    assert bundle.generator.resolution == 8
    assert bundle.codes.w_plus.shape == (24, 4, 8)
    assert bundle.codes.categories == ["category_0", "category_1", "category_2"]
    assert bundle.about["data"] == {"n_images": 24, "n_categories": 3}
    assert bundle.about["settings"]["gan"]["resolution"] == 8
    assert bundle.about["last_logged"]["gan"]["step"] == 4


@pytest.mark.parametrize("spanning", [True, False])
def test_training_ends_with_a_warning_where_the_mapping_would_lose_new_categories(
    run, seen, tmp_path, capsys, monkeypatch, spanning
):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    codes = tiny_codes(4)[0] if spanning else codes_that_do_not_span(4)
    monkeypatch.setattr(stages, "dictionary_stage", lambda *rest: None)
    narrow = LatentTable(codes.w_plus[..., :8], codes.labels, codes.categories)
    monkeypatch.setattr(stages, "_load_codes", lambda folder: narrow)
    words = ["train-dictionary", f"--data={seen}", f"--out={folder}", "--resume", *TINY_DICTIONARY]
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert "The model is in" in said.out and ("The class embedding mapping of" in said.err) == (not spanning)


def test_codes_of_the_model_are_those_its_encoder_gives(run, seen):
    from sage_fast.models.weights import load_bundle
    from sage_fast.training.embed import embed_images

    bundle = load_bundle(run)
    images = stages.read_seen(seen, 8)
    codes = embed_images(images.images, bundle.encoder, bundle.generator)
    torch.testing.assert_close(codes, bundle.codes.w_plus, rtol=0, atol=1e-5)


def test_the_road_with_classes(seen, tmp_path):
    """A conditional generator, augmented, in micro-batches; encoder, dictionary and bundle need no label."""
    from sage_fast.models.weights import load_bundle

    words = ["train", f"--data={seen}", f"--out={tmp_path / 'run'}", "--resolution=8", *TINY]
    more = ["--gan.conditional", "--gan.balance", "--gan.loss=hinge", "--gan.augment.kind=diffaugment"]
    assert cli.main([*words, *more, "--gan.batch=8", "--gan.accumulate=2"]) == 0
    generator = load_bundle(tmp_path / "run").generator
    assert generator.c_dim == 3 and generator.mapping(torch.randn(3, 8), torch.eye(3)).shape == (3, 8)


def test_stages_one_by_one_name_the_next_and_give_the_same_model(run, seen, tmp_path, capsys):
    out = tmp_path / "a run"
    words = ["train-gan", f"--data={seen}", f"--out={out}", "--resolution=8"]
    for options in (TINY_GAN, TINY_ENCODER, [], TINY_DICTIONARY):
        assert cli.main([*words, *options]) == 0
        said = capsys.readouterr().out
        words = shlex.split(said.rpartition("next: sage-fast ")[2])
    assert f"sage-fast generate --model {out}" in said and bundle_files(out) == bundle_files(run)


@pytest.mark.parametrize("kind", ["psp", "e4e", "restyle", "hyperstyle"])
def test_every_kind_of_encoder_on_a_given_generator(run, seen, tmp_path, kind, capsys):
    from sage_fast.models.weights import load_bundle

    out = tmp_path / "run"
    words, few = [f"--data={seen}", f"--out={out}"], ["--perceptual=none", *TINY_ENCODER]
    start = ["train-encoder", *words, f"--generator={run}", f"--kind={kind}", *few]
    assert cli.main(start) == 0
    assert cli.main(["embed", *words]) == 0
    capsys.readouterr()
    assert cli.main(["train-dictionary", *words, "--perceptual-weight=3", *TINY_DICTIONARY]) == 2
    assert "perceptual_weight = 3.0 has no effect without a network in the enc" in capsys.readouterr().err
    assert cli.main(["train-dictionary", *words, "--perceptual-weight=0", *TINY_DICTIONARY]) == 0
    bundle = load_bundle(out)
    assert bundle.encoder.kind == kind and bundle.about["settings"]["encoder"]["kind"] == kind
    ours, theirs = bundle.generator.state_dict(), load_bundle(run).generator.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    shots = write_images(tmp_path / "novel", n_categories=1, n=2)
    assert cli.main(["generate", f"--model={out}", f"--shots={shots}", f"--out={tmp_path / 'new'}", "-n", "2"]) == 0
    assert len(list((tmp_path / "new" / "category_0").glob("*.png"))) == 2
    capsys.readouterr()
    assert cli.main(start) == 2 and "not empty" in capsys.readouterr().err
    assert cli.main([*start, "--resume"]) == 0


@pytest.fixture(scope="module")
def one_category(tmp_path_factory):
    """The same eight images as a category in a folder, as a flat folder and as a flat archive."""
    root = tmp_path_factory.mktemp("one")
    write_images(root / "of_one", n_categories=1)
    flat = (root / "of_one" / "category_0").rename(root / "tulips")
    shutil.copytree(flat, root / "of_one" / "tulips")
    shutil.make_archive(str(root / "archived"), "zip", flat)
    return {"category": root / "of_one", "flat": flat, "archive": root / "archived.zip"}


@pytest.mark.parametrize("kind", ["category", "flat", "archive"])
def test_a_generator_is_trained_on_one_category(one_category, tmp_path, capsys, kind):
    data, out = one_category[kind], tmp_path / "run"
    words = [f"--data={data}", f"--out={out}"]
    gan = ["train-gan", *words, "--resolution=8", *TINY_GAN]
    assert cli.main([*gan, "--conditional"]) == 2 and not out.exists()
    said = " ".join(capsys.readouterr().err.split())
    assert "has 1 category" in said and "since --conditional, which may be left out, makes a class of each" in said
    assert cli.main([*gan, f"--cache={tmp_path / 'cache'}"]) == 0
    assert cli.main([*gan, "--resume"]) == 0
    for command in (["train-encoder", *TINY_ENCODER], ["embed"], ["train-dictionary", *TINY_DICTIONARY]):
        capsys.readouterr()
        assert cli.main([command[0], *words, *command[1:]]) == 2
        assert "expected at least 2, since the dictionaries are learned" in " ".join(capsys.readouterr().err.split())
    auto = ["train-gan", f"--data={data}", f"--out={tmp_path / 'auto'}", "--resolution=8", "--preset-gan=auto"]
    assert cli.main([*auto, "--total-kimg=0.008", "--device=cpu"]) == 0


def test_a_run_goes_on_with_another_learning_rate(seen, tmp_path, capsys):
    """What a loss that is not finite is met with."""
    words = ["train-gan", f"--data={seen}", f"--out={tmp_path / 'run'}", "--resolution=8", *TINY_GAN, "--save-every=1"]
    assert cli.main([*words, "--lr=1e38"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "training stopped at step" in said and "try a lower lr or a larger r1_gamma, and" in said
    again = [*words, "--lr=0.001", "--r1-gamma=1"]
    assert cli.main([*again, "--resume"]) == 0


def test_a_run_from_before_there_were_kinds_goes_on(run, seen, tmp_path):
    import json

    out = copy_run(run, tmp_path / "old")
    settings = json.loads((out / "configs" / "encoder.json").read_text())
    for name in ("kind", "identity", "identity_weight", "n_iterations", "e4e", "hyperstyle"):
        del settings[name]
    (out / "configs" / "encoder.json").write_text(json.dumps(settings))
    state = torch.load(out / "checkpoints" / "encoder.pt", weights_only=True)
    del state["architecture"]
    torch.save(state, out / "checkpoints" / "encoder.pt")
    words = [f"--data={seen}", f"--out={out}"]
    assert cli.main(["embed", *words, "--resume"]) == 0
    codes = (out / "codes.safetensors").read_bytes()
    assert cli.main(["train-encoder", *words, *TINY_ENCODER, "--resume"]) == 0
    assert codes == bundle_files(run)["codes.safetensors"]


def test_a_run_keeps_its_generator(run, seen, tmp_path, capsys):
    from sage_fast.models.weights import load_bundle, save_bundle

    out, few = tmp_path / "run", ["--perceptual=none", *TINY_ENCODER]
    words = ["train-encoder", f"--data={seen}", f"--out={out}"]
    assert cli.main([*words, f"--generator={run}", *few]) == 0
    bundle = load_bundle(run)
    with torch.no_grad():
        bundle.generator.conv1.conv.weight.mul_(2)
    parts = {"generator": bundle.generator, "encoder": bundle.encoder, "codes": bundle.codes}
    other = save_bundle(tmp_path / "other", **parts, directions=bundle.dictionary.directions)
    assert cli.main([*words, f"--generator={other}", *few, "--resume"]) == 2
    assert "another generator" in capsys.readouterr().err
    assert cli.main([*words, *few, "--overwrite"]) == 2
    assert "goes with --generator" in capsys.readouterr().err
    assert cli.main([*words, f"--generator={other}", *few, "--overwrite"]) == 0


def test_an_archive_and_shards_train_the_same_model_as_their_folder(run, seen, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "seen"), "zip", seen)
    for number, folder in enumerate(sorted(seen.iterdir())):
        with tarfile.open(tmp_path / f"s-{number:02d}.tar", "w") as shard:
            for image in folder.iterdir():
                shard.add(image, f"{image.stem}.png")
                label = tarfile.TarInfo(f"{image.stem}.cls")
                label.size = len(folder.name)
                shard.addfile(label, io.BytesIO(folder.name.encode()))
    for data in (archive, str(tmp_path / "s-{00..02}.tar")):
        out = tmp_path / Path(data).stem
        cache = tmp_path / f"{out.name}_cache"
        words = ["train", f"--data={data}", f"--out={out}", f"--cache={cache}", "--resolution=8", *TINY]
        assert cli.main(words) == 0
        model = {name: content for name, content in bundle_files(out).items() if name != "codes.safetensors"}
        assert model.items() <= bundle_files(run).items()  # the codes bear the names of the files
        assert (cache / "sage_fast_cache.pixels").stat().st_size == 24 * 3 * 64


def test_many_images_are_mapped_from_the_cache_of_their_run(run, seen, tmp_path, monkeypatch):
    from sage_fast.data import pixel_cache

    monkeypatch.setattr(pixel_cache, "IN_MEMORY", 0)
    out = tmp_path / "run"
    words = ["train", f"--data={seen}", f"--out={out}", "--resolution=8", *TINY]
    assert cli.main(words) == 0
    assert bundle_files(out) == bundle_files(run)
    before = (out / "cache" / "sage_fast_cache.pixels").stat().st_mtime_ns
    assert cli.main([*words, "--overwrite"]) == 0
    assert (out / "cache" / "sage_fast_cache.pixels").stat().st_mtime_ns == before, "it is used again"


def test_a_training_that_torchrun_started_again_goes_on_unasked(run, seen, monkeypatch):
    before = bundle_files(run)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert cli.main(["train", f"--data={seen}", f"--out={run}", "--resolution=8", *TINY]) == 0
    assert cli.main(["train-gan", f"--data={seen}", f"--out={run}", "--resolution=8", *TINY_GAN]) == 0
    assert bundle_files(run) == before


def test_no_cache_is_left_where_a_run_is_refused(seen, tmp_path, monkeypatch, capsys):
    from sage_fast.data import pixel_cache

    monkeypatch.setattr(pixel_cache, "IN_MEMORY", 0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    for command, tiny in (("train", TINY), ("train-gan", TINY_GAN)):
        words = [command, f"--data={seen}", f"--out={tmp_path / 'mine'}", "--resolution=8", *tiny]
        assert cli.main(words) == 2
        assert "is not empty" in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_resolution_above_that_of_the_images_is_refused_unless_asked_for(seen, tmp_path, capsys):
    words = ["train-gan", f"--data={seen}", f"--out={tmp_path / 'run'}", "--resolution=16", *TINY_GAN]
    assert cli.main(words) == 2
    message = capsys.readouterr().err
    assert "24 of 24 images" in message and "smaller than the resolution 16" in message and "at most 8" in message
    assert not (tmp_path / "run").exists()
    assert cli.main([*words, "--upscale"]) == 0


def test_an_interrupted_run_resumes_to_the_same_model(run, seen, tmp_path, monkeypatch):
    words = ["train", f"--data={seen}", f"--out={tmp_path / 'run'}", "--resolution=8", *TINY]

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "embed_stage", interrupt)
        assert cli.main(words) == 130
    assert not (tmp_path / "run" / "bundle.json").exists()
    assert cli.main([*words, "--resume"]) == 0
    assert bundle_files(tmp_path / "run") == bundle_files(run)


def test_resuming_a_finished_run_changes_nothing(run, seen):
    before = bundle_files(run)
    lines = (run / "logs" / "gan.jsonl").read_text()
    assert cli.main(["train", f"--data={seen}", f"--out={run}", "--resolution=8", *TINY, "--resume"]) == 0
    assert bundle_files(run) == before
    assert (run / "logs" / "gan.jsonl").read_text() == lines


def test_a_finished_model_without_checkpoints_is_not_trained_anew_under_resume(run, seen, tmp_path, capsys):
    import shutil

    folder = copy_run(run, tmp_path / "run")
    for name in ("checkpoints", "configs", "logs", "grids"):
        shutil.rmtree(folder / name)
    words = [f"--data={seen}", f"--out={folder}", "--resolution=8"]
    for command, tiny in (("train", TINY), ("train-gan", TINY_GAN)):
        assert cli.main([command, *words, *tiny, "--resume"]) == 2
        assert "holds a finished model and no checkpoints to go on from" in capsys.readouterr().err
    assert bundle_files(folder) == bundle_files(run) and not (folder / "checkpoints").exists()


def test_a_resumed_stage_says_that_it_begins_anew_or_is_done(seen, tmp_path, capsys):
    words = ["train-gan", f"--data={seen}", f"--out={tmp_path / 'run'}", "--resolution=8", *TINY_GAN]
    assert cli.main([*words, "--resume"]) == 0, "a new folder is nothing to be said"
    assert "begins anew" not in capsys.readouterr().out
    assert cli.main([*words, "--resume"]) == 0
    assert "Stage 'gan' has taken all its 4 steps." in capsys.readouterr().out
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.unlink()
    assert cli.main([*words, "--resume"]) == 0
    assert "Stage 'gan' begins anew: it was begun in" in capsys.readouterr().out


def test_one_process_at_a_time_trains_in_a_folder(run, seen, tmp_path, capsys):
    """Another process holds the lock; the folder is as it was, under --resume and under --overwrite, and free when it ends."""
    folder = copy_run(run, tmp_path / "run")
    code = f"""
import sys
from pathlib import Path
import torch
from sage_fast.training.ranks import Ranks
from sage_fast.training.runtime import holding
with holding({str(folder)!r}, Ranks(torch.device("cpu"))), holding({str(folder)!r}, Ranks(torch.device("cpu"))):
    print("held", flush=True)
    sys.stdin.read()
"""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    words = [f"--data={seen}", f"--out={folder}"]
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline().strip() == b"held"
        for command, tiny in (
            ("train", ["--resolution=8", *TINY]), ("train-gan", ["--resolution=8", *TINY_GAN]), ("train-encoder", TINY_ENCODER),
            ("embed", []), ("train-dictionary", TINY_DICTIONARY),
        ):  # fmt: skip
            assert cli.main([command, *words, *tiny, "--resume"]) == 2
            assert f"Another process trains in {str(folder)!r}; wait" in capsys.readouterr().err
        assert cli.main(["train-gan", *words, "--resolution=8", *TINY_GAN, "--overwrite"]) == 2
        assert "Another process trains in" in capsys.readouterr().err
        other.kill()
    now = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".sage_fast.lock"}
    assert now == {path: content for path, content in before.items() if path.name != ".sage_fast.lock"}
    assert cli.main(["train", *words, "--resolution=8", *TINY, "--resume"]) == 0


def test_a_run_with_an_untuned_encoder_is_still_a_generator(seen, tmp_path):
    words = [f"--data={seen}", f"--out={tmp_path / 'run'}"]
    assert cli.main(["train-gan", *words, "--resolution=8", *TINY_GAN]) == 0
    assert cli.main(["train-encoder", *words, *TINY_ENCODER]) == 0
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "a.safetensors")]) == 0
    settings = tmp_path / "run" / "configs" / "encoder.json"
    settings.write_text(settings.read_text().replace('"tune_generator": false', '"tune_generator": true'))
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "b.safetensors")]) == 2


def test_few_images_and_a_wrong_name_of_an_option_are_told_with_the_right_one(seen, tmp_path, capsys):
    words = ["train", f"--data={seen}", f"--out={tmp_path / 'run'}", "--resolution=8", *TINY]
    assert cli.main([*words, "--gan.batch=32"]) == 2
    assert "got 24; give a batch of at most 24 (--batch, of all stages in one --gan.batch)" in capsys.readouterr().err
    assert cli.main([*words, "--batch", "4"]) == 2
    assert "--gan.batch" in capsys.readouterr().err


def copy_run(run: Path, target: Path) -> Path:
    import shutil

    return Path(shutil.copytree(run, target))


def test_a_stage_refuses_a_predecessor_that_changed(run, seen, tmp_path, capsys):
    folder = copy_run(run, tmp_path / "run")
    words = [f"--data={seen}", f"--out={folder}", "--resume"]
    longer = [*TINY_GAN, "--total-kimg=0.032"]
    assert cli.main(["train-gan", *words, "--resolution=8", *longer]) == 0
    capsys.readouterr()
    model = bundle_files(folder)
    for command, tiny in (("train-encoder", TINY_ENCODER), ("embed", []), ("train-dictionary", TINY_DICTIONARY)):
        assert cli.main([command, *words, *tiny]) == 2, "an old encoder does not go with a new generator"
        assert "stage 'encoder'" in (told := capsys.readouterr().err) and "has changed since" in told
    assert bundle_files(folder) == model


def test_a_stage_refuses_an_unfinished_predecessor(run, seen, tmp_path, capsys):
    folder = copy_run(run, tmp_path / "run")
    settings = json.loads((folder / "configs" / "gan.json").read_text())
    (folder / "configs" / "gan.json").write_text(json.dumps({**settings, "total_kimg": 1.0}))
    assert cli.main(["embed", f"--data={seen}", f"--out={folder}", "--resume"]) == 2
    assert "train-gan --resume" in capsys.readouterr().err


def test_the_dictionary_refuses_codes_of_other_images(run, tmp_path, capsys):
    folder = copy_run(run, tmp_path / "run")
    other = write_images(tmp_path / "other", n_categories=2)
    assert cli.main(["train-dictionary", f"--data={other}", f"--out={folder}", "--resume", *TINY_DICTIONARY]) == 2
    assert "other images" in capsys.readouterr().err


def test_a_dry_run_looks_at_the_output_too(tiny_bundle, tiny_shots, tmp_path, capsys):
    words = ["generate", f"--model={tiny_bundle}", f"--shots={tiny_shots}", "-n", "2", "--dry-run"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").touch()
    for out, told in (
        ("foo://x", "cannot be opened"),
        (str(tiny_shots), "overlap"),
        (str(tmp_path / "full"), "is not empty"),
    ):
        assert cli.main([*words, f"--out={out}"]) == 2
        assert told in capsys.readouterr().err
    assert cli.main([*words, f"--preview={tmp_path / 'x.png'}"]) == 2
    assert "give one of them" in capsys.readouterr().err
    assert cli.main([*words, f"--out={tmp_path / 'new'}"]) == 0
    assert "Nothing was written" in capsys.readouterr().out and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["data", "flora", "--n-per-category=1", "--which=unseen"],
        ["data", "split", "--data={seen}", "--n-unseen=1", "--n-shots=2"],
        ["invert", "--images={seen}", "--steps=1"],
        ["train-gan", "--data={seen}", "--resolution=8", *TINY_GAN],
    ],
    ids=str,
)
def test_a_url_is_no_folder(seen, tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    for url in ("s3://bucket/x", "memory://x"):
        assert cli.main([*(word.format(seen=seen) for word in words), f"--out={url}"]) == 2
        assert "reads like a URL" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert (
        cli.main(["train-gan", "--data=s3://bucket/x", f"--out={tmp_path / 'run'}", "--resolution=8", *TINY_GAN]) == 2
    )
    assert "is read from files of this machine alone" in capsys.readouterr().err


def test_inspect_says_nothing_where_there_is_nothing(tmp_path, capsys):
    torch.save({"alien.weight": torch.zeros(3)}, tmp_path / "alien.pt")
    assert cli.main(["inspect", str(tmp_path / "alien.pt")]) == 0
    said = capsys.readouterr().out
    assert "\nloads: nothing\nconverts to: nothing\n" in said


def test_data_split_divides_a_folder(tmp_path, capsys):
    data = write_images(tmp_path / "data", n_categories=4)
    words = ["data", "split", f"--data={data}", "--n-shots=2"]
    assert cli.main([*words, f"--out={tmp_path / 'a'}", "--n-unseen=1"]) == 0
    assert f"{tmp_path / 'a' / 'shots'}: 2 images" in capsys.readouterr().out
    assert cli.main([*words, f"--out={tmp_path / 'b'}", f"--split={tmp_path / 'a' / 'split.json'}"]) == 0
    names = [sorted(p.relative_to(tmp_path / out) for p in (tmp_path / out).rglob("*.png")) for out in "ab"]
    assert names[0] == names[1] != []
    capsys.readouterr()
    assert cli.main([*words, f"--out={tmp_path / 'c'}", "--split=x", "--n-unseen=1"]) == 2
    assert cli.main(["data", "splitt"]) == 2
    assert [line.count("; ") for line in capsys.readouterr().err.splitlines()] == [1, 1]


def test_embed_does_not_replace_the_codes_of_other_images(run, tmp_path, capsys):
    folder = copy_run(run, tmp_path / "run")
    codes, other = folder / "checkpoints" / "codes.safetensors", write_images(tmp_path / "other", n_categories=2)
    before = codes.read_bytes()
    assert cli.main(["embed", f"--data={other}", f"--out={folder}", "--resume"]) == 2
    assert f"delete {codes}" in capsys.readouterr().err and codes.read_bytes() == before
    codes.unlink()
    assert cli.main(["embed", f"--data={other}", f"--out={folder}"]) == 0
    assert "of 2 categories" in capsys.readouterr().out


def test_a_stage_run_twice_asks_for_resume(run, seen, capsys):
    assert cli.main(["train-encoder", f"--data={seen}", f"--out={run}", *TINY_ENCODER]) == 2
    assert "--resume" in capsys.readouterr().err
    assert cli.main(["embed", f"--data={seen}", f"--out={run}"]) == 2
    assert "--resume" in capsys.readouterr().err


# --- the road of images ----------------------------------------------------------------------------------------------


def test_generate_then_evaluate(tiny_bundle, tiny_shots, tmp_path, capsys):
    words = ["generate", f"--model={tiny_bundle}", f"--shots={tiny_shots}", f"--out={tmp_path / 'out'}"]
    assert cli.main([*words, "-n", "3", "--fusion", "both", "--seed", "7"]) == 0
    said = capsys.readouterr().out
    assert "6 images of 2 categories" in said and str(tmp_path / "out" / "contact_sheet.png") in said
    assert len(list((tmp_path / "out").glob("*/*.png"))) == 6
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [(part["n"], part["fusion"], part["seed"]) for part in settings["plan"]] == 2 * [(3, "both", 7)]

    words = ["evaluate", f"--model={tiny_bundle}", f"--generated={tmp_path / 'out'}", f"--real={tiny_shots}"]
    assert cli.main([*words, f"--out={tmp_path / 'report'}"]) == 0
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["rows"]["generated"]["n_images"] == 6
    assert "| generated |" in said and str(tmp_path / "report" / "report.md") in said
    assert not (tmp_path / "out" / "report.md").exists()
    archive = shutil.make_archive(str(tmp_path / "real"), "gztar", tiny_shots)
    assert cli.main([*words[:-1], f"--real={archive}", f"--out={tmp_path / 'again'}"]) == 0
    assert (tmp_path / "again" / "report.json").read_bytes() == (tmp_path / "report" / "report.json").read_bytes()


def test_generate_resumes(tiny_bundle, tiny_shots, tmp_path, capsys):
    words = ["generate", f"--model={tiny_bundle}", f"--shots={tiny_shots}", f"--out={tmp_path / 'out'}"]
    assert cli.main([*words, "-n", "2"]) == 0
    assert cli.main([*words, "-n", "2", "--resume"]) == 0
    assert "0 images" in (said := capsys.readouterr().out.splitlines()[-1]) and "4 were there already" in said
    assert cli.main([*words, "-n", "5", "--resume"]) == 0
    assert "10 images" in capsys.readouterr().out  # the plan's one shard is another


def test_generate_says_what_it_would_do_and_shows_some(tiny_bundle, tiny_shots, tmp_path, capsys):
    words = ["generate", f"--model={tiny_bundle}", f"--shots={tiny_shots}", f"--out={tmp_path / 'out'}", "-n", "1000"]
    assert cli.main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "2,000 images of 2 categories in 4 shards: about" in said
    assert "Memory: at most" in said and "micro-batch" in said and said.count("\n") == 1
    assert cli.main([*words, f"--preview={tmp_path / 'sheet.png'}"]) == 0
    assert (tmp_path / "sheet.png").exists() and not (tmp_path / "out").exists()


MAPPED = ["--method=sage", "--method=sage-q", "--method=sage --dry-run", "--method=sage --preset=paper"]


@pytest.mark.parametrize("options", [*MAPPED, "--method=sage-i", "--method=age", "--method=inversion", "enough"])
def test_generate_warns_where_the_mapping_would_lose_new_categories(
    tiny_bundle, bundle_of_few, tiny_shots, tmp_path, capsys, options
):
    model, options = (tiny_bundle, "--method=sage") if options == "enough" else (bundle_of_few, options)
    words = ["generate", f"--model={model}", f"--shots={tiny_shots}", f"--out={tmp_path / 'out'}", "-n", "2"]
    assert cli.main([*words, *options.split()]) == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if "warning: The class embedding mapping" in line]
    assert len(warned) == (options in MAPPED and model == bundle_of_few)  # once, though the plan has two kinds of parts
    assert all("6 seen categories" in line and line.endswith("take --method sage-i.") for line in warned)


def test_of_several_ranks_the_first_warns(bundle_of_few, tiny_shots, tmp_path, capsys, monkeypatch):
    words = ["generate", f"--model={bundle_of_few}", f"--shots={tiny_shots}", "-n", "2", "--dry-run"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert cli.main(words) == 0
        assert ("class embedding mapping" in capsys.readouterr().err) == (rank == 0)


@pytest.mark.parametrize(
    ("place", "complaint"),
    [
        ("sheet.jpg", "preview must be a file that ends in .png, got"),
        ("no/sheet.png", "preview must be a file in a folder that is there"),
    ],
)
def test_a_preview_that_could_not_be_is_refused_at_once(tiny_bundle, tiny_shots, tmp_path, capsys, place, complaint):
    words = ["generate", f"--model={tiny_bundle}", f"--shots={tiny_shots}", f"--preview={tmp_path / place}"]
    assert cli.main(words) == 2
    assert complaint in capsys.readouterr().err and not list(tmp_path.iterdir())


HEAVY = {
    "IPython", "cupy", "lightning", "lpips", "matplotlib", "onnx", "onnxruntime", "onnxscript", "pandas", "pyarrow",
    "pytorch_lightning", "ray", "scipy", "sklearn", "sympy", "tensorboard", "timm", "torch._dynamo", "torch._inductor",
    "torchmetrics", "torchvision", "transformers", "webdataset", "sage_fast.evaluation", "sage_fast.mixing",
    "sage_fast.training",
}  # fmt: skip


@pytest.mark.parametrize(
    "words", [["--dry-run"], ["--out=out", "-n", "2"], ["--out=memory://out", "--format=webdataset"]]
)
def test_generate_imports_nothing_heavy(tiny_bundle, tiny_shots, tmp_path, words):
    program = (
        "import sys; from sage_fast import cli; done = cli.main(sys.argv[1:]); print(*sys.modules); sys.exit(done)"
    )
    given = ["generate", f"--model={tiny_bundle}", f"--shots={tiny_shots}", "-n", "2", *words]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", program, *given]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "sage_fast.generation.run" in loaded and not loaded & HEAVY


def test_generate_from_a_plan_verify_and_regenerate(tiny_bundle, tiny_shots, tmp_path, capsys):
    plan, out = tmp_path / "plan.csv", tmp_path / "out"
    plan.write_text("category,n,alpha\nrose,3,0.5\nrose,2,2\nlily,4,\n")
    words = ["generate", f"--plan={plan}", f"--shots={tiny_shots}", f"--model={tiny_bundle}", f"--out={out}"]
    assert cli.main(words) == 0
    assert cli.main(["verify", str(out)]) == 0
    assert "9 images of 2 categories: all there, whole and as recorded." in capsys.readouterr().out
    again = [f"--out={tmp_path / 'again.png'}", f"--model={tiny_bundle}"]
    assert cli.main(["regenerate", str(out / "manifest.jsonl"), "4", *again]) == 0
    assert "has the recorded bytes" in capsys.readouterr().out
    assert (tmp_path / "again.png").read_bytes() == (out / "rose" / "rose_00004.png").read_bytes()
    (out / "rose" / "rose_00001.png").write_bytes(b"x")
    assert cli.main(["verify", str(out)]) == 2
    assert "'rose/rose_00001.png', image 1, is not the file" in (said := capsys.readouterr().err)
    assert "'verify --repair', then 'generate --resume'" in said and said.count("\n") == 1
    assert cli.main(["generate", f"--plan={plan}"]) == 2
    assert "generate needs --out" in capsys.readouterr().err


def test_invert_projects_a_folder_and_resumes(tiny_bundle, tiny_shots, tmp_path, capsys):
    words = ["invert", f"--model={tiny_bundle}", f"--images={tiny_shots}", f"--out={tmp_path / 'out'}"]
    words += ["--space=w", "--method=adam", "--steps=3", "--batch=2"]
    assert cli.main(words) == 0
    assert "5 images were projected, mean loss" in (said := capsys.readouterr().out) and str(tmp_path / "out") in said
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["space"], config["method"], config["batch"]) == ("w", "adam", 2)
    assert cli.main([*words, "--resume"]) == 0
    assert "0 images were projected, 5 were there already" in capsys.readouterr().out
    assert cli.main([*words[:-4], "--space=z"]) == 2
    assert "space must be one of w, w_plus" in capsys.readouterr().err


def test_flora_is_written(tmp_path):
    words = ["data", "flora", f"--out={tmp_path / 'flora'}", "--which=unseen", "--n-per-category=2", "--resolution=8"]
    assert cli.main(words) == 0
    images = list((tmp_path / "flora").glob("*/*.png"))
    assert len(images) == 80 and Image.open(images[0]).size == (8, 8)
    assert (tmp_path / "flora" / "factors.csv").read_text().count("\n") == 81


@pytest.mark.parametrize("command", [*(c for c in cli.COMMANDS if c != "data"), "data flora", "data split"])
def test_help_has_words_for_every_option(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([*command.split(), "--help"]) == 0
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines() if line.startswith("│ ")]
    options = re.split(r"^(?=--[a-z])", "\n".join(lines), flags=re.MULTILINE)[1:]
    assert options
    wordless = r"(\S+)(?: (?:PATH|STR|INT|FLOAT|[{\[]\S+(?: \[STR \.\.\.\]\])?))?\s+\((?:default|required).*"
    assert not [option for option in options if re.match(wordless, option)]
    named = [re.match(r"([A-Z-]+)\s+(\S+) \(required\)", line) for line in lines]
    assert not [found for found in named if found and found[1].lower() == found[2]]


def test_info_is_for_people_or_for_programs(capsys):
    assert cli.main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out
    assert report and all(f"{key}" in lines for key in report)


# --- public names -----------------------------------------------------------------------------------------------------


def test_public_names_are_the_things_they_name():
    import sage_fast

    for name, home in sage_fast._HOMES.items():
        module = __import__(f"sage_fast.{home}", fromlist=[name])
        assert getattr(sage_fast, name) is getattr(module, name)
    assert set(sage_fast.__all__) <= set(dir(sage_fast))
    with pytest.raises(AttributeError, match="nonsense"):
        sage_fast.nonsense  # noqa: B018


def test_type_checkers_and_python_are_told_the_same_names():
    import ast

    import sage_fast

    tree = ast.parse(Path(sage_fast.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    hints = {
        (alias.asname, node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert hints == {(name, f"sage_fast.{home}") for name, home in sage_fast._HOMES.items()} | {("ops", "sage_fast")}


@pytest.mark.parametrize(("number", "code"), [(15, 143), (2, 130)])
def test_a_run_that_a_signal_stopped(monkeypatch, capsys, number, code):
    def stop(argv):
        raise Stopped("stage 'gan' was stopped; --resume goes on.", number)

    monkeypatch.setitem(cli.COMMANDS, "train", (stop, ""))
    assert cli.main(["train"]) == code
    assert capsys.readouterr().err == "sage-fast: stage 'gan' was stopped; --resume goes on.\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "generate --shots x --out y -n abc",
            "--n must be a whole number, got 'abc'; see sage-fast generate --help.",
        ),
        ("generate --shots x --out y --alpha much", "--alpha must be a number or None, got 'much'; see sage"),
        ("generate --shots x --out y --quality 9.5", "--quality must be a whole number or None, got '9.5'; see sage"),
        ("train --data x --out y --gan.lr fast", "--gan.lr must be a number, got 'fast'; see sage-fast train --help."),
        ("quality --real x --features y --noise loud", "--noise must be one of random, const, none, got 'loud'; see"),
        ("regenerate x first", "NUMBER must be a whole number, got 'first'; see sage-fast regenerate --help."),
        (
            "generate --shot x --out y",
            "Unrecognized options: --shot, x; perhaps you meant --n-shots or --shots; see sage",
        ),
        ("train-gan --out y", "train-gan needs --data; see sage-fast train-gan --help."),
        ("quality --fooo x", "quality needs --real and --features and does not know --fooo x; see sage-fast quality"),
        ("verify", "verify needs output folder of generate, or its URL; see sage-fast verify --help."),
        ("generate --shots", "--shots needs a value; see sage-fast generate --help."),
        (
            "train-gan --data a --out b --accum 3 --xx=4",
            "Unrecognized options: --accum, 3, --xx=4; perhaps you meant --acc",
        ),
    ],
)
def test_words_that_the_parser_refuses_get_one_sentence(words, expected, capsys):
    assert cli.main(words.split()) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith(f"sage-fast: {expected}") and complaint.endswith(" --help.\n")
    assert complaint.count("\n") == 1 and "\u2502" not in complaint


def test_the_help_has_no_marks_of_a_docstring_and_keeps_its_frame(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = {}
    for name in ("generate", "invert", "regenerate", "export", "train"):
        assert cli.main([name, "--help"]) == 0
        shown[name] = capsys.readouterr().out
        assert "``" not in shown[name] and ":func:" not in shown[name]
        assert len({len(line) for line in shown[name].splitlines() if line[:1] in ("│", "╭", "╰")}) == 1
    assert "│ --method STR      sage, sage-q, sage-i, age, or inversion" in shown["generate"]
    assert "│ --space STR    one latent for all layers (w)" in shown["invert"]
    assert "--help" not in shown["regenerate"].splitlines()[0] and " MANIFEST NUMBER " in shown["regenerate"]
    assert "│ NUMBER               which line, from 0" in shown["regenerate"]
    assert "[SOURCE]" in shown["export"]
    assert "Settings of train_gan." in shown["train"]
    (switch,) = [line for line in shown["train"].splitlines() if "--gan.no-flip" in line]
    assert "do not mirror" in switch and "(default: True)" not in switch  # flip is on until the switch is given


def test_every_option_s_help_stands_beside_it():
    """The parser takes a comment on the line of the option alone; one that is too long is moved to the next by the formatter."""
    for path in sorted(Path(cli.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            wrapped = isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Constant)
            assert not wrapped or node.lineno == node.end_lineno, f"{path}:{node.lineno}"
