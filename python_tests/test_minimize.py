"""Minimisers of many problems at once: against scipy and closed forms, and each row as if it were alone."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import minimize as scipy_minimize

from sage_fast.minimize import minimize_adam, minimize_lbfgs

N, P = 6, 12


def quadratics(n=N, p=P, seed=0):
    """0.5 x'Ax - b'x + 3 of every row, badly conditioned; the objective and the lowest values."""
    rng = torch.Generator().manual_seed(seed)
    root = torch.randn(n, p, p, generator=rng, dtype=torch.float64)
    A = root @ root.mT + 0.05 * torch.eye(p)
    b = torch.randn(n, p, generator=rng, dtype=torch.float64)

    def objective(x, rows):
        Ax = (A[rows] @ x[:, :, None])[:, :, 0]
        return 0.5 * (x * Ax).sum(1) - (b[rows] * x).sum(1) + 3, Ax - b[rows]

    return objective, 3 - 0.5 * (b * torch.linalg.solve(A, b)).sum(1)


def rosenbrock(x, rows):
    """Elementwise arithmetic and sums along rows only: the bits of a row do not depend on the batch."""
    a, b = x[:, :-1], x[:, 1:]
    gradient = torch.zeros_like(x)
    gradient[:, :-1] = -400 * a * (b - a * a) - 2 * (1 - a)
    gradient[:, 1:] += 200 * (b - a * a)
    return (100 * (b - a * a) ** 2 + (1 - a) ** 2).sum(1), gradient


def starts(n=N, p=P, seed=1):
    return torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_lbfgs_reaches_the_minimum_of_quadratics():
    objective, lowest = quadratics()
    found = minimize_lbfgs(objective, starts(), tolerance=1e-13)
    torch.testing.assert_close(found.values, lowest, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.values, objective(found.x, torch.arange(N))[0])


def test_lbfgs_reaches_what_scipy_reaches_with_about_as_many_evaluations():
    objective, _ = quadratics()
    ours = minimize_lbfgs(objective, starts(), tolerance=1e-12)
    options = dict(maxcor=10, maxiter=500, ftol=1e-15, gtol=1e-9)
    for i in range(N):

        def fun(x, i=i):
            value, gradient = objective(torch.from_numpy(x)[None], torch.tensor([i]))
            return value.item(), gradient[0].numpy()

        theirs = scipy_minimize(fun, starts()[i].numpy(), jac=True, method="L-BFGS-B", options=options)
        assert ours.values[i].item() == pytest.approx(theirs.fun, abs=1e-8)
        assert ours.n_evaluations[i] < 2 * theirs.nfev + 20


def test_lbfgs_follows_a_curved_valley():
    found = minimize_lbfgs(rosenbrock, starts().abs(), tolerance=1e-12)  # left of 0 lies another, local, minimum
    assert found.values.max() < 1e-12
    torch.testing.assert_close(found.x, torch.ones(N, P, dtype=torch.float64), rtol=0, atol=1e-5)


def test_lbfgs_goes_down_where_there_are_kinks():
    target = starts(seed=2)

    def objective(x, rows):
        return (x - target[rows]).abs().sum(1), (x - target[rows]).sign()

    found = minimize_lbfgs(objective, starts(), steps=200, tolerance=0)
    assert found.values.max() < 1e-2 * (starts() - target).abs().sum(1).min()


@pytest.mark.parametrize("minimize", [minimize_lbfgs, minimize_adam])
def test_a_row_is_what_it_is_alone_to_the_last_bit(minimize):
    x = starts()
    x[0] = 1.0  # at the minimum: leaves at once and makes the others move up
    x[3] *= 10
    options = dict(steps=300, tolerance=0.05, patience=10)
    together = minimize(rosenbrock, x, **options)
    assert len(set(together.n_evaluations.tolist())) > 2  # rows leave at different times
    for i in range(N):
        alone = minimize(rosenbrock, x[i : i + 1], **options)
        for ours, its in ((together.x, alone.x), (together.values, alone.values)):
            assert torch.equal(ours[i], its[0])
        assert together.n_steps[i] == alone.n_steps[0] and together.n_evaluations[i] == alone.n_evaluations[0]


@pytest.mark.parametrize("minimize", [minimize_lbfgs, minimize_adam])
def test_only_rows_on_their_way_are_evaluated(minimize):
    asked = torch.zeros(N, dtype=torch.int64)

    def objective(x, rows):
        asked[rows] += 1
        return rosenbrock(x, rows)

    x = starts()
    x[0] = 1.0
    found = minimize(objective, x, steps=120)
    assert torch.equal(asked, found.n_evaluations)
    assert asked[0] < asked.max()


@pytest.mark.parametrize("minimize", [minimize_lbfgs, minimize_adam])
def test_early_stopping_is_by_relative_decrease(minimize):
    objective, lowest = quadratics()
    coarse, fine = (minimize(objective, starts(), steps=3000, tolerance=t) for t in (1e-2, 1e-9))
    assert (coarse.n_steps < fine.n_steps).all() and (coarse.values >= fine.values).all()
    assert coarse.values.max() < objective(starts(), torch.arange(N))[0].max()


@pytest.mark.parametrize("minimize", [minimize_lbfgs, minimize_adam])
def test_steps_are_a_limit_and_more_never_end_higher(minimize):
    few, many = (minimize(rosenbrock, starts(), steps=s, tolerance=0) for s in (5, 50))
    assert (few.n_steps == 5).all() and (many.n_steps == 50).all()
    assert (many.values < few.values).all()


@pytest.mark.parametrize("minimize", [minimize_lbfgs, minimize_adam])
def test_values_that_are_no_numbers_stay_with_their_row(minimize):
    def objective(x, rows):
        value, gradient = rosenbrock(x, rows)
        return torch.where(rows == 2, torch.nan, value), gradient

    found = minimize(objective, starts(), steps=30)
    others = torch.arange(N) != 2
    assert not torch.isfinite(found.values[2])
    assert torch.equal(found.values[others], minimize(rosenbrock, starts(), steps=30).values[others])


def test_lbfgs_backs_off_from_where_there_are_no_values():
    def objective(x, rows):  # -log x + x: no value at x <= 0
        return (x - x.log()).sum(1), 1 - 1 / x

    found = minimize_lbfgs(objective, torch.full((2, 3), 5.0, dtype=torch.float64), lr=8.0, tolerance=1e-12)
    torch.testing.assert_close(found.x, torch.ones(2, 3, dtype=torch.float64), rtol=0, atol=1e-4)


def test_float32_and_progress():
    seen = []
    found = minimize_lbfgs(rosenbrock, starts().float(), steps=40, progress=lambda *now: seen.append(now))
    assert found.x.dtype == found.values.dtype == torch.float32
    assert seen[-1] == (N * 40, N * 40) and seen == sorted(seen)


def test_adam_gives_the_best_point_it_met():
    met = [[] for _ in range(N)]

    def objective(x, rows):
        value, gradient = rosenbrock(x, rows)
        for row, v in zip(rows.tolist(), value.tolist()):
            met[row].append(v)
        return value, gradient

    found = minimize_adam(objective, starts(), steps=60, lr=0.5, tolerance=0)
    assert found.values.tolist() == [min(values) for values in met]
    assert torch.equal(rosenbrock(found.x, None)[0], found.values)
