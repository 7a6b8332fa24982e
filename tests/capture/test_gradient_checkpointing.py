"""Gradient checkpointing counts nothing twice."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from laplace_lora import LoraGGN
from support.models import checkpoint_activations, peft_model
from support.posteriors import fitted_on
from support.references import assert_near


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_transformers_gradient_checkpointing_counts_nothing_twice(name):
    model = peft_model(name)
    reference = fitted_on(model, name)
    checkpoint_activations(model)
    model.train()
    again = fitted_on(model, name)
    assert_near(again.log_marginal_likelihood(), reference.log_marginal_likelihood(), 1e-12)
    assert model.training


class Checkpointed(nn.Module):
    """Recomputes its hidden layer in the backward pass, in evaluation mode too."""

    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.hidden, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.reentrant = reentrant

    def forward(self, x):
        x = self.embed(x)

        def block(x):
            return torch.tanh(self.hidden(x))

        if self.reentrant is not None:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        else:
            x = block(x)
        return self.head(x)


def test_forced_checkpointing_counts_nothing_twice_or_is_refused():
    x, y = torch.randn(5, 4), torch.arange(5) % 3
    krons = [LoraGGN(Checkpointed(r), "classification").kron(x, y, N=5)[1] for r in (None, False)]
    for one, other in zip(krons[0].kfacs, krons[1].kfacs, strict=True):
        assert_near(other, one)
    with pytest.raises(RuntimeError, match=r"'hidden' carries no gradient.*use_reentrant=False"):
        LoraGGN(Checkpointed(True), "classification").kron(x, y, N=5)
