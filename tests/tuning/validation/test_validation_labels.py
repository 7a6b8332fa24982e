"""Validation labels that the model's outputs cannot have are refused as a fit refuses them."""

import pytest
import torch
from torch.utils.data import DataLoader

from laplace_lora import DiagLoraLaplace, KronLoraLaplace, LowRankLoraLaplace
from support.batches import split_rows, token_batch, validation
from support.models import peft_model
from support.multilabel import multilabel_batch, multilabel_posterior
from support.posteriors import LOW, fitted, posterior
from support.tokens import tagged_batch, tagged_loader, tagged_posterior

TUNING = ("gridsearch", "val_gd")


def refused(la, data, error, match, methods=(*TUNING, "calibrate")):
    """Provoke the error in every way of tuning; the prior must stay as it was."""
    before = la.prior_precision.clone()
    for method in methods:
        with pytest.raises(error, match=match):
            if method == "calibrate":
                la.calibrate(data, progress_bar=False)
            else:
                la.optimize_prior_precision(method=method, val_loader=data)
    assert torch.equal(la.prior_precision, before)


def labelled(batch, labels):
    return DataLoader(split_rows({**batch, "labels": labels}), batch_size=3)


def regression(cls=KronLoraLaplace, **kwargs):
    batch, generator = token_batch((4, 6, 2, 5)), torch.Generator().manual_seed(0)
    targets = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    la = cls(peft_model("bert", num_labels=2), "regression", **kwargs)
    la.fit(labelled(batch, targets))
    return la, batch, targets


def test_targets_are_not_broadcast_to_several_outputs():
    la, batch, targets = regression()
    for few in (targets[:, 0], targets[:, :1]):
        refused(la, labelled(batch, few), ValueError, "one target per output", TUNING)


def test_targets_that_are_not_finite_are_refused():
    la, batch, targets = regression()
    targets[3, 1] = torch.nan  # in the second batch
    match = r"loss of a batch is nan: labels are NaN or infinite at rows \[0\] of the batch"
    refused(la, labelled(batch, targets), FloatingPointError, match, TUNING)


@pytest.mark.parametrize("structure", ["scalar", "matrix"])
def test_a_posterior_that_couples_its_groups_refuses_them_too(structure):
    la, batch, targets = regression(LowRankLoraLaplace, rank=10)
    data = labelled(batch, targets[:, :1])
    with pytest.raises(ValueError, match="one target per output"):
        la.optimize_prior_precision(method="val_gd", val_loader=data, prior_structure=structure)


def test_a_label_is_not_broadcast_to_independent_ones():
    la, batch = multilabel_posterior(), multilabel_batch(missing=False)
    for few in (batch["labels"][:, 0], batch["labels"][:, :1]):
        refused(la, labelled(batch, few), ValueError, "one label per output")


LABELS = (
    (torch.tensor([0, 1, 2, 3]), r"labels must lie in 0\.\.2"),
    (torch.tensor([0, 1, 2, -100]), r"labels must lie in 0\.\.2"),
    (torch.tensor([0.0, 1.0, 2.0, 0.0]), "one integer label per example"),
    (torch.tensor([[0], [1], [2], [0]]), "one integer label per example"),
    (torch.eye(4, 3).long(), "one integer label per example"),
)


@pytest.mark.parametrize(("labels", "match"), LABELS)
def test_labels_that_are_no_classes_are_refused(labels, match, tmp_path):
    data = labelled(token_batch((4, 6, 2, 5)), labels)
    for cls, kwargs in ((KronLoraLaplace, LOW), (DiagLoraLaplace, {})):
        refused(posterior(cls, **kwargs), data, ValueError, match)
    with pytest.raises(ValueError, match=match):
        fitted().export_adapters(tmp_path / "out", k=2, loader=data)


def test_labels_of_tokens_that_are_no_classes_are_refused(tmp_path):
    la, batch = tagged_posterior(), tagged_batch()
    batch["labels"][0, 1] = 3
    for call in (
        lambda: la.calibrate(tagged_loader(batch=batch), progress_bar=False),
        lambda: la.export_adapters(tmp_path / "out", k=2, loader=tagged_loader(batch=batch)),
    ):
        with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2"):
            call()


def test_a_loss_that_is_finite_for_no_prior_is_no_choice():
    la = posterior(prior_precision=2.5, **LOW)
    options = {"method": "gridsearch", "val_loader": validation(), "grid_size": 3}
    with pytest.raises(FloatingPointError, match="no prior precision of the grid has a finite"):
        la.optimize_prior_precision(loss=lambda p, y: float("nan"), **options)
    assert la.prior_precision.item() == 2.5
