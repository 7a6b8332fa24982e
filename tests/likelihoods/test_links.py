"""Links from moments of logits to probabilities."""

import pytest
import torch

from laplace_lora.likelihoods import links


@pytest.mark.parametrize("samples", [7, 47, 49, 402])
def test_averages_of_certain_samples_are_no_more_than_certain(samples):
    assert links.averaged(torch.zeros(samples, 3, 1)).max() <= 0


@pytest.mark.parametrize("name", links.LINKS)
@pytest.mark.parametrize("shape", [(3, 1), (3, 5), (2, 3, 1)])
def test_several_covariances_of_a_batch_are_as_each_alone(name, shape):
    torch.manual_seed(0)
    mean = torch.randn(5, 4, dtype=torch.float64)
    root = torch.randn(*shape, 4, 4, dtype=torch.float64)
    covariance = root @ root.mT
    link = links.Link(name, torch.randn(64, 3, dtype=torch.float64) if name == "mc" else None)
    together = link.log_probabilities(mean, covariance)
    assert together.shape == (*shape[:-1], 5, 4)
    each = covariance.expand(*shape[:-1], 5, 4, 4).flatten(0, -4)
    alone = torch.stack([link.log_probabilities(mean, one) for one in each])
    torch.testing.assert_close(together, alone.view_as(together))


@pytest.mark.parametrize("name", ["bridge", "bridge_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_that_move_together_have_the_probabilities_of_their_mean(name, dtype):
    gaps = torch.tensor([0.0, 0.7], dtype=dtype)
    mean = torch.stack([torch.zeros_like(gaps), gaps], dim=-1)
    covariance = torch.full((2, 2, 2), 0.3, dtype=dtype)
    found = links.Link(name).log_probabilities(mean, covariance).exp()
    assert found[0].tolist() == pytest.approx([0.5, 0.5])
    if name == "bridge":
        assert found[1].tolist() == pytest.approx(mean[1].softmax(-1).tolist())
    else:  # as narrow as it gets, the normalised one is certain
        assert found[1].tolist() == pytest.approx([0, 1], abs=1e-6)
    none = links.Link(name).log_probabilities(mean, torch.zeros_like(covariance)).exp()
    torch.testing.assert_close(none, found)
