from collections.abc import MutableMapping
from typing import Any

import torch
from laplace.curvature import CurvatureInterface
from laplace.utils.matrix import Kron, KronDecomposed
from torch import Tensor, nn
from torch.utils.data import DataLoader

class BaseLaplace:
    _key: tuple[str, str]
    model: nn.Module
    likelihood: str
    params: list[nn.Parameter]
    is_subset_params: bool
    n_params: int
    n_layers: int
    temperature: float
    enable_backprop: bool
    dict_key_x: str
    dict_key_y: str
    loss: float | Tensor
    n_outputs: int
    n_data: int
    mean: Tensor
    _backend: CurvatureInterface | None
    _backend_cls: type[CurvatureInterface]
    _backend_kwargs: dict[str, Any]
    _asdl_fisher_kwargs: dict[str, Any]
    _prior_mean: Tensor
    _prior_precision: Tensor
    _sigma_noise: Tensor
    _posterior_scale: Tensor | None
    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        asdl_fisher_kwargs: dict[str, Any] | None = None,
    ) -> None: ...
    @property
    def _device(self) -> torch.device: ...
    @property
    def _dtype(self) -> torch.dtype: ...
    @property
    def backend(self) -> CurvatureInterface: ...
    @property
    def log_likelihood(self) -> Tensor: ...
    @property
    def prior_precision_diag(self) -> Tensor: ...
    @property
    def prior_mean(self) -> Tensor: ...
    @prior_mean.setter
    def prior_mean(self, prior_mean: float | Tensor) -> None: ...
    @property
    def prior_precision(self) -> Tensor: ...
    @prior_precision.setter
    def prior_precision(self, prior_precision: float | Tensor) -> None: ...
    @property
    def sigma_noise(self) -> Tensor: ...
    @sigma_noise.setter
    def sigma_noise(self, sigma_noise: float | Tensor) -> None: ...
    @property
    def _H_factor(self) -> Tensor: ...
    def log_marginal_likelihood(
        self, prior_precision: Tensor | None = None, sigma_noise: Tensor | None = None
    ) -> Tensor: ...
    def _check_jacobians(self, Js: Tensor) -> None: ...

class ParametricLaplace(BaseLaplace):
    H: Any  # a tensor, `Kron` or `KronDecomposed`, by the structure
    def _init_H(self) -> None: ...
    def _check_H_init(self) -> None: ...
    def _curv_closure(
        self, X: Tensor | MutableMapping[str, Any], y: Tensor, N: int
    ) -> tuple[Tensor, Any]: ...
    def fit(
        self, train_loader: DataLoader[Any], override: bool = True, progress_bar: bool = False
    ) -> None: ...
    @property
    def scatter(self) -> Tensor: ...
    @property
    def log_det_prior_precision(self) -> Tensor: ...
    @property
    def log_det_posterior_precision(self) -> Tensor: ...
    @property
    def log_det_ratio(self) -> Tensor: ...
    # A tensor, or `KronDecomposed` for `KronLaplace`.
    @property
    def posterior_precision(self) -> Any: ...
    def square_norm(self, value: Tensor) -> Tensor: ...
    def log_prob(self, value: Tensor, normalized: bool = True) -> Tensor: ...
    # Mean and variance for regression, probabilities otherwise.
    def __call__(
        self,
        x: Tensor | MutableMapping[str, Any],
        pred_type: str = "glm",
        joint: bool = False,
        link_approx: str = "probit",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
        fitting: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]: ...
    def functional_samples(
        self,
        x: Tensor | MutableMapping[str, Any],
        pred_type: str = "glm",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor: ...
    def predictive_samples(
        self,
        x: Tensor | MutableMapping[str, Any],
        pred_type: str = "glm",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor: ...
    def _glm_predictive_distribution(
        self,
        X: Tensor | MutableMapping[str, Any],
        joint: bool = False,
        diagonal_output: bool = False,
    ) -> tuple[Tensor, Tensor]: ...
    def _glm_functional_samples(
        self,
        f_mu: Tensor,
        f_var: Tensor,
        n_samples: int,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor: ...
    def _nn_functional_samples(
        self,
        X: Tensor | MutableMapping[str, Any],
        n_samples: int = 100,
        generator: torch.Generator | None = None,
    ) -> Tensor: ...
    def _nn_predictive_samples(
        self,
        X: Tensor | MutableMapping[str, Any],
        n_samples: int = 100,
        generator: torch.Generator | None = None,
    ) -> Tensor: ...
    def _nn_predictive_classification(
        self, X: Tensor | MutableMapping[str, Any], n_samples: int = 100
    ) -> Tensor: ...
    def functional_variance(self, Js: Tensor) -> Tensor: ...
    def functional_covariance(self, Js: Tensor) -> Tensor: ...
    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor: ...
    # Twelve more arguments follow, here by keyword.
    def optimize_prior_precision(
        self, pred_type: str = "glm", method: str = "marglik", **kwargs: Any
    ) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

class FullLaplace(ParametricLaplace):
    def _compute_scale(self) -> None: ...
    @property
    def posterior_scale(self) -> Tensor: ...
    @property
    def posterior_covariance(self) -> Tensor: ...
    @property
    def posterior_precision(self) -> Tensor: ...

class KronLaplace(ParametricLaplace):
    damping: bool
    H_facs: Any  # `Kron | None`; Any, so that subclasses may make it a property
    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | None = None,
        damping: bool = False,
        backend_kwargs: dict[str, Any] | None = None,
        asdl_fisher_kwargs: dict[str, Any] | None = None,
    ) -> None: ...
    @staticmethod
    def _rescale_factors(kron: Kron, factor: float) -> Kron: ...
    @property
    def posterior_precision(self) -> KronDecomposed: ...

class DiagLaplace(ParametricLaplace):
    @property
    def posterior_precision(self) -> Tensor: ...
    @property
    def posterior_scale(self) -> Tensor: ...
    @property
    def posterior_variance(self) -> Tensor: ...

class FunctionalLaplace(BaseLaplace):
    n_subset: int
    independent_outputs: bool
    seed: int
    def _build_Sigma_inv(self) -> None: ...
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
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | None = ...,
        backend_kwargs: dict[str, Any] | None = None,
        independent_outputs: bool = False,
        seed: int = 0,
    ) -> None: ...
    def fit(self, train_loader: DataLoader[Any], progress_bar: bool = False) -> None: ...
    def __call__(
        self,
        x: Tensor | MutableMapping[str, Any],
        pred_type: str = "gp",
        joint: bool = False,
        link_approx: str = "probit",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
        fitting: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]: ...
    def functional_variance(self, Js_star: Tensor) -> Tensor: ...
    def functional_covariance(self, Js_star: Tensor) -> Tensor: ...
    def _glm_predictive_distribution(
        self, X: Tensor | MutableMapping[str, Any], joint: bool = False
    ) -> tuple[Tensor, Tensor]: ...
    def _jacobians(
        self, X: Tensor | MutableMapping[str, Any], enable_backprop: bool | None = None
    ) -> tuple[Tensor, Tensor]: ...
    @property
    def log_det_ratio(self) -> Tensor: ...
    @property
    def scatter(self) -> Tensor: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...
