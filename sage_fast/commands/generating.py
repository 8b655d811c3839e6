"""The commands that make images, and the one that checks them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from sage_fast.commands import SUMMARIES
from sage_fast.commands.parsing import parse
from sage_fast.commands.watching import bar, watched
from sage_fast.errors import InputError, counted


@dataclass(frozen=True)
class GeneratePaths:
    """Where ``generate`` reads and writes."""

    out: str | None = None  # folder or URL; gets images, manifest.jsonl, contact_sheet.png, config.json, README.md
    shots: Path | None = None  # <category>/<image>.png, or one flat folder; of a plan: what its shots are relative to
    plan: Path | None = None  # .yaml, .json or .csv: categories, counts and settings of their own; docs/generation.md
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

    repair: bool = False  # forget what is damaged, so that generate --resume makes it again


@dataclass(frozen=True)
class RegeneratePaths:
    """Which image ``regenerate`` makes again."""

    positional: ClassVar[bool] = True
    #: manifest.jsonl or manifest.parquet of an output of generate; or, with --shots, a copy of one alone
    manifest: str
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
class FloraOptions:
    """Options of ``data flora``."""

    out: Path  # gets <category>/<category>_000000.png and factors.csv
    resolution: int = 32  # pixels
    n_per_category: int = 50  # drawings of each category
    which: Literal["seen", "unseen", "all"] = "seen"  # 200 seen categories, 40 unseen ones, or all
    first_index: int = 0  # number of the first drawing; another range gives other drawings
    overwrite: bool = False  # empty the folder first; only one that sage-fast made


@dataclass(frozen=True)
class SplitOptions:
    """Options of ``data split``."""

    data: Path  # a folder <category>/<image>.png, a .zip or .tar of one, or WebDataset shards
    out: Path  # gets seen/, shots/ and real/, each <category>/<image>, and split.json
    split: Path | None = None  # JSON with lists "seen" and "unseen" of categories; None: drawn by the seed
    n_unseen: int | None = None  # categories to draw as unseen; None: a tenth, at least one
    n_shots: int = 3  # given images of each unseen category; its others are to compare with
    seed: int = 0  # of what is drawn

    def __post_init__(self) -> None:
        if self.split is not None and self.n_unseen is not None:
            raise InputError("--split names the unseen categories, so --n-unseen has no effect; give one of them.")


def generate(argv: Sequence[str]) -> None:
    """Draw images, write a preview of them, or say what would be made."""
    from sage_fast import generation
    from sage_fast.generation.probing import estimate, preview
    from sage_fast.generation.ray_data import generate_on_ray

    argv = ["--n" if word == "-n" else word for word in argv]
    paths, config = parse("generate", argv, GeneratePaths, generation.GenerateConfig())
    if paths.dry_run:
        if paths.preview is not None:
            raise InputError("--dry-run writes nothing, and --preview a file; give one of them.")
        print(estimate(paths.model, paths.shots, config, paths.plan, paths.out))
    elif paths.preview is not None:
        print(f"The contact sheet is {preview(paths.model, paths.shots, paths.preview, config, paths.plan)}.")
    elif paths.out is None:
        raise InputError("generate needs --out, the folder or URL that gets the images (--preview FILE shows some).")
    else:
        meter = generation.Meter()
        run: Callable[..., Any] = generation.generate
        if paths.ray_workers is not None:
            run = partial(generate_on_ray, n_workers=paths.ray_workers)
        with watched("generating", meter) as progress:
            summary = run(paths.model, paths.shots, paths.out, config, progress, meter, paths.plan)
        print(summary)


def verify(argv: Sequence[str]) -> None:
    """Look whether all images are there, whole and as recorded."""
    from sage_fast.generation import verifying

    paths, options = parse("verify", argv, VerifyPaths, VerifyOptions())
    found = verifying.verify(paths.out, options.repair)
    if found.problems:
        raise InputError(f"{found} {found.remedy(options.repair)}")
    print(found)


def regenerate(argv: Sequence[str]) -> None:
    """Make one image of a manifest again."""
    from sage_fast.generation import regenerating

    paths, options = parse("regenerate", argv, RegeneratePaths, RegenerateOptions())
    print(regenerating.regenerate(paths.manifest, paths.number, options.out, options.model, options.shots))


def invert(argv: Sequence[str]) -> None:
    """Project images into the latent space."""
    from sage_fast import reconstruction
    from sage_fast.inversion import ProjectionConfig

    paths, config, projection = parse("invert", argv, InvertPaths, reconstruction.InvertConfig(), ProjectionConfig())
    with bar("projecting") as progress:
        summary = reconstruction.invert(
            paths.model, paths.images, paths.out, config, projection, paths.encoder, paths.mask_dir, progress
        )
    print(summary)


def data(argv: Sequence[str]) -> None:
    """Write a data set of drawn flowers, or divide one into what is learned from, given and compared with."""
    kinds = {"flora": _flora, "split": _split}
    if not argv or argv[0] in ("-h", "--help"):
        print(
            "usage: sage-fast data flora --out DIR [options]\n       sage-fast data split --data DATA --out DIR [options]\n\n"
            f"  flora   {SUMMARIES['data flora']}\n  split   {SUMMARIES['data split']}"
        )
        return
    if argv[0] not in kinds:
        raise InputError(f"sage-fast data knows flora and split, got {argv[0]!r}; see sage-fast data --help.")
    kinds[argv[0]](argv[1:])


def _flora(argv: Sequence[str]) -> None:
    (options,) = parse("data flora", argv, FloraOptions)
    from sage_fast.data.flora import write_image_folder

    with bar("drawing") as progress:
        folder = write_image_folder(**asdict(options), progress=progress)
    print(f"The images and factors.csv are in {folder}.")


def _split(argv: Sequence[str]) -> None:
    (options,) = parse("data split", argv, SplitOptions)
    from sage_fast.data.sources import open_source
    from sage_fast.data.splits import draw_split, load_split, write_split

    images = open_source(options.data, min_categories=3)
    drawn = options.split is None
    split = draw_split(images.categories, options.n_unseen, options.seed) if drawn else load_split(options.split)
    written = write_split(images, split, options.out, options.n_shots, options.seed)
    print("\n".join(f"{options.out / name}: {counted(n, 'image')}" for name, n in written.items()))


def demo(argv: Sequence[str]) -> None:
    """Run the whole road with the model that comes with the package."""
    from sage_fast.demo import DemoConfig, run_demo

    (config,) = parse("demo", argv, DemoConfig())
    run_demo(config)
