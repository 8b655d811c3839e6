"""The words of the shell: ``sage-fast <command> [options]``.

Options are derived from the frozen dataclasses that the commands' functions take. What a user's data, settings or files
cause is one sentence on stderr and exit code 2 (``SAGE_FAST_DEBUG=1`` shows the traceback). Only the command that runs
imports what it needs.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, make_dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from sage_fast.errors import InputError, SageFastWarning, Stopped

__all__ = ["COMMANDS", "main"]


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


@dataclass(frozen=True)
class Preset:
    """Which reading of the method the settings below start from."""

    preset: Literal["paper", "released", "default"] = "default"


@dataclass(frozen=True)
class GanPreset:
    """Which settings of the generator's training the settings below start from."""

    preset_gan: Literal["flora", "small", "low_shot", "paper256", "config_f", "auto"] | None = None  # docs/training.md


@dataclass(frozen=True)
class GeneratePaths:
    """Where ``generate`` reads and writes."""

    out: str | None = (
        None  # folder or URL; gets <category>/<category>_00000.png, manifest.jsonl, contact_sheet.png, config.json, README.md
    )
    shots: Path | None = None  # <category>/<image>.png with 1 to K images each, or one flat folder for one category
    plan: Path | None = (
        None  # .yaml, .json or .csv: categories with counts and settings of their own; docs/generation.md
    )
    model: Path | None = None  # run folder or bundle; None: the model that comes with the package
    dry_run: bool = False  # say what it would make and take, and write nothing
    preview: Path | None = None  # write a contact sheet of some of the images to this PNG, and nothing else
    ray_workers: int | None = None  # draw on so many workers of Ray, those of RAY_ADDRESS if it is set; docs/scaling.md


@dataclass(frozen=True)
class VerifyPaths:
    """What ``verify`` looks at."""

    positional: ClassVar[bool] = True
    out: str  # output folder of generate, or its URL


@dataclass(frozen=True)
class VerifyOptions:
    """Options of ``verify``."""

    repair: bool = False  # forget the shards that are damaged, so that generate --resume draws them again


@dataclass(frozen=True)
class RegeneratePaths:
    """Which image ``regenerate`` makes again."""

    positional: ClassVar[bool] = True
    manifest: str  # manifest.jsonl in the output folder of generate
    number: int  # which line, from 0


@dataclass(frozen=True)
class RegenerateOptions:
    """Options of ``regenerate``."""

    out: Path | None = None  # the file to write; None: the image's name, here
    model: Path | None = None  # run folder or bundle; None: the model that comes with the package
    shots: Path | None = None  # where the shots lie now; None: where they lay


@dataclass(frozen=True)
class InvertPaths:
    """Where ``invert`` reads and writes."""

    images: Path  # <category>/<image>.png, or one flat folder
    out: Path  # gets <category>/<image>.png, latents/, codes.safetensors, manifest.jsonl, config.json
    model: Path | None = None  # bundle or a generator's file; None: the model that comes with the package
    encoder: Path | None = None  # bundle or file with the encoder; None: the bundle's own, none for a generator's file
    mask_dir: Path | None = None  # a grey image of the same path for each image; black hides a pixel from the loss


@dataclass(frozen=True)
class EvaluatePaths:
    """What ``evaluate`` compares."""

    generated: Path  # output folder of generate
    real: Path  # real images of the same categories: <category>/<image>.png, or an archive or shards of them
    model: Path | None = None  # run folder or bundle; None: the model that comes with the package
    out: Path | None = None  # folder for report.md and report.json; None: the generated folder
    features: str | None = (
        None  # a weights file (SqueezeNet 1.1, VGG) or lpips-... to judge by; None: oracle or the model's own
    )
    oracle: Path | None = None  # folder of another oracle of flora, for models of another resolution


@dataclass(frozen=True)
class InspectPaths:
    """What ``inspect`` looks at."""

    positional: ClassVar[bool] = True
    file: Path  # a file of any published format, or a bundle folder


@dataclass(frozen=True)
class ConvertPaths:
    """What ``convert`` reads and writes."""

    positional: ClassVar[bool] = True
    source: Path  # a file of any published format, or a bundle folder
    out: Path  # the file to write


@dataclass(frozen=True)
class ConvertOptions:
    """Options of ``convert``."""

    to: str | None = (
        None  # rosinality, psp, nvlabs, sage_fast or bundle; None: by the ending, .pt rosinality, .safetensors sage_fast
    )


@dataclass(frozen=True)
class QualityPaths:
    """What ``quality`` compares."""

    real: Path  # images the generator was not trained on: <category>/<image>.png, ..., or one flat folder
    features: str  # a weights file (SqueezeNet 1.1, VGG), discriminator (the model's), lpips-..., or oracle (flora's)
    model: Path | None = None  # bundle or a generator's file; None: the model that comes with the package
    device: str = "auto"  # "auto" (a GPU when there is one), "cpu", "cuda", "cuda:1", ...


@dataclass(frozen=True)
class CurvesRun:
    """What ``curves`` draws."""

    positional: ClassVar[bool] = True
    run: Path  # run folder; each stage's picture goes to RUN/grids/<stage>_curves.png


@dataclass(frozen=True)
class CurvesOptions:
    """Options of ``curves``."""

    stage: str | None = None  # gan, encoder, dictionary, ...; None: all


@dataclass(frozen=True)
class RunsFolder:
    """Where ``runs`` looks."""

    positional: ClassVar[bool] = True
    folder: Path  # a run folder, or one with run folders in it


@dataclass(frozen=True)
class ExportSource:
    """What ``export`` reads."""

    positional: ClassVar[bool] = True
    source: Path | None = None  # run folder, bundle or a file of any published format; None: the model of the package


@dataclass(frozen=True)
class ExportOut:
    """Where ``export`` writes."""

    out: Path  # gets mapping, synthesis and encoder, each a file, and export.json


@dataclass(frozen=True)
class InfoOptions:
    """Options of ``info``, ``inspect`` and ``runs``."""

    json: bool = False  # for programs


@dataclass(frozen=True)
class ProfileOptions:
    """What ``profile`` looks at."""

    model: Path | None = None  # run folder, bundle or published file; None: a network with random weights
    trace: Path | None = None  # file for a Chrome trace of one call
    device: str = "auto"  # "auto" (a GPU when there is one), "cpu", "cuda", "cuda:1", ...


@dataclass(frozen=True)
class FloraOptions:
    """Options of ``data flora``."""

    out: Path  # gets <category>/<category>_000000.png and factors.csv
    resolution: int = 32  # pixels
    n_per_category: int = 50
    which: Literal["seen", "unseen", "all"] = "seen"
    first_index: int = 0  # number of the first drawing; another range gives other drawings
    overwrite: bool = False  # empty the folder first; only one that sage-fast made


def _train(argv: Sequence[str]) -> None:
    from sage_fast.training.dictionary import DictionaryConfig
    from sage_fast.training.ranks import join_ranks
    from sage_fast.training.stages import TrainConfig, train_all

    start = TrainConfig(gan=_gan_start(argv), dictionary=DictionaryConfig.preset(_preset_of(argv)))
    paths, _, _, options, config = _parse("train", argv, NewData, Preset, GanPreset, MeasureOptions(), start)
    _check_patience(config.gan, options)
    device = _device(paths.device)
    places = (paths.resume, paths.overwrite, device, paths.cache, paths.upscale)
    with join_ranks(device) as ranks:
        folder = train_all(config, paths.data, paths.out, *places, partial(_to_measure, options, ranks))
    if ranks.is_first:
        print(f"The model is in {folder}; 'sage-fast generate --model {folder} --shots ... --out ...' uses it.")


def _train_gan(argv: Sequence[str]) -> None:
    from sage_fast.training.ranks import first_then_all, join_ranks
    from sage_fast.training.runtime import check_run_folder, open_run_folder
    from sage_fast.training.stages import gan_stage, read_seen

    paths, _, options, config = _parse("train-gan", argv, NewData, GanPreset, MeasureOptions(), _gan_start(argv))
    _check_patience(config, options)
    device = _device(paths.device)
    seen = (paths.data, config.resolution, config.n_channels, paths.out, paths.cache, paths.upscale)
    with join_ranks(device) as ranks:
        check_run_folder(paths.out, ranks, paths.resume, paths.overwrite)
        images = first_then_all(ranks, lambda: read_seen(*seen))
        watched = _to_measure(options, ranks, images)
        folder = open_run_folder(paths.out, ranks, paths.resume, paths.overwrite)
        gan_stage(config, watched.images, folder, paths.resume, device, watched.measure, watched.held_out)


def _check_patience(config: Any, options: MeasureOptions) -> None:
    if config.patience and options.measure is None:
        raise InputError("--patience counts measurements; give --measure too, or leave it out.")


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


def _train_encoder(argv: Sequence[str]) -> None:
    from sage_fast.training.encoder import EncoderConfig
    from sage_fast.training.ranks import first_then_all, join_ranks
    from sage_fast.training.runtime import open_run_folder
    from sage_fast.training.stages import adopt_generator, encoder_stage, read_seen_of_run

    paths, config = _parse("train-encoder", argv, EncoderData, EncoderConfig())
    device = _device(paths.device)
    source = paths.generator
    with join_ranks(device) as ranks:
        if source is not None:
            folder = open_run_folder(paths.out, ranks, paths.resume, paths.overwrite)
            ranks.once(lambda: adopt_generator(source, folder))
        images = first_then_all(
            ranks, lambda: read_seen_of_run(paths.data, paths.out, "encoder", paths.cache, paths.upscale)
        )
        encoder_stage(config, images, paths.out, paths.resume, device)


def _embed(argv: Sequence[str]) -> None:
    from sage_fast.training.ranks import first_then_all, join_ranks
    from sage_fast.training.stages import embed_stage, read_seen_of_run

    paths, options = _parse("embed", argv, Data, EmbedOptions())
    device = _device(paths.device)
    with join_ranks(device) as ranks:
        images = first_then_all(
            ranks, lambda: read_seen_of_run(paths.data, paths.out, "embed", paths.cache, paths.upscale)
        )
        table = embed_stage(images, paths.out, options.batch, paths.resume, device)
    if ranks.is_first:
        print(f"{len(table)} codes of {len(table.categories)} categories are in {paths.out}.")


def _train_dictionary(argv: Sequence[str]) -> None:
    from sage_fast.training.dictionary import DictionaryConfig
    from sage_fast.training.ranks import first_then_all, join_ranks
    from sage_fast.training.stages import bundle_stage, dictionary_stage, read_seen_of_run

    start = DictionaryConfig.preset(_preset_of(argv))
    paths, _, config = _parse("train-dictionary", argv, Data, Preset, start)
    device = _device(paths.device)
    with join_ranks(device) as ranks:
        images = first_then_all(
            ranks, lambda: read_seen_of_run(paths.data, paths.out, "dictionary", paths.cache, paths.upscale)
        )
        dictionary_stage(config, images, paths.out, paths.resume, device)
        folder = bundle_stage(paths.out, ranks=ranks)
    if ranks.is_first:
        print(f"The model is in {folder}.")


def _generate(argv: Sequence[str]) -> None:
    from sage_fast.generation import GenerateConfig, Meter, generate
    from sage_fast.generation.probing import estimate, preview
    from sage_fast.generation.ray_data import generate_on_ray

    argv = ["--n" if word == "-n" else word for word in argv]
    paths, config = _parse("generate", argv, GeneratePaths, GenerateConfig())
    if paths.dry_run:
        print(estimate(paths.model, paths.shots, config, paths.plan))
    elif paths.preview is not None:
        print(f"The contact sheet is {preview(paths.model, paths.shots, paths.preview, config, paths.plan)}.")
    elif paths.out is None:
        raise InputError("generate needs --out, the folder or URL that gets the images (--preview FILE shows some).")
    else:
        meter = Meter()
        run: Callable[..., Any] = generate
        if paths.ray_workers is not None:
            run = partial(generate_on_ray, n_workers=paths.ray_workers)
        with _watched("generating", meter) as progress:
            summary = run(paths.model, paths.shots, paths.out, config, progress, meter, paths.plan)
        print(summary)


def _verify(argv: Sequence[str]) -> None:
    from sage_fast.generation.verifying import verify

    paths, options = _parse("verify", argv, VerifyPaths, VerifyOptions())
    found = verify(paths.out, options.repair)
    if found.problems:
        raise InputError(f"{found} {found.remedy(options.repair)}")
    print(found)


def _regenerate(argv: Sequence[str]) -> None:
    from sage_fast.generation.verifying import regenerate

    paths, options = _parse("regenerate", argv, RegeneratePaths, RegenerateOptions())
    print(regenerate(paths.manifest, paths.number, options.out, options.model, options.shots))


def _invert(argv: Sequence[str]) -> None:
    from sage_fast.inversion import ProjectionConfig
    from sage_fast.reconstruction import InvertConfig, invert

    paths, config, projection = _parse("invert", argv, InvertPaths, InvertConfig(), ProjectionConfig())
    with _bar("projecting") as progress:
        summary = invert(
            paths.model, paths.images, paths.out, config, projection, paths.encoder, paths.mask_dir, progress
        )
    print(summary)


def _evaluate(argv: Sequence[str]) -> None:
    (paths,) = _parse("evaluate", argv, EvaluatePaths)
    from sage_fast.evaluation.report import evaluate_folder, table, write_report

    oracle = None
    if paths.oracle is not None:
        from sage_fast.evaluation.oracle import load_oracle

        oracle = load_oracle(paths.oracle)
    scores = evaluate_folder(paths.model, paths.generated, paths.real, oracle=oracle, features=paths.features)
    report = write_report(paths.out or paths.generated, scores)
    print(f"{table({'generated': scores})}\n\nWhat the numbers mean, and the scores of each category: {report}")


def _inspect(argv: Sequence[str]) -> None:
    paths, options = _parse("inspect", argv, InspectPaths, InfoOptions())
    from sage_fast.conversion import describe

    report = describe(paths.file)
    print(json.dumps(report, indent=2) if options.json else "\n".join(_lines(report)))


def _convert(argv: Sequence[str]) -> None:
    paths, options = _parse("convert", argv, ConvertPaths, ConvertOptions())
    from sage_fast.conversion import convert

    print(f"The networks are in {convert(paths.source, paths.out, options.to)}.")


def _quality(argv: Sequence[str]) -> None:
    from sage_fast.evaluation.quality import QualityConfig, measure_folder

    argv = ["--n-images" if word == "-n" else word for word in argv]
    paths, config = _parse("quality", argv, QualityPaths, QualityConfig())
    with _bar("reading") as progress:
        device = _device(paths.device)
        scores = measure_folder(paths.model, paths.real, paths.features, config, device, progress)
    print("\n".join(f"{name:<28}{value:.5g}" for name, value in scores.items()))


def _curves(argv: Sequence[str]) -> None:
    paths, options = _parse("curves", argv, CurvesRun, CurvesOptions())
    from sage_fast.evaluation.curves import write_curves

    print("The curves are in " + ", ".join(map(str, write_curves(paths.run, options.stage))) + ".")


def _runs(argv: Sequence[str]) -> None:
    paths, options = _parse("runs", argv, RunsFolder, InfoOptions())
    from rich.console import Console

    from sage_fast.training.runs import as_json, find_runs, table_of_runs

    stages = find_runs(paths.folder)
    if options.json:
        print(as_json(stages))
    elif stages:
        Console().print(table_of_runs(stages))
    else:
        print(f"No runs lie in {paths.folder}.")


def _export(argv: Sequence[str]) -> None:
    from sage_fast.export import ExportConfig, export

    target, found, config = _parse("export", argv, ExportOut, ExportSource(), ExportConfig())
    about = export(found.source, target.out, config)
    for name, file in about["files"].items():
        words = [f"{key} [{', '.join(map(str, shape))}]" for key, shape in {**file["inputs"], **file["output"]}.items()]
        print(f"{name}: {', '.join(words[:-1])} -> {words[-1]}; largest difference {file['largest_difference']:.1e}")
    print(
        f"Read back and compared with the networks (tolerance {about['tolerance']:g}); export.json beside them says more."
    )


def _info(argv: Sequence[str]) -> None:
    (options,) = _parse("info", argv, InfoOptions())
    from sage_fast.info import build_report

    report = build_report()
    print(json.dumps(report, indent=2, default=str) if options.json else "\n".join(_lines(report)))


def _profile(argv: Sequence[str]) -> None:
    from sage_fast.models.stylegan2 import Generator
    from sage_fast.models.weights import load_generator
    from sage_fast.profiling import ProfileConfig, profile_synthesis, profile_table

    argv = ["--n" if word == "-n" else word for word in argv]
    options, config = _parse("profile", argv, ProfileOptions(), ProfileConfig())
    sizes = (config.resolution, config.channel_base, config.channel_max)
    if options.model is not None:
        if any(size is not None for size in sizes):
            raise InputError("a model has its own resolution and channels; leave out --resolution and --channel-...")
        generator = load_generator(options.model)
    else:
        resolution, base, most = (given or usual for given, usual in zip(sizes, (256, 16384, 512)))
        generator = Generator(resolution, n_mapping=1, channel_base=base, channel_max=most)
        generator.eval().requires_grad_(config.gradients)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would tell stderr when it starts and stops
    layers, about = profile_synthesis(generator.to(_device(options.device)), config, options.trace)
    print(profile_table(layers, about))
    if options.trace is not None:
        print(f"The trace is in {options.trace}; open it with chrome://tracing or https://ui.perfetto.dev.")


def _data(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: sage-fast data flora --out DIR [options]\n\n  flora   drawn flowers whose factors are known")
        return
    if argv[0] != "flora":
        raise InputError(
            f"sage-fast data knows the data set 'flora', got {argv[0]!r}; try 'sage-fast data flora --help'."
        )
    (options,) = _parse("data flora", argv[1:], FloraOptions)
    from sage_fast.data.flora import write_image_folder

    with _bar("drawing") as progress:
        folder = write_image_folder(**asdict(options), progress=progress)
    print(f"The images and factors.csv are in {folder}.")


def _demo(argv: Sequence[str]) -> None:
    from sage_fast.demo import DemoConfig, run_demo

    (config,) = _parse("demo", argv, DemoConfig())
    run_demo(config)


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "train": (_train, "every stage of training, from a folder of seen categories to a model"),
    "train-gan": (_train_gan, "stage 1: generator and discriminator"),
    "train-encoder": (_train_encoder, "stage 2: the encoder, image to codes"),
    "embed": (_embed, "stage 3: the codes of every image"),
    "train-dictionary": (_train_dictionary, "stage 4: the category-irrelevant directions; writes the model"),
    "generate": (_generate, "new images of novel categories from a few images of each"),
    "verify": (_verify, "whether everything that generate was to make is there, whole and as recorded"),
    "regenerate": (_regenerate, "one image of a manifest again"),
    "invert": (_invert, "the latents of images, by optimisation"),
    "evaluate": (_evaluate, "how well generated images keep their category, and how much they differ"),
    "inspect": (_inspect, "what a file of networks holds, and what can be done with it"),
    "convert": (_convert, "the networks of a file in another format"),
    "quality": (_quality, "how near a generator is to images that it was not trained on"),
    "curves": (_curves, "the losses and scores of a training run as pictures"),
    "runs": (_runs, "the training runs below a folder: stages, steps, losses, scores, time, size"),
    "export": (_export, "the networks as ONNX files or torch.export programs, checked"),
    "info": (_info, "what was built, and which kernels run where"),
    "profile": (_profile, "where a synthesis spends its time, layer by layer"),
    "data": (_data, "write a data set: 'data flora'"),
    "demo": (_demo, "the whole road with the model that comes with the package"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a mistake in what was given, 130 or 143 when SIGINT or SIGTERM ended it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        from sage_fast import __version__

        print(f"sage-fast {__version__}")
        return 0
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.simplefilter("default", SageFastWarning)
        return _run(argv)


def _run(argv: Sequence[str]) -> int:
    try:
        if argv[0] not in COMMANDS:
            raise InputError(f"sage-fast has no command {argv[0]!r}; choose one of {', '.join(COMMANDS)}.")
        COMMANDS[argv[0]][0](argv[1:])
    except BrokenPipeError:  # the reader, say ``head``, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (InputError, OSError) as error:
        if os.environ.get("SAGE_FAST_DEBUG"):
            traceback.print_exc()
        print(f"sage-fast: {_sentence(error)}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # --help, or options that the parser refused
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
    except Stopped as stop:
        print(f"sage-fast: {stop}", file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        print("sage-fast: stopped; the same command with --resume goes on.", file=sys.stderr)
        return 130
    return 0


def _parse(command: str, argv: Sequence[str], *parts: Any) -> tuple[Any, ...]:
    """Fill dataclasses from the words of a command; each part is a class, or an instance that gives the defaults.

    An ``InputError`` of a dataclass's own checks comes out as it is, without the parser's frame around it.
    """
    import tyro

    inline = tyro.conf.arg(name="")  # options of a part bear no prefix
    fields: list[Any] = []
    for number, part in enumerate(parts):
        kind = part if isinstance(part, type) else type(part)
        default = () if isinstance(part, type) else (field(default=part),)
        marked = Annotated[kind, tyro.conf.Positional] if getattr(kind, "positional", False) else kind
        fields.append((f"part_{number}", Annotated[marked, inline], *default))
    printed = io.StringIO()
    try:
        asks = {"-h", "--help"} & set(argv)
        with contextlib.redirect_stderr(printed), contextlib.nullcontext() if asks else _unwrapped():
            filled: Any = tyro.cli(
                make_dataclass("Options", fields),
                prog=f"sage-fast {command}",
                description=COMMANDS[command.split()[0]][1],
                args=list(argv),
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if (error := _cause(stop)) is not None:
            raise error from None
        if stop.code and (complaint := _sentence_of_box(printed.getvalue(), command)) is not None:
            raise InputError(complaint) from None
        sys.stderr.write(printed.getvalue())
        raise
    return tuple(getattr(filled, f"part_{number}") for number in range(len(parts)))


def _sentence_of_box(printed: str, command: str) -> str | None:
    """What the parser drew a frame around, as a sentence; None where it drew none."""
    lines = [line.strip("│ ") for line in printed.splitlines() if line.strip() and line[0] in "│ "]
    ruled = groupby(lines, lambda line: set(line) <= {"─", "-"})
    blocks = [list(block) for is_rule, block in ruled if not is_rule][0 if printed.startswith("╭") else 1 :]  # a title
    if not blocks:
        return None
    said, *others = blocks
    listed = {block[0].split()[0]: block[1:] for block in others}
    if said[0].startswith("Missing from"):
        needs: list[str] = []
        for line in said[1:]:  # an option and what it is, or a word's kind and what it is
            if line.startswith("--") or line.isupper() or not needs:
                needs.append(line.split()[0])
            elif not needs[-1].startswith("--"):
                needs[-1] = line.removesuffix(" (required)")
        unknown = f" and does not know {' '.join(listed['Unrecognized'])}" if "Unrecognized" in listed else ""
        text = f"{command} needs {' and '.join(needs)}{unknown}"
    else:
        text = " ".join(said).rstrip(".")
    meant = [line.split()[0] for name in ("Perhaps", "Arguments") for line in listed.get(name, ()) if line[:2] == "--"]
    perhaps = f"; perhaps you meant {' or '.join(meant[:3])}" if meant else ""
    return f"{text}{perhaps}; see sage-fast {command} --help."


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """The parser's lines are not broken."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000"
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def _cause(error: BaseException | None) -> InputError | None:
    """The ``InputError`` that led to an exception, if one did."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def _preset_of(argv: Sequence[str]) -> str:
    """The value of ``--preset``: it decides the defaults, so it is needed before the rest is parsed."""
    value = _value_of(argv, "--preset")
    return value if value in ("paper", "released") else "default"


def _gan_start(argv: Sequence[str]) -> Any:
    """The ``GANConfig`` that ``--preset-gan`` names, for the resolution, images and devices that are given with it."""
    from sage_fast.training import presets
    from sage_fast.training.gan import GANConfig

    name = _value_of(argv, "--preset-gan", "--preset_gan")
    if name not in presets.NAMES:
        return GANConfig()
    size, data = _value_of(argv, "--resolution", "--gan.resolution"), _value_of(argv, "--data")
    n_images = n_devices = 0
    if name == "auto" and data is not None:
        from sage_fast.data.sources import open_source

        on_gpu = _device(_value_of(argv, "--device") or "auto") != "cpu"
        n_images, n_devices = len(open_source(data)), int(os.environ.get("WORLD_SIZE", "1")) if on_gpu else 0
    source = _value_of(argv, "--transfer-from", "--gan.transfer-from")
    return presets.preset(name, int(size) if size and size.isdigit() else None, n_images, n_devices, source)


def _value_of(argv: Sequence[str], *options: str) -> str | None:
    """The word behind one of ``options`` (``--name word`` or ``--name=word``), or None."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    return next((words[i + 1] for i, word in enumerate(words[:-1]) if word in options), None)


def _device(name: str) -> str:
    """``name``, with "auto" resolved; refuses a device that is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device must be 'auto', 'cpu' or a device that torch can use here, got {name!r}.") from error
    return name


@contextlib.contextmanager
def _bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal's stderr that goes away when done; yields a function of (done, in all)."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def _watched(label: str, meter: Any) -> Iterator[Callable[[int, int], None]]:
    """:func:`_bar` with speed, time to go, how full the queues are and which stage the others wait for."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class State(ProgressColumn):
        def render(self, task: Task) -> Text:
            queued = ", ".join(f"{name} {share:.0%}" for name, share in meter.queued.items())
            return Text(
                f"{meter.speed:.1f} images/s; {meter.slowest} {meter.busy[meter.slowest]:.0%} busy; queued {queued}"
            )

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), State())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(report: dict[str, Any], indent: str = "") -> list[str]:
    """A nested report as indented lines for people."""
    lines: list[str] = []
    for key, value in report.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}", *_lines(value, indent + "  ")]
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            lines.append(f"{indent}{key}: {shown}")
    return lines


def _overview() -> str:
    lines = [f"  {name:<18}{summary}" for name, (_, summary) in COMMANDS.items()]
    head = "usage: sage-fast <command> [options]\n\ncommands:\n"
    return (
        head
        + "\n".join(lines)
        + "\n\n'sage-fast <command> --help' lists its options; 'sage-fast --version' the version."
    )


def _sentence(error: Exception) -> str:
    """One line: an ``InputError``'s own words; for an ``OSError`` the file and the system's reason."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{str(error.filename)!r} cannot be used" if error.filename else "a file cannot be used"
        return f"{where} ({error.strerror}); check the path, its permissions and the free space."
    return " ".join(str(error).split())


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
    """Our warnings as one line without a source line; others as Python shows them."""
    if issubclass(category, SageFastWarning):
        print(f"sage-fast: warning: {' '.join(str(message).split())}", file=sys.stderr)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, *rest[:2]))


if __name__ == "__main__":
    sys.exit(main())
