"""A caller's autocast reaches the model, and none of the functional interface's own algebra."""

import pytest
import torch

from laplace_lora import LogitsModel
from laplace_lora.functional import (
    calculate_kronecker_factors,
    cholesky_decompose_small_factors,
    jacobian_mean,
    model_evidence,
    predict_probs,
    register_hooks,
    variance,
)
from laplace_lora.likelihoods.roots import softmax_root
from support.batches import loader, token_batch
from support.functional import DENSE, LOW, S2, adapters_only, factors_of
from support.references import assert_near


def autocast(enabled=True):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def call(inside):
    """A forward pass that switches autocast on or off, or leaves it as the caller has it."""

    def forward_call(model, batch):
        if inside is None:
            return LogitsModel(model)(batch)
        with autocast(inside):
            return LogitsModel(model)(batch)

    return forward_call


def squares(factors):
    """The covariances that roots stand for, to which signs do not matter."""
    return [f if f.shape[0] == f.shape[1] else f @ f.T for pair in factors.values() for f in pair]


@pytest.mark.parametrize("n_kfac,lr_threshold", [DENSE, LOW])
def test_factors_are_those_of_autocast_inside_the_model(n_kfac, lr_threshold):
    model = adapters_only("bert", dtype=torch.float32)
    options = (loader(), n_kfac, lr_threshold, ["lora"])
    for around, inside in ((None, True), (False, False)):
        expected = calculate_kronecker_factors(model, call(inside), *options)
        with autocast():
            found = calculate_kronecker_factors(model, call(around), *options)
        assert {f.dtype for pair in found.values() for f in pair} == {torch.float32}
        assert_near(squares(found), squares(expected), 1e-5)


def test_jacobians_are_those_of_autocast_inside_the_model():
    model, batch = adapters_only("bert", dtype=torch.float32), token_batch((4, 2))
    plain, plain_f = jacobian_mean(model, batch)
    with autocast():
        jacobian, f = jacobian_mean(model, batch)
    base = model.get_base_model()
    base.forward = autocast()(base.forward)
    inside, inside_f = jacobian_mean(model, batch)
    assert f.dtype == torch.float32 and not torch.equal(f, plain_f)
    assert_near(f, inside_f, 1e-6)
    assert_near(list(jacobian.values()), list(inside.values()), 1e-5)
    assert max(float((jacobian[k] - plain[k]).abs().max()) for k in plain) > 0


@pytest.mark.parametrize("n_kfac,lr_threshold", [DENSE, LOW])
def test_what_follows_from_factors_does_not_change(n_kfac, lr_threshold):
    model, batch = adapters_only("bert", dtype=torch.float32), token_batch((4, 2))
    factors = factors_of(model, "bert", n_kfac=n_kfac, lr_threshold=lr_threshold)
    jacobian, f = jacobian_mean(model, batch)

    def results():
        rooted = cholesky_decompose_small_factors(
            {name: (x.clone(), g.clone()) for name, (x, g) in factors.items()},
            512 if n_kfac is None else 0,
            "cpu",
            torch.float32,
        )
        f_var = variance(batch, jacobian, rooted, S2.float(), 3, 2, n_kfac, "cpu")
        evidence = model_evidence(model, torch.tensor(-3.0), rooted, 2, n_kfac, S2.float())
        return [f_var, evidence, predict_probs(f, f_var, "quadrature")]

    expected = results()
    with autocast():
        found = results()
    assert [value.dtype for value in found] == [value.dtype for value in expected]
    for value, other in zip(found, expected, strict=True):
        assert_near(value, other, 1e-6)


@pytest.mark.parametrize("n_kfac,lr_threshold", [DENSE, LOW])
def test_hooks_sum_in_full_precision(n_kfac, lr_threshold):
    model = adapters_only("bert", dtype=torch.float32).eval()
    options = (loader(), n_kfac, lr_threshold, ["lora"])
    expected = calculate_kronecker_factors(model, call(True), *options)
    with autocast():
        activations, output_grads = {}, {}
        with register_hooks(model, activations, output_grads, ["lora"], n_kfac, lr_threshold):
            for batch in loader():
                logits = LogitsModel(model)(batch)
                for column in softmax_root(logits.detach()):
                    (logits * column).sum().backward(retain_graph=True)
        found = {name: (activations[name][0], output_grads[name][0]) for name in activations}
    n = len(loader().dataset)
    sides = zip(squares(found), squares(expected), strict=True)
    for k, (side, other) in enumerate(sides):
        assert_near(side / n if k % 2 == 0 else side, other, 1e-4)
