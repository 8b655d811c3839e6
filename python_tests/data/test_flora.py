"""Flora: each image is a pure function of (category, index), and every factor can be seen."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sage_fast.data.flora import (
    CIRCULAR,
    FACTORS,
    LEVELS,
    N_SEEN,
    N_UNSEEN,
    categories,
    irrelevant_factors,
    render,
    write_image_folder,
)
from sage_fast.data.flora_drawing import FACTOR_RANGES, draw
from sage_fast.data.folders import read_images, scan_image_folder
from sage_fast.errors import InputError

# of images (0, 0), (57, 1), (111, 1000), (239, 99) at 32 px: the pixel in the middle, and the mean
CENTRES = [[247, 178, 24], [116, 161, 45], [201, 216, 195], [185, 161, 26]]
MEANS = [[113.6, 95.1, 52.7], [109.2, 110.7, 154.9], [79.1, 84.2, 54.5], [72.0, 92.4, 115.6]]
LEVEL_TABLE = np.array([category.levels for category in categories()])


def test_an_image_does_not_depend_on_its_batch() -> None:
    rng = np.random.default_rng(0)
    ids, indices = rng.integers(0, N_SEEN + N_UNSEEN, 70), rng.integers(0, 2**32, 70)
    images, factors = render(ids, indices, 32)
    order = rng.permutation(70)
    shuffled, shuffled_factors = render(ids[order], indices[order], 32)
    assert torch.equal(shuffled, images[order]) and torch.equal(shuffled_factors, factors[order])
    for i in range(0, 70, 7):
        alone, _ = render(ids[i : i + 1], indices[i : i + 1], 32)
        assert torch.equal(alone[0], images[i])


@pytest.mark.parametrize("resolution", [4, 17, 32])
def test_shapes_types_and_ranges(resolution: int) -> None:
    images, factors = render(torch.arange(8), torch.arange(8), resolution)
    assert images.dtype == torch.uint8 and images.shape == (8, 3, resolution, resolution)
    assert factors.dtype == torch.float32 and factors.shape == (8, len(FACTORS))
    assert images.float().std() > 20
    empty, none = render(np.arange(0), np.arange(0), resolution)
    assert empty.shape == (0, 3, resolution, resolution) and none.shape == (0, len(FACTORS))


def test_known_pixels_stay_as_they_are() -> None:
    """Weights are shipped that were trained on these very images: their colours must not drift."""
    images, _ = render(np.array([0, 57, 111, 239]), np.array([0, 1, 1000, 99]), 32)
    assert np.allclose(images[:, :, 16, 16].numpy(), CENTRES, atol=1)
    assert np.allclose(images.float().mean(dim=(2, 3)).numpy(), MEANS, atol=0.2)


def test_factors_are_uniform_and_independent() -> None:
    n = 20_000
    ids, indices = np.arange(n) % 240, np.arange(n) // 240
    factors = irrelevant_factors(ids, indices)
    low, high = np.array(list(FACTOR_RANGES.values())).T
    uniform = (factors - low) / (high - low)
    assert uniform.min() >= 0 and uniform.max() <= 1
    quantiles = np.quantile(uniform, [0.1, 0.5, 0.9], axis=0)
    assert np.abs(quantiles - np.array([[0.1], [0.5], [0.9]])).max() < 0.015
    columns = np.concatenate([uniform, (ids / 240)[:, None], (indices / indices.max())[:, None]], axis=1)
    correlation = np.corrcoef(columns.T)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 5 / math.sqrt(n)


def test_neighbouring_images_share_no_factor() -> None:
    a = irrelevant_factors(np.array([3]), np.array([7]))
    for category, index in ((3, 8), (4, 7), (7, 3)):
        assert (irrelevant_factors(np.array([category]), np.array([index])) != a).all()


def test_seen_and_unseen_categories_are_disjoint_and_have_near_neighbours() -> None:
    assert len(categories()) == N_SEEN + N_UNSEEN == 240
    assert len({category.name for category in categories()}) == 240
    distances = (LEVEL_TABLE[:, None] != LEVEL_TABLE[None]).sum(-1)
    np.fill_diagonal(distances, len(LEVELS))
    assert distances.min() == 1  # no two are the same, seen or unseen
    assert (distances.min(1) == 1).sum() >= 200  # hard to tell apart
    assert (distances[N_SEEN:, :N_SEEN].min(1) == 1).sum() >= 20  # unseen beside seen
    for column, values in zip(LEVEL_TABLE[:N_SEEN].T, LEVELS.values()):
        assert set(column) == set(range(len(values)))  # every level of every factor occurs among the seen


def test_the_traits_name_the_levels() -> None:
    for category in categories()[:5]:
        assert [LEVELS[f].index(value) for f, value in category.traits.items()] == list(category.levels)


@pytest.mark.parametrize("factor", LEVELS)
def test_each_relevant_factor_changes_pixels(factor: str) -> None:
    """Categories that differ in one factor alone look different in the same pose."""
    column = list(LEVELS).index(factor)
    levels = np.array([[2, 1, 1, 0, 0, 1, 1, 3, 0, 1, 1, 1]] * len(LEVELS[factor]))
    levels[:, column] = range(len(levels))
    pose = np.repeat(irrelevant_factors(np.array([1]), np.array([5])), len(levels), axis=0)
    images = draw(levels, pose, 32).astype(int)
    for i in range(1, len(images)):
        assert (np.abs(images[i] - images[0]).max(0) > 20).sum() >= 8, factor


@pytest.mark.parametrize("factor", FACTORS)
def test_each_irrelevant_factor_changes_pixels(factor: str) -> None:
    pose = np.repeat(irrelevant_factors(np.array([1]), np.array([5])), 2, axis=0)
    low, high = FACTOR_RANGES[factor]
    pose[:, FACTORS.index(factor)] = low + 0.1 * (high - low), low + 0.6 * (high - low)
    images = draw(LEVEL_TABLE[[1, 1]], pose, 32).astype(int)
    assert (np.abs(images[1] - images[0]).max(0) > 5).mean() > 0.02


@pytest.mark.parametrize("factor", CIRCULAR)
def test_circular_factors_close(factor: str) -> None:
    pose = np.repeat(irrelevant_factors(np.array([1]), np.array([5])), 2, axis=0)
    pose[1, FACTORS.index(factor)] += CIRCULAR[factor]
    images = draw(LEVEL_TABLE[[1, 1]], pose, 32).astype(int)
    assert np.abs(images[1] - images[0]).max() <= 1


def upright_pose(**changes: float) -> np.ndarray:
    """The lower end of every range, but without tilt and in the middle: [1, F]."""
    centred = {"tilt_x": 0.0, "tilt_y": 0.0, "x": 0.0, "y": 0.0, **changes}
    return np.array([[centred.get(name, low) for name, (low, _) in FACTOR_RANGES.items()]], np.float32)


def test_the_angle_between_petals_turns_them_onto_themselves() -> None:
    """Rotation can only be seen modulo that angle."""
    levels = np.array([[2, 1, 1, 0, 0, 1, 1, 3, 0, 1, 0, 0]])  # five petals, no leaves, no stamens
    image, same, other = (
        draw(levels, upright_pose(rotation=turn * 2 * math.pi / 5), 64)[0].astype(int) for turn in (0, 1, 0.5)
    )
    ring = np.hypot(*np.meshgrid(*[np.linspace(-1, 1, 64)] * 2)) > 0.35  # the grain of the disc has no such symmetry
    assert np.abs(image - same)[:, ring].max() <= 2
    assert np.abs(image - other)[:, ring].max() > 50


def test_turning_flower_and_light_turns_the_picture() -> None:
    quarter = {name: math.pi / 2 for name in ("rotation", "light", "background_slope")}
    for levels in LEVEL_TABLE[:8]:
        image, turned = (draw(levels[None], upright_pose(**turn), 64)[0].astype(int) for turn in ({}, quarter))
        assert (np.abs(np.rot90(image, axes=(1, 2)) - turned) > 2).mean() < 0.002


def test_edges_are_anti_aliased() -> None:
    """A large picture averaged down agrees with the small one: no pixel is all or nothing by chance."""
    ids, indices = np.arange(0, 240, 10), np.arange(24)
    factors = irrelevant_factors(ids, indices)
    factors[:, FACTORS.index("blur")] = 0
    small = draw(LEVEL_TABLE[ids], factors, 32).astype(float)
    large = draw(LEVEL_TABLE[ids], factors, 256).astype(float)
    averaged = large.reshape(24, 3, 32, 8, 32, 8).mean((3, 5))
    picked = large[:, :, 4::8, 4::8]
    smooth, jagged = np.abs(small - averaged).mean(), np.abs(picked - averaged).mean()
    assert smooth < 0.75 * jagged


def test_the_folder_holds_the_images_and_their_factors(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    folder = write_image_folder(
        tmp_path / "f", 16, 2, "unseen", first_index=5, progress=lambda done, total: calls.append((done, total))
    )
    assert calls[-1] == (2 * N_UNSEEN, 2 * N_UNSEEN)
    images = read_images(scan_image_folder(folder), 16)
    assert images.categories == [category.name for category in categories()[N_SEEN:]]
    with open(folder / "factors.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == images.files
    ids = np.array([int(row["category"].removeprefix("flora_")) for row in rows])
    expected, factors = render(ids, np.array([int(row["index"]) for row in rows]), 16)
    assert torch.equal(images.images, expected)
    written = np.array([[float(row[name]) for name in FACTORS] for row in rows])
    assert np.allclose(written, factors, rtol=1e-5, atol=1e-6)
    assert rows[0]["petals"] == str(categories()[N_SEEN].traits["petals"])


def test_the_folder_is_refused_when_full_and_replaced_when_asked(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "f", 8, 1, "unseen")
    with pytest.raises(InputError, match="not empty"):
        write_image_folder(tmp_path / "f", 8, 1, "unseen")
    write_image_folder(tmp_path / "f", 16, 1, "unseen", overwrite=True)
    assert read_images(scan_image_folder(tmp_path / "f"), 16).images.shape[-1] == 16


@pytest.mark.parametrize(
    ("ids", "indices", "resolution", "message"),
    [
        ([240], [0], 32, "categories 0 to 239"),
        ([-1], [0], 32, "categories 0 to 239"),
        ([0], [2**32], 32, "indices must be"),
        ([0], [-1], 32, "indices must be"),
        ([0.5], [0], 32, "integers"),
        ([0, 1], [0], 32, "both be"),
        ([0], [0], 2, "resolution must be"),
    ],
)
def test_bad_requests_are_refused(ids: list, indices: list, resolution: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        render(np.array(ids), np.array(indices), resolution)


def test_bad_folders_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for settings in ({"which": "both"}, {"n_per_category": 0}, {"first_index": -1}, {"resolution": 0}):
        with pytest.raises(InputError):
            write_image_folder(tmp_path / "f", **settings)
    assert not (tmp_path / "f").exists()
