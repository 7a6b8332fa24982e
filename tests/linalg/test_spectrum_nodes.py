"""Few eigenvalues in place of a spectrum, under any prior precision."""

import pytest
import torch

from laplace_lora.linalg.spectrum_nodes import DECADES, SpectrumNodes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_eigenvalue_is_stood_for_under_every_prior(dtype):
    e = torch.logspace(-8, 3, 5001, dtype=torch.float64).to(dtype)
    nodes = SpectrumNodes.covering([e[:2000], e[2000:]])
    shares, values = nodes.shares(e).double(), nodes.values
    assert shares.shape == (5001, len(values)) and len(values) < 80
    for delta in 10.0 ** torch.arange(-10, 9):
        ratio = (shares @ (1 / (values + delta))) * (e.double() + delta)
        assert (ratio - 1).abs().max() < 1e-5


def test_eigenvalues_far_below_the_largest_are_shared_out_to_zero():
    e = torch.tensor([0.0, 1e-30, 1e-13, 1.0], dtype=torch.float64)
    nodes = SpectrumNodes.covering([e])
    shares = nodes.shares(e)
    assert nodes.first == 10.0**-DECADES
    assert shares[0].tolist() == [1.0] + [0.0] * (len(nodes.values) - 1)
    torch.testing.assert_close(shares.sum(1), torch.ones(4).double())
    torch.testing.assert_close(shares[:3] @ nodes.values, e[:3], rtol=1e-9, atol=0)


def test_a_spectrum_of_zeros_is_zero_and_one_value_is_kept():
    zeros = torch.zeros(3)
    nodes = SpectrumNodes.covering([zeros, torch.empty(0)])
    assert nodes.values.tolist() == [0.0] and nodes.shares(zeros).tolist() == [[1.0]] * 3
    one = torch.tensor([0.25], dtype=torch.float64)
    nodes = SpectrumNodes.covering([one, zeros.double()])
    torch.testing.assert_close(nodes.shares(one) @ nodes.values, one)
