"""The gradient of the summed loss, collected in the passes that collect the curvature.

Where the loss's derivative lies in the span of the columns that are sent backward anyway, as for
every exact root of a softmax's or a Gaussian's output Hessian, the gradient is a weighted sum of
what these columns bring: no further backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from laplace_lora.adapters.maps import Block
from laplace_lora.capture.jacobians import summed_gradient
from laplace_lora.capture.tape import Tape, Visitor

LARGEST = 1e3  # weight; the column it multiplies is as small, and half precision has it no better


class LossGradient:
    """Sum of the loss's gradient over batches.

    Args:
        sizes: Numbers in each trainable tensor.
        dtype: Dtype of the sum.
        device: Where it is kept.

    Attributes:
        total: The gradient, ``(parameters,)``.
    """

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.total = torch.zeros(sum(sizes), dtype=dtype, device=device)
        self._parts = self.total.split(list(sizes))

    def tapped(self, blocks: Iterator[Tensor], columns: ResidualColumns) -> Iterator[Tensor]:
        """Add up what blocks say of the gradient, and yield their part of the curvature's root.

        Args:
            blocks: ``columnsᵀ J`` of each tensor in turn, ``(batch, columns, *shape)``.
            columns: The columns sent backward.
        """
        for i, block in enumerate(blocks):
            weights = columns.weights.to(block)
            self._add(i, torch.einsum("kn,nk...->...", weights, block))
            yield block[:, : columns.roots]

    def visitor(self, tape: Tape, blocks: Sequence[Block], columns: ResidualColumns) -> Visitor:
        """Return what a tape's backward pass is to call.

        Args:
            tape: The recorded forward pass.
            blocks: The trainable tensors, in parameter order.
            columns: The columns sent backward.
        """
        by_map: dict[int, list[tuple[int, Block]]] = {}
        for i, block in enumerate(blocks):
            by_map.setdefault(block.map, []).append((i, block))
        dtype = self.total.dtype

        def visit(column: int, m: int, grad: Tensor) -> None:
            weights = columns.weights[column].to(grad.device, dtype)
            grad = grad.to(dtype) * weights.view(-1, *[1] * (grad.ndim - 1))
            for i, block in by_map.get(m, ()):
                self._add(i, summed_gradient(tape.maps[m], block, tape.inputs[m], grad))

        return visit

    def add_whole(self, blocks: Sequence[Block], m: int, rows: Tensor, weights: Tensor) -> None:
        """Add one example's gradients of a tensor that no map covers.

        Args:
            blocks: The trainable tensors, in parameter order.
            m: Index of its map.
            rows: ``columnsᵀ J``, ``(columns, entries)``.
            weights: The example's weights, ``(columns,)``.
        """
        index = next(i for i, block in enumerate(blocks) if block.map == m)
        self._add(index, weights.to(rows) @ rows)

    def _add(self, i: int, part: Tensor) -> None:
        self._parts[i].add_(part.reshape(-1).to(self._parts[i]))


class ResidualColumns:
    """Columns of the output Hessian's root, and how the loss's derivative follows from them.

    Args:
        root: Columns of the root, ``(roots, rows, outputs)``.
        residual: Derivative of the loss, ``(1, rows, outputs)``.
        weights: Candidates ``w``, ``(roots, rows)``, for ``residual = Σ_k w_k root_k``; ``None`` if
            there are none. They are checked, and so is whether the root is the residual itself, as
            the empirical Fisher's is. Where neither holds, or rows are not examples, the residual
            is sent backward as one more column.
        examples: Number of examples.

    Attributes:
        columns: What is sent backward, ``(columns, rows, outputs)``.
        weights: ``(columns, examples)``.
        roots: How many of the columns, the first ones, belong to the root.
    """

    def __init__(
        self, root: Tensor, residual: Tensor, weights: Tensor | None, examples: int
    ) -> None:
        self.roots = len(root)
        ones = residual.new_ones(root.shape[:2]) if len(root) == 1 else None
        for candidate in (weights, ones) if root.shape[1] == examples else ():
            if candidate is not None and _spans(root, candidate, residual):
                self.columns, self.weights = root, candidate
                return
        self.columns = torch.cat([root, residual.to(root)])
        self.weights = residual.new_zeros(len(self.columns), examples)
        self.weights[-1] = 1


def _spans(root: Tensor, weights: Tensor, residual: Tensor) -> bool:
    if not bool(weights.abs().max() <= LARGEST):
        return False
    combined = torch.einsum("kn,knc->nc", weights, root.to(weights))
    scale = residual.abs().max().clamp(min=1e-30)
    return bool((combined - residual[0].to(weights)).abs().max() <= 1e-4 * scale)
