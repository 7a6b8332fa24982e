"""laplace-torch's marginal-likelihood training on LoRA models and mapping batches."""

import pytest
import torch
from laplace import marglik_training

from laplace_lora import LogitsModel, LoraGGN
from support.batches import loader, token_batch
from support.models import TARGETS, peft_model


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("name", ["bert", "llama-lm"])
def test_it_trains_adapters_and_returns_a_posterior(structure, name):
    targets = TARGETS if name.endswith("-lm") else None
    model = peft_model(name, dtype=torch.float32)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    torch.manual_seed(0)
    la, trained, evidence, losses = marglik_training(
        LogitsModel(model, target_ids=targets),
        loader(4),
        "classification",
        hessian_structure=structure,
        backend=LoraGGN,
        n_epochs=12,
        optimizer_kwargs={"lr": 2e-2},
        marglik_frequency=3,
    )
    for key, p in model.named_parameters():
        assert torch.equal(p, before[key]) != p.requires_grad, key
    assert trained.model is model
    assert losses[-1] < losses[0]
    assert evidence[-1] < evidence[0]  # negative log marginal likelihoods
    assert la.log_marginal_likelihood().isfinite()
    probabilities = la(token_batch((4, 2)))
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2))
