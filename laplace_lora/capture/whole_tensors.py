"""Gradients of tensors that no map covers, from running the model on each example alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from laplace_lora.capture.tape import Tape


def whole_gradients(tape: Tape, columns: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the gradients of the whole tensors, example by example.

    Runs the model on each example alone, and backward once a column: about as much work as a
    tape's `backward`, but without the speed of batches. Yields nothing if there are none.

    Args:
        tape: The recorded forward pass.
        columns: Gradients with respect to the output, ``(columns, rows, outputs)``.

    Yields:
        A whole tensor's index and its gradients ``(columns, entries)``, for all tensors of the
        first example, then of the second, and so on.

    Raises:
        RuntimeError: If the model gives an example alone another output than in its batch.
    """
    first = len(tape.inputs)
    parameters = [p for linear in tape.maps[first:] for p, _ in linear.parameters()]
    start = 0
    for n in range(tape.examples) if parameters else ():
        alone = tape.rerun(n)
        own = slice(start, start + len(alone))  # one row, or one a scored token
        start, together = own.stop, tape.output[own]
        bound = 0.05 * (1 + tape.output.abs().max())  # half precision rounds by the batch's size
        if alone.shape != together.shape or not ((alone - together).abs() <= bound).all():
            raise RuntimeError(
                f"the model's output for example {n} alone differs from that in its batch, so its "
                "gradients cannot be told apart; is dropout on, or does the model mix examples?"
            )
        rows: list[list[Tensor]] = [[] for _ in parameters]
        for column in range(len(columns)):
            grads = torch.autograd.grad(
                alone,
                parameters,
                columns[column, own].to(alone.dtype),
                retain_graph=column + 1 < len(columns),
                allow_unused=True,
            )
            for found, p, grad in zip(rows, parameters, grads, strict=True):
                found.append(torch.zeros_like(p) if grad is None else grad)
        for i, found in enumerate(rows):
            yield first + i, torch.stack(found).reshape(len(columns), -1)
