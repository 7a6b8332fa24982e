"""Products of bfloat16 rows, and finding out which rows are such."""

import pytest
import torch

from laplace_lora.linalg.half_rows import BFLOAT16, HalfRows, product, split
from laplace_lora.linalg.sketch import LowRankFactor, sketch_columns
from laplace_lora.linalg.sketch_basis import sketch_basis_terms


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_two_terms_hold_a_matrix_to_seventeen_bits():
    matrix = random(20, 7) * torch.logspace(-6, 6, 7)
    terms = split(matrix).float()
    error = (terms[:, :7] + terms[:, 7:] - matrix).abs()
    assert bool((error <= 2**-17 * matrix.abs()).all())
    assert bool((split(matrix)[:, :7].float() - matrix).abs().max() > 1e-3 * error.max())


def test_a_product_is_nearly_as_good_as_in_single_precision():
    rows, matrix = random(300, 50).to(BFLOAT16), random(50, 6, seed=1)
    exact = rows.double() @ matrix.double()
    error = (product(rows, split(matrix)) - exact).norm() / exact.norm()
    rounded = (rows.float() @ matrix.to(BFLOAT16).float() - exact).norm() / exact.norm()
    assert error < 1e-5 < 1e-4 < rounded


@pytest.mark.parametrize("columns", [12, 16, 138])
def test_terms_of_a_test_matrix_are_whole_sixteen_bytes_filled_with_zeros(columns):
    terms = sketch_basis_terms(150, columns, torch.device("cpu"))
    assert terms.is_contiguous() and terms.shape[1] * terms.element_size() % 32 == 0
    rounded, rest = terms.chunk(2, dim=1)
    assert rounded.count_nonzero() == 150 * columns and rest[:, columns:].count_nonzero() == 0


def test_products_in_two_terms_make_the_same_sketch():
    rows, rank = random(300, 50).to(BFLOAT16), 4
    factor = LowRankFactor.zeros(50, rank, torch.float32, "cpu")
    factor.update(rows)
    columns = sketch_columns(rank)
    projected = product(rows, sketch_basis_terms(50, columns, rows.device))
    padded = product(rows.T, split(projected))
    assert padded.shape[1] > columns and padded[:, columns:].count_nonzero() == 0
    assert (padded[:, :columns] - factor.sketch).norm() < 1e-5 * factor.sketch.norm()


def test_rows_are_narrowed_after_a_batch_in_which_they_were_exact():
    half = HalfRows(devices=("cpu",))
    exact, inexact = random(5, 3).to(BFLOAT16).float(), random(5, 3)
    for _ in range(2):  # of the columns of a batch
        assert half.narrowed(1, exact) is exact
        assert half.narrowed(2, inexact) is inexact
    half.settle()
    narrow = half.narrowed(1, exact)
    assert narrow.dtype == BFLOAT16 and torch.equal(narrow.float(), exact)
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
