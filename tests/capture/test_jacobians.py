"""Jacobians of all outputs, against one autograd call an example and output."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

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
