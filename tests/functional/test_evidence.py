"""`model_evidence`: the Gaussian integral of the linearised model."""

import math
from typing import get_args

import pytest
import torch
from torch.func import functional_call, jacrev

from laplace_lora.functional import (
    KFAC_t,
    activation_t,
    calculate_kronecker_factors,
    model_evidence,
    outgrad_t,
    variance,
)
from support.functional import (
    Classifier,
    adapters_only,
    class_of,
    factors_of,
    log_likelihood,
    one_example,
)
from support.references import assert_near


@pytest.mark.parametrize("bias", [False, True])
def test_evidence_is_the_gaussian_integral_of_the_linearised_model(bias):
    """With the curvature's eigenbasis as axes the integral is a product of one-dimensional ones."""
    batch = one_example()
    model = Classifier(bias)
    call = lambda m, b: m(b)  # noqa: E731
    factors = calculate_kronecker_factors(model, call, [batch])
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    names = dict(model.named_parameters())

    def log_joint_parts(vector):
        parts = vector.split([p.numel() for p in model.parameters()])
        weights = {k: v.view_as(p) for (k, p), v in zip(names.items(), parts, strict=True)}
        return functional_call(model, weights, (batch,))[0]

    J = jacrev(log_joint_parts)(theta)
    p = log_joint_parts(theta).softmax(-1)
    ggn = J.T @ (p.diag() - torch.outer(p, p)) @ J
    LL = log_joint_parts(theta).log_softmax(-1)[1].detach()
    values = torch.linalg.eigvalsh(ggn)
    previous = -math.inf
    for s2 in (1e-3, 0.1, 10.0):
        grid = torch.linspace(-12, 12, 20001, dtype=torch.float64) * s2**0.5
        log_integral = sum(
            torch.trapezoid(torch.exp(-0.5 * (e + 1 / s2) * grid**2), grid).log()
            - 0.5 * math.log(2 * math.pi * s2)
            for e in values.clamp(min=0)
        )
        expected = LL - 0.5 * theta.square().sum() / s2 + log_integral
        evidence = model_evidence(model, LL, factors, None, None, s2)
        assert_near(evidence, expected)
        if s2 < 1:
            assert evidence > previous  # a prior far narrower than the weights is bad
        previous = evidence


def test_evidence_peaks_where_the_prior_fits_and_has_gradients():
    model = adapters_only("bert")
    factors = factors_of(model, "bert")
    LL = log_likelihood(model, "bert")
    la = class_of(model, "bert")
    la.optimize_prior_precision(correction=False)
    best = (1 / la.prior_precision.double()).requires_grad_()
    evidence = model_evidence(model, LL, factors, 2, None, best)
    evidence.backward()
    assert evidence.shape == (1,)
    assert abs(best.grad * best).item() < 1e-6
    for factor in (0.5, 2.0):
        assert model_evidence(model, LL, factors, 2, None, factor * best) < evidence


@pytest.mark.parametrize("s2", [0.0, -1.0, math.nan, math.inf, [0.1, 0.2]])
def test_a_prior_variance_must_be_one_positive_number(s2):
    model = Classifier()
    factors = calculate_kronecker_factors(model, lambda m, b: m(b), [one_example()])
    with pytest.raises(ValueError, match="s2 is the prior variance"):
        model_evidence(model, torch.tensor(0.0), factors, None, None, torch.tensor(s2))
    with pytest.raises(ValueError, match="s2 is the prior variance"):
        variance({}, {}, factors, torch.tensor(s2), 2, None, None, "cpu")


def test_factors_that_were_changed_are_decomposed_again():
    """A write to ``factor.data`` leaves its version as it is."""
    model = Classifier()
    factors = calculate_kronecker_factors(model, lambda m, b: m(b), [one_example()])

    def evidence(factors):
        return model_evidence(model, torch.tensor(0.0), factors, None, None, 10.0)

    before = evidence(factors)
    for change in (lambda f: f.mul_(3), lambda f: f.data.mul_(3)):
        change(factors["lora"][0])
        fresh = {name: (x.clone(), g.clone()) for name, (x, g) in factors.items()}
        assert_near(evidence(factors), evidence(fresh))
    assert abs(evidence(factors) - before) > 0.1


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_prior_variance_may_have_any_shape_of_one_number(shape):
    model, batch = Classifier(), one_example()
    factors = calculate_kronecker_factors(model, lambda m, b: m(b), [batch])
    s2 = torch.full(shape, 0.3, dtype=torch.float64, requires_grad=True)
    given = (model, torch.tensor(-2.0), factors, None, None)
    evidence, expected = model_evidence(*given, s2), model_evidence(*given, 0.3)
    assert evidence.shape == shape
    assert_near(evidence.detach().flatten(), expected.flatten(), 1e-6)
    assert torch.autograd.grad(evidence.sum(), s2)[0].shape == shape
    jacobian = {
        name: torch.ones(1, 2, *p.shape, dtype=p.dtype) for name, p in model.named_parameters()
    }
    of = (batch, jacobian, factors)
    assert_near(
        variance(*of, s2, 2, None, None, "cpu").detach(),
        variance(*of, 0.3, 2, None, None, "cpu"),
        1e-6,
    )


def test_annotations_of_bayesian_lora_say_what_is_returned():
    factors = calculate_kronecker_factors(Classifier(), lambda m, b: m(b), [one_example()])
    name_type, (inputs, grads) = get_args(KFAC_t)[0], get_args(get_args(KFAC_t)[1])
    assert (inputs, grads) == (activation_t, outgrad_t)
    for name, (input_factor, grad_factor) in factors.items():
        assert isinstance(name, name_type)
        assert isinstance(input_factor, inputs)
        assert isinstance(grad_factor, grads)
