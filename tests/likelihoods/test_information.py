"""Entropies of class probabilities, and what of them the weights explain."""

import math

import pytest
import torch

from laplace_lora.likelihoods.information import entropies


def by_grid(mean, deviation):
    """Entropy of the average, and average entropy, of a coin, by a fine grid."""
    z = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    weight = (-(z**2) / 2).exp() / math.sqrt(2 * math.pi) * (z[1] - z[0])
    f = mean + deviation * z

    def entropy(p, q):
        return torch.special.entr(p) + torch.special.entr(q)

    p, q = (weight * f.sigmoid()).sum(), (weight * (-f).sigmoid()).sum()
    return float(entropy(p, q)), float((weight * entropy(f.sigmoid(), (-f).sigmoid())).sum())


@pytest.mark.parametrize("mean", [0.0, -1.3, 7.0, -30.0, 50.0])
@pytest.mark.parametrize("deviation", [0.0, 1e-3, 0.7, 2.0, 9.0, 50.0])
def test_entropies_of_two_classes_are_exact(mean, deviation):
    moments = torch.tensor([[mean]]).double(), torch.tensor([[[deviation**2]]]).double()
    total, information = entropies(*moments, None, relative=True)
    expected = by_grid(mean, deviation)
    assert total.item() == pytest.approx(expected[0], abs=1e-8, rel=1e-6)
    assert (total - information).item() == pytest.approx(expected[1], abs=1e-8, rel=1e-6)
    assert information >= 0


def test_entropies_of_samples_are_close_to_the_exact_ones():
    """Two logits whose difference is N(0, 4)."""
    noise = torch.Generator().manual_seed(0)
    draws = torch.randn(400_000, 1, dtype=torch.float64, generator=noise)
    covariance = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))[None]
    mean = torch.zeros(1, 2, dtype=torch.float64)
    sampled, exact = (entropies(mean, covariance, points) for points in (draws, None))
    assert sampled[0].item() == pytest.approx(exact[0].item(), abs=1e-5)
    assert sampled[1].item() == pytest.approx(exact[1].item(), abs=2e-3)


def test_the_epistemic_part_of_more_classes_is_never_negative():
    torch.manual_seed(0)
    mean, noise = torch.randn(2000, 4), torch.randn(64, 3)
    covariance = 1e-9 * torch.eye(4).expand(2000, 4, 4)
    total, information = entropies(mean, covariance, noise)
    assert bool((information >= 0).all())
    wide, narrow = (x.double() for x in (mean, covariance))
    expected = entropies(wide, narrow, noise.double())
    torch.testing.assert_close(total.double(), expected[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(information.double(), expected[1], atol=1e-13, rtol=1e-2)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_information_of_a_narrow_posterior_is_no_rounding_error(classes):
    """To second order it is half of the variance of the logits under the softmax's curvature."""
    torch.manual_seed(0)
    mean = 2 * torch.randn(20, classes)
    covariance = torch.diag_embed(1e-8 * torch.rand(20, classes))
    noise = None if classes == 2 else torch.randn(20_000, classes - 1)
    _, information = entropies(mean, covariance, noise)
    p = mean.double().softmax(-1)
    curvature = torch.diag_embed(p) - p.unsqueeze(1) * p.unsqueeze(2)
    expected = 0.5 * (curvature * covariance).sum((1, 2))
    assert float(expected.max()) < 1e-8
    torch.testing.assert_close(information.double(), expected, atol=1e-11, rtol=0.05)


def test_entropies_of_more_classes_need_samples():
    with pytest.raises(ValueError, match="need samples"):
        entropies(torch.zeros(1, 3), torch.eye(3)[None], None)
