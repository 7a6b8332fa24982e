"""4-bit bases without a checkpoint: the linear layers of a model in memory, quantised in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def quantise_4bit(base: Any, compute_dtype: torch.dtype) -> Any:
    """Replace the linear layers of a transformer's blocks by bitsandbytes' NF4 layers.

    Args:
        base: A model before PEFT; its weights are quantised where they are.
        compute_dtype: Of the products.

    Returns:
        The same model, which PEFT now takes for one that was loaded in 4 bits.

    Raises:
        ModuleNotFoundError: If bitsandbytes is not installed.
    """
    import bitsandbytes as bnb

    def quantised(linear: nn.Linear) -> nn.Module:
        with torch.device("meta"):
            layer = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=False,
                quant_type="nf4",
                compute_dtype=compute_dtype,
            )
        weight = linear.weight.detach()
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        return layer.to(weight.device)

    for block in base.model.layers:
        for module in block.modules():
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear and child.bias is None:
                    setattr(module, name, quantised(child))
    base.is_loaded_in_4bit = True
    return base
