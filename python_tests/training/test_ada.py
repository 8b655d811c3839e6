"""The transforms of ADA, each alone and composed, against torch, numpy and scipy; the statistics of what is drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.transform import Rotation
from torch import Tensor

from sage_fast.training.ada import AMOUNTS, apply_ada, colour_maps, draw_ada, inverse_maps
from sage_fast.training.draws import Draws


def amounts(**named: float) -> Tensor:
    """Amounts [1, k] of one image: what is not named is left as it is."""
    row = torch.zeros(1, len(AMOUNTS), dtype=torch.float64)
    for name, value in named.items():
        row[0, AMOUNTS.index(name)] = value
    return row


def applied(images: Tensor, **named: float) -> Tensor:
    return apply_ada(images, Draws.of(amounts(**named).repeat(len(images), 1)))


@pytest.fixture
def waves() -> Tensor:
    """A smooth image [1, 3, 32, 32], float64."""
    x, y = torch.arange(32, dtype=torch.float64) / 32, torch.arange(32, dtype=torch.float64).view(-1, 1) / 32
    return torch.stack([(5 * x + y).sin(), (3 * y - 4 * x).cos() * x, (6 * y).sin() * (1 - x)])[None]


@pytest.mark.parametrize("size", [(32, 32), (32, 27)])
def test_pixel_blitting(waves, size):
    x = waves[:, :, : size[0], : size[1]]
    # the filter is not quite symmetric, so mirrored and turned images are near, not equal
    assert (applied(x, flip=1) - x.flip(3)).abs().max() < 0.03
    assert (applied(x, turns=2) - x.rot90(2, (2, 3))).abs().max() < 0.04
    right, down = 3 / size[1], -2.4 / size[0]  # shares of the side, rounded to 3 and -2 pixels
    shifted = torch.nn.functional.pad(x, (3, 0, 0, 2), mode="reflect")[:, :, 2:, : size[1]]
    assert (applied(x, shift_x=right, shift_y=down) - shifted).abs().max() < 1e-12
    if size[0] == size[1]:
        for turns in (1, 3):
            assert (applied(x, turns=turns) - x.rot90(turns, (2, 3))).abs().max() < 0.04


def test_geometry_is_the_product_of_its_parts_inverted():
    named = dict(flip=1, turns=1, shift_x=0.1, shift_y=-0.06, scale=0.3, rotate_before=0.7, stretch=-0.2)
    named |= dict(rotate_after=-1.1, move_x=0.04, move_y=0.09)
    width, height = 40, 30

    def rotation(angle: float) -> np.ndarray:  # counterclockwise on the screen, where y points down
        return Rotation.from_euler("z", -angle).as_matrix()

    def translation(x: float, y: float) -> np.ndarray:
        return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]])

    parts = [  # in the order in which they happen
        np.diag([-1.0, 1, 1]),
        rotation(math.pi / 2),
        translation(round(0.1 * width), round(-0.06 * height)),
        np.diag([2**0.3, 2**0.3, 1]),
        rotation(0.7),
        np.diag([2**-0.2, 2**0.2, 1]),
        rotation(-1.1),
        translation(0.04 * width, 0.09 * height),
    ]
    forward = np.linalg.multi_dot(parts[::-1])
    ours = inverse_maps(amounts(**named), height, width)[0].numpy()
    np.testing.assert_allclose(ours, np.linalg.inv(forward)[:2], atol=1e-12)


def test_a_turned_image_is_a_rotation_by_that_angle(waves):
    both = applied(waves, rotate_before=math.pi / 2)
    assert (both - waves.rot90(1, (2, 3))).abs().max() < 0.04


V = np.full(3, 3**-0.5)


@pytest.mark.parametrize(
    ("named", "matrix", "offset"),
    [
        (dict(brightness=0.3), np.eye(3), 0.3),
        (dict(contrast=-0.7), 2**-0.7 * np.eye(3), 0.0),
        (dict(luma_flip=1), np.eye(3) - 2 * np.outer(V, V), 0.0),
        (dict(hue=1.3), Rotation.from_rotvec(1.3 * V).as_matrix(), 0.0),
        (dict(hue=2 * math.pi / 3), np.eye(3)[[2, 0, 1]], 0.0),  # red to green to blue
        (dict(saturation=1.5), np.outer(V, V) + 2**1.5 * (np.eye(3) - np.outer(V, V)), 0.0),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, dict) else "",
)
def test_each_colour_transform(named, matrix, offset):
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    expected = np.einsum("ij,njhw->nihw", matrix, x.numpy()) + offset
    np.testing.assert_allclose(applied(x, **named).numpy(), expected, atol=1e-12)


def test_colour_is_the_product_of_its_parts():
    named = dict(brightness=0.2, contrast=0.4, luma_flip=1, hue=-0.8, saturation=-0.6)
    flip, across = np.eye(3) - 2 * np.outer(V, V), np.eye(3) - np.outer(V, V)
    saturate = np.outer(V, V) + 2**-0.6 * across
    linear = saturate @ Rotation.from_rotvec(-0.8 * V).as_matrix() @ flip * 2**0.4
    matrix, offset = colour_maps(amounts(**named), 3)
    np.testing.assert_allclose(matrix[0].numpy(), linear, atol=1e-12)
    np.testing.assert_allclose(offset[0, :, 0].numpy(), linear @ np.full(3, 0.2), atol=1e-12)


def test_grey_is_red_green_and_blue_of_one_value_and_alpha_is_only_moved():
    named = dict(shift_x=0.25, brightness=0.2, contrast=0.4, luma_flip=1, hue=-0.8, saturation=-0.6, band_1=0.5)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    grey = x[:, :1].expand(-1, 3, -1, -1)
    assert (applied(x[:, :1], **named) - applied(grey, **named)[:, :1]).abs().max() < 1e-12
    both = applied(torch.cat([x[:, :1], x[:, 3:]], 1), **named)
    assert (both[:, :1] - applied(x[:, :1], **named)).abs().max() < 1e-12
    four = applied(x, **named)
    assert (four[:, :3] - applied(x[:, :3], **named)).abs().max() < 1e-12
    moved_only = applied(x, shift_x=0.25)[:, 3:]
    assert torch.equal(four[:, 3:], moved_only) and torch.equal(both[:, 1:], moved_only)


def test_images_that_no_transform_touches_come_back_bit_for_bit():
    x = torch.randn(7, 3, 8, 8)
    some = amounts().repeat(7, 1)
    touched = [dict(rotate_before=0.3), dict(hue=1.0), dict(band_2=0.7), dict(noise=0.1), dict(cut_size=0.5)]
    some[1:6] = torch.cat([amounts(**named) for named in touched])
    y = apply_ada(x, Draws.of(some))
    assert torch.equal(y[[0, 6]], x[[0, 6]])
    for i, named in enumerate(touched, 1):
        assert not torch.equal(y[i], x[i]) and torch.equal(y[i : i + 1], applied(x[i : i + 1], **named))


N = 20_000


@pytest.fixture(scope="module")
def many() -> dict[str, np.ndarray]:
    draws = draw_ada(N, 0.4, "bgcfnc", torch.Generator().manual_seed(3))
    return dict(zip(AMOUNTS, draws.amounts.numpy().T))


def on(values: np.ndarray) -> np.ndarray:
    return values[values != 0]


@pytest.mark.parametrize(
    ("name", "probability", "distribution"),
    [
        ("shift_x", 0.4, stats.uniform(-1 / 8, 1 / 4)),
        ("shift_y", 0.4, stats.uniform(-1 / 8, 1 / 4)),
        ("scale", 0.4, stats.norm(0, 0.2)),
        ("rotate_before", 1 - 0.6**0.5, stats.uniform(-math.pi, 2 * math.pi)),
        ("stretch", 0.4, stats.norm(0, 0.2)),
        ("rotate_after", 1 - 0.6**0.5, stats.uniform(-math.pi, 2 * math.pi)),
        ("move_x", 0.4, stats.norm(0, 1 / 8)),
        ("move_y", 0.4, stats.norm(0, 1 / 8)),
        ("brightness", 0.4, stats.norm(0, 0.2)),
        ("contrast", 0.4, stats.norm(0, 0.5)),
        ("hue", 0.4, stats.uniform(-math.pi, 2 * math.pi)),
        ("saturation", 0.4, stats.norm(0, 1)),
        ("band_0", 0.4, stats.norm(0, 1)),
        ("band_3", 0.4, stats.norm(0, 1)),
        ("noise", 0.4, stats.norm(0, 0.1)),
        ("cut_x", 0.4, stats.uniform(-1 / 2, 1)),
        ("cut_y", 0.4, stats.uniform(-1 / 2, 1)),
    ],
)
def test_continuous_draws(many, name, probability, distribution):
    values = on(many[name])
    assert abs(len(values) / N - probability) < 4 * math.sqrt(probability * (1 - probability) / N)
    assert stats.kstest(values, distribution.cdf).pvalue > 1e-3


@pytest.mark.parametrize(("name", "choices"), [("flip", 2), ("turns", 4), ("luma_flip", 2)])
def test_whole_draws(many, name, choices):
    counts = np.bincount(many[name].astype(int), minlength=choices)
    expected = N * (0.4 / choices + np.array([0.6] + [0] * (choices - 1)))
    assert len(counts) == choices and stats.chisquare(counts, expected).pvalue > 1e-3


def test_transforms_are_on_independently_except_the_axes_of_one(many):
    gates = {name: values != 0 for name, values in many.items()}
    assert (gates["shift_x"] == gates["shift_y"]).all() and (gates["move_x"] == gates["move_y"]).all()
    assert abs(np.mean(gates["rotate_before"] | gates["rotate_after"]) - 0.4) < 0.015
    cut = gates["cut_size"]
    assert (cut == gates["cut_x"]).all() and (cut == gates["cut_y"]).all() and set(many["cut_size"]) == {0, 0.5}
    assert (gates["noise"] == gates["noise_number"]).all()
    together = {"shift_y", "move_y", "noise_number", "cut_x", "cut_y"}
    apart = [name for name in AMOUNTS if name not in together]
    correlation = np.corrcoef([gates[name] for name in apart]) - np.eye(len(apart))
    assert np.abs(correlation).max() < 5 / math.sqrt(N)
    sizes = np.corrcoef([many["move_x"][gates["move_x"]], many["move_y"][gates["move_x"]]])[0, 1]
    assert abs(sizes) < 5 / math.sqrt(0.4 * N)


def test_p_and_the_pipeline_switch_transforms_without_changing_what_is_drawn():
    def drawn(p: float, pipeline: str) -> tuple[Tensor, Tensor]:
        rng = torch.Generator().manual_seed(1)
        return draw_ada(8, p, pipeline, rng).amounts, rng.get_state()

    (full, state), (none, other) = drawn(1.0, "bgcfnc"), drawn(0.0, "b")
    assert torch.equal(state, other) and not none.any()
    may_be_nothing = [AMOUNTS.index(name) for name in ("flip", "turns", "luma_flip")]
    assert (full != 0)[:, [i for i in range(len(AMOUNTS)) if i not in may_be_nothing]].all()
    half = drawn(0.5, "bgcfnc")[0]
    assert torch.equal(half[half != 0], full[half != 0])
    ends = dict(b="shift_y", bg="move_y", bgc="saturation", bgcf="band_3", bgcfn="noise_number", bgcfnc="cut_y")
    for pipeline, last in ends.items():
        used = AMOUNTS.index(last) + 1
        some = drawn(1.0, pipeline)[0]
        assert torch.equal(some[:, :used], full[:, :used]) and not some[:, used:].any()
