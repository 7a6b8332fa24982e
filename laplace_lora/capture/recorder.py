"""`record`: run a model once with hooks on its trainable linear maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from laplace_lora.adapters.maps import Call, LinearMap
from laplace_lora.adapters.peft_state import calls_twice
from laplace_lora.capture.tape import Address, Tape, address
from laplace_lora.data.batches import Batch, one_example
from laplace_lora.data.pairs import passes
from laplace_lora.models.modes import evaluation_mode


class MisfitError(RuntimeError):
    """A layer's calls cannot be represented by Kronecker factors.

    Args:
        message: The reason, for the first such map.
        maps: Indices of all such maps.
    """

    def __init__(self, message: str, maps: Sequence[int]) -> None:
        super().__init__(message)
        self.maps = maps


def record(
    model: Callable[[Any], Tensor],
    maps: Sequence[LinearMap],
    batch: Batch,
    masks: Mapping[str, Any] | None = None,
    skip_idle: bool = False,
    examples: int | None = None,
) -> Tape:
    """Run a model on a batch and record its trainable maps; all hooks are removed again.

    Args:
        model: From a batch to ``(batch, outputs)``.
        maps: The maps to record.
        batch: The model's input.
        masks: Mapping in which attention masks are looked up on demand; ``None`` for the batch.
        skip_idle: Leave out maps that do not run, instead of refusing them.
        examples: Number of examples, if it is not the number of output rows.

    Raises:
        ValueError: If the model's output is not ``(batch, outputs)``.
        MisfitError: If a map did not run, ran with inputs of different shapes, or with one whose
            first dimension is not the batch.
        RuntimeError: If the output carries no gradient.
    """
    recorded = [linear for linear in maps if linear.module is not None]
    calls: dict[int, list[Call]] = {i: [] for i in range(len(recorded))}

    def hook(i: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]:
        return lambda module, args, kwargs, output: calls[i].append(Call(args, kwargs, output))

    sources: dict[int, list[Address]] = {}

    def note_source(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs:  # the address only, to keep the tensor itself out of memory
            sources.setdefault(id(layer), []).append(address(inputs[0]))

    with ExitStack() as stack, torch.enable_grad():
        for i, linear in enumerate(recorded):
            handle = linear.module.register_forward_hook(hook(i), with_kwargs=True)
            stack.callback(handle.remove)
        for layer in {linear.layer for linear in maps if linear.layer is not None}:
            stack.callback(layer.register_forward_pre_hook(note_source).remove)
        output = model(batch)
    mask_source = batch if masks is None else masks
    texts = len(passes(mask_source))
    for i, linear in enumerate(recorded):
        if calls_twice(linear.layer) and len(calls[i]) % (2 * texts) == 0:
            calls[i] = calls[i][1::2]
    if skip_idle:
        maps = recorded = [linear for i, linear in enumerate(recorded) if calls[i]]
        calls = dict(enumerate(map_calls for map_calls in calls.values() if map_calls))
    if output.ndim != 2:
        raise ValueError(
            f"the model returned shape {tuple(output.shape)}, expected (batch, outputs); give "
            "LogitsModel `target_ids` or an `output` callable"
        )
    if any(calls.values()) and not output.requires_grad:
        raise RuntimeError(
            "the outputs carry no gradient; the model must not run under torch.no_grad or detach "
            "them"
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
                f"the output of layer {linear.name!r} carries no gradient; it must not run under "
                "torch.no_grad, nor under gradient checkpointing without use_reentrant=False"
            )
    # Whole tensors may be rerun after the caller has put the model back into training mode.
    was_training = getattr(model, "training", True)

    @torch.enable_grad()
    def rerun(n: int) -> Tensor:
        mode = nullcontext() if was_training else evaluation_mode(cast(nn.Module, model))
        with mode:
            return model(one_example(batch, n))

    ordered = [calls[i] for i in range(len(recorded))]
    return Tape(maps, mask_source, ordered, output, sources, rerun, examples)
