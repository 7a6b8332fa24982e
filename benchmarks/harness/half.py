"""Whether a device computes in bfloat16 at a speed worth having."""

from __future__ import annotations

import torch


def has_bfloat16(device: str) -> bool:
    """Return whether bfloat16 is not slower than float32 on a device.

    An x86 processor without AVX-512 emulates its matrix products: on AVX2 alone they took 8 times
    as long as in float32 or more.
    """
    if torch.device(device).type != "cpu":
        return True
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2")
