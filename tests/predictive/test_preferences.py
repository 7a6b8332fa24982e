"""Rewards, their differences and the probability that one text is preferred."""

import math

import pytest
import torch

from laplace_lora import (
    DiagLoraLaplace,
    DiagLoraLLLaplace,
    FullLoraLLLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
)
from support.posteriors import DENSE, LOW
from support.preferences import explicit_rewards, half_of, pair_batch, reward_posterior
from support.references import assert_near

EVERY_CLASS = [
    (KronLoraLaplace, DENSE),
    (KronLoraLaplace, LOW),
    (DiagLoraLaplace, {}),
    (KronLoraLLLaplace, {}),
    (DiagLoraLLLaplace, {}),
    (FullLoraLLLaplace, {}),
]


@pytest.mark.parametrize("cls,kwargs", EVERY_CLASS)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_variances_equal_explicit_jacobians(cls, kwargs, name):
    la = reward_posterior(cls, name, **kwargs)
    la.optimize_prior_precision()
    batch = pair_batch(seed=3)
    f, J = explicit_rewards(la.logits_model.model, batch)
    last = [name for name, p in la.logits_model.model.named_parameters() if p.requires_grad][-1]
    J = J[:, :, -la.n_params :] if "score" in last or "classifier" in last else J
    P = la.posterior_precision
    P = P.diag() if isinstance(P, torch.Tensor) and P.ndim == 1 else P
    P = P if isinstance(P, torch.Tensor) else P.to_matrix()
    covariance = J @ torch.linalg.inv(P) @ J.mT
    mean, variance = la.reward_difference(batch)
    assert_near(mean, f[:, 1] - f[:, 0])
    gap = covariance[:, 0, 0] + covariance[:, 1, 1] - 2 * covariance[:, 0, 1]
    assert_near(variance, gap)
    assert (variance - covariance[:, 0, 0] - covariance[:, 1, 1]).norm() > 1e-3 * gap.norm()
    for i, half in enumerate(("rejected", "chosen")):
        mean, variance = la(half_of(batch, half))
        assert mean.shape == (5, 1) and variance.shape == (5, 1, 1)
        assert_near(mean[:, 0], f[:, i])
        assert_near(variance[:, 0, 0], covariance[:, i, i])


def test_joint_covariances_of_candidates_give_the_same_differences():
    la, batch = reward_posterior(), pair_batch((4, 4), (4, 4), seed=2)
    candidates = {
        key: torch.cat([half_of(batch, half)[key] for half in ("chosen", "rejected")])
        for key in ("input_ids", "attention_mask")
    }
    mean, covariance = la(candidates, joint=True)
    difference, variance = la.reward_difference(batch)
    assert_near(mean[:2] - mean[2:], difference)
    d = covariance.diag()
    assert_near(d[:2] + d[2:] - 2 * covariance[:2, 2:].diag(), variance)


@pytest.mark.parametrize("cls,kwargs", EVERY_CLASS)
def test_probabilities_follow_from_the_difference(cls, kwargs):
    la, batch = reward_posterior(cls, **kwargs), pair_batch(seed=1)
    mean, variance = la.reward_difference(batch)
    probit = (mean / (1 + math.pi / 8 * variance).sqrt()).sigmoid()
    assert_near(la(batch, link_approx="probit"), torch.stack([1 - probit, probit], 1))
    generator = torch.Generator().manual_seed(0)
    sampled = la(batch, link_approx="mc", n_samples=50_000, generator=generator)
    # 0.04: what probit itself is off by is far less.
    torch.testing.assert_close(sampled[:, 1], probit, atol=0.04, rtol=0)
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-(grid**2) / 2)
    exact = ((mean[:, None] + variance.sqrt()[:, None] * grid).sigmoid() * density).sum(1)
    exact = exact / density.sum()
    torch.testing.assert_close(sampled[:, 1], exact, atol=0.01, rtol=0)
    assert_near(la(batch), torch.stack([1 - exact, exact], 1))
    assert_near(la(batch, fitting=True), la(batch))
    rewards = la._nn_functional_samples(batch, 7, torch.Generator().manual_seed(1))
    by_weights = la(
        batch, "nn", link_approx="mc", n_samples=7, generator=torch.Generator().manual_seed(1)
    )
    assert rewards.shape == (7, 5, 2)
    assert_near(by_weights[:, 1], (rewards[..., 1] - rewards[..., 0]).sigmoid().mean(0))
    with pytest.raises(ValueError, match="use 'quadrature', 'probit' or 'mc'"):
        la(batch, link_approx="bridge")


def test_rewards_sampled_for_pairs_share_their_weights():
    la, batch = reward_posterior(FullLoraLLLaplace), pair_batch(seed=1)
    pairs = la._nn_functional_samples(batch, 3, torch.Generator().manual_seed(1))
    for i, half in enumerate(("rejected", "chosen")):
        alone = la._nn_functional_samples(half_of(batch, half), 3, torch.Generator().manual_seed(1))
        assert_near(pairs[..., i], alone[..., 0])


@pytest.mark.parametrize("pred_type", ["glm", "nn"])
def test_predictive_samples_are_rewards_of_texts_and_probabilities_of_pairs(pred_type):
    la, batch = reward_posterior(FullLoraLLLaplace), pair_batch(seed=1)
    options = {"pred_type": pred_type, "n_samples": 4000}
    pairs = la.predictive_samples(batch, generator=torch.Generator().manual_seed(1), **options)
    torch.testing.assert_close(pairs.mean(0), la(batch), atol=0.03, rtol=0)
    text = half_of(batch, "chosen")
    rewards = la.predictive_samples(text, generator=torch.Generator().manual_seed(1), **options)
    mean, variance = la(text)
    spread = variance.flatten().sqrt()
    assert bool(((rewards.mean(0) - mean).flatten().abs() < 0.1 * spread).all())
    assert_near(rewards.std(0).flatten(), spread, 0.1)


@pytest.mark.parametrize("link_approx", ["quadrature", "mc"])
def test_a_pair_has_one_difference_with_no_covariances_to_ignore(link_approx):
    la, batch = reward_posterior(), pair_batch()
    plain, diagonal = (
        la(
            batch,
            link_approx=link_approx,
            diagonal_output=diagonal,
            generator=torch.Generator().manual_seed(0),
        )
        for diagonal in (False, True)
    )
    assert torch.equal(plain, diagonal)
