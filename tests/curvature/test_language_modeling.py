"""Curvature of language models: summed over scored tokens, exact or from drawn labels."""

import pytest
import torch
from torch.nn import functional as F

from laplace_lora import DiagLoraLaplace, KronLoraLaplace, LoraEF
from laplace_lora.likelihoods import roots
from laplace_lora.likelihoods.language_modeling import IGNORED, token_labels
from support.batches import rows
from support.language import EXACT, LENGTHS, language_posterior, text_batch, text_loader, token_ggn
from support.models import peft_model
from support.posteriors import DENSE
from support.references import assert_near

# torch.func, here the reference, has no batching rule for fused attention.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


@pytest.mark.parametrize("name", ["llama-lm", "gpt2-lm"])
def test_the_exact_curvature_is_the_sum_over_tokens(name):
    la = language_posterior(name=name, fit=False, **EXACT)
    la.model.eval()
    batch = text_batch((4, 3), (1, 2))
    y = token_labels(batch, batch["labels"])
    loss, ggn = la.backend.full(batch, y)
    expected = token_ggn(la, batch)
    assert_near(ggn, expected)
    assert_near(la.backend.diag(batch, y)[1], expected.diagonal())
    nll = F.cross_entropy(la.model(batch), y[y != IGNORED], reduction="sum")
    assert_near(loss, nll)


def test_a_batch_without_labels_adds_an_example_and_no_curvature():
    batch = text_batch()
    batch["labels"][1] = IGNORED
    alone, together = (language_posterior(fit=False, **EXACT) for _ in range(2))
    alone.fit(text_loader(1, batch))
    together.fit(text_loader(3, batch))
    assert alone.n_data == 3
    assert_near(alone.log_marginal_likelihood(), together.log_marginal_likelihood())


def test_drawn_labels_give_the_exact_curvature_on_average():
    """Also across the tokens of an example, which meet in one gradient."""
    la = language_posterior(fit=False, modules="v_proj", backend_kwargs={"num_samples": 1000})
    la.model.eval()
    assert la.backend.stochastic
    for name, p in la.model.named_parameters():
        p.requires_grad_("v_proj.lora" in name)
    batch = text_batch((3,), (1,))
    torch.manual_seed(0)
    _, drawn = la.backend.full(batch, token_labels(batch, batch["labels"]))
    expected = token_ggn(la, batch)
    assert (drawn - expected).norm() < 0.1 * expected.norm()


def recorded(la, example):
    """Logits of one example, and each map's inputs and output."""
    calls = {}
    hooks = [
        linear.module.register_forward_hook(
            lambda m, args, out, i=i: calls.update({i: (args[0].detach()[0], out)})
        )
        for i, linear in enumerate(la.backend.maps)
    ]
    logits = la.model(example)
    for hook in hooks:
        hook.remove()
    return logits, [calls[i] for i in range(len(calls))]


@pytest.mark.parametrize("name", ["llama-lm", "gpt2-lm"])
def test_factors_equal_a_loop_over_examples_and_tokens(name, monkeypatch):
    """Given the labels that were drawn."""
    samples, drawn = 2, []
    draw = roots.drawn_labels

    def noted(p, num_samples):
        drawn.extend(draw(p, num_samples))
        return torch.stack(drawn)

    monkeypatch.setattr(roots, "drawn_labels", noted)
    la = language_posterior(name=name, fit=False, backend_kwargs={"num_samples": samples}, **DENSE)
    batch = text_batch(pad_to=7)
    la.fit(text_loader(3, batch), evidence_correction=False)
    la.model.eval()
    expected = [[0.0, 0.0] for _ in la.backend.maps]
    for n, length in enumerate(LENGTHS):
        example = {k: v[None, :length] for k, v in rows(batch, n).items()}
        logits, calls = recorded(la, example)
        labels = torch.stack([drawn.pop(0) for _ in range(len(logits))])
        outputs = [output for _, output in calls]
        for sample in range(samples):
            loss = F.cross_entropy(logits, labels[:, sample], reduction="sum")
            grads = torch.autograd.grad(loss, outputs, retain_graph=True)
            for i, (grad,) in enumerate(grads):
                expected[i][0] += grad.T @ grad / samples
        for i, (inputs, _) in enumerate(calls):
            expected[i][1] += inputs.T @ inputs / length / len(LENGTHS)
    for block, kfac in zip(la.backend.blocks, la.H_facs.kfacs, strict=True):
        assert_near([factor.matrix for factor in kfac], expected[block.map])


@pytest.mark.parametrize("cls", [KronLoraLaplace, DiagLoraLaplace])
@pytest.mark.parametrize("kind", ["exact", "empirical", "drawn"])
def test_the_fit_does_not_depend_on_batches_and_padding(cls, kind, monkeypatch):
    if kind == "drawn":  # as if chance always chose the third most likely token
        third = lambda p, samples: p.topk(3).indices[:, -1:]  # noqa: E731
        monkeypatch.setattr(roots, "drawn_labels", third)
    options = {"exact": EXACT, "empirical": {"backend": LoraEF}, "drawn": {}}[kind]
    evidence = []
    padded = text_batch(pad_to=8, side="left")
    for data in (
        text_loader(3),
        text_loader(1),
        text_loader(2, text_batch(pad_to=9)),
        text_loader(2, padded),
    ):
        la = language_posterior(cls, fit=False, **options)
        la.fit(data)
        assert la.n_data == 3
        evidence.append(la.log_marginal_likelihood())
    for other in evidence[1:]:
        assert_near(other, evidence[0])


def test_more_draws_and_other_seeds_change_the_factors():
    factors = []
    for samples, seed in ((1, 0), (1, 1), (8, 0)):
        la = language_posterior(fit=False, backend_kwargs={"num_samples": samples})
        torch.manual_seed(seed)
        la.fit(text_loader())
        factors.append(la.H_facs.kfacs[0][0].matrix)
    for i, one in enumerate(factors):
        for other in factors[i + 1 :]:
            assert (one - other).norm() > 1e-3 * one.norm()


def test_an_example_without_scored_tokens_counts_as_one():
    """Alone in a batch or not: it says nothing, but its inputs were seen."""
    batch = text_batch()
    batch["labels"][1] = IGNORED
    ours, alone = (language_posterior(fit=False, backend=LoraEF) for _ in range(2))
    ours.fit(text_loader(3, batch))
    alone.fit(text_loader(1, batch))
    assert ours.n_data == alone.n_data == 3
    assert_near(alone.log_marginal_likelihood(), ours.log_marginal_likelihood())
    torch.manual_seed(0)
    language_posterior(fit=False).fit(text_loader(1, batch))  # nothing to draw for it either


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["v_proj", "lm_head"]}]
)
def test_a_trained_head_is_covered(options):
    model = peft_model("llama-lm", **options)
    la = KronLoraLaplace(model, "language_modeling", **DENSE, **EXACT)
    assert any("lm_head" in name for name in la.block_names)
    la.model.eval()
    batch = text_batch((3, 2), (1, 1))
    batch = {**batch, "labels": token_labels(batch, batch["labels"])}
    diagonal = token_ggn(la, batch).diagonal()
    assert_near(la.backend.diag(batch, batch["labels"])[1], diagonal)
    la.fit(text_loader(2, batch))
    assert la.log_marginal_likelihood().isfinite()
