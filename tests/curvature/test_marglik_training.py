"""laplace-torch's marginal-likelihood training on LoRA models and mapping batches."""

import pytest
import torch
from laplace import Laplace, marglik_training

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


class DiagonalGGN(LoraGGN):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, uncovered="diag", **kwargs)


@pytest.mark.parametrize("structure", ["diag", "full"])
def test_a_subclass_takes_the_place_of_options(structure):
    model = LogitsModel(peft_model("bert", dtype=torch.float32, use_dora=True))
    options = {"hessian_structure": structure, "n_epochs": 2, "optimizer_kwargs": {"lr": 1e-2}}
    with pytest.raises(ValueError, match="an argument of the posterior or of its backend"):
        marglik_training(model, loader(4), "classification", backend=LoraGGN, **options)
    la, _, evidence, _ = marglik_training(
        model, loader(4), "classification", backend=DiagonalGGN, **options
    )
    assert la.n_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert evidence[-1] < evidence[0]


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_the_evidence_has_its_gradient_by_a_regressions_noise(structure):
    model = LogitsModel(peft_model("bert"))
    la = Laplace(model, "regression", "all", structure, backend=LoraGGN)
    la.fit(loader(likelihood="regression"))
    prior = torch.linspace(1.0, 3.0, la.n_layers, dtype=torch.float64)

    def evidence(log_noise):
        return la.log_marginal_likelihood(prior, log_noise.exp())

    log_noise = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(evidence(log_noise), log_noise)
    with torch.no_grad():
        difference = (evidence(log_noise + 1e-4) - evidence(log_noise - 1e-4)) / 2e-4
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-6)
