"""combine_rows (the draw of Eq. 20): kernel against reference and NumPy, derivatives, and bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sage_fast.errors import InputError
from sage_fast.ops import combine_rows, combine_rows_reference
from sage_fast.ops.combine_rows import _picked

SIZES = [(1, 1, 1), (5, 17, 9), (9, 600, 70), (4, 0, 3), (0, 5, 3), (3, 5, 0)]  # N, m, K


def arguments(n=5, m=17, k=9, dtype=torch.float32):
    """weights [N, m], table [40, 80], centre [80], rows [m] and columns [K], which may repeat."""
    rng = torch.Generator().manual_seed(n + m)
    shapes = (n, m), (40, 80), (80,)
    weights, table, centre = (torch.randn(shape, generator=rng, dtype=dtype) for shape in shapes)
    return weights, table, centre, torch.randint(40, (m,), generator=rng), torch.randint(80, (k,), generator=rng)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_kernel_equals_reference(size, dtype):
    given = arguments(*size, dtype=dtype)
    weights, table, centre, rows, columns = (t.double() if t.is_floating_point() else t for t in given)
    exact, terms = combine_rows_reference(weights, table, centre, rows, columns), _picked(table, centre, rows, columns)
    # m sums, a product and a difference: roundings that are independent grow with their root (Higham & Mary 2019)
    bound = (size[1] ** 0.5 + 2) * torch.finfo(dtype).eps / 2 * (weights.abs() @ terms.abs())
    for op in combine_rows, combine_rows_reference:
        assert ((op(*given) - exact).abs() <= bound).all()


@pytest.mark.parametrize("op", [combine_rows, combine_rows_reference])
def test_equals_numpy(op):
    weights, table, centre, rows, columns = arguments(dtype=torch.float64)
    less = table.numpy() - centre.numpy()
    expected = weights.numpy() @ less[np.ix_(rows.numpy(), columns.numpy())]
    np.testing.assert_allclose(op(weights, table, centre, rows, columns), expected, atol=1e-13)


def test_memory_layouts(laid_out):
    weights, table, centre, rows, columns = arguments()
    weights, table = laid_out(weights[:, None])[:, 0], laid_out(table[:, None])[:, 0]
    given = weights, table, centre.repeat(2)[:80], rows, columns
    torch.testing.assert_close(combine_rows(*given), combine_rows_reference(*given), atol=3e-5, rtol=3e-5)


def test_a_row_is_summed_by_itself(same_bits_for_all_thread_counts):
    weights, *others = arguments(23, 1100, 75)
    whole = combine_rows(weights, *others)
    for a, b in ((0, 1), (3, 10), (22, 23)):
        assert torch.equal(combine_rows(weights[a:b], *others), whole[a:b])
    same_bits_for_all_thread_counts(lambda: combine_rows(weights, *others))


def test_nan_stays_in_its_column_or_row():
    weights, table, centre, rows, columns = arguments()
    table[rows[3], columns[2]] = float("nan")
    weights[1, 0] = float("inf")
    y = combine_rows(weights, table, centre, rows, columns)
    assert torch.equal(y.isfinite(), combine_rows_reference(weights, table, centre, rows, columns).isfinite())
    assert not y[:, 2].isfinite().any() and not y[1].isfinite().any()


def test_gradients():
    *tensors, rows, columns = arguments(3, 4, 5, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in tensors]
    op = lambda *t: combine_rows(*t, rows, columns)  # noqa: E731
    assert torch.autograd.gradcheck(op, tensors)
    assert torch.autograd.gradgradcheck(op, tensors)


def test_opcheck():
    weights, *others = arguments()
    torch.library.opcheck(torch.ops.sage_fast.combine_rows.default, (weights.requires_grad_(), *others))


@pytest.mark.parametrize("op", [combine_rows, combine_rows_reference])
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(weights=torch.zeros(2)), r"weights must be floating point \[N, m\]"),
        (dict(centre=torch.zeros(5)), r"centre must have shape \[4\], as table has columns, got \[5\]"),
        (dict(table=torch.zeros(6, 4).double()), "table must be torch.float32 on cpu, .* got torch.float64"),
        (dict(rows=torch.zeros(3)), "rows must be int64 and flat on cpu, got torch.float32"),
        (dict(columns=torch.zeros(3, dtype=torch.int64, device="meta")), "columns must be int64 .* on meta"),
        (dict(rows=torch.zeros(2, dtype=torch.int64)), "rows must hold 3 numbers, one for each weight, got 2"),
    ],
)
def test_bad_input(op, change, message):
    index = torch.zeros(3, dtype=torch.int64)
    given = dict(weights=torch.zeros(2, 3), table=torch.zeros(6, 4), centre=torch.zeros(4), rows=index, columns=index)
    with pytest.raises(InputError, match=message):
        op(**given | change)


def test_refuses_rows_and_columns_that_are_not_there():
    weights, table, centre, rows, columns = arguments()
    with pytest.raises(ValueError, match="rows must be rows of table"):
        combine_rows(weights, table, centre, rows + 40, columns)
    with pytest.raises(ValueError, match="columns must be columns of table"):
        combine_rows(weights, table, centre, rows, columns - 80)
    with pytest.raises(InputError, match="rows must be 0 to "):
        combine_rows_reference(weights, table, centre, rows + 40, columns)
    with pytest.raises(InputError, match="columns must be 0 to "):
        combine_rows_reference(weights, table, centre, rows, columns - 80)


def test_rows_and_columns_that_nobody_looked_at_are_nan():
    """On a GPU a look would wait, and plain indexing there would end the process's use of it."""
    _, table, centre, rows, columns = arguments()
    rows, columns = rows.clone(), columns.clone()
    good = _picked(table, centre, rows, columns)
    rows[1], columns[0], columns[2] = len(table), -1, table.shape[1] + 5
    found = _picked(table, centre, rows, columns)
    assert found[1].isnan().all() and found[:, [0, 2]].isnan().all()
    good[1] = good[:, [0, 2]] = torch.nan
    assert torch.equal(found.nan_to_num(9.0), good.nan_to_num(9.0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_goes_on_after_rows_that_are_not_there():
    given = [t.cuda() for t in arguments()]
    known = given[3].clone()
    known[0] = 40
    for op in (combine_rows, combine_rows_reference):
        weights, table, centre = (t.clone().requires_grad_() for t in given[:3])
        assert op(weights, table, centre, known, given[4]).isnan().all()
        columns = given[4].clone()
        columns[0] = -1
        y = op(weights, table, centre, given[3], columns)
        assert y[:, 0].isnan().all() and torch.equal(y[:, 1:], op(*given)[:, 1:])
        gradients = torch.autograd.grad(y[:, 1:].sum(), (table, centre))
        torch.cuda.synchronize()
        assert all(g.isfinite().all() for g in gradients)


def test_a_table_without_rows_or_columns():
    weights, table, centre, rows, columns = arguments()
    none = torch.zeros(0, dtype=torch.int64)
    for op in (combine_rows, combine_rows_reference):
        with pytest.raises(InputError, match="rows must be empty"):
            op(weights, table[:0], centre, rows, columns)
        with pytest.raises(InputError, match="columns must be empty"):
            op(weights, table[:, :0], centre[:0], rows, columns)
        assert torch.equal(op(weights[:, :0], table[:0], centre, none, columns), torch.zeros(5, 9))
