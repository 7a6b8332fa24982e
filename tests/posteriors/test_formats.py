"""Half precision: numbers are kept in single precision or better."""

import copy

import pytest
import torch

from laplace_lora import DiagLoraLaplace, KronLoraLaplace
from support.batches import loader, token_batch
from support.exact_posteriors import BOTH, NEW_BATCH, exact_posterior
from support.models import TARGETS, peft_model
from support.posteriors import CLASSES, DENSE, LOW, fitted_on, posterior
from support.references import assert_near

BATCH = token_batch((4, 2, 5), seed=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_numbers_are_kept_in_single_precision_or_better(cls, kwargs, dtype):
    la = posterior(cls, dtype=dtype, prior_precision=0.123456789, **kwargs)
    assert {p.dtype for p in la.model.parameters()} == {dtype}
    numbers = [la.prior_precision, la.prior_mean, la.mean, la.sigma_noise]
    numbers += [la.H] if cls is DiagLoraLaplace else [x for X in la.H.eigenvectors for x in X]
    assert {number.dtype for number in numbers} == {torch.float32}
    assert la.log_marginal_likelihood().dtype in (torch.float32, torch.float64)
    reference = posterior(cls, dtype=torch.float64, prior_precision=0.123456789, **kwargs)
    evidence, exact = (
        la.log_marginal_likelihood().item(),
        reference.log_marginal_likelihood().item(),
    )
    assert evidence == pytest.approx(exact, rel=0.02 if dtype == torch.bfloat16 else 1e-4)
    batch = token_batch((4, 2), seed=9)
    for link in ("probit", "mc"):
        probabilities = la(batch, link_approx=link, generator=torch.Generator().manual_seed(0))
        assert probabilities.dtype == torch.float32
        exact = reference(batch, link_approx="probit").float()
        torch.testing.assert_close(probabilities, exact, atol=0.1 if link == "mc" else 0.02, rtol=0)


def test_a_bfloat16_base_with_float32_adapters():
    model = peft_model("llama-lm", dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    la = KronLoraLaplace(model, "classification", target_ids=TARGETS, **LOW)
    la.fit(loader())
    la.optimize_prior_precision(n_steps=5)
    reference = posterior(dtype=torch.float32, **LOW)
    reference.optimize_prior_precision(n_steps=5)
    assert la.log_marginal_likelihood().item() == pytest.approx(
        reference.log_marginal_likelihood().item(), rel=0.02
    )


def half(model, dtype, adapters):
    """Return a copy in half precision; PEFT keeps adapters in float32 unless told otherwise."""
    small = copy.deepcopy(model).to(dtype)
    for name, parameter in small.named_parameters():
        if "lora_" in name and not adapters:
            parameter.data = parameter.data.float()
    return small


@pytest.mark.parametrize("adapters", [False, True], ids=["float adapters", "half adapters"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "cls,kwargs", [(KronLoraLaplace, DENSE), (KronLoraLaplace, LOW), (DiagLoraLaplace, {})]
)
@pytest.mark.parametrize("name", ["bert", "llama", "llama-lm"])
def test_half_precision_models_agree_with_single_precision(name, cls, kwargs, dtype, adapters):
    model = peft_model(name, dtype=torch.float32)
    model = half(model, dtype, adapters).float()  # the same weights in both
    whole = fitted_on(model, name, cls, **kwargs)
    small = fitted_on(half(model, dtype, adapters), name, cls, **kwargs)
    assert small.mean.dtype == small.prior_precision.dtype == torch.float32
    expected = whole.log_marginal_likelihood()
    assert (small.log_marginal_likelihood() - expected).abs() < 0.01 * expected.abs()
    for la in (whole, small):
        la.prior_precision = 10.0
    assert (small(BATCH) - whole(BATCH)).abs().max() < 0.01
    assert small(BATCH).dtype == torch.float32


def test_single_precision_agrees_with_double():
    exact = exact_posterior(prior_precision=0.2)
    for cls, kwargs in BOTH:
        la = exact_posterior(cls, dtype=torch.float32, prior_precision=0.2, **kwargs)
        assert la.rows.dtype == torch.float32 and la(NEW_BATCH).dtype == torch.float32
        assert_near(la(NEW_BATCH).double(), exact(NEW_BATCH), 1e-4)
        assert_near(la.log_marginal_likelihood(), exact.log_marginal_likelihood(), 1e-3)
