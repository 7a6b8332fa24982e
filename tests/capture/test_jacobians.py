"""Jacobians of all outputs, against one autograd call an example and output."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from laplace_lora import LogitsModel, LoraGGN
from support.batches import token_batch
from support.models import ARCHITECTURES, excite, logits_model
from support.references import assert_near, looped_jacobians

LENGTHS = (3, 6, 4, 6, 1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_jacobians_equal_an_explicit_loop(name):
    model, batch = logits_model(name), token_batch(LENGTHS)
    jacobians, f = LoraGGN(model, "classification").jacobians(batch)
    assert_near(f, model(batch).detach())
    assert_near(jacobians, looped_jacobians(model, batch))


def test_plain_peft_models_need_no_transformer():
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    config = LoraConfig(r=2, target_modules=["0", "2"])
    model = LogitsModel(excite(get_peft_model(net, config)).double()).eval()
    X = torch.randn(5, 6).double()
    ours, _ = LoraGGN(model, "classification").jacobians(X)
    theirs, _ = super(LoraGGN.__mro__[1], LoraGGN(model, "classification")).jacobians(X)
    assert_near(ours, theirs)


@pytest.mark.parametrize("freezes", [False, True])  # lora_A carries no gradient in the lowest layer
def test_a_posterior_over_lora_B_has_these_columns_of_the_jacobian(freezes):
    batch = token_batch(LENGTHS)
    whole = LoraGGN(logits_model("llama"), "classification")
    sizes, names = whole.engine.sizes, whole.engine.names
    jacobians, f = whole.jacobians(batch)
    parts = jacobians.split(sizes, dim=-1)
    expected = [part for name, part in zip(names, parts, strict=True) if "lora_B" in name]
    model = logits_model("llama")
    backend = over_lora_B(model, freezes)
    ours, outputs = backend.jacobians(batch)
    assert_near(outputs, f)
    assert_near(ours, torch.cat(expected, dim=-1))


def over_lora_B(model, freezes):
    """Return a backend over ``lora_B`` alone, whose model's other tensors may stay trainable."""
    others = [p for n, p in model.named_parameters() if p.requires_grad and "lora_B" not in n]
    for parameter in others:
        parameter.requires_grad_(False)
    backend = LoraGGN(model, "classification")
    for parameter in others:
        parameter.requires_grad_(not freezes)
    return backend


def test_wide_gradients_are_not_kept_where_lora_A_is_left_out():
    config = LoraConfig(r=2, target_modules=["0", "2", "4"])
    net = nn.Sequential(
        nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3), nn.Flatten()
    )
    model = LogitsModel(excite(get_peft_model(net, config))).eval()
    tape, _ = over_lora_B(model, False).engine.recording.tape(torch.randn(5, 6))
    seen = []

    def visit(column, i, grad):
        expired = [storage.expired() for storage in seen]
        assert all(expired[:-1])  # the latest may still be on its way down
        if grad.shape[-1] == 32:
            seen.append(StorageWeakRef(grad.untyped_storage()))

    tape.backward(torch.ones(2, 5, 3), visit)
    assert len(seen) == 4
