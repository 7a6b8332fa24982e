"""laplace-torch's default subset, the last layer, over models that are no `LastLayerModel`."""

import pytest
import torch
from laplace import Laplace
from laplace.curvature import CurvlinopsGGN
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_lora import LogitsModel, LoraGGN
from support.batches import loader, token_batch
from support.last_layer import last_layer_logits_model
from support.models import peft_model
from support.references import assert_near

BATCH = token_batch((4, 2, 6), seed=9)


def default(model, structure="kron", **kwargs):
    return Laplace(model, "classification", hessian_structure=structure, backend=LoraGGN, **kwargs)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("llama", r"'.*score.modules_to_save.default', sees an input of shape \(3, 1, 16\)"),
        ("llama-lm", "lm_head', is frozen"),
        ("bert-frozen", "classifier', is frozen"),
    ],
)
def test_last_layers_that_would_fail_to_predict_are_refused_in_the_fit(name, fault):
    la = default(last_layer_logits_model(name))
    with pytest.raises(ValueError, match=f"{fault}.*LastLayerModel.*'lora_last_layer'"):
        la.fit(loader())


class Rewards(nn.Module):
    """A reward for each text: of single ones, or of both of a pair."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 1)

    def forward(self, x):
        return self.head(self.body(x.reshape(-1, 4)).tanh()).reshape(len(x), -1)


def test_rewards_are_fitted_by_pairs_and_predicted_for_single_texts():
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(12, 2, 4, generator=generator)
    data = DataLoader(TensorDataset(pairs, torch.randint(2, (12,), generator=generator)), 5)
    found = []
    for backend in (LoraGGN, CurvlinopsGGN):
        la = Laplace(Rewards(), "reward_modeling", hessian_structure="full", backend=backend)
        la.fit(data)
        found.append((la.log_marginal_likelihood(), la(pairs[:, 0])[1]))
    for ours, theirs in zip(*found, strict=True):
        assert_near(ours, theirs, 1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [("bert", {}), ("roberta", {}), ("llama", {"feature_reduction": "pick_last"})],
)
def test_linear_heads_of_one_vector_are_taken(name, options):
    la = default(LogitsModel(peft_model(name)), "full", **options)
    reference = Laplace(LogitsModel(peft_model(name)), "classification", "lora_last_layer", "full")
    for each in (la, reference):
        each.fit(loader())
    assert_near(la.log_marginal_likelihood(), reference.log_marginal_likelihood())
    assert_near(la(BATCH), reference(BATCH, link_approx="probit"))
