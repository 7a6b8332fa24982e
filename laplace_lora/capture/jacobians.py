"""Jacobians of a recorded forward pass, one trainable tensor at a time.

Not by `torch.func.jacrev`, which runs a backward pass for every example and output, and never for
all parameters at once: only the maps' output gradients are held in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from laplace_lora.adapters.maps import Block, LinearMap
from laplace_lora.capture.tape import Tape
from laplace_lora.capture.whole_tensors import whole_gradients


def jacobian_blocks(
    tape: Tape, blocks: Sequence[Block], columns: Tensor, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Yield ``columnsᵀ J`` for each trainable tensor in turn.

    Runs all backward passes first; examples are independent, so one pass serves the whole batch.
    Of each map it keeps the smaller of its token gradients ``(tokens, p)`` and its Jacobian
    ``(p, q)``: for ``lora_A`` the first, for ``lora_B`` the second. A block is assembled in its
    turn, and no reference to it is kept. The gradients of whole tensors are all kept, ``(batch,
    columns, entries)``.

    Args:
        tape: The recorded forward pass; its graph is freed.
        blocks: The trainable tensors, in parameter order.
        columns: Gradients with respect to the outputs, ``(columns, batch, outputs)``.
        dtype: Dtype of the result.

    Yields:
        Rows ``(batch, columns, *shape of the tensor)``, on the outputs' device; a scalar has
        shape ``(1,)``.
    """
    weights: dict[int, list[Tensor]] = {block.map: [] for block in blocks if not block.is_bias}
    biases: dict[int, list[Tensor]] = {block.map: [] for block in blocks if block.is_bias}
    inputs = [x if x.ndim == 3 else x.unsqueeze(1) for x in tape.inputs]

    def keeps_tokens(i: int) -> bool:
        return inputs[i].shape[1] <= tape.maps[i].in_features

    def is_tall(i: int) -> bool:
        return tape.maps[i].in_features < tape.maps[i].out_features

    def visit(column: int, i: int, grad: Tensor) -> None:
        grad = grad if grad.ndim == 3 else grad.unsqueeze(1)
        if i in biases:
            biases[i].append(grad.to(dtype).sum(1))
        if i in weights:
            if keeps_tokens(i):
                weights[i].append(grad)
            else:  # the long side last, as in `lora_B`: processors multiply that quicker
                left, right = grad.to(dtype), inputs[i].to(dtype)
                weights[i].append(right.mT @ left if is_tall(i) else left.mT @ right)

    tape.backward(columns, visit)
    whole: dict[int, list[Tensor]] = {}
    for i, gradients in whole_gradients(tape, columns):
        whole.setdefault(i, []).append(gradients.to(dtype))
    device = tape.output.device
    for block in blocks:
        i, linear = block.map, tape.maps[block.map]
        if i in whole:
            rows = torch.stack(whole.pop(i))
            yield rows.reshape(*rows.shape[:2], *(block.parameter.shape or (1,))).to(device)
            continue
        stored = biases.pop(i) if block.is_bias else weights.pop(i)
        if not stored:  # the outputs do not depend on this map
            shape = (tape.examples, len(columns), *block.parameter.shape)
            yield torch.zeros(shape, dtype=dtype, device=device)
            continue
        rows = torch.stack(stored, dim=1)
        del stored
        if not block.is_bias:
            if keeps_tokens(i):
                rows = torch.einsum("nrtp,ntq->nrpq", rows.to(dtype), inputs[i].to(dtype))
            elif is_tall(i):
                rows = rows.mT
            rows = rows.mT if linear.transposed else rows
        yield rows.reshape(*rows.shape[:2], *block.parameter.shape).to(device)


def summed_gradient(linear: LinearMap, block: Block, x: Tensor, grad: Tensor) -> Tensor:
    """Return a tensor's gradient, summed over examples and tokens, in the dtype of ``grad``.

    Args:
        linear: The tensor's map.
        block: The tensor.
        x: Inputs of the map, ``(batch, tokens, q)`` or ``(batch, q)``.
        grad: Gradient of its outputs, ``(batch, tokens, p)`` or ``(batch, p)``.
    """
    grad = grad.flatten(0, -2)
    if block.is_bias:
        return grad.sum(0).reshape(block.parameter.shape)
    weight = grad.T @ x.flatten(0, -2).to(grad.dtype)
    return (weight.T if linear.transposed else weight).reshape(block.parameter.shape)


def side_by_side(blocks: Iterable[Tensor]) -> Tensor:
    """Return all tensors' Jacobians side by side, ``(batch, columns, parameters)``."""
    return torch.cat([block.flatten(2) for block in blocks], dim=-1)
