"""Numbers are looked at one by one only where their sum leaves it open."""

import pytest
import torch

from laplace_lora.linalg.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_sum_that_overflows_is_no_proof(dtype):
    largest = torch.full((3, 4), torch.finfo(dtype).max, dtype=dtype)
    assert not largest.sum().isfinite()
    assert all_finite(largest) and all_finite(largest[:0])
    for bad in ([torch.nan], [torch.inf], [-torch.inf], [torch.inf, -torch.inf]):
        spoilt = torch.zeros(3, 4, dtype=dtype)
        spoilt[1, : len(bad)] = torch.tensor(bad)
        assert not all_finite(spoilt)


def test_finite_numbers_are_summed_only(monkeypatch):
    looked = []
    ask = torch.Tensor.isfinite
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda x: looked.append(x.numel()) or ask(x))
    assert all_finite(torch.ones(5, requires_grad=True))
    assert looked == [1]
