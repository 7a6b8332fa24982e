"""What flows through a model's trainable linear maps: inputs forward, gradients backward.

A `Tape` holds one forward pass and runs as many backward passes as asked, handing each map's output
gradient to a visitor the moment it exists. How a map's own input and gradient follow from its
module's belongs to `maps`, what is made of them to `kfac` and `jacobians`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora.maps import LinearMap
from laplace_lora.peft_state import calls_twice

Visitor = Callable[[int, int, Tensor], None]

MASK_NAMES = ("attention_mask", "decoder_attention_mask")


class Tape:
    """One recorded forward pass.

    A map that ran several times, as in models that share their layers' weights, has the tokens of
    all its calls, one call after the other.

    Attributes:
        maps: The recorded maps.
        examples: Number of examples.
        inputs: Own input of each map, ``(batch, tokens, q)`` or ``(batch, q)``, detached.
        output: What the model returned, ``(rows, outputs)``, detached; a row an example, unless
            several of an example's tokens have outputs of their own.
    """

    def __init__(
        self,
        maps: Sequence[LinearMap],
        mask_source: Any,
        calls: Sequence[Sequence[tuple[Tensor, Tensor]]],
        output: Tensor,
        sources: dict[int, tuple],
        examples: int,
    ) -> None:
        self.maps = maps
        self.examples = examples
        self._sources = sources
        self.output = output.detach()
        self._mask_source = mask_source
        self._output = output
        self._inputs = [
            [linear.own_input(x.detach()) for x, _ in found]
            for linear, found in zip(maps, calls, strict=True)
        ]
        self.inputs = [_joined(inputs) for inputs in self._inputs]
        self._outputs = [[out for _, out in found] for found in calls]
        made = {id(out) for found in calls for _, out in found}
        # A map fed by another recorded map lies on that one's backward path, so it needs no
        # gradient of its own kept alive: lora_B's wide gradients pass by and are gone.
        own = [out for found in calls for x, out in found if id(x) not in made]
        self._targets = list({id(out): out for out in own}.values())

    @cached_property
    def masks(self) -> list[Tensor | None]:
        """For each map which tokens are real, ``(batch, tokens)``, or ``None`` if all are.

        Raises:
            ValueError: If the attention masks in the batch do not fit a map's tokens.
        """
        found: dict[torch.Size, Tensor | None] = {}
        masks: list[Tensor | None] = []
        for linear, (x, *others) in zip(self.maps, self._inputs, strict=True):
            if linear.has_tokens and x.shape[:-1] not in found:
                found[x.shape[:-1]] = token_mask(self._mask_source, x, linear.name)
            mask = found[x.shape[:-1]] if linear.has_tokens else None
            masks.append(mask if mask is None else mask.repeat(1, 1 + len(others)))
        return masks

    @cached_property
    def input_groups(self) -> list[int]:
        """For each map the first map with the same input.

        Projections that share their input tensor are found by its address. PEFT casts the input to
        the adapter's number format, once a projection; then the address before the cast tells where
        to look, and the values decide.
        """
        first: dict[tuple, int] = {}
        groups: list[int] = []
        for i, (linear, x) in enumerate(zip(self.maps, self.inputs, strict=True)):
            group = first.setdefault(_address(x), i)
            source = self._sources.get(id(linear.layer))
            if group == i and source is not None and x.shape in source:
                candidate = first.get(("before the cast", source), i)
                if torch.equal(self.inputs[candidate], x):
                    group = first[_address(x)] = candidate
                # Memory is used again: the next map may look for this one, not for an older.
                first["before the cast", source] = group
            groups.append(group)
        return groups

    def backward(self, columns: Tensor, visit: Visitor) -> None:
        """Run one backward pass a column; frees the graph after the last.

        Args:
            columns: Gradients with respect to the output, ``(columns, batch, outputs)``.
            visit: Called with the column, the map and the gradient with respect to the map's
                output, ``(batch, tokens, p)`` or ``(batch, p)``, as soon as the backward pass
                knows it. Not called for a map on which the output does not depend.
        """
        column = 0
        waiting: dict[int, dict[int, Tensor]] = {}

        def finish(i: int) -> None:
            found = waiting.pop(i)
            zero = torch.zeros_like(next(iter(found.values())))
            grads = [found.get(call, zero) for call in range(len(self._outputs[i]))]
            summed = grads[0].ndim < self._inputs[i][0].ndim  # over the tokens of a call already
            visit(column, i, torch.stack(grads).sum(0) if summed else _joined(grads))

        def hook(i: int, call: int) -> Callable[[Tensor], None]:
            def seen(grad: Tensor) -> None:
                waiting.setdefault(i, {})[call] = self.maps[i].own_grad(self._inputs[i][call], grad)
                if len(waiting[i]) == len(self._outputs[i]):
                    finish(i)

            return seen

        with ExitStack() as stack:
            for i, outputs in enumerate(self._outputs):
                for call, out in enumerate(outputs):
                    stack.callback(out.register_hook(hook(i, call)).remove)
            for column in range(len(columns)):
                torch.autograd.grad(
                    self._output,
                    self._targets,
                    columns[column].to(self._output.dtype),
                    retain_graph=column + 1 < len(columns),
                    allow_unused=True,
                )
                for i in list(waiting):  # the output does not depend on all calls of these
                    finish(i)


def record(
    model: Callable[[Any], Tensor],
    maps: Sequence[LinearMap],
    batch: Any,
    masks: Mapping[str, Any] | None = None,
    skip_idle: bool = False,
    examples: int | None = None,
) -> Tape:
    """Run a model on a batch and record its trainable maps; leaves no hook behind.

    Args:
        model: From a batch to ``(batch, outputs)``.
        maps: The maps to record.
        batch: What the model takes.
        masks: Where attention masks are looked for once they are needed; ``None`` for the batch.
        skip_idle: Leave out maps that do not run, instead of refusing them.
        examples: Number of examples, if it is not the outputs' number of rows.

    Raises:
        ValueError: If the model's output is not ``(batch, outputs)``.
        RuntimeError: If the output carries no gradient, or a map did not run, ran with inputs of
            different shapes, or with one whose first dimension is not the batch.
    """
    calls: dict[int, list[tuple[Tensor, Tensor]]] = {i: [] for i in range(len(maps))}

    def hook(i: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, inputs, output: calls[i].append((inputs[0], output))

    sources: dict[int, tuple] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs:
            sources[id(layer)] = _address(inputs[0])  # the tensor itself would stay in memory

    with ExitStack() as stack, torch.enable_grad():
        for i, linear in enumerate(maps):
            stack.callback(linear.module.register_forward_hook(hook(i)).remove)
        for layer in {linear.layer for linear in maps if linear.layer is not None}:
            stack.callback(layer.register_forward_pre_hook(note).remove)
        output = model(batch)
    for i, linear in enumerate(maps):
        if calls_twice(linear.layer) and len(calls[i]) % 2 == 0:
            calls[i] = calls[i][1::2]
    if skip_idle:
        maps = [linear for i, linear in enumerate(maps) if calls[i]]
        calls = dict(enumerate(found for found in calls.values() if found))
    if output.ndim != 2:
        raise ValueError(
            f"the model returned shape {tuple(output.shape)}, expected (batch, outputs); give "
            "LogitsModel `target_ids` or an `output` callable"
        )
    if any(calls.values()) and not output.requires_grad:
        raise RuntimeError(
            "the outputs carry no gradient; does the model run under torch.no_grad, or detach them?"
        )
    examples = len(output) if examples is None else examples
    for i, linear in enumerate(maps):
        _check_calls(linear, [x for x, _ in calls[i]], examples)
        if not all(out.requires_grad for _, out in calls[i]):
            raise RuntimeError(
                f"the output of layer {linear.name!r} carries no gradient; is it under "
                "torch.no_grad, or under reentrant gradient checkpointing? Use use_reentrant=False"
            )
    masks = batch if masks is None else masks
    return Tape(maps, masks, [calls[i] for i in range(len(maps))], output, sources, examples)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tokens of several calls, one after the other."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat([t if t.ndim == 3 else t.unsqueeze(1) for t in tensors], dim=1)


def _address(x: Tensor) -> tuple:
    return (x.device, x.data_ptr(), x.shape, x.stride(), x.dtype)


def _check_calls(linear: LinearMap, inputs: list[Tensor], batch: int) -> None:
    name, dims = linear.name, linear.input_dims
    if not inputs:
        raise RuntimeError(
            f"layer {name!r} did not run in the forward pass; freeze its parameters first"
        )
    shapes = {tuple(x.shape): None for x in inputs}
    if len(shapes) > 1:
        raise RuntimeError(
            f"layer {name!r} ran {len(inputs)} times in one forward pass with inputs of different "
            f"shapes {list(shapes)} (relative attention, say), which its Kronecker factors cannot "
            "express; freeze its parameters first"
        )
    if inputs[0].ndim not in dims or inputs[0].shape[0] != batch:
        raise RuntimeError(
            f"layer {name!r} received an input of shape {tuple(inputs[0].shape)} in a batch of "
            f"{batch}, expected {' or '.join(map(str, dims))} dimensions, the first the batch; "
            "freeze its parameters first"
        )


def token_mask(batch: Any, inputs: Tensor, name: str) -> Tensor | None:
    """Return which tokens of a map's input are real.

    Args:
        batch: Mapping with ``attention_mask`` or ``decoder_attention_mask``; anything else has
            no padding.
        inputs: Input of the map, ``(batch, tokens, q)`` or ``(batch, q)``.
        name: Name of the map, for the error.

    Returns:
        The ``(batch, tokens)`` mask that fits the input, ``None`` if all tokens are real.

    Raises:
        ValueError: If there are masks, but none fits.
    """
    if inputs.ndim == 2 or inputs.shape[1] == 1 or not isinstance(batch, Mapping):
        return None
    found = [batch.get(key) for key in MASK_NAMES]
    masks: list[Tensor] = [mask for mask in found if mask is not None]
    if not masks:
        return None
    for mask in masks:
        if mask.shape == inputs.shape[:2]:
            mask = mask.to(inputs.device).bool()
            return None if bool(mask.all()) else mask
    raise ValueError(
        f"layer {name!r} saw {inputs.shape[1]} tokens an example, but the batch's attention masks "
        f"have the shapes {[tuple(mask.shape) for mask in masks]}, so padding cannot be told apart"
    )
