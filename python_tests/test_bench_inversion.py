"""What the benchmark of projection says of its numbers, and that ``make bench`` runs it."""

from __future__ import annotations

from pathlib import Path

from bench_inversion import verdict

MAKEFILE = Path(__file__).parents[1] / "Makefile"


def case(ratio: float, excess: float) -> dict:
    return {"ratio": ratio, "mean_loss_together": 0.5 * excess, "mean_loss_alone": 0.5}


def test_the_verdict_is_that_of_the_worst_case_in_time_and_in_loss():
    found = verdict([case(3.5, 1.0), case(2.5, 1.01), case(4.0, 0.9)])
    assert found["holds"] and (found["batch_of_8_ratio"], found["mean_loss_excess"]) == (2.5, 1.01)
    assert not verdict([case(3.5, 1.0), case(1.9, 1.0)])["holds"]
    assert not verdict([case(3.5, 1.0), case(3.5, 1.04)])["holds"]


def test_make_bench_runs_it():
    recipe = MAKEFILE.read_text().split("\nbench:", 1)[1].split("\n\n", 1)[0]
    assert "benchmarks/bench_inversion.py" in recipe
