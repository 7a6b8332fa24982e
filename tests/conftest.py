"""Settings for all tests."""

import pytest
import torch

# Failed assertions in the helpers show their values, as those in tests do.
pytest.register_assert_rewrite("support")

# Tiny tensors: a second thread costs more than it gives.
torch.set_num_threads(1)
