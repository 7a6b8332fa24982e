"""Roots of the output Hessian."""

import pytest
import torch

from laplace_lora.likelihoods.registry import likelihood_of
from laplace_lora.likelihoods.roots import contrast_root


def hessian_root(f, likelihood):
    return likelihood_of(likelihood).root(f, None)


def sampled_root(f, likelihood, num_samples):
    return likelihood_of(likelihood).sampled_root(f, num_samples, torch.zeros(len(f)))


def empirical_root(f, y, likelihood):
    return likelihood_of(likelihood).residual(f, y)


def negative_log_likelihood(f, y, likelihood):
    return likelihood_of(likelihood).nll(f, y)


def outer(columns):
    return torch.einsum("rnc,rnk->nck", columns, columns)


def softmax_hessian(f):
    p = f.softmax(-1)
    return torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 300.0])
def test_classification_root_is_exact_with_one_column_less(classes, scale):
    f = scale * torch.randn(20, classes, dtype=torch.float64)
    f[0] = -scale
    f[0, -1] = scale  # one-hot at the class the reflection singles out
    columns = hessian_root(f, "classification")
    assert columns.shape == (classes - 1, 20, classes)
    torch.testing.assert_close(outer(columns), softmax_hessian(f), atol=1e-15, rtol=1e-12)


def test_root_keeps_its_precision_in_single_precision():
    f = torch.tensor([[20.0, 0.0, -3.0]])
    exact = softmax_hessian(f.double())
    torch.testing.assert_close(
        outer(hessian_root(f, "classification")).double(), exact, rtol=1e-4, atol=1e-12
    )


def test_regression_root_is_the_identity():
    columns = hessian_root(torch.randn(4, 3), "regression")
    torch.testing.assert_close(outer(columns), torch.eye(3).expand(4, 3, 3))


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_sampled_root_is_unbiased(likelihood):
    torch.manual_seed(0)
    f = torch.randn(2, 3, dtype=torch.float64)
    expected = outer(hessian_root(f, likelihood))
    torch.testing.assert_close(
        outer(sampled_root(f, likelihood, 200_000)), expected, atol=0.02, rtol=0
    )


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_empirical_root_is_the_gradient_of_the_loss(likelihood):
    f = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    y = (
        torch.tensor([0, 1, 2, 1, 0])
        if likelihood == "classification"
        else torch.randn(5, 3).double()
    )
    (gradient,) = torch.autograd.grad(negative_log_likelihood(f, y, likelihood), f)
    torch.testing.assert_close(empirical_root(f.detach(), y, likelihood)[0], gradient)


def test_contrasts_forget_a_common_shift():
    f = torch.randn(4, 5)
    contrasts = torch.einsum("rnc,nc->nr", contrast_root(f), f)
    torch.testing.assert_close(contrasts, f[:, 1:] - f[:, :1])
    torch.testing.assert_close(
        contrasts, torch.einsum("rnc,nc->nr", contrast_root(f), f + 3), atol=1e-5, rtol=1e-5
    )


def test_one_logit_is_no_classifier():
    with pytest.raises(ValueError, match="at least two logits"):
        hessian_root(torch.zeros(4, 1), "classification")


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.tensor([0, 3]), "values from 0 to 3"),
        (torch.tensor([-100, 1]), "values from -100 to 1"),
        (torch.tensor([0.0, 1.0]), "one integer label"),
        (torch.tensor([[0], [1]]), "one integer label"),
    ],
)
def test_labels_outside_the_classes_are_refused(y, message):
    with pytest.raises(ValueError, match=message):
        negative_log_likelihood(torch.zeros(2, 3), y, "classification")


def test_targets_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="one target per output"):
        negative_log_likelihood(torch.zeros(2, 3), torch.zeros(2, 1), "regression")
