"""The precision of a posterior over rows: inverse, diagonal, root."""

import pytest
import torch

from laplace_lora.linalg.row_precision import RowPrecision
from laplace_lora.linalg.row_storage import RowStorage
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


@pytest.mark.parametrize("delta", [1.0, 1e-4])
def test_single_precision_rows_keep_small_variances_under_a_wide_prior(delta):
    generator = torch.Generator().manual_seed(0)
    Z = 30 * torch.randn(20, 300, generator=generator)
    rows = RowStorage([300], torch.float32, torch.float32, torch.device("cpu"))
    rows.append(0, Z)
    values, vectors = torch.linalg.eigh(Z.double() @ Z.double().T)
    P = RowPrecision(rows, [torch.ones(())], values, vectors, 1.0, delta)
    J = Z[:6].view(3, 2, 300)  # the data leave these directions a variance below one
    true = J.double() @ torch.linalg.solve(
        Z.double().T @ Z.double() + delta * torch.eye(300).double(), J.double().mT
    )
    assert float(true.max()) < 1.01
    ((_, forms),) = P.forms([J], lambda _, e: (1 / (e + delta)).unsqueeze(1))
    for form in (P.covariance([J]), forms.squeeze(-1)):
        assert form.dtype == torch.float32
        assert (form - true).abs().max() < 1e-4
    single = P.diag(-1), P.solve(torch.eye(300))
    exact = torch.linalg.inv(Z.double().T @ Z.double() + delta * torch.eye(300).double())
    assert_near(single[0].double(), exact.diagonal(), 1e-5)
    assert_near(single[1].double(), exact, 1e-5)


def test_single_precision_samples_are_narrow_where_the_data_are_many():
    generator = torch.Generator().manual_seed(0)
    Z = 3e5 * torch.randn(20, 300, generator=generator)
    rows = RowStorage([300], torch.float32, torch.float32, torch.device("cpu"))
    rows.append(0, Z)
    values, vectors = torch.linalg.eigh(Z.double() @ Z.double().T)
    P = RowPrecision(rows, [torch.ones(())], values, vectors, 1.0, 1.0)
    samples = P.root_multiply(torch.randn(4000, 300, generator=generator))
    assert samples.dtype == torch.float32
    variances = (samples.double() @ Z.double().T).var(0)
    assert float(variances.max()) < 1.2  # of functions that the data leave a variance below one
