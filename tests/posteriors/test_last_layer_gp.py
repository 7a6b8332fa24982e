"""The last layer as a Gaussian process."""

import pytest
import torch
from laplace import Laplace
from laplace.curvature import CurvlinopsGGN
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification

from laplace_lora import FullLoraLLLaplace, FunctionalLoraLLLaplace, LogitsModel, LoraGGN
from support.architectures import IMAGE
from support.batches import images, loader, split_rows, token_batch
from support.last_layer import last_layer_logits_model
from support.models import TARGETS, peft_model
from support.references import assert_near, looped_jacobians

BATCH = token_batch((4, 2, 6), seed=9)


def test_gaussian_process_on_all_data_is_the_exact_posterior_of_regression():
    model = LogitsModel(peft_model("bert", num_labels=1))
    batch = token_batch((5,) * 6)
    batch["labels"] = torch.randn(6, 1).double()
    examples = [{k: v[n] for k, v in batch.items()} for n in range(6)]
    data = DataLoader(examples, batch_size=4)
    gp = FunctionalLoraLLLaplace(model, "regression", n_subset=6, prior_precision=2.0)
    full = FullLoraLLLaplace(model, "regression", prior_precision=2.0)
    for la in (gp, full):
        la.fit(data)
    assert_near(list(gp(BATCH)), list(full(BATCH)))


@pytest.mark.parametrize("outputs", [1, 3])
def test_its_evidence_of_a_regression_is_that_of_the_linear_model(outputs):
    model = peft_model("bert", num_labels=outputs)
    batch = token_batch((5, 3, 6, 2, 4, 5))
    batch["labels"] = torch.randn(6, outputs, generator=torch.Generator().manual_seed(0)).double()
    options = {"prior_precision": 2.0, "sigma_noise": 0.7}
    gp = FunctionalLoraLLLaplace(model, "regression", n_subset=6, **options)
    gp.fit(DataLoader(split_rows(batch), batch_size=4))
    full = FullLoraLLLaplace(model, "regression", **options)
    full.fit(DataLoader(split_rows(batch), batch_size=4))
    J = looped_jacobians(full.model, batch).flatten(0, 1)
    mean = full.model(batch).flatten().detach() - J @ full.mean
    for noise in (0.7, 1.4):
        covariance = J @ J.T / 2.0 + noise**2 * torch.eye(len(J)).to(J)
        exact = torch.distributions.MultivariateNormal(mean, covariance)
        expected = exact.log_prob(batch["labels"].flatten())
        found = gp.log_marginal_likelihood(sigma_noise=torch.tensor(noise))
        torch.testing.assert_close(found, expected)


def test_a_second_fit_starts_anew():
    gp = FunctionalLoraLLLaplace(peft_model("bert"), "classification", n_subset=6)
    gp.fit(loader())
    before = gp.log_marginal_likelihood()
    gp.fit(loader())
    torch.testing.assert_close(gp.log_marginal_likelihood(), before)


def test_inputs_need_no_token_ids():
    torch.manual_seed(0)
    base = ViTForImageClassification(ViTConfig(**IMAGE, num_labels=3))
    lora = LoraConfig(r=2, target_modules=["query", "value", "q_proj", "v_proj"])
    model = get_peft_model(base, lora).double()
    batch = images(6)
    gp = FunctionalLoraLLLaplace(model, "classification", n_subset=6)
    gp.fit(DataLoader(split_rows(batch), batch_size=4))
    assert_near(gp(batch).sum(-1), torch.ones(6).double())
    assert gp.functional_samples(batch, n_samples=2).shape == (2, 6, 3)


def test_gaussian_process_options():
    gp = FunctionalLoraLLLaplace(
        peft_model("llama-lm"), "classification", n_subset=50, target_ids=TARGETS
    )
    with pytest.raises(ValueError, match="n_subset is 50, but there are 7"):
        gp.fit(loader())


def test_plain_gaussian_process_takes_pairs_of_tensors():
    """laplace-torch's own takes neither mappings nor other backends than three it names."""
    model = last_layer_logits_model("bert")
    batch = token_batch((5,) * 6)
    data = DataLoader(TensorDataset(batch["input_ids"], batch["labels"]), batch_size=3)
    options = {"subset_of_weights": "last_layer", "hessian_structure": "gp", "n_subset": 4}
    la = Laplace(model, "classification", backend=CurvlinopsGGN, **options)
    la.fit(data)
    ours = FunctionalLoraLLLaplace(model, "classification", n_subset=4)
    ours.fit(data)
    assert_near(ours(batch["input_ids"]), la(batch["input_ids"]))
    with pytest.raises(AssertionError):
        Laplace(model, "classification", backend=LoraGGN, **options)
