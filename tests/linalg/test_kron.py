"""Algebra of Kronecker blocks with dense and low-rank sides."""

import pytest
import torch
from laplace.utils import Kron

from laplace_lora import LowRankKron
from laplace_lora.linalg.factors import DenseFactor
from laplace_lora.linalg.sketch import LowRankFactor

SIZES = [(4, 20), (25, 5), (25, 20), (4, 5), (6,)]  # low-rank sides: 20 and 25
RANK = 4


def filled(d, sketched, seed, rank=None):
    kind = LowRankFactor.zeros(d, RANK, torch.float64, "cpu") if sketched else None
    factor = kind or DenseFactor.zeros(d, torch.float64, "cpu")
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(30, rank or d, dtype=torch.float64, generator=generator)
    factor.update(left @ torch.randn(rank or d, d, dtype=torch.float64, generator=generator))
    return factor


def low_rank_kron(seed=0, residual="isotropic", rank=None):
    return LowRankKron(
        [
            [filled(d, d >= 20, seed + 10 * i + d, rank) for d in size]
            for i, size in enumerate(SIZES)
        ],
        residual,
    )


def dense_kron(seed=0, rank=None):
    return Kron(
        [
            [filled(d, False, seed + 10 * i + d, rank).matrix for d in size]
            for i, size in enumerate(SIZES)
        ]
    )


@pytest.fixture(params=["isotropic", "zero"])
def precision(request):
    deltas = torch.linspace(0.5, 2.5, len(SIZES)).double()
    return low_rank_kron(residual=request.param).decompose() * 3.0 + deltas


P = sum(size[0] * (size[1] if len(size) == 2 else 1) for size in SIZES)


def test_covariance_times_precision_is_the_identity(precision):
    torch.testing.assert_close(
        precision.to_matrix(-1) @ precision.to_matrix(), torch.eye(P).double()
    )


def test_every_power_agrees_with_the_dense_matrix(precision):
    values, vectors = torch.linalg.eigh(precision.to_matrix())
    for exponent in (-1, -0.5, 0.5, 2):
        expected = vectors @ values.pow(exponent).diag() @ vectors.T
        torch.testing.assert_close(precision.to_matrix(exponent), expected)
        torch.testing.assert_close(precision.diag(exponent), expected.diagonal())


def test_matrix_is_symmetric_and_its_blocks_carry_their_prior(precision):
    matrix = precision.to_matrix()
    torch.testing.assert_close(matrix, matrix.T)
    floor = torch.linalg.eigvalsh(matrix[:80, :80]).min()
    assert floor >= precision.deltas[0] * (1 - 1e-9)


def test_logdet_counts_every_direction(precision):
    torch.testing.assert_close(precision.logdet(), precision.to_matrix().logdet())
    sizes = torch.tensor([torch.Size(size).numel() for size in SIZES])
    prior = (sizes * precision.deltas.log()).sum()
    torch.testing.assert_close(precision.log_det_ratio(), precision.to_matrix().logdet() - prior)


def test_products_and_square_forms_agree_with_the_dense_matrix(precision):
    W = torch.randn(3, 2, P, dtype=torch.float64)
    covariance = precision.to_matrix(-1)
    torch.testing.assert_close(precision.bmm(W, exponent=-1), W @ covariance)
    torch.testing.assert_close(precision.bmm(W[0, 0], exponent=-1), W[0, 0] @ covariance)
    torch.testing.assert_close(precision.bmm(W[0]), W[0] @ covariance)
    torch.testing.assert_close(precision.inv_square_form(W), W @ covariance @ W.mT)


def test_evidence_terms_are_differentiable_in_prior_and_scale():
    decomposed = low_rank_kron().decompose()
    deltas = torch.rand(len(SIZES), dtype=torch.float64).add(0.5).requires_grad_()
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d, s: (decomposed * s + d).logdet(), (deltas, scale))
    assert torch.autograd.gradcheck(
        lambda d, s: (decomposed * s + d).log_det_ratio(), (deltas, scale)
    )


@pytest.mark.parametrize("rank", [1, RANK])
def test_a_factor_rank_that_suffices_equals_dense(rank):
    ours = (low_rank_kron(rank=rank).decompose() + torch.tensor(0.7)).to_matrix()
    theirs = (dense_kron(rank=rank).decompose() + torch.tensor(0.7)).to_matrix()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_sums_and_scalings_follow_laplace_torch():
    ours, more = low_rank_kron(0, rank=2), low_rank_kron(0, rank=2) * 0.5
    theirs = dense_kron(0, rank=2)
    torch.testing.assert_close(
        (ours * 5.0).to_matrix(), (theirs * 5.0).to_matrix(), rtol=1e-6, atol=1e-6
    )
    # Both factors of a block add up, so a sum of two halves is not the whole: (G+G) x (A+A/2).
    expected = Kron(
        [[X[0] * (2 if len(X) == 2 else 1.5), *(x * 1.5 for x in X[1:])] for X in theirs.kfacs]
    )
    torch.testing.assert_close(
        (ours + more).to_matrix(), expected.to_matrix(), rtol=1e-6, atol=1e-6
    )


def test_a_plain_kron_can_be_added_from_either_side():
    ours, theirs = low_rank_kron(0, rank=2), dense_kron(0, rank=2)
    for total in (ours + theirs, theirs + ours):
        assert isinstance(total, LowRankKron)
        torch.testing.assert_close(
            total.to_matrix(), (theirs + theirs).to_matrix(), rtol=1e-6, atol=1e-5
        )


def test_undecomposed_queries_are_those_of_the_decomposition():
    kron = low_rank_kron()
    matrix = kron.to_matrix()
    W = torch.randn(2, P, dtype=torch.float64)
    torch.testing.assert_close(kron.bmm(W), W @ matrix)
    torch.testing.assert_close(kron.diag(), matrix.diagonal())
    dense = LowRankKron([[filled(4, False, 0), filled(5, False, 1)]])
    torch.testing.assert_close(dense.logdet(), dense.to_matrix().logdet())


def test_shared_factors_stay_shared_and_are_counted_once():
    a, b, c = filled(20, True, 0), filled(4, False, 1), filled(5, False, 2)
    kron = LowRankKron([[b, a], [b], [c, a]])
    for derived in (kron + kron, kron * 2.0, kron.scale_inputs(0.5), kron.to("cpu")):
        assert derived.kfacs[0][1] is derived.kfacs[2][1]
    assert kron.nbytes == a.nbytes + b.nbytes + c.nbytes
    decomposed = kron.decompose()
    assert decomposed.blocks[0][1] is decomposed.blocks[2][1]
    assert decomposed.blocks[0][0] is decomposed.blocks[1][0]
    # The bias keeps its own scale although it shares the weight's gradient factor.
    torch.testing.assert_close((kron * 2.0).to_matrix(), 2.0 * kron.to_matrix())


def test_scaling_the_inputs_leaves_biases_alone():
    kron = low_rank_kron()
    scaled = kron.scale_inputs(0.25).to_matrix()
    torch.testing.assert_close(scaled[:-6, :-6], 0.25 * kron.to_matrix()[:-6, :-6])
    torch.testing.assert_close(scaled[-6:, -6:], kron.to_matrix()[-6:, -6:])


def test_kept_and_left_out_directions_do_not_cancel_in_single_precision():
    """A tiny prior beside huge eigenvalues: the covariance of a kept direction stays accurate."""
    U = torch.linalg.qr(torch.randn(200, 4, dtype=torch.float64)).Q
    factor = LowRankFactor.zeros(200, 4, torch.float32, "cpu")
    factor.update((1e3 * U.T).float())
    one = DenseFactor(torch.ones(1, 1))
    precision = LowRankKron([[one, factor]], "zero").decompose() + torch.tensor(1e-3)
    W = U[:, 0].float().reshape(1, 1, -1)
    variance = precision.inv_square_form(W).item()
    assert variance == pytest.approx(1e-6, rel=5e-2)


def test_misuse_is_refused():
    kron = low_rank_kron()
    with pytest.raises(ValueError, match="damping is not supported"):
        kron.decompose(damping=True)
    with pytest.raises(ValueError, match="residual must be one of"):
        LowRankKron(kron.kfacs, "some")
    with pytest.raises(ValueError, match="same parameters"):
        kron + LowRankKron(kron.kfacs[:1])
    with pytest.raises(ValueError, match="Invalid shape of delta"):
        kron.decompose() + torch.ones(2)
