"""Tuning on questions with another number of choices than those of the fit's last batch."""

import pytest
import torch
from torch.utils.data import DataLoader

from laplace_lora import DiagLoraLaplace
from laplace_lora.likelihoods.links import Link, gaussian_samples
from laplace_lora.predictive.glm import Predictor
from laplace_lora.tuning.validation.cache import scoring_of
from laplace_lora.tuning.validation.search import grid_search
from support.references import assert_near
from support.rows_apart import CHOICES, choice_batch, model_of


def questions(choices):
    return choice_batch([row[:choices] for row in CHOICES])


def batches(*groups):
    return DataLoader(groups, batch_size=None)


@pytest.fixture(scope="module")
def fitted_on():
    """From a number of choices to a posterior fitted on as many."""
    made = {}
    for choices in (2, 3):
        made[choices] = DiagLoraLaplace(model_of("bert"), "classification")
        made[choices].fit(batches(questions(choices)))
    return made


@pytest.mark.parametrize(("fit", "validation"), [(2, 3), (3, 2)])
def test_samples_are_drawn_for_the_choices_at_hand(fitted_on, fit, validation):
    """Samples of one contrast were taken for both of three choices, which is another integral."""
    la, data, grid = fitted_on[fit], questions(validation), torch.logspace(-4, 0, 3)
    sampled = scoring_of(la.fitted, "mc", 20_000, torch.Generator().manual_seed(0))
    exact = la.objective.scoring(Link("quadrature"), 1.0)
    by_samples, expected = (
        grid_search(Predictor(la.fitted), batches(data), grid, scoring, None, False)[1]
        for scoring in (sampled, exact)
    )
    torch.testing.assert_close(by_samples, expected, atol=0.01, rtol=0)
    mean = torch.full((1, validation - 1), 3.0).double()
    moments = mean, 4 * torch.eye(validation - 1).double().unsqueeze(0)
    labels = torch.tensor([1])
    found, expected = (scoring.nll(*moments, labels) for scoring in (sampled, exact))
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)
    result = la.calibrate(batches(data), link_approx="mc", n_samples=50, progress_bar=False)
    assert result.nll_after <= result.nll_before
    la.covariance_scale = la.likelihood_temperature = 1


def test_a_grid_meets_several_numbers_of_choices(fitted_on):
    """Every batch is scored as if it came alone, whatever came before it."""
    la, grid = fitted_on[2], torch.logspace(-1, 1, 3)
    two, three = questions(2), questions(3)

    def losses(*groups):
        scoring = scoring_of(la.fitted, "mc", 50, torch.Generator().manual_seed(0))
        return grid_search(Predictor(la.fitted), batches(*groups), grid, scoring, None, False)[1]

    alone = (losses(two) + losses(three)) / 2
    assert_near(losses(two, three), alone)
    assert_near(losses(three, two), alone)


def test_noise_of_another_dimension_is_refused():
    mean, covariance = torch.zeros(4, 3), torch.eye(3).expand(4, 3, 3)
    for columns in (1, 4):
        with pytest.raises(ValueError, match=f"samples of {columns} variables meet a cov"):
            Link("mc", torch.randn(8, columns)).log_probabilities(mean, covariance)
        with pytest.raises(ValueError, match=f"samples of {columns} variables meet a cov"):
            gaussian_samples(mean, covariance, torch.randn(8, columns))
