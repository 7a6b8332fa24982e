"""Which tensors share a prior precision, by the evidence with the precisions integrated out."""

import contextlib
import math

import pytest
import torch

from laplace_lora import DiagLoraLaplace, FullLoraLaplace, KronLoraLaplace, LowRankLoraLaplace
from laplace_lora.tuning.evidence import structure_choice
from laplace_lora.tuning.evidence.marginal_likelihood import maximise
from laplace_lora.tuning.evidence.structure_choice import CANDIDATES, integrated_evidence
from laplace_lora.tuning.groups import prior_groups
from laplace_lora.tuning.tuner import Tuner
from support.batches import loader
from support.models import peft_model
from support.posteriors import posterior
from support.sweeps import rest_slow

POSTERIORS = [
    (KronLoraLaplace, {}),
    (DiagLoraLaplace, {}),
    (FullLoraLaplace, {}),
    (LowRankLoraLaplace, {"rank": 5}),
]


@pytest.fixture(scope="module", params=POSTERIORS, ids=lambda pair: pair[0].__name__)
def la(request):
    cls, kwargs = request.param
    return posterior(cls, "bert", **kwargs)


def test_the_integral_over_a_precision(la):
    """Against Simpson's rule over the whole range."""
    settings, _ = Tuner(la.fitted).marginal_likelihood("scalar", False, False)
    groups = prior_groups(la.fitted.names, "scalar")
    ours = integrated_evidence(la.fitted, settings, groups, False)
    logs = torch.linspace(-12, 12, 2001, dtype=torch.float64)
    logs = logs + float(settings.prior_precision.log())
    values = torch.stack([la.log_marginal_likelihood(log.exp()).detach() for log in logs])
    numeric = float(torch.logsumexp(values, 0) + (logs[1] - logs[0]).log())
    assert ours == pytest.approx(numeric - math.log(structure_choice.RANGE), abs=0.3)


@pytest.mark.parametrize("correction", [True, False])
def test_the_largest_evidence_is_taken_and_reported(la, correction):
    la.optimize_prior_precision(
        method="marglik", prior_structure="auto", correction=correction, train_loader=loader()
    )
    choice, chosen = la.tuning.structure, la.prior_precision
    assert set(choice.evidences) == set(CANDIDATES)
    assert choice.structure == max(choice.evidences, key=choice.evidences.get)
    assert repr(choice.structure) in str(la.tuning)
    la.optimize_prior_precision(
        method="marglik",
        prior_structure=choice.structure,
        correction=correction,
        train_loader=loader(),
    )
    torch.testing.assert_close(la.prior_precision, chosen)
    assert la.tuning.structure is None
    # The maximum itself never falls with a finer structure; the evidence charged for it may.
    maximum = float(la.log_marginal_likelihood(correction=correction))
    assert choice.evidences[choice.structure] <= maximum + 1e-6


def test_the_price_of_a_precision_decides(la, monkeypatch):
    def choice():
        return Tuner(la.fitted).marginal_likelihood("auto", False, False)[1]["structure"]

    monkeypatch.setattr(structure_choice, "RANGE", 1e-9)
    free = choice()
    assert free.evidences["layerwise"] >= free.evidences["scalar"]
    monkeypatch.setattr(structure_choice, "RANGE", 1e99)
    assert choice().structure == "scalar"


@pytest.mark.slow
@pytest.mark.parametrize("correction", rest_slow([False, True], 1))
def test_the_integral_over_two_precisions_of_an_exact_posterior(correction, monkeypatch):
    """Against a sum over a grid of both."""
    monkeypatch.setattr(structure_choice, "RANGE", 24.0)
    la = posterior(FullLoraLaplace, "bert", modules=["query", "classifier"])
    groups = prior_groups(la.fitted.names, lambda name: "head" if "classifier" in name else "lora")
    settings = maximise(la.fitted, groups, False, correction)
    ours = integrated_evidence(la.fitted, settings, groups, correction)
    best = torch.zeros(2, dtype=torch.float64)
    best.index_copy_(0, groups, settings.prior_precision.log())
    steps = torch.linspace(-12, 12, 49, dtype=torch.float64)
    values = []
    for a in steps:
        for b in steps:
            prior = (best + torch.stack([a, b])).exp()[groups]
            with contextlib.suppress(FloatingPointError):  # an evidence above zero
                values.append(la.log_marginal_likelihood(prior, correction=correction).detach())
    values = torch.stack(values)
    numeric = float(torch.logsumexp(values, 0) + 2 * math.log(0.5 / 24))
    assert ours == pytest.approx(numeric, abs=1.0)


def test_structures_that_take_too_much_memory_are_left_out(monkeypatch):
    la = posterior(FullLoraLaplace, "bert")
    monkeypatch.setattr(structure_choice, "BYTES", 8 * 3 * 14**2)
    la.optimize_prior_precision(method="marglik", prior_structure="auto")
    assert set(la.tuning.structure.evidences) == {"scalar", "matrix", "block"}


def test_what_cannot_choose_says_so():
    regression = KronLoraLaplace(peft_model("bert"), "regression")
    regression.fit(loader(likelihood="regression"))
    with pytest.raises(ValueError, match="observation noise"):
        regression.optimize_prior_precision(
            method="marglik", prior_structure="auto", tune_sigma_noise=True
        )
