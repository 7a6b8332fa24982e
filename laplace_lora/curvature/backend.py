"""`LoraCurvature`: what a laplace-torch curvature backend for adapters is, but for its columns.

It answers laplace-torch's questions for curvature, Jacobians and gradients with what its `Engine`
computes.
"""

from __future__ import annotations

from typing import Any

import torch
from laplace.curvature import CurvatureInterface, GGNInterface
from laplace.utils import Kron
from torch import Tensor, nn

from laplace_lora.adapters.maps import Block, LinearMap
from laplace_lora.adapters.selection import is_trained
from laplace_lora.capture.jacobians import jacobian_blocks, side_by_side
from laplace_lora.curvature import batch_curvature
from laplace_lora.curvature.engine import Engine
from laplace_lora.curvature.kfac_rows import KfacRows
from laplace_lora.curvature.kron_protocol import plain_kron
from laplace_lora.likelihoods.registry import likelihood_of
from laplace_lora.linalg.factor_spec import FactorSpec
from laplace_lora.models.last_layer_model import LastLayerModel


class LoraCurvature(CurvatureInterface):
    """What `LoraGGN` and `LoraEF` share; they differ in the columns they send backward.

    The model is taken in the mode it is in: put it in evaluation mode first, as ``fit`` does.

    Args:
        model: Model from a batch to outputs.
        likelihood: As of `LoraLaplace`; those of tokens and of spans with a model of these.
        *args: The rest of laplace-torch's arguments.
        kfac_approx: ``"expand"`` or ``"reduce"``, see `KfacSums`.
        factor_rank: Eigenpairs of a low-rank side; ``None`` makes dense factors, a plain `Kron`.
        low_rank_threshold: Sides up to this length stay dense.
        residual: What stands for the directions that a low-rank side leaves out, see `FactorSpec`.
        uncovered: ``"error"`` or ``"diag"``, see `Engine`.
        verify: Verify the first batch of a fit, see `capture.verification`.
        **kwargs: laplace-torch's arguments.

    Attributes:
        engine: Where the work is done.

    Raises:
        ValueError: If an argument is out of range, nothing is trainable, a trainable tensor is in
            no linear map and ``uncovered="error"``, or see `_check_last_layer`.
        RuntimeError: If an adapter is merged or disabled, or several are active.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        *args: Any,
        kfac_approx: str = "expand",
        factor_rank: int | None = None,
        low_rank_threshold: int = 512,
        residual: str = "isotropic",
        uncovered: str = "error",
        verify: bool = True,
        **kwargs: Any,
    ) -> None:
        self.spec = FactorSpec(factor_rank, low_rank_threshold, residual)
        rows = KfacRows(kfac_approx)
        self.objective = likelihood_of(likelihood)
        super().__init__(model, self.objective.laplace_name, *args, **kwargs)
        self.likelihood = likelihood
        self.params = list(filter(is_trained, self.params))
        self.params_dict = {name: p for name, p in self.params_dict.items() if is_trained(p)}
        trained: Any = model.last_layer if self.last_layer else model
        if self.last_layer:
            split = getattr(model, "model", None)
            if isinstance(split, LastLayerModel):
                split.share_head()
            else:
                _check_last_layer(model)
        stochastic = getattr(self, "stochastic", False)
        estimates = stochastic or not isinstance(self, GGNInterface)
        options = (uncovered, trained, verify, stochastic, estimates)
        self.engine = Engine(model, self.objective, self.columns, rows, *options)

    @property
    def maps(self) -> list[LinearMap]:
        """Trainable linear maps, see `Engine`."""
        return self.engine.maps

    @property
    def blocks(self) -> list[Block]:
        """Trainable tensors in parameter order, see `Engine`."""
        return self.engine.blocks

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of factors and Jacobians: the adapters', float32 at least."""
        return self.engine.dtype

    def columns(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the columns sent backward for a batch's outputs, ``(columns, batch, outputs)``."""
        raise NotImplementedError

    def kron(self, x: Any, y: Tensor, N: int) -> tuple[Tensor, Kron]:
        """Return the K-FAC factors of a batch, see `KfacSums`.

        Args:
            x: Batch that the model takes.
            y: Labels ``(batch,)`` or regression targets ``(batch, outputs)``.
            N: Examples in the whole data set; divides the input covariances.

        Returns:
            The summed loss, and a `Kron` if ``factor_rank`` is ``None``, else a `LowRankKron`:
            ``[grad_cov, input_cov]`` for each weight, ``[grad_cov]`` for each bias.

        Raises:
            ValueError: If labels lie outside the classes, a subnetwork was asked for, or a plain
                `Kron` would have to hold the diagonal block of a matrix or of a long vector.
            FloatingPointError: If the loss or a factor is not finite; names the layer.
        """
        if self.subnetwork_indices is not None:
            raise ValueError("Kronecker factors cannot cover a subnetwork; use full or diag")
        loss, sums = batch_curvature.add_factors(self.engine, x, y, self.spec)
        kron = batch_curvature.assembled(self.engine, sums, N, self.spec.residual)
        if self.spec.rank is not None:
            return loss, kron
        return loss, plain_kron(kron, self.maps, self.blocks)

    def diag(self, x: Any, y: Tensor, N: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the exact diagonal of the curvature.

        Args:
            x: Batch that the model takes.
            y: Labels ``(batch,)`` or regression targets ``(batch, outputs)``.
            N: laplace-torch passes it; a diagonal is a plain sum over examples.

        Returns:
            The summed loss and the diagonal, shape ``(parameters,)``.
        """
        loss, diagonal = batch_curvature.diagonal(self.engine, x, y)
        return loss, self._subnetwork(diagonal)

    def full(self, x: Any, y: Tensor, N: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the exact dense curvature.

        Args:
            x: Batch that the model takes.
            y: Labels ``(batch,)`` or regression targets ``(batch, outputs)``.
            N: laplace-torch passes it; a dense matrix is a plain sum over examples.

        Returns:
            The summed loss and the matrix, shape ``(parameters, parameters)``.
        """
        loss, rows = batch_curvature.rows(self.engine, x, y)
        rows = self._subnetwork(rows)
        return loss, rows.T @ rows

    def jacobians(self, x: Any, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """Return Jacobians from one backward pass per output.

        Args:
            x: Batch that the model takes.
            enable_backprop: Whether gradients flow through the result, at the price of
                `torch.func.jacrev`.

        Returns:
            Jacobians ``(batch, outputs, parameters)`` and outputs ``(batch, outputs)``.
        """
        if enable_backprop:
            f, jacobians = self.engine.differentiable_jacobians(x)
            return self._subnetwork(jacobians), f
        f, blocks = self.engine.jacobian_blocks(x)
        return self._subnetwork(side_by_side(blocks)), f

    def selected_output_jacobians(
        self, x: Any, outputs: Tensor, enable_backprop: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return Jacobians of chosen outputs of each example, one backward pass per choice.

        Args:
            x: Batch that the model takes.
            outputs: Output indices, ``(batch,)`` or ``(batch, choices)``.
            enable_backprop: As in `jacobians`.

        Returns:
            Jacobians ``(batch, choices, parameters)`` and outputs ``(batch, outputs)``.
        """
        self.engine.check_outputs_few()
        if enable_backprop:
            return super().selected_output_jacobians(x, outputs, enable_backprop=True)

        def columns(f: Tensor) -> Tensor:
            chosen = outputs.reshape(len(outputs), -1).to(f.device)
            return torch.nn.functional.one_hot(chosen, f.shape[-1]).transpose(0, 1).to(f.dtype)

        f, blocks = self.engine.jacobian_blocks(x, columns)
        return self._subnetwork(side_by_side(blocks)), f

    def gradients(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return each example's gradient of laplace-torch's ``lossfunc``.

        Args:
            x: Batch that the model takes.
            y: Labels ``(batch,)`` or regression targets ``(batch, outputs)``.

        Returns:
            Gradients ``(batch, parameters)`` and the summed loss. For regression the loss is the
            squared error without its half, as laplace-torch defines it.
        """
        tape, loss = self.engine.forward(x, y)
        columns = self.objective.residual(tape.output, y) / self.factor
        rows = side_by_side(jacobian_blocks(tape, self.blocks, columns, self.dtype))
        return self._subnetwork(rows)[:, 0], loss / self.factor

    def _subnetwork(self, values: Tensor) -> Tensor:
        indices = self.subnetwork_indices
        return values if indices is None else values[..., indices.to(values.device)]


def _check_last_layer(model: Any) -> None:
    """Refuse a last layer that laplace-torch's last-layer classes would fit and fail to predict by.

    Args:
        model: laplace-torch's `FeatureExtractor` around a model that is no `LastLayerModel`. What
            its last layer sees is known once it has run, as it has in a fit.

    Raises:
        ValueError: If the last layer is frozen, or sees more than one vector per example.
    """
    head, name = model.last_layer, getattr(model, "_last_layer_name", None)
    if head is None:  # not found yet
        return
    seen = getattr(model, "_features", {}).get(name)
    is_reduced = getattr(model, "feature_reduction", None) is not None
    if not any(is_trained(parameter) for parameter in head.parameters()):
        fault = "is frozen"
    elif seen is not None and seen.ndim != 2 and not is_reduced:
        fault = f"sees an input of shape {tuple(seen.shape)}, not one vector per example"
    else:
        return
    raise ValueError(
        f"the last layer that laplace-torch found, {name!r}, {fault}; wrap the model in a "
        "LastLayerModel (of laplace_lora.models.last_layer_model), or use "
        "subset_of_weights='lora_last_layer', or 'lora' for the adapter's weights"
    )
