"""`jacobian_mean`, `variance` and `predict_probs`, without the faults of bayesian_lora 0.0.6."""

import math

import pytest
import torch
from torch.func import functional_call, jacrev

from laplace_lora import LogitsModel
from laplace_lora.functional import jacobian_mean, predict_probs, variance
from support.batches import token_batch
from support.functional import (
    LOW,
    N_KFAC,
    S2,
    adapters_only,
    class_of,
    factors_of,
    gaussian,
    targets,
)
from support.models import TARGETS, peft_model
from support.references import assert_near


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["llama-lm", "gpt2"])
def test_jacobians_equal_jacrev_at_any_batch_size_and_rank(name, batch, rank):
    model = adapters_only(name, r=rank).eval()
    model.set_attn_implementation("eager")
    inputs = token_batch((4,) * batch)
    ids = targets(name)
    jacobian, f_mu = jacobian_mean(model, inputs, ids and torch.tensor(ids))
    weights = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def logits(weights):
        kept = {k: v for k, v in inputs.items() if k != "labels"}
        out = functional_call(model, weights, kwargs=kept).logits
        return out[:, -1][:, ids] if ids else out

    assert_near(f_mu, logits(weights))
    expected = jacrev(logits)(weights)
    assert jacobian.keys() == expected.keys()
    for key, value in expected.items():
        assert_near(jacobian[key], value)
    factors = factors_of(model, name)
    f_var = variance(inputs, jacobian, factors, S2, f_mu.shape[1], rank, None, "cpu")
    assert f_var.shape == (batch, 3, 3)
    assert (torch.linalg.eigvalsh(f_var) > 0).all()


def test_default_outputs_and_callbacks():
    batch = token_batch((4, 2))
    llama = adapters_only("llama-lm")
    jacobian, f_mu = jacobian_mean(llama, batch)
    assert f_mu.shape == (2, 50)
    chosen, some = jacobian_mean(llama, batch, torch.tensor(TARGETS))
    assert_near(some, f_mu[:, TARGETS])
    key = next(iter(jacobian))
    assert_near(chosen[key], jacobian[key][:, TARGETS])
    through, same = jacobian_mean(
        llama, batch, output_callback=lambda out: out.logits[:, [-1, 1]].diagonal()[TARGETS].T
    )
    assert_near(same[0], f_mu[0, TARGETS])
    assert_near(through[key][0], chosen[key][0])
    bert = adapters_only("bert")
    _, both = jacobian_mean(bert, batch, torch.tensor([2, 0]))
    assert_near(both, jacobian_mean(bert, batch)[1][:, [2, 0]])
    t5 = adapters_only("t5-lm")
    _, f_mu = jacobian_mean(t5, batch, torch.tensor(TARGETS), is_s2s=True)
    assert_near(f_mu, LogitsModel(t5, target_ids=TARGETS).eval()(batch).detach())
    with pytest.raises(ValueError, match="is_s2s is False, but the model is an encoder-decoder"):
        jacobian_mean(t5, batch)
    with pytest.raises(ValueError, match="is_s2s is True, but the model is no encoder-decoder"):
        jacobian_mean(bert, batch, is_s2s=True)
    with pytest.raises(ValueError, match="not both"):
        jacobian_mean(llama, batch, torch.tensor(TARGETS), output_callback=lambda out: out.logits)


def test_probabilities_are_averaged_not_logits():
    mean = torch.tensor([[3.0, 0.0]])
    covariance = torch.tensor([[[40.0, 0.0], [0.0, 40.0]]])
    generator = torch.Generator().manual_seed(0)
    probs = predict_probs(mean, covariance, n_samples=20000, generator=generator)
    grid = torch.linspace(-100, 106, 200001, dtype=torch.float64)
    density = torch.distributions.Normal(3.0, math.sqrt(80.0)).log_prob(grid).exp()
    expected = torch.trapezoid(density * grid.sigmoid(), grid).item()
    assert probs.sum().item() == pytest.approx(1)
    assert probs[0, 0].item() == pytest.approx(expected, abs=0.01)
    assert probs[0, 0] < mean.softmax(-1)[0, 0] - 0.2
    state = torch.random.get_rng_state()
    integral = predict_probs(mean.double(), covariance.double(), "quadrature")
    assert integral[0, 0].item() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(torch.random.get_rng_state(), state)
    probit = predict_probs(mean, covariance, "probit")
    scaled = mean / (1 + math.pi / 8 * 40) ** 0.5
    assert_near(probit, scaled.softmax(-1))
    with pytest.raises(ValueError, match="link_approx must be one of"):
        predict_probs(mean, covariance, "softmax")


def test_adapters_of_different_ranks_and_mixed_factors():
    model = adapters_only("bert", rank_pattern={"query": 3, "value": 1})
    la = class_of(model, "bert", *LOW)
    factors = factors_of(model, "bert", n_kfac=LOW[0], lr_threshold=LOW[1])
    batch = token_batch((4, 2))
    for n_lora in (1, 3, None):
        _, f_var = gaussian(model, "bert", batch, factors, n_kfac=N_KFAC, n_lora=n_lora)
        assert_near(f_var, la._glm_predictive_distribution(batch)[1])
    with pytest.raises(ValueError, match="n_lora is 8"):
        gaussian(model, "bert", batch, factors, n_kfac=N_KFAC, n_lora=8)
    with pytest.raises(ValueError, match="n_kfac is 5, but low-rank factors have ranks"):
        gaussian(model, "bert", batch, factors, n_kfac=5)


def test_weights_without_factors_stay_fixed():
    model = peft_model("bert")  # the head is trained too
    factors = factors_of(model, "bert")
    batch = token_batch((4, 2))
    _, f_var = gaussian(model, "bert", batch, factors)
    la = class_of(model, "bert", modules="lora_")
    assert_near(f_var, la._glm_predictive_distribution(batch)[1])


def test_changed_factors_are_decomposed_anew():
    model = adapters_only("bert")
    factors = factors_of(model, "bert")
    batch = token_batch((4, 2))
    wide = 1e8 * S2
    before = gaussian(model, "bert", batch, factors, wide)[1]
    for _, grads in factors.values():
        grads.mul_(100)
    assert gaussian(model, "bert", batch, factors, wide)[1].norm() < 0.9 * before.norm()
