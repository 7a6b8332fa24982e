"""What a structure and a precision answer, whatever their shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from laplace_lora.curvature.engine import Engine
from laplace_lora.curvature.loss_gradient import LossGradient

Functions = Callable[[int, Tensor], Tensor]  # of a tensor, by its index, and its eigenvalues
Spectrum = list[tuple[Tensor, int]]
Sums = TypeVar("Sums")
Curvature = TypeVar("Curvature")
Raw = TypeVar("Raw")
Self = TypeVar("Self")


class Precision(Protocol):
    """A posterior precision ``P`` over all weights, and what predictions and evidence ask of it."""

    def covariance(self, jacobians: Iterable[Tensor]) -> Tensor:
        """Return ``J P⁻¹ Jᵀ``, ``(batch, outputs, outputs)``.

        Args:
            jacobians: Rows ``(batch, outputs, *shape)`` of each tensor, in parameter order.
        """
        ...

    def forms(
        self, jacobians: Iterable[Tensor], functions: Functions
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield tensors' parts of ``J f(H) Jᵀ`` for several functions ``f`` of the curvature.

        With ``f(e) = 1 / (e + δ)`` their sum is the covariance under a prior precision ``δ``.

        Args:
            jacobians: Of each tensor in turn, ``(batch, outputs, *shape)``.
            functions: From a tensor's index and eigenvalues, ``(K,)``, to the functions' values,
                ``(K, functions)``.

        Yields:
            Indices of tensors, and ``(batch, outputs, outputs, functions)``.
        """
        ...

    def spectra(self) -> list[Spectrum]:
        """Return each tensor's curvature eigenvalues, with how often each counts."""
        ...

    def root_multiply(self, noise: Tensor) -> Tensor:
        """Return ``L ε`` with ``L Lᵀ = P⁻¹`` for ``ε`` of shape ``(n, parameters)``."""
        ...

    def variance(self) -> Tensor:
        """Return the diagonal of ``P⁻¹``, ``(parameters,)``."""
        ...


class GradientTerm(Protocol):
    """What the evidence gains at weights that are no mode of the prior, ``½ bᵀ P⁻¹ b``."""

    def rise(self, prior: Tensor, scale: float | Tensor) -> Tensor:
        """Return ``½ bᵀ P⁻¹ b − ½ dᵀ D d``, a float64 scalar, or a lower bound of it.

        By so much the largest value of the quadratic log joint differs from the log likelihood at
        the weights, whose displacement ``d`` the prior ``D`` charges for. Where a strong prior
        meets large weights, either part alone is so large that its rounding is all there is.

        Args:
            prior: Prior precision, one or one per tensor; gradients flow through it.
            scale: Factor of loss and curvature in the log joint.
        """
        ...


class Structure(Protocol[Sums, Raw, Curvature]):
    """How curvature is held: summed up, then raw, then ready for a posterior.

    What has a value here is the answer of most.

    Attributes:
        adds_up: Whether processes combine their sums by addition; otherwise by gathering rows.
        couples_groups: Whether the data correlate tensors, so that groups cannot be tuned apart.
        sums_over_examples: Whether the curvature is the sum of the examples' own, each a whole
            matrix.
        scalar_only: Whether a prior is tuned as one scalar.
    """

    adds_up: bool = True
    couples_groups: bool = False
    sums_over_examples: bool = False
    scalar_only: bool = False

    @property
    def advice(self) -> str:
        """What to do if the curvature does not fit in memory."""
        ...

    @property
    def has_second_pass(self) -> bool:
        """Whether a fit iterates over the data once more, for the eigenvalues."""
        return False

    @property
    def fits_by_jacobians(self) -> bool:
        """Whether a fit puts together each tensor's Jacobian, as a prediction does."""
        return True

    def product(self, curvature: Curvature, rows: Tensor) -> Tensor:
        """Return the products of a curvature with weight vectors, ``(n, parameters)``."""
        ...

    def solve(self, curvature: Curvature, rows: Tensor, delta: float) -> Tensor:
        """Return ``(curvature + δ)⁻¹`` times weight vectors, ``(n, parameters)``."""
        ...

    def gradient_term(
        self, curvature: Curvature, gradient: Tensor, displacement: Tensor
    ) -> GradientTerm | None:
        """Return the evidence's gradient term, where it follows from the curvature itself.

        Args:
            curvature: Of the summed loss.
            gradient: Of the summed loss, ``(parameters,)``.
            displacement: Weights minus prior mean, ``(parameters,)``.

        Returns:
            The term; ``None`` where it takes passes over the data, see `Subspace`.
        """
        return None

    def bound(self: Self, engine: Engine) -> Self:
        """Return the structure for a model's tensors.

        Raises:
            ValueError: If an argument does not fit them.
        """
        ...

    def add(
        self,
        engine: Engine,
        sums: Sums | None,
        batch: tuple[Any, Tensor],
        gradient: LossGradient | None,
        expected: int | None,
    ) -> tuple[Tensor, Sums]:
        """Add a batch; return its loss and the sums.

        Args:
            engine: The model and its likelihood.
            sums: What earlier batches returned; ``None`` before the first.
            batch: What the model takes, and labels.
            gradient: Where the loss's gradient is added up, if it is wanted.
            expected: Examples of the whole data set, if known.
        """
        ...

    def tensors(self, sums: Sums) -> list[Tensor]:
        """Return the tensors that the sums consist of."""
        ...

    def finish(self, engine: Engine, sums: Sums, n: int) -> Raw:
        """Return the raw curvature of the summed loss over ``n`` examples."""
        ...

    def merge(self, raw: Raw, n: int, other: Raw, m: int) -> Raw:
        """Return the raw curvature of ``n`` examples together with that of ``m`` others."""
        ...

    def ready(self, engine: Engine, raw: Raw) -> Curvature:
        """Return a curvature that a posterior can use.

        Raises:
            FloatingPointError: If it is not finite.
        """
        ...

    def raw(self, curvature: Curvature) -> Raw:
        """Return the raw curvature of a posterior."""
        ...

    def precision(self, curvature: Curvature, prior: Tensor, scale: Tensor) -> Precision:
        """Return ``scale · curvature + prior``.

        Args:
            curvature: What `ready` returned.
            prior: Prior precision: one value, one per tensor or, where allowed, one per weight.
            scale: Factor of the curvature, a scalar.
        """
        ...

    def log_det_ratio(self, curvature: Curvature, prior: Tensor, scale: Tensor) -> Tensor:
        """Return ``log det P − log det P₀``, a float64 scalar; gradients flow through it."""
        ...

    def pack(self, curvature: Curvature, exact: bool = True) -> tuple[dict[str, Tensor], Any]:
        """Return a curvature as tensors, and a description that JSON can hold.

        Args:
            curvature: What `ready` returned.
            exact: Whether all numbers are kept. Otherwise large parts are rounded to float16, or
                left out where the others determine them up to rounding; `unpack` restores both.
        """
        ...

    def unpack(self, engine: Engine, tensors: Mapping[str, Tensor], description: Any) -> Curvature:
        """Return a packed curvature.

        Raises:
            ValueError: If tensors and description do not fit the model.
            KeyError: If a tensor is missing.
        """
        ...

    def unpack_device(self, device: torch.device) -> torch.device:
        """Return where packed tensors are unpacked."""
        return device

    def to(self, curvature: Curvature, device: torch.device) -> Curvature:
        """Return a curvature on another device."""
        ...

    def nbytes(self, engine: Engine, examples: int | None, columns: int) -> int:
        """Return the bytes of the device that a curvature takes.

        Args:
            engine: The model and its likelihood.
            examples: Examples of the fit, for structures that grow with them.
            columns: Rows per example.
        """
        ...

    def check_prior(self, length: int, n_layers: int, n_params: int) -> None:
        """Refuse a prior precision that the structure cannot have.

        Raises:
            ValueError: If the structure's eigenvectors do not allow so many precisions.
        """
        return

    def arguments(self) -> dict[str, Any]:
        """Return the posterior's constructor arguments that describe the structure."""
        return {}
