"""What flows through a model's trainable linear maps: inputs forward, gradients backward.

A `Tape` holds one forward pass and runs as many backward passes as asked, handing each map's output
gradient to a visitor the moment it exists. How a map's own input and gradient follow from its
module's belongs to `maps` and `uncovered`, what is made of them to `kfac` and `jacobians`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from laplace_lora.guard import evaluation_mode
from laplace_lora.maps import Call, LinearMap
from laplace_lora.peft_state import calls_twice
from laplace_lora.preferences import passes
from laplace_lora.sharding import one_example

Visitor = Callable[[int, int, Tensor], None]

MASK_NAMES = ("attention_mask", "decoder_attention_mask")


class MisfitError(RuntimeError):
    """Maps did what their Kronecker factors cannot express.

    Args:
        message: What the first of them did.
        maps: Their indices.
    """

    def __init__(self, message: str, maps: Sequence[int]) -> None:
        super().__init__(message)
        self.maps = maps


class Tape:
    """One recorded forward pass.

    A map that ran several times, as in models that share their layers' weights or that run on both
    texts of a preference pair, has the tokens of all its calls, one call after the other.

    Attributes:
        maps: The maps: those recorded, then whole tensors, which have nothing to record.
        examples: Number of examples.
        inputs: Own input of each recorded map, ``(batch, tokens, q)`` or ``(batch, q)``, detached.
        output: What the model returned, ``(rows, outputs)``, detached; a row an example, unless
            several of an example's tokens have outputs of their own.
        rerun: From the number of an example to what the model returns for it alone, with its graph.
    """

    def __init__(
        self,
        maps: Sequence[LinearMap],
        mask_source: Any,
        calls: Sequence[Sequence[Call]],
        output: Tensor,
        sources: dict[int, list[tuple]],
        rerun: Callable[[int], Tensor],
        examples: int,
    ) -> None:
        self.maps = maps
        self.rerun = rerun
        self.examples = examples
        self._sources = sources
        self.output = output.detach()
        self._mask_source = mask_source
        self._output = output
        self._inputs = [
            [linear.read(call) for call in found]
            for linear, found in zip(maps, calls, strict=False)
        ]
        # Projections that share an input, in each of their calls, share what is joined as well.
        distinct = {_addresses(inputs): inputs for inputs in self._inputs}
        joined = {addresses: _joined(inputs) for addresses, inputs in distinct.items()}
        self.inputs = [joined[_addresses(inputs)] for inputs in self._inputs]
        self._outputs = [[call.output for call in found] for found in calls]
        made = {id(out) for outputs in self._outputs for out in outputs}
        # A map fed by another recorded map lies on that one's backward path, so it needs no
        # gradient of its own kept alive: lora_B's wide gradients pass by and are gone.
        own = [call.output for found in calls for call in found if id(call.x) not in made]
        self._targets = list({id(out): out for out in own}.values())

    @cached_property
    def masks(self) -> list[Tensor | None]:
        """For each recorded map which tokens are real, ``(batch, tokens)``, or ``None`` if all are.

        Raises:
            ValueError: If the attention masks in the batch do not fit a map's tokens.
        """
        sources = passes(self._mask_source)
        found: dict[tuple, Tensor | None] = {}
        masks: list[Tensor | None] = []
        for linear, inputs in zip(self.maps, self._inputs, strict=False):
            parts = []
            for call, x in enumerate(inputs if linear.has_tokens else []):
                source = call * len(sources) // len(inputs)
                key = (source, x.shape[:-1], x.device)
                if key not in found:
                    found[key] = token_mask(sources[source], x, linear.name)
                parts.append((x, found[key]))
            masks.append(_joined_masks(parts))
        return masks

    @cached_property
    def input_groups(self) -> list[int]:
        """For each recorded map the first map with the same input.

        Projections that share their input tensor are found by its address. PEFT casts the input to
        the adapter's number format, once a projection; then the address before the cast tells where
        to look, and the values decide.
        """
        first: dict[tuple, int] = {}
        groups: list[int] = []
        for i, (linear, x) in enumerate(zip(self.maps, self.inputs, strict=False)):
            group = first.setdefault(_address(x), i)
            source = self._sources.get(id(linear.layer))
            shapes = [part.shape for part in self._inputs[i]]
            if group == i and source is not None and shapes == [at[2] for at in source]:
                before = ("before the cast", *source)
                candidate = first.get(before, i)
                if torch.equal(self.inputs[candidate], x):
                    group = first[_address(x)] = candidate
                # Memory is used again: the next map may look for this one, not for an older.
                first[before] = group
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
        if not self._targets:
            return
        column = 0
        waiting: dict[int, dict[int, Tensor]] = {}

        def finish(i: int) -> None:
            found = waiting.pop(i)
            for call, out in enumerate(self._outputs[i]):
                if call not in found:
                    zeros = torch.zeros_like(out)
                    found[call] = self.maps[i].own_grad(self._inputs[i][call], zeros)
            grads = [found[call] for call in range(len(self._outputs[i]))]
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
        MisfitError: If a map did not run, ran with inputs of different shapes, or with one whose
            first dimension is not the batch.
        RuntimeError: If the output carries no gradient.
    """
    recorded = [linear for linear in maps if linear.module is not None]
    calls: dict[int, list[Call]] = {i: [] for i in range(len(recorded))}

    def hook(i: int) -> Callable[[nn.Module, tuple, dict, Tensor], None]:
        return lambda module, args, kwargs, output: calls[i].append(Call(args, kwargs, output))

    sources: dict[int, list[tuple]] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs:  # the tensor itself would stay in memory
            sources.setdefault(id(layer), []).append(_address(inputs[0]))

    with ExitStack() as stack, torch.enable_grad():
        for i, linear in enumerate(recorded):
            handle = linear.module.register_forward_hook(hook(i), with_kwargs=True)
            stack.callback(handle.remove)
        for layer in {linear.layer for linear in maps if linear.layer is not None}:
            stack.callback(layer.register_forward_pre_hook(note).remove)
        output = model(batch)
    masks = batch if masks is None else masks
    texts = len(passes(masks))
    for i, linear in enumerate(recorded):
        if calls_twice(linear.layer) and len(calls[i]) % (2 * texts) == 0:
            calls[i] = calls[i][1::2]
    if skip_idle:
        maps = recorded = [linear for i, linear in enumerate(recorded) if calls[i]]
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
    reasons = {i: linear.misfit(calls[i], examples, texts) for i, linear in enumerate(recorded)}
    misfits = [i for i, reason in reasons.items() if reason is not None]
    if misfits:
        raise MisfitError(
            f"{reasons[misfits[0]]}; freeze its parameters first, or give them a diagonal block "
            "with uncovered='diag'",
            misfits,
        )
    for i, linear in enumerate(recorded):
        if not all(call.output.requires_grad for call in calls[i]):
            raise RuntimeError(
                f"the output of layer {linear.name!r} carries no gradient; is it under "
                "torch.no_grad, or under reentrant gradient checkpointing? Use use_reentrant=False"
            )
    # A batch's Jacobian may be asked for after its model has been put back into training mode.
    was_training = getattr(model, "training", True)

    @torch.enable_grad()
    def rerun(n: int) -> Tensor:
        whole = nullcontext() if was_training else evaluation_mode(cast(nn.Module, model))
        with whole:
            return model(one_example(batch, n))

    found = [calls[i] for i in range(len(recorded))]
    return Tape(maps, masks, found, output, sources, rerun, examples)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tokens of several calls, one after the other."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat([t if t.ndim == 3 else t.unsqueeze(1) for t in tensors], dim=1)


def _joined_masks(parts: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor | None:
    """Return the masks of several inputs, one after the other; ``None`` if all tokens are real."""
    if all(mask is None for _, mask in parts):
        return None
    real = [x.new_ones(x.shape[:2], dtype=torch.bool) if m is None else m for x, m in parts]
    return torch.cat(real, dim=1)


def _addresses(inputs: Sequence[Tensor]) -> tuple:
    return tuple(map(_address, inputs))


def _address(x: Tensor) -> tuple:
    return (x.device, x.data_ptr(), x.shape, x.stride(), x.dtype)


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
