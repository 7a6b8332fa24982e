"""K-FAC sums of linear maps, filled batch by batch from a tape.

Which rows of a captured tensor enter a covariance, and with what weight. Sketching the rows belongs
to `factors`, algebra over a whole model to `kron`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from laplace_lora.adapters import Block
from laplace_lora.capture import Tape
from laplace_lora.factors import map_shared
from laplace_lora.sketch import Factor, empty_factor

APPROXIMATIONS = ("expand", "reduce")


class KfacSums:
    """Sums over examples of every map's input and gradient covariance.

    *expand* adds ``(1/T_n) Σ_t a aᵀ`` and ``Σ_t g gᵀ`` for an example of ``T_n`` real tokens;
    *reduce* averages the inputs and sums the gradients over the tokens first. Both are plain sums
    over examples, whatever the batch size, the padding or the number of processes. Source: Martens
    and Grosse (2015), arXiv:1503.05671; Eschenhagen et al. (2023), arXiv:2311.00636.

    Args:
        inputs: Input covariance of each map; maps that receive the same tensor share one.
        grads: Gradient covariance of each map.
        approximation: ``"expand"`` or ``"reduce"``.

    Raises:
        ValueError: If the approximation is neither.
    """

    def __init__(
        self, inputs: list[Factor], grads: list[Factor], approximation: str = "expand"
    ) -> None:
        if approximation not in APPROXIMATIONS:
            raise ValueError(f"kfac_approx must be one of {APPROXIMATIONS}, got {approximation!r}")
        self.inputs = inputs
        self.grads = grads
        self.approximation = approximation

    @classmethod
    def empty(
        cls,
        tape: Tape,
        rank: int | None,
        threshold: int,
        dtype: torch.dtype,
        approximation: str = "expand",
    ) -> KfacSums:
        """Return empty sums for the maps of a tape.

        Args:
            tape: A recorded forward pass; tells which maps receive the same input.
            rank: Eigenpairs of a low-rank side, ``None`` for dense sides.
            threshold: Sides up to this length stay dense.
            dtype: Number format of the sums.
            approximation: ``"expand"`` or ``"reduce"``.
        """
        inputs: list[Factor] = []
        grads: list[Factor] = []
        for i, (linear, group) in enumerate(zip(tape.maps, tape.input_groups, strict=True)):
            device = tape.inputs[i].device
            grads.append(empty_factor(linear.out_features, rank, threshold, dtype, device))
            inputs.append(
                empty_factor(linear.in_features, rank, threshold, dtype, device)
                if group == i
                else inputs[group]
            )
        return cls(inputs, grads, approximation)

    def update(self, tape: Tape, columns: Tensor) -> None:
        """Add a batch: its inputs once, its gradients for every column.

        Args:
            tape: The recorded forward pass; its graph is spent.
            columns: Roots of the output Hessian, ``(columns, batch, outputs)``.

        Raises:
            RuntimeError: If maps that shared an input in earlier batches no longer do.
            FloatingPointError: If a sum is no longer finite; names the layer.
        """
        owner: dict[int, int] = {}
        for i, factor in enumerate(self.inputs):
            group = owner.setdefault(id(factor), tape.input_groups[i])
            if group != tape.input_groups[i]:
                raise RuntimeError(
                    f"layers {tape.maps[group].name!r} and {tape.maps[i].name!r} received the same "
                    "input in earlier batches but not in this one"
                )
            if group == i:
                factor.update(*self._input_rows(tape.inputs[i], tape.masks[i], factor.dtype))

        def visit(column: int, i: int, grad: Tensor) -> None:
            self.grads[i].update(self._grad_rows(grad, tape.masks[i]))

        tape.backward(columns, visit)
        self._check_finite(tape)

    def kfacs(
        self, blocks: Sequence[Block], transposed: Sequence[bool], n: int
    ) -> list[list[Factor]]:
        """Return the factors of each trainable tensor, in the order of its dimensions.

        Args:
            blocks: The trainable tensors, in parameter order.
            transposed: For each map whether its weight is stored as ``(in, out)``.
            n: Examples summed over; the input covariances are divided by it.
        """
        means = map_shared([self.inputs], lambda factor: factor * (1 / n))[0]
        result = []
        for block in blocks:
            grad, mean = self.grads[block.map], means[block.map]
            weight = [mean, grad] if transposed[block.map] else [grad, mean]
            result.append([grad] if block.is_bias else weight)
        return result

    def _input_rows(
        self, x: Tensor, mask: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, float]:
        """Return rows and the weight of their outer products."""
        if x.ndim == 2:
            return x, 1.0
        if self.approximation == "reduce":
            return _real_tokens(x.to(dtype), mask).sum(1) / _counts(x, mask).to(dtype), 1.0
        if mask is None:
            return x.flatten(0, 1), 1 / x.shape[1]
        weights = _counts(x, mask).to(dtype).rsqrt().expand(mask.shape)
        return x[mask].to(dtype) * weights[mask].unsqueeze(-1), 1.0

    def _grad_rows(self, grad: Tensor, mask: Tensor | None) -> Tensor:
        if grad.ndim == 2:
            return grad
        if self.approximation == "reduce":
            return _real_tokens(grad, mask).sum(1)
        return grad.flatten(0, 1) if mask is None else grad[mask]

    def _check_finite(self, tape: Tape) -> None:
        sums = [(linear.name, f) for linear, f in zip(tape.maps, self.inputs, strict=True)]
        sums += [(linear.name, f) for linear, f in zip(tape.maps, self.grads, strict=True)]
        device = sums[0][1].trace.device
        traces = torch.stack([factor.trace.double().to(device) for _, factor in sums])
        if not bool(traces.isfinite().all()):
            name = next(name for name, factor in sums if not factor.trace.isfinite())
            raise FloatingPointError(f"the curvature of layer {name!r} is not finite")


def _real_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``x`` with padding replaced by zeros, whatever stood there."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)


def _counts(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the number of real tokens of each example, ``(batch, 1)``."""
    if mask is None:
        return x.new_full((x.shape[0], 1), x.shape[1], dtype=torch.long)
    return mask.sum(1, keepdim=True).clamp(min=1)
