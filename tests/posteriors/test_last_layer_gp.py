"""The last layer as a Gaussian process."""

import pytest
import torch
from laplace import Laplace
from laplace.curvature import CurvlinopsGGN
from torch.utils.data import DataLoader, TensorDataset

from laplace_lora import FullLoraLLLaplace, FunctionalLoraLLLaplace, LogitsModel, LoraGGN
from support.batches import loader, token_batch
from support.last_layer import last_layer_logits_model
from support.models import TARGETS, peft_model
from support.references import assert_near

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
