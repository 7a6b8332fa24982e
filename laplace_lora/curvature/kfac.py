"""K-FAC sums of linear maps, filled batch by batch from a tape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from laplace_lora.adapters.maps import Block
from laplace_lora.capture.tape import Tape
from laplace_lora.capture.whole_tensors import whole_gradients
from laplace_lora.curvature.kfac_rows import KfacRows
from laplace_lora.curvature.loss_gradient import LossGradient, ResidualColumns
from laplace_lora.linalg.factor_spec import FactorSpec
from laplace_lora.linalg.factors import DiagonalFactor, map_shared
from laplace_lora.linalg.half_rows import HalfRows
from laplace_lora.linalg.sketch import Factor, LowRankFactor


class KfacSums:
    """Sums over examples of every map's input and gradient covariance.

    *expand* adds ``(1/T_n) Σ_t a aᵀ`` and ``Σ_t g gᵀ`` for an example of ``T_n`` real tokens;
    *reduce* averages the inputs and sums the gradients over the tokens first. Both are plain sums
    over examples, whatever the batch size, the padding or the number of processes. Source: Martens
    and Grosse (2015), arXiv:1503.05671; Eschenhagen et al. (2023), arXiv:2311.00636.

    Args:
        inputs: Input covariance of each map; maps that receive the same tensor share one, and
            those with a diagonal block have none.
        grads: Gradient covariance of each map.
        rows: Which rows of inputs and gradients enter.
        device: Where the covariances come together; until then each sum is where its layer is.
    """

    def __init__(
        self,
        inputs: list[Factor | None],
        grads: list[Factor],
        rows: KfacRows,
        device: torch.device,
    ) -> None:
        self.inputs = inputs
        self.grads = grads
        self.rows = rows
        self.device = device
        self._half = HalfRows()

    @classmethod
    def empty(
        cls,
        tape: Tape,
        spec: FactorSpec,
        dtype: torch.dtype,
        rows: KfacRows,
        homogeneous: Sequence[bool] | None = None,
    ) -> KfacSums:
        """Return empty sums for the maps of a tape.

        Args:
            tape: A recorded forward pass; tells which maps receive the same input.
            spec: Which sides are low-rank.
            dtype: Dtype of the sums.
            rows: Which rows of inputs and gradients enter.
            homogeneous: For each map whether its inputs get a 1 appended, which makes its bias a
                column of its weight; ``None`` for no map.
        """
        homogeneous = homogeneous or [False] * len(tape.maps)
        owners: dict[tuple[int, bool], Factor] = {}
        inputs: list[Factor | None] = []
        grads: list[Factor] = []
        for i, linear in enumerate(tape.maps):
            if linear.is_diagonal:
                device = linear.parameters()[0][0].device
                grads.append(DiagonalFactor.zeros(linear.out_features, dtype, device))
                inputs.append(None)
                continue
            device, group = tape.inputs[i].device, tape.input_groups[i]
            grads.append(spec.empty(linear.out_features, dtype, device))
            key = (group, homogeneous[i])
            if key not in owners:
                d = linear.in_features + homogeneous[i]
                is_diagonal = rows.have_diagonal_sum(linear)
                empty = DiagonalFactor.zeros if is_diagonal else spec.empty
                owners[key] = empty(d, dtype, device)
            inputs.append(owners[key])
        return cls(inputs, grads, rows, tape.output.device)

    def update(
        self,
        tape: Tape,
        columns: Tensor,
        gradient: tuple[LossGradient, ResidualColumns, Sequence[Block]] | None = None,
    ) -> None:
        """Add a batch: its inputs once, its gradients for every column.

        Args:
            tape: The recorded forward pass; its graph is spent.
            columns: Roots of the output Hessian, ``(columns, batch, outputs)``.
            gradient: Where the loss's gradient is added up, the columns that bring it, which are
                sent backward in place of ``columns``, and the trainable tensors.

        Raises:
            RuntimeError: If maps that shared an input in earlier batches no longer do, or some
                no longer have the calls that Kronecker factors can express.
            FloatingPointError: If a sum is no longer finite; names the layer.
        """
        if [linear.is_diagonal for linear in tape.maps] != [x is None for x in self.inputs]:
            raise RuntimeError(
                "a layer's call pattern changed between batches; it now uses a diagonal block, so "
                "fit again"
            )
        owner: dict[int, int] = {}
        for i, factor in enumerate(self.inputs):
            if factor is None:
                continue
            first = owner.setdefault(id(factor), i)
            if tape.input_groups[first] != tape.input_groups[i]:
                raise RuntimeError(
                    f"layers {tape.maps[first].name!r} and {tape.maps[i].name!r} received the same "
                    "input in earlier batches but not in this one"
                )
            if first == i:
                self._add(factor, *self.rows.of_input(tape.inputs[i], tape.mask(i), factor))

        roots = len(columns)
        visits = []
        if gradient is not None:
            total, residual, blocks = gradient
            columns = residual.columns
            visits.append(total.visitor(tape, blocks, residual))

        def visit(column: int, i: int, grad: Tensor) -> None:
            if column < roots:
                self._add(self.grads[i], self.rows.of_grad(grad, tape.mask(i)))
            for also in visits:
                also(column, i, grad)

        tape.backward(columns, visit)
        seen: dict[int, int] = {}
        for i, rows in whole_gradients(tape, columns):
            self.grads[i].update(rows[:roots])
            if gradient is not None:
                n = seen[i] = seen.get(i, -1) + 1
                total.add_whole(blocks, i, rows, residual.weights[:, n])
        self._half.settle()
        self._check_finite(tape)

    def _add(self, factor: Factor, rows: Tensor, weight: float | Tensor = 1.0) -> None:
        if isinstance(factor, LowRankFactor):  # the others widen their rows in any case
            rows = self._half.narrowed(id(factor), rows)
        factor.update(rows, weight)

    def tensors(self) -> list[Tensor]:
        """Return the tensors that the sums consist of, shared ones once."""
        factors = {id(factor): factor for factor in [*self.inputs, *self.grads] if factor}.values()
        return [tensor for factor in factors for tensor in factor.tensors()]

    def covariances(self, n: int) -> list[tuple[Any, Factor]]:
        """Return each map's input covariance, divided by ``n``, and its gradient covariance."""
        inputs, device = [self.inputs], self.device
        means = map_shared(inputs, lambda factor: factor and (factor * (1 / n)).to(device))[0]
        return list(zip(means, [grad.to(device) for grad in self.grads], strict=True))

    def kfacs(
        self, blocks: Sequence[Block], transposed: Sequence[bool], n: int
    ) -> list[list[Factor]]:
        """Return the factors of each trainable tensor, in the order of its dimensions.

        Args:
            blocks: The trainable tensors, in parameter order.
            transposed: For each map whether its weight is stored as ``(in, out)``.
            n: Examples summed over; the second of two factors is divided by it, whichever it is.
        """
        covariances = self.covariances(n)
        turned = [i for i, is_turned in enumerate(transposed) if is_turned]
        # laplace-torch and `KronFactors.joined` take the second factor for the mean over the data.
        sums = map_shared([[self.inputs[i]] for i in turned], lambda x: x and x.to(self.device))
        weights = {
            i: [*total, covariances[i][1] * (1 / n)] for i, total in zip(turned, sums, strict=True)
        }
        result = []
        for block in blocks:
            mean, grad = covariances[block.map]
            weight = weights.get(block.map, [grad, mean])
            result.append([grad] if block.is_bias else weight)
        return result

    def _check_finite(self, tape: Tape) -> None:
        # In one sum, as a device waits for each answer; it may overflow where no factor does.
        witnesses = [factor.witness() for factor in {*self.inputs, *self.grads} if factor]
        if bool(get_total_norm(witnesses).isfinite()):
            return
        for linear, *factors in zip(tape.maps, self.inputs, self.grads, strict=True):
            if not all(f is None or f.trace.isfinite() for f in factors):
                raise FloatingPointError(f"the curvature of layer {linear.name!r} is not finite")
