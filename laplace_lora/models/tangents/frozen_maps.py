"""Linear layers that do not move, without a derivative of their weights.

torch's forward derivative of a product has two terms, and computes both even if one factor has no
tangent: for each frozen weight it writes a matrix of zeros and multiplies with it. At one new token
per step that is as much work as the step itself. bitsandbytes' kernels for weights in 4 bits have
no forward derivative at all: those layers multiply with the weights that the bits stand for.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from laplace_lora.models.changes.modes import is_four_bit


def differentiate_inputs_only(model: nn.Module, moved: set[int]) -> None:
    """Let a model's frozen linear layers carry the tangents of their inputs and nothing else.

    Args:
        model: A module that may be changed for good.
        moved: Identities of the tensors that have tangents.
    """
    for module in model.modules():
        if not isinstance(module, nn.Linear) or any(id(p) in moved for p in module.parameters()):
            continue
        if "forward" in vars(module):
            continue
        if is_four_bit(module):
            vars(module)["forward"] = partial(_frozen_in_four_bits, module)
        elif type(module).forward is nn.Linear.forward:
            vars(module)["forward"] = partial(_frozen, module)


def _frozen(module: nn.Linear, inputs: Tensor) -> Tensor:
    return _product(inputs, module.weight, module.bias)


def _frozen_in_four_bits(module: Any, inputs: Tensor) -> Tensor:
    """Compute as bitsandbytes does for many tokens, in the layer's dtype of computation."""
    from bitsandbytes.functional import dequantize_4bit  # an optional package

    dtype = inputs.dtype if module.compute_dtype is None else module.compute_dtype
    weight = dequantize_4bit(module.weight.data, module.weight.quant_state).to(dtype)
    bias = None if module.bias is None else module.bias.to(dtype)
    return _product(inputs.to(dtype), weight, bias).to(inputs.dtype)


def _product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    values, tangents = forward_ad.unpack_dual(inputs)
    outputs = F.linear(values, weight, bias)
    if tangents is None:
        return outputs
    return forward_ad.make_dual(outputs, F.linear(tangents, weight))
