"""Settings for all tests."""

import pytest
import torch

# Failed assertions in the helpers show their values, as those in tests do.
pytest.register_assert_rewrite("support")

# Tiny tensors: a second thread costs more than it gives.
torch.set_num_threads(1)


@pytest.fixture
def in_double(monkeypatch):
    """Let norms and softmaxes, which models compute in float32, be computed in float64."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
