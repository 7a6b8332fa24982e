"""Importance criteria: known answers."""

import pytest
import torch
from scipy import stats

from laplace_lora.adaptive import CRITERIA
from laplace_lora.adaptive.criteria import ALIASES, criterion_of, snr_magnitude
from support.references import assert_near


def marginal(mean, std):
    return torch.tensor([mean], dtype=torch.float64), torch.tensor([std], dtype=torch.float64)


@pytest.mark.parametrize("mean,std", [(0, 1), (0.3, 2), (-1.5, 0.4), (4, 1), (7, 0.5)])
def test_snr_of_the_magnitude_is_that_of_a_folded_normal(mean, std):
    folded = stats.foldnorm(abs(mean) / std, scale=std)
    score = snr_magnitude(*marginal(float(mean), float(std)))
    assert score.item() == pytest.approx(folded.mean() / folded.std(), rel=1e-9)


def test_snr_of_the_magnitude_at_the_ends():
    assert snr_magnitude(*marginal(0.0, 3.0)).item() == pytest.approx(1.3236, abs=1e-4)
    t = torch.logspace(2, 8, 13)
    assert_near(snr_magnitude(t, torch.ones_like(t)), t)
    near = snr_magnitude(torch.linspace(0, 20, 2001), torch.ones(2001))
    assert (near.diff() >= -1e-6).all()


def test_the_other_criteria():
    mean, std = marginal(-3.0, 0.5)
    expected = {"snr": 6.0, "magnitude": 3.0, "precision_root": 2.0, "pruning_cost": 18.0}
    for name, value in expected.items():
        assert CRITERIA[name].function(mean, std).item() == pytest.approx(value)
    for alias, name in ALIASES.items():
        assert criterion_of(alias) is CRITERIA[name]
    assert criterion_of(lambda mean, std: mean).function(mean, std) is mean
    with pytest.raises(ValueError, match="criterion must be one of"):
        criterion_of("fisher")
