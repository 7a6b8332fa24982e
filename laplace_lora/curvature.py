"""`LoraGGN` and `LoraEF`: laplace-torch curvature backends for the adapters of a model.

A backend answers laplace-torch's questions (factors, diagonal, dense matrix, Jacobians, gradients)
with what `kfac` and `jacobians` compute. Priors and predictions belong to `posterior`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from laplace.curvature import CurvatureInterface, EFInterface, GGNInterface
from laplace.utils import Kron
from torch import Tensor

from laplace_lora import likelihoods
from laplace_lora.adapters import trainable_maps
from laplace_lora.capture import Tape, record
from laplace_lora.decomposed import LowRankKronDecomposed
from laplace_lora.factors import DenseFactor, check_residual
from laplace_lora.jacobians import jacobian_blocks
from laplace_lora.kfac import KfacSums, Rows
from laplace_lora.kron import LowRankKron
from laplace_lora.maps import wide_dtype
from laplace_lora.peft_state import check_adapters


class LoraCurvature(CurvatureInterface):
    """What `LoraGGN` and `LoraEF` share; they differ in the columns they send backward.

    The model is taken in the mode it is in: put it in evaluation mode first, as ``fit`` does.

    Args:
        *args: Model, likelihood and the rest of laplace-torch's arguments.
        kfac_approx: ``"expand"`` or ``"reduce"``, see `KfacSums`.
        factor_rank: Eigenpairs of a low-rank side; ``None`` makes dense factors, a plain `Kron`.
        low_rank_threshold: Sides up to this length stay dense.
        residual: What a low-rank side puts for the directions it leaves out, see `LowRankKron`.
        **kwargs: laplace-torch's arguments.

    Raises:
        ValueError: If an argument is out of range, nothing is trainable, or a trainable tensor
            belongs to no linear map.
        RuntimeError: If an adapter is merged or disabled, or several are active.
    """

    def __init__(
        self,
        *args: Any,
        kfac_approx: str = "expand",
        factor_rank: int | None = None,
        low_rank_threshold: int = 512,
        residual: str = "isotropic",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_residual(residual)
        if factor_rank is not None and factor_rank < 1:
            raise ValueError(f"factor_rank must be positive or None, got {factor_rank}")
        self.rows = Rows(kfac_approx)
        self.factor_rank = factor_rank
        self.low_rank_threshold = low_rank_threshold
        self.residual = residual
        self.n_outputs = 0
        self.maps, self.blocks = trainable_maps(self._model)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of factors and Jacobians: the adapters', float32 at least."""
        return wide_dtype([block.parameter for block in self.blocks])

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
            ValueError: If labels lie outside the classes, or a subnetwork was asked for.
            FloatingPointError: If the loss or a factor is not finite; names the layer.
        """
        if self.subnetwork_indices is not None:
            raise ValueError("Kronecker factors cannot cover a subnetwork; use full or diag")
        loss, sums = self.accumulate(x, y)
        kron = self.assemble(sums, N)
        if self.factor_rank is not None:
            return loss, kron
        return loss, Kron([[f.matrix for f in F if isinstance(f, DenseFactor)] for F in kron.kfacs])

    def accumulate(
        self, x: Any, y: Tensor, sums: KfacSums | None = None
    ) -> tuple[Tensor, KfacSums]:
        """Add a batch to K-FAC sums in place; starts them if there are none.

        Args:
            x: Batch that the model takes.
            y: Labels ``(batch,)`` or regression targets ``(batch, outputs)``.
            sums: What earlier batches returned.

        Returns:
            The summed loss of the batch, and the sums.

        Raises:
            ValueError: If labels lie outside the classes.
            FloatingPointError: If the loss or a sum is not finite; names the layer.
        """
        tape, loss = self._forward(x, y)
        if sums is None:
            sums = KfacSums.empty(
                tape, self.factor_rank, self.low_rank_threshold, self.dtype, self.rows
            )
        sums.update(tape, self._columns(tape.output, y))
        return loss, sums

    def assemble(self, sums: KfacSums, n: int) -> LowRankKron:
        """Return the sums over ``n`` examples as a `LowRankKron` in parameter order."""
        transposed = [linear.transposed for linear in self.maps]
        return LowRankKron(sums.kfacs(self.blocks, transposed, n), self.residual)

    def diag(self, x: Any, y: Tensor, N: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the exact diagonal of the curvature.

        Args:
            x: Batch that the model takes.
            y: Labels ``(batch,)`` or regression targets ``(batch, outputs)``.
            N: laplace-torch passes it; a diagonal is a plain sum over examples.

        Returns:
            The summed loss and the diagonal, shape ``(parameters,)``.
        """
        loss, blocks = self._root_blocks(x, y)
        diagonal = torch.cat([rows.square().sum((0, 1)).flatten() for rows in blocks])
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
        loss, blocks = self._root_blocks(x, y)
        rows = self._joined(blocks).flatten(0, 1)
        return loss, rows.T @ rows

    def eigenbasis_diagonal(
        self, x: Any, y: Tensor, basis: LowRankKronDecomposed
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the diagonal of the exact curvature in a Kronecker eigenbasis.

        Correlations between the tokens of an example count, unlike in the factors. A Monte-Carlo
        Fisher draws labels anew, an empirical one uses the observed: the diagonal is then that of
        these matrices. Source: George et al. (2018), arXiv:1806.03884, Sec. 3.

        Args:
            x: Batch that the model takes.
            y: Labels ``(batch,)`` or regression targets ``(batch, outputs)``.
            basis: Eigenvectors of each trainable tensor's factors.

        Returns:
            The summed loss, and for each tensor ``Σ (uᵀ J v)²`` over examples and columns of the
            output Hessian's root, in the form of `LowRankKronDecomposed.table`.

        Raises:
            ValueError: If labels lie outside the classes.
            FloatingPointError: If the loss or a diagonal is not finite; names the tensor.
        """
        loss, blocks = self._root_blocks(x, y)
        diagonals = [basis.gram_diagonal(i, rows) for i, rows in enumerate(blocks)]
        totals = torch.stack([diagonal.sum().to(diagonals[0].device) for diagonal in diagonals])
        if not bool(totals.isfinite().all()):
            name = self.blocks[int((~totals.isfinite()).nonzero()[0])].name
            raise FloatingPointError(f"the eigenvalues of {name!r} are not finite")
        return loss, diagonals

    def jacobians(self, x: Any, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """Return Jacobians from one backward pass an output.

        Args:
            x: Batch that the model takes.
            enable_backprop: Whether gradients flow through the result; then laplace-torch's own
                `torch.func.jacrev` is used, at its price.

        Returns:
            Jacobians ``(batch, outputs, parameters)`` and outputs ``(batch, outputs)``.
        """
        if enable_backprop:
            return super().jacobians(x, enable_backprop=True)
        f, blocks = self.jacobian_blocks(x)
        return self._joined(blocks), f

    def selected_output_jacobians(
        self, x: Any, outputs: Tensor, enable_backprop: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return Jacobians of chosen outputs of each example, one backward pass a choice.

        Args:
            x: Batch that the model takes.
            outputs: Output indices, ``(batch,)`` or ``(batch, choices)``.
            enable_backprop: As in `jacobians`.

        Returns:
            Jacobians ``(batch, choices, parameters)`` and outputs ``(batch, outputs)``.
        """
        if enable_backprop:
            return super().selected_output_jacobians(x, outputs, enable_backprop=True)

        def columns(f: Tensor) -> Tensor:
            chosen = outputs.reshape(len(outputs), -1).to(f.device)
            return torch.nn.functional.one_hot(chosen, f.shape[-1]).transpose(0, 1).to(f.dtype)

        f, blocks = self.jacobian_blocks(x, columns)
        return self._joined(blocks), f

    def gradients(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return each example's gradient of laplace-torch's ``lossfunc``.

        Args:
            x: Batch that the model takes.
            y: Labels ``(batch,)`` or regression targets ``(batch, outputs)``.

        Returns:
            Gradients ``(batch, parameters)`` and the summed loss. For regression the loss is the
            squared error without its half, as laplace-torch defines it.
        """
        tape, loss = self._forward(x, y)
        columns = likelihoods.empirical_root(tape.output, y, self.likelihood) / self.factor
        rows = self._joined(jacobian_blocks(tape, self.blocks, columns, self.dtype))
        return rows[:, 0], loss / self.factor

    def jacobian_blocks(
        self, x: Any, columns: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Iterator[Tensor]]:
        """Return outputs, and Jacobians tensor by tensor.

        Args:
            x: Batch that the model takes.
            columns: From the outputs ``(batch, outputs)`` to the gradients sent backward,
                ``(columns, batch, outputs)``; one column an output when ``None``.

        Returns:
            Outputs ``(batch, outputs)``, and an iterator over ``(batch, columns, *shape)`` of each
            trainable tensor in parameter order.
        """
        check_adapters(self.model)
        tape = record(self.model, self.maps, x)
        f = tape.output
        roots = likelihoods.identity_root(f) if columns is None else columns(f)
        return f, jacobian_blocks(tape, self.blocks, roots, self.dtype)

    def _columns(self, f: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def _forward(self, x: Any, y: Tensor) -> tuple[Tape, Tensor]:
        check_adapters(self.model)
        tape = record(self.model, self.maps, x)
        loss = likelihoods.negative_log_likelihood(tape.output, y, self.likelihood)
        if not bool(loss.isfinite()):
            raise FloatingPointError(f"the loss is {loss.item()}")
        self.n_outputs = tape.output.shape[-1]
        return tape, loss

    def _root_blocks(self, x: Any, y: Tensor) -> tuple[Tensor, Iterator[Tensor]]:
        tape, loss = self._forward(x, y)
        columns = self._columns(tape.output, y)
        return loss, jacobian_blocks(tape, self.blocks, columns, self.dtype)

    def _joined(self, blocks: Iterator[Tensor]) -> Tensor:
        return self._subnetwork(torch.cat([block.flatten(2) for block in blocks], dim=-1))

    def _subnetwork(self, values: Tensor) -> Tensor:
        indices = self.subnetwork_indices
        return values if indices is None else values[..., indices.to(values.device)]


class LoraGGN(LoraCurvature, GGNInterface):
    """Generalised Gauss-Newton curvature, exact in the outputs from ``C − 1`` backward passes.

    Args:
        *args: Model, likelihood and the rest of laplace-torch's `GGNInterface` arguments, among
            them ``stochastic`` (Monte-Carlo Fisher) and ``num_samples`` (its labels an example).
        **kwargs: The same by name, and those of `LoraCurvature`.
    """

    def _columns(self, f: Tensor, y: Tensor) -> Tensor:
        if self.stochastic:
            return likelihoods.sampled_root(f, self.likelihood, self.num_samples)
        return likelihoods.hessian_root(f, self.likelihood)


class LoraEF(LoraCurvature, EFInterface):
    """Empirical Fisher curvature: outer products of the gradients at the observed labels.

    For regression these are gradients of ``½‖f − y‖²``; laplace-torch's own empirical Fisher is
    twice as large there.
    """

    def _columns(self, f: Tensor, y: Tensor) -> Tensor:
        return likelihoods.empirical_root(f, y, self.likelihood)
