"""`Tape`: one recorded forward pass, with as many backward passes as asked.

What each trainable map saw, which tokens of it are real, and which maps share an input; output
gradients go to a visitor the moment they exist. How a pass is recorded belongs to `capture`, how a
map's own input and gradient follow from its module's to `maps` and `uncovered`, what is made of
them to `kfac` and `jacobians`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from laplace_lora.adapters.maps import Call, LinearMap
from laplace_lora.data.masks import joined_masks, token_mask
from laplace_lora.data.pairs import passes

Visitor = Callable[[int, int, Tensor], None]


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
            masks.append(joined_masks(parts))
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
            group = first.setdefault(address(x), i)
            source = self._sources.get(id(linear.layer))
            shapes = [part.shape for part in self._inputs[i]]
            if group == i and source is not None and shapes == [at[2] for at in source]:
                before = ("before the cast", *source)
                candidate = first.get(before, i)
                if torch.equal(self.inputs[candidate], x):
                    group = first[address(x)] = candidate
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


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tokens of several calls, one after the other."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat([t if t.ndim == 3 else t.unsqueeze(1) for t in tensors], dim=1)


def _addresses(inputs: Sequence[Tensor]) -> tuple:
    return tuple(map(address, inputs))


def address(x: Tensor) -> tuple:
    """Return where a tensor lies and how, by which those that are one are known."""
    return (x.device, x.data_ptr(), x.shape, x.stride(), x.dtype)
