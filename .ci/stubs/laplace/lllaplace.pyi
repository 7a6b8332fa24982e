from collections.abc import MutableMapping
from typing import Any

from laplace.baselaplace import (
    DiagLaplace,
    FullLaplace,
    FunctionalLaplace,
    KronLaplace,
    ParametricLaplace,
)
from laplace.curvature import CurvatureInterface
from torch import Tensor, nn
from torch.utils.data import DataLoader

class LLLaplace(ParametricLaplace):
    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        feature_reduction: str | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | None = None,
        last_layer_name: str | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        asdl_fisher_kwargs: dict[str, Any] | None = None,
    ) -> None: ...
    def functional_variance_fast(
        self, X: Tensor | MutableMapping[str, Any]
    ) -> tuple[Tensor, Tensor]: ...
    def _find_last_layer(self, data: tuple[Tensor, Tensor] | MutableMapping[str, Any]) -> None: ...

class FullLLLaplace(LLLaplace, FullLaplace): ...
class DiagLLLaplace(LLLaplace, DiagLaplace): ...

class KronLLLaplace(LLLaplace, KronLaplace):
    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        feature_reduction: str | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | None = None,
        last_layer_name: str | None = None,
        damping: bool = False,
        backend_kwargs: dict[str, Any] | None = None,
        asdl_fisher_kwargs: dict[str, Any] | None = None,
    ) -> None: ...

class FunctionalLLLaplace(FunctionalLaplace):
    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        n_subset: int,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        feature_reduction: str | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        last_layer_name: str | None = None,
        backend: type[CurvatureInterface] | None = ...,
        backend_kwargs: dict[str, Any] | None = None,
        independent_outputs: bool = False,
        seed: int = 0,
    ) -> None: ...
    def fit(self, train_loader: DataLoader[Any], progress_bar: bool = False) -> None: ...
    def _find_last_layer(self, data: tuple[Tensor, Tensor] | MutableMapping[str, Any]) -> None: ...
