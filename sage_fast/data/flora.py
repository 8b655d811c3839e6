"""Flora: a procedural data set of flowers whose every factor is known.

An image is a pure function of (category, index), drawn by :mod:`sage_fast.data.flora_drawing`. The *category* fixes
the category-relevant factors (``LEVELS``: petal count, outline, layers, colours, disc, stamens, leaves); the *index*
fixes the category-irrelevant ones (``FACTORS``: pose, light, background, blur) as a hash of (category, index), so that
neither the batch nor the order matters. Many categories have a neighbour that differs in one factor only, often an
unseen one.

Not every factor can be read off an image: rotation is seen modulo the angle between petals, and scale and openness are
told apart by the leaves alone, which do not open.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sage_fast.data.flora_drawing import CIRCULAR, FACTOR_RANGES, FACTORS, LEVELS, draw
from sage_fast.data.splitmix64 import splitmix64
from sage_fast.data.writers import atomic_write, prepare_output, save_png
from sage_fast.errors import InputError

__all__ = [
    "CIRCULAR",
    "FACTORS",
    "LEVELS",
    "N_SEEN",
    "N_UNSEEN",
    "FloraCategory",
    "categories",
    "irrelevant_factors",
    "render",
    "write_image_folder",
]

N_SEEN, N_UNSEEN = 200, 40

# One digit per factor of LEVELS. Drawn once: an anchor at random, then up to two neighbours that differ from it in one
# factor, and so on; then shuffled. Kept as numbers because NumPy's random streams may change between versions.
_TABLE_DIGITS = """
310011120002 011011201300 200011200111 300001001410 500001460211 410100440400 200100761001 200011410412
310101881211 001001201200 101000350310 510101931000 111001970111 201010390002 310100191102 200011010210
501000461300 400000231200 210100391102 400011901411 511000350310 201010430101 510101931300 510100331410
311100281312 200001571410 201001870102 200100760001 510001001410 101001061401 301001061401 010000550000
411000181211 410011901411 510100001311 300011120002 400011630102 210010611000 500001001410 001101971012
010000550200 411011940410 410011380412 401100471211 401100971211 211001410102 310011120001 201010430102
101001530010 501011731100 500001410211 510001570412 201011891100 300000311402 301001561201 101011530111
311101281312 301001581200 201101601012 200011100111 510101931200 201001630012 510010880111 510100101311
410100040312 510000981112 101011690012 100010790111 300001311402 510011190411 411001270002 101011671012
401101291000 501010430000 510100411300 400100591001 400001731212 001001761200 311101961100 500011630102
411010181211 200101391012 100010720111 510010880011 110011840000 111101690101 300011571402 300010501000
111011951010 001001530010 500000410211 510100711300 111101640100 200010840400 110101511310 101011520111
200010840300 401010161211 200010840000 311100961101 200011571010 300101881211 401010191211 011011911010
200101060401 400101820311 210101391012 301001900412 201101631012 510001590412 110101511210 110101511410
311010410302 100000861312 301001761401 401010171211 210100440100 400101591001 510011140411 200011071210
100000510200 000100230002 401001270002 101010430000 010100040312 501001870102 400000311402 111001970411
501010851210 301101971011 401010390002 511011851210 410100020312 201000630012 400001731312 011010201300
411010181411 311101961101 210011840000 400000230100 300011570402 000011200111 301010210302 201001630112
001100471211 200100760000 500100750100 101011670012 501011891000 400011900000 400011530102 100011840000
401101791000 511001860102 311000461300 201011891000 100001220001 110100520010 201101681012 400011900002
300001571402 101001270002 210011611000 101010430200 511001731100 410011140412 111001970211 401011391211
300010500000 200101660201 511001840202 400101791001 200101060201 501000350310 401101791100 111011911010
200001410412 410011180412 501001871102 501010430101 201001901412 100010700111 010000530000 510011140011
301011520111 510001270412 010000981111 400101520111 401011991011 111101640101 201010390402 510100191311
100001221001 301000461300 400101820111 100000861310 011001410102 300010500002 300101881210 510010880411
510100231410 010000981112 400011300000 400000731212 400001410412 200010611000 000100230302 500100331410
301001561200 500100740100 210100440400 200011070210 001101971011 301001901412 411100281312 510011901411
500100750102 110001220001 310100391102 511011731100 311011201300 110000510200 011001310102 501011851210
200101390012 100000510201 001001701200 411011941410 101001530011 401011991211 511001840102 100010861312
510100011300 311010210302 411011941411 210100520010 210101520010 400000231100 000101230002 200001571010
"""
_TABLE = np.array([[int(digit) for digit in row] for row in _TABLE_DIGITS.split()])  # [240, 12]
_MAX_INDEX = 2**32 - 1


@dataclass(frozen=True)
class FloraCategory:
    """One category: its name and the level of each category-relevant factor.

    Attributes:
        name: ``flora_000`` to ``flora_239``; the number is the label. Those below ``N_SEEN`` are seen.
        levels: index into ``LEVELS[factor]`` for each of the 12 factors, in that order.
    """

    name: str
    levels: tuple[int, ...]

    @property
    def traits(self) -> dict[str, Any]:
        """Factor -> what it is for this category, e.g. ``{"petals": 5, "base": "yellow", ...}``."""
        return {factor: values[level] for (factor, values), level in zip(LEVELS.items(), self.levels)}


def categories() -> list[FloraCategory]:
    """All ``N_SEEN + N_UNSEEN`` categories; the first ``N_SEEN`` are the seen ones."""
    return [FloraCategory(f"flora_{i:03d}", tuple(row)) for i, row in enumerate(_TABLE.tolist())]


def render(category_ids: np.ndarray | Tensor, indices: np.ndarray | Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """Draw image number ``indices[i]`` of category ``category_ids[i]``.

    Args:
        category_ids: N integers, 0 to ``N_SEEN + N_UNSEEN - 1``.
        indices: N integers, 0 to 2^32 - 1.
        resolution: R, 4 to 2048.

    Returns:
        uint8 images [N, 3, R, R] and their category-irrelevant factors, float32 [N, F] in the order of ``FACTORS``.

    Raises:
        InputError: a category, an index or the resolution out of range, or not one index per category.
    """
    ids, numbers = np.asarray(category_ids), np.asarray(indices)
    _check_request(ids, numbers, resolution)
    factors = irrelevant_factors(ids, numbers)
    images = draw(_TABLE[ids.astype(np.int64)], factors, resolution)
    return torch.from_numpy(images), torch.from_numpy(factors)


def irrelevant_factors(category_ids: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Category-irrelevant factors of the images (category, index): float32 [N, F], uniform and independent.

    Each number is the splitmix64 hash of (category, index, factor), so it depends on nothing else.
    """
    columns = np.arange(len(FACTORS), dtype=np.uint64)
    rows = (category_ids.astype(np.uint64) << np.uint64(32)) + indices.astype(np.uint64)
    hashed = splitmix64(rows[:, None] * np.uint64(64) + columns)
    uniform = (hashed >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
    low, high = np.array(list(FACTOR_RANGES.values()), np.float32).T
    return low + uniform * (high - low)


def write_image_folder(
    out: str | Path,
    resolution: int = 32,
    n_per_category: int = 50,
    which: str = "seen",
    first_index: int = 0,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write images as ``OUT/flora_000/flora_000_000000.png`` and all their factors as ``OUT/factors.csv``.

    Args:
        out: a new or empty folder.
        n_per_category: images of each category, with indices ``first_index``, ``first_index + 1``, ...
        which: ``"seen"``, ``"unseen"`` or ``"all"`` categories.
        overwrite: replace what an earlier call wrote there.
        progress: called with (images written, images in all) after each category.

    Returns:
        The folder.

    Raises:
        InputError: a setting out of range, or a folder that is not empty or cannot be written.
    """
    ids = _chosen_categories(which)
    if n_per_category < 1:
        raise InputError(f"n_per_category must be at least 1, got {n_per_category}.")
    indices = first_index + np.arange(n_per_category)
    _check_request(np.full(n_per_category, ids[0]), indices, resolution)
    folder = prepare_output(out, overwrite=overwrite, offers=("overwrite",))
    everything = categories()
    rows = [["file", "category", "index", *LEVELS, *FACTORS]]
    for done, i in enumerate(ids, start=1):
        rows += _write_category(folder, everything[i], i, indices, resolution)
        if progress is not None:
            progress(done * n_per_category, len(ids) * n_per_category)
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(rows)
    with atomic_write(folder / "factors.csv") as file:
        file.write(table.getvalue().encode())
    return folder


def _write_category(folder: Path, category: FloraCategory, i: int, indices: np.ndarray, resolution: int) -> list[list]:
    """Write the images of category number ``i``; returns their rows of the table."""
    (folder / category.name).mkdir(exist_ok=True)
    images, factors = render(np.full(len(indices), i), indices, resolution)
    rows = []
    for image, index, values in zip(images, indices.tolist(), factors.tolist()):
        file = f"{category.name}/{category.name}_{index:06d}.png"
        save_png(folder / file, image, durable=False)
        rows.append([file, category.name, index, *category.traits.values(), *(f"{value:.6g}" for value in values)])
    return rows


def _chosen_categories(which: str) -> range:
    chosen = {"seen": range(N_SEEN), "unseen": range(N_SEEN, len(_TABLE)), "all": range(len(_TABLE))}
    if which not in chosen:
        raise InputError(f"which must be 'seen', 'unseen' or 'all', got {which!r}.")
    return chosen[which]


def _check_request(ids: np.ndarray, indices: np.ndarray, resolution: int) -> None:
    if ids.ndim != 1 or ids.shape != indices.shape:
        raise InputError(f"categories and indices must both be [N], got {list(ids.shape)} and {list(indices.shape)}.")
    if not (np.issubdtype(ids.dtype, np.integer) and np.issubdtype(indices.dtype, np.integer)):
        raise InputError(f"categories and indices must be integers, got {ids.dtype} and {indices.dtype}.")
    if len(ids) and not (0 <= ids.min() and ids.max() < len(_TABLE)):
        raise InputError(f"flora has categories 0 to {len(_TABLE) - 1}, got {ids.min()} to {ids.max()}.")
    if len(ids) and not (0 <= indices.min() and indices.max() <= _MAX_INDEX):
        raise InputError(f"indices must be 0 to {_MAX_INDEX}, got {indices.min()} to {indices.max()}.")
    if not 4 <= resolution <= 2048:
        raise InputError(f"resolution must be 4 to 2048, got {resolution}.")
