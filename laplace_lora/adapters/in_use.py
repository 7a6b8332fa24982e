"""Which tensors of a posterior take part in a model as it is now: checks before each use."""

from __future__ import annotations

from collections.abc import Sequence

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from laplace_lora.adapters.peft_state import adapter_parameters, check_adapters
from laplace_lora.adapters.plain_names import adapters_in
from laplace_lora.adapters.selection import listed
from laplace_lora.data.sharding import in_pieces


def check_runs(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Refuse a model in which tensors of a posterior do not run: samples of them would do nothing.

    Args:
        model: Any module.
        parameters: Tensors that were trainable in it once.

    Raises:
        RuntimeError: See `check_adapters`; or if a tensor has left the model, or its adapter is not
            active.
    """
    modules = list(model.named_modules())
    in_pieces(module for _, module in modules)
    check_adapters(modules)
    names = {id(p): name for name, p in model.named_parameters()}
    _check_used(modules, [(names.get(id(p), "of a lost name"), p) for p in parameters], set(names))


def check_in_use(
    modules: Sequence[tuple[str, nn.Module]], tensors: Sequence[tuple[str, nn.Parameter]]
) -> None:
    """Refuse tensors that the model no longer uses, or of which it computes no gradient.

    Args:
        modules: All modules of the model, by name.
        tensors: Names and tensors that were trainable in it once.

    Raises:
        RuntimeError: If one has left the model, its adapter is not active, it is frozen, or it was
            made in inference mode.
    """
    present = [p for _, module in modules for p in module._parameters.values() if p is not None]
    _check_used(modules, tensors, set(map(id, present)))
    if any(p.is_inference() for p in present):
        made = [name for name, p in modules[0][1].named_parameters() if p.is_inference()]
        raise RuntimeError(
            f"weights ({listed(made, 1)}) were made in torch.inference_mode and can have no "
            "gradient; load the model outside of it, or go on with `copy.deepcopy(model)`"
        )
    frozen = [name for name, p in tensors if not p.requires_grad]
    if frozen:
        raise RuntimeError(
            f"tensors of the posterior ({listed(frozen, 1)}) were frozen after it was made, and it "
            "needs their gradients; undo it with `model.get_parameter(name).requires_grad_(True)` "
            "or, for all of an adapter, `model.set_adapter(name)`"
        )


def _check_used(
    modules: Sequence[tuple[str, nn.Module]],
    tensors: Sequence[tuple[str, nn.Parameter]],
    present: set[int],
) -> None:
    gone = [name for name, p in tensors if id(p) not in present]
    if gone:
        raise RuntimeError(
            f"tensors of the posterior ({listed(gone, 1)}) are no longer part of the model: its "
            "adapter was unloaded, merged into the base model, deleted or loaded anew. Make "
            "the posterior on the model as it is now, or load it with `from_pretrained`"
        )
    inactive = _inactive(modules, tensors)
    if inactive:
        raise RuntimeError(
            f"tensors of the posterior ({listed(inactive, 1)}) belong to an adapter that is not "
            "active; activate it with `model.set_adapter(name)`"
        )


def _inactive(
    modules: Sequence[tuple[str, nn.Module]], tensors: Sequence[tuple[str, nn.Parameter]]
) -> list[str]:
    """Return the names of those tensors whose adapter is not active."""
    holders = (m for _, m in modules if isinstance(m, (BaseTunerLayer, ModulesToSaveWrapper)))
    idle = {name for holder in holders for name in adapters_in(holder) - {*holder.active_adapters}}
    # Asked for every batch: most names tell it, and looking the rest up takes longer.
    unclear = [(name, p) for name, p in tensors if idle & set(name.split("."))] if idle else []
    is_active = adapter_parameters(modules[0][1]) if unclear else {}
    return [name for name, p in unclear if is_active.get(id(p)) is False]
