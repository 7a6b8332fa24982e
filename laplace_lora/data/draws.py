"""Random numbers that are drawn on the side, so that others draw what they would have drawn."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def draws_kept(devices: Sequence[int] | None = None) -> Iterator[None]:
    """Restore the global generators of torch, Python and NumPy after this block.

    Samplers draw from the first; data sets and collators may draw from any.

    Args:
        devices: GPUs whose generators are restored beside the CPU's; all by default.
    """
    by_python, by_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(by_python)
        np.random.set_state(by_numpy)
