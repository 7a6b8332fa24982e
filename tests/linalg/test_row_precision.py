"""The precision of a posterior over rows: inverse, diagonal, root."""

import pytest
import torch

from support.exact_posteriors import BOTH, LAYERS, exact_posterior
from support.references import assert_near


@pytest.mark.parametrize("cls,kwargs", BOTH)
@pytest.mark.parametrize("prior", [0.7, torch.linspace(0.1, 4, LAYERS)])
def test_covariance_times_precision_is_the_identity(cls, kwargs, prior):
    P = exact_posterior(cls, prior_precision=prior, **kwargs).posterior_precision
    matrix, inverse = P.to_matrix(), P.to_matrix(-1)
    assert_near(matrix @ inverse, torch.eye(len(matrix)).double())
    assert_near(P.diag(), matrix.diagonal())
    assert_near(P.diag(-1), inverse.diagonal())
    root = P.root_multiply(torch.eye(len(matrix)).double())
    assert_near(root.T @ root, inverse)
    for query in (P.diag, P.to_matrix):
        with pytest.raises(ValueError, match="1 or -1"):
            query(2)
