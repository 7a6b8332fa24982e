"""Let the processes of a training draw the same weights from IVON's posterior."""

from __future__ import annotations

import torch
from torch import distributed as dist

from laplace_lora.adaptive.ivon import IVON


def share_draws(ivon: IVON) -> None:
    """Give an optimiser a generator that draws the same in all processes, unless it has its own.

    `DistributedDataParallel` averages gradients, which therefore must have been computed at the
    same weights. The global generators do not stay together: dropout moves them by the sizes of
    what each process sees.

    Args:
        ivon: The optimiser; of ``sync=True`` processes are meant to draw weights of their own.
    """
    if ivon.sync or ivon.generator is not None:
        return
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    device = ivon.param_groups[0]["params"][0].device
    seed = torch.randint(2**31, (1,), device=device)
    dist.broadcast(seed, 0)
    ivon.generator = torch.Generator(device).manual_seed(int(seed))
