"""Cholesky factors of matrices that rounding has made indefinite."""

import pytest
import torch

from laplace_lora.likelihoods.regression import whitened
from laplace_lora.linalg.cholesky import shifted_cholesky


def test_positive_matrices_have_their_own_factor():
    torch.manual_seed(0)
    root = torch.randn(4, 3, 3).double()
    matrices = root @ root.mT
    assert torch.equal(shifted_cholesky(matrices), torch.linalg.cholesky(matrices))


def test_others_are_shifted_by_little_and_leave_the_rest_as_it_is():
    positive, singular = torch.eye(2).double(), torch.ones(2, 2).double()
    indefinite = singular - 1e-9 * torch.eye(2).double()
    factors = shifted_cholesky(torch.stack([positive, indefinite]))
    assert torch.equal(factors[0], positive)
    torch.testing.assert_close(factors[1] @ factors[1].mT, singular, rtol=0, atol=1e-6)


def test_what_is_not_finite_stays_so():
    bad = torch.full((2, 2), torch.nan).double()
    factors = shifted_cholesky(torch.stack([bad, torch.eye(2).double()]))
    assert factors[0].isnan().all() and torch.equal(factors[1], torch.eye(2).double())


def test_gradients_pass_through_the_shift():
    scale = torch.ones(1, dtype=torch.float64, requires_grad=True)
    factor = shifted_cholesky(scale * torch.ones(3, 3).double())
    factor.diagonal().sum().backward()
    assert scale.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_predictions_that_are_sure_and_without_noise_can_be_scored(dtype):
    """Two outputs that one weight moves: a covariance of rank one."""
    covariance = torch.tensor([[1.0, 3.0], [3.0, 9.0]], dtype=dtype).expand(5, 2, 2) / 3
    residual = torch.randn(5, 2, dtype=dtype)
    squares, log_dets = whitened(residual, covariance, 1e-9)
    assert squares.isfinite().all() and log_dets.isfinite().all()
