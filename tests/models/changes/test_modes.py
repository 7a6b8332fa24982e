"""Training and evaluation mode."""

import torch

from laplace_lora import KronLoraLaplace
from support.batches import loader
from support.posteriors import LOW
from support.uncovered import uncovered_model


def test_nothing_is_left_in_training_mode():
    """Jacobians asked for late are those of evaluation mode, as the outputs are."""
    model = uncovered_model("norms of bert")
    la = KronLoraLaplace(model, "classification", uncovered="diag", **LOW)
    la.fit(loader())
    model.train()
    la.optimize_prior_precision(method="gridsearch", val_loader=loader())
    assert model.training
    reference = la.prior_precision
    model.eval()
    la.optimize_prior_precision(method="gridsearch", val_loader=loader())
    assert torch.equal(la.prior_precision, reference)
