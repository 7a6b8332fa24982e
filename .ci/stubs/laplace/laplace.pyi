from typing import Any

from laplace.baselaplace import BaseLaplace
from torch import nn

def Laplace(
    model: nn.Module,
    likelihood: str,
    subset_of_weights: str = "last_layer",
    hessian_structure: str = "kron",
    *args: Any,
    functional_approximation: str = "sod",
    **kwargs: Any,
) -> BaseLaplace: ...
