from collections.abc import Callable, MutableMapping
from typing import Any

from laplace.utils.matrix import Kron
from torch import Tensor, nn

class CurvatureInterface:
    likelihood: str
    model: nn.Module
    last_layer: bool
    subnetwork_indices: Tensor | None
    dict_key_x: str
    dict_key_y: str
    lossfunc: Callable[[Tensor, Tensor], Tensor]
    factor: float
    params: list[nn.Parameter]
    params_dict: dict[str, nn.Parameter]
    buffers_dict: dict[str, Tensor]
    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        last_layer: bool = False,
        subnetwork_indices: Tensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
    ) -> None: ...
    @property
    def _model(self) -> nn.Module: ...
    def jacobians(
        self, x: Tensor | MutableMapping[str, Any], enable_backprop: bool = False
    ) -> tuple[Tensor, Tensor]: ...
    def last_layer_jacobians(
        self, x: Tensor | MutableMapping[str, Any], enable_backprop: bool = False
    ) -> tuple[Tensor, Tensor]: ...
    def selected_output_jacobians(
        self,
        x: Tensor | MutableMapping[str, Any],
        outputs: Tensor,
        enable_backprop: bool = False,
    ) -> tuple[Tensor, Tensor]: ...
    def gradients(
        self, x: Tensor | MutableMapping[str, Any], y: Tensor
    ) -> tuple[Tensor, Tensor]: ...
    # Source: `**kwargs`, of which laplace-torch passes `N`.
    def full(
        self, x: Tensor | MutableMapping[str, Any], y: Tensor, N: int = ...
    ) -> tuple[Tensor, Tensor]: ...
    def kron(
        self, x: Tensor | MutableMapping[str, Any], y: Tensor, N: int
    ) -> tuple[Tensor, Kron]: ...
    def diag(
        self, x: Tensor | MutableMapping[str, Any], y: Tensor, N: int = ...
    ) -> tuple[Tensor, Tensor]: ...

class GGNInterface(CurvatureInterface):
    stochastic: bool
    num_samples: int
    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        last_layer: bool = False,
        subnetwork_indices: Tensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        stochastic: bool = False,
        num_samples: int = 1,
    ) -> None: ...

class EFInterface(CurvatureInterface): ...

class CurvlinopsGGN(GGNInterface):
    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        last_layer: bool = False,
        subnetwork_indices: Tensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        stochastic: bool = False,
    ) -> None: ...
