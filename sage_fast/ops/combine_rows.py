"""Weighted sums of some rows and columns of a table, as joint codes are drawn (Eq. 20)."""

from __future__ import annotations

import torch
from torch import Tensor

from sage_fast import _native
from sage_fast.errors import InputError
from sage_fast.ops.inputs import require_floats, require_tensor

__all__ = ["combine_rows", "combine_rows_reference", "pulled_in", "require_below"]


def combine_rows(weights: Tensor, table: Tensor, centre: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``weights @ (table - centre)[rows][:, columns]``, without a copy of the rows.

    The draw of Eq. 20 of [SAGE] is such a sum: of pooled codes less their mean, with normal weights. Differentiable any
    number of times in weights, table and centre. A row of a kernel's result depends on its own weights alone, to the last bit.

    Args:
        weights: [N, m], floating.
        table: [M, C].
        centre: [C].
        rows: int64 [m], 0 to M - 1; columns: int64 [K], 0 to C - 1.
    Returns:
        [N, K].
    Raises:
        InputError: shapes or dtypes that do not belong together; on a CPU, a row or column that is not there. Elsewhere a
            look at them would wait for the device, and what they would give is NaN.
    """
    _check(weights, table, centre, rows, columns)
    native = weights.dtype in (torch.float32, torch.float64)
    if native and _native.has_kernel("combine_rows", weights.device.type):
        op = torch.ops.sage_fast.combine_rows.default
        return _native.call(op, (weights, table, centre), rows, columns)
    return combine_rows_reference(weights, table, centre, rows, columns)


def combine_rows_reference(weights: Tensor, table: Tensor, centre: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The same in plain PyTorch."""
    _check(weights, table, centre, rows, columns)
    require_below("rows", rows, table.shape[0])
    require_below("columns", columns, table.shape[1])
    return weights @ _picked(table, centre, rows, columns)


def _picked(table: Tensor, centre: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[m, K], NaN in rows and columns that are not there."""
    (rows, known_rows), (columns, known_columns) = pulled_in(rows, table.shape[0]), pulled_in(columns, table.shape[1])
    known = known_rows[:, None] & known_columns
    return torch.where(known, table[rows][:, columns] - centre[columns], torch.nan)


def _check(weights: Tensor, table: Tensor, centre: Tensor, rows: Tensor, columns: Tensor) -> None:
    require_floats("weights", weights, 2, "[N, m]")
    require_floats("table", table, 2, "[M, C]")
    for name, tensor in (("centre", centre), ("rows", rows), ("columns", columns)):
        require_tensor(name, tensor)
    if centre.shape != table.shape[1:]:
        raise InputError(f"centre must have shape [{table.shape[1]}], as table has columns, got {list(centre.shape)}.")
    for name, tensor in (("table", table), ("centre", centre)):
        if tensor.dtype != weights.dtype or tensor.device != weights.device:
            raise InputError(
                f"{name} must be {weights.dtype} on {weights.device}, as weights are, got {tensor.dtype} on {tensor.device}."
            )
    for name, index in (("rows", rows), ("columns", columns)):
        if index.ndim != 1 or index.dtype != torch.int64 or index.device != weights.device:
            raise InputError(
                f"{name} must be int64 and flat on {weights.device}, got {index.dtype} {list(index.shape)} on {index.device}."
            )
    if rows.shape[0] != weights.shape[1]:
        raise InputError(f"rows must hold {weights.shape[1]} numbers, one for each weight, got {len(rows)}.")
    if 0 in table.shape:  # the one thing that no device's kernel makes NaN of
        require_below("rows", rows, table.shape[0])
        require_below("columns", columns, table.shape[1])


def require_below(name: str, index: Tensor, limit: int) -> None:
    """Raise InputError for a number of ``index`` outside 0 to limit - 1; on a CPU only: elsewhere the look would wait.

    There, and under ``torch.func``, where batches cannot be looked at, :func:`pulled_in` makes of them what is inside, unless
    nothing is.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or not index.numel():
        return
    if limit == 0:
        raise InputError(f"{name} must be empty, since there is nothing to choose from, got {index.numel()} numbers.")
    if index.device.type != "cpu":
        return
    lowest, highest = (int(end) for end in torch.aminmax(index))
    if lowest < 0 or highest >= limit:
        raise InputError(f"{name} must be 0 to {limit - 1}, got {lowest} to {highest}.")


def pulled_in(index: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """``index`` with what is outside 0 to limit - 1 at the nearest end, and where it was inside.

    On a GPU, indexing with what is outside would end every later use of the device by this process.
    """
    return index.clamp(0, max(limit - 1, 0)), (index >= 0) & (index < limit)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    weights, table, centre, rows, columns = ctx.saved_tensors
    grad_weights = grad @ _picked(table, centre, rows, columns).T if ctx.needs_input_grad[0] else None
    grad_table = grad_centre = None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        grad_picked = weights.T @ grad  # [m, K]
        (rows, _), (columns, _) = pulled_in(rows, table.shape[0]), pulled_in(columns, table.shape[1])
        grad_rows = grad.new_zeros(rows.shape[0], table.shape[1]).index_add(1, columns, grad_picked)
        grad_table = table.new_zeros(table.shape).index_add(0, rows, grad_rows)
        grad_centre = -grad_rows.sum(0)
    return grad_weights, grad_table, grad_centre, None, None


@_native.when_loaded
def _register() -> None:
    def fake(weights, table, centre, rows, columns):
        return weights.new_empty(weights.shape[0], columns.shape[0])

    torch.library.register_fake("sage_fast::combine_rows", fake)
    _native.register_autograd("combine_rows", _backward, _setup_context)
