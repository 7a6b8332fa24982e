"""Settings for all tests."""

import torch

# Tiny tensors: a second thread costs more than it gives.
torch.set_num_threads(1)
