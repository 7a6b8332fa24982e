"""`Tape`: one recorded forward pass, and any number of backward passes through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from laplace_lora.adapters.maps import Call, LinearMap
from laplace_lora.capture.gradient_scale import gradient_scale, largest, widened
from laplace_lora.capture.input_groups import Address, addresses, input_groups
from laplace_lora.capture.output_gradients import OutputGradient
from laplace_lora.capture.padding import Padding
from laplace_lora.capture.parameter_hooks import without_hooks
from laplace_lora.data.batches import Batch, splits_by_example
from laplace_lora.data.examples import Examples
from laplace_lora.data.masks import joined_masks
from laplace_lora.data.messages import BACKWARD
from laplace_lora.data.steps import before_pass

Visitor = Callable[[int, int, Tensor], None]


class Tape:
    """One recorded forward pass.

    A map that was called several times, in a model whose layers share weights or that runs on both
    texts of a preference pair, has the tokens of all its calls, concatenated in order. So has one
    that sees several rows of an example, as of its choices, in one call.

    Attributes:
        maps: The maps: those recorded, then whole tensors, which have nothing to record.
        examples: Number of examples.
        inputs: Input of each recorded map, ``(batch, tokens, q)`` or ``(batch, q)``, detached.
        output: The model's output, ``(rows, outputs)``, detached; one row per example, or one per
            scored token.
        rerun: From the index of an example to the model's output for it alone, with its graph.
        with_images: Which texts have an image, where some have, see `texts_with_images`.
        gain: How much larger gradients are than what is sent backward, where float16 does not
            hold them, see `gradient_scale`.
    """

    def __init__(
        self,
        maps: Sequence[LinearMap],
        padding: Padding,
        calls: Sequence[Sequence[Call]],
        output: Tensor,
        sources: dict[int, list[Address]],
        rerun: Callable[[int], Tensor],
        examples: Examples,
        with_images: Tensor,
    ) -> None:
        self.maps = maps
        self.with_images = with_images
        self.rerun = rerun
        self.gain: float | None = None
        self.examples = examples.count
        self._rows = examples
        self._sources = sources
        self.output = output.detach()
        self._padding = padding
        self._masks: dict[int, Tensor | None] = {}
        self._output = output
        # As the layers got them: an example may have several rows.
        self._inputs = [
            [linear.read(call) for call in map_calls]
            for linear, map_calls in zip(maps, calls, strict=False)
        ]
        # Projections that share an input in each of their calls share the joined input as well.
        distinct = {addresses(inputs): inputs for inputs in self._inputs}
        joined = {
            place: _joined([examples.folded(x) for x in inputs])
            for place, inputs in distinct.items()
        }
        self.inputs = [joined[addresses(inputs)] for inputs in self._inputs]
        self._outputs = [[call.output for call in map_calls] for map_calls in calls]
        self._places = [[call.place for call in map_calls] for map_calls in calls]
        output_ids = {id(out) for outputs in self._outputs for out in outputs}
        # A map fed by another recorded map lies on that map's backward path, so its gradient need
        # not be kept alive as a target: lora_B's wide gradients are freed once they were visited.
        # Where lora_A is not recorded, its short output on lora_B's far side is the target.
        targets: list[GradientEdge] = [
            call.source or call.gradient.edge
            for some in calls
            for call in some
            if id(call.x) not in output_ids
        ]
        self._targets = list(dict.fromkeys(targets))
        self._gradients = [[call.gradient for call in map_calls] for map_calls in calls]

    def calls(self, i: int) -> Sequence[Tensor]:
        """Return the inputs of a recorded map, call by call."""
        return self._inputs[i]

    def called(self, i: int) -> tuple[str, int]:
        """Return a recorded map's name, and how often it was called."""
        return self.maps[i].name, len(self._inputs[i])

    def mask(self, i: int) -> Tensor | None:
        """Return which tokens of a recorded map are real, ``(batch, tokens)``; ``None`` if all are.

        Raises:
            ValueError: If the attention masks in the batch do not fit the map's tokens.
        """
        if i not in self._masks:
            linear, inputs = self.maps[i], self._inputs[i]
            parts = []
            for call, x in enumerate(inputs if linear.has_tokens else []):
                place = self._places[i][call]
                mask = self._padding.mask(call, len(inputs), x, linear.name, place)
                mask = None if mask is None else self._rows.folded_mask(mask)
                parts.append((self._rows.folded(x), mask))
            self._masks[i] = joined_masks(parts)
        return self._masks[i]

    @cached_property
    def input_groups(self) -> list[int]:
        """For each recorded map, the index of the first map with the same input."""
        pairs = zip(self.maps, self._inputs, strict=False)
        sources = [self._sources_of(linear, calls) for linear, calls in pairs]
        return input_groups(self.inputs, sources, self.output.device)

    def _sources_of(self, linear: LinearMap, calls: Sequence[Tensor]) -> Sequence[Address] | None:
        """Return where the inputs of a map's layer lay, if they have the shapes of the map's."""
        sources = self._sources.get(id(linear.layer))
        shapes = [x.shape for x in calls]
        return sources if sources and shapes == [at[2] for at in sources] else None

    @property
    def has_rows_apart(self) -> bool:
        """Whether an example has several rows in the input of some layer."""
        return any(not self._rows.are_rows_of(x) for inputs in self._inputs for x in inputs)

    @property
    def images_are_even(self) -> bool:
        """Whether as many rows of images as examples are one of each."""
        return bool(self.with_images.all())

    @property
    def divides(self) -> bool:
        """Whether every example has its own row of each tensor of the batch."""
        return self.images_are_even and splits_by_example(self.batch, self.examples)

    @property
    def batch(self) -> Batch:
        """The batch that the model ran on."""
        return self._padding.batch

    def coarsest(self, i: int, parameter: Tensor) -> torch.dtype:
        """Return the coarsest dtype in which a recorded map computes, its tensor's included."""
        tensors = [parameter, *self._inputs[i], *self._outputs[i]]
        floating = [t.dtype for t in tensors if t.is_floating_point()]
        return max(floating, key=lambda dtype: torch.finfo(dtype).eps)

    def gradient_sizes(self, column: Tensor) -> list[float]:
        """Return the largest gradient of each recorded map; the graph is kept.

        Args:
            column: Gradient with respect to the output, ``(1, batch, outputs)``.
        """
        found: list[float] = []
        self._passes(column, lambda _, i, grad: found.append(largest(grad)), self._targets, True)
        return found

    def scale(self, columns: Tensor) -> float:
        """Return what gradients are multiplied by on their way backward.

        Args:
            columns: Gradients with respect to the output, as of `backward`.
        """
        return 1.0 if self.gain is None else gradient_scale(columns, self.gain)

    def backward(
        self, columns: Tensor, visit: Visitor, parameters: Sequence[Tensor] | None = None
    ) -> tuple[Tensor | None, ...]:
        """Run one backward pass per column; frees the graph after the last.

        Args:
            columns: Gradients with respect to the output, ``(columns, batch, outputs)``.
            visit: Called with the indices of column and map and the gradient with respect to the
                map's output, ``(batch, tokens, p)`` or ``(batch, p)``, as soon as the backward
                pass has computed it. Not called for a map on which the output does not depend.
            parameters: Tensors whose gradients autograd is to compute in the same passes; then the
                graph is kept.

        Returns:
            Their gradients in the last pass, ``None`` for those that the output does not depend on.
        """
        targets = self._targets if parameters is None else parameters
        if self.gain is None:
            return self._passes(columns, visit, targets, parameters is not None)
        scale = self.scale(columns)
        found = self._passes(
            columns.float() * scale,
            lambda column, i, grad: visit(column, i, widened(grad, scale)),
            targets,
            parameters is not None,
        )
        return tuple(None if grad is None else widened(grad, scale) for grad in found)

    def _passes(
        self, columns: Tensor, visit: Visitor, targets: Sequence[Any], keeps_graph: bool
    ) -> tuple[Tensor | None, ...]:
        found: tuple[Tensor | None, ...] = ()
        if not targets:
            return found
        column = 0
        pending: dict[int, dict[int, Tensor]] = {}  # gradients of maps whose calls are not all seen

        def finish(i: int) -> None:
            by_call = pending.pop(i)
            for call, out in enumerate(self._outputs[i]):
                if call not in by_call:
                    zeros = torch.zeros_like(out)
                    by_call[call] = self.maps[i].map_grad(self._inputs[i][call], zeros)
            grads = [by_call[call] for call in range(len(self._outputs[i]))]
            if self.maps[i].sums_tokens:
                visit(column, i, torch.stack([self._rows.summed(g) for g in grads]).sum(0))
            else:
                visit(column, i, _joined([self._rows.folded(g) for g in grads]))

        def receive(i: int, call: int, grad: Tensor) -> None:
            by_call = pending.setdefault(i, {})
            calls, place = len(self._outputs[i]), self._places[i][call]
            grad = self._padding.cleaned(call, calls, grad, self.maps[i].name, place)
            by_call[call] = self.maps[i].map_grad(self._inputs[i][call], grad)
            if len(by_call) == len(self._outputs[i]):
                finish(i)

        tensors = [target for target in targets if isinstance(target, Tensor)]
        receivers = (
            (gradient, partial(receive, i, call))
            for i, gradients in enumerate(self._gradients)
            for call, gradient in enumerate(gradients)
        )
        with OutputGradient.watched(receivers), without_hooks(tensors):
            for column in range(len(columns)):
                before_pass(BACKWARD)
                found = torch.autograd.grad(
                    self._output,
                    targets,
                    columns[column].to(self._output.dtype),
                    retain_graph=keeps_graph or column + 1 < len(columns),
                    allow_unused=True,
                )
                for i in list(pending):  # the output does not depend on all calls of these
                    finish(i)
        return found


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tokens of several calls, concatenated."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat([t if t.ndim == 3 else t.unsqueeze(1) for t in tensors], dim=1)
