"""Settings for all tests."""

import pytest
import torch

# Failed assertions in the helpers show their values, as those in tests do.
pytest.register_assert_rewrite("support")

# Tiny tensors: a second thread costs more than it gives.
torch.set_num_threads(1)

# Of each sweep over cases; the others run with the slow tests, or when they are asked for by name.
CASES_BY_DEFAULT = 2  # the first and the last


@pytest.hookimpl(tryfirst=True)  # before slow tests are left out
def pytest_collection_modifyitems(config, items):
    if config.option.keyword or any("::" in argument for argument in config.args):
        return
    sweeps = {}
    for item in items:
        if not any(item.iter_markers("slow")) and not any(item.iter_markers("gpu")):
            sweeps.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in sweeps.values():
        steps = range(CASES_BY_DEFAULT)
        kept = {round(i * (len(cases) - 1) / (CASES_BY_DEFAULT - 1)) for i in steps}
        for place, item in enumerate(cases):
            if place not in kept:
                item.add_marker(pytest.mark.slow)


@pytest.fixture
def in_double(monkeypatch):
    """Let norms and softmaxes, which models compute in float32, be computed in float64."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
