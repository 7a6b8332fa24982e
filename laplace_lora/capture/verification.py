"""Verify a recorded forward pass against autograd, and the model against its own forward pass.

What the library infers about a model is checked on one batch: which layer's output carries a
tensor's gradient, which dimension counts examples, that examples do not mix, at which positions a
decoder reads its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_lora.adapters.maps import Block
from laplace_lora.adapters.selection import listed
from laplace_lora.capture.recorder import MisfitError
from laplace_lora.capture.tape import Tape
from laplace_lora.data.batches import one_example, splits_by_example
from laplace_lora.data.pairs import passes

# Relative errors. Every kind of wrong answer found so far is off by percents; products on an
# accelerator may be rounded to 10 bits in single precision.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3}
COARSE = 0.05
OWN = "own_logits"  # of a model that says how its transformer answers by itself


@dataclass(frozen=True)
class _Difference:
    """How a tensor's gradient differs from autograd's."""

    block: Block
    is_elsewhere: bool  # whole, but part of it at other examples
    is_missing: bool  # there is none


def verify_gradients(tape: Tape, blocks: Sequence[Block]) -> None:
    """Compare the captured gradient of one example's outputs with autograd's, tensor by tensor.

    The outputs are combined at random. Costs one backward pass through the recorded graph, and
    another for the parameters themselves; the graph is kept. Whole tensors, whose gradients are
    autograd's own, are left out.

    Args:
        tape: The recorded forward pass.
        blocks: The trainable tensors.

    Raises:
        MisfitError: If a gradient differs; names the tensors, and the reason as far as it shows.
    """
    recorded = [block for block in blocks if block.map < len(tape.inputs)]
    if not recorded:
        return
    example, rows = _example(tape)
    columns = tape.output.new_zeros(1, *tape.output.shape)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(columns[0, rows].shape, generator=generator, dtype=torch.float64)
    columns[0, rows] = noise.to(columns)
    parameters = [block.parameter for block in recorded]
    expected = dict(
        zip(map(id, parameters), tape.parameter_gradients(columns[0], parameters), strict=True)
    )
    differences: dict[int, _Difference] = {}
    visited: set[int] = set()

    def visit(column: int, i: int, grad: Tensor) -> None:
        visited.add(i)
        for k, block in enumerate(recorded):
            if block.map == i:
                difference = _difference(tape, block, example, grad, expected[id(block.parameter)])
                if difference is not None:
                    differences[k] = difference

    tape.backward(columns, visit, keep_graph=True)
    for k, block in enumerate(recorded):
        truth = expected[id(block.parameter)]
        if block.map not in visited and truth is not None and bool((truth != 0).any()):
            differences[k] = _Difference(block, False, True)
    if differences:
        found = [differences[k] for k in sorted(differences)]
        raise MisfitError(_reason(found), sorted({d.block.map for d in found}))


def verify_outputs(
    model: Any, batch: Any, output: Tensor, examples: int, dtype: torch.dtype
) -> None:
    """Compare outputs with those of single examples, and with the model's own forward pass.

    Costs two forward passes of one example each: of the one with the most real tokens and of the
    one with the fewest. Where a batch cannot be split, as images of several sizes in one tensor
    cannot, the whole is compared with the model's own pass.

    Args:
        model: From a batch to outputs; `LogitsModel` says how its transformer answers by itself.
        batch: What the model takes.
        output: Its outputs, ``(rows, outputs)``.
        examples: Number of examples.
        dtype: The coarsest in which the model computes.

    Raises:
        RuntimeError: If the outputs differ.
    """
    own = _own_logits(model)
    with torch.no_grad():
        if not splits_by_example(batch, examples):
            whole = own(batch)
            if whole is not None and not _near(whole, output, dtype):
                raise RuntimeError(_positions(whole, output))
            return
        for n in _chosen(batch, examples, len(output)):
            single = one_example(batch, n)
            # One row per example, or for tokens those of the first example.
            rows = slice(n, n + 1) if len(output) == examples else slice(None)
            alone = own(single)
            if alone is not None and _near(alone, output[rows][: len(alone)], dtype):
                continue
            ours = model(single)
            expected = output[rows][: len(ours)]
            if not _near(ours, expected, dtype):
                raise RuntimeError(
                    f"the model mixes the examples of a batch: alone, example {n} has other "
                    f"outputs ({_distance(ours, expected)}), so they depend on the batch. "
                    "Switch dropout off, and replace layers that use statistics of the batch, "
                    "such as batch norms without running statistics"
                )
            if alone is None:
                continue
            bare = own(without_padding(single))
            if bare is not None and not _near(bare, expected, dtype):
                raise RuntimeError(_positions(alone, expected))


def without_padding(batch: Any) -> Any:
    """Return a batch of one example without its padding, where it has a mask."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or len(mask) != 1:
        return batch
    real = mask[0].bool()
    return {
        key: value[:, real]
        if isinstance(value, Tensor) and value.shape == mask.shape and not value.is_floating_point()
        else value
        for key, value in batch.items()
    }


def _own_logits(model: Any) -> Callable[[Any], Tensor | None]:
    """Return what gives the logits of the transformer by itself, where a model says so."""
    for part in (model, getattr(model, "model", None)):  # laplace-torch wraps last layers
        if hasattr(part, OWN):
            own: Callable[[Any], Tensor | None] = getattr(part, OWN)
            return own
    return lambda batch: None


def _example(tape: Tape) -> tuple[int, slice]:
    """Return the example with the most real tokens, and its rows of the output."""
    rows = len(tape.output)
    if rows == tape.examples:
        n = _chosen(tape.batch, tape.examples, rows)[0]
        return n, slice(n, n + 1)
    return 0, slice(0, tape.rows_of_first())


def _chosen(batch: Any, examples: int, rows: int) -> list[int]:
    """Return the examples with the most and the fewest real tokens; the first one of texts."""
    if rows != examples:
        return [0]
    mask = passes(batch)[0].get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or len(mask) != examples:
        return [0]
    lengths = (mask != 0).sum(1)
    return list(dict.fromkeys([int(lengths.argmax()), int(lengths.argmin())]))


def _difference(
    tape: Tape, block: Block, n: int, grad: Tensor, truth: Tensor | None
) -> _Difference | None:
    """Compare the gradient captured for one example with autograd's, ``None`` if it is that."""
    x = tape.inputs[block.map]
    dtype = torch.promote_types(torch.float32, block.parameter.dtype)
    truth = torch.zeros_like(block.parameter) if truth is None else truth
    if not bool(truth.isfinite().all()):
        return None  # autograd multiplies what is not finite at padding tokens by zero
    own = _assembled(tape, block, x[n : n + 1], grad[n : n + 1], dtype)
    tolerance = tape.coarsest(block.map, block.parameter)
    bound = TOLERANCE.get(tolerance, COARSE)
    scale = truth.to(dtype).norm()
    others = max(_largest(grad[:n]), _largest(grad[n + 1 :]))
    is_own = bool((own - truth.to(dtype)).norm() <= bound * scale + _floor(dtype))
    if is_own and others <= bound * _largest(grad[n : n + 1]):
        return None
    whole = _assembled(tape, block, x, grad, dtype)
    elsewhere = bool((whole - truth.to(dtype)).norm() <= bound * scale + _floor(dtype))
    return _Difference(block, elsewhere, False)


def _assembled(tape: Tape, block: Block, x: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor's gradient, summed over examples and tokens."""
    grad = grad.reshape(-1, grad.shape[-1]).to(dtype)
    if block.is_bias:
        return grad.sum(0).reshape(block.parameter.shape)
    result = grad.T @ x.reshape(-1, x.shape[-1]).to(dtype)
    result = result.T if tape.maps[block.map].transposed else result
    return result.reshape(block.parameter.shape)


def _largest(values: Tensor) -> float:
    """Return the largest absolute value; 0 where there is none, or none is a number."""
    if not values.numel():
        return 0.0
    low, high = torch.aminmax(values.detach())
    largest = float(torch.maximum(-low, high))
    return 0.0 if math.isnan(largest) else largest


def _floor(dtype: torch.dtype) -> float:
    """Return the error of a gradient that is zero."""
    return 1e-12 if dtype == torch.float64 else 1e-7


def _reason(differences: Sequence[_Difference]) -> str:
    names = listed([difference.block.name for difference in differences])
    if any(difference.is_missing for difference in differences):
        reason = "no gradient passes through the layer's output although the outputs depend on it"
    elif all(difference.is_elsewhere for difference in differences):
        reason = (
            "the gradient of one example shows at others: the first dimension of the layer's "
            "input does not count examples, or the model mixes them"
        )
    else:
        reason = (
            "the gradient captured at the layer is not autograd's: the tensor is used in a second "
            "place (tied, or without its layer), or another layer's result replaces its own"
        )
    return (
        f"{names}: {reason}. Freeze them first, or give them a diagonal block with "
        "uncovered='diag'; verify=False switches this check off"
    )


def _bound(dtype: torch.dtype, outputs: Tensor) -> float:
    """Return by how much outputs may differ that a model computes in a dtype."""
    relative, smallest = {torch.float64: (1e-4, 0.1), torch.float32: (1e-2, 0.1)}.get(
        dtype, (COARSE, 1.0)
    )
    return relative * (smallest + float(outputs.abs().max()))


def _near(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    if ours.shape != theirs.shape:
        return False
    if not ours.numel():
        return True
    return not float((ours.to(theirs) - theirs).abs().max()) > _bound(dtype, theirs)


def _distance(ours: Tensor, theirs: Tensor) -> str:
    """Return how far outputs are apart, relative to the largest."""
    if ours.shape != theirs.shape:
        return f"shape {tuple(ours.shape)} for {tuple(theirs.shape)}"
    error = float((ours.to(theirs) - theirs).abs().max() / theirs.abs().max())
    return f"{error:.1e} of the largest"


def _positions(theirs: Tensor, ours: Tensor) -> str:
    return (
        "the logits differ from those of the model's own forward pass ("
        f"{_distance(theirs, ours)}): the model counts or reads its tokens in "
        "another way than LogitsModel expects. Give the batches `position_ids`, or LogitsModel "
        "an `output` callable"
    )
