"""Many threads ask one posterior, beside plain forward passes of its model: a web server."""

import pytest
import torch

from laplace_lora import (
    DiagLoraLaplace,
    FullLoraLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
    LogitsModel,
)
from support.batches import loader, token_batch
from support.models import TARGETS, peft_model
from support.threads import in_threads

LENGTHS = ((5, 3, 4, 2), (6, 6, 1, 2), (3, 3, 3, 3), (2, 6, 5, 4))


def posterior(kind):
    if kind == "answers":
        la = KronLoraLaplace(peft_model("llama-lm"), "classification", target_ids=TARGETS)
    elif kind == "norms":
        model = peft_model("bert")
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name:
                parameter.requires_grad_(True)
        la = DiagLoraLaplace(model, "classification", uncovered="diag")
    elif kind == "dora":
        model = peft_model("llama", use_dora=True)
        la = KronLoraLaplace(model, "classification", uncovered="diag")
    elif kind == "last layer":
        la = KronLoraLLLaplace(peft_model("bert"), "classification")
    else:
        la = KronLoraLaplace(peft_model(kind), "classification")
    la.fit(loader())
    return la


@pytest.mark.parametrize("kind", ["bert", "llama", "answers", "norms", "dora", "last layer"])
def test_threads_get_the_answers_of_one_thread_to_the_bit(kind):
    la = posterior(kind)
    la.model.eval()
    modes = [module.training for module in la.model.modules()]
    before = hooks(la)
    batches = [token_batch(lengths, seed=i) for i, lengths in enumerate(LENGTHS)]
    jobs = [lambda x=x: torch.cat([m.flatten() for m in moments(la, x)]) for x in batches]
    jobs.append(lambda: plain(la, batches[0]))
    expected = [job() for job in jobs]
    results, errors = in_threads(jobs)
    assert not errors, errors[0]
    for mine, alone in zip(results, expected, strict=True):
        assert all(torch.equal(result, alone) for result in mine)
    assert [module.training for module in la.model.modules()] == modes
    assert hooks(la) == before
    assert all("forward" not in vars(module) for module in la.model.modules())


def test_sampled_weights_are_seen_by_no_other_thread():
    la = posterior("llama")
    la.model.eval()
    batches = [token_batch(lengths, seed=i) for i, lengths in enumerate(LENGTHS[:3])]

    def sampled(x):
        generator = torch.Generator().manual_seed(0)
        return la(x, pred_type="nn", link_approx="mc", n_samples=5, generator=generator)

    jobs = [lambda x=x: sampled(x) for x in batches]
    jobs += [lambda: plain(la, batches[0]), lambda: moments(la, batches[1])[1]]
    expected = [job() for job in jobs]
    assert (expected[0] - expected[3].softmax(-1)).abs().max() > 1e-3
    weights = [p.detach().clone() for p in la.params]
    results, errors = in_threads(jobs)
    assert not errors, errors[0]
    for mine, alone in zip(results, expected, strict=True):
        assert all(torch.equal(result, alone) for result in mine)
    assert all(torch.equal(p, w) for p, w in zip(la.params, weights, strict=True))


def test_one_thread_fits_while_others_predict():
    la = posterior("llama")
    other = KronLoraLaplace(la.logits_model, "classification")
    x = token_batch(LENGTHS[0])
    expected = moments(la, x)[1]

    def fit():
        other.fit(loader(batch_size=2))
        return other.log_marginal_likelihood()

    alone = fit()
    results, errors = in_threads([fit, lambda: moments(la, x)[1], lambda: moments(la, x)[1]])
    assert not errors, errors[0]
    assert all(torch.equal(result, alone) for result in results[0])
    assert all(torch.equal(result, expected) for result in results[1] + results[2])


def hooks(la):
    modules = [*la.model.modules(), *la.logits_model.modules()]
    return [[*module._forward_hooks, *module._forward_pre_hooks] for module in modules]


def moments(la, x):
    return la._glm_predictive_distribution(x)


@torch.no_grad()
def plain(la, x):
    """The user's own forward pass, in evaluation mode."""
    transformer = la.logits_model.model
    inputs = {k: v for k, v in x.items() if k != "labels"}
    transformer.eval()
    logits = transformer(**inputs).logits
    return logits[:, -1] if la.logits_model.target_ids is not None else logits


def test_a_plain_pass_sees_the_whole_head():
    """Beside a thread that computes some rows of the vocabulary only."""
    model = LogitsModel(peft_model("llama-lm"), target_ids=TARGETS).eval()
    x = token_batch(LENGTHS[0])
    with torch.no_grad():
        jobs = [lambda: model(x).detach(), lambda: model.model(**inputs).logits.detach()]
        inputs = {k: v for k, v in x.items() if k != "labels"}
        expected = [job() for job in jobs]
    results, errors = in_threads(jobs * 2)
    assert not errors, errors[0]
    for mine, alone in zip(results, expected * 2, strict=True):
        assert all(torch.equal(result, alone) for result in mine)


@pytest.mark.parametrize("structure", ["kron", "exact"])
def test_a_posterior_over_some_modules_is_made_and_fitted_beside_one_over_all(structure):
    cls = KronLoraLaplace if structure == "kron" else FullLoraLaplace
    model = LogitsModel(peft_model("llama")).eval()
    la = cls(model, "classification")
    la.fit(loader())
    x = token_batch(LENGTHS[0])

    def over_some():
        other = cls(model, "classification", modules="lora_B", prior_precision=torch.ones(4))
        other.fit(loader())
        return moments(other, x)[1]

    jobs = [over_some, over_some, lambda: moments(la, x)[1], lambda: moments(la, x)[1]]
    expected = [job() for job in jobs]
    results, errors = in_threads(jobs)
    assert not errors, errors[0]
    for mine, alone in zip(results, expected, strict=True):
        assert all(torch.equal(result, alone) for result in mine)
