"""Whatever needs the fit's data again refuses others that are as many."""

import math

import pytest
import torch

from laplace_lora import DiagLoraLaplace, KronLoraLaplace
from laplace_lora.tuning.left_out import recentring
from support.batches import LENGTHS, loader
from support.models import peft_model
from support.posteriors import LOW, posterior

OTHER = "mean training loss of the loader's examples is .* on those of the fit"


def labelled(replace, batch_size=3):
    """The usual examples, with labels of 0 replaced by another, or all by 0."""
    data = loader(batch_size)
    for row in data.dataset:
        row["labels"] = torch.where(row["labels"] == 0, replace, row["labels"] * (replace != 0))
    return data


def of_fit(batch_size=3):
    return labelled(1, batch_size)


def relabelled():
    """The examples with the label that `confident` finds unlikely."""
    return labelled(0)


def shifted():
    """The examples of a regression, with other targets."""
    data = loader(likelihood="regression")
    for row in data.dataset:
        row["labels"] = row["labels"] + 3
    return data


def confident():
    """A posterior fitted on `of_fit`, of a model that finds the first class unlikely."""
    la = posterior(name="bert", fit=False, **LOW)
    la.logits_model.model.get_base_model().classifier.modules_to_save.default.bias.data[0] = -3
    la.fit(of_fit())
    return la


@pytest.mark.parametrize("rows", [0, recentring.ROWS])
def test_recentring(rows, monkeypatch):
    monkeypatch.setattr(recentring, "ROWS", rows)
    la = confident()
    with pytest.raises(ValueError, match=OTHER + ".*recentring needs the same"):
        la.recentre(1.0, train_loader=relabelled())
    assert la.state.settings.shift is None
    la.recentre(1.0, train_loader=of_fit(batch_size=2))


def test_leave_one_out():
    la = confident()
    with pytest.raises(ValueError, match=OTHER + ".*leave-one-out needs the same"):
        la.optimize_prior_precision(method="loo", train_loader=relabelled())
    la.optimize_prior_precision(method="loo", train_loader=of_fit(batch_size=2))


def test_evidence():
    la = confident()
    with pytest.raises(ValueError, match=OTHER + ".*gradient term needs the same"):
        la.measure_gradient_term(relabelled())
    la.measure_gradient_term(of_fit(batch_size=2))


@pytest.mark.parametrize("noise,temperature", [(0.3, 1.0), (1.0, 4.0)])
def test_noise_and_temperature_do_not_count(noise, temperature):
    model = peft_model("bert")
    kwargs = {"sigma_noise": noise, "temperature": temperature}
    la = DiagLoraLaplace(model, "regression", **kwargs)
    la.fit(loader(likelihood="regression"))
    la.recentre(1.0)
    with pytest.raises(ValueError, match=OTHER):
        la.recentre(1.0, train_loader=shifted())


def test_data_that_change_a_little_pass():
    la = confident()
    data = of_fit()
    data.dataset[0]["labels"] = torch.tensor(2)
    la.recentre(1.0, train_loader=data)


def test_a_curvature_without_its_loss_is_not_compared():
    la = confident()
    adopted = KronLoraLaplace(la.logits_model, "classification", **LOW)
    adopted.adopt(la.curvature, len(LENGTHS))
    assert math.isnan(adopted.state.loss)
    adopted.recentre(1.0, train_loader=relabelled())
