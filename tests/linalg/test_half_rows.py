"""Products of bfloat16 rows, and finding out which rows are such."""

import pytest
import torch

from laplace_lora.linalg.half_rows import HALF, HalfRows, product, split


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_two_terms_hold_a_matrix_to_seventeen_bits():
    matrix = random(20, 7) * torch.logspace(-6, 6, 7)
    rounded, rest = split(matrix).float().unflatten(1, (2, -1)).unbind(1)
    error = (rounded + rest)[:, :7] - matrix
    assert bool((error.abs() <= 2**-17 * matrix.abs()).all())
    assert bool((rounded[:, :7] - matrix).abs().max() > 1e-3 * error.abs().max())


@pytest.mark.parametrize("columns", [1, 7, 8, 138])
def test_rows_of_both_terms_are_whole_sixteen_bytes_filled_with_zeros(columns):
    terms = split(random(3, columns) + 5)
    assert terms.is_contiguous() and terms.shape[1] * terms.element_size() % 32 == 0
    rounded, rest = terms.unflatten(1, (2, -1)).unbind(1)
    assert rounded.count_nonzero() == 3 * columns and rest[:, columns:].count_nonzero() == 0


def test_a_product_is_nearly_as_good_as_in_single_precision():
    rows, matrix = random(300, 50).to(HALF), random(50, 6, seed=1)
    exact = rows.double() @ matrix.double()
    error = (product(rows, split(matrix), 6) - exact).norm() / exact.norm()
    rounded = (rows.float() @ matrix.to(HALF).float() - exact).norm() / exact.norm()
    assert error < 1e-5 < 1e-4 < rounded


def test_rows_are_narrowed_after_a_batch_in_which_they_were_exact():
    half = HalfRows(devices=("cpu",))
    exact, inexact = random(5, 3).to(HALF).float(), random(5, 3)
    for _ in range(2):  # of the columns of a batch
        assert half.narrowed(1, exact) is exact
        assert half.narrowed(2, inexact) is inexact
    half.settle()
    narrow = half.narrowed(1, exact)
    assert narrow.dtype == HALF and torch.equal(narrow.float(), exact)
    assert half.narrowed(2, inexact) is inexact


@pytest.mark.parametrize("rows", [random(5, 3).double(), random(5, 3)])
def test_other_dtypes_and_devices_are_left_alone(rows):
    half = HalfRows(devices=("cuda",) if rows.dtype == torch.float32 else ("cpu",))
    assert half.narrowed(1, rows) is rows
    half.settle()
    assert half.narrowed(1, rows) is rows


def test_zeros_show_nothing():
    half = HalfRows(devices=("cpu",))
    half.narrowed(1, torch.zeros(5, 3))
    half.settle()
    inexact = random(5, 3)
    assert half.narrowed(1, inexact) is inexact
