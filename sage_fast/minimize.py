"""Many small minimisations side by side: each row of a matrix is a problem of its own, one call evaluates them all.

``torch.optim.LBFGS`` and ``scipy.optimize`` see one vector and one number: given a batch, they sum its losses, share one
history, one step length and one stopping rule among all rows, and a hard row holds the others back. Here every row has its own, so
its result does not depend on its neighbours (but for the rounding of ``objective``), and rows that have finished drop out of the batch.
No row waits for another's line search either: in each round every row asks for the one point that it needs next.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

__all__ = ["Minima", "Objective", "minimize_adam", "minimize_lbfgs"]

Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x [n, P], rows int64 [n]) -> (values [n], gradients [n, P]); ``rows`` says which problems are asked for."""

Progress = Callable[[int, int], None]

_ARMIJO, _WOLFE = 1e-4, 0.9  # c1 and c2 of the line search
_MAX_TRIALS = 20  # points of one line search; each halves or doubles the step
_FIRST = 0.1  # root mean square of the first step, which has no curvature to go by
_MIN_CURVATURE = 1e-10  # pairs with y.s below this share of y.y are not remembered
_TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Minima:
    """Where N minimisations ended.

    Attributes:
        x: the best points [N, P].
        values: there [N].
        n_steps: int64 [N], steps that each took.
        n_evaluations: int64 [N], how often the objective was asked for each.
    """

    x: Tensor
    values: Tensor
    n_steps: Tensor
    n_evaluations: Tensor

    @classmethod
    def like(cls, x: Tensor) -> Minima:
        """Room for the results of ``x`` [N, P]."""
        counts = torch.zeros(2, len(x), dtype=torch.int64, device=x.device)
        return cls(torch.empty_like(x), x.new_empty(len(x)), counts[0], counts[1])


def minimize_lbfgs(
    objective: Objective,
    x: Tensor,
    steps: int = 500,
    lr: float = 1.0,
    history: int = 10,
    tolerance: float = 1e-5,
    patience: int = 10,
    progress: Progress | None = None,
) -> Minima:
    """L-BFGS (Nocedal and Wright 2006, Alg. 7.4 and 7.5) on every row of ``x``, with a line search for the weak Wolfe conditions.

    The line search is bisection and doubling (Lewis and Overton 2013, Alg. 4.6), which also serves functions with kinks, as absolute
    errors and leaky ReLUs have. Where it finds no lower point the history is forgotten; if that does not help, the row has finished.

    Args:
        objective: see :data:`Objective`.
        x: the starting points [N, P], float32 or float64.
        steps: at most so many, in each row; at least 1.
        lr: the step that a line search tries first, in units of the quasi-Newton step.
        history: how many pairs of steps and gradient changes are remembered.
        tolerance: a row has finished when its value fell by less than this share in its last ``patience`` steps.
        progress: called with (steps done or no longer needed, ``N * steps``).
    """
    found = Minima.like(x)
    state = _begin(objective, x, lr, history, patience)
    while len(state.rows):
        value, gradient = objective(state.x + state.step[:, None] * state.direction, state.rows)
        state.n_evaluations += 1
        moved, lost = _search(state, value, gradient)
        stuck = lost & (state.rho == 0).all(1)  # already along the gradient
        _renew(state, moved, lost, lr)
        finished = stuck | (state.n_steps >= steps) | (moved & _is_flat(state, tolerance))
        if bool(finished.any()):
            _store(found, state.rows, finished, state.x, state.value, state.n_steps, state.n_evaluations)
            state = state.keep(~finished)
        if progress is not None:
            _report(progress, len(x), steps, state.n_steps)
    return found


@dataclass
class _State:
    """What L-BFGS knows of the n rows that are still on their way."""

    rows: Tensor  # int64 [n]
    x: Tensor  # [n, P], with value [n] and gradient [n, P] there
    value: Tensor
    gradient: Tensor
    direction: Tensor  # [n, P] of the line search, with the slope [n] along it at x
    slope: Tensor
    step: Tensor  # [n] to be tried next; the sought one lies between low and high
    low: Tensor
    high: Tensor
    low_value: Tensor  # at low
    low_gradient: Tensor
    n_trials: Tensor  # int64 [n]
    s: Tensor  # [n, m, P] steps, and y [n, m, P] changes of the gradient; rho [n, m] is 1 / s.y, or 0 where there is no pair
    y: Tensor
    rho: Tensor
    newest: Tensor  # int64 [n], where the next pair goes in the ring of m
    past: Tensor  # [n, patience] values of the last steps, a ring too
    n_steps: Tensor  # int64 [n]
    n_evaluations: Tensor  # int64 [n]

    def keep(self, kept: Tensor) -> _State:
        return _State(*(getattr(self, field.name)[kept] for field in fields(self)))


def _begin(objective: Objective, x: Tensor, lr: float, history: int, patience: int) -> _State:
    n, p = x.shape
    rows = torch.arange(n, device=x.device)
    value, gradient = objective(x, rows)
    zeros, counts = x.new_zeros(n), torch.zeros_like(rows)
    pairs, past = x.new_zeros(n, history, p), x.new_full((n, patience), math.inf)
    direction = _steepest(gradient)
    slope = _dot(direction, gradient)
    bracket = (torch.full_like(zeros, lr), zeros, torch.full_like(zeros, math.inf), value, gradient, counts)
    memory = (pairs, pairs.clone(), x.new_zeros(n, history), counts, past)
    return _State(rows, x, value, gradient, direction, slope, *bracket, *memory, counts.clone(), counts + 1)


def _search(state: _State, value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Judge the points tried; rows that found one take it and remember the pair. Returns masks [n]: moved, and found nothing."""
    slope = _dot(gradient, state.direction)
    lower = value <= state.value + _ARMIJO * state.step * state.slope  # False for a value that is no number
    lower &= torch.isfinite(slope)
    good = lower & (slope >= _WOLFE * state.slope)
    state.n_trials = state.n_trials + 1
    state.low = torch.where(lower, state.step, state.low)
    state.low_value = torch.where(lower, value, state.low_value)
    state.low_gradient = torch.where(lower[:, None], gradient, state.low_gradient)
    state.high = torch.where(lower, state.high, state.step)
    last = ~good & (state.n_trials >= _MAX_TRIALS)
    moved = good | (last & (state.low > 0))  # at the last trial a lower point is good enough
    _move(state, moved)
    state.step = torch.where(torch.isfinite(state.high), (state.low + state.high) / 2, 2 * state.step)
    return moved, last & ~moved


def _move(state: _State, moved: Tensor) -> None:
    """Rows in ``moved`` go to their point ``low`` and remember the pair."""
    s = torch.where(moved[:, None], state.low[:, None] * state.direction, 0)
    y = torch.where(moved[:, None], state.low_gradient - state.gradient, 0)
    curvature = _dot(s, y)
    kept = moved & (curvature > _MIN_CURVATURE * _dot(y, y))
    each = torch.arange(len(s), device=s.device)
    for ring, new in ((state.s, s), (state.y, y), (state.rho, 1 / curvature)):
        old = ring[each, state.newest]
        ring[each, state.newest] = torch.where(kept.view(-1, *[1] * (new.ndim - 1)), new, old)
    state.newest = (state.newest + kept) % state.s.shape[1]
    slot = (each, state.n_steps % state.past.shape[1])
    oldest = state.past[slot]
    state.past[slot] = torch.where(moved, state.value, oldest)
    state.x = state.x + s
    state.value = torch.where(moved, state.low_value, state.value)
    state.gradient = torch.where(moved[:, None], state.low_gradient, state.gradient)
    state.n_steps = state.n_steps + moved


def _renew(state: _State, moved: Tensor, lost: Tensor, lr: float) -> None:
    """A new direction and line search for the rows that have moved, or that found nothing and forget their history."""
    state.rho = torch.where(lost[:, None], 0, state.rho)
    direction = _quasi_newton(state)
    slope = _dot(direction, state.gradient)
    uphill = ~(slope < 0)
    state.rho = torch.where((moved & uphill)[:, None], 0, state.rho)
    direction = torch.where(uphill[:, None], _steepest(state.gradient), direction)
    slope = torch.where(uphill, _dot(direction, state.gradient), slope)
    fresh = moved | lost
    state.direction = torch.where(fresh[:, None], direction, state.direction)
    state.slope = torch.where(fresh, slope, state.slope)
    state.step = torch.where(fresh, lr, state.step)
    state.low, state.high = torch.where(fresh, 0, state.low), torch.where(fresh, math.inf, state.high)
    state.n_trials = torch.where(fresh, 0, state.n_trials)


def _quasi_newton(state: _State) -> Tensor:
    """The two-loop recursion, -H g [n, P], in every row; along the gradient where the history is empty."""
    n, m = state.rho.shape
    each = torch.arange(n, device=state.rho.device)
    order = [(each, (state.newest - 1 - age) % m) for age in range(m)]  # newest first
    q, alphas = state.gradient, []
    for slot in order:
        alphas.append(state.rho[slot] * _dot(state.s[slot], q))  # 0 where there is no pair
        q = q - alphas[-1][:, None] * state.y[slot]
    newest = order[0]
    empty = state.rho[newest] == 0
    y = state.y[newest]
    scale = 1 / (state.rho[newest] * _dot(y, y)).clamp_min(_TINY)
    q = torch.where(empty[:, None], -_steepest(state.gradient), scale[:, None] * q)
    for slot, alpha in zip(reversed(order), reversed(alphas)):
        q = q + (alpha - state.rho[slot] * _dot(state.y[slot], q))[:, None] * state.s[slot]
    return -q


def _steepest(gradient: Tensor) -> Tensor:
    """Against the gradient, at the length of a first step."""
    length = torch.linalg.vector_norm(gradient, dim=1, keepdim=True).clamp_min(_TINY)
    return gradient * (-_FIRST * math.sqrt(gradient.shape[1]) / length)


def _is_flat(state: _State, tolerance: float) -> Tensor:
    """Whether the value has hardly changed since as many steps ago as ``past`` holds."""
    each = torch.arange(len(state.rows), device=state.rows.device)
    before = state.past[each, state.n_steps % state.past.shape[1]]  # the next to be overwritten: the oldest
    return torch.isfinite(before) & (before - state.value <= tolerance * before.abs())


def minimize_adam(
    objective: Objective,
    x: Tensor,
    steps: int = 500,
    lr: float = 0.1,
    tolerance: float = 1e-5,
    patience: int = 50,
    progress: Progress | None = None,
) -> Minima:
    """Adam (Kingma and Ba 2015) on every row of ``x``; arguments as :func:`minimize_lbfgs`.

    The rate rises over the first twentieth of the steps and falls as a cosine over the last quarter, as in the projector of
    Karras et al. 2020 [StyleGAN2]. A row has finished when its best value fell by less than ``tolerance`` of itself in
    ``patience`` steps.
    """
    found = Minima.like(x)
    rows, best_x = torch.arange(len(x), device=x.device), x
    best = before = x.new_full((len(x),), math.inf)
    mean, square = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(1, steps + 1):
        value, gradient = objective(x, rows)
        better = value < best
        best, best_x = torch.where(better, value, best), torch.where(better[:, None], x, best_x)
        mean, square = torch.lerp(mean, gradient, 0.1), torch.lerp(square, gradient.square(), 0.001)
        change = mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        x = x - lr * _rate(step / steps) * change
        finished = torch.full_like(better, step == steps) | ~torch.isfinite(value)
        if step % patience == 0:
            finished = finished | (before - best <= tolerance * best.abs())
            before = best
        if bool(finished.any()):
            count = torch.full_like(rows, step)
            _store(found, rows, finished, best_x, best, count, count)
            kept = ~finished
            rows, x, best_x, best, before = rows[kept], x[kept], best_x[kept], best[kept], before[kept]
            mean, square = mean[kept], square[kept]
        if progress is not None:
            _report(progress, len(found.x), steps, torch.full_like(rows, step))
        if not len(rows):
            break
    return found


def _rate(done: float) -> float:
    """The share of the learning rate when ``done`` (0 to 1) of the steps are."""
    return min(1.0, done / 0.05) * (0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - done) / 0.25)))


def _store(found: Minima, rows: Tensor, finished: Tensor, *results: Tensor) -> None:
    for field, result in zip(fields(found), results):
        getattr(found, field.name)[rows[finished]] = result[finished]


def _report(progress: Progress, n: int, steps: int, n_steps: Tensor) -> None:
    progress(n * steps - int((steps - n_steps).sum()), n * steps)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Of each row: [n, P], [n, P] -> [n]."""
    return (a * b).sum(1)
