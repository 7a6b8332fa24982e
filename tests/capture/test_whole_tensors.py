"""Tensors without a layer of their own: examples must not mix, layers must not change."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from laplace_lora import LoraGGN


def test_models_that_mix_examples_are_refused():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.scale * (x - x.mean(0))

    backend = LoraGGN(Mixing(), "classification", uncovered="diag")
    with pytest.raises(RuntimeError, match="output for example 0 alone differs"):
        backend.jacobians(torch.randn(4, 3))


class Routed(nn.Module):
    """A scale that only examples with a positive first entry meet."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        chosen = x[:, 0] > 0
        if not chosen.any():
            return x
        return torch.where(chosen[:, None], self.scale * x, x)


def test_examples_that_do_not_meet_a_tensor_have_no_gradient():
    x = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 2.0, 3.0]])
    jacobians, _ = LoraGGN(Routed(), "classification", uncovered="diag").jacobians(x)
    assert torch.equal(jacobians, torch.stack([x[0].diag(), torch.zeros(3, 3)]))


def test_tensors_that_no_output_depends_on_are_named():
    """PEFT adapts the `out_proj` of torch's attention, which reads the weight beneath."""

    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0].mean(1))

    model = get_peft_model(Attending(), LoraConfig(r=2, target_modules=["out_proj"]))
    backend = LoraGGN(model, "classification", uncovered="diag")
    with pytest.raises(RuntimeError, match=r"depend on none of .*out_proj.lora_A.*Adapt other"):
        backend.jacobians(torch.randn(4, 5, 8))


def test_hooks_that_steer_a_training_are_no_derivative():
    """PEFT's OSF and CPT register them on their tensors."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.scale * x

    net, x = Scaled(), torch.randn(4, 3)
    backend = LoraGGN(net, "classification", uncovered="diag")
    expected, _ = backend.jacobians(x)
    net.scale.register_hook(torch.zeros_like)
    assert torch.equal(backend.jacobians(x)[0], expected)
    net(x).sum().backward()
    assert not net.scale.grad.any()
