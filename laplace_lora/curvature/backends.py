"""`LoraGGN` and `LoraEF`: laplace-torch curvature backends for the adapters of a model.

A backend answers laplace-torch's questions for curvature (factors, diagonal, dense matrix) with
what `kfac` and `jacobians` compute; Jacobians and gradients themselves belong to
`differentiation`, priors to `posterior`, predictions to `predictive`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from laplace.curvature import EFInterface, GGNInterface
from laplace.utils import Kron
from torch import Tensor, nn

from laplace_lora.capture.jacobians import jacobian_blocks
from laplace_lora.curvature.engine import Differentiation
from laplace_lora.curvature.kfac import KfacSums, Rows
from laplace_lora.likelihoods import roots as likelihoods
from laplace_lora.linalg.factors import check_residual
from laplace_lora.linalg.kron import LowRankKron
from laplace_lora.linalg.kron_eigen import LowRankKronDecomposed
from laplace_lora.linalg.sketch import LowRankFactor

LONGEST_PLAIN = 8192  # entries of a vector whose diagonal block a plain Kron holds as a matrix


class LoraCurvature(Differentiation):
    """What `LoraGGN` and `LoraEF` share; they differ in the columns they send backward.

    Args:
        model: Model from a batch to outputs.
        likelihood: As of `Differentiation`.
        *args: The rest of laplace-torch's arguments.
        kfac_approx: ``"expand"`` or ``"reduce"``, see `KfacSums`.
        factor_rank: Eigenpairs of a low-rank side; ``None`` makes dense factors, a plain `Kron`.
        low_rank_threshold: Sides up to this length stay dense.
        residual: What a low-rank side puts for the directions it leaves out, see `LowRankKron`.
        **kwargs: laplace-torch's arguments, and those of `Differentiation`.

    Raises:
        ValueError: If an argument is out of range, or as `Differentiation` says.
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
        **kwargs: Any,
    ) -> None:
        check_residual(residual)
        if factor_rank is not None and factor_rank < 1:
            raise ValueError(f"factor_rank must be positive or None, got {factor_rank}")
        self.rows = Rows(kfac_approx)
        self.factor_rank = factor_rank
        self.low_rank_threshold = low_rank_threshold
        self.residual = residual
        super().__init__(model, likelihood, *args, **kwargs)

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
        loss, sums = self.accumulate(x, y)
        kron = self.assemble(sums, N)
        if self.factor_rank is not None:
            return loss, kron
        self._check_plain()
        dense = [[f.matrix for f in F if not isinstance(f, LowRankFactor)] for F in kron.kfacs]
        return loss, Kron(dense)

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
        loss, blocks = self.root_blocks(x, y)
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
        loss, blocks = self.root_blocks(x, y)
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
        loss, blocks = self.root_blocks(x, y)
        diagonals = [basis.gram_diagonal(i, rows) for i, rows in enumerate(blocks)]
        totals = torch.stack([diagonal.sum().to(diagonals[0].device) for diagonal in diagonals])
        if not bool(totals.isfinite().all()):
            name = self.blocks[int((~totals.isfinite()).nonzero()[0])].name
            raise FloatingPointError(f"the eigenvalues of {name!r} are not finite")
        return loss, diagonals

    def root_blocks(self, x: Any, y: Tensor) -> tuple[Tensor, Iterator[Tensor]]:
        """Return the summed loss, and rows ``Z`` whose ``Zᵀ Z`` is the curvature, by tensor.

        Args:
            x: Batch that the model takes.
            y: Labels ``(batch,)`` or regression targets ``(batch, outputs)``.

        Returns:
            The loss, and an iterator over ``(batch, columns, *shape)`` of each trainable tensor in
            parameter order.

        Raises:
            ValueError: If labels lie outside the classes.
            FloatingPointError: If the loss is not finite.
        """
        tape, loss = self._forward(x, y)
        columns = self._columns(tape.output, y)
        return loss, jacobian_blocks(tape, self.blocks, columns, self.dtype)

    def _columns(self, f: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def _check_plain(self) -> None:
        for block in self.blocks:
            p = block.parameter
            if self.maps[block.map].is_diagonal and (p.ndim != 1 or len(p) > LONGEST_PLAIN):
                raise ValueError(
                    f"a plain Kron cannot hold the diagonal block of {block.name!r}, of shape "
                    f"{tuple(p.shape)}; use KronLoraLaplace, give `factor_rank`, or freeze it"
                )


class LoraGGN(LoraCurvature, GGNInterface):
    """Generalised Gauss-Newton curvature, exact in the outputs from ``C − 1`` backward passes.

    Args:
        model: Model from a batch to outputs.
        likelihood: As of `LoraCurvature`.
        *args: The rest of laplace-torch's `GGNInterface` arguments.
        stochastic: Monte-Carlo Fisher, from one backward pass a label drawn; ``num_samples`` says
            how many are drawn for an example, or for each token of a language model. ``None`` is
            true for language models and false for all others.
        **kwargs: The arguments by name, and those of `LoraCurvature`.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        *args: Any,
        stochastic: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if stochastic is None:
            stochastic = likelihood == likelihoods.LANGUAGE_MODELING
        super().__init__(model, likelihood, *args, stochastic=stochastic, **kwargs)

    def _columns(self, f: Tensor, y: Tensor) -> Tensor:
        if self.stochastic:
            return likelihoods.sampled_root(f, self.likelihood, self.num_samples)
        if self.likelihood == likelihoods.LANGUAGE_MODELING:
            return likelihoods.token_root(f, y)
        return likelihoods.hessian_root(f, self.likelihood)


class LoraEF(LoraCurvature, EFInterface):
    """Empirical Fisher curvature: outer products of the gradients at the observed labels.

    For regression these are gradients of ``½‖f − y‖²``; laplace-torch's own empirical Fisher is
    twice as large there.
    """

    def _columns(self, f: Tensor, y: Tensor) -> Tensor:
        return likelihoods.empirical_root(f, y, self.likelihood)
