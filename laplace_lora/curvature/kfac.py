"""K-FAC sums of linear maps, filled batch by batch from a tape.

Which rows of a captured tensor enter a covariance, and with what weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import get_total_norm

from laplace_lora.adapters.maps import Block
from laplace_lora.capture.tape import Tape
from laplace_lora.capture.whole_tensors import whole_gradients
from laplace_lora.curvature.loss_gradient import LossGradient, ResidualColumns
from laplace_lora.data.masks import real_rows
from laplace_lora.linalg.factors import DiagonalFactor, map_shared
from laplace_lora.linalg.half_rows import HalfRows
from laplace_lora.linalg.sketch import Factor, FactorSpec, LowRankFactor

APPROXIMATIONS = ("expand", "reduce")
POSITIONS = ("all", "last")


@dataclass(frozen=True)
class Rows:
    """Which rows of a map's inputs and output gradients enter its covariances.

    Attributes:
        approximation: ``"expand"`` or ``"reduce"``, see `KfacSums`.
        positions: ``"all"`` real tokens, or the ``"last"`` one of each example alone.

    Raises:
        ValueError: If either is unknown.
    """

    approximation: str = "expand"
    positions: str = "all"

    def __post_init__(self) -> None:
        if self.approximation not in APPROXIMATIONS:
            raise ValueError(
                f"kfac_approx must be one of {APPROXIMATIONS}, got {self.approximation!r}"
            )
        if self.positions not in POSITIONS:
            raise ValueError(f"positions must be one of {POSITIONS}, got {self.positions!r}")

    def of_input(
        self, x: Tensor, mask: Tensor | None, factor: Factor
    ) -> tuple[Tensor, float | Tensor]:
        """Return the rows of an input, and the weight of their outer products, or one for each.

        Args:
            x: Input, ``(batch, tokens, q)`` or ``(batch, q)``.
            mask: Real tokens, ``(batch, tokens)``; ``None`` if all are.
            factor: Where they go: gives the dtype, and is one longer than ``q`` if a 1 is
                to be appended to each input.
        """
        if factor.d == x.shape[-1] + 1:
            x = F.pad(x, (0, 1), value=1.0)
        if x.ndim == 2:
            return x, 1.0
        mask = self._seen(x, mask)
        if self.approximation == "reduce":
            means = _real_tokens(x.to(factor.dtype), mask).sum(1) / _counts(x, mask, factor.dtype)
            return means, 1.0
        if mask is None:
            return x.flatten(0, 1), 1 / x.shape[1]
        weights = _counts(x, mask, factor.dtype).reciprocal().expand(mask.shape)
        return real_rows(x, mask), real_rows(weights, mask)

    def of_grad(self, grad: Tensor, mask: Tensor | None) -> Tensor:
        """Return the rows of an output gradient, ``(batch, tokens, p)`` or ``(batch, p)``."""
        if grad.ndim == 2:
            return grad
        mask = self._seen(grad, mask)
        if self.approximation == "reduce":
            return _real_tokens(grad, mask).sum(1)
        return grad.flatten(0, 1) if mask is None else real_rows(grad, mask)

    def _seen(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        if self.positions == "all":
            return mask
        tokens = torch.arange(x.shape[1], device=x.device)
        last = tokens[-1:] if mask is None else (tokens * mask).argmax(-1)
        return (tokens == last.unsqueeze(-1)).expand(x.shape[:2])


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
        rows: Rows,
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
        rows: Rows,
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
                owners[key] = spec.empty(d, dtype, device)
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
            n: Examples summed over; the input covariances are divided by it.
        """
        covariances = self.covariances(n)
        result = []
        for block in blocks:
            mean, grad = covariances[block.map]
            weight = [mean, grad] if transposed[block.map] else [grad, mean]
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


def _real_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``x`` with padding replaced by zeros, whatever stood there."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)


def _counts(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the number of real tokens of each example, ``(batch, 1)``."""
    if mask is None:
        return torch.full((x.shape[0], 1), x.shape[1], dtype=dtype, device=x.device)
    return mask.sum(1, keepdim=True).clamp(min=1).to(dtype)
