"""Settings for all tests."""

import pytest
import torch

# Failed assertions in the helpers show their values, as those in tests do.
pytest.register_assert_rewrite("support")

# Tiny tensors: a second thread costs more than it gives.
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before slow tests are left out
def pytest_collection_modifyitems(config, items):
    """Keep the first and the last case of each sweep; the others run with the slow tests.

    All run that are asked for by name.
    """
    if config.option.keyword or any("::" in argument for argument in config.args):
        return
    sweeps = {}
    for item in items:
        if not any(item.iter_markers("slow")) and not any(item.iter_markers("gpu")):
            sweeps.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in sweeps.values():
        for item in cases[1:-1]:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def in_double(monkeypatch):
    """Let norms and softmaxes, which models compute in float32, be computed in float64."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
