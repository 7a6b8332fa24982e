"""Samples of the linearised model have the exact moments, and are joint over tokens."""

import pytest
import torch

from laplace_lora import (
    DiagLoraLaplace,
    FullLoraLaplace,
    KronLoraLaplace,
    LowRankLoraLaplace,
)
from laplace_lora.generation import generate, score
from laplace_lora.predictive.sample_set import SampleSet
from support.generation import K, answers_posterior, seeded
from support.language import text_batch
from support.sampled import explicit_samples, fitted


@pytest.mark.parametrize(
    "cls, options",
    [
        (KronLoraLaplace, {}),
        (KronLoraLaplace, {"eigenvalue_correction": True}),
        (DiagLoraLaplace, {}),
        (KronLoraLaplace, {"factor_rank": 2, "low_rank_threshold": 4}),
    ],
)
def test_every_posterior_draws_its_samples(cls, options):
    la = fitted(cls=cls, prior_precision=20.0, **options)
    check_moments(la)


@pytest.mark.parametrize("cls", [FullLoraLaplace, LowRankLoraLaplace])
def test_exact_posteriors_draw_their_samples(cls):
    la = answers_posterior("llama-lm", cls)
    la.prior_precision = 20.0
    check_moments(la)


def check_moments(la, n_samples=4096):
    """Sampled moments against exact ones, within four standard errors."""
    la.covariance_scale, la.likelihood_temperature = 1.7, 1.3
    batch = text_batch(pad_to=7)
    exact = score(la, batch, K, method="exact")
    ours = score(la, batch, K, n_samples=n_samples, generator=seeded())
    assert torch.equal(ours.candidates, exact.candidates)
    torch.testing.assert_close(ours.mean, exact.mean, atol=1e-6, rtol=1e-6)
    S, at = exact.covariance, exact.mask
    variance = S.diagonal(dim1=-2, dim2=-1)
    error = (variance[..., None] * variance[..., None, :] + S.square()) / (n_samples // 2)
    assert ((ours.covariance - S).abs()[at] <= 4 * error.sqrt()[at]).all()
    error = exact.log_prob_variance * (2 / (n_samples // 2)) ** 0.5
    assert ((ours.log_prob_variance - exact.log_prob_variance).abs() <= 4 * error).all()
    spread = (ours.probabilities * (1 - ours.probabilities) / n_samples).sqrt()
    assert ((ours.probabilities - exact.probabilities).abs()[at] <= 4 * spread[at]).all()


def test_texts_of_a_recentred_posterior_have_its_mean(in_double):
    la = answers_posterior("llama-lm")
    batch = text_batch()
    unmoved = score(la, batch, K, n_samples=6, generator=seeded())
    la.recentre(0.7)
    la.likelihood_temperature = 1.3
    ours = score(la, batch, K, n_samples=6, generator=seeded())
    samples = SampleSet(la.fitted, 6, seeded())
    assert torch.equal(samples.directions[0], la.fitted.settings.shift)
    means, moved = explicit_samples(la, batch, samples.directions)
    for n, mask in enumerate(batch["attention_mask"].bool()):
        f, *slopes = (x / 1.3 for x in (means[n] + moved[n][0], *moved[n][1:]))
        scored = (batch["labels"][n, mask] != -100)[1:]
        at = ours.candidates[n, : scored.sum()]
        expected = f[:-1][scored].gather(1, at)
        found = ours.mean[n, : scored.sum()]
        torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-8)
        p = torch.stack([g.softmax(-1) for d in slopes for g in (f + d, f - d)]).mean(0)
        found = ours.probabilities[n, : scored.sum()]
        torch.testing.assert_close(found, p[:-1][scored].gather(1, at), atol=1e-8, rtol=1e-8)
    assert not torch.allclose(ours.probabilities, unmoved.probabilities, atol=1e-3)
    written = generate(la, batch["input_ids"][:1, :3], 3, K, n_samples=6, generator=seeded())
    ids = torch.cat([batch["input_ids"][:1, :3], written.tokens], 1)
    labels = ids.clone()
    labels[:, :3] = -100
    again = score(la, {"input_ids": ids, "labels": labels}, K, n_samples=6, generator=seeded())
    torch.testing.assert_close(again.log_probabilities, written.log_probabilities)
    la.reset_mean()
    la.likelihood_temperature = 1.0
    back = score(la, batch, K, n_samples=6, generator=seeded())
    torch.testing.assert_close(back.probabilities, unmoved.probabilities)


def test_the_error_falls_with_the_root_of_the_number_of_samples():
    la = fitted(prior_precision=5.0)
    batch = text_batch()
    exact = score(la, batch, K, method="exact").covariance
    errors = []
    for n_samples in (64, 1024):
        runs = [
            score(la, batch, K, n_samples=n_samples, generator=seeded(seed)).covariance
            for seed in range(8)
        ]
        errors.append(torch.stack([(run - exact).square().mean() for run in runs]).mean().sqrt())
    assert 2.5 < float(errors[0] / errors[1]) < 6.0  # the root of 16


def test_a_texts_samples_are_joint_over_its_tokens():
    la = fitted(prior_precision=2.0)
    batch = text_batch()
    ours = score(la, batch, K, n_samples=6, generator=seeded())
    directions = SampleSet(la.fitted, 6, seeded()).directions
    means, moved = explicit_samples(la, batch, directions)
    for n, mask in enumerate(batch["attention_mask"].bool()):
        f = torch.cat([means[n] + moved[n], means[n] - moved[n]])
        labels = batch["labels"][n, mask]
        logp = f.log_softmax(-1)[:, :-1].gather(2, labels[1:].clamp(min=0).expand(6, -1)[..., None])
        logp = (logp[..., 0] * (labels[1:] != -100)).sum(1)
        torch.testing.assert_close(ours.log_probabilities[:, n], logp, atol=1e-6, rtol=1e-6)
        p = f.softmax(-1).mean(0)[:-1][labels[1:] != -100]
        entropy = torch.special.entr(p).sum(-1)
        torch.testing.assert_close(ours.entropy[n, : len(p)], entropy, atol=1e-6, rtol=1e-6)
        aleatoric = torch.special.entr(f.softmax(-1)).sum(-1).mean(0)[:-1][labels[1:] != -100]
        information = ours.mutual_information[n, : len(p)]
        torch.testing.assert_close(information, entropy - aleatoric, atol=1e-6, rtol=1e-6)
    quantiles = ours.sequence_quantiles([0.0, 0.5, 1.0])
    torch.testing.assert_close(quantiles[0], ours.log_probabilities.amin(0))
    with pytest.raises(ValueError, match="quantiles need samples"):
        score(la, batch, K, method="exact").sequence_quantiles([0.5])


def test_an_odd_number_of_samples():
    la = fitted()
    odd, even = SampleSet(la.fitted, 5, seeded()), SampleSet(la.fitted, 6, seeded())
    assert torch.equal(odd.directions, even.directions)
    zero = torch.zeros(1)
    outputs = [x.outputs(zero, x.directions[:, :1]) for x in (odd, even)]
    assert torch.equal(outputs[0], outputs[1][:5])
    assert torch.equal(outputs[1][3:], -outputs[1][:3])


def test_samples_of_any_width_share_the_memory_of_one():
    la = fitted()
    mean, tangents = torch.randn(5, 7), torch.randn(3, 5, 7)
    samples = SampleSet(la.fitted, 5, seeded())
    found = [(f.clone(), f.data_ptr()) for f in samples.each_output(mean, tangents, 0.5)]
    torch.testing.assert_close(
        torch.stack([f for f, _ in found]), samples.outputs(mean, tangents / 2)
    )
    assert len({address for _, address in found}) == 1
