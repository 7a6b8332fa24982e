"""Let the processes of a training draw the same weights from IVON's posterior."""

from __future__ import annotations

import torch

from laplace_lora.adaptive.ivon import IVON
from laplace_lora.data.distributed import together


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
    with together(everyone=True) as team:
        if team.shared:
            seed, *_ = team.all_of(int(torch.randint(2**31, ())))
            device = ivon.param_groups[0]["params"][0].device
            ivon.generator = torch.Generator(device).manual_seed(seed)
