"""What tells people about an output: its data card and its contact sheet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sage_fast.data.images import load_image
from sage_fast.data.writers import contact_sheet
from sage_fast.errors import InputError, counted
from sage_fast.generation.formats import Format
from sage_fast.generation.plan import Part, Plan
from sage_fast.models.bundles import bundle_hash, read_index

__all__ = ["data_card", "draw_sheet"]

_PARTS, _COLUMNS, _ROWS, _SIDE = 40, 12, 2, 128
_LISTED = 50  # categories that the card names
_LAYOUTS = {
    "folder": "`<category>/<category>_00000.{image}`: an ImageFolder, as torchvision reads it, and Hugging Face Datasets by the "
    "head of this file (`load_dataset(OUT)`).",
    "webdataset": "`shard-000000.tar` ...: tar files of WebDataset, each sample a `.{image}`, a `.cls` (number of its "
    "category) and a `.json` (how it came to be); `load_dataset(OUT)` of Hugging Face Datasets reads them too.",
    "safetensors": "`images.safetensors`: `images` uint8 [N, C, R, R], `labels` and `indices` int64 [N].",
}
_HEADS = {
    "folder": """---
configs:
- config_name: default
  data_files: "*/*.{image}"
  drop_labels: false
---
""",
    "webdataset": """---
configs:
- config_name: default
  data_files: "shard-*.tar"
---
""",
    "safetensors": "",
}
"""What Hugging Face Datasets is to read; else it would take the contact sheet for an image, and the folders for no labels."""


def data_card(settings: dict[str, Any], plan: Plan) -> str:
    """README.md of an output: what its images are and how they were made."""
    counts: dict[str, int] = {}
    for part in plan.parts:
        counts[part.category] = counts.get(part.category, 0) + part.n
    rows = [f"| {plan.labels[name]} | {_cell(name)} | {counts[name]:,} |" for name in plan.categories[:_LISTED]]
    if len(plan.categories) > _LISTED:
        rows.append(f"| | and {len(plan.categories) - _LISTED:,} more, in `config.json` | |")
    methods = sorted({part.method for part in plan.parts})
    fusions = sorted({part.fusion for part in plan.parts})
    strengths = sorted({part.alpha for part in plan.parts if part.alpha is not None})
    side, model = settings["resolution"], "" if _is_shipped(settings["model"]) else " --model RUN"
    encoding = f"{settings['image']} by {settings['encoder']}" if settings["encoder"] else "plain arrays"
    return f"""{_HEADS[settings["format"]].format(image=settings["image"])}# Generated images

{counted(len(plan), "image")} of {counted(len(plan.categories), "category")}, {side} x {side} pixels,
{counted(settings["n_channels"], "channel")}. **All of them are synthetic**: none is a photograph or drawing of something
that was there.

Each was made from one to a few given images of its category ("shots") by few-shot generation with `sage_fast`: an encoder
turns the shots into latents of a StyleGAN2 generator, what makes images of *other* categories differ within a category is
added to them, and the generator draws the result. So an image shows the category of its shots as far as the model kept
it; what the generator has not learned is missing, and wrong labels are possible. Check them before relying on them.

| | |
|---|---|
| model | `{settings["model"]}` |
| method, fusion, strength | {", ".join(methods)}; {", ".join(fusions)}; {", ".join(map(str, strengths)) or "none"} |
| reading of the method | {settings["preset"]} |
| stored as | {encoding} |
| layout | {_LAYOUTS[settings["format"]].format(image=settings["image"])} |

`manifest.jsonl` has a line an image: category, index, file with SHA-256, the shots with theirs, seed, settings, the seen
categories that were found similar, the model's hash and the package's version. `config.json` is the whole plan.
`SHA256SUMS` has the digests of these files.

    sage-fast verify OUT  # is everything there, whole and as recorded
    sage-fast regenerate OUT/manifest.jsonl 12{model}  # image number 12 again, from its line

| label | category | images |
|---|---|---|
""" + "\n".join([*rows, ""])


def _is_shipped(model: str) -> bool:
    """Whether a hash is that of the model that comes with the package, which needs no ``--model``."""
    try:
        return model == bundle_hash(read_index(None))
    except InputError:  # installed without it
        return False


def draw_sheet(format: Format) -> Image.Image:
    """Two sections for each of the first parts of the plan: its shots, then the first of its generated images."""
    plan, (n_channels, resolution, _) = format.plan, format.shape
    side = min(resolution, _SIDE)
    images: list[torch.Tensor] = []
    labels: list[str] = []
    start = 0
    for part in plan.parts[:_PARTS]:
        given = [load_image(Path(plan.root) / file, side, n_channels) for file in part.shots[:_COLUMNS]]
        drawn = _drawn(format, range(start, start + min(part.n, _COLUMNS * _ROWS)), side)
        images += given + drawn
        labels += [f"{part.category}: given"] * len(given) + [_title(part)] * len(drawn)
        start += part.n
    return contact_sheet(torch.stack(images), _COLUMNS, labels, scale=max(1, 64 // side))


def _drawn(format: Format, wanted: range, side: int) -> list[torch.Tensor]:
    """Stored images at the size of the sheet."""
    found = []
    for shard in range(wanted.start // format.plan.shard, (wanted.stop - 1) // format.plan.shard + 1):
        for _, data in format.read(shard, wanted):
            found.append(_scaled(format.decode(data), side))
    return found


def _scaled(pixels: np.ndarray, side: int) -> torch.Tensor:
    """uint8 [C, R, R] as [C, side, side]."""
    image = torch.from_numpy(np.array(pixels))
    if image.shape[1] == side:
        return image
    channels = [Image.fromarray(channel.numpy()).resize((side, side), Image.Resampling.LANCZOS) for channel in image]
    return torch.stack([torch.from_numpy(np.array(channel)) for channel in channels])


def _title(part: Part) -> str:
    fused = "" if part.fusion == "none" else f", fusion {part.fusion}"
    return f"{part.category}: {part.method}{fused}"


def _cell(name: str) -> str:
    return name.replace("|", "\\|")
