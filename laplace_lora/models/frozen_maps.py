"""Linear layers that do not move, without a derivative of their weights.

torch's forward derivative of a product has two terms, and computes both even if one factor has no
tangent: for each frozen weight it writes a matrix of zeros and multiplies with it. At one new token
per step that is as much work as the step itself.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F


def differentiate_inputs_only(model: nn.Module, moved: set[int]) -> None:
    """Let a model's frozen linear layers carry the tangents of their inputs and nothing else.

    Args:
        model: A module that may be changed for good.
        moved: Identities of the tensors that have tangents.
    """
    for module in model.modules():
        if not isinstance(module, nn.Linear) or any(id(p) in moved for p in module.parameters()):
            continue
        if type(module).forward is nn.Linear.forward and "forward" not in vars(module):
            vars(module)["forward"] = partial(_frozen, module)


def _frozen(module: nn.Linear, inputs: Tensor) -> Tensor:
    values, tangents = forward_ad.unpack_dual(inputs)
    outputs = F.linear(values, module.weight, module.bias)
    if tangents is None:
        return outputs
    return forward_ad.make_dual(outputs, F.linear(tangents, module.weight))
