"""The linearised model in data space: its mode, and leave-one-out predictions."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from laplace_lora.likelihoods.registry import likelihood_of
from laplace_lora.tuning.left_out.linear_model import LinearModel, without_own


def regression(n=12, c=2, p=7, scale=4.0):
    torch.manual_seed(0)
    J = torch.randn(n * c, p, dtype=torch.float64)
    offset, y = torch.randn(2, n, c, dtype=torch.float64)
    return J, LinearModel(J @ J.T, offset, y, likelihood_of("regression"), False, scale)


def classes(n=30, c=2, p=9, seed=1):
    torch.manual_seed(seed)
    J = torch.randn(n * c, p, dtype=torch.float64)
    offset = torch.randn(n, c, dtype=torch.float64)
    y = torch.randint(c + 1, (n,))
    return J, LinearModel(J @ J.T, offset, y, likelihood_of("classification"), True)


def without(J, model, i, others=()):
    """Return the posterior of example i's functions when it is left out of a regression."""
    n, c = model.offset.shape
    keep = [k for k in range(n * c) if k // c not in (i, *others)]
    target = (model.labels - model.offset).flatten()[keep]
    precision = model.scale * J[keep].T @ J[keep] + 0.7 * torch.eye(J.shape[1], dtype=J.dtype)
    own = J[i * c : (i + 1) * c]
    weights = torch.linalg.solve(precision, model.scale * J[keep].T @ target)
    return model.offset[i] + own @ weights, own @ torch.linalg.solve(precision, own.T)


def test_leave_one_out_of_a_linear_gaussian_model_is_brute_force_deletion():
    J, model = regression()
    mean, covariance = model.leave_one_out(model.mode(0.7))
    for i in range(len(mean)):
        expected_mean, expected_covariance = without(J, model, i)
        torch.testing.assert_close(mean[i], expected_mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(covariance[i], expected_covariance, rtol=1e-10, atol=1e-10)


def test_companions_are_left_out_together():
    J, model = regression()
    companions = {0: [0, 5], 3: [3, 1, 7], 7: [7, 3], 5: [5, 0]}
    mean, covariance = model.leave_one_out(model.mode(0.7), companions)
    for i in range(len(mean)):
        expected_mean, expected_covariance = without(J, model, i, companions.get(i, ()))
        torch.testing.assert_close(mean[i], expected_mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(covariance[i], expected_covariance, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("c", [1, 4])
def test_mode_is_where_the_gradient_of_the_weights_vanishes(c):
    J, model = classes(c=c)
    mode = model.mode(0.3)
    weights = (J.T @ mode.coefficients.flatten() / 0.3).requires_grad_()
    f = model.offset + (J @ weights).view_as(model.offset)
    torch.testing.assert_close(f.detach(), mode.outputs)
    loss = F.cross_entropy(F.pad(f, (1, 0)), model.labels, reduction="sum")
    assert loss.item() == pytest.approx(mode.nll)
    (loss + 0.15 * weights.square().sum()).backward()
    assert weights.grad.abs().max() < 1e-5


def test_leave_one_out_of_a_classifier_is_close_to_deletion():
    J, model = classes(n=60, c=1)
    mean, _ = model.leave_one_out(model.mode(5.0))
    for i in range(0, 60, 7):
        keep = [k for k in range(60) if k != i]
        rows = (J[keep] @ J[keep].T, model.offset[keep], model.labels[keep], model.likelihood, True)
        mode = LinearModel(*rows).mode(5.0)
        weights = J[keep].T @ mode.coefficients.flatten() / 5
        torch.testing.assert_close(mean[i], model.offset[i] + J[i] @ weights, rtol=0, atol=0.02)


def test_a_start_changes_nothing_but_the_way():
    _, model = classes()
    there = model.mode(0.1, model.mode(3.0))
    torch.testing.assert_close(there.outputs, model.mode(0.1).outputs, rtol=0, atol=1e-5)


def test_fitted_like_reaches_a_training_loss():
    _, model = classes(p=60)
    for share in (0.2, 0.5, 0.8):
        target = share * model.nll(model.offset)
        assert model.fitted_like(target).nll == pytest.approx(target, rel=0.05)


@pytest.mark.parametrize("unit", [1e-8, 1e-5, 1e5, 1e8])
def test_fitted_like_reaches_it_in_any_unit_of_the_targets(unit):
    _, model = regression(p=30)
    other = replace(
        model, offset=unit * model.offset, labels=unit * model.labels, scale=model.scale / unit**2
    )
    for share in (0.01, 0.5, 0.99):
        target = share * model.nll(model.offset)
        mode, found = model.fitted_like(target), other.fitted_like(target)
        assert found.nll == pytest.approx(mode.nll, rel=0.05)
        torch.testing.assert_close(found.outputs / unit, mode.outputs, rtol=0, atol=0.05)


def test_fitted_like_takes_the_nearest_where_a_loss_is_out_of_reach():
    _, model = classes()
    worse = model.fitted_like(2 * model.nll(model.offset))
    torch.testing.assert_close(worse.outputs, model.offset, rtol=0, atol=1e-5)
    _, model = classes(p=2)  # too few weights to fit thirty labels
    best = model.fitted_like(0.0)
    assert best.nll == pytest.approx(model.mode(best.precision).nll)
    assert best.nll > 1


def test_weights_without_effect_are_refused():
    _, model = classes()
    still = LinearModel(0 * model.gram, model.offset, model.labels, model.likelihood, True)
    with pytest.raises(ValueError, match="no weight changes"):
        still.fitted_like(1.0)


def test_cavity_undoes_an_examples_own_curvature():
    torch.manual_seed(0)
    root = torch.randn(3, 2, 2, dtype=torch.float64)
    before = torch.randn(3, 2, 2, dtype=torch.float64)
    before = before @ before.mT
    marginal = torch.linalg.inv(torch.linalg.inv(before) + root.mT @ root)
    torch.testing.assert_close(without_own(marginal, root), before)


@pytest.mark.parametrize("make", [classes, regression])
def test_curved_rows_are_those_of_the_root(make):
    _, model = make()
    outputs = model.offset + 0.3
    rows = torch.randn(*outputs.shape, 5, dtype=torch.float64)
    root = model.root(outputs)
    torch.testing.assert_close(model.curved(outputs, rows), root.mT @ (root @ rows))


def test_copies_in_single_precision_have_a_cavity():
    """LAPACK's eigenvectors of matrices of equal entries are NaN in float32 now and then."""
    generator = torch.Generator().manual_seed(0)
    marginal = torch.rand(2000, 1, 1, generator=generator)
    root = 0.1 * torch.rand(2000, 1, 1, generator=generator).expand(2000, 12, 1)
    single = without_own(marginal, root)
    exact = 1 / (1 / marginal.double() - root.double().square().sum(1, keepdim=True))
    torch.testing.assert_close(single, exact.float(), rtol=1e-5, atol=0)
