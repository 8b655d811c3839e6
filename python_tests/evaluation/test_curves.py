"""Curves of a log: what is read, which ticks are round, and where the ink is."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from sage_fast.cli import main
from sage_fast.errors import InputError
from sage_fast.evaluation import curves
from sage_fast.evaluation.curves import draw_curves, read_series, round_ticks, write_curves


def write_log(run, lines, stage="gan"):
    (run / "logs").mkdir(parents=True, exist_ok=True)
    path = run / "logs" / f"{stage}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_log_is_read_by_name_against_kimg_or_steps(tmp_path):
    lines = [{"step": 50, "kimg": 0.8, "g_loss": 2.0, "time": 1.0, "seconds": 3}, {"step": 100, "kimg": 1.6, "fd_x": 9}]
    assert read_series(write_log(tmp_path, lines)) == {"g_loss": ([0.8], [2.0]), "fd_x": ([1.6], [9])}
    assert read_series(write_log(tmp_path, [{"step": 7, "loss": 1.5}])) == {"loss": ([7], [1.5])}


def test_steps_that_a_continuation_repeats_count_once(tmp_path):
    lines = [{"step": s, "loss": v} for s, v in ((1, 5.0), (2, 4.0), (3, 3.0), (2, 40.0), (3, 30.0), (4, 20.0))]
    assert read_series(write_log(tmp_path, lines)) == {"loss": ([1, 2, 3, 4], [5.0, 40.0, 30.0, 20.0])}
    lines = [{"step": 1, "loss": 5.0}, {"step": 1, "fd_x": 2.0}, {"step": 2, "loss": float("nan")}]
    assert read_series(write_log(tmp_path, lines)) == {"loss": ([1], [5.0]), "fd_x": ([1], [2.0])}


@pytest.mark.parametrize("text", ["{broken", "[1]", ""])
def test_what_is_no_log_is_said(tmp_path, text):
    path = write_log(tmp_path, [])
    path.write_text(text)
    with pytest.raises(InputError, match="must hold numbers to draw, got none"):
        read_series(path)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.3, 0.31), (-5, 1234), (1e-7, 3e-7), (0, 84.8), (-1, 1), (99.9, 100.1), (-3e5, -2e5)]
)
def test_ticks_are_few_round_and_reach_around(low, high):
    ticks = round_ticks(low, high)
    assert 2 <= len(ticks) <= 6 and ticks[0] <= low and ticks[-1] >= high
    step = np.diff(ticks)
    assert np.allclose(step, step[0])
    assert float(f"{step[0]:e}".partition("e")[0]) in (1, 2, 2.5, 5)
    assert high - low > 0.3 * (ticks[-1] - ticks[0])


def ink(picture: Image.Image, colour: str) -> np.ndarray:
    """Pixels of a colour: bool [H, W]."""
    wanted = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return (np.asarray(picture) == wanted).all(2)


def test_losses_share_a_panel_and_scores_have_their_own():
    x = [1.0, 2.0, 3.0]
    names = ("g_loss", "d_loss", "fd_oracle", "kd_oracle", "precision_oracle", "recall_oracle", "r1")
    picture = draw_curves({name: (x, [1.0, 3.0, 2.0]) for name in names}, "gan")
    assert picture.size == (3 * curves._WIDTH, 2 * curves._HEIGHT)  # losses, fd, kd; precision and recall, r1
    assert draw_curves({"loss": (x, x)}).size == (curves._WIDTH, curves._HEIGHT)


def test_names_stand_above_their_lines_and_titles_say_what_the_positions_count(tmp_path, monkeypatch):
    x = [1.0, 2.0, 3.0]
    lines = draw_curves({name: (x, [0.0, 1.0, 2.0]) for name in ("a_loss", "b_loss", "c_loss", "d_loss")})
    rows, _ = np.nonzero(ink(lines, curves._COLOURS[3][0]))  # drawn last
    assert rows.min() >= 4 * curves._NAME
    titles = []
    monkeypatch.setattr(curves, "_draw_panel", lambda pen, corner, title, series: titles.append(title))
    write_log(tmp_path, [{"step": 1, "loss": 1}], "encoder")
    write_log(tmp_path, [{"step": 1, "kimg": 1, "g_loss": 1, "d_loss": 2}], "gan")
    write_curves(tmp_path)
    assert titles == ["encoder loss over steps", "gan losses over kimg"]


def test_a_rising_line_rises_from_the_left_bottom_to_the_right_top():
    pixels = ink(draw_curves({"loss": ([0.0, 10.0], [0.0, 5.0])}), curves._COLOURS[0][0])
    rows, columns = np.nonzero(pixels)
    left, right = rows[columns == columns.min()].mean(), rows[columns == columns.max()].mean()
    assert columns.min() <= curves._LEFT and columns.max() >= curves._WIDTH - curves._RIGHT
    assert left > curves._HEIGHT - curves._BOTTOM - 4 and right < curves._TOP + 4


def test_many_values_are_pale_under_their_running_mean():
    noisy = [1.0 + (-1) ** i for i in range(300)]  # 0 and 2 in turn: the mean stays at 1
    picture = draw_curves({"loss": (list(range(300)), noisy)})
    strong, pale = (np.nonzero(ink(picture, colour))[0] for colour in curves._COLOURS[0])
    assert np.ptp(pale) > 150 and np.ptp(strong) < 40


def test_a_constant_or_a_single_value_is_drawn_too():
    for ys in ([3.0], [0.0, 0.0]):
        picture = draw_curves({"loss": (list(map(float, range(len(ys)))), ys)})
        assert ink(picture, curves._COLOURS[0][0]).any()


def test_the_command_writes_a_picture_a_stage(tmp_path, capsys):
    write_log(tmp_path, [{"step": i, "loss": 1 / i} for i in range(1, 9)], "encoder")
    write_log(tmp_path, [{"step": i, "kimg": i, "g_loss": 1 / i} for i in range(1, 9)], "gan")
    assert main(["curves", str(tmp_path)]) == 0
    assert sorted(p.name for p in (tmp_path / "grids").iterdir()) == ["encoder_curves.png", "gan_curves.png"]
    assert "gan_curves.png" in capsys.readouterr().out
    assert write_curves(tmp_path, "gan") == [tmp_path / "grids" / "gan_curves.png"]
    assert main(["curves", str(tmp_path), "--stage", "oracle"]) == 2
    assert "must be a run folder with logs/oracle.jsonl in it" in capsys.readouterr().err
