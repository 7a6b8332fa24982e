"""Links from moments of logits to probabilities."""

import math

import pytest
import torch

from laplace_lora.likelihoods import links


def test_entropies_of_a_coin_by_quadrature():
    """Two logits whose difference is N(0, 4): against a fine grid of the normal density."""
    noise = torch.Generator().manual_seed(0)
    draws = torch.randn(400_000, 1, dtype=torch.float64, generator=noise)
    covariance = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))[None]
    total, aleatoric = links.entropies(torch.zeros(1, 2, dtype=torch.float64), covariance, draws)
    z = torch.linspace(-30, 30, 20_001, dtype=torch.float64)
    weight = (-(z**2) / 8).exp() / math.sqrt(8 * math.pi) * (z[1] - z[0])
    p = z.sigmoid()
    expected = (weight * (torch.special.entr(p) + torch.special.entr(1 - p))).sum()
    assert total.item() == pytest.approx(math.log(2), abs=1e-5)
    assert aleatoric.item() == pytest.approx(expected.item(), abs=2e-3)
