"""Hooks that sum a module's input and gradient covariances while the user runs the model.

See `factors` for a loop over a data set that needs no hooks from the user.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from laplace_lora.capture.places import Places
from laplace_lora.curvature.kfac_rows import KfacRows
from laplace_lora.data.masks import Place, token_mask
from laplace_lora.data.sharding import unwrapped
from laplace_lora.functional.called_with import ModelCalls
from laplace_lora.functional.running_factors import RunningFactor, running
from laplace_lora.functional.selection import selected_maps
from laplace_lora.models.changes.autocast import in_full_precision
from laplace_lora.models.changes.compiled import EagerUntilRemoved
from laplace_lora.models.changes.thread_hooks import OwnHooks

Called: TypeAlias = Callable[[], Mapping[str, Any]]  # the masks of the call that runs
Handle: TypeAlias = RemovableHandle | OwnHooks | EagerUntilRemoved


class Hooks(list[Handle]):
    """Handles of registered hooks; as a context manager it always removes them on exit."""

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            remove_hooks(self)
        finally:
            remove_hooks(self)  # for an interrupt of the first


def save_input_hook(
    module_name: str,
    activations: dict[str, RunningFactor],
    n_kfac: int | None,
    lr_threshold: int,
    has_bias: bool = False,
    svd_dtype: torch.dtype | None = None,
    *,
    masks: Mapping[str, Any] | None = None,
    positions: str = "all",
) -> Callable[..., None]:
    """Return a forward pre-hook that adds ``Σ_n (1/T_n) Σ_t a aᵀ`` of a module's inputs.

    In an encoder-decoder the hook must be told, as its last argument, whether it is called at the
    tokens of the ``"encoder"`` or the ``"decoder"``, as `register_hooks` does.

    Args:
        module_name: Key in ``activations``.
        activations: Holds the sum; it unpacks into the factor and whether it is low-rank.
        n_kfac: Rank of a low-rank factor; ``None`` keeps it dense.
        lr_threshold: Inputs shorter than this, the 1 of a bias included, keep a dense factor.
        has_bias: Append a 1 to the inputs, so that the bias is a column of the weight.
        svd_dtype: Dtype of the sums; ``None`` for float32, or the inputs' if wider.
        masks: Where ``attention_mask``, ``(batch, tokens)``, is looked up when the hook runs;
            ``None`` treats every token as real.
        positions: ``"all"`` real tokens, or each example's ``"last"`` one.
    """
    rows = KfacRows(positions=positions)

    @in_full_precision
    def hook(
        module: nn.Module,
        args: tuple[Any, ...],
        place: Place | None = None,
        called: Mapping[str, Any] | None = None,
    ) -> None:
        if _runs_again():
            return  # these inputs are in the sum
        x = args[0].detach()
        factor = running(
            activations, module_name, x, x.shape[-1] + has_bias, n_kfac, lr_threshold, svd_dtype
        )
        mask = token_mask(masks if called is None else called, x, module_name, place)
        factor.update(*rows.of_input(x, mask, factor))

    return hook


def save_output_grad_hook(
    module_name: str,
    output_grads: dict[str, RunningFactor],
    n_kfac: int | None,
    lr_threshold: int,
    svd_dtype: torch.dtype | None = None,
    *,
    masks: Mapping[str, Any] | None = None,
    positions: str = "all",
) -> Callable[..., None]:
    """Return a full backward hook that adds ``Σ_n Σ_t g gᵀ`` of a module's output gradients.

    For a curvature that does not depend on the batch size, differentiate a sum over examples, not
    a mean. As for `save_input_hook`, the last argument may say where an encoder-decoder's layer is.

    Args:
        module_name: Key in ``output_grads``.
        output_grads: Holds the sum; it unpacks into the factor and whether it is low-rank.
        n_kfac: Rank of a low-rank factor; ``None`` keeps it dense.
        lr_threshold: Outputs shorter than this keep a dense factor.
        svd_dtype: Dtype of the sums; ``None`` for float32, or the gradients' if wider.
        masks: Where ``attention_mask``, ``(batch, tokens)``, is looked up when the hook runs;
            ``None`` treats every token as real.
        positions: ``"all"`` real tokens, or each example's ``"last"`` one.
    """
    rows = KfacRows(positions=positions)

    @in_full_precision
    def hook(
        module: nn.Module,
        grad_input: Any,
        grad_output: tuple[Tensor, ...],
        place: Place | None = None,
        called: Mapping[str, Any] | None = None,
    ) -> None:
        grad = grad_output[0].detach()
        factor = running(
            output_grads, module_name, grad, grad.shape[-1], n_kfac, lr_threshold, svd_dtype
        )
        mask = token_mask(masks if called is None else called, grad, module_name, place)
        factor.update(rows.of_grad(grad, mask))

    return hook


def register_hooks(
    model: nn.Module,
    activations: dict[str, RunningFactor],
    output_grads: dict[str, RunningFactor],
    target_module_keywords: Sequence[str],
    n_kfac: int | None = 10,
    lr_threshold: int = 100,
    exclude_bias: bool = False,
    *,
    masks: Mapping[str, Any] | None = None,
    positions: str = "all",
    match: str = "parts",
) -> Hooks:
    """Register the two hooks on every selected module.

    The hooks sum until they are removed: call the model, differentiate a sum over examples, repeat.
    Remove them with `remove_hooks`, or use the result in a ``with`` statement. Until then compiled
    modules run as they were written. What gradient checkpointing runs again is counted once. The
    head of a classifying decoder runs at all tokens in such calls, over which its inputs are
    averaged; `calculate_kronecker_factors` has it run at the one token whose logits count.

    Args:
        model: Any module.
        activations: Empty dictionary for the input covariances, by module name.
        output_grads: Empty dictionary for the gradient covariances, by module name.
        target_module_keywords: Whole parts of module names, see `selected_maps`.
        n_kfac: Rank of low-rank factors; ``None`` keeps all dense.
        lr_threshold: Sides shorter than this stay dense.
        exclude_bias: Treat all biases as fixed.
        masks: Where ``attention_mask``, ``(batch, tokens)``, is looked up when a hook runs;
            ``None`` for the one with which the model is called, or the transformer inside it.
        positions: ``"all"`` real tokens, or each example's ``"last"`` one.
        match: ``"parts"``, or ``"substring"`` for bayesian_lora's keywords, see `selected_maps`.

    Raises:
        TypeError: If the keywords are a single string.
        ValueError: If a keyword selects no module, or a dictionary already holds one.

    Without `masks`, a selected layer that later runs in no call of ``model`` raises `RuntimeError`,
    and `ValueError` if it is not known which of its tokens are real.
    """
    selected = selected_maps(model, target_module_keywords, exclude_bias, match)
    present = [
        linear.name for linear, _ in selected if linear.name in {**activations, **output_grads}
    ]
    if present:
        raise ValueError(f"the dictionaries already hold {present[0]!r}; pass empty ones")
    own, eager = OwnHooks(), EagerUntilRemoved(list(model.modules()))
    hooks = Hooks([own, eager])
    try:
        eager.start()
        calls = ModelCalls(model, hooks) if masks is None else None
        places = Places(unwrapped(model), [linear.module for linear, _ in selected], own)
        options: dict[str, Any] = {"masks": masks, "positions": positions}
        for linear, has_bias in selected:
            name, module = linear.name, linear.module
            called = None if calls is None else partial(calls.called.of, name, {})
            if calls is not None:
                hooks.append(module.register_forward_pre_hook(_within(calls, name)))
            on_input = save_input_hook(name, activations, n_kfac, lr_threshold, has_bias, **options)
            on_grad = save_output_grad_hook(name, output_grads, n_kfac, lr_threshold, **options)
            hooks.append(module.register_forward_pre_hook(_at_place(on_input, places, called)))
            hooks.append(module.register_forward_hook(_on_gradient(on_grad, places, called)))
    except BaseException:
        remove_hooks(hooks)
        raise
    return hooks


def remove_hooks(hooks: list[Handle]) -> None:
    """Remove hooks from their modules and empty the list."""
    for hook in hooks:
        hook.remove()
    hooks.clear()


def _runs_again() -> bool:
    """Return whether gradient checkpointing runs a layer again, within a backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)


def _within(calls: ModelCalls, name: str) -> Callable[..., None]:
    """Return a forward pre-hook that refuses a layer whose masks are not known."""

    def hook(module: nn.Module, args: Any) -> None:
        if not _runs_again():
            calls.check(name, args[0])

    return hook


def _at_place(
    hook: Callable[..., None], places: Places, called: Called | None
) -> Callable[..., None]:
    """Return a forward pre-hook that is told where its module stands, and the masks of the call."""

    def pre_hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        hook(module, args, places.of(args[0]), None if called is None else called())

    return pre_hook


def _on_gradient(
    hook: Callable[..., None], places: Places, called: Called | None
) -> Callable[..., None]:
    """Return a forward hook that calls a backward hook with the output's gradient.

    `nn.Module.register_full_backward_hook` would do the same, but warns if no input of the module
    needs a gradient, as in the first layer.
    """

    def forward_hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            place = places.of(args[0])
            # Before the gradient comes, the model may be called with other masks.
            masks = None if called is None else dict(called())
            output.register_hook(lambda grad: hook(module, None, (grad,), place, masks))

    return forward_hook
