"""Dense and sketched sums of outer products."""

import pytest
import torch

from laplace_lora.linalg.factor_spec import FactorSpec
from laplace_lora.linalg.factors import TILE, DenseFactor, DiagonalFactor, map_shared
from laplace_lora.linalg.sketch import LowRankFactor
from support.references import assert_near

D, RANK = 60, 8


def rows(n=40, rank=None, dtype=torch.float64, seed=0):
    """Rows with a decaying spectrum, of a given rank."""
    generator = torch.Generator().manual_seed(seed)
    rank = rank or D
    left = torch.randn(n, rank, dtype=torch.float64, generator=generator)
    right = torch.randn(rank, D, dtype=torch.float64, generator=generator)
    return ((left * 0.7 ** torch.arange(rank)) @ right).to(dtype)


def sketch_of(*batches, rank=RANK, dtype=torch.float64):
    factor = LowRankFactor.zeros(D, rank, dtype, "cpu")
    for batch in batches:
        factor.update(batch)
    return factor


def dense(eigen):
    U, rest = eigen.vectors, torch.eye(D) - eigen.vectors @ eigen.vectors.T
    return U @ eigen.values.diag() @ U.T + eigen.residual * rest


def test_dense_factor_sums_weighted_outer_products():
    factor = DenseFactor.zeros(D, torch.float64, "cpu")
    X, Y = rows(seed=1), rows(7, seed=2)
    factor.update(X, 2.0)
    factor.update(Y)
    torch.testing.assert_close(factor.matrix, 2 * X.T @ X + Y.T @ Y)
    torch.testing.assert_close(factor.trace, factor.matrix.trace())
    torch.testing.assert_close(dense(factor.decompose()), factor.matrix)


def test_sketch_is_linear_and_keeps_the_trace():
    X, Y = rows(seed=1), rows(7, seed=2)
    whole = sketch_of(torch.cat([X, Y]))
    merged = sketch_of(X).add(sketch_of(Y))
    torch.testing.assert_close(merged.sketch, whole.sketch)
    torch.testing.assert_close(merged.trace, whole.trace)
    torch.testing.assert_close(whole.trace, torch.cat([X, Y]).square().sum())
    weighted = LowRankFactor.zeros(D, RANK, torch.float64, "cpu")
    weighted.update(X, 3.0)
    torch.testing.assert_close(weighted.sketch, (sketch_of(X) * 3).sketch)
    torch.testing.assert_close(weighted.trace, (sketch_of(X) * 3).trace)


def test_adding_a_matrix_equals_adding_its_rows():
    X, Y = rows(seed=1), rows(7, seed=2)
    both = sketch_of(X).add(Y.T @ Y)
    torch.testing.assert_close(both.sketch, sketch_of(X, Y).sketch)
    torch.testing.assert_close(both.trace, sketch_of(X, Y).trace)


@pytest.mark.parametrize("rank", [1, 3, RANK])
def test_a_matrix_within_the_rank_is_recovered_exactly(rank):
    X = rows(rank=rank)
    eigen = sketch_of(X).decompose()
    torch.testing.assert_close(dense(eigen), X.T @ X, rtol=0, atol=1e-9 * X.square().sum().item())
    torch.testing.assert_close(eigen.vectors.T @ eigen.vectors, torch.eye(RANK).double())


def test_leading_eigenvalues_are_close_and_never_above_the_truth():
    X = rows(200)
    truth = torch.linalg.eigvalsh(X.T @ X).flip(0)[:RANK]
    eigen = sketch_of(X).decompose()
    values = eigen.values.sort(descending=True).values
    assert (values <= truth * (1 + 1e-9)).all()
    torch.testing.assert_close(values[:4], truth[:4], rtol=0.02, atol=0)


def test_isotropic_residual_keeps_the_trace_and_zero_drops_it():
    X = rows(200)
    isotropic, zero = (sketch_of(X).decompose(residual) for residual in ("isotropic", "zero"))
    torch.testing.assert_close(dense(isotropic).trace(), X.square().sum())
    assert zero.residual == 0 < isotropic.residual
    torch.testing.assert_close(zero.values, isotropic.values)


def test_single_precision_sums_decompose_stably():
    X = rows(200, dtype=torch.float32)
    single = sketch_of(X, dtype=torch.float32).decompose()
    double = sketch_of(X.double()).decompose()
    torch.testing.assert_close(
        single.values.double(), double.values, rtol=1e-4, atol=1e-5 * double.values.max().item()
    )
    assert single.values.dtype == torch.float32


def test_half_precision_rows_are_summed_in_single_precision():
    X = rows(dtype=torch.bfloat16)
    for factor in (sketch_of(X, dtype=torch.float32), DenseFactor.zeros(D, torch.float32, "cpu")):
        factor.update(X)
        assert factor.trace.dtype != torch.bfloat16
    torch.testing.assert_close(factor.matrix, X.float().T @ X.float())


def test_an_empty_sketch_decomposes_to_zero():
    eigen = sketch_of().decompose()
    assert not dense(eigen).any()


@pytest.mark.parametrize(
    ("d", "rank", "threshold", "kind"),
    [
        (100, None, 10, DenseFactor),
        (100, 20, 100, DenseFactor),
        (100, 20, 99, LowRankFactor),
        (100, 45, 10, DenseFactor),  # 2 · 45 + 10 columns would be no smaller
        (101, 45, 10, LowRankFactor),
    ],
)
def test_a_side_is_sketched_where_that_makes_it_smaller(d, rank, threshold, kind):
    factor = FactorSpec(rank, threshold).empty(d, torch.float32, "cpu")
    assert type(factor) is kind
    assert factor.d == d
    assert factor.nbytes <= d * d * 4


def test_sketches_of_other_sizes_do_not_add_up():
    with pytest.raises(ValueError, match="cannot add sketches"):
        sketch_of().add(sketch_of(rank=RANK - 1))
    with pytest.raises(ValueError, match="needs 1 ≤ rank"):
        LowRankFactor.zeros(D, D, torch.float64, "cpu")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad):
    for factor in (sketch_of(), DenseFactor.zeros(D, torch.float64, "cpu")):
        factor.update(torch.full((2, D), bad, dtype=torch.float64))
        with pytest.raises(FloatingPointError, match="not finite"):
            factor.decompose()


def test_map_shared_visits_an_object_once():
    calls = []
    a, b = object(), object()
    result = map_shared([[a, b], [a]], lambda x: calls.append(x) or object())
    assert len(calls) == 2
    assert result[0][0] is result[1][0]


def test_diagonals_add_up_and_refuse_what_is_not_finite():
    rows = torch.randn(6, 5)
    factor = DiagonalFactor.zeros(5, torch.float64, "cpu")
    factor.update(rows[:2])
    factor.update(rows[2:], weight=2.0)
    assert_near(factor.sums, (rows[:2].square().sum(0) + 2 * rows[2:].square().sum(0)).double())
    assert_near((factor * 3).add(factor).sums, 4 * factor.sums)
    assert_near(factor.add(torch.ones(5, 5)).sums, factor.sums + 1)
    factor.update(torch.full((1, 5), torch.inf))
    with pytest.raises(FloatingPointError, match="not finite"):
        factor.decompose()


@pytest.mark.parametrize("kind", [DenseFactor, LowRankFactor])
def test_a_diagonal_adds_up_with_a_factor_of_another_kind(kind):
    rank = [RANK] if kind is LowRankFactor else []
    other, both = (kind.zeros(D, *rank, torch.float64, "cpu") for _ in range(2))
    diagonal = DiagonalFactor.zeros(D, torch.float64, "cpu")
    units = torch.eye(D, dtype=torch.float64)[torch.arange(0, D, 3)]
    other.update(rows())
    diagonal.update(units, 0.5)
    both.update(torch.cat([rows(), 0.5**0.5 * units]))
    for joint in (other.add(diagonal), diagonal.add(other)):
        assert isinstance(joint, kind)
        for mine, expected in zip(joint.tensors(), both.tensors(), strict=True):
            torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("kind", [DenseFactor, LowRankFactor, DiagonalFactor])
def test_rows_may_have_weights_of_their_own(kind):
    X = rows()
    weights = torch.rand(len(X), dtype=X.dtype, generator=torch.Generator().manual_seed(3))
    ours, theirs = (
        kind.zeros(D, RANK, X.dtype, "cpu")
        if kind is LowRankFactor
        else kind.zeros(D, X.dtype, "cpu")
        for _ in range(2)
    )
    ours.update(X, weights)
    theirs.update(X * weights.sqrt().unsqueeze(1))
    for mine, other in zip(ours.tensors(), theirs.tensors(), strict=True):
        torch.testing.assert_close(mine, other)


def test_single_precision_eigenvectors_are_orthonormal():
    torch.manual_seed(0)
    X = torch.randn(400, 300) * torch.logspace(3, -3, 300)
    factor = LowRankFactor.zeros(300, 40, torch.float32, "cpu")
    factor.update(X)
    eigen = factor.decompose()
    torch.testing.assert_close(eigen.vectors.T @ eigen.vectors, torch.eye(40), atol=1e-5, rtol=0)
    exact = torch.linalg.eigvalsh((X.T @ X).double()).flip(0)[:10].float()
    torch.testing.assert_close(eigen.values[:10], exact, rtol=1e-2, atol=0)


def test_a_sketch_keeps_the_trace_of_many_rows_in_single_precision():
    torch.manual_seed(0)
    X = torch.randn(4000, 900) * torch.logspace(2, -3, 900)
    factor = LowRankFactor.zeros(900, 4, torch.float32, "cpu")
    factor.update(X)
    exact = X.double().square().sum()
    torch.testing.assert_close(factor.trace, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("d", [TILE, TILE + 1, 2 * TILE + 60])
def test_a_long_dense_sum_is_whole_whenever_it_is_read(d):
    data, weights = torch.randn(3, 7, d).double(), torch.rand(7).double()
    factor, expected = DenseFactor.zeros(d, torch.float64, "cpu"), torch.zeros(d, d).double()
    for more, weight in zip(data, (0.5, weights, weights), strict=True):
        factor.update(more, weight)
        each = weight if weight is weights else torch.full((7,), weight).double()
        expected += torch.einsum("n,ni,nj->ij", each, more, more)
        torch.testing.assert_close(factor.trace, expected.trace())
        if weight is not weights:  # read between two updates
            torch.testing.assert_close(factor.matrix, expected)
    torch.testing.assert_close(factor.tensors()[0], expected)
    torch.testing.assert_close((2 * factor).add(factor).matrix, 3 * expected)


def test_a_sketch_in_single_precision_keeps_small_eigenvalues():
    """Rounding hides those below some 1e-7 of the largest, whatever the side's length."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 3000, generator=generator) * 0.8 ** torch.arange(40.0).unsqueeze(1)
    factor = LowRankFactor.zeros(3000, 64, torch.float32, "cpu")
    for batch in rows.split(4):
        factor.update(batch)
    found = factor.decompose("zero").values.sort(descending=True).values.double()
    truth = torch.linalg.eigvalsh(rows.double() @ rows.double().T).flip(0)
    delta = 1e-4 * truth[0]
    assert abs(found[0] / truth[0] - 1) < 2e-6
    error = torch.log1p(found / delta).sum() - torch.log1p(truth / delta).sum()
    assert abs(error) < 0.2, error
