"""Verify a recorded forward pass against autograd on the parameters themselves.

What is inferred about a model is checked: which layer's output carries a tensor's gradient, which
dimension counts examples, that examples do not mix. See `output_verification` for the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from laplace_lora.adapters.maps import Block
from laplace_lora.adapters.selection import listed
from laplace_lora.capture.gradient_scale import largest
from laplace_lora.capture.jacobians import summed_gradient
from laplace_lora.capture.output_verification import chosen_examples
from laplace_lora.capture.recorder import MisfitError
from laplace_lora.capture.tape import Tape
from laplace_lora.likelihoods.language_modeling import IGNORED, token_labels
from laplace_lora.models.changes.autocast import as_called, in_full_precision

# Relative errors. Every kind of wrong answer found so far is off by percents; products on an
# accelerator may be rounded to 10 bits in single precision.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3}
COARSE = 0.05


@in_full_precision  # float16 would round what was scaled to fit it, see `gradient_scale`
def verify_gradients(tape: Tape, blocks: Sequence[Block], by_token: bool) -> None:
    """Compare the captured gradient of one example's outputs with autograd's, tensor by tensor.

    The outputs are combined at random. Costs one backward pass through the recorded graph, which
    is kept. Whole tensors, whose gradients are autograd's own, are left out.

    Args:
        tape: The recorded forward pass.
        blocks: The trainable tensors.
        by_token: Whether an example has a row of the output for each of its tokens that counts.

    Raises:
        MisfitError: If a gradient differs; names the tensors, and the reason as far as it shows.
    """
    recorded = [block for block in blocks if block.map < len(tape.inputs)]
    if not recorded:
        return
    n, rows = _first_rows(tape) if by_token else _example(tape)
    columns = tape.output.new_zeros(1, *tape.output.shape)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(columns[0, rows].shape, generator=generator, dtype=torch.float64)
    columns[0, rows] = noise.to(columns)
    of_map: dict[int, list[int]] = {}
    for k, block in enumerate(recorded):
        of_map.setdefault(block.map, []).append(k)
    captured: dict[int, Tensor] = {}  # from the example itself, by tensor
    elsewhere: dict[int, float] = {}  # the largest at other examples, relative to its own
    whole: dict[int, Tensor] = {}

    def visit(column: int, i: int, grad: Tensor) -> None:
        others = max(_largest(grad[:n]), _largest(grad[n + 1 :]))
        own = _largest(grad[n : n + 1])
        for k in of_map.get(i, ()):
            x = tape.inputs[i][n : n + 1]
            captured[k] = _assembled(tape, recorded[k], x, grad[n : n + 1])
            elsewhere[k] = others / own if own else others

    def visit_whole(column: int, i: int, grad: Tensor) -> None:
        for k in of_map.get(i, ()):
            whole[k] = _assembled(tape, recorded[k], tape.inputs[i], grad)

    parameters = [block.parameter for block in recorded]
    truths = tape.backward(columns, visit, parameters)
    scale = tape.scale(columns)
    wrong = []
    for k, (block, truth) in enumerate(zip(recorded, truths, strict=True)):
        is_own = _equal(tape, block, captured.get(k), truth, scale)
        if not is_own or elsewhere.get(k, 0.0) > _tolerance(tape, block):
            wrong.append(k)
    if not wrong:
        return
    tape.backward(columns, visit_whole, parameters)
    if any(k not in captured for k in wrong):
        reason = "no gradient passes through the layer's output although the outputs depend on it"
    elif all(_equal(tape, recorded[k], whole[k], truths[k], scale) for k in wrong):
        reason = (
            "the gradient of one example shows at others: the first dimension of the layer's "
            "input does not count examples, or the model mixes them"
        )
    else:
        reason = (
            "the gradient captured at the layer is not autograd's: the tensor is used in a second "
            "place (tied, or without its layer), or another layer's result replaces its own"
        )
    raise MisfitError(
        f"{listed([recorded[k].name for k in wrong])}: {reason}. Freeze them first, or give them a "
        "diagonal block with uncovered='diag'; verify=False switches this check off",
        sorted({recorded[k].map for k in wrong}),
    )


def _example(tape: Tape) -> tuple[int, slice]:
    """Return the example with the most real tokens, and its row of the output."""
    n = chosen_examples(tape.batch, tape.examples)[0]
    return n, slice(n, n + 1)


def _first_rows(tape: Tape) -> tuple[int, slice]:
    """Return the first example that has rows of the output, and these rows."""
    rows: Iterable[int] = (len(tape.rerun(n)) for n in range(tape.examples))
    batch: Any = tape.batch
    if not tape.divides:  # no example can run without the others' images
        rows = (token_labels(batch, batch["labels"]) != IGNORED).sum(1).tolist()
    with as_called():
        n, found = next(((n, length) for n, length in enumerate(rows) if length), (0, 0))
    return n, slice(0, found)


def _equal(
    tape: Tape, block: Block, ours: Tensor | None, truth: Tensor | None, scale: float
) -> bool:
    """Return whether a captured gradient is autograd's; one that is missing is zero.

    Rounding on the way was of gradients multiplied by ``scale``, see `Tape.scale`.
    """
    if truth is None:
        return ours is None or not bool(ours.any())
    if not bool(truth.isfinite().all()):
        return True  # autograd multiplies what is not finite at padding tokens by zero
    dtype = torch.promote_types(torch.float32, truth.dtype)
    truth = truth.to(dtype)
    error = truth.norm() if ours is None else (ours.to(truth) - truth).norm()
    zero = 1e-12 if dtype == torch.float64 else 1e-7
    rounding = _smallest(tape.coarsest(block.map, block.parameter)) * math.sqrt(truth.numel())
    return bool(error <= _tolerance(tape, block) * truth.norm() + max(zero, rounding / scale))


def _tolerance(tape: Tape, block: Block) -> float:
    return TOLERANCE.get(tape.coarsest(block.map, block.parameter), COARSE)


def _smallest(dtype: torch.dtype) -> float:
    """Return the smallest positive number of a dtype, in steps of which it rounds near zero."""
    limits = torch.finfo(dtype)
    return limits.smallest_normal * limits.eps


def _assembled(tape: Tape, block: Block, x: Tensor, grad: Tensor) -> Tensor:
    """Return a tensor's gradient, summed over examples and tokens."""
    grad = grad.to(torch.promote_types(torch.float32, block.parameter.dtype))
    return summed_gradient(tape.maps[block.map], block, x, grad)


def _largest(values: Tensor) -> float:
    """Return the largest absolute value; 0 where there is none, or one is not a number."""
    found = largest(values)
    return 0.0 if math.isnan(found) else found
