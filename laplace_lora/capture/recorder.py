"""`record`: run a model once with hooks on its trainable linear maps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from laplace_lora.adapters.maps import Call, LinearMap
from laplace_lora.adapters.peft_state import calls_twice
from laplace_lora.adapters.selection import listed
from laplace_lora.capture.input_groups import Address, address
from laplace_lora.capture.output_gradients import OutputGradient
from laplace_lora.capture.padding import Padding
from laplace_lora.capture.places import Places
from laplace_lora.capture.tape import Tape
from laplace_lora.data.batches import Batch, one_example
from laplace_lora.data.examples import Examples
from laplace_lora.data.pairs import passes
from laplace_lora.models.changes.modes import evaluation_mode
from laplace_lora.models.changes.thread_hooks import own_hooks
from laplace_lora.models.inputs.image_rows import texts_with_images


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
    masks: Callable[[str], Mapping[str, Any]] | None = None,
    skip_idle: bool = False,
    examples: int | None = None,
    module: nn.Module | None = None,
    config: Any = None,
) -> Tape:
    """Run a model on a batch and record its trainable maps; all hooks are removed again.

    Args:
        model: From a batch to ``(batch, outputs)``.
        maps: The maps to record.
        batch: The model's input.
        masks: From a map's name to where its attention masks are looked up, once the model has
            run; ``None`` for the batch.
        skip_idle: Leave out maps that do not run, instead of refusing them.
        examples: Number of examples, if it is not the number of output rows.
        module: The module that runs, where ``model`` is a function around it.
        config: The transformer's configuration; by default that of the module.

    Raises:
        ValueError: If the model's output is not ``(batch, outputs)``.
        MisfitError: If a map did not run, ran with inputs of different shapes, or with one whose
            rows are not the examples', see `Examples`.
        RuntimeError: If the output carries no gradient.
    """
    recorded = [linear for linear in maps if linear.module is not None]
    root = model if module is None else module
    with _listening(recorded, root) as (calls, sources), torch.enable_grad():
        # Some models write into the mapping that they are called with.
        output = model(copy.copy(batch) if isinstance(batch, Mapping) else batch)
    padding = Padding(batch, root, masks)
    texts = padding.texts
    pairs = zip(recorded, calls, strict=True)
    calls = [_counted_once(linear, seen, texts) for linear, seen in pairs]
    calls = padding.cleaned_calls(calls, [linear.name for linear in recorded])
    if skip_idle:
        maps = recorded = [linear for linear, seen in zip(recorded, calls, strict=True) if seen]
        calls = [seen for seen in calls if seen]
    whole = [linear.name for linear in maps if linear.module is None]
    _check_output(output, any(calls), whole)
    rows = Examples(len(output) if examples is None else examples, passes(batch))
    _check_calls(recorded, calls, rows, texts)
    config = getattr(root, "config", None) if config is None else config
    with_images = texts_with_images(batch, config)
    rerun = _rerun(model, batch, rows.count, bool(with_images.all()))
    return Tape(maps, padding, calls, output, sources, rerun, rows, with_images)


@contextmanager
def _listening(
    maps: Sequence[LinearMap], model: object
) -> Iterator[tuple[list[list[Call]], dict[int, list[Address]]]]:
    """Yield the calls of each map, and where the inputs of their layers lie; filled by hooks."""
    calls: list[list[Call]] = [[] for _ in maps]
    sources: dict[int, list[Address]] = {}

    def note_call(linear: LinearMap, seen: list[Call]) -> Callable[[Any, Any, Any], None]:
        within: list[tuple[Tensor, Tensor]] = []

        def note_inner(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            within[:] = [(Call(args, kwargs, output).x, output)]

        def note(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if linear.is_idle:
                within.clear()
                return
            source = _source(args) if linear.widens else None
            place = places.of(args[0] if args else None)
            if linear.inner is not None:
                if not within:
                    return  # the module went another way, which the map does not know
                x, output = linear.step(Call(args, kwargs, output).x, output, within.pop())
                args, kwargs = (x,), {}
            gradient = OutputGradient.of(output)
            seen.append(Call(args, kwargs, output, gradient, source, place))

        if linear.inner is not None:
            hooks.on_output(linear.inner, note_inner)
        return note

    def note_source(layer: nn.Module) -> Callable[[Any, Any], None]:
        def note(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if args and isinstance(args[0], Tensor):  # its address only, to keep it out of memory
                sources.setdefault(id(layer), []).append(address(args[0]))

        return note

    with own_hooks() as hooks:
        places = Places(model, [linear.module for linear in maps], hooks)
        for linear, seen in zip(maps, calls, strict=True):
            # Before the user's own hooks, which may replace the output.
            hooks.on_output(linear.module, note_call(linear, seen), first=True)
        for layer in {linear.layer for linear in maps if linear.layer is not None}:
            hooks.on_input(layer, note_source(layer))
        yield calls, sources


def _source(args: tuple[Any, ...]) -> GradientEdge | None:
    """Return where a layer's first argument stands in the graph, now that the layer has run."""
    x = args[0] if args else None
    return get_gradient_edge(x) if isinstance(x, Tensor) and x.requires_grad else None


def _counted_once(linear: LinearMap, calls: list[Call], texts: int) -> list[Call]:
    """Return a map's calls without those that its layer makes for its own use."""
    twice = calls_twice(linear.layer) and len(calls) % (2 * texts) == 0
    return calls[1::2] if twice else calls


def _check_output(output: Tensor, any_calls: bool, whole: list[str]) -> None:
    if output.ndim != 2:
        raise ValueError(
            f"the model returned shape {tuple(output.shape)}, expected (batch, outputs); give "
            "LogitsModel `target_ids` or an `output` callable"
        )
    if any_calls and not output.requires_grad:
        raise RuntimeError(
            "the outputs carry no gradient; the model must not run under torch.no_grad or "
            "torch.inference_mode, nor detach them"
        )
    if whole and not output.requires_grad:
        raise RuntimeError(
            f"the outputs depend on none of the trainable tensors ({listed(whole)}): their layers "
            "do not run, as those of LoRA on nn.MultiheadAttention's `out_proj` alone, or their "
            "outputs are detached. Adapt other layers (there: the attention itself)"
        )


def _check_calls(
    maps: Sequence[LinearMap], calls: Sequence[list[Call]], examples: Examples, texts: int
) -> None:
    reasons = [
        linear.misfit(seen, examples, texts) for linear, seen in zip(maps, calls, strict=True)
    ]
    misfits = [i for i, reason in enumerate(reasons) if reason is not None]
    if misfits:
        raise MisfitError(
            f"{reasons[misfits[0]]}; freeze its parameters first, or give them a diagonal block "
            "with uncovered='diag' (an exact posterior stays exact)",
            misfits,
        )
    for linear, seen in zip(maps, calls, strict=True):
        if any(call.gradient is None for call in seen):
            raise RuntimeError(
                f"the output of layer {linear.name!r} carries no gradient; it must not run under "
                "torch.no_grad or torch.inference_mode, nor under gradient checkpointing without "
                "use_reentrant=False"
            )


def check_masks(tape: Tape) -> None:
    """Refuse layers whose tokens no attention mask of the batch fits.

    Speech models, for one, take a mask of samples, and their layers see frames.

    Raises:
        MisfitError: If there are any.
    """
    misfits: dict[int, ValueError] = {}
    for i in range(len(tape.inputs)):
        try:
            tape.mask(i)
        except ValueError as error:
            misfits[i] = error
    if misfits:
        raise MisfitError(
            f"{next(iter(misfits.values()))}. Leave the mask out if all lengths are equal, freeze "
            "the layers, or give them a diagonal block, which needs no mask, with uncovered='diag'",
            list(misfits),
        )


def _rerun(
    model: Callable[[Any], Tensor], batch: Batch, examples: int, is_even: bool
) -> Callable[[int], Tensor]:
    """Return the model's output for one example of a batch, in the mode that it is in now."""
    # Whole tensors may be rerun after the caller has put the model back into training mode.
    was_training = getattr(model, "training", True)

    @torch.enable_grad()
    def rerun(n: int) -> Tensor:
        mode = nullcontext() if was_training else evaluation_mode(cast(nn.Module, model))
        with mode:
            if examples == 1:
                return model(batch)
            try:
                if not is_even:  # a text may run with another's image
                    raise ValueError("some of its texts have no image, others have")
                return model(one_example(batch, n))
            except (IndexError, RuntimeError, ValueError) as error:
                raise RuntimeError(
                    f"example {n} of a batch cannot be run without the others ({error}); where "
                    "images or other inputs do not have one row for each example, give batches of "
                    "one example (batch_size=1)"
                ) from error

    return rerun
