"""Half precision and gradient checkpointing do not change what is found."""

import copy

import pytest
import torch
from test_posterior import DENSE, LOW, loader
from torch import nn
from torch.utils.checkpoint import checkpoint

from laplace_lora import DiagLoraLaplace, KronLoraLaplace, LogitsModel, LoraGGN
from tiny import TARGETS, assert_near, peft_model, token_batch

BATCH = token_batch((4, 2, 5), seed=3)


def posterior(model, name, cls=KronLoraLaplace, **kwargs):
    la = cls(
        model, "classification", target_ids=TARGETS if name.endswith("-lm") else None, **kwargs
    )
    la.fit(loader())
    return la


def half(model, dtype, adapters):
    """Return a copy in half precision; PEFT keeps adapters in float32 unless told otherwise."""
    small = copy.deepcopy(model).to(dtype)
    for name, parameter in small.named_parameters():
        if "lora_" in name and not adapters:
            parameter.data = parameter.data.float()
    return small


@pytest.mark.parametrize("adapters", [False, True], ids=["float adapters", "half adapters"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "cls,kwargs", [(KronLoraLaplace, DENSE), (KronLoraLaplace, LOW), (DiagLoraLaplace, {})]
)
@pytest.mark.parametrize("name", ["bert", "llama", "llama-lm"])
def test_half_precision_models_agree_with_single_precision(name, cls, kwargs, dtype, adapters):
    model = peft_model(name, dtype=torch.float32)
    model = half(model, dtype, adapters).float()  # the same weights in both
    whole = posterior(model, name, cls, **kwargs)
    small = posterior(half(model, dtype, adapters), name, cls, **kwargs)
    assert small.mean.dtype == small.prior_precision.dtype == torch.float32
    expected = whole.log_marginal_likelihood()
    assert (small.log_marginal_likelihood() - expected).abs() < 0.01 * expected.abs()
    for la in (whole, small):
        la.prior_precision = 10.0
    assert (small(BATCH) - whole(BATCH)).abs().max() < 0.01
    assert small(BATCH).dtype == torch.float32


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_transformers_gradient_checkpointing_counts_nothing_twice(name):
    model = peft_model(name)
    reference = posterior(model, name)
    base = model.get_base_model()
    # transformers 5.23 renames it.
    enable = getattr(base, "activation_checkpointing_enable", None)
    if enable is None:
        enable = base.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    model.train()
    again = posterior(model, name)
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


def test_logits_of_half_precision_models_are_wide():
    model = peft_model("bert", dtype=torch.float32).to(torch.bfloat16)
    assert LogitsModel(model)(BATCH).dtype == torch.float32
