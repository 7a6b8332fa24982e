"""Tuning of reward posteriors, on pairs."""

import pytest
import torch

from laplace_lora import (
    DiagLoraLaplace,
    DiagLoraLLLaplace,
    FullLoraLaplace,
    FullLoraLLLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
    LowRankLoraLaplace,
)
from laplace_lora.predictive.glm import Predictor
from laplace_lora.tuning.validation.cache import scoring_of
from laplace_lora.tuning.validation.search import grid_search
from support.posteriors import DENSE, LOW
from support.preferences import pair_batch, pair_loader, reward_posterior
from support.references import assert_near

EVERY_CLASS = [
    (KronLoraLaplace, DENSE),
    (KronLoraLaplace, LOW),
    (DiagLoraLaplace, {}),
    (KronLoraLLLaplace, {}),
    (DiagLoraLLLaplace, {}),
    (FullLoraLLLaplace, {}),
    (FullLoraLaplace, {}),
    (LowRankLoraLaplace, {"rank": 40}),
]


@pytest.mark.parametrize("cls,kwargs", EVERY_CLASS)
def test_tuning_evaluates_pairs_as_a_binary_classifier(cls, kwargs):
    la, pairs = reward_posterior(cls, **kwargs), pair_batch(seed=4)
    pairs["labels"] = torch.tensor([1, 0, 1, 1, 0])
    validation = pair_loader(2, pairs)

    def nll(link):
        return -la(pairs, link_approx=link)[range(5), pairs["labels"]].log().mean()

    grid = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    scoring = scoring_of(la.fitted, "probit", 10)
    best, losses = grid_search(Predictor(la.fitted), validation, grid, scoring, None, False)
    for precision, loss in zip(grid, losses, strict=True):
        la.prior_precision = precision
        assert_near(loss, nll("probit"))
    assert best == grid[losses.argmin()]
    for options in ({"method": "gridsearch", "grid_size": 5}, {"method": "val_gd", "n_steps": 5}):
        la.optimize_prior_precision(val_loader=validation, link_approx="mc", **options)
    if cls is not FullLoraLLLaplace:
        la.optimize_prior_precision(prior_structure="layerwise")
    la.optimize_prior_precision(correction=False)
    evidence, tuned = la.log_marginal_likelihood(), la.prior_precision
    for factor in (0.8, 1.25):  # the evidence is asked at a prior, and keeps it
        assert la.log_marginal_likelihood(tuned * factor) < evidence
    la.prior_precision = tuned
    calibration = la.calibrate(validation)
    assert calibration.nll_after <= calibration.nll_before
    # The cache of a calibration is exact to a percent.
    assert calibration.nll_after == pytest.approx(nll("probit").item(), rel=0.01)


def test_grid_search_by_sampled_weights_needs_no_labels():
    la = reward_posterior(**LOW)
    options = {"val_loader": pair_loader(), "grid_size": 3, "n_samples": 3}
    la.optimize_prior_precision("nn", "gridsearch", **options)
    assert la.prior_precision.item() in torch.logspace(-4, 4, 3).tolist()


def test_the_memory_of_pairs_counts_one_row_each():
    la = reward_posterior(FullLoraLaplace)
    pairs = pair_batch(seed=4)
    one = la.structure.nbytes(la.engine, 5, 1)
    assert la.estimate_memory(pairs, n_examples=5).curvature == one
