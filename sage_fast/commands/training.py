"""The commands that train: all stages in one, and each alone."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sage_fast.commands.parsing import parse, usable_device, value_of
from sage_fast.errors import InputError, counted
from sage_fast.settings import check_ignored, check_numbers


@dataclass(frozen=True)
class Data:
    """Where a training command reads and writes."""

    data: Path  # seen categories: a folder <category>/<image>.png, a .zip or .tar of one, or WebDataset shards
    out: Path  # run folder
    resume: bool = False  # go on where an earlier run stopped
    device: str = "auto"  # "auto" (a GPU when there is one), "cpu", "cuda", "cuda:1", ...
    cache: Path | None = None  # folder for the decoded images; None: OUT/cache when they are many, else memory
    upscale: bool = False  # allow a resolution above that of the images


@dataclass(frozen=True)
class NewData(Data):
    """Where a training command that begins a run reads and writes."""

    overwrite: bool = False  # empty the run folder first; only one that sage-fast made


@dataclass(frozen=True)
class MeasureOptions:
    """What the generator is measured by while it trains, every ``measure_every_kimg``; docs/quality.md."""

    measure: str | None = None  # a weights file (SqueezeNet 1.1, VGG), lpips-..., or oracle (flora's); None: nothing
    measure_images: int = 2048  # generated a measurement
    held_out: float = 0.05  # share of the images, at most 2,000, to measure against and not to train on
    measure_against: Path | None = None  # folder of other images of the same categories, in place of that share

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.measure is None:
            check_ignored(self, ("measure_images", "held_out", "measure_against"), "--measure")
        if self.measure_against is not None and self.held_out != MeasureOptions.held_out:
            raise InputError("--measure-against takes the place of --held-out; give one of them.")


@dataclass(frozen=True)
class EncoderData(NewData):
    """Where ``train-encoder`` reads and writes."""

    generator: Path | None = None  # begin the run with the generator of this bundle or file in place of train-gan

    def __post_init__(self) -> None:
        if self.overwrite and self.generator is None:
            raise InputError(
                "--overwrite would delete the generator that the encoder is for; it goes with --generator."
            )


@dataclass(frozen=True)
class EmbedOptions:
    """Options of ``embed``."""

    batch: int = 64  # images the encoder takes at a time

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise InputError(f"batch must be at least 1, got {self.batch}.")


@dataclass(frozen=True)
class Preset:
    """Which reading of the method the settings below start from."""

    preset: Literal["paper", "released", "default"] = "default"  # as printed, as released, or what works here


@dataclass(frozen=True)
class GanPreset:
    """Which settings of the generator's training the settings below start from."""

    #: small: 32 or 64 px on a CPU; auto: by resolution, images and GPUs; the others and their numbers: docs/training.md
    preset_gan: Literal["flora", "small", "low_shot", "paper256", "config_f", "auto"] | None = None


@dataclass(frozen=True)
class EncoderPreset:
    """Which settings of the encoder's training the settings below start from."""

    preset_encoder: Literal["small"] | None = None  # small: 32 or 64 px on a CPU, the generator tuned beside it


def train(argv: Sequence[str]) -> None:
    """Train every stage in one run folder."""
    from sage_fast.training.dictionary import DictionaryConfig
    from sage_fast.training.ranks import join_ranks
    from sage_fast.training.stages import TrainConfig, train_all

    dictionary = DictionaryConfig.preset(_preset_of(argv))
    start = TrainConfig(gan=_gan_start(argv), encoder=_encoder_start(argv), dictionary=dictionary)
    parts = (NewData, Preset, GanPreset, EncoderPreset, MeasureOptions(), start)
    paths, _, _, _, options, config = parse("train", argv, *parts)
    _check_measured(config.gan, options)
    device = usable_device(paths.device)
    places = (paths.resume, paths.overwrite, device, paths.cache, paths.upscale)
    with join_ranks(device) as ranks:
        folder = train_all(config, paths.data, paths.out, *places, partial(_to_measure, options, ranks))
    if ranks.is_first:
        print(_finished(folder))


def train_gan(argv: Sequence[str]) -> None:
    """Train generator and discriminator."""
    from sage_fast.training.checks import check_gan
    from sage_fast.training.ranks import first_then_all, join_ranks, restarted
    from sage_fast.training.reals import as_reals
    from sage_fast.training.runtime import check_run_folder, holding, open_run_folder
    from sage_fast.training.stages import gan_stage, read_seen

    paths, _, options, config = parse("train-gan", argv, NewData, GanPreset, MeasureOptions(), _gan_start(argv))
    _check_measured(config, options)
    device = usable_device(paths.device)
    needs_two = "--conditional, which may be left out, makes a class of each" if config.conditional else None
    seen = (paths.data, config.resolution, config.n_channels, paths.out, paths.cache, paths.upscale, needs_two)
    with join_ranks(device) as ranks:
        check_run_folder(paths.out, ranks, paths.resume, paths.overwrite, [config.transfer_from])
        ranks.once(lambda: check_gan(config, ranks, paths.resume or restarted()))
        images = first_then_all(ranks, lambda: read_seen(*seen))
        watched = _to_measure(options, ranks, images)
        as_reals(watched.images, config)
        with holding(paths.out, ranks):
            folder = open_run_folder(paths.out, ranks, paths.resume, paths.overwrite)
            gan_stage(config, watched.images, folder, paths.resume, device, watched.measure, watched.held_out)
    if ranks.is_first:
        print(
            f"The generator is in {folder}, some of its images in {folder / 'grids'}; {_next('train-encoder', paths)}"
        )


def train_encoder(argv: Sequence[str]) -> None:
    """Train the encoder of a run folder, or of a generator that comes from elsewhere."""
    from sage_fast.training.ranks import first_then_all, join_ranks
    from sage_fast.training.runtime import check_run_folder, holding, open_run_folder
    from sage_fast.training.stages import adopt_generator, check_given, encoder_stage, read_seen, read_seen_of_run

    paths, _, config = parse("train-encoder", argv, EncoderData, EncoderPreset, _encoder_start(argv))
    device = usable_device(paths.device)
    source, reading = paths.generator, (paths.cache, paths.upscale)
    with join_ranks(device) as ranks:
        if source is None:
            images = first_then_all(ranks, lambda: read_seen_of_run(paths.data, paths.out, "encoder", *reading))
        else:
            check_run_folder(paths.out, ranks, paths.resume, paths.overwrite, [source])
            side, n_channels = ranks.once(lambda: check_given(config, source, ranks))
            images = first_then_all(ranks, lambda: read_seen(paths.data, side, n_channels, paths.out, *reading))
        with holding(paths.out, ranks):
            if source is not None:
                folder = open_run_folder(paths.out, ranks, paths.resume, paths.overwrite)
                ranks.once(lambda: adopt_generator(source, folder))
            encoder_stage(config, images, paths.out, paths.resume, device)
    if ranks.is_first:
        grids = paths.out / "grids"
        print(f"The encoder is in {paths.out}, some reconstructions in {grids}; {_next('embed', paths)}")


def embed(argv: Sequence[str]) -> None:
    """Write the codes of every image."""
    from sage_fast.training.ranks import first_then_all, join_ranks
    from sage_fast.training.runtime import holding
    from sage_fast.training.stages import embed_stage, read_seen_of_run

    paths, options = parse("embed", argv, Data, EmbedOptions())
    device = usable_device(paths.device)
    with join_ranks(device) as ranks:
        images = first_then_all(
            ranks, lambda: read_seen_of_run(paths.data, paths.out, "embed", paths.cache, paths.upscale)
        )
        with holding(paths.out, ranks):
            table = embed_stage(images, paths.out, options.batch, paths.resume, device)
    if ranks.is_first:
        codes, categories = counted(len(table), "code"), counted(len(table.categories), "category")
        are = "is" if len(table) == 1 else "are"
        print(f"{codes} of {categories} {are} in {paths.out}; {_next('train-dictionary', paths)}")


def train_dictionary(argv: Sequence[str]) -> None:
    """Train the category-irrelevant directions and write the model."""
    from sage_fast.training.dictionary import DictionaryConfig
    from sage_fast.training.ranks import first_then_all, join_ranks
    from sage_fast.training.runtime import holding
    from sage_fast.training.stages import (
        BundleConfig,
        bundle_stage,
        check_bundle,
        dictionary_stage,
        read_seen_of_run,
    )

    start = DictionaryConfig.preset(_preset_of(argv))
    bundle = make_dataclass("Bundle", [("bundle", BundleConfig, field(default=BundleConfig()))], frozen=True)
    paths, _, config, written = parse("train-dictionary", argv, Data, Preset, start, bundle())
    device = usable_device(paths.device)
    with join_ranks(device) as ranks:
        ranks.once(lambda: check_bundle(paths.out, written.bundle))
        images = first_then_all(
            ranks, lambda: read_seen_of_run(paths.data, paths.out, "dictionary", paths.cache, paths.upscale)
        )
        with holding(paths.out, ranks):
            dictionary_stage(config, images, paths.out, paths.resume, device)
            folder = bundle_stage(paths.out, written.bundle, ranks)
    if ranks.is_first:
        print(_finished(folder))


def _next(command: str, paths: Data) -> str:
    """What to type after a stage that has run alone."""
    return f"next: {shlex.join(['sage-fast', command, '--data', str(paths.data), '--out', str(paths.out)])}"


def _finished(folder: Path) -> str:
    return f"The model is in {folder}; 'sage-fast generate --model {folder} --shots ... --out ...' uses it."


def _check_measured(config: Any, options: MeasureOptions) -> None:
    """Refuse settings of measurements where there are none."""
    if options.measure is None:
        check_ignored(config, ("measure_every_kimg", "patience"), "--measure")


def _to_measure(options: MeasureOptions, ranks: Any, images: Any) -> Any:
    """The images to train on, and the measure of ``options``, which the first rank takes for all; None without one."""
    from sage_fast.training.watching import Watched

    if options.measure is None:
        return Watched(images)
    from sage_fast.evaluation.quality import QualityConfig, watched

    config = QualityConfig(n_images=options.measure_images)
    found = watched(images, options.measure, config, options.held_out, options.measure_against)
    quality = found.measure
    assert quality is not None
    return found._replace(measure=lambda generator: ranks.once(lambda: quality(generator)))


def _preset_of(argv: Sequence[str]) -> str:
    """The value of ``--preset``: it decides the defaults, so it is needed before the rest is parsed."""
    value = value_of(argv, "--preset")
    return value if value in ("paper", "released") else "default"


def _encoder_start(argv: Sequence[str]) -> Any:
    """The ``EncoderConfig`` that ``--preset-encoder`` names."""
    from sage_fast.training import presets
    from sage_fast.training.encoder import EncoderConfig

    if value_of(argv, "--preset-encoder", "--preset_encoder") != "small":
        return EncoderConfig()
    tuned = {"--no-tune-generator", "--encoder.no-tune-generator"}.isdisjoint(word.replace("_", "-") for word in argv)
    perceptual = value_of(argv, "--perceptual", "--encoder.perceptual")
    start = presets.small_encoder(tuned, perceptual or EncoderConfig.perceptual)
    return replace(start, tune_generator=True)  # what is on has the option that turns it off


def _gan_start(argv: Sequence[str]) -> Any:
    """The ``GANConfig`` that ``--preset-gan`` names, for the resolution, images and devices that are given with it."""
    from sage_fast.training import presets
    from sage_fast.training.gan import GANConfig

    name = value_of(argv, "--preset-gan", "--preset_gan")
    if name not in presets.NAMES:
        return GANConfig()
    size, data = value_of(argv, "--resolution", "--gan.resolution"), value_of(argv, "--data")
    n_images = n_devices = 0
    if name == "auto" and data is not None:
        from sage_fast.data.sources import open_source

        on_gpu = usable_device(value_of(argv, "--device") or "auto") != "cpu"
        n_images = len(open_source(data, flat_ok=True))
        n_devices = int(os.environ.get("WORLD_SIZE", "1")) if on_gpu else 0
    source = value_of(argv, "--transfer-from", "--gan.transfer-from")
    return presets.preset(name, int(size) if size and size.isdigit() else None, n_images, n_devices, source)
