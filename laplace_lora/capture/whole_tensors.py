"""Gradients of tensors that no map covers, from running the model on one example at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from laplace_lora.capture.parameter_hooks import without_hooks
from laplace_lora.capture.tape import Tape


def whole_gradients(tape: Tape, columns: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the gradients of the whole tensors, example by example.

    Runs the model on each example alone, and backward once per column: about as much work as a
    tape's `backward`, but without the speed of batches. Yields nothing if there are no whole
    tensors.

    Args:
        tape: The recorded forward pass.
        columns: Gradients with respect to the output, ``(columns, rows, outputs)``.

    Yields:
        The index of a whole tensor and its gradients ``(columns, entries)``: first all tensors
        for the first example, then for the second, and so on.

    Raises:
        RuntimeError: If the model's output for an example alone differs from that in the batch.
    """
    first = len(tape.inputs)
    parameters = [p for linear in tape.maps[first:] for p, _ in linear.parameters()]
    start = 0
    for n in range(tape.examples) if parameters else ():
        alone = tape.rerun(n)
        rows = slice(start, start + len(alone))  # one row, or one per scored token
        start, together = rows.stop, tape.output[rows]
        bound = 0.05 * (1 + tape.output.abs().max())  # half precision rounds by the batch's size
        if alone.shape != together.shape or not ((alone - together).abs() <= bound).all():
            raise RuntimeError(
                f"the model's output for example {n} alone differs from that in its batch, so "
                "gradients per example cannot be computed; switch dropout off, and use layers that "
                "do not mix examples"
            )
        gradients: list[list[Tensor]] = [[] for _ in parameters]
        # Of an example that takes another way through the model, an expert's weights say nothing.
        for column in range(len(columns)) if alone.requires_grad else ():
            with without_hooks(parameters):
                grads = torch.autograd.grad(
                    alone,
                    parameters,
                    columns[column, rows].to(alone.dtype),
                    retain_graph=column + 1 < len(columns),
                    allow_unused=True,
                )
            for stored, p, grad in zip(gradients, parameters, grads, strict=True):
                stored.append(torch.zeros_like(p) if grad is None else grad)
        for i, (stored, p) in enumerate(zip(gradients, parameters, strict=True)):
            found = torch.stack(stored) if stored else p.new_zeros(len(columns), *p.shape)
            yield first + i, found.reshape(len(columns), -1)
