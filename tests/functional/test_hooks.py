"""Hooks on their own."""

import pytest
import torch
from torch import nn

from laplace_lora.functional import (
    register_hooks,
    remove_hooks,
    save_input_hook,
    save_output_grad_hook,
)
from support.batches import LENGTHS, loader, token_batch
from support.functional import DENSE, LOW, adapters_only, factors_of
from support.models import checkpoint_activations
from support.references import assert_near


def summed_loss(model, batch, column):
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    (logits * column(logits.detach())).sum().backward()


def hessian_columns(logits):
    from laplace_lora.likelihoods.roots import softmax_root

    return softmax_root(logits)


@pytest.mark.parametrize("n_kfac,lr_threshold", [DENSE, LOW])
def test_hooks_sum_what_the_function_sums(n_kfac, lr_threshold):
    model = adapters_only("bert").eval()
    expected = factors_of(model, "bert", n_kfac=n_kfac, lr_threshold=lr_threshold)
    activations, output_grads = {}, {}
    data = loader(2, pad_to=9)
    with register_hooks(model, activations, output_grads, ["lora"], n_kfac, lr_threshold):
        for batch in data:
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
            columns = hessian_columns(logits.detach())
            for column in columns:
                (logits * column).sum().backward(retain_graph=True)
    model.zero_grad()
    assert activations.keys() == output_grads.keys() == expected.keys()
    for name, (inputs, grads) in expected.items():
        (A, A_low), (S, S_low) = activations[name], output_grads[name]
        assert A_low == (A.shape[0] != A.shape[1]) and S_low == (S.shape[0] != S.shape[1])
        assert_near(S if not S_low else S @ S.T, grads if not S_low else grads @ grads.T)
        mean = inputs if not A_low else inputs @ inputs.T
        assert_near(A if not A_low else A @ A.T, len(LENGTHS) * mean)


def test_hooks_can_be_removed():
    model = adapters_only("bert").eval()
    activations, output_grads = {}, {}
    hooks = register_hooks(model, activations, output_grads, ["lora"], None)
    remove_hooks(hooks)
    assert hooks == []
    with pytest.raises(RuntimeError, match="stop"), register_hooks(model, {}, {}, ["lora"]):
        raise RuntimeError("stop")
    summed_loss(model, token_batch((3,)), lambda f: torch.ones_like(f))
    assert not activations and not output_grads
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_single_hooks_and_positions():
    linear = nn.Linear(4, 3)
    inputs, grads, last, low = {}, {}, {}, {}
    linear.register_forward_pre_hook(save_input_hook("one", inputs, None, 100, has_bias=True))
    linear.register_forward_pre_hook(save_input_hook("one", last, None, 100, positions="last"))
    masks = {"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    linear.register_full_backward_hook(save_output_grad_hook("one", grads, None, 9, masks=masks))
    x = torch.randn(2, 3, 4, requires_grad=True)
    linear(x).square().sum().backward()
    ones = torch.cat([x, torch.ones(2, 3, 1)], -1).detach()
    assert_near(inputs["one"][0], torch.einsum("nti,ntj->ij", ones, ones) / 3)
    assert_near(last["one"][0], x[:, -1].T.detach() @ x[:, -1].detach())
    g = 2 * linear(x).detach()[masks["attention_mask"].bool()]
    assert_near(grads["one"][0], g.T @ g)
    hook = save_input_hook("wide", low, 2, 20, svd_dtype=torch.float64)
    hook(linear, (torch.randn(3, 30),))
    assert low["wide"][0].shape == (30, 2) and low["wide"][0].dtype == torch.float64
    assert low["wide"][1] is True and len(low["wide"]) == 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_checkpointing_runs_again_counts_once(use_reentrant):
    model = adapters_only("bert").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def sums():
        inputs, grads = {}, {}
        with register_hooks(model, inputs, grads, ["lora"], None):
            summed_loss(model, token_batch(LENGTHS), lambda f: hessian_columns(f)[0])
        return [factor[0] for part in (inputs, grads) for factor in part.values()]

    expected = sums()
    checkpoint_activations(model, use_reentrant)
    model.enable_input_require_grads()
    for found, value in zip(sums(), expected, strict=True):
        assert_near(found, value)


def test_layers_outside_a_call_of_the_model_need_masks():
    model = adapters_only("bert").eval()
    batch = {k: v for k, v in token_batch(LENGTHS).items() if k != "labels"}
    found = {}
    for masks in (None, batch):
        inputs = {}
        with register_hooks(model, inputs, {}, ["lora"], None, masks=masks):
            if masks is None:
                model(**batch)
                with pytest.raises(RuntimeError, match="ran outside a call of the PeftModel"):
                    model.base_model(**batch)
            else:
                model.base_model(**batch)
        found[masks is None] = inputs
    for name, factor in found[True].items():
        assert_near(found[False][name][0], factor[0])


def test_a_call_that_fails_has_ended():
    model = adapters_only("bert").eval()
    batch = {k: v for k, v in token_batch(LENGTHS).items() if k != "labels"}
    with register_hooks(model, {}, {}, ["lora"], None):
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[10**6]]))
        with pytest.raises(RuntimeError, match="ran outside"):
            model.base_model(**batch)
