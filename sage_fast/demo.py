"""The whole road with the model that comes with the package: ``python -m sage_fast.demo --out demo_out``.

A few images of flora categories that the model has never seen are drawn, new images of each are generated and fused
with the given ones in every way, and an oracle that knows all of flora judges them beside real images of the same
categories.

OUT/shots, OUT/real            the given images, and others of the same categories to compare with
OUT/<kind>/<category>/         generated images; the kinds are those of KINDS
OUT/contact_sheet.png          the given images of each category above some of each kind
OUT/report.md, report.json     the scores
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sage_fast.data import flora
from sage_fast.data.images import load_image
from sage_fast.data.writers import atomic_write, contact_sheet, prepare_output, save_png
from sage_fast.errors import InputError
from sage_fast.evaluation.oracle import load_oracle
from sage_fast.evaluation.report import evaluate_folder, table, write_report
from sage_fast.generation import GenerateConfig, generate
from sage_fast.pipeline import FewShotPipeline

__all__ = ["KINDS", "DemoConfig", "run_demo"]

#: kind -> method and fusion
KINDS = {
    "inversion": ("inversion", "none"),
    "sage": ("sage", "none"),
    "sage_pixel": ("sage", "pixel"),
    "sage_frequency": ("sage", "frequency"),
    "sage_both": ("sage", "both"),
}
_FIRST_REAL = 1000  # indices of the real images; those of the shots are below
_COLUMNS = 16


@dataclass(frozen=True)
class DemoConfig:
    """Settings of :func:`run_demo`."""

    out: Path = Path("demo_out")  # emptied first when an earlier demo made it
    model: Path | None = None  # bundle trained on flora; None: the model that comes with the package
    oracle: Path | None = None  # folder of another oracle, of the model's resolution
    n_categories: int = 4  # unseen categories
    n_shots: int = 3  # given images of each
    n: int = 64  # generated images of each, of every kind
    n_real: int = 64  # real images of each to compare with
    alpha: float | None = None  # strength of the edit; None: the preset's
    seed: int = 0  # of the drawings and of the edits

    def __post_init__(self) -> None:
        if not 1 <= self.n_categories <= flora.N_UNSEEN:
            raise InputError(f"n_categories must be 1 to {flora.N_UNSEEN}, got {self.n_categories}.")
        if not 1 <= self.n_shots < _FIRST_REAL:
            raise InputError(f"n_shots must be 1 to {_FIRST_REAL - 1}, got {self.n_shots}.")
        for name in ("n", "n_real"):
            if getattr(self, name) < 2:
                raise InputError(
                    f"{name} must be at least 2, for a diversity to be measured, got {getattr(self, name)}."
                )


def run_demo(config: DemoConfig = DemoConfig()) -> Path:
    """Draw shots, generate, fuse, evaluate; prints where everything lies and returns the path of the report.

    Raises:
        InputError: no model, a model of other images than flora's, or a folder that a demo did not make.
    """
    start = time.monotonic()
    pipeline = FewShotPipeline.from_bundle(config.model)
    _check_model(pipeline)
    oracle = load_oracle(config.oracle)
    folder = prepare_output(config.out, overwrite=True)
    resolution = pipeline.generator.resolution
    _draw(folder / "shots", config.n_categories, range(config.n_shots), resolution)
    _draw(folder / "real", config.n_categories, range(_FIRST_REAL, _FIRST_REAL + config.n_real), resolution)
    rows = {}
    for kind, (method, fusion) in KINDS.items():
        alpha = None if method == "inversion" else config.alpha
        settings = GenerateConfig(n=config.n, alpha=alpha, seed=config.seed, method=method, fusion=fusion)
        generate(pipeline, folder / "shots", folder / kind, settings)
        print(f"{time.monotonic() - start:5.0f} s  {kind}: {config.n} images of each category drawn", flush=True)
        rows[kind] = evaluate_folder(config.model, folder / kind, folder / "real", oracle=oracle)
    report = write_report(folder, rows, "Demo: unseen flora categories")
    _write_sheet(folder, resolution, config.n_shots)
    print(f"\n{table(rows)}")
    print(f"\nGiven images    {folder / 'shots'}")
    print(f"Generated       {config.n} of each of {config.n_categories} categories in each of {', '.join(KINDS)}")
    print(f"Contact sheet   {folder / 'contact_sheet.png'}")
    print(f"Report          {report}")
    print(f"Time            {time.monotonic() - start:.0f} s")
    return report


def _check_model(pipeline: FewShotPipeline) -> None:
    """Raise ``InputError`` unless the model was trained on flora's seen categories."""
    known = {category.name for category in flora.categories()[: flora.N_SEEN]}
    others = sorted(set(pipeline.codes.categories) - known)
    if others or pipeline.generator.n_channels != 3:
        named = f" (it knows {others[0]!r})" if others else ""
        raise InputError(f"the demo needs a model trained on flora's seen categories{named}; leave out --model.")


def _draw(folder: Path, n_categories: int, indices: range, resolution: int) -> None:
    """Write drawings of the first unseen categories as an ImageFolder."""
    for label, category in list(enumerate(flora.categories()))[flora.N_SEEN : flora.N_SEEN + n_categories]:
        (folder / category.name).mkdir(parents=True)
        images, _ = flora.render(np.full(len(indices), label), np.array(indices), resolution)
        for index, image in zip(indices, images, strict=True):
            save_png(folder / category.name / f"{category.name}_{index:06d}.png", image, durable=False)


def _write_sheet(folder: Path, resolution: int, n_shots: int) -> None:
    """One section a category and kind: the given images, their inversions, the first generated ones of each kind."""
    images, labels = [], []
    for category in sorted(path.name for path in (folder / "shots").iterdir()):
        for kind in ("shots", *KINDS):
            n_shown = min(n_shots, _COLUMNS) if kind == "inversion" else _COLUMNS  # inversions repeat
            files = sorted((folder / kind / category).glob("*.png"))[:n_shown]
            images += [load_image(file, resolution) for file in files]
            labels += [f"{category}: {'given' if kind == 'shots' else kind}"] * len(files)
    sheet = contact_sheet(torch.stack(images), _COLUMNS, labels, scale=max(1, 64 // resolution))
    with atomic_write(folder / "contact_sheet.png") as file:
        sheet.save(file, format="PNG")


if __name__ == "__main__":
    from sage_fast.cli import main

    sys.exit(main(["demo", *sys.argv[1:]]))
