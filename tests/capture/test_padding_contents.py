"""Padding enters no sum, whatever an attention implementation leaves in it."""

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, VeraConfig, get_peft_model
from torch import nn

from laplace_lora import DiagLoraLaplace, FullLoraLaplace, KronLoraLaplace, LogitsModel, LoraGGN
from support.batches import token_batch
from support.models import excite
from support.references import assert_near

LENGTHS = (6, 3, 5, 4)


class Reader(nn.Module):
    """Layers whose inputs at padding tokens are anything; real tokens are summed."""

    def __init__(self, filling):
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.filling = filling

    def forward(self, input_ids, attention_mask):
        padding = attention_mask.unsqueeze(-1) == 0
        h = self.embed(input_ids).masked_fill(padding, self.filling)
        h = h + torch.tanh(self.first(h))
        h = self.last(self.norm(h))
        return h.masked_fill(padding, 0).sum(1)


ADAPTERS = {
    "lora": LoraConfig(r=2, target_modules=["first", "last"]),
    "adalora": AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["first"]),
    "ia3": IA3Config(target_modules=["first"], feedforward_modules=[]),
    "ia3 feedforward": IA3Config(target_modules=["first"], feedforward_modules=["first"]),
    "vera": VeraConfig(r=5, target_modules=["first"]),
    "whole": LoraConfig(r=2, target_modules=["first"], modules_to_save=["last", "norm"]),
}
POSTERIORS = {
    "kron": KronLoraLaplace,
    "diag": DiagLoraLaplace,
    "full": FullLoraLaplace,
}


def wrapped(adapter, filling):
    torch.manual_seed(0)
    model = excite(get_peft_model(Reader(filling), ADAPTERS[adapter])).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "ranknum" not in name)
    return LogitsModel(model, output=lambda out: out).eval()


@pytest.mark.parametrize("filling", [float("nan"), float("inf")])
@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_is_not_finite_at_padding_changes_nothing(adapter, posterior, filling):
    batch = token_batch(LENGTHS)
    examples = [{key: value[n] for key, value in batch.items()} for n in range(len(LENGTHS))]
    data = torch.utils.data.DataLoader(examples, batch_size=2)
    results = []
    for content in (0.0, filling):
        model = wrapped(adapter, content)
        la = POSTERIORS[posterior](model, "classification", uncovered="diag")
        la.fit(data)
        jacobians, _ = LoraGGN(model, "classification", uncovered="diag").jacobians(batch)
        results.append((jacobians, la.weight_variance(), la._glm_predictive_distribution(batch)[1]))
    assert all(bool(value.isfinite().all()) for value in results[1])
    assert_near(list(results[1]), list(results[0]))


def test_a_real_token_that_is_not_finite_is_not_hidden():
    batch = token_batch((4, 4))
    model = wrapped("lora", 0.0)
    with torch.no_grad():
        model.model.get_base_model().embed.weight[batch["input_ids"][0, 1]] = float("nan")
    la = KronLoraLaplace(model, "classification", backend_kwargs={"verify": False})
    examples = [{key: value[n] for key, value in batch.items()} for n in range(2)]
    with pytest.raises(FloatingPointError):
        la.fit(torch.utils.data.DataLoader(examples, batch_size=2))
