"""The commands that look: at files of networks, images, runs, and at what is built here."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sage_fast.commands.parsing import parse, usable_device
from sage_fast.commands.watching import bar
from sage_fast.errors import InputError


@dataclass(frozen=True)
class EvaluatePaths:
    """What ``evaluate`` compares."""

    generated: Path  # output folder of generate, in any format, or an archive or shards of images
    real: Path  # real images of the same categories: <category>/<image>.png, or an archive or shards of them
    model: Path | None = None  # run folder or bundle; None: the model that comes with the package
    out: Path | None = None  # folder for report.md and report.json; None: the generated folder
    features: str | None = None  # oracle, discriminator (the model's), lpips-... or a weights file; docs/quality.md
    oracle: Path | None = None  # folder of another oracle of flora, for models of another resolution


@dataclass(frozen=True)
class InspectPaths:
    """What ``inspect`` looks at."""

    positional: ClassVar[bool] = True
    file: Path  # a file of any published format, or a bundle folder


@dataclass(frozen=True)
class QualityPaths:
    """What ``quality`` compares."""

    real: Path  # images it was not trained on: <category>/<image>.png, one flat folder, an archive or shards of them
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
class InfoOptions:
    """Options of ``info``, ``inspect`` and ``runs``."""

    json: bool = False  # for programs


@dataclass(frozen=True)
class ProfileOptions:
    """What ``profile`` looks at."""

    model: Path | None = None  # run folder, bundle or published file; None: a network with random weights
    trace: Path | None = None  # file for a Chrome trace of one call
    device: str = "auto"  # "auto" (a GPU when there is one), "cpu", "cuda", "cuda:1", ...


def evaluate(argv: Sequence[str]) -> None:
    """Compare generated images with real ones and write a report."""
    (paths,) = parse("evaluate", argv, EvaluatePaths)
    from sage_fast.evaluation.report import evaluate_folder, table, write_report
    from sage_fast.generation.checksums import MANIFEST

    if paths.out is None and not paths.generated.is_dir():
        raise InputError(
            f"--generated must be a folder, which gets the report, got {str(paths.generated)!r}; give --out, or a folder."
        )
    if paths.out is None and (paths.generated.resolve().parent / MANIFEST).is_file():
        raise InputError(
            f"--generated {str(paths.generated)!r} lies in an output of generate, which holds nothing but its images; give --out."
        )
    oracle = None
    if paths.oracle is not None:
        from sage_fast.evaluation.oracle import load_oracle

        oracle = load_oracle(paths.oracle)
    scores = evaluate_folder(paths.model, paths.generated, paths.real, oracle=oracle, features=paths.features)
    report = write_report(paths.out or paths.generated, scores)
    print(f"{table({'generated': scores})}\n\nWhat the numbers mean, and the scores of each category: {report}")


def inspect(argv: Sequence[str]) -> None:
    """Print what a file of networks holds."""
    paths, options = parse("inspect", argv, InspectPaths, InfoOptions())
    from sage_fast.conversion import describe

    report = describe(paths.file)
    print(json.dumps(report, indent=2) if options.json else "\n".join(_lines(report)))


def quality(argv: Sequence[str]) -> None:
    """Measure a generator against images that it was not trained on."""
    from sage_fast.evaluation.quality import QualityConfig, measure_folder

    argv = ["--n-images" if word == "-n" else word for word in argv]
    paths, config = parse("quality", argv, QualityPaths, QualityConfig())
    with bar("reading") as progress:
        device = usable_device(paths.device)
        scores = measure_folder(paths.model, paths.real, paths.features, config, device, progress)
    print("\n".join(f"{name:<28}{value:.5g}" for name, value in scores.items()))


def curves(argv: Sequence[str]) -> None:
    """Draw the losses and scores of a run."""
    paths, options = parse("curves", argv, CurvesRun, CurvesOptions())
    from sage_fast.evaluation.curves import write_curves

    print("The curves are in " + ", ".join(map(str, write_curves(paths.run, options.stage))) + ".")


def runs(argv: Sequence[str]) -> None:
    """List the runs below a folder."""
    paths, options = parse("runs", argv, RunsFolder, InfoOptions())
    from rich.console import Console

    from sage_fast.training.runs import as_json, find_runs, table_of_runs

    stages = find_runs(paths.folder)
    if options.json:
        print(as_json(stages))
    elif stages:
        Console().print(table_of_runs(stages))
    else:
        print(f"No runs lie in {paths.folder}.")


def info(argv: Sequence[str]) -> None:
    """Print what was built, and which kernels run where."""
    (options,) = parse("info", argv, InfoOptions())
    from sage_fast.info import build_report

    report = build_report()
    print(json.dumps(report, indent=2, default=str) if options.json else "\n".join(_lines(report)))


def profile(argv: Sequence[str]) -> None:
    """Print where a synthesis spends its time, layer by layer."""
    from sage_fast.models.stylegan2 import Generator
    from sage_fast.models.weights import load_generator
    from sage_fast.profiling import ProfileConfig, profile_synthesis, profile_table

    argv = ["--n" if word == "-n" else word for word in argv]
    options, config = parse("profile", argv, ProfileOptions(), ProfileConfig())
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
    layers, about = profile_synthesis(generator.to(usable_device(options.device)), config, options.trace)
    print(profile_table(layers, about))
    if options.trace is not None:
        print(f"The trace is in {options.trace}; open it with chrome://tracing or https://ui.perfetto.dev.")


def _lines(report: dict[str, Any], indent: str = "") -> list[str]:
    """A nested report as indented lines for people."""
    lines: list[str] = []
    for key, value in report.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}", *_lines(value, indent + "  ")]
        else:
            shown = ", ".join(map(str, value)) or "nothing" if isinstance(value, list | tuple) else value
            lines.append(f"{indent}{key}: {shown}")
    return lines
