"""The width of a language model's posterior that its training texts bear."""

import copy
import math
import warnings

import pytest
import torch
from torch.func import functional_call, jacrev

from laplace_lora import DiagLoraLaplace, FullLoraLaplace, KronLoraLaplace, LowRankLoraLaplace
from laplace_lora.data.distributed import ALONE
from laplace_lora.likelihoods.language_modeling import IGNORED
from laplace_lora.models.tangents.forward_mode import NoForwardDerivativeError
from laplace_lora.tuning.texts import training_texts, widest
from laplace_lora.tuning.width_check import warn_if_wide
from support.batches import loader
from support.language import language_posterior, text_batch, text_loader
from support.models import peft_model
from support.posteriors import posterior
from support.sweeps import rest_slow

# torch.func, here the reference, has no batching rule for fused attention.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

CLASSES = [
    (KronLoraLaplace, {}),
    (KronLoraLaplace, {"factor_rank": 2, "low_rank_threshold": 4}),
    (KronLoraLaplace, {"eigenvalue_correction": True}),
    (DiagLoraLaplace, {}),
    (FullLoraLaplace, {}),
    (LowRankLoraLaplace, {"rank": 5}),
]
LENGTHS, PROMPTS = (4, 6, 3, 6, 5), (1, 3, 2, 1, 2)


def trained(cls=KronLoraLaplace, steps=60, **kwargs):
    """A language model that has learnt its texts."""
    la = language_posterior(cls, fit=False, **kwargs)
    batch = text_batch(LENGTHS, PROMPTS)
    optimizer = torch.optim.Adam(la.params, lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        la.objective.nll(la.model(batch), batch["labels"]).backward()
        optimizer.step()
    la.model.zero_grad()
    torch.manual_seed(0)
    la.fit(text_loader(2, batch))
    return la


def losses_by_loops(la, scales):
    """NLL per scored token by the MAP and by each width, with Jacobians by reverse mode."""
    model = copy.deepcopy(la.logits_model.model).eval()
    model.get_base_model().set_attn_implementation("eager")
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(training_texts.SEED)
    count = training_texts.SAMPLES // 2
    directions = la.fitted.deviations(count, generator)
    batch = text_batch(LENGTHS, PROMPTS)
    own, sampled, tokens = 0.0, torch.zeros(len(scales), dtype=torch.float64), 0
    parts = [batch[key] for key in ("input_ids", "attention_mask", "labels")]
    for ids, mask, labels in zip(*parts, strict=True):
        ids, labels = ids[mask.bool()].unsqueeze(0), labels[mask.bool()]

        def f(w, ids=ids):
            return functional_call(model, w, (), {"input_ids": ids, "use_cache": False}).logits[0]

        J = jacrev(f)(weights)
        J = torch.cat([J[name].flatten(2) for name in weights], -1)
        mean = f(weights)
        for place, label in enumerate(labels.tolist()):
            if label == IGNORED:
                continue
            tokens += 1
            own -= float(mean[place - 1].log_softmax(-1)[label])
            for i, scale in enumerate(scales):
                log_p = []
                for sign in (1, -1):
                    for direction in directions:
                        logits = mean[place - 1] + sign * scale**0.5 * J[place - 1] @ direction
                        log_p.append(logits.log_softmax(-1)[label])
                sampled[i] -= float(torch.stack(log_p).logsumexp(0)) - math.log(len(log_p))
    return own / tokens, sampled / tokens


@pytest.mark.parametrize("cls,kwargs", rest_slow(CLASSES, 0, 2))
def test_the_choice_is_that_of_an_explicit_search(cls, kwargs):
    la = trained(cls, **kwargs)
    la.optimize_prior_precision()
    report = la.tuning.widest
    assert la.tuning.method == "widest" and "widest" in str(la.tuning)
    chosen, la.covariance_scale = la.covariance_scale, 1.0
    assert chosen == report.covariance_scale
    coarse = [10.0**-k for k in range(9)]
    own, nll = losses_by_loops(la, coarse)
    assert report.nll_map == pytest.approx(own, rel=1e-5)
    assert report.nll_evidence == pytest.approx(float(nll[0]), rel=1e-4)
    k = max([i + 1 for i, value in enumerate(nll) if value - own > widest.TOLERANCE], default=0)
    if k == 0:
        assert chosen == 1
        return
    fine = [10.0 ** -(k - 1 + j / 10) for j in range(1, 11)]
    own, nll = losses_by_loops(la, fine)
    j = max([i + 1 for i, value in enumerate(nll) if value - own > widest.TOLERANCE], default=0)
    assert chosen == pytest.approx(fine[j])
    assert report.nll == pytest.approx(float(nll[j]), rel=1e-5)
    assert report.nll <= report.nll_map + widest.TOLERANCE


def test_losses_of_very_wide_posteriors_are_finite_and_right():
    la = trained()
    scales = torch.tensor([1e12, 1e4, 1.0], dtype=torch.float64)
    texts = training_texts.some_texts(la.fitted, la._train_loader)
    losses = training_texts.text_losses(la.fitted, texts, scales, ALONE)
    own, nll = losses_by_loops(la, scales.tolist())
    assert nll[0] > 1e3
    assert losses.nll_map == pytest.approx(own, rel=1e-5)
    torch.testing.assert_close(losses.nll, nll, rtol=1e-4, atol=0)


def test_a_narrow_posterior_stays_as_it_is():
    la = trained()
    la.optimize_prior_precision()
    assert la.covariance_scale < 1
    la.covariance_scale, la.prior_precision = 1.0, 1e8
    settings, report = widest.tune(la.fitted, la._train_loader, ALONE, False)
    assert settings.covariance_scale == 1 == report.covariance_scale
    assert report.nll == report.nll_evidence


def test_padding_and_order_in_batches_change_nothing():
    chosen = []
    for batch in (text_batch(LENGTHS, PROMPTS), text_batch(LENGTHS, PROMPTS, pad_to=9)):
        la = trained()
        la.optimize_prior_precision(train_loader=text_loader(3, batch))
        chosen.append((la.covariance_scale, la.tuning.widest.nll))
    assert chosen[0][0] == chosen[1][0]
    assert chosen[0][1] == pytest.approx(chosen[1][1], rel=1e-4)


def test_the_texts_are_a_bounded_random_part(monkeypatch):
    la = trained(steps=1)
    everything = training_texts.some_texts(la.fitted, la._train_loader)
    assert sum(len(batch["labels"]) for batch in everything) == len(LENGTHS)
    monkeypatch.setattr(training_texts, "TEXTS", 3)
    part = training_texts.some_texts(la.fitted, la._train_loader)
    again = training_texts.some_texts(la.fitted, la._train_loader)
    assert sum(len(batch["labels"]) for batch in part) == 3
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(part, again, strict=True))
    monkeypatch.setattr(training_texts, "TOKENS", 1)
    (one,) = training_texts.some_texts(la.fitted, la._train_loader)
    assert len(one["labels"]) == 1
    unscored = {**text_batch(), "labels": torch.full_like(text_batch()["labels"], IGNORED)}
    with pytest.raises(ValueError, match="no text of which a token is scored"):
        widest.tune(la.fitted, text_loader(2, unscored), ALONE, False)


def test_it_is_kept_in_files_and_undone_by_another_tuning(tmp_path):
    la = trained()
    la.optimize_prior_precision()
    la.save_pretrained(tmp_path)
    again = KronLoraLaplace.from_pretrained(la.logits_model.model, tmp_path)
    assert again.covariance_scale == la.covariance_scale < 1
    with pytest.warns(UserWarning, match="far too wide: the training data are not at hand"):
        again.optimize_prior_precision()
    assert again.covariance_scale == 1 and again.tuning.method == "marglik"
    again.optimize_prior_precision(train_loader=la._train_loader)
    assert again.covariance_scale == la.covariance_scale
    with pytest.raises(ValueError, match="needs the training data"):
        again.optimize_prior_precision(method="widest")


def test_groups_of_precisions_are_bounded_too():
    la = trained()
    la.optimize_prior_precision(prior_structure="matrix")
    assert la.tuning.method == "widest" and la.covariance_scale < 1
    assert len(set(la.prior_precision.tolist())) == 2


def test_other_likelihoods_are_refused():
    la = posterior(name="bert")
    with pytest.raises(ValueError, match="reads the tokens of texts"):
        la.optimize_prior_precision(method="widest")


def test_models_without_tangents_fall_back_with_a_warning(monkeypatch):
    def refuse(*args, **kwargs):
        raise NoForwardDerivativeError("lm_head is quantised")

    monkeypatch.setattr("laplace_lora.generation.label_scores.forward_mode", refuse)
    la = trained(steps=1)
    with pytest.warns(UserWarning, match="far too wide: lm_head is quantised"):
        la.optimize_prior_precision()
    assert la.tuning.method == "marglik" and "quantised" in la.tuning.reason


def test_the_marginal_likelihood_warns_where_it_is_too_wide():
    la = trained()
    with pytest.warns(UserWarning, match="method='widest'"):
        la.optimize_prior_precision(method="marglik", correction=False)


def test_a_regression_warns_in_closed_form():
    la = KronLoraLaplace(peft_model("bert"), "regression", prior_precision=1e-6)
    data = loader(likelihood="regression")
    la.fit(data)
    excess, count = 0.0, 0
    for batch in data:
        mean, covariance = la(batch)
        y, eye = batch["labels"].view_as(mean), torch.eye(mean.shape[1], dtype=mean.dtype)
        for sign, total in ((1, covariance + eye), (-1, eye)):
            normal = torch.distributions.MultivariateNormal(mean, total)
            excess -= sign * float(normal.log_prob(y).sum())
        count += len(y)
    assert excess / count > 0.1
    with pytest.warns(UserWarning, match=f"by {excess / count:.2f} nats.*gridsearch"):
        warn_if_wide(la.fitted, data)
    la.prior_precision = 1e6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_wide(la.fitted, data)


def test_a_loss_that_is_not_a_number_is_not_within_the_tolerance():
    nll = torch.tensor([math.nan, math.nan, 1.5, 1.0], dtype=torch.float64)
    assert widest._widest(training_texts.TextLosses(5, 1.0, nll)) == 3
    nll[2] = 1.0
    assert widest._widest(training_texts.TextLosses(5, 1.0, nll)) == 2
