"""Layers whose output is changed in place, or replaced by another hook, right after they return."""

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn

from laplace_lora import LoraGGN
from support.models import excite
from support.references import assert_near, explicit_jacobians


class Net(nn.Module):
    """A trained layer, followed by something that may change its output in place."""

    def __init__(self, change, bias=True):
        super().__init__()
        self.body = nn.Linear(6, 5, bias)
        self.change = change
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        h = self.change(self.body(x))
        return self.head(h).reshape(len(x), -1, 3).sum(1)


def doubled(x):
    x *= 2.0
    return x


def scaled(x):
    return x * 2.0


CHANGES = {
    "relu": (nn.ReLU(inplace=True), nn.ReLU()),
    "multiplied": (doubled, scaled),
    "method": (lambda x: x.tanh_(), torch.tanh),
}
PARTS = {
    "whole": LoraConfig(r=2, target_modules=["head"], modules_to_save=["body"]),
    "lora": LoraConfig(r=2, target_modules=["body", "head"]),
    "adalora": AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["body", "head"]),
}


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6)], ids=["vectors", "tokens"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("part", PARTS)
def test_an_output_changed_in_place_has_the_gradient_of_one_that_is_not(part, change, bias, shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for changed in CHANGES[change]:
        torch.manual_seed(0)
        model = excite(get_peft_model(Net(changed, bias), PARTS[part])).double().eval()
        results.append(LoraGGN(model, "classification").jacobians(x)[0])
        if changed is CHANGES[change][1]:
            expected = torch.cat([J.flatten(2) for J in explicit_jacobians(model, x)], -1)
    assert_near(results[0], expected)
    assert_near(results[1], expected)


def test_an_output_that_a_hook_replaces_has_the_gradient_of_the_layers_own():
    torch.manual_seed(0)
    model = excite(get_peft_model(Net(torch.tanh), PARTS["whole"])).double().eval()
    x = torch.randn(4, 6, dtype=torch.float64)
    body = model.get_submodule("base_model.model.body.modules_to_save.default")
    body.register_forward_hook(lambda module, args, output: torch.sin(output) * 3.0)
    expected = torch.cat([J.flatten(2) for J in explicit_jacobians(model, x)], -1)
    assert_near(LoraGGN(model, "classification").jacobians(x)[0], expected)
