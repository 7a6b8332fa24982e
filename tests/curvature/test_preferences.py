"""Curvature of reward models: that of the difference of two rewards."""

import pytest
import torch
from torch.nn import functional as F

from laplace_lora import DiagLoraLaplace, FullLoraLLLaplace, KronLoraLLLaplace, LogitsModel, LoraGGN
from support.models import adalora_model, albert, freeze_magnitudes, peft_model
from support.preferences import (
    CHOSEN,
    alone,
    explicit_pair_ggn,
    explicit_rewards,
    half_of,
    pair_batch,
    pair_loader,
    reward_posterior,
)
from support.references import assert_near


@pytest.mark.parametrize(
    ("name", "side"), [("bert", "right"), ("llama", "right"), ("llama", "left"), ("gpt2", "right")]
)
def test_rewards_and_jacobians_equal_those_of_each_text_alone(name, side):
    model = peft_model(name, num_labels=1)
    for pad_to in ((None, None), (7, 7), (11, 8)):
        batch = pair_batch(pad_to=pad_to, side=side)
        jacobians, f = LoraGGN(LogitsModel(model).eval(), "classification").jacobians(batch)
        rewards, expected = explicit_rewards(model, batch)
        assert_near(f, rewards)
        assert_near(jacobians, expected)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_ggn_of_a_pair_is_that_of_the_difference_from_one_backward_pass(name, monkeypatch):
    model, batch = peft_model(name, num_labels=1), pair_batch()
    backend = LoraGGN(LogitsModel(model).eval(), "classification", verify=False)
    passes = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(1) or grad(*a, **k))
    loss, full = backend.full(batch, torch.ones(5, dtype=torch.long))
    assert len(passes) == 1
    monkeypatch.undo()
    exact = explicit_pair_ggn(model, batch)
    assert_near(full, exact)
    la = DiagLoraLaplace(model, "reward_modeling")
    la.fit(pair_loader())
    assert_near(la.H, exact.diag())
    f, _ = explicit_rewards(model, batch)
    assert_near(torch.tensor(la.loss), -F.logsigmoid(f[:, 1] - f[:, 0]).sum().float().cpu(), 1e-6)
    assert_near(loss, -F.logsigmoid(f[:, 1] - f[:, 0]).sum())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_kfac_factors_equal_a_loop_over_the_tokens_of_both_texts(name):
    model, batch = peft_model(name, num_labels=1).eval(), pair_batch(pad_to=(9, 8))
    backend = LoraGGN(LogitsModel(model).eval(), "classification")
    labels = torch.ones(len(CHOSEN), dtype=torch.long)
    _, kron = backend.kron(batch, labels, N=len(CHOSEN))
    sums = [[0.0, 0.0] for _ in backend.maps]
    for n in range(len(CHOSEN)):
        calls = [[] for _ in backend.maps]
        hooks = [
            linear.module.register_forward_hook(lambda m, a, out, to=to: to.append((a[0], out)))
            for linear, to in zip(backend.maps, calls, strict=True)
        ]
        r, c = (model(alone(batch, half, n)).logits[0, 0] for half in ("rejected", "chosen"))
        for hook in hooks:
            hook.remove()
        p = (c - r).sigmoid().detach()
        scaled = (p * (1 - p)).sqrt() * (c - r)
        for linear, found, total in zip(backend.maps, calls, sums, strict=True):
            # A decoder's head runs on all tokens here, of which the last one counts.
            at = slice(-1, None) if "score" in linear.name else slice(None)
            x = torch.cat([a.detach().reshape(-1, a.shape[-1])[at] for a, _ in found])
            g = torch.autograd.grad(scaled, [out for _, out in found], retain_graph=True)
            g = torch.cat([each.reshape(-1, each.shape[-1])[at] for each in g])
            total[0] = total[0] + g.T @ g
            total[1] = total[1] + x.T @ x / len(x) / len(CHOSEN)
    for block, factors in zip(backend.blocks, kron.kfacs, strict=True):
        expected = sums[block.map]
        assert_near(factors, expected[:1] if block.is_bias else expected)


@pytest.mark.parametrize("kind", ["albert", "adalora", "dora", "embedding"])
def test_other_adapters_run_on_both_texts(kind):
    """Layers called several times a text, several maps a module, maps called once more."""
    if kind == "albert":
        model = albert().model
        model.get_base_model().classifier = torch.nn.Linear(16, 1).double()
    elif kind == "adalora":
        model = adalora_model("bert", num_labels=1)
    elif kind == "dora":
        model = freeze_magnitudes(peft_model("bert", num_labels=1, use_dora=True))
    else:
        model = peft_model("bert", num_labels=1, target_modules=["word_embeddings"])
    backend = LoraGGN(LogitsModel(model).eval(), "classification")
    batch = pair_batch()
    jacobians, f = backend.jacobians(batch)
    rewards, expected = explicit_rewards(model, batch)
    assert_near(f, rewards)
    assert_near(jacobians, expected)
    backend.kron(batch, torch.ones(5, dtype=torch.long), N=5)


def test_last_layer_curvature_is_that_of_the_features_difference():
    la = reward_posterior(FullLoraLLLaplace, "bert")
    batch = pair_batch()
    model = la.logits_model.eval()
    (rejected, r), (chosen, c) = (
        model.features(half_of(batch, half)) for half in ("rejected", "chosen")
    )
    p = (c - r).sigmoid().detach()
    gap = F.pad((chosen - rejected).detach(), (0, 1))  # a shift of all rewards changes nothing
    assert_near(la.H, (gap * p * (1 - p)).T @ gap)


def test_reduce_sees_no_difference_at_the_head():
    """Gradients of the two rewards are opposite, so their sum at the head is nothing: a limit."""
    reduce = {"backend_kwargs": {"kfac_approx": "reduce"}}
    la = reward_posterior(KronLoraLLLaplace, "llama", **reduce)
    assert la.log_det_ratio.item() == pytest.approx(0, abs=1e-12)
    assert reward_posterior(KronLoraLLLaplace, "llama").log_det_ratio > 0.01
