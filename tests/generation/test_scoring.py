"""Predictions of tokens: exact moments, probabilities with a tail."""

from functools import partial

import pytest
import torch
from torch.func import jacrev

from laplace_lora import DiagLoraLaplace, LoraEF
from laplace_lora.generation import scoring
from laplace_lora.generation.candidates import class_logits
from laplace_lora.likelihoods import links
from laplace_lora.models.token_model import TokenModel
from support.generation import FIELDS, K, posteriors, seeded
from support.language import language_posterior, text_batch, text_loader
from support.models import VOCABULARY, peft_model
from support.references import assert_near, explicit_jacobians
from support.texts import word_tokenizer

# torch.func, here the reference, has no batching rule for fused attention.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

score = partial(scoring.score, method="exact")


def explicit_moments(la, batch):
    """Logits of every scored token's place and their covariance, over the whole vocabulary."""
    model = TokenModel(la.logits_model.model)
    J = torch.cat([part.flatten(2) for part in explicit_jacobians(model, batch)], -1)
    P = la.posterior_precision
    covariance = (1 / P).diag() if isinstance(P, torch.Tensor) else P.to_matrix(exponent=-1)
    return model(batch).detach(), J, covariance


def by_place(batch, values):
    """Rows of scored tokens, laid out by text, as `score` does."""
    scored = batch["labels"] != -100
    out = values.new_zeros(len(scored), int(scored.sum(1).max()), *values.shape[1:])
    out[(torch.arange(out.shape[1]) < scored.sum(1, keepdim=True))] = values
    return out


@pytest.mark.parametrize("name", ["llama-lm", "gpt2-lm"])
@pytest.mark.parametrize("kind", posteriors("llama-lm"))
def test_moments_and_probabilities_equal_explicit_jacobians(name, kind):
    la = posteriors(name)[kind]()
    batch = text_batch(pad_to=7)
    ours = score(la, batch, K, link_approx="mc", n_samples=50, generator=seeded())
    mean, J, posterior_covariance = explicit_moments(la, batch)
    tokens = batch["labels"][batch["labels"] != -100]
    assert torch.equal(ours.mask, by_place(batch, tokens) != 0)
    assert torch.equal(ours.tokens, by_place(batch, tokens))
    chosen, logp, information = ours.candidates[ours.mask], [], []
    noise = torch.randn((50, K), dtype=torch.float64, generator=seeded())
    for place, f in enumerate(mean):
        top = f.topk(K).indices
        if tokens[place] not in top:
            top[-1] = tokens[place]
        assert torch.equal(chosen[place], top)
        rest = [v for v in range(VOCABULARY) if v not in top]
        classes = torch.zeros(K + 1, VOCABULARY, dtype=f.dtype)
        classes[range(K), top] = 1
        classes[-1, rest] = f[rest].softmax(-1)
        covariance = classes @ J[place] @ posterior_covariance @ J[place].T @ classes.T
        assert_near(ours.mean[ours.mask][place], f[top])
        assert_near(ours.covariance[ours.mask][place], covariance[:K, :K])
        centre = torch.cat([f[top], f[rest].logsumexp(0, keepdim=True)])
        contrasts = torch.eye(K + 1, dtype=f.dtype)[1:] - torch.eye(K + 1, dtype=f.dtype)[0]
        root = torch.linalg.cholesky(contrasts @ covariance @ contrasts.T)
        draws = contrasts @ centre + noise @ root.T
        p = torch.cat([draws.new_zeros(50, 1), draws], 1).softmax(-1)
        logp.append(p.mean(0).log()[:K])
        entropy = torch.special.entr(p.mean(0)).sum()
        information.append(entropy - torch.special.entr(p).sum(-1).mean())
        entropy += p[:, -1].mean() * torch.special.entr(f[rest].softmax(-1)).sum()
        assert_near(ours.entropy[ours.mask][place], entropy)
        assert_near(ours.tail_probability[ours.mask][place], p[:, -1].mean())
    assert_near(ours.map_probabilities[ours.mask], mean.softmax(-1).gather(1, chosen))
    assert_near(ours.probabilities[ours.mask], torch.stack(logp).exp())
    assert_near(ours.mutual_information[ours.mask], torch.stack(information), 1e-5)
    at = (chosen == tokens.unsqueeze(1)).int().argmax(1)
    assert_near(ours.log_prob[ours.mask], torch.stack(logp)[range(len(at)), at])
    assert_near(ours.map_log_prob[ours.mask], mean.log_softmax(-1)[range(len(at)), tokens])
    assert_near(ours.sequence_log_prob, by_place(batch, ours.log_prob[ours.mask]).sum(1))
    assert_near(ours.sequence_map_log_prob, ours.map_log_prob.sum(1))
    means = [ours.mutual_information[n, m].mean() for n, m in enumerate(ours.mask)]
    assert_near(ours.mean_mutual_information, torch.stack(means))


@pytest.mark.parametrize("top_k", [1, K, VOCABULARY - 1])
def test_the_default_is_the_integral_that_samples_estimate(top_k):
    la = language_posterior(prior_precision=0.5)
    batch, state = text_batch(), torch.random.get_rng_state()
    ours = score(la, batch, top_k)
    assert torch.equal(torch.random.get_rng_state(), state)
    again = score(la, batch, top_k, batch_size=1)
    sampled = score(la, batch, top_k, link_approx="mc", n_samples=20_000, generator=seeded())
    for field in ("probabilities", "log_prob", "entropy", "mutual_information"):
        one, other = getattr(ours, field), getattr(sampled, field)
        assert_near(getattr(again, field), one, 1e-6)
        torch.testing.assert_close(one, other, atol=0.05, rtol=0)
    torch.testing.assert_close(ours.probabilities, sampled.probabilities, atol=0.01, rtol=0)
    assert (ours.mutual_information[ours.mask] > 0).all()


def test_the_variance_of_a_texts_log_probability_has_the_tokens_correlations():
    la = language_posterior(prior_precision=2.0)
    batch = text_batch(pad_to=8)
    ours = score(la, batch, 1)
    mean, J, covariance = explicit_moments(la, batch)
    tokens = batch["labels"][batch["labels"] != -100]
    slopes = torch.nn.functional.one_hot(tokens, VOCABULARY) - mean.softmax(-1)
    gradients = by_place(batch, torch.einsum("sv,svp->sp", slopes, J)).sum(1)
    expected = torch.einsum("np,pq,nq->n", gradients, covariance, gradients)
    assert_near(ours.log_prob_variance, expected)


def test_probit_probabilities_and_second_order_information():
    la = language_posterior(prior_precision=5.0)
    batch = text_batch()
    ours = score(la, batch, VOCABULARY, link_approx="probit")
    mean, covariance = ours.mean[ours.mask], ours.covariance[ours.mask]
    assert_near(ours.probabilities[ours.mask], links.probit(mean, covariance).exp())
    p = mean.softmax(-1)
    hessian = p.diag_embed() - p.unsqueeze(1) * p.unsqueeze(2)
    expected = 0.5 * (hessian * covariance).sum((1, 2))
    assert_near(ours.mutual_information[ours.mask], expected.minimum(ours.entropy[ours.mask]))
    la.prior_precision = 1e4  # where the second order is all there is
    second = score(la, batch, VOCABULARY, link_approx="probit").mutual_information
    for options in ({}, {"link_approx": "mc", "n_samples": 20000, "generator": seeded()}):
        exact = score(la, batch, VOCABULARY, **options)
        assert_near(exact.mutual_information, second, 0.05)


def test_a_tail_of_one_token_is_exact():
    """The vocabulary but for one token, or all of it: the same predictive."""
    la = language_posterior()
    whole, but_one = (
        score(la, text_batch(), k, link_approx="mc", n_samples=20, generator=seeded())
        for k in (VOCABULARY, VOCABULARY - 1)
    )
    # In the smaller set the scored token may have taken the last place.
    same = (whole.candidates[..., :-1] == but_one.candidates).all(-1) & whole.mask
    assert same.sum() >= 6
    assert_near(but_one.probabilities[same], whole.probabilities[same][:, :-1])
    assert_near(but_one.mutual_information[same], whole.mutual_information[same])
    assert_near(whole.probabilities.sum(-1)[whole.mask], torch.ones(7, dtype=torch.float64))


def test_what_moves_all_logits_moves_the_tail_too():
    logits = torch.randn(1, 9, dtype=torch.float64, generator=seeded())
    chosen = torch.tensor([[3, 5]])
    slope = jacrev(lambda shift: class_logits(logits + shift, chosen))(torch.tensor(0.0).double())
    torch.testing.assert_close(slope, torch.ones(1, 3, dtype=torch.float64))


@pytest.mark.parametrize("name", ["llama-lm", "gpt2-lm"])
def test_scores_do_not_depend_on_padding_and_batches(name):
    la = language_posterior(name=name)
    reference = score(la, text_batch(), K, generator=seeded())
    for batch, size in (
        (text_batch(pad_to=9), 1),
        (text_batch(pad_to=8, side="left"), 7),
    ):
        other = score(la, batch, K, generator=seeded(), batch_size=size)
        assert torch.equal(other.candidates, reference.candidates)
        for field in FIELDS:
            assert_near(getattr(other, field), getattr(reference, field), 1e-5)
    for mask in (torch.ones(1, 4, dtype=torch.bool), None):
        text = {**text_batch((4,), (1,)), "attention_mask": mask}
        alone = score(la, text, K, generator=seeded())
        assert_near(alone.log_prob, reference.log_prob[:1, :3], 1e-5)


def test_width_and_temperature_of_a_calibration_count():
    la = language_posterior()
    plain = score(la, text_batch(), K, generator=seeded())
    la.covariance_scale, la.likelihood_temperature = 8.0, 2.0
    ours = score(la, text_batch(), K, generator=seeded())
    assert_near(ours.mean, plain.mean / 2)
    assert_near(ours.covariance, 2 * plain.covariance)
    assert_near(ours.log_prob_variance, 2 * plain.log_prob_variance, 0.1)
    logits = la.model.eval()(text_batch()).detach() / 2
    p = logits.softmax(-1).gather(1, ours.candidates[ours.mask])
    assert_near(ours.map_probabilities[ours.mask], p)


def test_a_narrower_prior_leaves_less_to_learn():
    la = language_posterior(prior_precision=1.0)
    wide = score(la, text_batch(), K, generator=seeded()).mean_mutual_information
    la.prior_precision = 100.0
    assert (score(la, text_batch(), K, generator=seeded()).mean_mutual_information < wide).all()


def test_half_precision_predicts_in_single():
    la = language_posterior(dtype=torch.bfloat16)
    ours = score(la, text_batch(), K, generator=seeded())
    assert ours.covariance.dtype == ours.probabilities.dtype == torch.float32
    exact = score(
        language_posterior(dtype=torch.float32), text_batch(), VOCABULARY, generator=seeded()
    )
    assert_near(ours.log_prob, exact.log_prob, 0.1)


def test_tensors_trained_whole_take_part():
    """Position embeddings have a diagonal block, whose rows come from each text alone."""
    model = peft_model("gpt2-lm")
    model.base_model.model.transformer.wpe.weight.requires_grad_(True)
    la = DiagLoraLaplace(
        model, "language_modeling", uncovered="diag", backend=LoraEF, prior_precision=0.5
    )
    batch = text_batch()
    la.fit(text_loader(2, batch))
    ours = score(la, batch, K)
    _, J, posterior_covariance = explicit_moments(la, batch)
    assert J.shape[-1] == la.n_params > 32 * 16
    full = J @ posterior_covariance @ J.mT
    for place, chosen in enumerate(ours.candidates[ours.mask]):
        expected = full[place][chosen][:, chosen]
        assert_near(ours.covariance[ours.mask][place], expected)


def test_what_is_no_batch_is_refused_by_what_to_do():
    la, batch = language_posterior(), text_batch()
    lists = {name: value.tolist() for name, value in batch.items()}
    for given in (["a b"], lists, {"input_ids": batch["input_ids"]}):
        for method in ("exact", "sampled"):
            with pytest.raises(TypeError, match=r"tensors .*'labels', got .*tokenize"):
                score(la, given, word_tokenizer(), method=method)
    with pytest.raises(TypeError, match=r"`top_k` must be .*; score takes no tokenizer"):
        score(la, batch, word_tokenizer())


@pytest.mark.parametrize("method", ["sampled", "exact"])
def test_positions_may_be_the_same_for_all_texts(method):
    la, batch = language_posterior(name="gpt2-lm"), text_batch((6, 6), (1, 2))
    del batch["attention_mask"]
    options = {"top_k": K, "method": method}
    once = {**batch, "position_ids": torch.arange(6)[None] + 3}
    each = {**batch, "position_ids": once["position_ids"].expand(2, -1)}
    expected = score(la, each, generator=seeded(), **options)
    for size in (None, 1):
        found = score(la, once, generator=seeded(), batch_size=size, **options)
        torch.testing.assert_close(found.log_prob, expected.log_prob)
